"""What all tasks share: a sampler on a grid, made ready from the arguments of `sample`, and what a run of it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from samplers.execute import Callback, NoiseSource, Progress, check_start, run_plan, sample_indices
from samplers.grid import Grid, Nodes, Points
from samplers.model import EpsModel, Scalar
from samplers.noise import check_seed, standard_normal
from samplers.plan import Plan
from samplers.registry import Sampler, get_sampler
from samplers.sampling import nodes_of


@dataclass(frozen=True)
class Result:
    """What a task made.

    Attributes:
        x: samples (B, ...).
        times: the nodes that were gone through, in the schedule's time.
        nfe: network calls for each sample that were made.
        plan: what was run; None where the sampler chooses its steps while it samples.
    """

    x: Tensor
    times: tuple[float, ...]
    nfe: int
    plan: Plan | None = field(repr=False)

    @property
    def steps(self) -> int:
        """Steps that were executed."""
        return len(self.times) - 1


@dataclass(frozen=True)
class Job:
    """A sampler on a grid, with all that a run of it needs but the model and the start.

    Attributes:
        entry: the sampler.
        grid: the nodes.
        options: the sampler's own.
        nfe: the limit of an error-controlled sampler.
        seed, indices, noise_source, callback, cond, check: as in `samplers.sample`.
    """

    entry: Sampler
    grid: Grid
    options: Mapping[str, Any]
    nfe: int | None
    seed: int
    indices: Tensor | None
    noise_source: NoiseSource | None
    callback: Callback | None
    cond: Mapping[str, Any] | None
    check: bool | str

    @cached_property
    def plan(self) -> Plan | None:
        """The sampler's plan on the grid; None where it has none."""
        return None if self.entry.adaptive else self.entry.plan(self.grid, **self.options)

    def tail(self, steps: int) -> Job:
        """The same on the last `steps` steps of the grid."""
        options = dict(self.options)
        if options.get("orders") is not None:  # one for each step
            options["orders"] = list(options["orders"])[-steps:]
        return replace(self, grid=Grid(self.grid.schedule, self.grid.t[-steps - 1 :]), options=options)

    def noise(self, like: Tensor) -> Tensor:
        """Start noise (B, ...) of standard deviation 1, that of the seed and the samples' indices."""
        indices = sample_indices(self.indices, len(like))
        return standard_normal(self.seed, indices, 0, like.shape[1:], like.dtype, like.device)

    def run(self, model: EpsModel, x: Tensor, plan: Plan | None = None) -> Result:
        """Sample from state x (B, ...) at the first node.

        Args:
            model: the epsilon-model.
            x: the state.
            plan: instead of the sampler's own on the grid.
        """
        plan = self.plan if plan is None else plan
        times = tuple(self.grid.t.tolist())
        if plan is not None:
            drawn: dict[str, Any] = {"seed": self.seed, "indices": self.indices, "noise_source": self.noise_source}
            out = run_plan(plan, model, x, **drawn, callback=self.callback, cond=self.cond, check=self.check)
            return Result(out, times, plan.nfe, plan)
        made = 0

        def count(progress: Progress) -> None:
            nonlocal made
            made = progress.nfe
            if self.callback is not None:
                self.callback(progress)

        integrate: Any = self.entry.integrate
        out = integrate(model, self.grid, x, nfe=self.nfe, callback=count, cond=self.cond, **self.options)
        return Result(out, times, made, None)


def prepare(
    model: EpsModel,
    sampler: str,
    *,
    steps: int | None = None,
    nfe: int | None = None,
    timesteps: Nodes | None = None,
    sigmas: Nodes | None = None,
    grid: str | Points | None = None,
    final: str | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
    noise_source: NoiseSource | None = None,
    callback: Callback | None = None,
    cond: Mapping[str, Any] | None = None,
    check: bool | str = True,
    **options: Any,
) -> Job:
    """A sampler made ready for a task; the arguments are those of `samplers.sample`.

    Raises:
        ValueError, TypeError: as `samplers.sample`.
    """
    if not isinstance(model, EpsModel):
        raise TypeError(f"model must be an EpsModel, got {type(model).__name__}; wrap it: EpsModel(net, schedule)")
    entry = get_sampler(sampler)
    entry.check_options(options)
    check_seed(seed)
    if entry.adaptive and (noise_source is not None or check is not True):
        raise ValueError(
            f"sampler {sampler!r} chooses its steps while it samples: noise_source must be None and check True"
        )
    where = (steps, nfe, timesteps, sigmas, grid, final)
    nodes, options = nodes_of(entry, model.schedule, *where, options, 0)
    return Job(entry, nodes, options, nfe, seed, indices, noise_source, callback, cond, check)


def check_tensor(model: EpsModel, name: str, value: Tensor) -> None:
    """Raise TypeError or ValueError where an argument is no batch of states that the model's network can take."""
    check_start(model, value, name)
    if not len(value):
        raise ValueError(f"{name} must be (B, ...) with B > 0, got shape {tuple(value.shape)}")


def check_beside(name: str, value: Tensor, other: str, beside: Tensor) -> None:
    """Raise TypeError or ValueError where an argument is no tensor, or not on the device of another one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.device != beside.device:
        raise ValueError(f"{name} is on {value.device}, {other} on {beside.device}; move one of them")


def noised(grid: Grid, x0: Tensor, noise: Tensor, node: int = 0) -> Tensor:
    """The state `alpha x0 + sigma noise` at a node."""
    return x0 * float(grid.alpha[node]) + noise * float(grid.sigma[node])


def per_sample(value: Scalar, like: Tensor) -> Scalar:
    """A number, or (B, ...) of one number a sample, so that it broadcasts over `like` (B, ...) in its dtype."""
    return value.to(like.dtype).view(-1, *[1] * (like.ndim - 1)) if isinstance(value, Tensor) else value


def rmse(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square difference of each sample, (B,) float64."""
    return (a.double() - b.double()).view(len(a), -1).square().mean(1).sqrt()
