"""Exponential singlestep methods in lam: DPM-Solver and DPM-Solver++ of orders 1 to 3.

The exact solution over a step of length h in lam is (Lu et al. 2022, arXiv:2206.00927, equation 3.4, and arXiv:2211.01095,
equation 8)

    eps: x' = (alpha'/alpha) x - sigma' sum_k psi_k(h)  D_k        x0: x' = (sigma'/sigma) x - alpha' sum_k psi_k(-h) D_k

with `psi_k(z) = z phi_k(z)` and `D_k = h^(k-1) d^(k-1)/dlam^(k-1)` of the predicted quantity: one formula, in which only the
sign of z and the roles of alpha and sigma differ. A step to sigma = 0 has h infinite and is first order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import NamedTuple

import numpy as np

from samplers.draft import Draft
from samplers.errors import unknown
from samplers.grid import Grid
from samplers.plan import Plan
from samplers.solvers.weights import phi

_SOLVER_TYPES = ("midpoint", "heun", "taylor")
_Writer = Callable[[int, str, str], str]  # (step, state, its output) -> the state at the end of the step


def psi(k: int, z: np.ndarray) -> np.ndarray:
    """`z phi_k(z)`: `e^z - 1`, `(e^z - 1)/z - 1`, `((e^z - 1)/z - 1)/z - 1/2`, ..., to machine precision."""
    return np.expm1(z) if k == 1 else z * phi(k, z)


class _Steps:
    """Per-step quantities of an exponential integrator, vectorised over the grid, as lists of floats.

    Attributes:
        sign: 1 for eps, -1 for x0: the argument of psi is `sign * h`.
        h: step lengths in lam; 1 where the true one is infinite, which no formula uses.
        scale: sigma' (eps) or alpha' (x0), the factor on the psi terms.
    """

    def __init__(self, grid: Grid, prediction: str) -> None:
        with np.errstate(invalid="ignore"):
            h = np.diff(grid.lam)
        self.grid, self.sign = grid, 1.0 if prediction == "eps" else -1.0
        self.finite = np.isfinite(h)
        self.h = np.where(self.finite, h, 1.0)
        self.state_by, self.scale_by = (grid.alpha, grid.sigma) if prediction == "eps" else (grid.sigma, grid.alpha)
        self.scale: list[float] = self.scale_by[1:].tolist()

    def psi(self, k: int, fraction: float = 1.0) -> list[float]:
        """psi_k over `fraction` of every step."""
        return psi(k, self.sign * fraction * self.h).tolist()

    def inner(self, fraction: float) -> _Inner:
        """The points at `fraction` of every step in lam."""
        start = np.where(self.finite, self.grid.lam[:-1], 0.0)
        t = self.grid.schedule.t_of_lam(start + fraction * self.h)
        alpha, sigma = self.grid.schedule.alpha(t), self.grid.schedule.sigma(t)
        top, scale = (alpha, sigma) if self.sign > 0 else (sigma, alpha)
        with np.errstate(divide="ignore", invalid="ignore"):
            state = top / self.state_by[:-1]
        return _Inner(t.tolist(), alpha.tolist(), sigma.tolist(), state.tolist(), scale.tolist())


class _Inner(NamedTuple):
    """Points inside the steps: time, alpha, sigma, factor on the state at the step's start, scale of the psi terms."""

    t: list[float]
    alpha: list[float]
    sigma: list[float]
    state: list[float]
    scale: list[float]

    def evaluate(self, p: Draft, src: str, i: int) -> str:
        return p.evaluate_at(src, self.t[i], self.alpha[i], self.sigma[i])


def singlestep(
    grid: Grid,
    *,
    prediction: str,
    order: int,
    solver_type: str = "midpoint",
    r1: float | None = None,
    r2: float | None = None,
    orders: Sequence[int] | None = None,
) -> Plan:
    """DPM-Solver-1, -2 and -3 (eps) and their DPM-Solver++ forms (x0): each step stands on its own.

    Lu et al. 2022, arXiv:2206.00927, algorithms 1, 2 and 4, and arXiv:2211.01095, algorithm 1.

    Args:
        grid: the nodes.
        prediction: "eps" or "x0".
        order: 1, 2 or 3, also the calls of a step.
        solver_type: "midpoint" as in the papers' algorithms, "heun" or "taylor" (the same) with exact psi_2, psi_3.
        r1, r2: inner points as fractions of the step in lam, 0 < r1 < r2 <= 1 (order 3), 0 < r1 <= 1 (order 2); by default
            1/2, or 1/3 and 2/3. A step of order 3 loses an order with any other r2.
        orders: the order of each step, 1 to `order`; None: `order` everywhere. Lower steps use their default inner point.
    """
    check_solver_type(solver_type)
    p, s = Draft(grid, prediction), _Steps(grid, prediction)
    by_step = checked_orders(grid, order, orders)
    inner = {k: inner_fractions(k, r1 if k == order else None, r2 if k == order else None) for k in set(by_step)}
    writers = {k: _WRITERS[k](p, s, inner[k], solver_type) for k in inner if k > 1}
    x = p.x
    for i in p.steps:
        out = p.evaluate(x, i)
        if by_step[i] == 1 or p.sigma[i + 1] == 0:
            x = p.first_order(i, x, out)
        else:
            x = writers[by_step[i]](i, x, out)
    return p.plan()


