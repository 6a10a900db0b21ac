"""First-order samplers: DDPM, DDIM, Euler; and Heun's method, which builds on Euler.

All of them are written for the state x in epsilon. With `sigma_bar = sigma / alpha` the probability-flow ODE is
`d(x / alpha) / d sigma_bar = eps` (Song et al. 2021, arXiv:2010.02502, equation 14), so a step of Euler's method is
`x' = (alpha'/alpha) x + (sigma' - sigma alpha'/alpha) eps`, which is `Draft.first_order`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from samplers.draft import Draft
from samplers.errors import check_amount, unknown
from samplers.grid import Grid
from samplers.plan import Plan
from samplers.solvers.exponential import checked_orders


def _forward_variance(p: Draft, i: int) -> float:
    """Variance that the forward process adds from node i + 1 to node i: `sigma^2 - (alpha/alpha')^2 sigma'^2`."""
    return p.sigma[i] ** 2 - (p.alpha[i] / p.alpha[i + 1]) ** 2 * p.sigma[i + 1] ** 2


def ddpm(grid: Grid, *, variance: str = "fixed_small") -> Plan:
    """Ancestral sampling with the posterior mean and a fixed variance.

    Ho et al. 2020, arXiv:2006.11239, equation 11 (mean) and section 3.2 (the two variances); for any grid as in Nichol &
    Dhariwal 2021, arXiv:2102.09672, equation 19. No noise on a step to sigma = 0.

    Args:
        grid: the nodes.
        variance: "fixed_small", that of the posterior given x0, or "fixed_large", that of the forward step.
    """
    if variance == "learned":
        raise ValueError(
            "variance of a plan must be a number at each step, 'fixed_small' or 'fixed_large', got 'learned', which is what the "
            "network says: call samplers.adapters.variance.sample_learned_variance"
        )
    if variance not in ("fixed_small", "fixed_large"):
        raise unknown("variance", variance, ("fixed_small", "fixed_large"))
    p = Draft(grid, "eps")
    x = p.x
    for i in p.steps:
        added = _forward_variance(p, i)
        ratio = p.alpha[i + 1] / p.alpha[i]
        scale = 0.0 if p.sigma[i + 1] == 0 else 1.0 if variance == "fixed_large" else p.sigma[i + 1] / p.sigma[i]
        out = p.evaluate(x, i)
        x = p.combine(i + 1, (x, ratio), (out, -ratio * added / p.sigma[i]), (p.noise(), scale * math.sqrt(added)))
    return p.plan()


def ddim(grid: Grid, *, eta: float = 0.0) -> Plan:
    """DDIM; `eta` scales the posterior's standard deviation, 1 is DDPM with fixed_small variance.

    Song et al. 2021, arXiv:2010.02502, equations 12 and 16.

    Args:
        grid: the nodes.
        eta: at least 0; beyond 1 the noise of a step is at most that of the node it ends at, which leaves no epsilon.
    """
    check_amount("eta", eta)
    p = Draft(grid, "eps")
    x = p.x
    for i in p.steps:
        std = min(eta * math.sqrt(_forward_variance(p, i)) / p.sigma[i], 1.0) * p.sigma[i + 1] if eta else 0.0
        ratio = p.alpha[i + 1] / p.alpha[i]
        direct = math.sqrt(max(p.sigma[i + 1] ** 2 - std**2, 0.0)) if eta else p.sigma[i + 1]
        out = p.evaluate(x, i)
        x = p.combine(i + 1, (x, ratio), (out, direct - p.sigma[i] * ratio), (p.noise(), std))
    return p.plan()


def euler(grid: Grid, *, variable: str = "sigma_bar") -> Plan:
    """Euler's method on the probability-flow ODE.

    In `x / alpha` against `sigma_bar` this is DDIM with eta = 0 (Karras et al. 2022, arXiv:2206.00364, section 3). With
    `variable="t"` it is Euler in the schedule's own time on `dx/dt = dalpha/dt x0 + dsigma/dt eps`, which on a VP schedule
    is the equation of Song et al. 2021, arXiv:2011.13456, equation 13; a step to sigma = 0, where dsigma/dt is infinite,
    is DDIM's.

    Args:
        grid: the nodes.
        variable: "sigma_bar" or "t".
    """
    if variable not in ("sigma_bar", "t"):
        raise unknown("variable", variable, ("sigma_bar", "t"))
    if variable == "sigma_bar":
        return ddim(grid)
    p = Draft(grid, "eps")
    dalpha, dsigma = (f(grid.t[:-1]).tolist() for f in (grid.schedule.dalpha, grid.schedule.dsigma))
    x = p.x
    for i in p.steps:
        out = p.evaluate(x, i)
        if p.sigma[i + 1] == 0:
            x = p.first_order(i, x, out)
            continue
        dt, drift = p.t[i + 1] - p.t[i], dalpha[i] / p.alpha[i]
        x = p.combine(i + 1, (x, 1.0 + dt * drift), (out, dt * (dsigma[i] - p.sigma[i] * drift)))
    return p.plan()


class Level(NamedTuple):
    """A point in time, as `Draft.evaluate_at` takes it."""

    t: float
    alpha: float
    sigma: float


def node_level(p: Draft, i: int) -> Level:
    """Node i of the grid."""
    return Level(p.t[i], p.alpha[i], p.sigma[i])


def heun(grid: Grid, *, orders: Sequence[int] | None = None) -> Plan:
    """Heun's second-order method in `x / alpha` against `sigma_bar`: two calls a step, Euler on a step to sigma = 0.

    Karras et al. 2022, arXiv:2206.00364, algorithm 1. The correction is applied to the predicted state. N steps take 2N calls,
    or 2N - 1 to sigma = 0. Under `nfe=` these are the published plans, and the one call that any other budget has left is
    Euler's step on a grid of one step more: its last, or the one before the step to sigma = 0.

    Args:
        grid: the nodes.
        orders: the order of each step, 1 (Euler's) or 2; None: 2 everywhere.
    """
    by_step = checked_orders(grid, 2, orders)
    p = Draft(grid, "eps")
    x = p.x
    for i in p.steps:
        x = heun_step(p, x, node_level(p, i), node_level(p, i + 1), i + 1, by_step[i])
    return p.plan()


def heun_step(p: Draft, x: str, start: Level, end: Level, node: int | None, order: int = 2) -> str:
    """One step of Heun's method between any two levels, Euler's at order 1 and to sigma = 0; `node` as in `Draft.combine`."""
    ratio = end.alpha / start.alpha
    slope = end.sigma - start.sigma * ratio
    out = p.evaluate_at(x, *start)
    if order == 1 or end.sigma == 0:
        return p.combine(node, (x, ratio), (out, slope))
    predicted = p.combine(None, (x, ratio), (out, slope))
    again = p.evaluate_at(predicted, *end)
    return p.combine(node, (predicted, 1.0), (out, -0.5 * slope), (again, 0.5 * slope))
