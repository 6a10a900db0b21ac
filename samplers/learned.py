"""Plans whose coefficients and times are trained: solver distillation through the executor that samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from samplers.execute import Loop, NoiseSource, check_schedule, check_start, draw_noise, noise_of
from samplers.model import EpsModel
from samplers.plan import Plan, require_plan
from samplers.program import Evaluate, Sum
from samplers.schedule import Schedule


class LearnedPlan(nn.Module):
    """A plan with trainable numbers; what it computes and which value feeds which stay as they are.

    Args:
        plan: the start, made by `make_plan` or read from a file.
        schedule: gives alpha and sigma at the times as they move; the one the plan was made on.

    Attributes:
        coefficients: every coefficient of every Combine, in order, float64.
        times: the distinct times of the network calls, decreasing at the start, float64. Where one has left the schedule's
            range, outside which the network is not defined, the call is made at the range's end, and the gradient is the one
            there, so that the time can come back. The first call may come to be made at another time than the start's, which
            remains the plan's first node.

    Raises:
        ValueError: the plan was made on another schedule.
    """

    def __init__(self, plan: Plan, schedule: Schedule) -> None:
        super().__init__()
        require_plan("plan", plan)
        check_schedule(plan, schedule)
        self.start, self.schedule = plan, schedule
        terms = [c for step in plan.instructions if not isinstance(step, Evaluate) for _, c in step.terms]
        distinct = sorted({call.t for call in plan.calls}, reverse=True)
        self.coefficients = nn.Parameter(torch.tensor(terms, dtype=torch.float64))
        self.times = nn.Parameter(torch.tensor(distinct, dtype=torch.float64))
        self._place = {t: i for i, t in enumerate(distinct)}
        # explicit nodes may begin a rounding error outside
        self._range = min(schedule.t_min, *distinct), max(schedule.t_max, *distinct)

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

        Raises:
            ValueError, TypeError: x_T is no state of the model's, the plan was made on another schedule, or the model does not
                give what the plan evaluates (epsilon-prediction where alpha = 0).
        """
        check_start(model, x_T)
        check_schedule(self.start, model.schedule)
        draw = noise_of(noise_source, seed, indices, len(x_T), x_T.device)
        noises = [draw_noise(draw, k, x_T) for k in range(self.start.noises)]
        calls, within = self._calls(), self._within()
        raw = tuple(model.affine(call.kind, call.t, call.alpha, call.sigma) == (0.0, 1.0) for call in calls)
        times = [within[self._place[call.t]] for call in self.start.calls]
        levels = [(self.schedule.alpha(t), self.schedule.sigma(t)) for t in times]
        affines = [model.affine(call.kind, t, *level) for call, t, level in zip(calls, times, levels, strict=True)]
        program = self.start.program(raw)
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
        calls = self._calls()
        moved = {before.t: call.t for before, call in zip(self.start.calls, calls, strict=True)}
        rows, instructions, following = iter(self.coefficients.detach().split(self._lengths())), [], iter(calls)
        for step in self.start.instructions:
            if isinstance(step, Evaluate):
                step = next(following)
            else:
                names = [name for name, _ in step.terms]
                step = step._replace(terms=tuple(zip(names, next(rows).tolist(), strict=True)))
            instructions.append(step)
        first, *rest = self.start.times
        times = (first, *(moved.get(t, t) for t in rest))
        return replace(self.start, instructions=tuple(instructions), times=times)

    def _within(self) -> Tensor:
        """The times with the range's end in place of those outside it, and the gradient of those as if they were there."""
        return self.times.clamp(*self._range).detach() + (self.times - self.times.detach())

    def _calls(self) -> list[Evaluate]:
        """The network calls at the times of this moment, as numbers."""
        moved = dict(zip(self._place, self._within().tolist(), strict=True))
        levels = {t: (float(self.schedule.alpha(t)), float(self.schedule.sigma(t))) for t in moved.values()}
        return [Evaluate(c.dst, c.src, moved[c.t], *levels[moved[c.t]], c.kind) for c in self.start.calls]

    def _lengths(self) -> list[int]:
        return [len(step.terms) for step in self.start.instructions if not isinstance(step, Evaluate)]
