"""What is certified: the settings of every registered sampler, and the orders that are stated for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import Any, NamedTuple

import numpy as np

from samplers import make_plan, schedules
from samplers.registry import Sampler
from samplers.schedule import Schedule

Options = dict[str, Any]

# Values of the options that name a formula; a sampler takes those it accepts. "taylor" is the same plan as "heun".
CHOICES: dict[str, tuple[Any, ...]] = {
    "order": (1, 2, 3, 4),
    "predictor_order": (1, 2, 3, 4),
    "corrector_order": (0, 1, 2, 3, 4),
    "predict": ("eps", "x0"),
    "solver_type": ("midpoint", "heun"),
    "variable": ("sigma_bar", "t"),
    "variance": ("fixed_small", "fixed_large"),
    "variant": ("bh1", "bh2", "vary_coeff", "tab", "rhoab"),
    "weights": ("published", "exact"),
}
# Settings that stay as they are here, and why.
CERTIFIED_AT: dict[str, Options] = {
    # a band of tau that begins or ends inside a step adds an error of first order that jumps with the grid
    "sa-solver": {"tau_start": math.inf, "tau_end": 0.0},
}
# Points of SA-Solver's predictor and corrector that are certified together: each predictor alone and with the corrector that
# raises its order; as many in both only at 1. From 2 on the corrector's term of the error is then so small beside the next
# one that the slope over a run does not settle: not at 5120 steps on (edm, quadratic), with 4 not before rounding.
ADAMS = ((1, 0), (2, 0), (3, 0), (4, 0), (1, 1), (1, 2), (2, 3), (3, 4))
# Switches that are not part of a formula, and stay at their defaults.
FIXED = ("lower_order_final",)
# The amount of noise that is certified beside the default one of every sampler that has it as an option: at eta = 1 a step
# in x0 has the mean of a Gaussian exactly, whatever its order.
HALF = 0.5


def deterministic(entry: Sampler) -> Iterator[Options]:
    """Every deterministic setting of a sampler: its named choices and switches, with the stochastic option at 0."""
    if entry.adaptive or entry.stochastic == "yes":
        return
    off = {} if entry.stochastic == "no" else {entry.stochastic: 0.0}
    for chosen in choices(entry):
        yield {**off, **chosen}


def choices(entry: Sampler) -> Iterator[Options]:
    """Every combination of a sampler's named choices and switches."""
    values = [[(name, value) for value in _values(entry, name, default)] for name, default in entry.options.items()]
    for chosen in map(dict, itertools.product(*(v for v in values if v))):
        if "predictor_order" not in chosen or (chosen["predictor_order"], chosen["corrector_order"]) in ADAMS:
            yield chosen


def stochastic(entry: Sampler) -> Iterator[Options]:
    """Every stochastic setting: the stochastic option at its default, or at 1 where the default is none, and at `HALF`."""
    if entry.adaptive or entry.stochastic == "no":
        return
    name = entry.stochastic
    amounts: list[Options] = [{}] if name == "yes" else [{name: entry.options[name] or 1.0}]
    if name in _AMOUNTS:
        amounts.append({name: HALF})
    for on, chosen in itertools.product(amounts, list(choices(entry))):
        yield {**on, **CERTIFIED_AT.get(entry.name, {}), **chosen}


_AMOUNTS = ("eta", "tau")  # options that are an amount of the reverse SDE's noise
_LINEAR = ("dpmpp-2m-sde", "dpmpp-3m-sde", "seeds")  # of its variance, and not of its deviation


def noise_rate(entry: Sampler, options: Options) -> float | None:
    """The rate of the SDE that a stochastic setting solves, 1 that of the forward process reversed; None where it is another.

    The SDE `dy = (1 + rate) eps d sigma_bar + sqrt(2 rate sigma_bar |d sigma_bar|) z` of `y = x / alpha` has the marginals of
    the forward process. The steps of the ancestral samplers have `rate = eta^2`, as their noise's deviation is proportional
    to eta, those of the exponential ones `rate = eta`, and SA-Solver has `rate = tau^2`.
    """
    name = entry.stochastic
    if name not in _AMOUNTS:
        return 1.0 if entry.name == "ddpm" else None
    amount = {**entry.options, **options}[name]
    return amount if entry.name in _LINEAR else amount**2


