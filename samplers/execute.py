"""The one executor: runs any plan on any model, in buffers assigned when the plan was lowered."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from samplers.errors import SamplingError, unknown
from samplers.model import Affine, EpsModel, Scalar, require_model
from samplers.noise import SeededNoise, sample_indices
from samplers.plan import Plan, require_plan
from samplers.program import Call, Program, Sum
from samplers.schedule import Schedule

NoiseSource = Callable[[int, Tensor], Tensor]
COMPILE = ("loop", "graph")
_HALF = {dtype: torch.ones((), dtype=dtype, device="cpu") for dtype in (torch.float16, torch.bfloat16)}
_SAME_LEVEL = 1e-4  # relative; a table in single precision differs by less, and another schedule by much more


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
    compile: str | None = None,
) -> Tensor:
    """Run a plan.

    Args:
        plan: what to compute.
        model: the epsilon-model; its network is called `plan.nfe` times, without gradient.
        x_T: start state (B, ...), in x coordinates (`alpha x_0 + sigma eps` at `plan.times[0]`); it is not written to.
        seed, indices: noise k of a stochastic plan is that of (seed, index) for every sample, (B,) int64, 0 .. B-1 by default.
        noise_source: `(k, like) -> Tensor` of like's shape, instead of the seed; k counts the noises that are used. Each call
            gives another tensor, or one that is not written to before the run ends, as a plan may use a noise twice.
        callback: called with a `Progress` at the end of every step.
        cond: passed to every network call as keyword arguments.
        check: True looks for NaN and Inf once at the end, and on failure runs again to find the step, noise_source too;
            "each" looks after every call, False never.
        compile: "loop" compiles the whole loop with torch.compile, "graph" records it as one CUDA graph; both once for each
            plan, shape and dtype, kept with the model, and both hold all noises of the plan at once. No callback then.

    Returns:
        The result, shape, dtype and device of x_T.

    Raises:
        ValueError, TypeError: bad arguments, a plan that was made on another schedule, or a network that returns another shape;
            NaN or Inf in x_T where that is looked for.
        SamplingError: NaN or Inf from the network; names the step and the time, where a second run meets it too.
    """
    if not isinstance(check, bool) and check != "each":
        raise ValueError(f"check must be True, False or 'each', got {check!r}")
    if compile is not None and compile not in COMPILE:
        raise unknown("compile", str(compile), COMPILE)
    if compile is not None and (callback is not None or check == "each"):
        raise ValueError(f"compile={compile!r} runs the loop as a whole: it has no callback and no check='each'")
    require_plan("plan", plan)
    check_start(model, x_T, finite=check == "each")
    check_handlers(callback, cond)
    cond = {} if cond is None else cond
    draw = noise_of(noise_source, seed, indices, len(x_T), x_T.device)
    if compile is not None:
        from samplers.compiled import run_compiled

        x = run_compiled(compile, plan, model, x_T, draw, cond)
    else:
        x = Loop.of(plan, model, x_T, draw).run(x_T, draw, cond, _watch(plan, callback, each=check == "each"))
    if check is True and not is_finite(x):
        check_finite(x_T)
        Loop.of(plan, model, x_T, draw).run(x_T, draw, cond, _watch(plan, None, each=True))
        raise SamplingError(f"sampler {plan.sampler!r} gave NaN or Inf, and a second run to find the step did not")
    return x


Watch = Callable[[Call | Sum, Tensor], None]
Values = list[Any]  # the tensor at each place of a program, or None


@dataclass(frozen=True)
class Loop:
    """A plan made ready to run on one model and one kind of state: all that is known before the first network call.

    Attributes:
        model: whose network is called.
        program: the plan's, for this model's prediction.
        times: (B,) tensor of each call.
        levels: alpha and sigma of each call.
        affines: how each evaluated quantity follows from the state and the network's output.
    """

    model: EpsModel
    program: Program
    times: Sequence[Tensor]
    levels: Sequence[tuple[Scalar, Scalar]]
    affines: Sequence[Affine]

    @classmethod
    def of(cls, plan: Plan, model: EpsModel, like: Tensor, draw: NoiseSource | None = None) -> Loop:
        """The loop of a plan.

        Args:
            plan: what to compute.
            model: on which.
            like: a state, for dtype, device and batch size.
            draw: the noise source it will run with; that of a seed writes into buffers.

        Raises:
            ValueError: the plan was made on another schedule than the model's, or the model does not give what the plan
                evaluates (epsilon-prediction where alpha = 0).
        """
        check_schedule(plan, model.schedule)
        affines = [model.affine(e.kind, e.t, e.alpha, e.sigma) for e in plan.calls]
        program = plan.program(tuple(affine == (0.0, 1.0) for affine in affines), isinstance(draw, SeededNoise))
        times = model.times([e.t for e in plan.calls], like)
        return cls(model, program, times, [(e.alpha, e.sigma) for e in plan.calls], affines)

    def run(self, x_T: Tensor, draw: NoiseSource, cond: Mapping[str, Any], watch: Watch | None = None) -> Tensor:
        """Execute every instruction in place; the last state is the result."""
        values: Values = [torch.empty_like(x_T) for _ in range(self.program.buffers)] + [None] * self.program.borrowed
        values[-1] = x_T
        model, outputs = self.model.begin(), _Outputs(x_T)
        for step in self.program.code:
            if isinstance(step, Call):
                self._evaluate(model, step, values, outputs, cond, watch)
            else:
                for place, number in step.draws:
                    values[place] = draw_noise(draw, number, x_T, values[place] if place >= 0 else None)
                _write(values[step.dst], [(values[place], by) for place, by in step.terms])
                if watch is not None:
                    watch(step, values[step.dst])
            for place in step.ends:
                values[place] = None
        return values[self.program.code[-1].dst]

    def _evaluate(
        self,
        model: EpsModel,
        step: Call,
        values: Values,
        outputs: _Outputs,
        cond: Mapping[str, Any],
        watch: Watch | None,
    ) -> None:
        """One network call; a method of its own so that no name outlives it and keeps an output's memory."""
        x = values[step.src]
        out = model.output(x, self.times[step.number], *self.levels[step.number], cond)
        if watch is not None:
            watch(step, out)
        out = outputs.take(out, x, step, values)
        if step.dst < 0:
            values[step.dst] = out
        else:
            by_x, by_out = self.affines[step.number]
            _write(values[step.dst], ((x, by_x), (out, by_out)) if by_x else ((out, by_out),))

    def run_pure(self, x_T: Tensor, noises: Sequence[Tensor], cond: Mapping[str, Any]) -> Tensor:
        """The same, but every value is a new tensor: for gradients and for torch.compile, which does its own memory planning."""
        values: Values = [None] * (self.program.buffers + self.program.borrowed)
        values[-1], model = x_T, self.model.begin()
        for step in self.program.code:
            if isinstance(step, Call):
                x, (by_x, by_out) = values[step.src], self.affines[step.number]
                out = model.output(x, self.times[step.number], *self.levels[step.number], cond)
                values[step.dst] = out if step.dst < 0 else _sum((x, by_x), (out, by_out))
            else:
                for place, number in step.draws:
                    values[place] = noises[number]
                values[step.dst] = _sum(*((values[place], coefficient) for place, coefficient in step.terms))
            for place in step.ends:
                values[place] = None
        return values[self.program.code[-1].dst]


