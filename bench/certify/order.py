"""Certificates of order: how fast the error of a deterministic sampler falls as its steps shrink."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.certify.problem import MIXTURE, STATES, Problem, run_from, solution_at
from bench.certify.settings import Options, known_slope, stated, text
from samplers import Plan, make_plan, schedules
from samplers.registry import Sampler
from samplers.schedule import Schedule

Row = dict[str, Any]
TOLERANCE = 0.2
SCHEDULES: dict[str, Schedule] = {s.name: s for s in (schedules.vp_linear(), schedules.cosine(), schedules.edm())}
GRIDS = ("logsnr", "quadratic")  # they refine everywhere as the steps get more
STEPS = (1280, 640, 320, 160, 80, 40, 20)
EXACT_START = 32  # the part of the nodes, one over this, at which a start is exact
START_UP = f"start-up of lower order, gone with exact states over the first 1/{EXACT_START}"
_LOWERED = 2  # the order of the error that a last step of first order leaves
_LAST_STEP = "the last step is of first order, and its error of second order in its length"
_HIDES = f"{_LAST_STEP}; it is that (slope_of_lowering) and the rest of the error, which falls faster, still exceeds it"
# An error below is made of rounding and of the reference's own 5e-13.
_FLOOR, _LOCAL_FLOOR = 2e-11, 3e-13
# Uneven, so that a formula which is right for equal steps only does not pass.
_GAPS = np.array([1.0, 1.3, 0.8, 1.1, 1.4, 0.9, 1.2, 1.0])
_START_LAM = (-0.5, 0.5, 1.2)  # where the mixture's components separate
_LONGEST = 0.08


@functools.cache
def problem(schedule: str) -> Problem:
    """The problem on a schedule of `SCHEDULES`, with its reference solution; made once."""
    return Problem(SCHEDULES[schedule])


class Slope(NamedTuple):
    """The slope of an error over the last doubling of steps that is above rounding, the finer error, and the doubling."""

    value: float
    error: float
    steps: str


def slope(
    error_of: Callable[[int], float], steps: Sequence[int] = STEPS, stated: float | None = None, finer: int = 2
) -> Slope:
    """The slope over the last doubling above rounding; where it is not the stated one, over finer ones, at most `finer`."""
    ladder = [2**k * steps[0] for k in range(finer, 0, -1)] if stated is not None else []
    measured = _last(error_of, steps)
    while ladder and not _within(measured.value, stated):
        steps = (ladder.pop(), *steps)
        measured = _last(error_of, steps)
    return measured


def _last(error_of: Callable[[int], float], steps: Sequence[int]) -> Slope:
    for fine, coarse in itertools.pairwise(steps):
        if error_of(fine) > _FLOOR:
            return Slope(math.log2(error_of(coarse) / error_of(fine)), error_of(fine), f"{coarse}-{fine}")
    return Slope(math.nan, error_of(steps[-1]), "rounding")


def global_orders(
    entry: Sampler, options: Options, schedule: str, grid: str, steps: Sequence[int] = STEPS
) -> Iterator[Row]:
    """The order over a whole run: with `lower_order_final=False`, and, where the sampler has it, with True.

    A method of k points starts with lower orders, which cap its order over a run at 2 in theory (one first-order step) and on
    some grids in practice. Where the slope is not the stated one, it is measured again with the exact states over the
    first 1/32 of the run; if that is the stated one, the row's status is "start-up", and both slopes are given.

    With lowering the last step is of first order, whose error is of second order in its length: 2 is stated for every method of
    order 2 and above. Where the whole error falls faster, because the rest of it still exceeds what lowering adds, the slope of
    that alone, the difference of the two runs, is measured too; where it is 2 the row is a finding.
    """
    where = SCHEDULES[schedule]
    target, reason = stated(entry, options)
    lowers = "lower_order_final" in entry.options

    @functools.cache
    def plan_of(n: int, lowered: bool) -> Plan:
        extra: Options = {"lower_order_final": lowered} if lowers else {}
        return make_plan(entry.name, where, steps=n, grid=grid, **options, **extra)

    def error_of(n: int, lowered: bool = False, exact: bool = False) -> float:
        return problem(schedule).error(plan_of(n, lowered), n // EXACT_START if exact else 0)

    measured = slope(error_of, steps, target)
    row = _global(entry, options, schedule, grid, measured, target, reason)
    if not _within(measured.value, target):
        exact = slope(functools.partial(error_of, exact=True), steps, target)
        row |= _explained(entry, options, measured.value, exact, schedule, grid, target, reason)
    yield _judged(row)
    if lowers:
        cap = min(target, _LOWERED)
        lowered = functools.partial(error_of, lowered=True)
        measured = slope(lowered, steps)
        if not measured.value >= cap - TOLERANCE:
            measured = slope(lowered, steps, cap)
        row = _global(entry, options, schedule, grid, measured, cap, _LAST_STEP if cap < target else "")
        if measured.value > cap + TOLERANCE:
            row |= _above(measured, lambda n: problem(schedule).apart(plan_of(n, False), plan_of(n, True)), steps)
        yield _judged(row | {"lower_order_final": True})


def _global(
    entry: Sampler, options: Options, schedule: str, grid: str, measured: Slope, target: int, reason: str
) -> Row:
    row = _row(entry, options, "global", schedule, target, reason)
    row |= {"grid": grid, "lower_order_final": False, "steps_used": measured.steps}
    return row | {"slope": measured.value, "error": measured.error}


def _above(measured: Slope, added: Callable[[int], float], steps: Sequence[int]) -> Row:
    """What is known of a slope with lowering that is above 2: whether what lowering adds to the error is of order 2."""
    alone = slope(added, steps, _LOWERED, finer=4)
    row: Row = {"slope_of_lowering": alone.value}
    if _within(alone.value, _LOWERED):
        row |= {"status": "finding", "note": _HIDES}
    return row


def _explained(
    entry: Sampler,
    options: Options,
    measured: float,
    exact: Slope,
    schedule: str,
    grid: str,
    target: float,
    reason: str,
) -> Row:
    """What is known of a slope that is not the stated one."""
    row: Row = {"slope_exact_start": exact.value}
    known = known_slope(entry, options, schedule, grid)
    if _within(exact.value, target):
        status, why = "start-up", START_UP
    elif known and exact.value > target:
        status, why = "finding", f"{START_UP}; then {known}" if measured < target else known
    else:
        return row
    return row | {"status": status, "note": "; ".join(filter(None, (reason, why)))}


def local_order(entry: Sampler, options: Options, schedule: str, change: Callable[[Plan], Plan] | None = None) -> Row:
    """The order of one step taken from exact history, on uneven steps: the slope of its error is one more.

    Eight steps of a plan are run with the exact state at every node but the last. Steps are halved, and the slope is that
    of the last halving above rounding: its median over eight states at each of three places, because the leading term of
    the error passes through zero somewhere, and the largest error may be that of another state after each halving.

    Args:
        entry, options, schedule: what to measure.
        change: applied to the plan, to plant a fault.
    """
    extra: Options = {"lower_order_final": False} if "lower_order_final" in entry.options else {}

    @functools.cache
    def errors_of(halvings: int) -> np.ndarray:
        errors = []
        for start in _START_LAM:
            nodes, states = _history(schedule, start, halvings)
            plan = make_plan(entry.name, SCHEDULES[schedule], timesteps=nodes, **options, **extra)
            result = run_from(plan if change is None else change(plan), states[:-1])
            errors.append(np.abs(result - states[-1]).max(1))
        return np.concatenate(errors)

    fine = next((n for n in (5, 4, 3, 2, 1) if np.median(errors_of(n)) > _LOCAL_FLOOR), 1)
    target, reason = stated(entry, options, local=True)
    row = _row(entry, options, "local", schedule, target + 1, reason)
    with np.errstate(divide="ignore", invalid="ignore"):
        measured = float(np.median(np.log2(errors_of(fine - 1) / errors_of(fine))))
    row |= {"steps_used": f"h={_LONGEST / 2 ** (fine - 1):g}-{_LONGEST / 2**fine:g}", "slope": measured}
    return _judged(row | {"lower_order_final": False, "error": float(np.median(errors_of(fine)))})


@functools.cache
def _history(schedule: str, start: float, halvings: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Nine nodes from a log-SNR on, and the exact states there."""
    where = SCHEDULES[schedule]
    lam = start + _LONGEST / 2**halvings * np.concatenate([[0.0], np.cumsum(_GAPS)])
    t = where.t_of_lam(lam)
    clean = MIXTURE.sample(STATES, seed=1).numpy()
    noise = np.random.default_rng(1).standard_normal(clean.shape)
    x = float(where.alpha(t[0])) * clean + float(where.sigma(t[0])) * noise
    return t, solution_at(where, where.lam(t), x)


def _row(entry: Sampler, options: Options, kind: str, schedule: str, order: float, reason: str) -> Row:
    named = {"sampler": entry.name, "setting": text(options), "kind": kind, "schedule": schedule}
    return {**named, "grid": "", "stated": order, "slope": math.nan, "slope_exact_start": math.nan, "note": reason}


def _judged(row: Row) -> Row:
    """The row with its deviation and, where it has none yet, its status."""
    row["deviation"] = row["slope"] - row["stated"]
    row.setdefault("status", "pass" if _within(row["slope"], row["stated"]) else "fail")
    return row


def _within(measured: float, order: float | None) -> bool:
    return order is not None and abs(measured - order) <= TOLERANCE
