"""Simple and fast distillation: the student's own path of few first-order steps, matched to a better sampler's.

Zhou, Chen, Wang & Chen 2024, arXiv:2409.19681 (SFD; with several step counts, SFD-v). Only the student's own nodes are
trained, from states that the student itself reaches, and no images are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from distill.checkpoint import Checkpoint
from distill.distillation import Distillation, DistillationConfig
from distill.method import Batch, Phase, column, dropped
from distill.network import PatchUNet, with_scalars
from distill.rows import Stretches
from distill.student import ddim_plan
from samplers.grid import make_grid
from samplers.model import EpsModel

Distance = Callable[[Tensor, Tensor], Tensor]
DISTANCES: dict[str, Distance] = {
    "l1": lambda a, b: (a - b).abs().mean(),
    "l2": lambda a, b: (a - b).square().mean(),
}
NAME = "log2_steps"  # of the network's scalar input
_WITH_GRADIENT = 3  # calls without gradient that one with it is counted as


class MatchingConfig(DistillationConfig):
    """What a run of simple and fast distillation is.

    Attributes:
        steps: step counts that the one student serves; a batch is of one of them, each as often.
        substeps: the teacher's steps for one of the student's; K in the paper.
        grid, final: of the teacher's nodes, as in `samplers.grid.make_grid`; the student's are every `substeps`-th of them.
        path: where the teacher begins each step: on the "teacher"'s own path from the noise, so that the student learns to
            mend its earlier errors, or at the "student"'s last state.
        norm: of the distance between the ends of two steps: "l1", the paper's, or "l2".
        images: start noises to see in all, rounded up to whole batches.
        learning_rate: of the plateau.
        warmup, cooldown: first images, over which the learning rate rises linearly, and last, over which it falls.
    """

    may_change = DistillationConfig.may_change | {"images", "cooldown"}

    method: Literal["matching"] = "matching"
    steps: tuple[int, ...] = Field(default=(2, 4), min_length=1)
    sampler: str = "dpmpp-3s"
    substeps: int = Field(default=2, ge=1)
    grid: str = "time-quadratic"
    final: Literal["zero", "t_min"] = "zero"
    path: Literal["teacher", "student"] = "teacher"
    norm: Literal["l1", "l2"] = "l1"
    images: int = Field(default=100_000, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    warmup: int = Field(default=2_000, ge=0)
    cooldown: int = Field(default=50_000, ge=0)

    @field_validator("steps")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1 or len(set(value)) < len(value):
            raise ValueError(f"must be different and at least 1, got {list(value)}")
        return value


# the mathematics -----------------------------------------------------------------------------------------------------


def ddim_step(student: EpsModel, x: Tensor, t: Tensor, s: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """The student's step from states x (B, ...) at times t (B,) to times s (B,): DDIM's, with one network call.

    `x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) x0(x_t, t)`: Song et al. 2021, arXiv:2010.02502,
    equation 12, which is Euler's step in sigma / alpha. Written with x0 it is finite at alpha_t = 0 and at sigma_s = 0.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ((student.schedule.alpha(u), student.schedule.sigma(u)) for u in (t, s))
    keep = sigma_s / sigma_t
    return column(keep, x).to(x.dtype) * x + column(alpha_s - alpha_t * keep, x).to(x.dtype) * student.x0(x, t, **cond)


def matching_loss(
    student: Callable[[Tensor, int], Tensor],
    teacher: Callable[[Tensor, int], Tensor],
    x: Tensor,
    steps: int,
    distance: Distance,
    path: str = "teacher",
) -> Tensor:
    """The mean over n of `d(student(x_n), teacher(y_n))`, where `x_{n+1} = stopgrad(student(x_n))`.

    Zhou et al. 2024, arXiv:2409.19681, whose published code has the teacher go its own path, and updates the weights after
    each step of a path instead of once for all.

    Args:
        student: its n-th step from a state.
        teacher: its way from a state over the same stretch of time, without gradient.
        x: start noise (B, ...), where both begin.
        steps: N, of the student.
        distance: d, the mean over all numbers of two states.
        path: what y_n is: "teacher" for where the teacher itself has come from the noise, "student" for x_n.
    """
    y, total = x, torch.zeros((), device=x.device)
    for n in range(steps):
        end, y = student(x, n), teacher(x if path == "student" else y, n)
        total = total + distance(end, y)
        x = end.detach()
    return total / steps


# the method ----------------------------------------------------------------------------------------------------------


