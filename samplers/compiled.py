"""The sampling loop as one compiled function, or as one recorded CUDA graph.

Both are made once for a plan, a shape, a dtype, a device and the names and shapes of the conditions, and kept with the model
until it is let go. All noises of a stochastic plan are drawn before the loop, from the same source as without compilation, so
the samples are the same; they are held at once, each of the state's size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from samplers.execute import Loop, NoiseSource, draw_noise
from samplers.model import EpsModel
from samplers.plan import Plan

Compiled = Callable[[Tensor, Sequence[Tensor], Mapping[str, Any]], Tensor]


def run_compiled(
    how: str, plan: Plan, model: EpsModel, x_T: Tensor, draw: NoiseSource, cond: Mapping[str, Any]
) -> Tensor:
    """Run a plan by its compiled loop, which is made at the first call.

    Args:
        how: "loop" (torch.compile) or "graph" (a CUDA graph).
        plan, model, x_T, draw, cond: as in `run_plan`.

    Returns:
        The result, in memory of its own.

    Raises:
        ValueError: a graph on a device that is not CUDA.
    """
    if how == "graph" and x_T.device.type != "cuda":
        raise ValueError(f"compile='graph' needs x_T on a CUDA device, got {x_T.device}; use compile='loop'")
    kept = model.compiled
    key = (how, plan, _signature(x_T), tuple((name, _signature(value)) for name, value in sorted(cond.items())))
    noises = [draw_noise(draw, k, x_T) for k in range(plan.noises)]
    if key not in kept:
        make = _compile_loop if how == "loop" else _Graph
        kept[key] = make(plan, model, x_T, noises, cond)
    return kept[key](x_T, noises, cond)


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, str(value.device)
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def _compile_loop(
    plan: Plan, model: EpsModel, x_T: Tensor, noises: Sequence[Tensor], cond: Mapping[str, Any]
) -> Compiled:
    return torch.compile(Loop.of(plan, model, x_T).run_pure, dynamic=False)


class _Graph:
    """One CUDA graph of the whole loop; a call copies its inputs in, replays, and copies the result out."""

    def __init__(
        self, plan: Plan, model: EpsModel, x_T: Tensor, noises: Sequence[Tensor], cond: Mapping[str, Any]
    ) -> None:
        loop = Loop.of(plan, model, x_T)
        self.x_T, self.noises = x_T.clone(), [noise.clone() for noise in noises]
        self.cond = {name: value.clone() if isinstance(value, Tensor) else value for name, value in cond.items()}

        def draw(k: int, like: Tensor) -> Tensor:
            return self.noises[k]

        side = torch.cuda.Stream(
            x_T.device
        )  # a network's first calls choose algorithms and allocate, which cannot be recorded
        side.wait_stream(torch.cuda.current_stream(x_T.device))
        with torch.cuda.stream(side):
            loop.run(self.x_T, draw, self.cond)
        torch.cuda.current_stream(x_T.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = loop.run(self.x_T, draw, self.cond)

    def __call__(self, x_T: Tensor, noises: Sequence[Tensor], cond: Mapping[str, Any]) -> Tensor:
        self.x_T.copy_(x_T)
        for mine, given in zip(self.noises, noises, strict=True):
            mine.copy_(given)
        for name, value in cond.items():
            if isinstance(value, Tensor):
                self.cond[name].copy_(value)
        self.graph.replay()
        return self.result.clone()
