"""Certificates of weak and strong order for stochastic samplers, on a one-dimensional Gaussian, without sampling.

For data N(m, s^2) epsilon is affine in the state, so a plan's result is affine in its start and its noises. Mean and variance of
the result follow exactly, and so does its mean-square distance to the solution of the reverse SDE of the same amount of noise
driven by the same Brownian path, or to the result of half as many steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.integrate import simpson

from bench.certify.order import EXACT_START, SCHEDULES, START_UP, TOLERANCE
from bench.certify.problem import run_from
from bench.certify.settings import GROWING, Options, known_weak, noise_rate, stated_weak, text
from samplers import Plan, make_plan
from samplers.program import START, Combine, Evaluate, Instruction
from samplers.registry import Sampler
from samplers.schedule import Schedule

Row = dict[str, Any]
MEAN, STD = 0.7, 0.5
OWN_LIMIT = "measured to its own limit on the same noises"
STEPS = (320, 640, 1280, 2560, 5120, 10240)  # the finer count of a doubling; the next where the order does not show yet
_EXACT = 1e-12  # an error below is rounding
_FINE = 1 << 14  # steps of an integral along a grid
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(8)


class Affine(NamedTuple):
    """A plan's result on the Gaussian: `state x_T + noises . z + offset`."""

    state: float
    noises: np.ndarray
    offset: float


def affine(plan: Plan, mean: float = MEAN, std: float = STD) -> Affine:
    """The result's coefficients, by running the plan on them; those of a value are freed after its last use."""
    last = {name: i for i, step in enumerate(plan.instructions) for name in _read(step)}
    values = {START: np.eye(1, plan.noises + 2)[0]}
    for i, step in enumerate(plan.instructions):
        if isinstance(step, Evaluate):  # output = slope (state - alpha mean) [+ mean]
            is_x0 = step.kind == "x0"
            slope = (step.alpha * std**2 if is_x0 else step.sigma) / (step.alpha**2 * std**2 + step.sigma**2)
            value = slope * values[step.src]
            value[-1] += (mean if is_x0 else 0.0) - slope * step.alpha * mean
        else:
            value = np.zeros(plan.noises + 2)
            for name, c in step.terms:
                if name in values:
                    value += c * values[name]
                else:
                    value[1 + int(name[1:])] += c
        values[step.dst] = value
        for name in _read(step):
            if last[name] == i:
                values.pop(name, None)
    result = values[plan.instructions[-1].dst]
    return Affine(float(result[0]), result[1:-1], float(result[-1]))


def _read(step: Instruction) -> list[str]:
    return [step.src] if isinstance(step, Evaluate) else [name for name, _ in step.terms]


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


def mean_error(plan: Plan, schedule: Schedule, rate: float, exact_start: int = 0) -> float:
    """Error of the mean given a start, as a multiple of the start's distance from the mean of the data.

    Args:
        plan: of a sampler of the SDE of this rate, `settings.noise_rate`.
        schedule: of the plan.
        rate: of the SDE.
        exact_start: the states at nodes 1 .. exact_start are exact, which removes what the low orders of a start-up cost.
    """
    lam = schedule.lam(np.array(plan.times))
    exact = 1.0 / _growth(schedule, lam, lam[0], rate)
    states = exact[: exact_start + 1].tolist()
    result = run_from(plan, states, lambda x, alpha, sigma: x * sigma / (alpha**2 * STD**2 + sigma**2))
    return abs(float(result) - float(exact[-1]))


def other_growth(entry: Sampler, options: Options, schedule: Schedule, grid: str) -> float:
    """What a deviation of the mean is multiplied by from the log-SNR -1 on, where the limit is no SDE of one rate.

    Churn takes every step back up by `s_churn / n` in the logarithm of sigma_bar, and a restart its interval, and what is added
    comes down again along the ODE. NaN for other samplers.
    """
    nodes = _late_nodes(schedule, grid, _FINE)
    lam, full = schedule.lam(nodes), {**entry.options, **options}
    growth = float(_growth(schedule, lam[:1], lam[-1], 0.0)[0])
    if entry.name == "edm":
        noise = np.exp(-2.0 * lam)
        return growth * math.exp(-full["s_churn"] * float(simpson(noise / (STD**2 + noise), dx=1.0 / _FINE)))
    if callable(full.get("restarts")):
        for low, high, repeats, _ in full["restarts"](schedule, nodes):
            growth *= ((STD**2 + low**2) / (STD**2 + high**2)) ** (0.5 * repeats)
        return growth
    return math.nan


