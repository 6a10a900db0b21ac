"""What a sampler computes, read off by running it on coordinates.

Between two network calls every fixed-step sampler is linear. So its loop is run on a state whose entries are coordinates on
(x_T, outputs, noises): the k-th network output is the k-th unit vector, the k-th noise likewise, and what the loop then holds are
the coefficients of `Plan.matrix`, whoever wrote the loop.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.certify.parity import in_double
from bench.export import Noise, plan_for
from samplers.grid import Grid
from samplers.plan import Plan
from samplers.registry import get_sampler
from samplers.schedule import Discrete, Flow, Schedule

Options = Mapping[str, Any]
_CALLS_A_STEP = 5  # no method takes more, nor more noises
_OUTPUTS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}


@dataclass(frozen=True)
class Traced:
    """A sampler's coefficients, in x coordinates (`x = alpha x0 + sigma eps`) on a noise schedule.

    Attributes:
        label: what was traced.
        kind: "eps" or "x0": what the outputs are expressed in.
        nodes: (steps + 1,) times between steps, in the schedule's own time.
        levels: (calls + 1,) the time that the noise level of each evaluated state, and of the result, belongs to.
        times: (calls,) the time that the network is told.
        matrix: (calls + 1, 1 + calls + noises) as `Plan.matrix`: noises that are drawn and not used have no column.
        draws: which draw each noise is, from 0 on.
        sigmas: (steps + 1,) sigma / alpha at the nodes; in flows sigma itself.
    """

    label: str
    kind: str
    nodes: np.ndarray
    levels: np.ndarray
    times: np.ndarray
    matrix: np.ndarray
    draws: tuple[int, ...]
    sigmas: np.ndarray

    @property
    def calls(self) -> int:
        """Network calls."""
        return len(self.times)

    @property
    def noises(self) -> int:
        """Noises in use."""
        return len(self.draws)

    def step_of(self, row: int) -> int:
        """The step, 1 .. steps, that leads to the state of a row; 0 for the start."""
        return int((self.nodes > self.levels[row] + 1e-9 * abs(self.nodes[0])).sum())


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        name: a sampler; "diffusers:CLASS", "k-diffusion:FUNCTION" or "MODULE:FUNCTION" of k-diffusion's form; or a plan's file.
        options: of the sampler or function; of a scheduler, its settings or those of its `step`.
    """

    name: str
    options: Options = field(default_factory=dict)

    @property
    def form(self) -> str:
        """What it is: "sampler", "plan", "scheduler" or "function"."""
        if self.name.endswith(".json"):
            return "plan"
        module, colon, _ = self.name.partition(":")
        return "sampler" if not colon else "scheduler" if module == "diffusers" else "function"

    @property
    def takes_nodes(self) -> bool:
        """Whether it runs on the nodes that it is given, and need not choose its own."""
        return self.form in ("sampler", "function")


def trace(
    side: Side,
    noise: Noise,
    steps: int,
    *,
    grid: str | None = None,
    nodes: np.ndarray | None = None,
    kind: str = "eps",
    double: bool = True,
) -> Traced:
    """The coefficients of a sampler, a scheduler of diffusers, or a function of k-diffusion's form.

    Args:
        side: what to trace.
        noise: the noise schedule.
        steps: of its loop.
        grid: name of a sampler's grid; None: its recommended one.
        nodes: times to run on instead, for a sampler; a function has to be given them.
        kind: what to express outputs in; "x0" where alpha is 0 at some call.
        double: False leaves float32 where it is used: in the tables of diffusers, or as the dtype of a function's x and sigmas.

    Raises:
        ValueError: an unknown name or option, or a schedule that the scheduler is not made for.
    """
    if side.form in ("sampler", "plan"):
        return _of_plan(_plan(side, noise, steps, grid, nodes), noise.schedule, kind, side.name)
    if side.form == "scheduler":
        return _of_scheduler(side, noise.schedule, steps, kind, double)
    if nodes is None:
        raise ValueError(f"{side.name} has no nodes of its own: nodes must be given")
    return _of_function(side, noise.schedule, nodes, kind, double)


