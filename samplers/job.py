"""A sampler on a grid, made ready from the arguments of `sample`, and what a run of it gives: `sample` and all tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from samplers.execute import Callback, NoiseSource, Progress, check_handlers, run_plan
from samplers.grid import Grid, Nodes, Points
from samplers.model import EpsModel, require_model
from samplers.nodes import check_afs, nodes_of
from samplers.noise import check_seed, sample_indices, standard_normal
from samplers.plan import Plan
from samplers.registry import Sampler, get_sampler, plain
from samplers.transform import analytical_first_step


@dataclass(frozen=True)
class Result:
    """What a run made.

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
        afs: whether the first call is replaced by what start noise is known to give.
        seed, indices, noise_source, callback, cond, check, compile: as in `samplers.sample`.
    """

    entry: Sampler
    grid: Grid
    options: Mapping[str, Any]
    nfe: int | None
    afs: bool
    seed: int
    indices: Tensor | None
    noise_source: NoiseSource | None
    callback: Callback | None
    cond: Mapping[str, Any] | None
    check: bool | str
    compile: str | None

    @cached_property
    def plan(self) -> Plan | None:
        """The sampler's plan on the grid; None where it has none."""
        if self.entry.adaptive:
            return None
        plan = self.entry.plan(self.grid, **self.options)
        return analytical_first_step(plan) if self.afs else plan

    @property
    def sigma_T(self) -> float:
        """Standard deviation of the start noise."""
        return float(self.grid.sigma[0]) if self.plan is None else self.plan.sigma_T

    def tail(self, steps: int) -> Job:
        """The same on the last `steps` steps of the grid, which do not begin with start noise alone."""
        options = dict(self.options)
        if options.get("orders") is not None:  # one for each step
            options["orders"] = list(options["orders"])[-steps:]
        return replace(self, grid=Grid(self.grid.schedule, self.grid.t[-steps - 1 :]), options=options, afs=False)

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
            how: dict[str, Any] = {"cond": self.cond, "check": self.check, "compile": self.compile}
            out = run_plan(plan, model, x, **drawn, callback=self.callback, **how)
            return Result(out, times, plan.nfe, plan)
        sample_indices(self.indices, len(x))  # nothing is drawn, but a mistake is one here too
        if not len(x):  # an error norm over nothing controls nothing
            return Result(x.clone(), times, 0, None)
        made = 0

        def count(progress: Progress) -> None:
            nonlocal made
            made = progress.nfe
            if self.callback is not None:
                self.callback(progress)

        integrate: Any = self.entry.integrate
        out = integrate(model, self.grid, x, nfe=self.nfe, callback=count, cond=self.cond, **plain(self.options))
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
    afs: bool = False,
    seed: int = 0,
    indices: Tensor | None = None,
    noise_source: NoiseSource | None = None,
    callback: Callback | None = None,
    cond: Mapping[str, Any] | None = None,
    check: bool | str = True,
    compile: str | None = None,
    **options: Any,
) -> Job:
    """A sampler made ready to run; the arguments are those of `samplers.sample`.

    Raises:
        ValueError, TypeError: as `samplers.sample`.
    """
    require_model("model", model)
    entry = get_sampler(sampler)
    entry.check_options(options)
    check_afs(entry, afs)
    check_handlers(callback, cond)
    seed = check_seed(seed)
    fixed = (("compile", compile, None), ("noise_source", noise_source, None), ("check", check, True))
    for name, value, usual in fixed if entry.adaptive else ():
        if value is not usual:
            raise ValueError(
                f"sampler {sampler!r} chooses its steps while it samples: {name} must be {usual}, got {value!r}"
            )
    where = (steps, nfe, timesteps, sigmas, grid, final)
    nodes, options = nodes_of(entry, model.schedule, *where, options, int(afs))
    return Job(entry, nodes, options, nfe, afs, seed, indices, noise_source, callback, cond, check, compile)