class _Outputs:
    """A network's outputs on their way into the values of one run, copied where they would not stay what they are.

    That is where an output lies in the state's memory, which is written to, and where the network writes each output over the
    one before, as a CUDA graph or an engine with fixed buffers does, and the one before is still needed. The latter shows at a
    second call, too late for the first output: of that one a copy is held until then.
    """

    def __init__(self, like: Tensor) -> None:
        self._inside = like.numel() * like.element_size()
        self._overwrites: bool | None = None
        self._first: tuple[int, int, Tensor] | None = None

    def take(self, out: Tensor, x: Tensor, step: Call, values: Values) -> Tensor:
        """The output of a call at state x, or a copy."""
        address = out.data_ptr()
        if self._first is not None:
            place, first_address, copy = self._first
            self._overwrites, self._first = address == first_address, None
            if self._overwrites:
                values[place] = copy
        if step.src >= 0 and 0 <= address - x.data_ptr() < self._inside:
            return out.clone()
        if step.kept and self._overwrites is None:
            self._first = step.dst, address, out.clone()
        return out.clone() if step.kept and self._overwrites else out


def _sum(*terms: tuple[Tensor, Any]) -> Tensor:
    (value, coefficient), *rest = terms
    total = value * coefficient
    for value, coefficient in rest:
        total = total + value * coefficient
    return total