def strong_error(plan: Plan, schedule: Schedule, rate: float = 1.0) -> float:
    """Root mean square distance to the solution of the reverse SDE of a rate on the same Brownian path.

    In lam the reverse SDE is `dx = (..) dlam + sqrt(2 rate) sigma dW` (Lu et al. 2022, arXiv:2211.01095, section 4.1, where
    the rate is 1), and the noise of a step is `z = integral e^(rate lam) dW`, normalised.
    """
    lam = schedule.lam(np.array(_noise_times(plan)))
    half, middle = 0.5 * np.diff(lam)[:, None], 0.5 * (lam[1:] + lam[:-1])[:, None]
    at = middle + half * _POINTS
    response = _growth(schedule, at, lam[-1], rate) * math.sqrt(2.0 * rate) * schedule.sigma(schedule.t_of_lam(at))
    weight = half * _WEIGHTS
    shape = np.exp(rate * (at - lam[1:, None])) / np.sqrt(-0.5 / rate * np.expm1(-4.0 * rate * half))
    result, grown = affine(plan), float(_growth(schedule, lam[:1], lam[-1], rate)[0])
    noises = (weight * (response - result.noises[:, None] * shape) ** 2).sum()
    alpha, sigma = float(schedule.alpha(plan.times[0])), float(schedule.sigma(plan.times[0]))
    return math.sqrt(noises + (result.state - grown) ** 2 * (alpha**2 * STD**2 + sigma**2))


def _growth(schedule: Schedule, lam: np.ndarray, end: float, rate: float) -> np.ndarray:
    """What a deviation from the mean is multiplied by from `lam` to `end`.

    On a Gaussian with `v = alpha^2 s^2 + sigma^2` it is `alpha (v / alpha^2)^((1 + rate) / 2)` there over the same here.
    """

    def levels(at: Any) -> tuple[Any, Any]:
        t = schedule.t_of_lam(at)
        alpha = schedule.alpha(t)
        return alpha, alpha**2 * STD**2 + schedule.sigma(t) ** 2

    (alpha, v), (alpha_end, v_end) = levels(lam), levels(end)
    return alpha_end / alpha * (v_end / alpha_end**2 * (alpha**2 / v)) ** (0.5 * (1.0 + rate))


def _noise_times(plan: Plan) -> list[float]:
    """Where the stretches of the Brownian path begin that the plan's noises are the increments of, and where the last ends.

    A noise belongs to a step, or where a step has several, to the stretch from one network call to the next.
    """
    return list(plan.times) if plan.noises == plan.steps else [*(call.t for call in plan.calls), plan.times[-1]]


def no_strong_order(plan: Plan, schedule: Schedule, rate: float = 1.0) -> str:
    """Why a plan has no strong order to the SDE of a rate that can be measured here; empty where it has one."""
    first, done = [], 0
    for step in plan.instructions:
        if isinstance(step, Combine) and step.node is not None:
            own = [c for name, c in step.terms if name[0] == "z" and int(name[1:]) >= done]
            first.append(math.hypot(*own))
            done += len(own)
    each = len(plan.calls) if plan.noises > plan.steps else plan.steps
    if plan.noises not in (plan.steps, len(plan.calls)) or done != each or not all(first):
        return "neither a noise for each step nor for each call"
    lam, sigma = schedule.lam(np.array(plan.times)), schedule.sigma(np.array(plan.times[1:]))
    ratio = np.array(first) / (sigma * np.sqrt(-np.expm1(-2.0 * rate * np.diff(lam))))
    if abs(float(np.median(ratio)) - 1.0) > 0.1:
        return f"another SDE than the reverse one: its noise is {ratio.min():.2f} to {ratio.max():.2f} times as much"
    return ""


