"""Planted faults: what a certificate of order says where one coefficient of every step is 1 % too large."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from bench.certify.gaussian import OWN_LIMIT, STEPS, stochastic_orders
from bench.certify.order import local_order
from bench.certify.settings import Options
from samplers import Plan
from samplers.program import Evaluate, Instruction
from samplers.registry import Sampler

Row = dict[str, Any]
SOUND = ("pass", "start-up")
_STEPS = STEPS[:4]  # of the certificate's own; on finer ones the slope of an error that stays is further off still


def planted(plan: Plan, factor: float = 1.01, noise: bool = False) -> Plan:
    """The plan with one coefficient of every step multiplied.

    Args:
        plan: whose.
        factor: on the coefficient.
        noise: of the last noise in every sum; else of the last other term in a sum that ends a step, a network output or what
            was made of one.
    """

    def faulty(step: Instruction) -> Instruction:
        if isinstance(step, Evaluate) or (step.node is None and not noise):
            return step
        terms = list(step.terms)
        at = max((i for i, (name, _) in enumerate(terms) if (name[0] == "z") == noise), default=None)
        if at is not None:
            terms[at] = (terms[at][0], factor * terms[at][1])
        return step._replace(terms=tuple(terms))

    return replace(plan, instructions=tuple(map(faulty, plan.instructions)))


def fault_row(entry: Sampler, options: Options, schedule: str) -> Row:
    """The slope of one step's error, sound and with the fault; "noticed" where the certificate passes and then fails."""
    return _noticed(
        local_order(entry, options, schedule), local_order(entry, options, schedule, planted), "an output's"
    )


def stochastic_fault_rows(entry: Sampler, options: Options, schedule: str, grid: str) -> Iterator[Row]:
    """The slope of the mean, sound and with a fault in an output's coefficient; those of variance and path, in a noise's.

    A path that is held against its own limit has none to notice: the limit has the fault too.
    """
    orders = partial(stochastic_orders, entry, options, schedule, grid)
    sound, by_output, by_noise = (
        orders(),
        orders(change=planted, steps=_STEPS),
        orders(change=partial(planted, noise=True), steps=_STEPS),
    )
    for row, output, noise in zip(sound, by_output, by_noise, strict=True):
        which, faulty = ("an output's", output) if row["kind"].startswith("weak, mean") else ("a noise's", noise)
        if row["status"] in SOUND and OWN_LIMIT not in row["note"]:
            yield _noticed(row, faulty, which)


def _noticed(sound: Row, faulty: Row, which: str) -> Row:
    noticed = sound["status"] in SOUND and faulty["status"] == "fail"
    row = {name: sound[name] for name in ("sampler", "setting", "kind", "schedule", "stated")} | {"coefficient": which}
    row |= {"slope": _settled(sound), "slope_with_fault": faulty["slope"]}
    return row | {"status": "pass" if noticed else "fail", "note": "noticed" if noticed else "not noticed"}


def _settled(row: Row) -> float:
    return float(row["slope_exact_start"] if row["status"] == "start-up" else row["slope"])