def _write(out: Tensor, terms: Sequence[tuple[Tensor, Any]]) -> None:
    """Write a sum of terms into a buffer, which the first term may be in.

    Only with functions that round a number alike wherever in a tensor it lies, so that a sample's bits do not depend on its
    batch. `torch.addr`, which does two terms in one pass over memory, rounds the last few of a thread's share in another way.
    """
    add = _add_half if out.dtype in _HALF and out.is_cpu else torch.add
    a, by_a = terms[0]
    if len(terms) == 1:
        if a is not out or by_a != 1.0:
            torch.mul(a, by_a, out=out)
        return
    b, by_b = terms[1]
    if by_a == 1.0:
        add(a, b, alpha=by_b, out=out)
    elif by_b == 1.0:
        add(b, a, alpha=by_a, out=out)
    else:
        add(torch.mul(a, by_a, out=out), b, alpha=by_b, out=out)
    for value, coefficient in terms[2:]:
        add(out, value, alpha=coefficient, out=out)


def _add_half(a: Tensor, b: Tensor, *, alpha: Any, out: Tensor) -> Tensor:
    """`a + alpha b` on a CPU in half precision, rounded once.

    `torch.add` rounds alpha to half precision before, and in the last few numbers of a tensor the product as well.
    """
    return torch.addcmul(a, b, _HALF[out.dtype], value=alpha, out=out)


def draw_noise(draw: NoiseSource, number: int, like: Tensor, out: Tensor | None = None) -> Tensor:
    """One noise, of a shape that fits; into `out`, where it is given and the noise source is that of a seed."""
    if out is not None and isinstance(draw, SeededNoise):
        return draw(number, like, out)
    noise = draw(number, like)
    if not isinstance(noise, Tensor):
        raise TypeError(f"noise_source must return a tensor, got {type(noise).__name__}")
    if noise.shape != like.shape:
        raise ValueError(f"noise_source must return shape {tuple(like.shape)}, got {tuple(noise.shape)}")
    return noise


def _watch(plan: Plan, callback: Callback | None, each: bool) -> Watch | None:
    """What looks at every value as it is made: the check for NaN and Inf, and the caller's callback."""
    if callback is None and not each:
        return None
    nfe = node = 0

    def check(value: Tensor, what: str) -> None:
        if each and not torch.isfinite(value).all():
            raise SamplingError(
                f"NaN or Inf in step {min(node + 1, plan.steps)} of {plan.steps} of sampler {plan.sampler!r}: {what}"
            )

    def watch(step: Call | Sum, value: Tensor) -> None:
        nonlocal nfe, node
        if isinstance(step, Call):
            check(value, f"the network's output at t={plan.calls[step.number].t:g}")
            nfe += 1
        elif step.node is not None:
            check(value, f"the state at t={plan.times[step.node]:g}")
            node = step.node
            if callback is not None:
                callback(Progress(node, plan.steps, plan.times[node], nfe, value))

    return watch


