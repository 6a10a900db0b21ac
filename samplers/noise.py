"""Noise by counter: the k-th noise of sample i under seed s is a pure function of (s, i, k).

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", SC'11) in integer tensor arithmetic, which
gives the same bits for any batch size, order of work or number of devices; then Box-Muller in float64, which the device must
have: CPU and CUDA, not MPS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10
_AT_ONCE = 1 << 17  # numbers that a CPU draws at a time, so that what is made on the way stays in its cache
_AHEAD, _SMALL = 16, 1 << 13  # noises drawn together, where so many numbers are less work than the calls to draw them


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random 32-bit words for each counter.

    Args:
        counter: four int64 tensors that broadcast against each other, each word in [0, 2^32).
        seed: the 64-bit key.

    Returns:
        Four int64 tensors of the broadcast shape, each word uniform in [0, 2^32).
    """
    copies = [word.clone(memory_format=torch.contiguous_format) for word in torch.broadcast_tensors(*counter)]
    # the same statements serve both; NumPy starts each of the hundred in a third of torch's time
    a, b, c, d = _arrays(copies) or copies
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        a *= _MULTIPLIERS[0]
        c *= _MULTIPLIERS[1]
        # the product wraps modulo 2^64, and an arithmetic shift followed by a mask still yields its upper word
        b ^= key0
        b ^= c >> 32
        b &= _MASK
        d ^= key1
        d ^= a >> 32
        d &= _MASK
        a, b, c, d = b, c, d, a  # of the products the lower word is wanted, and masked with what it goes into
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    b &= _MASK
    d &= _MASK
    a, b, c, d = (torch.from_numpy(word) if isinstance(word, np.ndarray) else word for word in (a, b, c, d))
    return a, b, c, d


def _arrays(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Arrays on the memory of tensors; none where they are not on a CPU, or stand for others, as under `torch.func`."""
    if tensors[0].device.type != "cpu":
        return []
    try:
        return [tensor.numpy() for tensor in tensors]
    except RuntimeError:
        return []


def standard_normal(
    seed: int,
    indices: Tensor,
    number: int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    out: Tensor | None = None,
) -> Tensor:
    """Standard normal noise, one independent stream for each sample index and noise number.

    Args:
        seed: in [0, 2^64).
        indices: (B,) int64 sample indices in [0, 2^63).
        number: which noise of the sample, in [0, 2^32): 0 is the start noise, k + 1 the k-th noise of a stochastic plan.
        shape: of one sample.
        dtype, device: of the result; the numbers are drawn in float64 whatever the dtype.
        out: (B, *shape), of that dtype on that device, to be written to; None makes one.

    Returns:
        (B, *shape). On a CPU what is made on the way is of the size of 131 072 numbers, or of a sample where out is given and
        not contiguous; elsewhere of the result.
    """
    if out is None:
        out = torch.empty((len(indices), *shape), dtype=dtype, device=device)
    rows = indices.to(device=out.device, dtype=torch.int64)[:, None]
    _draw(out, check_seed(seed), rows, torch.full_like(rows, number))
    return out


def _draw(out: Tensor, seed: int, indices: Tensor, numbers: Tensor) -> None:
    """Write into out (R, *shape): row by row the noise of a number of a sample, both (R, 1); on a CPU in parts."""
    size = math.prod(out.shape[1:])
    rows = columns = max(1, out.numel())
    if out.device.type == "cpu":
        rows, columns = max(1, _AT_ONCE // max(1, size)), _AT_ONCE
    for few, number, part in zip(indices.split(rows), numbers.split(rows), out.split(rows), strict=True):
        whole = part if part.is_contiguous() else torch.empty_like(part, memory_format=torch.contiguous_format)
        for i, piece in enumerate(whole.view(len(few), size).split(columns, dim=1)):
            _fill(piece, seed, few, number, i * columns // 4)
        if whole is not part:
            part.copy_(whole)


def _fill(out: Tensor, seed: int, indices: Tensor, numbers: Tensor, first: int) -> None:
    """Write into out (R, n) the normal numbers of the counters from `first` on, four of each."""
    blocks = torch.arange(first, first + (out.shape[1] + 3) // 4, dtype=torch.int64, device=out.device)
    words = philox((blocks[None, :], numbers, indices & _MASK, indices >> 32), seed)
    uniform = [word.double().add_(0.5).mul_(2.0**-32) for word in words]
    radius = [u.log_().mul_(-2.0).sqrt_() for u in uniform[:2]]
    angle = [u.mul_(2.0 * math.pi) for u in uniform[2:]]
    for k in range(4):
        wave = angle[k % 2].cos() if k < 2 else angle[k % 2].sin_()
        quarter = out[:, k::4]
        quarter.copy_(wave.mul_(radius[k % 2])[:, : quarter.shape[1]])


class SeededNoise:
    """The noise source of a seed: noise k of sample i is a function of (seed, i, k) alone.

    Of small states the next noises are drawn together, which costs little more than one.

    Args:
        seed: in [0, 2^64).
        indices: (B,) integer sample indices, best on the device of the states.

    Raises:
        ValueError: a bad seed.
    """

    def __init__(self, seed: int, indices: Tensor) -> None:
        self._seed, self._indices = check_seed(seed), indices.to(torch.int64, copy=True)
        self._ahead: tuple[int, Tensor] | None = None  # the number of the first, and all; replaced, and not written to

    def __call__(self, k: int, like: Tensor, out: Tensor | None = None) -> Tensor:
        """The k-th noise, of like's shape, dtype and device; written into `out` where that is given."""
        together = min(_AHEAD, _SMALL // max(1, like.numel()))
        if together < 2 or len(like) != len(self._indices):
            return standard_normal(self._seed, self._indices, k + 1, like.shape[1:], like.dtype, like.device, out)
        first, ahead = self._ahead or (k, None)
        if ahead is None or not first <= k < first + together or not _alike(ahead[0], like):
            first, ahead = k, self._drawn(k, together, like)
            self._ahead = first, ahead
        noise = ahead[k - first]
        return noise.clone() if out is None else out.copy_(noise)

    def _drawn(self, first: int, count: int, like: Tensor) -> Tensor:
        """The noises from the first on, (count, *like.shape)."""
        ahead = torch.empty((count, *like.shape), dtype=like.dtype, device=like.device)
        indices = self._indices.to(like.device).repeat(count)[:, None]
        numbers = torch.arange(first + 1, first + 1 + count, device=like.device).repeat_interleave(len(like))[:, None]
        _draw(ahead.flatten(0, 1), self._seed, indices, numbers)
        return ahead


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def sample_indices(indices: Tensor | None, batch: int) -> Tensor:
    """The sample indices of a batch, (B,) int64.

    Raises:
        ValueError: not `batch` non-negative integers.
    """
    if indices is None:
        return torch.arange(batch)
    indices = torch.as_tensor(indices)
    if indices.shape != (batch,) or indices.is_floating_point() or (batch and int(indices.min()) < 0):
        raise ValueError(f"indices must be {batch} non-negative integers, one for each sample, got {indices!r}")
    return indices.to(torch.int64)


def check_seed(seed: int) -> int:
    """The seed as Python's integer, if it is one.

    Raises:
        ValueError: not an integer in [0, 2^64).
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer in [0, 2^64), got {seed!r}")
    return int(seed)
