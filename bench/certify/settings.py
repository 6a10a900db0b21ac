"""What is certified: the settings of every registered sampler, and the orders that are stated for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any, NamedTuple

from samplers import make_plan, schedules
from samplers.registry import Sampler

Options = dict[str, Any]

# Values of the options that name a formula; a sampler takes those it accepts. "taylor" is the same plan as "heun".
CHOICES: dict[str, tuple[Any, ...]] = {
    "order": (1, 2, 3, 4),
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
# Switches that are not part of a formula, and stay at their defaults.
FIXED = ("lower_order_final",)


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
    for chosen in itertools.product(*(v for v in values if v)):
        yield dict(chosen)


def stochastic(entry: Sampler) -> Iterator[Options]:
    """Every stochastic setting: the stochastic option at its default, or at 1 where the default is none."""
    if entry.adaptive or entry.stochastic == "no":
        return
    name = entry.stochastic
    on = {} if name == "yes" else {name: entry.options[name] or 1.0}
    for chosen in choices(entry):
        yield {**on, **CERTIFIED_AT.get(entry.name, {}), **chosen}


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

STATED: tuple[Stated, ...] = (
    Stated("unipc-*", {"corrector": False}, -1, -1, "the predictor alone is of one order less"),
    Stated("unipc-*", {}, 0, -1, _NO_CORRECTOR),
    Stated("sa-solver", {}, 0, -1, _NO_CORRECTOR),
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


def matches(row: Stated | Known | Weak, entry: Sampler, full: Options) -> bool:
    """Whether a stated exception holds for a sampler under all its options."""
    return fnmatch(entry.name, row.sampler) and all(full.get(name) == value for name, value in row.options.items())


class Weak(NamedTuple):
    """The least orders stated for a stochastic sampler: of its mean, of its variance, and of its path."""

    sampler: str
    options: Options
    mean: float
    variance: float
    strong: float
    reason: str


_SPLIT = (
    "a step down and noise back up, each exact to second order, but not their composition: the mean is of first order"
)

STATED_WEAK: tuple[Weak, ...] = (
    Weak("dpm2-ancestral", {}, 1, 1, 1, _SPLIT),
    Weak("dpmpp-2s", {}, 1, 1, 1, _SPLIT),
    Weak("edm", {}, 1, 1, 1, "churn raises the noise level before each step: the mean is of first order"),
    Weak(
        "restart",
        {},
        0,
        0,
        0,
        "the restart intervals have a fixed number of steps: their error does not fall with the grid",
    ),
    Weak(
        "consistency", {}, 0, 0, 0, "draws from the distribution again at each node: exact for a consistency model only"
    ),
)


def stated_weak(entry: Sampler, options: Options) -> Weak:
    """The orders stated for a stochastic setting; by default the registered one for the mean and 1 otherwise.

    One noise for each step fixes the integral of the Brownian path over the step against one weight only, and what is left
    of it is of the size h^(3/2): no sampler here has a strong order above 1.
    """
    for row in STATED_WEAK:
        if matches(row, entry, {**entry.options, **options}):
            return row
    return Weak(entry.name, {}, options.get("order", entry.order), 1, 1, "")


def text(options: Options) -> str:
    """Options as one cell of a table."""
    return " ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in options.items()) or "default"
