"""Certificates of weak and strong order for stochastic samplers, on a one-dimensional Gaussian, without sampling.

For data N(m, s^2) epsilon is affine in the state, so a plan's result is affine in its start and its noises, with coefficients
that `plan.matrix()` gives. Mean and variance of the result follow exactly, and so does its mean-square distance to the
solution of the reverse SDE driven by the same Brownian path.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import solve_triangular

from bench.certify.order import SCHEDULES, TOLERANCE
from bench.certify.settings import Options, stated_weak, text
from samplers import Plan, make_plan
from samplers.program import Combine, Evaluate
from samplers.registry import Sampler
from samplers.schedule import Schedule

Row = dict[str, Any]
MEAN, STD = 0.7, 0.5
STEPS = (320, 160)
_FINER = (640, 320)  # where the order does not show yet
_EXACT = 1e-12  # an error below is rounding
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(8)


class Affine(NamedTuple):
    """A plan's result on the Gaussian: `state x_T + noises . z + offset`."""

    state: float
    noises: np.ndarray
    offset: float


def affine(plan: Plan, mean: float = MEAN, std: float = STD) -> Affine:
    """The result's coefficients, by the plan's matrix."""
    matrix, calls, n = plan.matrix(), [s for s in plan.instructions if isinstance(s, Evaluate)], plan.nfe
    alpha, sigma = (np.array([getattr(call, name) for call in calls]) for name in ("alpha", "sigma"))
    is_x0 = np.array([call.kind == "x0" for call in calls])
    slope = np.where(is_x0, alpha * std**2, sigma) / (alpha**2 * std**2 + sigma**2)
    # output = slope (state - alpha mean) [+ mean], state = matrix (x_T, outputs, noises): columns x_T, noises, constant
    known = np.hstack([matrix[:, :1], matrix[:, 1 + n :], np.zeros((n + 1, 1))])
    right = slope[:, None] * known[:-1]
    right[:, -1] += np.where(is_x0, mean, 0.0) - slope * alpha * mean
    through = matrix[:, 1 : 1 + n]
    outputs = solve_triangular(np.eye(n) - slope[:, None] * through[:-1], right, lower=True, unit_diagonal=True)
    state = known[-1] + through[-1] @ outputs
    return Affine(float(state[0]), state[1:-1], float(state[-1]))


def moments(plan: Plan, schedule: Schedule, mean: float = MEAN, std: float = STD) -> tuple[float, float]:
    """Exact mean and variance of a plan's result where it starts from the exact distribution."""
    result = affine(plan, mean, std)
    alpha, sigma = float(schedule.alpha(plan.times[0])), float(schedule.sigma(plan.times[0]))
    variance = result.state**2 * (alpha**2 * std**2 + sigma**2) + float((result.noises**2).sum())
    return result.state * alpha * mean + result.offset, variance


def variance_error(plan: Plan, schedule: Schedule) -> float:
    """Error of the variance at the last node.

    The mean is of no use: on its own path epsilon is 0 and x0 is the mean of the data, so every sampler has it exactly.
    """
    alpha, sigma = float(schedule.alpha(plan.times[-1])), float(schedule.sigma(plan.times[-1]))
    return abs(moments(plan, schedule)[1] - (alpha**2 * STD**2 + sigma**2))


def strong_error(plan: Plan, schedule: Schedule) -> float:
    """Root mean square distance to the solution of the reverse SDE on the same Brownian path.

    In lam the reverse SDE is `dx = (..) dlam + sqrt(2) sigma dW` (Lu et al. 2022, arXiv:2211.01095, section 4.1), and the
    noise of a step is `z = integral e^lam dW`, normalised. On a Gaussian with `v = alpha^2 s^2 + sigma^2` a deviation from
    the mean grows from s to t by `(alpha_s / alpha_t) (v_t / v_s)`.
    """
    lam = schedule.lam(np.array(_noise_times(plan)))
    half, middle = 0.5 * np.diff(lam)[:, None], 0.5 * (lam[1:] + lam[:-1])[:, None]
    at = middle + half * _POINTS
    response = _growth(schedule, at, lam[-1]) * math.sqrt(2.0) * schedule.sigma(schedule.t_of_lam(at))
    weight = half * _WEIGHTS
    shape = np.exp(at - lam[1:, None]) / np.sqrt(-0.5 * np.expm1(-4.0 * half))
    result, grown = affine(plan), float(_growth(schedule, lam[:1], lam[-1])[0])
    noises = (weight * (response - result.noises[:, None] * shape) ** 2).sum()
    alpha, sigma = float(schedule.alpha(plan.times[0])), float(schedule.sigma(plan.times[0]))
    return math.sqrt(noises + (result.state - grown) ** 2 * (alpha**2 * STD**2 + sigma**2))


