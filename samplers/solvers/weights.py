"""Integrals of interpolating polynomials: the weights of Adams and exponential Adams methods.

Over a step from s to s + h, with u = 0 .. 1 along it and interpolation points u_j, a quantity known at the points is replaced by
`sum_j l_j(u) value_j`, and a method needs the integral of each `l_j` against 1 (Adams) or `e^(z (1 - u))` (exponential).
Everything is vectorised over the steps of a grid.
"""

from __future__ import annotations

import math

import numpy as np

_SERIES_BELOW = 1.0
_SERIES_TERMS = 20


def phi(k: int, z: np.ndarray) -> np.ndarray:
    """`phi_0 = e^z`, `phi_(k+1)(z) = (phi_k(z) - 1/k!) / z`, to machine precision, near zero by `sum_j z^j / (j+k)!`.

    Hochbruck & Ostermann 2010, "Exponential integrators", section 2.1.
    """
    if k == 0:
        return np.exp(z)
    small = np.abs(z) < _SERIES_BELOW
    near, far = np.where(small, z, 0.0), np.where(small, 1.0, z)
    series = np.polyval([1.0 / math.factorial(j + k) for j in reversed(range(_SERIES_TERMS))], near)
    direct = np.expm1(far) / far
    for j in range(1, k):
        direct = (direct - 1.0 / math.factorial(j)) / far
    return np.where(small, series, direct)


def phis(k: int, z: np.ndarray) -> np.ndarray:
    """`phi_1, ..., phi_k` at z (...), as (..., k): near zero from the last one down, elsewhere from the first one up."""
    small = np.abs(z) < _SERIES_BELOW
    near, far = np.where(small, z, 0.0), np.where(small, 1.0, z)
    down, up = [phi(k, near)], [np.expm1(far) / far]
    for j in range(1, k):
        down.append(near * down[-1] + 1.0 / math.factorial(k - j))
        up.append((up[-1] - 1.0 / math.factorial(j)) / far)
    return np.where(small[..., None], np.stack(down[::-1], axis=-1), np.stack(up, axis=-1))


def lagrange(points: np.ndarray) -> np.ndarray:
    """Coefficients of the Lagrange polynomials.

    Args:
        points: (..., k) distinct interpolation points.

    Returns:
        (..., k, k): entry (j, p) is the coefficient of u^p in l_j, which is 1 at point j and 0 at the others.
    """
    k = points.shape[-1]
    coefficients = np.zeros((*points.shape, k))
    for j in range(k):
        product = np.zeros((*points.shape[:-1], k))
        product[..., 0] = 1.0
        for m in range(k):
            if m == j:
                continue
            shifted = np.zeros_like(product)
            shifted[..., 1:] = product[..., :-1]
            root = points[..., m, None]
            product = (shifted - root * product) / (points[..., j, None] - root)
        coefficients[..., j, :] = product
    return coefficients


def adams(points: np.ndarray) -> np.ndarray:
    """`integral_0^1 l_j(u) du` for points (..., k) in units of the step: (..., k), of sum 1."""
    return lagrange(points) @ (1.0 / np.arange(1, points.shape[-1] + 1))


def exponential_adams(points: np.ndarray, z: np.ndarray) -> np.ndarray:
    """`integral_0^1 e^(z (1 - u)) l_j(u) du` for points (..., k) and z (...): (..., k), of sum phi_1(z).

    By `integral_0^1 e^(z (1 - u)) u^p du = p! phi_(p+1)(z)`.
    """
    k = points.shape[-1]
    moments = phis(k, z) * [float(math.factorial(p)) for p in range(k)]
    return (lagrange(points) @ moments[..., None])[..., 0]


def history(values: np.ndarray, k: int) -> np.ndarray:
    """The points of a k-step method: values[i], values[i - 1], ..., in units of the step from i to i + 1, from values[i].

    Args:
        values: (N + 1,) the variable of integration at the nodes.
        k: number of points, at most N.

    Returns:
        (N, k); rows i < k - 1, which have fewer than k points behind them, go on in unit steps, to be finite.
    """
    n, h = len(values) - 1, np.diff(values)
    index = np.arange(n)[:, None] - np.arange(k)
    return (values[np.maximum(index, 0)] - values[:n, None]) / h[:, None] - np.maximum(-index, 0)
