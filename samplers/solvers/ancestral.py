"""Samplers that take turns between the probability-flow ODE and fresh noise: ancestral ones, and EDM's churn.

In `y = x / alpha` against `sigma_bar`, where the forward process adds independent noise and nothing else, noise of deviation s
leads from any level a to `sqrt(a^2 + s^2)`. Ancestral samplers solve the ODE from sigma_bar to `down`, below the next node, and
then add noise of deviation `up`, `down^2 + up^2 = sigma_bar'^2`; churn adds noise first and solves the ODE down to the node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from samplers.draft import Draft
from samplers.errors import check_amount
from samplers.grid import Grid
from samplers.plan import Plan
from samplers.solvers.exponential import check_solver_type, checked_orders, inner_fractions, psi
from samplers.solvers.first_order import Level, heun_step, node_level
from samplers.solvers.stages import Stage, finite_lam, stage, staged_plan


def ancestral_levels(now: np.ndarray, after: np.ndarray, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """`down` and `up` of ancestral steps between levels of sigma_bar.

    k-diffusion's `get_ancestral_step`: `up = min(sigma', eta sigma' sqrt(1 - (sigma'/sigma)^2))`, `down = sqrt(sigma'^2 - up^2)`,
    in a form that does not cancel.
    """
    ratio2 = (after / now) ** 2
    down = after * np.sqrt(np.maximum((1.0 - eta**2) + eta**2 * ratio2, 0.0))
    return down, after * np.minimum(eta * np.sqrt(1.0 - ratio2), 1.0)


def euler_ancestral(grid: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> Plan:
    """Euler's method in sigma_bar down to `down`, then noise back up; DDIM with the same eta.

    k-diffusion's `sample_euler_ancestral`.

    Args:
        grid: the nodes.
        eta: amount of noise, at least 0; 0 is Euler.
        s_noise: factor on the noise's standard deviation, at least 0.
    """
    return _ancestral(grid, "eps", [1] * grid.steps, eta, s_noise)


def dpm2_ancestral(grid: Grid, *, eta: float = 1.0, s_noise: float = 1.0, orders: Sequence[int] | None = None) -> Plan:
    """The midpoint rule in sigma_bar, with the midpoint in log sigma_bar, down to `down`, then noise back up; two calls.

    k-diffusion's `sample_dpm_2_ancestral`; with eta = 0 its `sample_dpm_2` without churn (DPM-Solver-2 of Karras et al. 2022,
    arXiv:2206.00364), which is DPM-Solver-2 of Lu et al. at r1 = 1/2. An ancestral step
    with the exact ODE has the right marginals, so at any eta the distribution at the nodes converges with the order of the
    ODE's solver, 2, but the path, which is that of a reverse SDE, with order 1. Under `nfe=` a call that is left over is a step
    of `euler_ancestral`, the last one above sigma = 0.

    Args:
        grid, eta, s_noise: as in `euler_ancestral`.
        orders: the order of each step, 1 or 2; None: 2 everywhere.
    """
    return _ancestral(grid, "eps", checked_orders(grid, 2, orders), eta, s_noise)


def dpmpp_2s(
    grid: Grid,
    *,
    eta: float = 0.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
    r1: float | None = None,
    orders: Sequence[int] | None = None,
) -> Plan:
    """DPM-Solver++(2S), and with eta = 1 its ancestral form: two calls down to `down`, then noise back up.

    Lu et al. 2022, arXiv:2211.01095, algorithm 1; k-diffusion's `sample_dpmpp_2s_ancestral` is eta = 1. Of the same
    orders as `dpm2_ancestral`.

    Args:
        grid, eta, s_noise: as in `euler_ancestral`.
        solver_type: "midpoint", `psi_1 / 2` on the difference; "heun" or "taylor" (the same), `psi_2`.
        r1: inner point as a fraction of the way to `down` in lam, in (0, 1]; by default 1/2.
        orders: the order of each step, 1 or 2; None: 2 everywhere.
    """
    return _ancestral(grid, "x0", checked_orders(grid, 2, orders), eta, s_noise, solver_type, r1)


def _ancestral(
    grid: Grid,
    prediction: str,
    orders: Sequence[int],
    eta: float,
    s_noise: float,
    solver_type: str = "midpoint",
    r1: float | None = None,
) -> Plan:
    check_amount("eta", eta)
    check_amount("s_noise", s_noise)
    check_solver_type(solver_type)
    now, after = (np.exp(-lam) for lam in (finite_lam(grid)[:-1], finite_lam(grid)[1:]))
    down, up = ancestral_levels(now, after, eta)
    state, total = _way(prediction, now, down)
    methods: dict[int, Sequence[Stage]] = {1: (stage(grid, None, state, total, 0.0, s_noise * up),)}
    (r,) = inner_fractions(2, r1, None)
    if 2 in orders:
        h = np.log(now / np.where(down > 0, down, after))  # eta > 1 may ask for noise only: such a step is first order
        # with eta > 1 or r1 > 1/2 the inner point may lie below the lowest level that the model knows
        known = (np.log(now) + grid.schedule.lam(grid.schedule.t_min)) / h
        fraction = np.where(grid.sigma[1:] > 0, np.minimum(r, known), r)
        mid, z = now * np.exp(-fraction * h), h if prediction == "eps" else -h
        latest = total * (0.5 if solver_type == "midpoint" else psi(2, z) / psi(1, z)) / fraction
        inner = stage(grid, -np.log(mid), *_way(prediction, now, mid), 0.0)
        methods[2] = (inner, stage(grid, None, state, total - latest, latest, s_noise * up))
    return staged_plan(Draft(grid, prediction), methods, np.where(down > 0, orders, 1).tolist())


def _way(prediction: str, now: np.ndarray, to: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of y and of the output in the first-order step of the ODE between levels."""
    return (np.ones_like(now), to - now) if prediction == "eps" else (to / now, 1.0 - to / now)


