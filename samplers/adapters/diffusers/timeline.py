"""The network calls of a run as a pipeline sees them: a list of times, at some of which it may begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from samplers.adapters.diffusers.training import Training
from samplers.grid import Grid, Nodes
from samplers.plan import Plan
from samplers.program import Combine, Evaluate
from samplers.registry import Sampler
from samplers.stepwise import Stepwise
from samplers.transform import analytical_first_step


@dataclass(frozen=True)
class Planner:
    """A sampler with its options: `planner(grid)` is a plan.

    Attributes:
        entry: the sampler.
        options: its own.
        afs: whether the first call is replaced, see `samplers.transform.analytical_first_step`.
    """

    entry: Sampler
    options: Mapping[str, Any]
    afs: bool = False

    def __call__(self, grid: Grid) -> Plan:
        """The plan on a grid."""
        plan = self.entry.plan(grid, **self.options)
        return analytical_first_step(plan) if self.afs else plan


class Order(int):
    """Network calls of a full step; `i * order` is the place in `timesteps` where a pipeline's step i begins.

    Image-to-image pipelines begin at `timesteps[i * order:]`, as if every step had all its calls. One from alpha = 0 has a
    single call, and a step with a restart has more, so the product is looked up, and multiplied out where i is no step.

    Args:
        calls: of a full step.
        places: where each step begins.
    """

    places: tuple[int, ...]

    def __new__(cls, calls: int, places: Sequence[int] = ()) -> Order:
        """A number that knows where steps begin."""
        order = super().__new__(cls, calls)
        order.places = tuple(places)
        return order

    def __mul__(self, i: int) -> int:
        if isinstance(i, int) and 0 <= i < len(self.places):
            return self.places[i]
        return super().__mul__(i)

    __rmul__ = __mul__  # Python asks it before int's, as that of a subclass


@dataclass(frozen=True)
class Timeline:
    """A plan and where its calls are.

    Attributes:
        planner: makes the plan of the rest of the grid, for a run that begins later.
        grid: the nodes.
        plan: of the whole grid.
        timesteps: (calls,) what the network is told at each call.
        times: the same as numbers.
        begins: for the calls at which a step begins, the node it begins at.
    """

    planner: Planner
    grid: Grid
    plan: Plan
    timesteps: Tensor
    times: tuple[float, ...]
    begins: Mapping[int, int]

    @classmethod
    def of(
        cls, planner: Planner, training: Training, grid: Grid, device: Any = None, told: Nodes | None = None
    ) -> Timeline:
        """The calls of a sampler on a grid.

        Args:
            planner: the sampler.
            training: of the network.
            grid: the nodes.
            device: of `timesteps`.
            told: on a flow, what the network is told instead of its own times.

        Raises:
            ValueError: `told` on another schedule, or not one for each call.
        """
        plan = planner(grid)
        times = torch.tensor([call.t for call in plan.calls], dtype=torch.float64)
        timesteps = as_timesteps(training, times).to(device)
        if told is not None:
            timesteps = torch.as_tensor(told, dtype=torch.float32, device=device)
            if training.takes != "flow" or timesteps.shape != times.shape:
                raise ValueError(
                    "timesteps and sigmas together say what the network is told at each noise level: on a flow alone, and "
                    f"{len(times)} of each for sampler {planner.entry.name!r}, got {len(timesteps)}"
                )
        return cls(planner, grid, plan, timesteps, tuple(timesteps.tolist()), _begins(plan))

    def places(self, by_calls: bool) -> list[int]:
        """The places at which a pipeline begins with its step 0, 1, ...

        Args:
            by_calls: whether its steps are the calls. That is how pipelines count where they were given the nodes, as they take
                the length of `timesteps` for the number of steps; then a run begins with the next step of the sampler.
        """
        later = list(self.begins.items())[1:]
        steps = range(1, len(self.times) if by_calls else self.grid.steps)
        found = ([at for at, node in later if (at if by_calls else node) >= i] for i in steps)
        return [0, *(places[0] if places else max(self.begins) for places in found)]

    def index_of(self, timestep: Any) -> int:
        """The place of a time; of two places the second, where a step of a two-call method begins.

        Raises:
            ValueError: it is not there.
        """
        return place(number(timestep), self.times)

    def walk_from(self, index: int) -> tuple[Stepwise, int]:
        """The walk through the plan of the rest of the grid, and the place of its first call.

        A multistep method has no history at a later node, so the rest of the grid is a plan of its own.

        Raises:
            ValueError: no step begins at that place, or the rest takes other calls than are listed.
        """
        calls, name = self.plan.calls, self.planner.entry.name
        if not 0 <= index < len(calls):
            many = len(self.begins) < len(calls)
            why = "; a pipeline that counts calls as steps needs a sampler of one call a step" if many else ""
            raise ValueError(f"begin_index must be 0 to {len(calls) - 1}, got {index}{why}")
        first = index
        if index not in self.begins and index + 1 in self.begins and calls[index].t == calls[index + 1].t:
            first = index + 1  # the last call of a step, at the node where the next one begins: it is passed over
        if first not in self.begins:
            raise ValueError(
                f"no step of sampler {name!r} begins at index {index} of timesteps (steps begin at "
                f"{', '.join(map(str, self.begins))}); use another strength, or a sampler of one call a step"
            )
        plan = self.plan
        if first:  # an analytical first step is for the start noise alone
            rest = Grid(self.grid.schedule, self.grid.t[self.begins[first] :])
            plan = replace(self.planner, afs=False)(rest)
        if [call.t for call in plan.calls] != [call.t for call in calls[first:]]:
            raise ValueError(
                f"sampler {name!r} cannot begin at index {index} of timesteps: from there on it takes other calls than when it "
                "begins at 0; use another sampler, or strength=1 and timesteps= or sigmas= that begin at the noise level you want"
            )
        walk = Stepwise(plan)
        if walk.draws_first and not walk.start_is_free:
            raise ValueError(
                f"sampler {name!r} needs the state before the noise of its first call, which no pipeline has"
            )
        return walk, first


def as_timesteps(training: Training, t: Tensor) -> Tensor:
    """The schedule's times (float64) as a network is told them: whole training steps as integers, others in float32."""
    tau = training.network_time(t)
    whole = training.takes == "step" and bool((tau == tau.round()).all())
    return tau.to(torch.int64 if whole else torch.float32)


