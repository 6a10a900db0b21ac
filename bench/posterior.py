"""The posterior of a mixture of Gaussians at a noise level: what any of its epsilons is made of.

A state x is split, for each component, into its distance from the mean along the component's basis and what is orthogonal
to it, where the covariance `alpha^2 C_k + sigma^2 I` is diagonal. Nothing is expanded into squares and products, which
would cancel at small sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor

ROWWISE_DIMENSION = 64  # up to here products are summed row by row, so that no row depends on its batch


class Parameters(NamedTuple):
    """A mixture in the dtype and on the device of a state; without a basis r = 0."""

    log_weights: Tensor  # (K,)
    means: Tensor  # (K, D)
    residual: Tensor  # (K,)
    basis: Tensor  # (K, D, r)
    transposed: Tensor  # (K, r, D), contiguous
    spectrum: Tensor  # (K, r): variances of the data along the basis


class Parts(NamedTuple):
    """Distances of B states from K means, split by the components' bases, with the variances that go with them."""

    outside: Tensor  # (B, K, D): what is orthogonal to the basis
    floor: Tensor  # (B, K)
    inside: Tensor  # (B, K, r): coordinates in the basis
    spread: Tensor  # (B, K, r)


def exact_eps(q: Parameters, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """`E[eps | x]` (B, D) of states (B, D) at levels (B, 1)."""
    parts = split(q, x, alpha, sigma)
    return mix(torch.softmax(joint(q, parts), 1), noises(q, parts, sigma))


def exact_x0(q: Parameters, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """`E[x_0 | x]`, likewise."""
    parts = split(q, x, alpha, sigma)
    return mix(torch.softmax(joint(q, parts), 1), data(q, parts, alpha))


def exact_log_prob(q: Parameters, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """`log p(x)` (B,), likewise."""
    return torch.logsumexp(joint(q, split(q, x, alpha, sigma)), 1)


def split(q: Parameters, x: Tensor, alpha: Tensor, sigma: Tensor) -> Parts:
    """The distances of states (B, D) at levels (B, 1) from every component."""
    away = x[:, None, :] - alpha[:, :, None] * q.means
    inside = _multiply(away, q.transposed)
    # a square basis leaves only rounding outside, which would show beside a wide component's small answer
    outside = torch.zeros_like(away) if inside.shape == away.shape else away - _multiply(inside, q.basis)
    floor = alpha**2 * q.residual + sigma**2
    return Parts(outside, floor, inside, alpha[:, :, None] ** 2 * q.spectrum + sigma[:, :, None] ** 2)


def joint(q: Parameters, parts: Parts) -> Tensor:
    """`log w_k + log N(x; alpha mu_k, alpha^2 C_k + sigma^2 I)`, (B, K)."""
    dim, rank = q.basis.shape[1:]
    outside = (parts.outside**2).sum(2) / parts.floor + (dim - rank) * parts.floor.log()
    inside = (parts.inside**2 / parts.spread + parts.spread.log()).sum(2)
    return q.log_weights - 0.5 * (dim * math.log(2 * math.pi) + outside + inside)


def noises(q: Parameters, parts: Parts, sigma: Tensor) -> Tensor:
    """`E[eps | x, k]`, (B, K, D)."""
    return _join(q, parts, sigma / parts.floor, sigma[:, :, None] / parts.spread)


def data(q: Parameters, parts: Parts, alpha: Tensor) -> Tensor:
    """`E[x_0 | x, k]`, (B, K, D)."""
    moved = _join(q, parts, alpha * q.residual / parts.floor, alpha[:, :, None] * q.spectrum / parts.spread)
    return q.means + moved


def _join(q: Parameters, parts: Parts, outside: Tensor, inside: Tensor) -> Tensor:
    """The distances put together again with a factor for each part: (B, K, D)."""
    return parts.outside * outside[:, :, None] + _multiply(parts.inside * inside, q.basis)


def _multiply(vectors: Tensor, matrices: Tensor) -> Tensor:
    """The product of (K, n, m) matrices with (B, K, m) vectors: (B, K, n)."""
    if max(matrices.shape[1:]) > ROWWISE_DIMENSION:
        return torch.einsum("bkm,knm->bkn", vectors, matrices)
    # a matrix product of the library adds in an order that depends on the batch size
    return (vectors[:, :, None, :] * matrices).sum(3)


def mix(weights: Tensor, vectors: Tensor) -> Tensor:
    """The sum of (B, K, D) vectors with (B, K) weights: (B, D)."""
    return (vectors.mT.contiguous() * weights[:, None, :]).sum(2)


def checked_states(
    x: Tensor, shape: tuple[int, ...], alpha: Scalar, sigma: Scalar, flat: Callable[[], bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """States as (B, D) in the dtype that is computed in (float64 or float32), with their levels alpha and sigma as (B, 1).

    Args:
        x: (B, *shape), of a floating dtype.
        shape: of a sample.
        alpha: >= 0, a float or a (B,) tensor.
        sigma: likewise; a float 0 needs alpha > 0 and data with a density.
        flat: whether the data have none; asked only where sigma is 0.

    Raises:
        ValueError: another shape or dtype, or a float level out of range; tensors of levels are not read.
    """
    if x.ndim == 0 or x.shape[1:] != shape or not x.is_floating_point():
        expected = ", ".join(map(str, ("B", *shape)))
        raise ValueError(f"x must be ({expected}) of a floating dtype, got {tuple(x.shape)} {x.dtype}")
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        if not isinstance(value, Tensor) and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    if not isinstance(sigma, Tensor) and sigma == 0 and (flat() or (not isinstance(alpha, Tensor) and alpha == 0)):
        raise ValueError(f"sigma must be positive where alpha = 0 or a component has no width, got {sigma}")
    rows = x.to(x.dtype if x.dtype == torch.float64 else torch.float32).reshape(len(x), math.prod(shape)).contiguous()
    return rows, _level(alpha, rows, "alpha"), _level(sigma, rows, "sigma")


def _level(value: Scalar, rows: Tensor, name: str) -> Tensor:
    """A noise level as (B, 1), in the dtype and on the device of the states."""
    if not isinstance(value, Tensor):
        return rows.new_full((len(rows), 1), value)
    if value.ndim and value.shape != (len(rows),):
        raise ValueError(f"{name} must be a float or of shape ({len(rows)},), got {tuple(value.shape)}")
    return value.to(rows).reshape(-1, 1).expand(len(rows), 1)


def float64(value: Any, name: str) -> Tensor:
    """A private copy in main memory: what the caller does to its array later must not reach a frozen mixture.

    Raises:
        ValueError: NaN or Inf.
    """
    with torch.inference_mode(False):
        tensor = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach().clone()
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} must be finite, got NaN or Inf")
    return tensor
