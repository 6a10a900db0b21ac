"""A sampler's plans on several stretches of time, run together: each row of a batch is on a stretch of its own."""

from __future__ import annotations

import functools
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
        self._tables: dict[torch.device, list[_Group]] = {}

    @property
    def calls(self) -> float:
        """Network calls of a stretch, in the mean."""
        return sum(plan.nfe for plan in self.plans) / len(self.plans)

    @torch.no_grad()
    def run(self, model: EpsModel, x: Tensor, place: Tensor, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        """The states at the end of each row's stretch, of x's shape and dtype, without gradient.

        Args:
            model: called once for all rows of plans with the same instructions.
            x: (B, ...) states at the start of the stretches.
            place: (B,) int64, the number of each row's stretch.
            cond: tensors with a row for each sample, passed to every model call.
        """
        if x.device not in self._tables:  # made once, so that no number is copied to the device in a step
            self._tables[x.device] = [_Group(members, self.plans, x.device) for members in _alike(self.plans)]
        groups = self._tables[x.device]
        if len(groups) == 1:
            return groups[0].run(model, x, place, cond or {})
        result = torch.empty_like(x)
        for group in groups:
            number = group.number[place]
            rows = (number >= 0).nonzero().squeeze(1)
            if len(rows):
                part = {name: value[rows] for name, value in (cond or {}).items()}
                result[rows] = group.run(model, x[rows], number[rows], part)
        return result


class _Group:
    """Plans of the same instructions, with their numbers as tables on a device.

    Attributes:
        number: (N,) int64, for each of all stretches its row in the tables, -1 for one of another group.
    """

    def __init__(self, members: list[int], plans: Sequence[Plan], device: torch.device) -> None:
        self.instructions = plans[members[0]].instructions
        self.number = torch.full((len(plans),), -1, device=device)
        self.number[members] = torch.arange(len(members), device=device)
        rows = zip(*(plans[member].instructions for member in members), strict=True)
        self.tables = [torch.tensor([_numbers(step) for step in row], dtype=torch.float64).T.to(device) for row in rows]
        last = {name: i for i, step in enumerate(self.instructions) for name in _names(step)}
        self.over = [
            [name for name in set(_names(step)) if last[name] == i] for i, step in enumerate(self.instructions)
        ]

    def run(self, model: EpsModel, x: Tensor, index: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Row i with the numbers of the plan at `index[i]`; a value is let go after its last use."""
        values = {START: x}
        for step, table, over in zip(self.instructions, self.tables, self.over, strict=True):
            numbers = table[:, index]
            if isinstance(step, Evaluate):
                predict = model.eps if step.kind == "eps" else model.x0
                result = predict(values[step.src], numbers[0], **cond)
            else:
                factors = [column(row, x).to(x.dtype) for row in numbers]
                parts = (f * values[name] for f, (name, _) in zip(factors, step.terms, strict=True))
                result = functools.reduce(torch.Tensor.add_, parts)
            for name in over:
                del values[name]
            values[step.dst] = result
        return values[self.instructions[-1].dst]


def _numbers(step: Instruction) -> list[float]:
    """The time of a call, the coefficients of a sum."""
    return [step.t] if isinstance(step, Evaluate) else [coefficient for _, coefficient in step.terms]


def _names(step: Instruction) -> list[str]:
    """The values that an instruction uses."""
    return [step.src] if isinstance(step, Evaluate) else [name for name, _ in step.terms]


def _alike(plans: Sequence[Plan]) -> list[list[int]]:
    """The numbers of the plans, grouped by instructions that differ in numbers alone."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, plan in enumerate(plans):
        shape = tuple((step.dst, getattr(step, "kind", ""), *_names(step)) for step in plan.instructions)
        groups.setdefault(shape, []).append(number)
    return list(groups.values())