def place(value: float, times: Mapping[int, float] | tuple[float, ...] | list[float]) -> int:
    """The place of a number among times; of several places the second.

    Raises:
        ValueError: it is not there.
    """
    found = [i for i, time in enumerate(times) if time == value]
    if not found:
        shown = ", ".join(f"{time:g}" for time in list(times)[:8]) + (", ..." if len(times) > 8 else "")
        raise ValueError(f"timestep {value:g} is none of the scheduler's timesteps: {shown}")
    return found[min(1, len(found) - 1)]


def number(timestep: Any) -> float:
    """A time as a number: itself, or what a tensor holds, once or once for each sample.

    Raises:
        TypeError: anything else.
        ValueError: a tensor of different times.
    """
    if isinstance(timestep, Tensor) and timestep.numel():
        value = float(timestep.flatten()[0])
        if timestep.numel() > 1 and not bool((timestep == timestep.flatten()[0]).all()):
            raise ValueError(f"timestep must be one time for the whole batch, got {timestep.tolist()}")
        return value
    if isinstance(timestep, bool) or not isinstance(timestep, (int, float)):
        raise TypeError(f"timestep must be a number or a tensor of one, got {timestep!r}")
    return float(timestep)


def _begins(plan: Plan) -> dict[int, int]:
    """For each call at which a step begins, the node it begins at."""
    begins: dict[int, int] = {}
    node: int | None = 0
    calls = 0
    for step in plan.instructions:
        if isinstance(step, Evaluate):
            if node is not None:
                begins[calls] = node
            node, calls = None, calls + 1
        elif isinstance(step, Combine) and step.node is not None:
            node = step.node
    return begins
