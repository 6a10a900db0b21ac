"""Exponential integrators of the reverse SDEs in lam: DPM-Solver(++) (SDE, 2M SDE, 3M SDE) and SEEDS.

The reverse SDEs `dy = (1 + eta) eps d sigma_bar + sqrt(2 eta sigma_bar |d sigma_bar|) z` of `y = x / alpha` have the marginals of
the forward process at any eta >= 0; 0 is the probability-flow ODE, 1 the time reversal of the forward process. Over a step of
length h in lam their exact solutions are, with psi_k and D_k as in `exponential`,

    eps: x' = (alpha'/alpha) x - (1 + eta) sigma' sum_k psi_k(h) D_k + sigma' sqrt(eta (e^(2h) - 1)) z
    x0:  x' = (sigma'/sigma) e^(-eta h) x - alpha' sum_k psi_k(-(1 + eta) h) D_k + sigma' sqrt(1 - e^(-2 eta h)) z

The noise is an Ito integral against one Brownian path, so the noises of a step's inner points and of its end are sums of
independent increments, one for each stretch between them, that are carried on with the homogeneous solution.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from samplers.draft import Draft
from samplers.errors import check_amount
from samplers.grid import Grid
from samplers.plan import Plan
from samplers.solvers.ancestral import ancestral_levels
from samplers.solvers.exponential import checked_orders, inner_fractions, psi
from samplers.solvers.exponential_multistep import Rows, check_predict, published_weights
from samplers.solvers.stages import Stage, finite_lam, stage, staged_plan

# In epsilon an explicit step is unstable where (1 + eta) h is large: on a Gaussian mixture, over schedules, grids and 8 to 45
# steps, states grow to 3e20 at eta = 10, and at 20 SEEDS-3 leaves float32.
_MOST_IN_EPS = 10.0


def seeds(
    grid: Grid,
    *,
    order: int = 3,
    predict: str = "eps",
    eta: float = 1.0,
    s_noise: float = 1.0,
    r1: float | None = None,
    r2: float | None = None,
    orders: Sequence[int] | None = None,
) -> Plan:
    """SEEDS-1, -2, -3: DPM-Solver-1, -2, -3 ("midpoint") with the noises of a reverse SDE at every stage.

    Gonzalez et al. 2023, arXiv:2305.14267. The noises are exact for any r1 and r2: the authors' code has them so at order 2 and
    r1 = 1/2; at order 3 it swaps the first two increments at the step's end (and scales the second stage's by sigma of the
    wrong point). eta = 0 is DPM-Solver (eps) or DPM-Solver++ (x0).

    On Gaussian data the mean given the start converges with order `order`, the variance with order min(order, 2), and single
    paths with order 1 (strong order), as with any method that uses increments alone.

    Under `nfe=` the calls that are too few for one more step are a step of SEEDS-1 or -2, the last one above sigma = 0.

    Args:
        grid: the nodes.
        order: 1, 2 or 3, also the calls of a step.
        predict: "eps", the paper's noise prediction, or "x0", its data prediction.
        eta: amount of noise, at least 0, in epsilon at most 10; the paper's is 1.
        s_noise: factor on the noise's standard deviation, at least 0.
        r1, r2: inner points as fractions of the step in lam, as in `exponential.singlestep`.
        orders: the order of each step, 1 to `order`; None: `order` everywhere. Lower steps use their default inner point.
    """
    check_predict(predict)
    _check_noise(predict, eta, s_noise)
    if isinstance(order, bool) or order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order!r}")
    for name, value, least in (("r1", r1, 2), ("r2", r2, 3)):
        if value is not None and order < least:
            raise ValueError(f"{name} goes with order {least} and above, got {name}={value} at order {order}")
    by_step = checked_orders(grid, order, orders)
    inner_fractions(order, r1, r2)  # checked also where no step is of full order
    inner = {k: inner_fractions(k, *((r1, r2) if k == order else (None, None))) for k in set(by_step)}
    methods = {k: _stages(grid, predict, eta, s_noise, (*fractions, 1.0)) for k, fractions in inner.items()}
    return staged_plan(Draft(grid, predict), methods, by_step)


def _stages(grid: Grid, predict: str, eta: float, s_noise: float, points: tuple[float, ...]) -> list[Stage]:
    """The stages of SEEDS through these points, the last of which is 1, the end of the step."""
    lam, order = finite_lam(grid), len(points)
    h, starts = np.diff(lam), (0.0, *points)
    stages = []
    for k, c in enumerate(points):
        to = np.exp(-lam[:-1] - c * h)
        z, state, scale = _solution(predict, eta, c * h, to)
        psi_1, latest = psi(1, z), 0.0 * h
        if k:
            latest = -scale * (0.5 * psi_1 if order == 2 else psi(2, z)) * c / points[k - 1]
        noises = [s_noise * to * _increment(predict, eta, h, starts[j], points[j], c) for j in range(k + 1)]
        coefficients = (state, -scale * psi_1 - latest, latest, *noises)
        stages.append(stage(grid, lam[:-1] + c * h if k < order - 1 else None, *coefficients))
    return stages


def dpmpp_sde(
    grid: Grid, *, eta: float = 1.0, s_noise: float = 1.0, r1: float = 0.5, orders: Sequence[int] | None = None
) -> Plan:
    """DPM-Solver++ (SDE): the two calls of DPM-Solver++(2S), each after an ancestral step from the step's start.

    k-diffusion's `sample_dpmpp_sde`. There the noises to the inner point (level m) and to the end are increments over sigma_bar
    of one Brownian path W, `W(now) - W(m)` and `W(now) - W(after)`, each divided by its deviation. Of the variance of the second
    the first therefore makes up `(now - m) / (now - after)`; the rest is an independent noise. In the SDE itself that share is
    `(e^(2 r1 h) - 1) / (e^(2 h) - 1)`, which is `seeds` with `order=2, predict="x0"`; the two agree as h goes to 0. eta = 0 is
    `dpmpp_2s`.

    On Gaussian data the variance converges with order 2; single paths, and with 0 < eta < 1 the mean given the start, with
    order 1. Under `nfe=` a call that is left over is the ancestral step alone (DDIM with this eta), the last one above
    sigma = 0.

    Args:
        grid: the nodes.
        eta: amount of noise of an ancestral step, at least 0; 1 is the reverse SDE.
        s_noise: factor on the noise's standard deviation, at least 0.
        r1: inner point as a fraction of the step in lam, in (0, 1].
        orders: the order of each step, 1 or 2; None: 2 everywhere.
    """
    by_step = checked_orders(grid, 2, orders)
    _check_noise("x0", eta, s_noise)
    (r1,) = inner_fractions(2, r1, None)
    lam = finite_lam(grid)
    h, now, after = np.diff(lam), np.exp(-lam[:-1]), np.exp(-lam[1:])
    mid = now * np.exp(-r1 * h)
    (down_mid, up_mid), (down, up) = ancestral_levels(now, mid, eta), ancestral_levels(now, after, eta)
    share = np.expm1(-r1 * h) / np.expm1(-h)
    total = 1.0 - down / now
    latest = total * 0.5 / r1
    inner = stage(grid, lam[:-1] + r1 * h, down_mid / now, 1.0 - down_mid / now, 0.0, s_noise * up_mid)
    noises = (s_noise * up * np.sqrt(share), s_noise * up * np.sqrt(1.0 - share))
    single = (stage(grid, None, down / now, total, 0.0, s_noise * up),)
    stages = (inner, stage(grid, None, down / now, total - latest, latest, *noises))
    return staged_plan(Draft(grid, "x0"), {1: single, 2: stages}, by_step)


def dpmpp_2m_sde(
    grid: Grid,
    *,
    predict: str = "x0",
    solver_type: str = "midpoint",
    eta: float = 1.0,
    s_noise: float = 1.0,
    lower_order_final: bool | int = 15,
) -> Plan:
    """SDE-DPM-Solver++(2M), and in epsilon SDE-DPM-Solver-2M: the slope comes from the step before, one call a step.

    Lu et al. 2022, arXiv:2211.01095, section on SDE solvers, with eta = 1; k-diffusion's `sample_dpmpp_2m_sde` in x0. eta = 0
    is DPM-Solver++(2M) in x0 and DPM-Solver-2M in epsilon. On Gaussian data the mean given the start and the variance converge
    with order 2, single paths with order 1 (strong order). A first-order step is `seeds` with `order=1`.

    Args:
        grid: the nodes.
        predict: "x0", or "eps", the paper's SDE-DPM-Solver.
        solver_type: "midpoint", `psi_1 / 2` on the difference; "heun" or "taylor" (the same), `psi_2`.
        eta: amount of noise, at least 0, in epsilon at most 10; 1 is the time reversal of the forward process.
        s_noise: factor on the noise's standard deviation, at least 0.
        lower_order_final: as in `exponential_multistep.multistep`; k-diffusion does not lower.
    """
    check_predict(predict)
    p, rows = _rows(grid, predict, 2, eta, s_noise, lower_order_final)
    return _multistep(p, rows, published_weights(rows, solver_type, "exact"), eta, s_noise)


def dpmpp_3m_sde(
    grid: Grid,
    *,
    weights: str = "published",
    eta: float = 1.0,
    s_noise: float = 1.0,
    lower_order_final: bool | int = 15,
) -> Plan:
    """DPM-Solver++(3M) SDE: two derivatives from the steps before, one call a step.

    k-diffusion's `sample_dpmpp_3m_sde`, which like DPM-Solver++(3M) takes the second divided difference for the derivative, which
    is twice that. eta = 0 is DPM-Solver++(3M), with "heun" steps of second order. On Gaussian data the mean given the start
    converges with order 2 as published and 3 with the exact weights, the variance with order 2, single paths with order 1
    (strong order).

    Args:
        grid: the nodes.
        weights: of the third-order steps: "published", or "exact", with the factor 2.
        eta, s_noise, lower_order_final: as in `dpmpp_2m_sde`.
    """
    p, rows = _rows(grid, "x0", 3, eta, s_noise, lower_order_final)
    return _multistep(p, rows, published_weights(rows, "heun", weights), eta, s_noise)


def _solution(predict: str, eta: float, h: np.ndarray, to: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The argument of psi, the factor on y and the factor on the psi terms, over h in lam to the level `to`."""
    if predict == "eps":
        return h, np.ones_like(h), (1.0 + eta) * to
    return -(1.0 + eta) * h, np.exp(-(1.0 + eta) * h), np.ones_like(h)


