"""Gaussian mixtures: the diffusion models whose epsilon is known exactly at every state and noise level.

With data `x_0 ~ sum_k w_k N(mu_k, C_k)` the state `x_t = alpha x_0 + sigma eps` has the density
`p_t = sum_k w_k N(alpha mu_k, alpha^2 C_k + sigma^2 I)`, and `E[eps | x_t] = -sigma grad log p_t` (Tweedie's formula;
Efron 2011, doi:10.1198/jasa.2011.tm11181). Components of no width on the images of a data set are the ideal denoiser of
Karras et al. 2022 (arXiv:2206.00364, appendix B.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.posterior import (
    ROWWISE_DIMENSION,
    Parameters,
    Scalar,
    checked_states,
    exact_eps,
    exact_log_prob,
    exact_x0,
    float64,
)
from samplers.noise import check_seed
from samplers.schedule import Schedule

_CHUNK = 2**22  # numbers in the largest temporary tensor


@dataclass(frozen=True, eq=False, repr=False)
class GaussianMixture:
    """A mixture of K Gaussians over samples of a given shape, with D numbers in a sample.

    The covariance of component k is `residual_k I + Q_k diag(variances_k) Q_k^T`: isotropic without a basis, any
    covariance with a square one, and a mixture of probabilistic principal components (Tipping & Bishop 1999,
    doi:10.1162/089976699300016728) in between, which is what fits image-sized data into memory. A component without
    variance in some direction (all of them with residual 0 and no basis: the empirical distribution) is accepted.

    Args:
        weights: (K,), positive, of sum 1 to 1e-6; kept with sum 1.
        means: (K, *shape).
        residual: (K,), the variance in every direction, >= 0.
        basis: (K, D, r) with orthonormal columns, 1 <= r <= D, or None.
        variances: (K, r), the variance along each column of the basis on top of `residual`, >= 0; None without a basis.
            All five are kept as float64 tensors in main memory.

    Raises:
        ValueError: other shapes, NaN or Inf, weights or variances out of range, a basis not orthonormal to 1e-8.
    """

    weights: Tensor
    means: Tensor
    residual: Tensor
    basis: Tensor | None = None
    variances: Tensor | None = None
    _casts: dict[tuple[torch.dtype, torch.device], Parameters] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name in ("weights", "means", "residual", "basis", "variances"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float64(getattr(self, name), name))
        _check_weights(self.weights)
        self.weights.div_(self.weights.sum())  # what float32 weights lack of 1
        components = len(self.weights)
        if self.means.ndim < 2 or len(self.means) != components or self.means.numel() == 0:
            raise ValueError(f"means must be ({components}, *shape) like the weights, got {tuple(self.means.shape)}")
        _check_variances("residual", self.residual, (components,))
        if (self.basis is None) != (self.variances is None):
            raise ValueError(
                f"basis and variances go together, got {'variances' if self.basis is None else 'basis'} alone"
            )
        if self.basis is not None and self.variances is not None:
            _check_basis(self.basis, components, self.dim)
            _check_variances("variances", self.variances, (components, self.basis.shape[2]))

    @classmethod
    def isotropic(cls, means: Any, std: Any, weights: Any = None) -> GaussianMixture:
        """Components that are round.

        Args:
            means: (K, *shape).
            std: standard deviation of the components, a float or (K,), >= 0.
            weights: (K,), positive, of sum 1; None: all equal.

        Raises:
            ValueError: as for the class.
        """
        means, std = float64(means, "means"), float64(std, "std")
        components = len(means) if means.ndim else 0
        std = std if std.ndim else std.expand(components)
        _check_variances("std", std, (components,))
        if weights is None:
            weights = torch.full((components,), 1.0 / max(components, 1), dtype=torch.float64)
        return cls(weights, means, std**2)

    @classmethod
    def from_covariances(cls, weights: Any, means: Any, covariances: Any) -> GaussianMixture:
        """Components with any covariances.

        Args:
            weights: (K,), positive, of sum 1.
            means: (K, *shape).
            covariances: (K, D, D), symmetric, without negative eigenvalues (to 1e-10 of the largest, then taken as 0).

        Raises:
            ValueError: as for the class, and covariances that are not square, symmetric or positive semi-definite.
        """
        covariances = float64(covariances, "covariances")
        if covariances.ndim != 3 or covariances.shape[1] != covariances.shape[2]:
            raise ValueError(f"covariances must be (K, D, D), got {tuple(covariances.shape)}")
        if not torch.allclose(covariances, covariances.mT, rtol=0.0, atol=1e-10 * float(covariances.abs().max())):
            raise ValueError("covariances must be symmetric, got one that differs from its transpose")
        values, basis = torch.linalg.eigh(covariances)
        if values.min() < -1e-10 * values.max():
            raise ValueError(f"covariances must be positive semi-definite, got an eigenvalue {float(values.min()):g}")
        return cls(weights, means, torch.zeros(len(covariances)), basis, values.clamp(min=0.0))

    @classmethod
    def random(cls, dim: int = 2, components: int = 5, seed: int = 0) -> GaussianMixture:
        """A standard test problem: means far apart, elongated components, mean 0, average variance of a coordinate 1.

        Args:
            dim: D >= 1; the shape is (dim,). Beyond 16 dimensions the components are elongated along 16 directions and
                round in the others.
            components: K >= 1.
            seed: >= 0; one seed is one mixture.

        Raises:
            ValueError: a size below 1, or a negative seed.
        """
        for name, size in (("dim", dim), ("components", components)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        rng = np.random.default_rng(check_seed(seed))
        weights = rng.uniform(0.5, 1.5, components)
        weights /= weights.sum()
        means = _far_apart(rng, dim, components)
        means -= weights @ means
        rank = min(dim, 16)
        basis = np.linalg.qr(rng.standard_normal((components, dim, rank)))[0]
        variances = np.exp(2 * rng.uniform(np.log(0.15), np.log(0.6), (components, rank)))
        residual = np.full(components, 0.15**2 if rank < dim else 0.0)
        total = weights @ ((means**2).sum(1) + variances.sum(1) + dim * residual) / dim
        return cls(weights, means / total**0.5, residual / total, basis, variances / total)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"GaussianMixture(components={len(self.weights)}, shape={self.shape}, rank={self.rank})"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample."""
        return tuple(self.means.shape[1:])

    @property
    def dim(self) -> int:
        """D, the numbers in a sample."""
        return math.prod(self.shape)

    @property
    def rank(self) -> int:
        """The columns r of each basis; 0 without one."""
        return 0 if self.basis is None else self.basis.shape[2]

    @property
    def row_numbers(self) -> int:
        """Numbers that the largest temporary tensor has for each state."""
        return self.means.numel() * (max(self.rank, 1) if self.dim <= ROWWISE_DIMENSION else 1)

    def eps(self, x: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
        """`E[eps | x_t = x]`, exact up to rounding in the dtype of x (in float32 where x is of half precision).

        On the CPU the result for a row has the same bits whatever batch it is in, with up to 64 dimensions, or without
        a basis in any number of them (up to 32768 components, beyond which threads may share a sum).

        Args:
            x: (B, *shape), of a floating dtype, on any device.
            alpha: >= 0, a float or a (B,) tensor.
            sigma: >= 0, likewise. sigma = 0 needs alpha > 0 and components with variance in every direction. Floats are
                checked; tensors are not, which would synchronise the device, and give NaN there.

        Returns:
            Shape, dtype and device of x.

        Raises:
            ValueError: another shape or dtype, or a float level out of range.
        """
        return self._by_rows(exact_eps, x, alpha, sigma).view(x.shape)

    def x0(self, x: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
        """`E[x_0 | x_t = x]`, shape of x, computed without a division by alpha; arguments and errors as for `eps`."""
        return self._by_rows(exact_x0, x, alpha, sigma).view(x.shape)

    def log_prob(self, x: Tensor, alpha: Scalar = 1.0, sigma: Scalar = 0.0) -> Tensor:
        """`log p_t(x)`, (B,), in nats; the density of the data by default. Arguments and errors as for `eps`."""
        return self._by_rows(exact_log_prob, x, alpha, sigma)

    def net(self, schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
        """A network for `EpsModel(net, schedule, predicts="eps")`.

        Args:
            schedule: gives alpha and sigma; they are evaluated in float64.

        Returns:
            `net(x, t) -> epsilon`, with x (B, *shape) and t (B,) in the schedule's time.
        """
        return lambda x, t: self.eps(x, schedule.alpha(t.double()), schedule.sigma(t.double()))

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Exact samples of the data, (n, *shape) float64; sample i of a seed is the same whatever n.

        Raises:
            ValueError: n or seed negative.
        """
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        # one stream for each purpose, so that row i of each does not move with n
        _, wide, narrow = (np.random.default_rng(s) for s in np.random.SeedSequence(check_seed(seed)).spawn(3))
        chosen = self.pick(n, seed)
        x = self.means.flatten(1)[chosen]
        if self.residual.any():
            x += self.residual.sqrt()[chosen, None] * torch.from_numpy(wide.standard_normal((n, self.dim)))
        if self.rank:
            bases, variances = self._low_rank()
            along = variances.sqrt()[chosen] * torch.from_numpy(narrow.standard_normal((n, self.rank)))
            for k, basis in enumerate(bases):
                x[chosen == k] += along[chosen == k] @ basis.T
        return x.view(n, *self.shape)

    def pick(self, n: int, seed: int = 0) -> Tensor:
        """The components that the samples of `sample(n, seed)` come from, (n,) int64."""
        rng = np.random.default_rng(np.random.SeedSequence(check_seed(seed)).spawn(1)[0])
        edges = torch.cumsum(self.weights, 0)[:-1]
        return torch.searchsorted(edges, torch.from_numpy(rng.random(n)), right=True)

    def mean(self) -> Tensor:
        """The exact mean of the data, (D,) float64."""
        return self.weights @ self.means.flatten(1)

    def covariance(self) -> Tensor:
        """The exact covariance of the data, (D, D) float64."""
        centred = self.means.flatten(1) - self.mean()
        bases, variances = self._low_rank()
        along = bases * (self.weights[:, None] * variances).sqrt()[:, None, :]
        root = torch.cat([centred.T * self.weights.sqrt(), along.transpose(0, 1).flatten(1)], dim=1)
        return root @ root.T + (self.weights @ self.residual) * torch.eye(self.dim, dtype=torch.float64)

    def _by_rows(self, function: Callable[..., Tensor], x: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
        """`function(parameters, x (b, D), alpha (b, 1), sigma (b, 1))` over chunks of rows that bound the memory."""
        rows, *levels = checked_states(x, self.shape, alpha, sigma, self.flat)
        size = max(1, _CHUNK // self.row_numbers)
        parameters = self.parameters(rows.dtype, x.device)
        parts = zip(*(value.split(size) for value in (rows, *levels)), strict=True)
        return torch.cat([function(parameters, *part) for part in parts]).to(x.dtype)

    def _low_rank(self) -> tuple[Tensor, Tensor]:
        """Basis and variances, of rank 0 where there are none."""
        if self.basis is None or self.variances is None:
            return self.means.new_zeros(len(self.weights), self.dim, 0), self.means.new_zeros(len(self.weights), 0)
        return self.basis, self.variances

    def flat(self) -> bool:
        """Whether some component has no variance in some direction."""
        spectrum = self.residual[:, None] + self._low_rank()[1]
        return bool((spectrum == 0).any() or (self.rank < self.dim and (self.residual == 0).any()))

    def parameters(self, dtype: torch.dtype, device: torch.device) -> Parameters:
        """The numbers that the functions of `bench.posterior` take, kept for the next call."""
        if (dtype, device) not in self._casts:
            with torch.inference_mode(False):  # a tensor that is made in inference mode can never meet a gradient
                basis, variances = self._low_rank()
                spectrum = self.residual[:, None] + variances
                # nothing is outside a square basis, and a positive width there keeps 0 / 0 away
                residual = torch.ones_like(self.residual) if self.rank == self.dim else self.residual
                wide = (self.weights.log(), self.means.flatten(1), residual, basis, basis.mT.contiguous(), spectrum)
                self._casts[dtype, device] = Parameters(*(v.to(dtype=dtype, device=device) for v in wide))
        return self._casts[dtype, device]


def _check_weights(weights: Tensor) -> None:
    if weights.ndim != 1 or len(weights) == 0:
        raise ValueError(f"weights must be (K,) with K >= 1, got {tuple(weights.shape)}")
    if weights.min() <= 0 or abs(float(weights.sum()) - 1.0) > 1e-6:
        lowest, total = float(weights.min()), float(weights.sum())
        raise ValueError(f"weights must be positive and add up to 1, got a lowest {lowest:g} and a sum {total:.9g}")


def _check_variances(name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(values.shape) != shape:
        raise ValueError(f"{name} must be of shape {shape}, got {tuple(values.shape)}")
    if (values < 0).any():
        raise ValueError(f"{name} must be at least 0, got {float(values.min()):g}")


def _check_basis(basis: Tensor, components: int, dim: int) -> None:
    if basis.ndim != 3 or basis.shape[:2] != (components, dim) or not 1 <= basis.shape[2] <= dim:
        raise ValueError(f"basis must be ({components}, {dim}, 1 to {dim} columns), got {tuple(basis.shape)}")
    error = (basis.mT @ basis - torch.eye(basis.shape[2], dtype=torch.float64)).abs().max()
    if error > 1e-8:
        raise ValueError(f"basis must have orthonormal columns, got Q^T Q that differs from I by {float(error):g}")


def _far_apart(rng: np.random.Generator, dim: int, count: int) -> np.ndarray:
    """Points of a normal cloud, each the farthest from those before it: (count, dim)."""
    cloud = rng.standard_normal((32 * count, dim))
    chosen = [0]
    distance = np.full(len(cloud), np.inf)
    for _ in range(count - 1):
        distance = np.minimum(distance, ((cloud - cloud[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(distance.argmax()))
    return cloud[chosen]