def _plan(side: Side, noise: Noise, steps: int, grid: str | None, nodes: np.ndarray | None) -> Plan:
    if side.form == "plan":
        if side.options:
            raise ValueError(f"{side.name} is a plan, which has no options, got {dict(side.options)}")
        return Plan.from_json(Path(side.name).read_text())
    if nodes is None:
        return plan_for(side.name, noise, steps=steps, grid=grid, **side.options)
    entry = get_sampler(side.name)
    entry.check_options(dict(side.options))
    return entry.plan(Grid(noise.schedule, nodes), **side.options)


def _of_plan(plan: Plan, schedule: Schedule, kind: str, label: str) -> Traced:
    times, nodes = np.array([call.t for call in plan.calls]), np.array(plan.times)
    levels, draws = np.append(times, nodes[-1]), tuple(range(plan.noises))
    return Traced(label, kind, nodes, levels, times, plan.matrix(kind), draws, _sigmas(schedule, nodes))


def _sigmas(schedule: Schedule, t: np.ndarray) -> np.ndarray:
    """What schedulers call sigma: sigma / alpha, and in flows sigma itself."""
    return t if isinstance(schedule, Flow) else np.abs(schedule.sigma_bar(t))


class _Coordinates:
    """The state space of one trace: unit vectors are dealt out, evaluated states kept."""

    def __init__(self, steps: int, schedule: Schedule, kind: str, dtype: torch.dtype = torch.float64) -> None:
        self.most = _CALLS_A_STEP * steps + 8
        self.schedule, self.kind, self.dtype = schedule, kind, dtype
        self.rows: list[Tensor] = []
        self.levels: list[float] = []
        self.drawn = 0

    def unit(self, place: int) -> Tensor:
        """(1, D), as a batch of one."""
        return torch.eye(1 + 2 * self.most, dtype=self.dtype)[place : place + 1]

    def noise(self) -> Tensor:
        """The next one."""
        self.drawn += 1
        return self.unit(self.most + self.drawn)

    def noises(self) -> Iterator[Tensor]:
        """The next ones."""
        while True:
            yield self.noise()

    def evaluate(self, state: Tensor, level: float, output: str) -> Tensor:
        """Keep a state in x coordinates at the time `level`; the network's next output, as "eps", "x0", "v" or "flow"."""
        self.rows.append(state.reshape(1, -1))
        self.levels.append(level)
        unit = self.unit(len(self.rows)).view_as(state)
        alpha, sigma = float(self.schedule.alpha(level)), abs(float(self.schedule.sigma(level)))
        eps, x0 = (
            (unit, (state - sigma * unit) / alpha) if self.kind == "eps" else ((state - alpha * unit) / sigma, unit)
        )
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[output]

    def traced(self, label: str, result: Tensor, end: float, nodes: np.ndarray, times: np.ndarray | None) -> Traced:
        matrix = torch.cat([*self.rows, result.reshape(1, -1)]).double().numpy()
        calls = len(self.rows)
        noises = matrix[:, 1 + self.most : 1 + self.most + self.drawn]
        draws = np.flatnonzero((noises != 0).any(axis=0))
        kept = np.concatenate([matrix[:, : 1 + calls], noises[:, draws]], axis=1)
        levels = np.array([*self.levels, end])
        times = levels[:-1] if times is None else times
        return Traced(
            label, self.kind, nodes, levels, times, kept, tuple(draws.tolist()), _sigmas(self.schedule, nodes)
        )


def _level(schedule: Schedule, sigma: float) -> float:
    """The time of a sigma as schedulers count it: sigma / alpha, and in flows sigma itself."""
    if isinstance(schedule, Flow):
        return sigma
    return schedule.t_zero if sigma <= 0 else float(schedule.t_of_lam(-math.log(sigma)))


def _of_scheduler(side: Side, schedule: Schedule, steps: int, kind: str, double: bool) -> Traced:
    space, name = _Coordinates(steps, schedule, kind), side.name.partition(":")[2]
    _check_scheduler(name)
    with (
        in_double(name, space.noises(), double) as made_of,
        warnings.catch_warnings(),
        np.errstate(all="ignore"),
    ):
        warnings.simplefilter("ignore")
        settings, each = _settings(made_of, schedule, side.options)

        def run(path: Callable[[Any, Any], Tensor] | None) -> Traced:
            made = made_of(**settings)
            made.set_timesteps(steps)
            if path is not None:
                made.noise_sampler = path
            return _loop(made, space, each, side.name)

        if not hasattr(made_of(**settings), "noise_sampler"):
            return run(None)
        asked: list[tuple[float, float]] = []
        run(_recorded(asked, space))
        space = _Coordinates(steps, schedule, kind)
        return run(_path(asked, space))