def _increment(predict: str, eta: float, h: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    """Deviation at c of the noise that the stretch from a to b brings (fractions of the step), over sigma_bar at c."""
    if predict == "eps":
        return np.exp((c - b) * h) * np.sqrt(eta * np.expm1(2.0 * (b - a) * h))
    return np.exp(-eta * (c - b) * h) * np.sqrt(-np.expm1(-2.0 * eta * (b - a) * h))


def _check_noise(predict: str, eta: float, s_noise: float) -> None:
    check_amount("eta", eta)
    check_amount("s_noise", s_noise)
    if predict == "eps" and eta > _MOST_IN_EPS:
        raise ValueError(
            f"eta must be at most {_MOST_IN_EPS:g} with predict='eps', whose steps it makes unstable, got {eta}"
        )


def _rows(
    grid: Grid, predict: str, order: int, eta: float, s_noise: float, lower_order_final: bool | int
) -> tuple[Draft, Rows]:
    """The steps of a multistep method; in x0 with the z of the SDE, which in epsilon is that of the ODE."""
    _check_noise(predict, eta, s_noise)
    p = Draft(grid, predict)
    rows = Rows(p, order, lower_order_final)
    if predict == "x0":
        rows.z = (1.0 + eta) * rows.z
    return p, rows


def _multistep(p: Draft, rows: Rows, weights: np.ndarray, eta: float, s_noise: float) -> Plan:
    """The plan whose steps take the last outputs, newest first, by these weights."""
    after, before = slice(p.steps.start + 1, None), slice(p.steps.start, -1)
    alpha, sigma = p.grid.alpha[after], p.grid.sigma[after]
    if p.prediction == "eps":
        h, state, scale = rows.z, alpha / p.grid.alpha[before], (1.0 + eta) * sigma
    else:
        h = -rows.z / (1.0 + eta)
        state, scale = sigma / p.grid.sigma[before] * np.exp(-eta * h), alpha
    stds = s_noise * sigma * _increment(p.prediction, eta, h, 0.0, 1.0, 1.0)
    columns = state.tolist(), (-scale[:, None] * weights).tolist(), stds.tolist()
    x, outs = p.x, list[str]()
    for i, c, row, std in zip(p.steps, *columns, strict=True):
        outs = [p.evaluate(x, i), *outs][: len(row)]
        if p.sigma[i + 1] == 0:
            x = p.first_order(i, x, outs[0])
        else:
            x = p.combine(i + 1, (x, c), *zip(outs, row, strict=False), (p.noise(), std))
    return p.plan()