def _growth(schedule: Schedule, lam: np.ndarray, end: float) -> np.ndarray:
    def levels(at: Any) -> tuple[Any, Any]:
        t = schedule.t_of_lam(at)
        alpha = schedule.alpha(t)
        return alpha, alpha**2 * STD**2 + schedule.sigma(t) ** 2

    (alpha, v), (alpha_end, v_end) = levels(lam), levels(end)
    return alpha / alpha_end * v_end / v


def _noise_times(plan: Plan) -> list[float]:
    """Where the stretches of the Brownian path begin that the plan's noises are the increments of, and where the last ends.

    A noise belongs to a step, or where a step has several, to the stretch from one network call to the next.
    """
    return list(plan.times) if plan.noises == plan.steps else [*(call.t for call in plan.calls), plan.times[-1]]


def no_strong_order(plan: Plan, schedule: Schedule) -> str:
    """Why a plan has no strong order that can be measured here; empty where it has one."""
    first, done = [], 0
    for step in plan.instructions:
        if isinstance(step, Combine) and step.node is not None:
            own = [c for name, c in step.terms if name[0] == "z" and int(name[1:]) >= done]
            first.append(math.hypot(*own))
            done += len(own)
    each = len(plan.calls) if plan.noises > plan.steps else plan.steps
    if plan.noises not in (plan.steps, len(plan.calls)) or done != each or not all(first):
        return "neither a noise for each step nor for each call: the plan does not say how its noises share a Brownian path"
    lam, sigma = schedule.lam(np.array(plan.times)), schedule.sigma(np.array(plan.times[1:]))
    ratio = np.array(first) / (sigma * np.sqrt(-np.expm1(-2.0 * np.diff(lam))))
    if abs(float(np.median(ratio)) - 1.0) > 0.1:
        return f"another SDE than the reverse one: its noise is {ratio.min():.2f} to {ratio.max():.2f} times as much"
    return ""


def stochastic_orders(entry: Sampler, options: Options, schedule: str, grid: str) -> Iterator[Row]:
    """Rows for the order of the mean given a start, of the variance, and of the path.

    The mean given a start is that of a run from the log-SNR -1, where the start is not yet forgotten; its order is that of
    its convergence to its own limit, which needs no exact solution and so holds for every SDE.
    """
    where = SCHEDULES[schedule]
    extra: Options = {"lower_order_final": False} if "lower_order_final" in entry.options else {}

    @functools.cache
    def plan_of(n: int, late: bool = False) -> Plan:
        if late:
            return make_plan(entry.name, where, timesteps=_late_nodes(where, grid, n), **options, **extra)
        return make_plan(entry.name, where, steps=n, grid=grid, **options, **extra)

    def change(n: int) -> float:
        return abs(affine(plan_of(n, True)).state - affine(plan_of(n // 2, True)).state)

    target = stated_weak(entry, options)
    head = {
        "sampler": entry.name,
        "setting": text(options),
        "schedule": schedule,
        "grid": grid,
        "lower_order_final": False,
    }
    head |= {"note": target.reason}
    yield head | {"kind": "weak, mean given a start"} | _measured(change, target.mean)
    yield head | {"kind": "weak, variance"} | _measured(lambda n: variance_error(plan_of(n), where), target.variance)
    reason = no_strong_order(plan_of(STEPS[0]), where)
    if reason:
        yield head | {"kind": "strong", "status": "not measured", "note": reason}
    else:
        yield head | {"kind": "strong"} | _measured(lambda n: strong_error(plan_of(n), where), target.strong)


def _late_nodes(schedule: Schedule, grid: str, n: int) -> np.ndarray:
    """Nodes from the log-SNR -1 to `t_min`, spaced as the grid is."""
    start = float(schedule.t_of_lam(-1.0))
    if grid == "logsnr":
        return schedule.t_of_lam(np.linspace(-1.0, float(schedule.lam(schedule.t_min)), n + 1))
    return np.linspace(start**0.5, schedule.t_min**0.5, n + 1) ** 2


def _measured(error_of: Callable[[int], float], order: float) -> Row:
    """Slope of the last doubling, or of the next where that is too small; at least the stated one, less the tolerance."""
    for fine, coarse in (STEPS, _FINER):
        error = error_of(fine)
        row: Row = {"stated": order, "steps_used": f"{coarse}-{fine}", "error": error}
        if error < _EXACT:
            return row | {"slope": math.inf, "deviation": 0.0, "status": "pass", "note": "exact"}
        slope = math.log2(error_of(coarse) / error)
        if slope > order - TOLERANCE:
            break
    return row | {"slope": slope, "deviation": slope - order, "status": "pass" if slope > order - TOLERANCE else "fail"}