def own_strong_error(coarse: Plan, fine: Plan, schedule: Schedule) -> float:
    """Root mean square distance of two results on the same noises, from the coarser plan's start.

    Where the finer plan has twice the noises of the coarser one, those are increments of one path over the index of the step;
    where it has as many, they are the same. A method converges to its own limit on them, whichever SDE that solves. NaN where
    the noises do not go together.
    """
    if fine.noises not in (coarse.noises, 2 * coarse.noises):
        return math.nan
    a, b = affine(coarse), affine(fine)
    each = fine.noises // max(coarse.noises, 1)
    noises = ((np.repeat(a.noises, each) / math.sqrt(each) - b.noises) ** 2).sum()
    alpha, sigma = float(schedule.alpha(coarse.times[0])), float(schedule.sigma(coarse.times[0]))
    return math.sqrt(noises + (a.state - b.state) ** 2 * (alpha**2 * STD**2 + sigma**2))


def stochastic_orders(
    entry: Sampler,
    options: Options,
    schedule: str,
    grid: str,
    change: Callable[[Plan], Plan] = lambda plan: plan,
    steps: Sequence[int] = STEPS,
) -> Iterator[Row]:
    """Rows for the order of the mean given a start, of the variance, and of the path.

    The mean given a start is that of a run from the log-SNR -1, where the start is not yet forgotten. Where its order is not
    the stated one, it is measured again with exact means over the first 1/32 of the run; if that gives the stated one, the
    row's status is "start-up", and both slopes are given. Mean and path are held against the SDE that the setting asks for; of
    a sampler that solves another one, the mean against that of its limit (`other_growth`), and the path from the log-SNR -1
    against its own limit on the same noises, whose mean and variance the other two rows settle. A slope of variance or path that
    is not the stated one, but is from the log-SNR -1 on, where the first steps of a grid are not long, is a finding.

    Args:
        entry, schedule, grid: what to measure.
        options: its options; one that is a function of schedule and nodes, such as those of `GROWING`, is called with them.
        change: applied to every plan, to plant a fault.
        steps: the finer counts of the doublings to try.
    """
    where, rate = SCHEDULES[schedule], noise_rate(entry, options)

    @functools.cache
    def plan_of(n: int, late: bool = False) -> Plan:
        return change(_plan(entry, options, where, grid, n, late))

    def of_mean(n: int, exact_start: int = 0) -> float:
        if rate is None:
            state = affine(plan_of(n, True)).state
            return abs(state - (affine(plan_of(n // 2, True)).state if math.isnan(growth) else growth))
        return mean_error(plan_of(n, True), where, rate, exact_start)

    def of_variance(n: int, late: bool = False) -> float:
        return variance_error(plan_of(n, late), where)

    def of_path(n: int, late: bool = False) -> float:
        if other:
            return own_strong_error(plan_of(n // 2, True), plan_of(n, True), where)
        return strong_error(plan_of(n, late), where, rate or 1.0)

    growth = other_growth(entry, options, where, grid)
    target, other = stated_weak(entry, options), no_strong_order(plan_of(steps[0]), where, rate or 1.0)
    head = _head(entry, options, schedule, grid, target.reason)
    mean = head | {"kind": "weak, mean given a start"} | _measured(of_mean, target.mean, steps)
    if mean["status"] == "fail" and rate is not None:
        mean |= _exact_start(lambda n: of_mean(n, n // EXACT_START), target.mean, steps, target.reason)
    yield mean
    # a path's error falls so slowly that on the first doublings it still hides what a wrong coefficient leaves
    path = ("strong", of_path, target.strong, steps[2:] or steps)
    for kind, of, order, finer in (("weak, variance", of_variance, target.variance, steps), path):
        row = head | {"kind": kind} | _measured(of, order, finer, known_weak(entry, options, kind, grid))
        if row["status"] == "fail":
            row |= _late(functools.partial(of, late=True), order, finer, target.reason)
        if kind == "strong" and other and order is not None:
            row["note"] = _joined(row["note"], f"{other}: {OWN_LIMIT}")
        yield row


def _head(entry: Sampler, options: Options, schedule: str, grid: str, reason: str) -> Row:
    """What the rows of a setting share."""
    row: Row = {"sampler": entry.name, "setting": text(options), "schedule": schedule, "grid": grid}
    return row | {"lower_order_final": False, "slope_exact_start": math.nan, "note": reason}


def _plan(entry: Sampler, options: Options, schedule: Schedule, grid: str, n: int, late: bool) -> Plan:
    """The plan of n steps that does not lower its order at the end; late: from the log-SNR -1 on."""
    nodes = _late_nodes(schedule, grid, n) if late else np.array(make_plan("ddim", schedule, steps=n, grid=grid).times)
    given = {k: v(schedule, nodes) if v in GROWING.values() else v for k, v in options.items()}
    extra: Options = {"lower_order_final": False} if "lower_order_final" in entry.options else {}
    return make_plan(entry.name, schedule, timesteps=nodes, **given, **extra)


def _late(error_of: Callable[[int], float], order: float | None, steps: Sequence[int], reason: str) -> Row:
    """What is known of a slope of variance or path from noise to data that is not the stated one."""
    late = _measured(error_of, order, steps)
    if late["status"] != "pass":
        return {}
    note = f"not settled from noise to data; from the log-SNR -1 on {late['slope']:.2f} at {late['steps_used']} steps"
    return {"status": "finding", "note": _joined(reason, note)}


def _exact_start(error_of: Callable[[int], float], order: float | None, steps: Sequence[int], reason: str) -> Row:
    """What is known of a slope of the mean that is not the stated one."""
    exact = _measured(error_of, order, steps)
    row: Row = {"slope_exact_start": exact["slope"]}
    return row | ({"status": "start-up", "note": _joined(reason, START_UP)} if exact["status"] == "pass" else {})


def _joined(*reasons: str) -> str:
    return "; ".join(filter(None, reasons))


def _late_nodes(schedule: Schedule, grid: str, n: int) -> np.ndarray:
    """Nodes from the log-SNR -1 to `t_min`, spaced as the grid is."""
    start = float(schedule.t_of_lam(-1.0))
    if grid == "logsnr":
        return schedule.t_of_lam(np.linspace(-1.0, float(schedule.lam(schedule.t_min)), n + 1))
    return np.linspace(start**0.5, schedule.t_min**0.5, n + 1) ** 2


def _measured(
    error_of: Callable[[int], float], order: float | None, steps: Sequence[int] = STEPS, known: str = ""
) -> Row:
    """The slope of the first doubling that is, like the one before, within the tolerance of the stated one; else of the last.

    One alone may be so while a coefficient that is a little wrong begins to show, which takes the slope through it on its way
    to 0; as the last above rounding, or of all, it passes.

    Args:
        error_of: the error in n steps.
        order: the stated one; None where there is none, which is a status of its own, with the first slope for the record.
        steps: the finer counts of the doublings, the first of which are taken while the error is above rounding.
        known: the reason for a slope above the stated one, which is then a finding, on the first doubling.
    """
    row: Row = {}
    near = False
    for fine in steps:
        error = error_of(fine)
        exact = error < _EXACT
        if exact and row:
            break
        row = {"stated": math.nan if order is None else order, "steps_used": f"{fine // 2}-{fine}", "error": error}
        slope = math.inf if exact else math.log2(error_of(fine // 2) / error)
        if order is None:
            return row | {"slope": slope, "deviation": math.nan, "status": "not an order"}
        if exact:
            return row | {"slope": slope, "deviation": 0.0, "status": "pass", "note": "exact"}
        before, near = near, abs(slope - order) <= TOLERANCE
        row |= {"slope": slope, "deviation": slope - order}
        if near and before:
            break
        if known and slope > order + TOLERANCE:
            return row | {"status": "finding", "note": known}
    return row | {"status": "pass" if near else "fail"}