def _second_order(p: Draft, s: _Steps, fractions: tuple[float, ...], solver_type: str) -> _Writer:
    r1 = fractions[0]
    mid, psi_mid, psi_1 = s.inner(r1), s.psi(1, r1), s.psi(1)
    second = [0.5 * value for value in psi_1] if solver_type == "midpoint" else s.psi(2)

    def write(i: int, x: str, out: str) -> str:
        u = p.combine(None, (x, mid.state[i]), (out, -mid.scale[i] * psi_mid[i]))
        again = mid.evaluate(p, u, i)
        slope = s.scale[i] * second[i] / r1
        return p.combine(i + 1, (x, p.transfer(i)[0]), (out, slope - s.scale[i] * psi_1[i]), (again, -slope))

    return write


def _third_order(p: Draft, s: _Steps, fractions: tuple[float, ...], solver_type: str) -> _Writer:
    r1, r2 = fractions
    near, far = s.inner(r1), s.inner(r2)
    psi_near, psi_far, psi_far2, psi_1, psi_2, psi_3 = (
        s.psi(1, r1),
        s.psi(1, r2),
        s.psi(2, r2),
        s.psi(1),
        s.psi(2),
        s.psi(3),
    )

    def write(i: int, x: str, out: str) -> str:
        u = p.combine(None, (x, near.state[i]), (out, -near.scale[i] * psi_near[i]))
        first = near.evaluate(p, u, i)
        slope = far.scale[i] * psi_far2[i] * r2 / r1
        w = p.combine(None, (x, far.state[i]), (out, slope - far.scale[i] * psi_far[i]), (first, -slope))
        second = far.evaluate(p, w, i)
        if solver_type == "midpoint":
            c_first, c_second = 0.0, -s.scale[i] * psi_2[i] / r2
        else:  # D_2, D_3 from the divided differences of (out, first, second)
            d_first, d_second = r2 / (r1 * (r2 - r1)), -r1 / (r2 * (r2 - r1))
            dd_first, dd_second = -2.0 / (r1 * (r2 - r1)), 2.0 / (r2 * (r2 - r1))
            c_first = -s.scale[i] * (psi_2[i] * d_first + psi_3[i] * dd_first)
            c_second = -s.scale[i] * (psi_2[i] * d_second + psi_3[i] * dd_second)
        c_out = -s.scale[i] * psi_1[i] - c_first - c_second
        return p.combine(i + 1, (x, p.transfer(i)[0]), (out, c_out), (first, c_first), (second, c_second))

    return write


_WRITERS = {2: _second_order, 3: _third_order}


def mixed_orders(order: int, calls: int) -> list[int]:
    """Step orders that spend exactly `calls` network calls: as many full steps as fit, then one or two lower ones.

    Lu et al. 2022, arXiv:2206.00927, section 3.4.
    """
    if order == 3 and calls % 3 == 0 and calls:
        return [3] * (calls // 3 - 1) + [2, 1]
    return [order] * (calls // order) + ([calls % order] if calls % order else [])


def checked_orders(grid: Grid, order: int, orders: Sequence[int] | None) -> list[int]:
    """The order of each step: given, or `order` everywhere.

    Raises:
        ValueError: not one integer from 1 to `order` for each step.
    """
    if orders is None:
        return [order] * grid.steps
    given = list(orders) if isinstance(orders, Sequence) else []
    if len(given) != grid.steps or any(isinstance(k, bool) or k not in range(1, order + 1) for k in given):
        raise ValueError(f"orders must be {grid.steps} integers from 1 to {order}, one for each step, got {orders!r}")
    return given


def inner_fractions(order: int, r1: float | None, r2: float | None) -> tuple[float, ...]:
    """The inner points of a step as fractions of it: given, or by default 1/2 (order 2), 1/3 and 2/3 (order 3).

    Raises:
        TypeError: not numbers.
        ValueError: not 0 < r1 < r2 <= 1.
    """
    for name, value in (("r1", r1), ("r2", r2)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise TypeError(f"{name} must be a number or None, got {value!r}")
    if order == 1:
        return ()
    if order == 2:
        r1 = 0.5 if r1 is None else r1
        if not 0 < r1 <= 1:
            raise ValueError(f"r1 must lie in (0, 1], got {r1}")
        return (r1,)
    r1, r2 = 1 / 3 if r1 is None else r1, 2 / 3 if r2 is None else r2
    if not 0 < r1 < r2 <= 1:
        raise ValueError(f"r1 and r2 must satisfy 0 < r1 < r2 <= 1, got r1={r1}, r2={r2}")
    return r1, r2


def check_solver_type(solver_type: str) -> None:
    """Raise ValueError for an unknown solver_type."""
    if solver_type not in _SOLVER_TYPES:
        raise unknown("solver_type", solver_type, _SOLVER_TYPES)