def growing(entry: Sampler) -> list[Options]:
    """The settings in which an option grows with the grid, beside the default ones."""
    return [{name: option} for name, option in GROWING.items() if name in entry.options]


def _values(entry: Sampler, name: str, default: Any) -> list[Any]:
    if isinstance(default, bool) and name not in FIXED:
        return [default, not default]
    if name not in CHOICES:
        return [default] if isinstance(default, str) else []
    return [value for value in CHOICES[name] if _accepts(entry, name, value)]


def _accepts(entry: Sampler, name: str, value: Any) -> bool:
    try:
        make_plan(entry.name, schedules.vp_linear(), steps=2, **{name: value})
    except ValueError:
        return False
    return True


class Stated(NamedTuple):
    """The orders stated for some settings, relative to the registered order.

    Attributes:
        sampler: a name, or a pattern of names.
        options: the settings it holds for; those that are not given are free.
        order: of convergence over a run, less the registered one.
        local: the order of one step from exact history (one less than the slope of its error), less the registered one.
        reason: why, for the certificate.
    """

    sampler: str
    options: Options
    order: int
    local: int
    reason: str


_NO_CORRECTOR = "the last step has no corrector, and the predictor alone is of one order less"
_CONSTANT = (
    "Adams-Bashforth weights for equal steps: second order on grids whose steps change slowly, first on uneven ones, such as "
    "those that one step is measured on"
)


def _adams(predictor: int, corrector: int) -> Stated:
    """SA-Solver's orders, less the registered one, which is that of 3 points and a corrector of 4."""
    reason = f"a predictor of {predictor} and a corrector of {corrector} points; {_NO_CORRECTOR}"
    if corrector <= predictor:
        reason = (
            f"a predictor and a corrector of {predictor} points" if corrector else f"a predictor of {predictor} points"
        )
    options = {"predictor_order": predictor, "corrector_order": corrector}
    return Stated("sa-solver", options, max(predictor, corrector) - 4, predictor - 4, reason)


STATED: tuple[Stated, ...] = (
    Stated("unipc-*", {"corrector": False}, -1, -1, "the predictor alone is of one order less"),
    Stated("unipc-*", {}, 0, -1, _NO_CORRECTOR),
    *itertools.starmap(_adams, ADAMS),
    Stated("ipndm-[234]", {}, 0, -1, _CONSTANT),
    Stated("pndm", {}, 0, -1, _CONSTANT),
    Stated("*-3m*", {"weights": "exact"}, 1, 1, "the full weight of the second difference; half of it is published"),
)


def stated(entry: Sampler, options: Options, local: bool = False) -> tuple[int, str]:
    """The order that is stated for a setting, over a run or of one step, and why where it is not the registered one."""
    full = {**entry.options, **options}
    registered = options.get("order", entry.order)
    for row in STATED:
        if matches(row, entry, full):
            offset = row.local if local else row.order
            return registered + offset, row.reason if offset else ""
    return registered, ""


class Known(NamedTuple):
    """A slope over a run that is above the stated order for a reason, on one schedule and grid."""

    sampler: str
    options: Options
    schedule: str
    grid: str
    reason: str


_HIDDEN = "the term of order 5 hides that of order 4 until both reach rounding"

KNOWN: tuple[Known, ...] = (
    Known("eab-4", {"predict": "eps"}, "edm", "logsnr", _HIDDEN),
    Known("unipc-4", {"predict": "eps", "corrector": False}, "edm", "logsnr", _HIDDEN),
    *(Known(name, {}, "edm", "quadratic", _HIDDEN) for name in ("lms-4", "ipndm-v-4", "deis-4")),
)


def known_slope(entry: Sampler, options: Options, schedule: str, grid: str) -> str:
    """The reason for a slope above the stated order; empty where none is known."""
    full = {**entry.options, **options}
    found = (k for k in KNOWN if (k.schedule, k.grid) == (schedule, grid) and matches(k, entry, full))
    return next((k.reason for k in found), "")


