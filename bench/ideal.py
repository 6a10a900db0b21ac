"""The ideal denoiser: the exact epsilon of a data set taken as it is, for data sets that do not fit a mixture's temporaries.

`x_0` is one of the N samples, each as likely, and `E[x_0 | x_t]` is their mean with the weights
`softmax(-|x_t - alpha x_i|^2 / (2 sigma^2))` (Karras et al. 2022, arXiv:2206.00364, appendix B.3). It equals the mixture
`GaussianMixture.isotropic(data, 0)`, in blocks of the data with a running maximum and sum, so that memory is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.posterior import Scalar, checked_states
from samplers.noise import check_seed
from samplers.schedule import Schedule


class _Stored(NamedTuple):
    """Samples on the device of a state, each of them `scale * stored + shift`."""

    stored: Tensor  # (N, D), as they were given
    squares: Tensor  # (N,) float64: squared lengths of the samples
    scale: float
    shift: float


@dataclass(frozen=True, eq=False, repr=False)
class IdealDenoiser:
    """The empirical distribution of N samples, as a model.

    Args:
        samples: (N, *shape), N >= 1, floating, or uint8 images that stand for [-1, 1] and are kept as bytes.
        chunk: samples that are in float64 at a time, >= 1.

    Raises:
        ValueError: no samples, another type, NaN or Inf, a chunk below 1.
    """

    samples: Tensor
    chunk: int = 1024
    _copies: dict[torch.device, _Stored] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        data = self.samples
        if data.ndim < 2 or not data.numel() or not (data.dtype == torch.uint8 or data.is_floating_point()):
            raise ValueError(f"samples must be (N, *shape), floating or uint8, got {tuple(data.shape)} {data.dtype}")
        if data.is_floating_point() and not data.isfinite().all():
            raise ValueError("samples must be finite, got NaN or Inf")
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")
        with torch.inference_mode(False):
            object.__setattr__(self, "samples", data.detach().cpu().clone())

    def __repr__(self) -> str:
        return f"IdealDenoiser(samples={len(self.samples)}, shape={self.shape})"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample."""
        return tuple(self.samples.shape[1:])

    @property
    def dim(self) -> int:
        """D, the numbers in a sample."""
        return math.prod(self.shape)

    def eps(self, x: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
        """`E[eps | x_t = x]`, computed in float64 and exact up to its rounding.

        Time is about `4 N D` operations for each row, and the reading of the data once for each call: give it large batches.

        Args:
            x: (B, *shape), of a floating dtype, on any device; the data are copied to it once.
            alpha: >= 0, a float or a (B,) tensor.
            sigma: > 0, likewise; a tensor is not checked, which would synchronise the device, and gives NaN at 0.

        Returns:
            Shape, dtype and device of x.

        Raises:
            ValueError: another shape or dtype, or a float level out of range.
        """
        rows, alpha, sigma = self._states(x, alpha, sigma)
        return ((rows - alpha * self._mean_given(rows, alpha, sigma)) / sigma).to(x.dtype).view(x.shape)

    def x0(self, x: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
        """`E[x_0 | x_t = x]`, shape of x; arguments and errors as for `eps`."""
        return self._mean_given(*self._states(x, alpha, sigma)).to(x.dtype).view(x.shape)

    def net(self, schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
        """A network for `EpsModel(net, schedule, predicts="eps")`, as `GaussianMixture.net`."""
        return lambda x, t: self.eps(x, schedule.alpha(t.double()), schedule.sigma(t.double()))

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Samples of the data, (n, *shape) float64, with replacement; sample i of a seed is the same whatever n.

        Raises:
            ValueError: n or seed negative.
        """
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        chosen = np.random.default_rng(check_seed(seed)).random(n) * len(self.samples)
        return _wide(self.samples[torch.from_numpy(chosen).long()])

    def moments_of(self, features: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The exact mean (m,) and covariance (m, m) of features of the data, float64.

        Args:
            features: samples (b, *shape) float64 to (b, m).
        """
        values = torch.cat([features(_wide(block)) for block in self.samples.split(self.chunk)])
        mean = values.mean(0)
        return mean, (values - mean).T @ (values - mean) / len(values)

    def _states(self, x: Tensor, alpha: Scalar, sigma: Scalar) -> tuple[Tensor, Tensor, Tensor]:
        """States (B, D) and levels (B, 1) in float64: differences of large squares need it, whatever x has."""
        return checked_states(x.double() if x.is_floating_point() else x, self.shape, alpha, sigma, lambda: True)

    def _mean_given(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """`E[x_0 | x]`, (B, D) float64."""
        best = torch.full_like(
            alpha, -math.inf
        )  # (B, 1): the largest log-weight so far, which the sums are relative to
        weight, total = torch.zeros_like(alpha), torch.zeros_like(x)
        data = self._on(x.device)
        # a sample is scale * stored + shift; what that does to sums is done to the sums, not to all the data
        across = data.shift * x.sum(1, keepdim=True)
        for block, square in zip(data.stored.split(self.chunk), data.squares.split(self.chunk), strict=True):
            wide = block.double()
            # |x|^2 is common to all samples and cancels
            score = alpha * (data.scale * (x @ wide.T) + across - 0.5 * alpha * square) / sigma**2
            higher = torch.maximum(best, score.amax(1, keepdim=True))
            kept, share = torch.exp(best - higher), torch.exp(score - higher)
            weight = weight * kept + share.sum(1, keepdim=True)
            total = total * kept + share @ wide
            best = higher
        return data.scale * (total / weight) + data.shift

    def _on(self, device: torch.device) -> _Stored:
        if device not in self._copies:
            with torch.inference_mode(False):  # a tensor that is made in inference mode can never meet a gradient
                stored = self.samples.flatten(1).to(device)
                squares = torch.cat([(_wide(block) ** 2).sum(1) for block in stored.split(self.chunk)])
                scale, shift = (1 / 127.5, -1.0) if stored.dtype == torch.uint8 else (1.0, 0.0)
                self._copies[device] = _Stored(stored, squares, scale, shift)
        return self._copies[device]


def ideal_denoiser(data: Tensor | np.ndarray, chunk: int = 1024) -> IdealDenoiser:
    """The ideal denoiser of N samples (N, *shape): uint8 images, or floating numbers; errors as for the class."""
    return IdealDenoiser(torch.from_numpy(np.array(data)) if isinstance(data, np.ndarray) else data, chunk)


def _wide(block: Tensor) -> Tensor:
    """Samples in float64, bytes as [-1, 1]."""
    return block.double() / 127.5 - 1 if block.dtype == torch.uint8 else block.double()
