"""DEIS: epsilon as a polynomial in time, integrated exactly over the step."""

from __future__ import annotations

import numpy as np

from samplers.draft import Draft
from samplers.errors import unknown
from samplers.grid import Grid
from samplers.plan import Plan
from samplers.schedule import Discrete
from samplers.solvers.linear_multistep import Weights, adams_plan, adams_weights, orders_to_zero
from samplers.solvers.weights import history, lagrange

_VARIANTS = ("tab", "rhoab")
# Gauss-Legendre in lam, where t and sigma_bar are analytic up to a distance of pi/2 from the real line (VP; pi for flow, and
# everywhere for EDM), so that six points on panels of this length are exact to rounding.
_PANEL = 0.2
_POINTS, _MASSES = (a[:, None] / 2 for a in np.polynomial.legendre.leggauss(6))


def deis(grid: Grid, *, order: int, variant: str = "tab", lower_order_final: bool | int = 15) -> Plan:
    """DEIS: Adams-Bashforth with the polynomial in t or in sigma_bar, orders rising 1, 2, ..., k, first order to sigma = 0.

    Zhang & Chen 2023, arXiv:2204.13902, equations 14 and 15 (tAB-DEIS) and section 3.3 (rhoAB-DEIS). The weights of "tab",
    `integral l_j(t) d sigma_bar(t)` with `l_j` the Lagrange polynomials in the schedule's own t, are computed to rounding.

    Args:
        grid: the nodes.
        order: k, 1 to 4: how many epsilons a step uses, one more than the degree r by which the paper counts.
        variant: "tab", a polynomial in t, or "rhoab", in sigma_bar, which is exact Adams-Bashforth as in `ipndm_v`.
        lower_order_final: whether orders fall again at the end; an int n means "where there are fewer than n steps".
    """
    if variant not in _VARIANTS:
        raise unknown("variant", variant, _VARIANTS)
    p = Draft(grid, "eps")
    orders = orders_to_zero(p, order, lower_order_final)
    return adams_plan(p, orders, adams_weights(p) if variant == "rhoab" else _tab_weights(p, max(orders, default=1)))


def _tab_weights(p: Draft, order: int) -> Weights:
    """The mean over the step, in sigma_bar, of the polynomial in t through the last k <= order epsilons."""
    moments, t = _moments(p, order), p.grid.t[p.steps.start :]
    return lambda k: (lagrange(history(t, k)) @ moments[:, :k, None])[..., 0]


def _moments(p: Draft, order: int) -> np.ndarray:
    """The mean over each step, in sigma_bar, of `u^0, ..., u^(order - 1)`, u running from 0 to 1 along the step in t.

    As a Lagrange polynomial of points u <= 0 has coefficients of one sign, no digit is lost between the two.
    """
    moments = np.eye(1, order).repeat(len(p.steps), axis=0)
    if order == 1:
        return moments
    finite = p.grid.sigma > 0  # no higher moment is needed on a step to sigma = 0
    t, lam = (values[finite][p.steps.start :] for values in (p.grid.t, p.grid.lam))
    edges = _panels(p.grid, t, lam)
    step = np.searchsorted(lam, edges[:-1], side="right") - 1
    width = np.diff(edges)
    at = edges[:-1] + width * (0.5 + _POINTS)
    u = (t[step] - p.grid.schedule.t_of_lam(at)) / (t[:-1] - t[1:])[step]
    powers = [width * np.exp(lam[step] - at) * _MASSES]  # -d sigma_bar, in units of sigma_bar at the step's start
    for _ in range(1, order):
        powers.append(powers[-1] * u)
    sums = np.add.reduceat([power.sum(0) for power in powers], np.searchsorted(edges, lam[:-1]), axis=1)
    moments[: len(lam) - 1] = (sums / sums[0]).T
    return moments


def _panels(grid: Grid, t: np.ndarray, lam: np.ndarray) -> np.ndarray:
    """Panel boundaries in lam: the nodes, the kinks of the schedule, and a lattice."""
    inside = [np.arange(lam[0], lam[-1], _PANEL)]
    if isinstance(grid.schedule, Discrete):  # log alpha has a kink at every training step
        inside.append(grid.schedule.lam(np.arange(np.floor(t[-1]) + 1, t[0])))
    return np.unique(np.clip(np.concatenate([lam, *inside]), lam[0], lam[-1]))
