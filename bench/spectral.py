"""Gaussian mixtures of images in their cosine coefficients: exact epsilon for image-sized data at a small price.

Pixels are nearly uncorrelated in the coefficients of the discrete cosine transform (Ahmed, Natarajan & Rao 1974,
doi:10.1109/T-C.1974.223784), whose variances span seven decades. The few of large variance get a mixture of low-rank Gaussians
(`bench.mixture`); the many others are grouped in bands, with one variance for each band and component. That is still a
mixture of Gaussians in the whole space, with its closed forms, but a component costs what it costs among the few.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.mixture import GaussianMixture
from bench.posterior import Parameters, Parts, Scalar, checked_states, data, float64, joint, mix, noises, split
from samplers.noise import check_seed
from samplers.schedule import Schedule

_CHUNK = 2**22  # numbers in the largest temporary tensor


def cosines(size: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of `size` numbers, (size, size) float64: coefficients are `matrix @ numbers`."""
    k, n = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * k * (n + 0.5) / size) * math.sqrt(2 / size)
    matrix[0] *= math.sqrt(0.5)
    return matrix


def transformed(x: Tensor, matrices: tuple[Tensor, ...]) -> Tensor:
    """Samples (B, *shape) with every axis multiplied by its matrix: the cosine transform, or with the transposes its inverse.

    On three channels it is the mean, red minus blue, and green minus both, which are nearly uncorrelated in photographs.
    """
    for axis, matrix in enumerate(matrices, 1):
        x = (x.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
    return x


def bands_of(count: int, bands: int) -> Tensor:
    """The band of each of `count` coefficients, in order, (count,) int64: `bands` groups of sizes that differ by one at most."""
    parts = torch.tensor_split(torch.arange(count), bands) if bands else ()
    return torch.repeat_interleave(torch.arange(bands), torch.tensor([len(part) for part in parts], dtype=torch.int64))


class _Spectrum(NamedTuple):
    """What is beside the mixture of the first coefficients, in the dtype and on the device of a state."""

    matrices: tuple[Tensor, ...]
    inverses: tuple[Tensor, ...]
    centre: Tensor  # (*shape)
    order: Tensor  # (D,)
    places: Tensor  # (D,), the inverse permutation
    band: Tensor  # (D - d,)
    members: Tensor  # (D - d, G), 1 where a coefficient is of a band
    outside: Tensor  # (K, G)


class _Seen(NamedTuple):
    """What a mixture makes of B states."""

    parts: Parts  # of the first coefficients
    rest: Tensor  # (B, D - d): the others
    floor: Tensor  # (B, K, G): their variances
    joint: Tensor  # (B, K): log w_k + log N_k(x)


@dataclass(frozen=True, eq=False, repr=False)
class SpectralMixture:
    """A mixture of K Gaussians over samples of a given shape, given by their cosine coefficients along every axis.

    The coefficients of `x - centre`, in a given order, are of a mixture in d dimensions for the first d; the others are
    independent of them in each component, with mean 0 and one variance for each of G bands, `bands_of(D - d, G)`. It has the
    methods of `GaussianMixture`.

    Args:
        inside: mixture of shape (d,).
        centre: of the given shape, with D >= d numbers.
        order: (D,), a permutation of the D coefficients.
        outside: (K, G), the variances of the bands, >= 0; G is 0 where d = D, and from 1 to D - d otherwise.
            All numbers are kept as float64 in main memory.

    Raises:
        ValueError: other shapes, NaN or Inf, negative variances, an order that is no permutation.
    """

    inside: GaussianMixture
    centre: Tensor
    order: Tensor
    outside: Tensor
    _casts: dict[tuple[torch.dtype, torch.device], _Spectrum] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name in ("centre", "outside"):
            object.__setattr__(self, name, float64(getattr(self, name), name))
        object.__setattr__(self, "order", torch.as_tensor(self.order, dtype=torch.int64, device="cpu").clone())
        beyond, components = self.dim - self.inside.dim, len(self.inside.weights)
        if self.centre.ndim == 0 or len(self.inside.shape) != 1 or beyond < 0:
            raise ValueError(
                f"inside must be of shape (d,) with d at most the {self.dim} numbers of the centre, got {self.inside.shape}"
            )
        if not torch.equal(self.order.sort().values, torch.arange(self.dim)):
            raise ValueError(f"order must be a permutation of 0 .. {self.dim - 1}, got {self.order}")
        lowest, most = min(beyond, 1), beyond
        if self.outside.ndim != 2 or len(self.outside) != components or not lowest <= self.outside.shape[1] <= most:
            expected = f"({components}, {lowest} to {most})"
            raise ValueError(f"outside must be {expected}, got {tuple(self.outside.shape)}")
        if (self.outside < 0).any():
            raise ValueError(f"outside must be at least 0, got {float(self.outside.min()):g}")

    def __repr__(self) -> str:
        numbers = f"dimensions={self.inside.dim}, rank={self.inside.rank}, bands={self.outside.shape[1]}"
        return f"SpectralMixture(components={len(self.inside.weights)}, shape={self.shape}, {numbers})"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample."""
        return tuple(self.centre.shape)

    @property
    def dim(self) -> int:
        """D, the numbers in a sample."""
        return math.prod(self.shape)

    def eps(self, x: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
        """`E[eps | x_t = x]`, exact up to rounding; arguments and errors as for `GaussianMixture.eps`."""
        return self._by_rows(_eps, x, alpha, sigma).view(x.shape)

    def x0(self, x: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
        """`E[x_0 | x_t = x]`, shape of x, computed without a division by alpha; arguments and errors as for `eps`."""
        return self._by_rows(_x0, x, alpha, sigma).view(x.shape)

    def log_prob(self, x: Tensor, alpha: Scalar = 1.0, sigma: Scalar = 0.0) -> Tensor:
        """`log p_t(x)`, (B,), in nats; the density of the data by default. Arguments and errors as for `eps`."""
        return self._by_rows(_log_prob, x, alpha, sigma)

    def net(self, schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
        """A network for `EpsModel(net, schedule, predicts="eps")`, as `GaussianMixture.net`."""
        return lambda x, t: self.eps(x, schedule.alpha(t.double()), schedule.sigma(t.double()))

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Exact samples of the data, (n, *shape) float64; sample i of a seed is the same, to rounding, whatever n.

        Raises:
            ValueError: n or seed negative.
        """
        first, spectrum = self.inside.sample(n, seed), self._cast(torch.float64, torch.device("cpu"))
        # the first three streams of a seed are the inner mixture's
        rng = np.random.default_rng(np.random.SeedSequence(check_seed(seed)).spawn(4)[3])
        width = self.outside.sqrt()[self.inside.pick(n, seed)][:, spectrum.band]
        rest = torch.from_numpy(rng.standard_normal((n, self.dim - self.inside.dim))) * width
        return spectrum.centre + _pixels(spectrum, first, rest).view(n, *self.shape)

    def mean(self) -> Tensor:
        """The exact mean of the data, (D,) float64."""
        spectrum = self._cast(torch.float64, torch.device("cpu"))
        rest = torch.zeros(1, self.dim - self.inside.dim, dtype=torch.float64)
        return self.centre.flatten() + _pixels(spectrum, self.inside.mean()[None], rest)[0]

    def covariance(self) -> Tensor:
        """The exact covariance of the data, (D, D) float64; `moments_of` has that of a few linear features."""
        return self.moments_of(torch.eye(self.dim, dtype=torch.float64))[1]

    def moments_of(self, linear: Tensor) -> tuple[Tensor, Tensor]:
        """The exact mean (m,) and covariance (m, m) of the features `linear @ x` of the data, float64.

        Args:
            linear: (m, D).
        """
        spectrum = self._cast(torch.float64, torch.device("cpu"))
        linear = linear.double()
        along, across = _coefficients(spectrum, linear, self.inside.dim)
        spread = (self.inside.weights @ self.outside)[spectrum.band]
        return linear @ self.mean(), along @ self.inside.covariance() @ along.T + (across * spread) @ across.T

    def _by_rows(self, function: Callable[..., Tensor], x: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
        """`function(spectrum, parameters, x (b, D), alpha (b, 1), sigma (b, 1))` over chunks of rows that bound the memory."""
        values = checked_states(x, self.shape, alpha, sigma, self._flat)
        dtype, size = values[0].dtype, max(1, _CHUNK // max(self.dim, self.outside.numel(), self.inside.row_numbers))
        spectrum, parameters = self._cast(dtype, x.device), self.inside.parameters(dtype, x.device)
        parts = zip(*(value.split(size) for value in values), strict=True)
        return torch.cat([function(spectrum, parameters, *part) for part in parts]).to(x.dtype)

    def _flat(self) -> bool:
        return self.inside.flat() or bool((self.outside == 0).any())

    def _cast(self, dtype: torch.dtype, device: torch.device) -> _Spectrum:
        if (dtype, device) not in self._casts:
            with torch.inference_mode(False):  # a tensor that is made in inference mode can never meet a gradient
                matrices = tuple(cosines(size).to(dtype=dtype, device=device) for size in self.shape)
                bands = self.outside.shape[1]
                band = bands_of(self.dim - self.inside.dim, bands).to(device)
                members = (
                    torch.nn.functional.one_hot(band, bands).to(dtype) if bands else band.new_zeros(0, 0, dtype=dtype)
                )
                order, inverses = self.order.to(device), tuple(matrix.T.contiguous() for matrix in matrices)
                centre, outside = (v.to(dtype=dtype, device=device) for v in (self.centre, self.outside))
                self._casts[dtype, device] = _Spectrum(
                    matrices, inverses, centre, order, order.argsort(), band, members, outside
                )
        return self._casts[dtype, device]


def _eps(f: _Spectrum, q: Parameters, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    seen = _look(f, q, x, alpha, sigma)
    weights = torch.softmax(seen.joint, 1)
    share = (weights[:, :, None] * sigma[:, :, None] / seen.floor).sum(1)
    return _pixels(f, mix(weights, noises(q, seen.parts, sigma)), seen.rest * share.index_select(1, f.band))


def _x0(f: _Spectrum, q: Parameters, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    seen = _look(f, q, x, alpha, sigma)
    weights = torch.softmax(seen.joint, 1)
    share = (weights[:, :, None] * alpha[:, :, None] * f.outside / seen.floor).sum(1)
    return f.centre.flatten() + _pixels(
        f, mix(weights, data(q, seen.parts, alpha)), seen.rest * share.index_select(1, f.band)
    )


def _log_prob(f: _Spectrum, q: Parameters, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return torch.logsumexp(_look(f, q, x, alpha, sigma).joint, 1)


def _look(f: _Spectrum, q: Parameters, x: Tensor, alpha: Tensor, sigma: Tensor) -> _Seen:
    first, rest = _coefficients(f, x - alpha * f.centre.flatten(), q.means.shape[1])
    parts = split(q, first, alpha, sigma)
    floor = alpha[:, :, None] ** 2 * f.outside + sigma[:, :, None] ** 2
    outside = ((rest**2 @ f.members)[:, None] / floor + f.members.sum(0) * floor.log()).sum(2)
    outside += rest.shape[1] * math.log(2 * math.pi)
    return _Seen(parts, rest, floor, joint(q, parts) - 0.5 * outside)


def _coefficients(f: _Spectrum, x: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
    """The coefficients of (B, D) in order: the first d, and the others."""
    ordered = transformed(x.view(len(x), *f.centre.shape), f.matrices).flatten(1).index_select(1, f.order)
    return ordered[:, :dimensions], ordered[:, dimensions:]


def _pixels(f: _Spectrum, first: Tensor, rest: Tensor) -> Tensor:
    """The inverse of `_coefficients`, (B, D)."""
    placed = torch.cat([first, rest], 1).index_select(1, f.places).view(-1, *f.centre.shape)
    return transformed(placed, f.inverses).flatten(1)
