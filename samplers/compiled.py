"""The sampling loop as one compiled function, or as one recorded CUDA graph.

Both are made once for a plan, a shape, a dtype, a device and the conditions' names and kinds, and are kept with the model as
long as it lives. All noises of a stochastic plan are drawn before the loop, from the same source as without compilation, so the
samples are the same; they are held at once, each of the state's size.

A graph replays fixed memory: weights that are moved or replaced (`net.to(...)`, not an in-place update), autocast and train or
eval mode are those of the recording. A network whose call waits for the host cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from samplers.execute import Loop, NoiseSource, draw_noise
from samplers.meter import Metered
from samplers.model import EpsModel
from samplers.plan import Plan

Compiled = Callable[[Tensor, NoiseSource, Mapping[str, Any]], Tensor]


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
        TypeError: under "graph", a condition that is neither a tensor nor a plain value: what is in it would be frozen.
    """
    if how == "graph" and x_T.device.type != "cuda":
        raise ValueError(f"compile='graph' needs x_T on a CUDA device, got {x_T.device}; use compile='loop'")
    if isinstance(model, Metered):
        model.count(plan, x_T, cond)  # a compiled loop does not tell
        model = model.bare
    signatures = tuple((name, _signature(how, name, value)) for name, value in sorted(cond.items()))
    key = (how, plan, _signature(how, "x_T", x_T), signatures)
    if key not in model.compiled:
        loop = Loop.of(plan, model, x_T)
        model.compiled[key] = _compile(loop, plan.noises) if how == "loop" else _Graph(loop, plan.noises, x_T, cond)
    return model.compiled[key](x_T, draw, cond)


def _signature(how: str, name: str, value: Any) -> Any:
    """What a compiled loop depends on: the kind of a tensor, the value of a number or a text."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, str(value.device)
    if isinstance(value, (int, float, str, bool, type(None))):
        return type(value), value
    if how == "graph":
        accepted = "a tensor, a number, a text or None under compile='graph'"
        raise TypeError(f"cond[{name!r}] must be {accepted}, got {type(value).__name__}")
    return type(value)  # torch.compile guards what is inside


def _compile(loop: Loop, noises: int) -> Compiled:
    def run(x_T: Tensor, drawn: Sequence[Tensor], cond: Mapping[str, Any]) -> Tensor:
        return loop.run_pure(x_T, drawn, cond)

    # torch counts recompilations of a code object and gives up silently after eight; each loop gets one of its own
    own = FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)
    compiled = torch.compile(own, dynamic=False)
    return lambda x_T, draw, cond: compiled(x_T, [draw_noise(draw, k, x_T) for k in range(noises)], cond)


class _Graph:
    """One CUDA graph of the whole loop; a call copies its inputs in, replays, and copies the result out."""

    def __init__(self, loop: Loop, noises: int, x_T: Tensor, cond: Mapping[str, Any]) -> None:
        self.loop = loop  # the graph reads its times
        self.x_T, self.noises = x_T.clone(), [torch.zeros_like(x_T) for _ in range(noises)]
        # on the device also where they came from the host, because a replay sees the device's memory only
        self.cond = {
            name: value.to(x_T.device, copy=True) if isinstance(value, Tensor) else value
            for name, value in cond.items()
        }
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(x_T.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # a network's first calls choose algorithms, which cannot be recorded
                self._run()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph, stream=stream):
                self.result = self._run()

    def _run(self) -> Tensor:
        return self.loop.run(self.x_T, lambda k, like: self.noises[k], self.cond)

    def __call__(self, x_T: Tensor, draw: NoiseSource, cond: Mapping[str, Any]) -> Tensor:
        self.x_T.copy_(x_T)
        for k, mine in enumerate(self.noises):
            mine.copy_(draw_noise(draw, k, x_T))
        for name, value in cond.items():
            if isinstance(value, Tensor):
                self.cond[name].copy_(value)
        self.graph.replay()
        return self.result.clone()