def matches(row: Stated | Known | Weak | KnownWeak, entry: Sampler, full: Options) -> bool:
    """Whether a stated exception holds for a sampler under all its options."""
    return fnmatch(entry.name, row.sampler) and all(full.get(name) == value for name, value in row.options.items())


class Weak(NamedTuple):
    """The orders stated for a stochastic sampler: of its mean, of its variance, and of its path; None where there is none."""

    sampler: str
    options: Options
    mean: float | None
    variance: float | None
    strong: float | None
    reason: str


def growing_restarts(schedule: Schedule, nodes: np.ndarray) -> list[tuple[float, float, int, int]]:
    """Two restarts from three quarters of the nodes up to half of them, in as many steps as the grid has between these."""
    n = len(nodes) - 1
    low, high = (float(schedule.sigma_bar(nodes[i])) for i in (3 * n // 4, n // 2))
    return [(low, high, 2, n // 4)]


# Options that are functions of schedule and nodes: certified beside the default, so that every part of a plan refines.
GROWING: dict[str, Callable[[Schedule, np.ndarray], Any]] = {"restarts": growing_restarts}

_SPLIT = (
    "a step down and noise back up, each exact to second order, but not their composition: the mean is of first order"
)
_LEVEL = "an ancestral step goes down to a level that is the SDE's to first order, and exactly so at eta = 0 and 1 only"

STATED_WEAK: tuple[Weak, ...] = (
    Weak("dpm2-ancestral", {}, 1, 2, 1, _SPLIT),
    Weak("dpmpp-sde", {"eta": HALF}, 1, 2, 1, _LEVEL),
    Weak("dpmpp-2s", {}, 1, 2, 1, _SPLIT),
    Weak("edm", {}, 1, 2, 1, "churn raises the noise level before each step: the mean is of first order"),
    Weak("restart", {"restarts": growing_restarts}, 2, 2, 2, "the steps of its restarts grow with the grid"),
    Weak(
        "restart",
        {},
        None,
        None,
        None,
        "the restart intervals have a fixed number of steps: their error does not fall with the grid",
    ),
    Weak(
        "consistency",
        {},
        None,
        None,
        None,
        "draws from the distribution again at each node: exact for a consistency model only",
    ),
)


def stated_weak(entry: Sampler, options: Options) -> Weak:
    """The orders stated for a stochastic setting; by default that of its ODE for the mean, at most 2 for the variance.

    One noise for each step fixes the integral of the Brownian path over the step against one weight only, and what is left
    of it is of the size h^(3/2): no sampler with a noise for each step has a strong order above 1.
    """
    for row in STATED_WEAK:
        if matches(row, entry, {**entry.options, **options}):
            return row
    order, reason = stated(entry, options)
    return Weak(entry.name, {}, order, min(order, 2), 1, reason)


class KnownWeak(NamedTuple):
    """A slope of a stochastic sampler that is above the stated order for a reason, on one grid."""

    sampler: str
    options: Options
    kind: str
    grid: str
    reason: str


_CANCELS = (
    "on steps of one length in lam the leading term of the variance's error integrates to zero from noise to data; "
    "over a part of the way it does not, and the slope is the stated one"
)

KNOWN_WEAK: tuple[KnownWeak, ...] = tuple(
    KnownWeak("seeds", {"order": k, "predict": "eps"}, "weak, variance", "logsnr", _CANCELS) for k in (1, 2)
)


def known_weak(entry: Sampler, options: Options, kind: str, grid: str) -> str:
    """The reason for a slope above the stated order of a stochastic sampler; empty where none is known."""
    full = {**entry.options, **options}
    found = (k for k in KNOWN_WEAK if (k.kind, k.grid) == (kind, grid) and matches(k, entry, full))
    return next((k.reason for k in found), "")


def text(options: Options) -> str:
    """Options as one cell of a table."""
    return " ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in options.items()) or "default"