def is_finite(x: Tensor) -> bool:
    """Whether no number is NaN or Inf, by one reduction; a sum that overflows in half precision is looked at again."""
    return math.isfinite(float(x.detach().sum())) or bool(torch.isfinite(x).all())


def check_finite(x_T: Tensor) -> None:
    """Raise ValueError where a start state (B, ...) has NaN or Inf."""
    if not is_finite(x_T):
        sample = int(torch.isfinite(x_T).reshape(len(x_T), -1).all(1).int().argmin())
        raise ValueError(f"x_T must be finite, got NaN or Inf in sample {sample}")


def noise_of(
    noise_source: NoiseSource | None,
    seed: int,
    indices: Tensor | None,
    batch: int,
    device: torch.device | str = "cpu",
) -> NoiseSource:
    """The noise source that is given, or else that of the seed; all arguments are checked, whichever is used.

    Args:
        noise_source, seed, indices: as in `run_plan`.
        batch: how many samples there are.
        device: of the states; the indices are moved there once, and not at each draw.

    Raises:
        TypeError: noise_source cannot be called.
        ValueError: a bad seed or bad indices.
    """
    seeded = SeededNoise(seed, sample_indices(indices, batch).to(device))
    if noise_source is not None and not callable(noise_source):
        raise TypeError(f"noise_source must be a function (k, like) -> noise or None, got {noise_source!r}")
    return seeded if noise_source is None else noise_source


def check_schedule(plan: Plan, schedule: Schedule) -> None:
    """Raise ValueError where the alpha and sigma of a plan's calls are not the schedule's at their times; looked at once."""
    if plan.checked_on and plan.checked_on[0] is schedule:
        return
    t, *stored = np.array([(call.t, call.alpha, call.sigma) for call in plan.calls]).reshape(-1, 3).T
    with np.errstate(all="ignore"):  # a time outside the schedule's range may have no sigma
        levels = np.array([schedule.alpha(t), schedule.sigma(t)])
    near = (np.abs(levels - stored) <= _SAME_LEVEL * (1e-3 + np.abs(levels))).all(axis=0)
    if not near.all():
        i = int(np.argmin(near))
        raise ValueError(
            f"plan was made on another schedule: its call at t={t[i]:g} has alpha={stored[0][i]:g} and sigma={stored[1][i]:g}, "
            f"where {schedule.name!r} has {levels[0, i]:g} and {levels[1, i]:g}; make it on the model's schedule"
        )
    plan.checked_on[:] = [schedule]


def check_handlers(callback: Callback | None, cond: Mapping[str, Any] | None) -> None:
    """Raise TypeError where a callback cannot be called, or conditions are no keyword arguments."""
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function of a Progress or None, got {callback!r}")
    if cond is not None and not isinstance(cond, Mapping):
        raise TypeError(
            f"cond must be a mapping from the network's keyword arguments to values or None, got {type(cond).__name__}"
        )


def check_start(model: EpsModel, x_T: Tensor, name: str = "x_T", finite: bool = False) -> None:
    """Raise TypeError or ValueError where x_T, an argument called `name`, is no state that the model's network can take.

    NaN and Inf are looked for where `finite` asks for it.
    """
    if not isinstance(x_T, Tensor) or not x_T.is_floating_point() or x_T.ndim < 1:
        raise TypeError(
            f"{name} must be a floating-point tensor (B, ...), got {getattr(x_T, 'dtype', type(x_T).__name__)}"
        )
    require_model("model", model)
    weights = model.weights
    if weights is not None and weights.device != x_T.device:
        raise ValueError(f"{name} is on {x_T.device}, the network on {weights.device}; move one of them")
    if weights is not None and weights.dtype != x_T.dtype:
        raise ValueError(f"{name} is {x_T.dtype}, the network {weights.dtype}; convert one of them")
    if finite:
        check_finite(x_T)