def edm(
    grid: Grid,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    orders: Sequence[int] | None = None,
) -> Plan:
    """EDM's stochastic sampler: noise up to `sigma_hat = (1 + gamma) sigma_bar`, then Heun's method down to the next node.

    Karras et al. 2022, arXiv:2206.00364, algorithm 2, in sigma_bar on any schedule. sigma_hat ends at `sigma_bar(t_max)`, so
    the model is never asked above its range: a first step from there has no churn, where the authors' code evaluates at up to
    sqrt(2) sigma_max. Without churn this is `heun`. The step to sigma = 0 is Euler's, after churn as any other, and so is the
    last one above where a budget of calls leaves one over.

    Args:
        grid: the nodes.
        s_churn: amount of noise, at least 0: `gamma = min(s_churn / N, sqrt(2) - 1)` in N steps.
        s_tmin, s_tmax: churn only where `s_tmin <= sigma_bar <= s_tmax` at the node.
        s_noise: factor on the noise's standard deviation, at least 0.
        orders: as in `heun`.
    """
    by_step = checked_orders(grid, 2, orders)
    check_amount("s_churn", s_churn, math.inf)  # gamma has a bound of its own
    check_amount("s_noise", s_noise)
    if not 0 <= s_tmin <= s_tmax:
        raise ValueError(f"s_tmin and s_tmax must satisfy 0 <= s_tmin <= s_tmax, got {s_tmin} and {s_tmax}")
    p, schedule = Draft(grid, "eps"), grid.schedule
    x, gamma, highest = p.x, min(s_churn / grid.steps, math.sqrt(2.0) - 1.0), float(schedule.sigma_bar(schedule.t_max))
    for i in p.steps:
        start, now = node_level(p, i), p.sigma[i] / p.alpha[i]
        hat = min((1.0 + gamma) * now, highest)
        if s_tmin <= now <= s_tmax and hat > now:
            t = float(schedule.t_of_lam(-math.log(hat)))
            start = Level(t, float(schedule.alpha(t)), float(schedule.sigma(t)))
            std = start.alpha * math.sqrt(hat**2 - now**2) * s_noise
            x = p.combine(None, (x, start.alpha / p.alpha[i]), (p.noise(), std))
        x = heun_step(p, x, start, node_level(p, i + 1), i + 1, by_step[i])
    return p.plan()
