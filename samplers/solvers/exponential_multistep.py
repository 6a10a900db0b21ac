"""Exponential multistep methods in lam: DPM-Solver and DPM-Solver++ (2M, 3M) and exponential Adams-Bashforth.

A step of length h in lam is `x' = a x - s sum_j w_j o_(i-j)` over the outputs at this node and the ones before, where
`a = alpha'/alpha`, `s = sigma'`, `z = h` in eps and `a = sigma'/sigma`, `s = alpha'`, `z = -h` in x0 (see `exponential`). With
the polynomial through k outputs in place of the predicted quantity, `w_j` is z times the integral of `e^(z (1 - u))` against
the j-th Lagrange polynomial; `o_(i-j)` lies at `u_j`, in units of the step. Every method here is that or a change to it.
"""

from __future__ import annotations

import numpy as np

from samplers.draft import Draft, step_orders
from samplers.errors import unknown
from samplers.grid import Grid
from samplers.plan import KINDS, Plan
from samplers.solvers.exponential import check_solver_type, psi
from samplers.solvers.weights import exponential_adams, history, lagrange

_FAR = 1e60  # steps; a point that far away changes no digit of the weights of the others


class Rows:
    """The steps that a multistep method writes, one row each; the columns are the outputs, newest first.

    Attributes:
        orders: the order of each step, 1 on a step to sigma = 0.
        z: h (eps) or -h (x0).
        points: u_j of the outputs, from 0 at the step's start down.
        scale: the factor s on the weights.
        transfer: coefficients of (state, output) in the first-order step.
    """

    def __init__(self, p: Draft, order: int, lower_order_final: bool | int) -> None:
        lam, ends = p.grid.lam[p.steps.start :].copy(), slice(p.steps.start + 1, None)
        if len(p.steps) and np.isinf(lam[-1]):
            lam[-1] = lam[-2] + 1.0  # any length: the step is first order, which `transfer` gives
        self.orders = np.array(step_orders(p.steps, order, lower_order_final), dtype=int)
        self.orders[p.grid.sigma[ends] == 0] = 1
        self.z = np.diff(lam) if p.prediction == "eps" else -np.diff(lam)
        self.points = history(lam, order)
        self.scale = (p.grid.sigma if p.prediction == "eps" else p.grid.alpha)[ends]
        self.transfer = np.array([p.transfer(i) for i in p.steps]).reshape(-1, 2)

    def weights(self, points: np.ndarray, used: np.ndarray) -> np.ndarray:
        """The exact weights of the points of each row (..., N, K) that are used; 0 of the others."""
        away = np.where(used, points, -_FAR * np.arange(1, points.shape[-1] + 1))
        return np.where(used, self.z[:, None] * exponential_adams(away, self.z), 0.0)

    def adams_bashforth(self) -> np.ndarray:
        """The exact weights of as many outputs as each step's order says."""
        return self.weights(self.points, np.arange(self.points.shape[1]) < self.orders[:, None])

    def coefficients(self, weights: np.ndarray) -> np.ndarray:
        """Coefficients on the outputs that these weights stand for."""
        found = -self.scale[:, None] * weights
        first = self.orders == 1
        found[first, 0] = self.transfer[first, 1]
        return found


def two_points(z: np.ndarray, slope: np.ndarray, u: np.ndarray | float) -> np.ndarray:
    """Weights of the outputs at 0 and at u where `slope` stands for psi_2, the weight of the first derivative."""
    return np.stack([psi(1, z) - slope / u, slope / u], axis=-1)


def multistep_plan(p: Draft, rows: Rows, coefficients: np.ndarray) -> Plan:
    """The plan whose steps take the state and the last outputs, newest first, by these coefficients."""
    x = p.x
    outs: list[str] = []
    for i, state, row in zip(p.steps, rows.transfer[:, 0].tolist(), coefficients.tolist(), strict=True):
        outs = [p.evaluate(x, i), *outs][: len(row)]
        x = p.combine(i + 1, (x, state), *zip(outs, row, strict=False))
    return p.plan()


def multistep(
    grid: Grid,
    *,
    prediction: str,
    order: int,
    solver_type: str = "midpoint",
    weights: str = "published",
    lower_order_final: bool | int = 15,
) -> Plan:
    """DPM-Solver-2M, -3M (eps) and DPM-Solver++(2M), (3M) (x0): derivatives come from the steps before, one call a step.

    2M: Lu et al. 2022, arXiv:2211.01095, algorithm 2. 3M: the reference implementation of that paper. It takes
    the second divided difference, which is half of the second derivative, for the derivative itself, so it is second order.
    At order 3 in x0 it is unstable below ten calls on wide "karras" and "logsnr" grids: see `eab`.

    Args:
        grid: the nodes.
        prediction: "eps" or "x0".
        order: 2 or 3.
        solver_type: of the second-order steps: "midpoint", `psi_1 / 2` on the difference; "heun" or "taylor" (the same),
            `psi_2`.
        weights: of the third-order steps: "published", or "exact", with the factor 2, third order.
        lower_order_final: whether the last steps are of orders ..., 2, 1; an int n means "where there are fewer than n".
    """
    p = Draft(grid, prediction)
    rows = Rows(p, order, lower_order_final)
    return multistep_plan(p, rows, rows.coefficients(published_weights(rows, solver_type, weights)))


def published_weights(rows: Rows, solver_type: str, weights: str) -> np.ndarray:
    """The weights (N, order) of the DPM-Solver multistep methods, of their ODE forms and of their SDE forms.

    Args:
        rows: of order 2 or 3.
        solver_type, weights: as in `multistep`.

    Raises:
        ValueError: an unknown solver_type or weights.
    """
    check_solver_type(solver_type)
    if weights not in ("published", "exact"):
        raise unknown("weights", weights, ("published", "exact"))
    w, points = rows.adams_bashforth(), rows.points
    if solver_type == "midpoint":
        second = rows.orders == 2
        w[second, :2] = two_points(rows.z, 0.5 * psi(1, rows.z), points[:, 1])[second]
    if points.shape[1] == 3 and weights == "published":
        third = rows.orders == 3
        difference = lagrange(points)[..., -1]  # the coefficient of u^2
        w[third] -= (psi(3, rows.z)[:, None] * difference)[third]
    return w


def eab(grid: Grid, *, order: int, predict: str = "x0", lower_order_final: bool | int = 15) -> Plan:
    """Exponential Adams-Bashforth in lam: the polynomial through the last k outputs, integrated exactly.

    Hochbruck & Ostermann 2010, "Exponential integrators", on exponential multistep methods. Order 1 is DDIM, order 2 is 2M
    with `solver_type="heun"`, order 3 is 3M with that and `weights="exact"`. The first step, of order 1, leaves an error of
    second order in its length in lam, which shows on grids where that is long (quadratic in t on the cosine schedule). From
    order 3 on, x0 is unstable below ten calls on wide "karras" and "logsnr" grids (results/grids): extrapolation over steps
    that are long in lam; "time-quadratic" has no such steps.

    Args:
        grid: the nodes.
        order: k, 1 to 4; steps begin with orders 1, 2, ...
        predict: "x0" or "eps", the quantity that is interpolated.
        lower_order_final: as in `multistep`.
    """
    check_predict(predict)
    p = Draft(grid, predict)
    rows = Rows(p, order, lower_order_final)
    return multistep_plan(p, rows, rows.coefficients(rows.adams_bashforth()))


def check_predict(predict: str) -> None:
    """Raise ValueError where `predict` is neither "x0" nor "eps"."""
    if predict not in KINDS:
        raise unknown("predict", predict, KINDS)
