"""The space that a sampler's loop is run in to read off its coefficients: coordinates on (x_T, outputs, noises)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samplers.schedule import Flow, Schedule

Options = Mapping[str, Any]
_CALLS_A_STEP = 5  # no method takes more, nor more noises


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
        name: a sampler; "diffusers:CLASS" (PlanScheduler too), "k-diffusion:FUNCTION" or "MODULE:FUNCTION" of k-diffusion's
            form; or a plan's file.
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


def sigmas_of(schedule: Schedule, t: np.ndarray) -> np.ndarray:
    """What schedulers call sigma: sigma / alpha, and in flows sigma itself."""
    return t if isinstance(schedule, Flow) else np.abs(schedule.sigma_bar(t))


class Coordinates:
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

    def evaluate(self, state: Tensor, level: float, predicts: str, sigma_data: float = 0.5) -> Tensor:
        """Keep a state in x coordinates at the time `level`; the network's next output.

        Args:
            state: (1, D).
            level: in the schedule's own time.
            predicts: what the output is: "eps", "x0", "v", "flow", or "edm" for a network that EDM preconditions.
            sigma_data: EDM's.
        """
        self.rows.append(state.reshape(1, -1))
        self.levels.append(level)
        unit = self.unit(len(self.rows)).view_as(state)
        alpha, sigma = float(self.schedule.alpha(level)), abs(float(self.schedule.sigma(level)))
        eps, x0 = (
            (unit, (state - sigma * unit) / alpha) if self.kind == "eps" else ((state - alpha * unit) / sigma, unit)
        )
        if predicts == "edm":  # F of x0 = c_skip x + c_out F (Karras et al. 2022, arXiv:2206.00364, table 1)
            total = sigma**2 + sigma_data**2
            return (x0 - sigma_data**2 / total * state) * total**0.5 / (sigma * sigma_data)
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[predicts]

    def traced(self, label: str, result: Tensor, end: float, nodes: np.ndarray, times: np.ndarray | None) -> Traced:
        """What was computed, at the end of the loop.

        Args:
            label: what was traced.
            result: (1, D) the state at the time `end`.
            end: in the schedule's own time.
            nodes: (steps + 1,) times between steps.
            times: (calls,) what the network is told; None: the levels.
        """
        matrix = torch.cat([*self.rows, result.reshape(1, -1)]).double().numpy()
        calls = len(self.rows)
        noises = matrix[:, 1 + self.most : 1 + self.most + self.drawn]
        draws = np.flatnonzero((noises != 0).any(axis=0))
        kept = np.concatenate([matrix[:, : 1 + calls], noises[:, draws]], axis=1)
        levels = np.array([*self.levels, end])
        times = levels[:-1] if times is None else times
        return Traced(
            label, self.kind, nodes, levels, times, kept, tuple(draws.tolist()), sigmas_of(self.schedule, nodes)
        )


def level_of(schedule: Schedule, sigma: float) -> float:
    """The time of a sigma as schedulers count it: sigma / alpha, and in flows sigma itself."""
    if isinstance(schedule, Flow):
        return sigma
    return schedule.t_zero if sigma <= 0 else float(schedule.t_of_lam(-math.log(sigma)))


def recorded(asked: list[tuple[float, float]], space: Coordinates) -> Callable[[Any, Any], Tensor]:
    """A noise sampler that notes what it is asked for."""

    def sampler(start: Any, end: Any) -> Tensor:
        asked.append((float(start), float(end)))
        return space.noise()

    return sampler


def path_of(asked: list[tuple[float, float]], space: Coordinates) -> Callable[[Any, Any], Tensor]:
    """A Brownian path over sigma whose increments between neighbouring levels, from the highest down, are the noises."""
    levels = sorted({level for pair in asked for level in pair}, reverse=True)
    units = [space.noise() for _ in levels[1:]]
    stretches = list(zip(itertools.pairwise(levels), units, strict=True))

    def sampler(start: Any, end: Any) -> Tensor:
        high, low = max(float(start), float(end)), min(float(start), float(end))
        inside = [unit * math.sqrt(a - b) for (a, b), unit in stretches if b >= low and a <= high]
        return torch.stack(inside).sum(0) / math.sqrt(high - low)

    return sampler
