"""Planted faults: what a certificate of order says where one coefficient of every step is 1 % too large."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.certify.order import local_order
from bench.certify.settings import Options, text
from samplers import Plan
from samplers.program import Evaluate, Instruction
from samplers.registry import Sampler

Row = dict[str, Any]


def planted(plan: Plan, factor: float = 1.01) -> Plan:
    """The plan with the last coefficient at the end of every step multiplied."""

    def faulty(step: Instruction) -> Instruction:
        if isinstance(step, Evaluate) or step.node is None:
            return step
        *terms, (value, coefficient) = step.terms
        return step._replace(terms=(*terms, (value, factor * coefficient)))

    return replace(plan, instructions=tuple(map(faulty, plan.instructions)))


def fault_row(entry: Sampler, options: Options, schedule: str) -> Row:
    """The slope of one step's error, sound and with the fault; "noticed" where the certificate passes and then fails."""
    sound, faulty = local_order(entry, options, schedule), local_order(entry, options, schedule, planted)
    noticed = sound["status"] == "pass" and faulty["status"] == "fail"
    row: Row = {"sampler": entry.name, "setting": text(options), "schedule": schedule, "stated": sound["stated"]}
    row |= {"slope": sound["slope"], "slope_with_fault": faulty["slope"]}
    return row | {"status": "pass" if noticed else "fail", "note": "noticed" if noticed else "not noticed"}
