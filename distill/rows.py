"""A sampler's plans on several stretches of time, run together: each row of a batch is on a stretch of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.method import column
from samplers import EpsModel, Plan
from samplers.grid import Grid
from samplers.program import START, Evaluate, Instruction
from samplers.registry import get_sampler
from samplers.schedule import Schedule


class Stretches:
    """What a deterministic sampler computes from the start of each stretch of time to its end.

    Args:
        sampler: registered name of a deterministic sampler with a plan.
        schedule: the noise schedule.
        times: for each stretch its nodes, decreasing, in the schedule's time; the last may be `schedule.t_zero`.
        **options: of the sampler.

    Attributes:
        plans: one for each stretch.

    Raises:
        ValueError: an unknown, stochastic or error-controlled sampler, or times or options that it does not take.
    """

    def __init__(self, sampler: str, schedule: Schedule, times: Sequence[Sequence[float]], **options: Any) -> None:
        entry = get_sampler(sampler)
        entry.check_options(options)
        self.plans = [entry.plan(Grid(schedule, np.array(nodes, dtype=np.float64)), **options) for nodes in times]
        if entry.stochastic == "yes" or any(plan.stochastic for plan in self.plans):
            raise ValueError(f"sampler must be deterministic, {sampler!r} with options {options} is not")
        self._groups = _alike(self.plans)

    @property
    def calls(self) -> float:
        """Network calls of a stretch, in the mean."""
        return sum(plan.nfe for plan in self.plans) / len(self.plans)

    @torch.no_grad()
    def run(self, model: EpsModel, x: Tensor, place: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        """The states at the end of each row's stretch, of x's shape and dtype.

        Args:
            model: called once for all rows of plans with the same instructions.
            x: (B, ...) states at the start of the stretches.
            place: (B,) int64, the number of each row's stretch.
            cond: tensors with a row for each sample, passed to every model call.
        """
        result = torch.empty_like(x)
        for members in self._groups:
            table = torch.full((len(self.plans),), -1, device=x.device)
            table[members] = torch.arange(len(members), device=x.device)
            rows = (table[place] >= 0).nonzero().squeeze(1)
            if len(rows):
                part = {name: value[rows] for name, value in (cond or {}).items()}
                plans = [self.plans[member] for member in members]
                result[rows] = _run(plans, model, x[rows], table[place[rows]], part)
        return result


def _run(plans: Sequence[Plan], model: EpsModel, x: Tensor, index: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Plans of the same instructions, row i with the numbers of plan `index[i]`."""

    def numbers(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=x.device)[index]

    values = {START: x}
    for steps in zip(*(plan.instructions for plan in plans), strict=True):
        first = steps[0]
        if isinstance(first, Evaluate):
            predict = model.eps if first.kind == "eps" else model.x0
            values[first.dst] = predict(values[first.src], numbers([step.t for step in steps]), **cond)
            continue
        total = torch.zeros_like(x)
        for j, (name, _) in enumerate(first.terms):
            total += column(numbers([step.terms[j][1] for step in steps]), x).to(x.dtype) * values[name]
        values[first.dst] = total
    return values[plans[0].instructions[-1].dst]


def _alike(plans: Sequence[Plan]) -> list[list[int]]:
    """The numbers of the plans, grouped by instructions that differ in numbers alone."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, plan in enumerate(plans):
        groups.setdefault(tuple(_shape(step) for step in plan.instructions), []).append(number)
    return list(groups.values())


def _shape(step: Instruction) -> tuple[Any, ...]:
    if isinstance(step, Evaluate):
        return step.dst, step.src, step.kind
    return step.dst, *(name for name, _ in step.terms)
