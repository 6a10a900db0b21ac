"""The one executor: runs any plan on any model, with buffers assigned by liveness."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samplers.errors import SamplingError
from samplers.model import EpsModel
from samplers.noise import check_seed, standard_normal
from samplers.plan import Plan
from samplers.program import Call, Sum

NoiseSource = Callable[[int, Tensor], Tensor]


class Progress(NamedTuple):
    """What a callback is told at the end of a step.

    Attributes:
        step: steps done, 1 .. steps.
        steps: of the whole plan.
        t: the time reached.
        nfe: network calls made so far.
        x: the state (B, ...). Its memory is used again by the next step: clone it to keep it.
    """

    step: int
    steps: int
    t: float
    nfe: int
    x: Tensor


Callback = Callable[[Progress], Any]


@torch.no_grad()
def run_plan(
    plan: Plan,
    model: EpsModel,
    x_T: Tensor,
    *,
    seed: int = 0,
    indices: Tensor | None = None,
    noise_source: NoiseSource | None = None,
    callback: Callback | None = None,
    cond: Mapping[str, Any] | None = None,
    check: bool | str = True,
) -> Tensor:
    """Run a plan.

    Args:
        plan: what to compute.
        model: the epsilon-model; its network is called `plan.nfe` times, without gradient.
        x_T: start state (B, ...), in x coordinates (`alpha x_0 + sigma eps` at `plan.times[0]`); it is not written to.
        seed, indices: noise k of a stochastic plan is that of (seed, index) for every sample, (B,) int64, 0 .. B-1 by default.
        noise_source: `(k, like) -> Tensor` of like's shape, instead of the seed; k counts the noises that are used.
        callback: called with a `Progress` at the end of every step.
        cond: passed to every network call as keyword arguments.
        check: True looks for NaN and Inf once at the end, and on failure replays to find the step; "each" looks after
            every call, False never.

    Returns:
        The result, shape, dtype and device of x_T.

    Raises:
        ValueError, TypeError: bad arguments, or a network that returns another shape.
        SamplingError: NaN or Inf from the network; names the step and the time.
    """
    if not isinstance(check, bool) and check != "each":
        raise ValueError(f"check must be True, False or 'each', got {check!r}")
    check_start(model, x_T)
    cond = {} if cond is None else cond
    draw = noise_source if noise_source is not None else seeded_noise(seed, sample_indices(indices, len(x_T)))
    run = _Run(plan, model, draw, cond, x_T)
    x = run.go(callback, each=check == "each")
    if check is True and not torch.isfinite(x).all():
        _Run(plan, model, draw, cond, x_T).go(None, each=True)
        raise SamplingError(f"sampler {plan.sampler!r} gave NaN or Inf, and a second run from the same noise did not")
    return x


class _Run:
    """The registers of one run."""

    def __init__(self, plan: Plan, model: EpsModel, draw: NoiseSource, cond: Mapping[str, Any], x_T: Tensor) -> None:
        self.plan, self.model, self.draw, self.cond = plan, model, draw, cond
        self.program = plan.program
        self.values: list[Tensor | None] = [None] * self.program.registers
        self.owned = [False] * self.program.registers  # the caller's and the network's tensors are never written to
        self.pool: list[Tensor] = []
        self.like = self.values[0] = x_T

    def go(self, callback: Callback | None, each: bool) -> Tensor:
        """Execute every instruction; the last state is the result."""
        nfe, node = 0, 0
        for step in self.program.code:
            if isinstance(step, Call):
                self._evaluate(step, node if each else None)
                nfe += 1
            else:
                self._combine(step)
                if step.node is not None:
                    node = step.node
                    if each:
                        self._check(self._value(step.dst), node, f"the state at t={self.plan.times[node]:g}")
                    if callback is not None:
                        callback(Progress(node, self.plan.steps, self.plan.times[node], nfe, self._value(step.dst)))
        return self._value(self.program.code[-1].dst)

    def _evaluate(self, step: Call, node: int | None) -> None:
        x = self._value(step.src)
        out, (by_x, by_out) = self.model.evaluate(x, step.t, step.alpha, step.sigma, step.kind, self.cond)
        if node is not None:
            self._check(out, node + 1, f"the network's output at t={step.t:g}")
        if by_x == 0 and by_out == 1:
            # an output that shares the state's memory would change when the state is updated in place
            shared = out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            self.values[step.dst] = out.clone() if shared else out
        else:
            value = torch.mul(out, by_out, out=self._buffer())
            self.values[step.dst] = value.add_(x, alpha=by_x) if by_x else value  # type: ignore[arg-type]  # both floats
            self.owned[step.dst] = True
        self._release(step.dead)

    def _combine(self, step: Sum) -> None:
        for register, k in step.draw:
            noise = self.draw(k, self.like)
            if noise.shape != self.like.shape:
                raise ValueError(f"noise_source must return shape {tuple(self.like.shape)}, got {tuple(noise.shape)}")
            self.values[register] = noise
        first, coefficient = step.terms[0]
        total = self._value(first)
        if first in step.dead and self.owned[first]:
            total = total.mul_(coefficient) if coefficient != 1.0 else total
            self.values[first] = None
        else:
            total = torch.mul(total, coefficient, out=self._buffer())
        for register, coefficient in step.terms[1:]:
            total.add_(self._value(register), alpha=coefficient)
        self._release(step.dead)
        self.values[step.dst], self.owned[step.dst] = total, True

    def _buffer(self) -> Tensor:
        return self.pool.pop() if self.pool else torch.empty_like(self.like)

    def _release(self, dead: tuple[int, ...]) -> None:
        for register in dead:
            value = self.values[register]
            if value is not None and self.owned[register]:
                self.pool.append(value)
            self.values[register] = None

    def _value(self, register: int) -> Tensor:
        value = self.values[register]
        if value is None:  # a plan checks its own order, so this is a bug in `lower`
            raise RuntimeError(f"register {register} was read after its last use")
        return value

    def _check(self, value: Tensor, node: int, what: str) -> None:
        if not torch.isfinite(value).all():
            raise SamplingError(
                f"NaN or Inf in step {node} of {self.plan.steps} of sampler {self.plan.sampler!r}: {what}"
            )


def seeded_noise(seed: int, indices: Tensor) -> NoiseSource:
    """The noise source of a seed: noise k of sample i is a function of (seed, i, k) alone."""
    check_seed(seed)

    def draw(k: int, like: Tensor) -> Tensor:
        return standard_normal(seed, indices, k + 1, like.shape[1:], like.dtype, like.device)

    return draw


def sample_indices(indices: Tensor | None, batch: int) -> Tensor:
    """The sample indices of a batch, (B,) int64.

    Raises:
        ValueError: not `batch` non-negative integers.
    """
    if indices is None:
        return torch.arange(batch)
    indices = torch.as_tensor(indices)
    if indices.shape != (batch,) or indices.is_floating_point() or (batch and int(indices.min()) < 0):
        raise ValueError(f"indices must be {batch} non-negative integers, one for each sample, got {indices!r}")
    return indices.to(torch.int64)


def check_start(model: EpsModel, x_T: Tensor) -> None:
    """Raise TypeError or ValueError where x_T is not a state that the model's network can take."""
    if not isinstance(x_T, Tensor) or not x_T.is_floating_point() or x_T.ndim < 1:
        raise TypeError(
            f"x_T must be a floating-point tensor (B, ...), got {getattr(x_T, 'dtype', type(x_T).__name__)}"
        )
    weights = model.weights
    if weights is not None and weights.device != x_T.device:
        raise ValueError(f"x_T is on {x_T.device}, the network on {weights.device}; move one of them")
    if weights is not None and weights.dtype != x_T.dtype:
        raise ValueError(f"x_T is {x_T.dtype}, the network {weights.dtype}; convert one of them")