def _check_scheduler(name: str) -> None:
    from bench.export import scheduler_of_config

    if name != "DPMSolverSDEScheduler":  # a stand-in that refuses to be made, where torchsde is missing
        scheduler_of_config({}, name)


def _settings(made_of: Any, schedule: Schedule, options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the scheduler is made with, and what each of its steps is given."""
    takes, step = (inspect.signature(f).parameters for f in (made_of.__init__, made_of.step))
    settings = {name: value for name, value in options.items() if name in takes}
    each = {name: value for name, value in options.items() if name not in takes}
    for name in each:
        if name not in step:
            raise ValueError(f"{made_of.__name__} has no setting {name!r}; it has {', '.join([*takes][1:])}")
    flow = isinstance(schedule, Flow)
    if flow and "shift" not in takes and not settings.get("use_flow_sigmas"):
        raise ValueError(f"{made_of.__name__} matches no flows, which schedule {schedule.name!r} is for")
    if not flow and "trained_betas" not in takes:
        raise ValueError(f"{made_of.__name__} takes no betas, and so cannot be put on schedule {schedule.name!r}")
    if not flow:
        if not isinstance(schedule, Discrete):
            raise ValueError(f"schedulers of diffusers have a table of betas, and schedule {schedule.name!r} has none")
        table = np.array([1.0, *schedule.alphas_cumprod])
        settings.setdefault("trained_betas", 1.0 - table[1:] / table[:-1])
    for name in ("clip_sample", "thresholding"):  # which no linear loop has, and which is no part of a method
        if name in takes:
            settings.setdefault(name, False)
    return settings, each


def _loop(made: Any, space: _Coordinates, each: Options, label: str) -> Traced:
    """A scheduler's own loop, as its pipelines run it."""
    schedule, flow = space.schedule, isinstance(space.schedule, Flow)
    sigmas = [float(s) for s in made.sigmas] if hasattr(made, "sigmas") else None
    output = "flow" if flow else _OUTPUTS[made.config.get("prediction_type", "epsilon")]
    told = np.array([float(t) for t in made.timesteps]) / (made.config.num_train_timesteps if flow else 1.0)
    start = space.unit(0)
    scale = float(_scaled(made, start, 0)[0, 0])  # their state is x / alpha where this is not 1
    x = start / scale
    for k, t in enumerate(made.timesteps):
        state = _scaled(made, x, k)
        factor = float((state / x)[x != 0][0])
        if scale != 1.0:
            level = _level(schedule, math.sqrt(max(1.0 / factor**2 - 1.0, 0.0)))
        else:
            level = float(told[k]) if sigmas is None else _level(schedule, sigmas[k])
        out = space.evaluate(state, level, output)
        x = made.step(out, t, x, **each).prev_sample
    end = _end(made, schedule, sigmas)
    if scale != 1.0:
        x = x * float(schedule.alpha(end))
    first = told[: len(getattr(made, "prk_timesteps", ())) : 4]  # of PNDM's Runge-Kutta steps, each of four calls
    ends = [*first, *told[4 * len(first) :], end] if sigmas is None else [_level(schedule, s) for s in sigmas]
    nodes = [
        *ends[:1],
        *(t for before, t in itertools.pairwise(ends) if t < before - 1e-9),
    ]  # a step may have no length
    return space.traced(label, x, end, np.array(nodes), told)


def _scaled(made: Any, x: Tensor, k: int) -> Tensor:
    return made.scale_model_input(x, made.timesteps[k]) if hasattr(made, "scale_model_input") else x


def _end(made: Any, schedule: Schedule, sigmas: list[float] | None) -> float:
    if sigmas is not None:
        return _level(schedule, sigmas[-1])
    last = float(getattr(made, "final_alpha_cumprod", 1.0))
    return _level(schedule, math.sqrt(max(1.0 / last - 1.0, 0.0)))


class _Drawn:
    """The module torch, whose `randn_like` deals out unit vectors."""

    def __init__(self, space: _Coordinates) -> None:
        self._space = space

    def __getattr__(self, name: str) -> Any:
        return (lambda x, **_: self._space.noise()) if name == "randn_like" else getattr(torch, name)


def _of_function(side: Side, schedule: Schedule, nodes: np.ndarray, kind: str, double: bool) -> Traced:
    function = _function(side.name)
    dtype = torch.float64 if double else torch.float32
    flow = isinstance(schedule, Flow)
    alphas = np.ones(len(nodes)) if flow else schedule.alpha(nodes)
    sigmas = torch.tensor(_sigmas(schedule, nodes), dtype=dtype)
    asked: list[tuple[float, float]] = []

    def run(path_of: Callable[[_Coordinates], Callable[[Any, Any], Tensor]]) -> Traced:
        space = _Coordinates(len(nodes) - 1, schedule, kind, dtype)

        def model(y: Tensor, sigma: Tensor) -> Tensor:
            level = _level(schedule, float(sigma[0]))
            alpha = 1.0 if flow else float(schedule.alpha(level))
            return space.evaluate(y * alpha, level, "x0")

        extra = {"noise_sampler": path_of(space)} if "noise_sampler" in inspect.signature(function).parameters else {}
        names = inspect.unwrap(function).__globals__
        before = names.get("torch")
        names["torch"] = _Drawn(space)
        try:
            y = function(model, space.unit(0) / alphas[0], sigmas, disable=True, **extra, **side.options)
        finally:
            names["torch"] = before
        return space.traced(side.name, y * float(alphas[-1]), float(nodes[-1]), nodes, None)

    run(lambda space: _recorded(asked, space))
    return run(lambda space: _path(asked, space))


def _function(name: str) -> Callable[..., Tensor]:
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module("k_diffusion.sampling" if module == "k-diffusion" else module)
    except ImportError as error:
        raise ValueError(f"{name}: {error}; it has to be installed here, or lie in this folder") from error
    if not callable(getattr(found, attribute, None)):
        raise ValueError(f"{name}: {found.__name__} has no function {attribute!r}")
    return getattr(found, attribute)


def _recorded(asked: list[tuple[float, float]], space: _Coordinates) -> Callable[[Any, Any], Tensor]:
    """A noise sampler that notes what it is asked for."""

    def sampler(start: Any, end: Any) -> Tensor:
        asked.append((float(start), float(end)))
        return space.noise()

    return sampler


def _path(asked: list[tuple[float, float]], space: _Coordinates) -> Callable[[Any, Any], Tensor]:
    """A Brownian path over sigma whose increments between neighbouring levels, from the highest down, are the noises."""
    levels = sorted({level for pair in asked for level in pair}, reverse=True)
    units = [space.noise() for _ in levels[1:]]
    stretches = list(zip(itertools.pairwise(levels), units, strict=True))

    def sampler(start: Any, end: Any) -> Tensor:
        high, low = max(float(start), float(end)), min(float(start), float(end))
        inside = [unit * math.sqrt(a - b) for (a, b), unit in stretches if b >= low and a <= high]
        return torch.stack(inside).sum(0) / math.sqrt(high - low)

    return sampler


def in_kind(traced: Traced, kind: str, schedule: Schedule) -> Traced:
    """The same with outputs expressed as the other kind."""
    if kind == traced.kind:
        return traced
    alpha, sigma = schedule.alpha(traced.levels), np.abs(schedule.sigma(traced.levels))
    own, other = (alpha, sigma) if kind == "eps" else (sigma, alpha)  # unit = (state - other * new unit) / own
    rows: list[np.ndarray] = []
    for row in traced.matrix:
        new = row.copy()
        for j, state in enumerate(rows[: traced.calls]):
            new[1 + j] = 0.0
            new = new + row[1 + j] * state / own[j]
        for j in range(len(rows[: traced.calls])):
            new[1 + j] -= row[1 + j] * other[j] / own[j]
        rows.append(new)
    return replace(traced, kind=kind, matrix=np.stack(rows))
