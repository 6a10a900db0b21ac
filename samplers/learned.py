"""Plans whose coefficients and times are trained: solver distillation through the executor that samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from samplers.execute import Loop, NoiseSource, draw_noise, sample_indices, seeded_noise
from samplers.model import EpsModel
from samplers.plan import Plan
from samplers.program import Evaluate, Sum
from samplers.schedule import Schedule


class LearnedPlan(nn.Module):
    """A plan with trainable numbers; what it computes and which value feeds which stay as they are.

    Args:
        plan: the start, made by `make_plan` or read from a file.
        schedule: gives alpha and sigma at the times as they move; the one the plan was made on.

    Attributes:
        coefficients: every coefficient of every Combine, in order, float64.
        times: the distinct times of the network calls, decreasing at the start, float64. They must stay within the
            schedule's range, where the network is defined. The first call may come to be made at another time than the
            start's, which remains the plan's first node.
    """

    def __init__(self, plan: Plan, schedule: Schedule) -> None:
        super().__init__()
        self.start, self.schedule = plan, schedule
        terms = [c for step in plan.instructions if not isinstance(step, Evaluate) for _, c in step.terms]
        distinct = sorted({call.t for call in plan.calls}, reverse=True)
        self.coefficients = nn.Parameter(torch.tensor(terms, dtype=torch.float64))
        self.times = nn.Parameter(torch.tensor(distinct, dtype=torch.float64))
        self._place = {t: i for i, t in enumerate(distinct)}

    def forward(
        self,
        model: EpsModel,
        x_T: Tensor,
        *,
        seed: int = 0,
        indices: Tensor | None = None,
        noise_source: NoiseSource | None = None,
        cond: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The plan's result with gradients to coefficients, times, x_T and the network; arguments as in `run_plan`.

        Returns:
            Shape, dtype and device of x_T. NaN and Inf are not looked for.
        """
        draw = noise_source if noise_source is not None else seeded_noise(seed, sample_indices(indices, len(x_T)))
        noises = [draw_noise(draw, k, x_T) for k in range(self.start.noises)]
        times = [self.times[self._place[call.t]] for call in self.start.calls]
        levels = [(self.schedule.alpha(t), self.schedule.sigma(t)) for t in times]
        affines = [
            model.affine(call.kind, t, *level) for call, t, level in zip(self.start.calls, times, levels, strict=True)
        ]
        program = self.start.program(tuple(affine == (0.0, 1.0) for affine in affines))
        rows, code = iter(self.coefficients.split(self._lengths())), []
        for step in program.code:
            if isinstance(step, Sum):
                row = next(rows)
                step = step._replace(terms=tuple((p, row[j]) for (p, _), j in zip(step.terms, step.order, strict=True)))
            code.append(step)
        dtype = torch.float64 if x_T.dtype == torch.float64 else torch.float32
        inputs = [t.to(x_T.device, dtype).expand(len(x_T)) for t in times]
        loop = Loop(model, replace(program, code=tuple(code)), inputs, levels, affines)
        return loop.run_pure(x_T, noises, {} if cond is None else cond)

    def plan(self) -> Plan:
        """The plan with the numbers of this moment, for `run_plan`, `to_json` and comparison.

        Raises:
            PlanError: times that no longer decrease, or a number that is not finite.
        """
        moved = dict(zip(self._place, self.times.tolist(), strict=True))
        rows, instructions = iter(self.coefficients.detach().split(self._lengths())), []
        for step in self.start.instructions:
            if isinstance(step, Evaluate):
                t = moved[step.t]
                step = step._replace(t=t, alpha=float(self.schedule.alpha(t)), sigma=float(self.schedule.sigma(t)))
            else:
                names = [name for name, _ in step.terms]
                step = step._replace(terms=tuple(zip(names, next(rows).tolist(), strict=True)))
            instructions.append(step)
        first, *rest = self.start.times
        times = (first, *(moved.get(t, t) for t in rest))
        return replace(self.start, instructions=tuple(instructions), times=times)

    def _lengths(self) -> list[int]:
        return [len(step.terms) for step in self.start.instructions if not isinstance(step, Evaluate)]