class Matching(Distillation):
    """Trains a student of few steps without images; see `MatchingConfig`.

    Of the data only the labels are used, so that the student sees each class as often as the data has it. A path of N steps
    is N network calls with gradient for each image: one is counted as ever, and `Phase.calls` has the others as three calls
    each, beside the teacher's.

    Attributes:
        plans: what the student samples with at each step count.
    """

    settings = MatchingConfig

    def __init__(self, config: MatchingConfig) -> None:
        """Read the teacher.

        Raises:
            CheckpointError: it cannot be read, or takes scalars.
            ValueError: a sampler that is not deterministic, options or a grid that do not fit it or the schedule, or a
                prediction from which x0 does not follow at one of the nodes.
        """
        super().__init__(config)
        self._fine = {
            n: make_grid(self.schedule, config.grid, n * config.substeps, config.final).t for n in config.steps
        }
        self._stretches = {n: self._stretches_of(n) for n in config.steps}
        self.plans = {n: ddim_plan(self.schedule, self.nodes(n)) for n in config.steps}
        self.check_calls(*self._stretches.values(), plans=tuple(self.plans.values()))
        self.phases = (self._phase(),)

    def nodes(self, steps: int) -> np.ndarray:
        """The student's times (steps + 1,)."""
        return self._fine[steps][:: self.config.substeps]

    def network(self, fresh: bool = True) -> PatchUNet:
        """The teacher's; for several step counts with an input `log2_steps`, which has no effect yet."""
        return with_scalars(self.teacher.network, [NAME] if len(self.config.steps) > 1 else []).requires_grad_(True)

    def begin(self, phase: int, before: Checkpoint | None, device: torch.device) -> None:
        """Put the teacher on the device."""
        self._teaching = self.teaching(self.teacher.network, device)

    def draw(self, x0: Tensor, labels: Tensor, generator: torch.Generator, phase: int) -> Batch:
        """Start noise, labels, and the student's times (B, N + 1), whose shape tells the N of the batch."""
        noise = torch.randn(x0.shape, generator=generator)
        labels = dropped(labels, self.teacher.network.classes, self.config.drop_label, generator)
        steps = self.config.steps[int(torch.randint(len(self.config.steps), (), generator=generator))]
        times = torch.tensor(self.nodes(steps)).repeat(len(x0), 1)
        return {"x": self.plans[steps].sigma_T * noise, "labels": labels, "times": times}

    def loss(self, network: nn.Module, batch: Batch, phase: int) -> Tensor:
        """`matching_loss` of the student's DDIM steps and the teacher's stretches."""
        x, times, cond = batch["x"], batch["times"], {"class_labels": batch["labels"]}
        steps = times.shape[1] - 1
        student, told = self.model(network), {name: x.new_full((len(x),), value) for name, value in self._told(steps)}

        def step(x: Tensor, n: int) -> Tensor:
            return ddim_step(student, x, times[:, n], times[:, n + 1], {**cond, **told})

        def target(x: Tensor, n: int) -> Tensor:
            place = torch.full((len(x),), n, device=x.device)
            return self._stretches[steps].run(self._teaching, x, place, cond)

        return matching_loss(step, target, x, steps, DISTANCES[self.config.norm], self.config.path)

    def checkpoint(self, network: PatchUNet, phase: int, info: dict[str, Any]) -> Checkpoint:
        """The student, with its plan for each step count, and what its network is told of the count."""
        steps = sorted(self.config.steps)
        scalars = {str(n): dict(self._told(n)) for n in steps}
        student = {"method": self.config.method, "steps": steps, "scalars": scalars}
        return Checkpoint(network, self.schedule, self.teacher.predicts, {**info, "student": student}, self.plans)

    def _told(self, steps: int) -> list[tuple[str, float]]:
        """Names and values of the scalars on a path of so many steps."""
        return [(NAME, math.log2(steps))] if len(self.config.steps) > 1 else []

    def _stretches_of(self, steps: int) -> Stretches:
        """What the teacher computes from each of the student's nodes to the next."""
        k, fine = self.config.substeps, self._fine[steps].tolist()
        times = [fine[n * k : (n + 1) * k + 1] for n in range(steps)]
        return Stretches(self.config.sampler, self.schedule, times, **self.config.options)

    def _phase(self) -> Phase:
        config = self.config
        mean_steps = sum(config.steps) / len(config.steps)
        teacher = sum(n * stretches.calls for n, stretches in self._stretches.items()) / len(config.steps)
        name = "-".join(map(str, sorted(config.steps))) + ("-step" if config.steps == (1,) else "-steps")
        calls = teacher + _WITH_GRADIENT * (mean_steps - 1)
        return Phase(name, config.images, config.learning_rate, config.warmup, config.cooldown, calls)
