"""Progressive distillation: a student whose one step does what two steps of its teacher do, again and again.

Salimans & Ho 2022, arXiv:2202.00512, algorithm 2: the averaged student of a phase teaches the next, of half the steps. The
first teacher may take its steps with any deterministic sampler that has a plan.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from distill.checkpoint import Checkpoint, CheckpointError
from distill.config import Training
from distill.distillation import Distillation, DistillationConfig
from distill.method import Batch, Phase, column, dropped, stratified
from distill.network import PatchUNet
from distill.rows import Stretches
from distill.student import ddim_plan
from samplers.grid import Grid, make_grid

# of the squared error of x0, as functions of alpha^2 / sigma^2 (equations 9 and 10); the second is that of v where the schedule
# preserves variance
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "truncated_snr": lambda snr: snr.clamp(min=1.0),
    "snr_plus_one": lambda snr: 1.0 + snr,
}
_DIVIDES_BY_ALPHA = ("eps", "score")


class ProgressiveConfig(DistillationConfig):
    """What a progressive distillation is.

    Attributes:
        steps: of the student of each phase, each half of the one before.
        sampler, options: how the teacher takes its steps in the first phase; in a later one it is the student before, whose
            steps are DDIM's.
        substeps: steps of that sampler for a step of the first student; in a later phase there are two, which is the halving.
        grid: of the finest nodes, `substeps * steps[0]` steps; each student has every so many-th of them. "sgm" is uniform in
            time like the paper's; "uniform" would end with a step of almost no length, from t_min to clean data.
        final: what the last node is: "zero" for clean data, or "t_min".
        weight: of the squared error of x0: "truncated_snr" for max(alpha^2 / sigma^2, 1) or "snr_plus_one" for
            1 + alpha^2 / sigma^2, which on a variance-preserving schedule is the squared error of v.
        images: training images of a phase but the last, rounded up to whole batches.
        last_images: of the last phase, whose steps are the hardest to learn.
        learning_rate: at the start of each phase; it falls linearly to zero.
    """

    method: Literal["progressive"] = "progressive"
    steps: tuple[int, ...] = (8, 4, 2, 1)
    substeps: int = Field(default=2, ge=1)
    final: Literal["t_min", "zero"] = "zero"
    weight: Literal["truncated_snr", "snr_plus_one"] = "snr_plus_one"
    images: int = Field(default=256_000, ge=1)
    last_images: int = Field(default=512_000, ge=1)
    learning_rate: float = Field(default=3e-4, gt=0)

    @field_validator("steps")
    @classmethod
    def _halvings(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or value[-1] < 1 or any(a != 2 * b for a, b in itertools.pairwise(value)):
            raise ValueError(f"step counts that are not halvings, such as 8, 4, 2, 1: got {list(value)}")
        return value


class Progressive(Distillation):
    """Distils a teacher into students of fewer and fewer steps; see `ProgressiveConfig`.

    A subclass that puts a phase before these hands them on with their number less one, `before` being the model they begin
    from; one with further conditions overrides `draw` and `condition`.
    """

    settings: ClassVar[type[Training]] = ProgressiveConfig

    def __init__(self, config: ProgressiveConfig) -> None:
        """Read the teacher.

        Raises:
            CheckpointError: it cannot be read, or predicts epsilon.
            ValueError: a sampler that is not deterministic, or options or a grid that do not fit it or the schedule.
        """
        super().__init__(config)
        if self.teacher.predicts in _DIVIDES_BY_ALPHA:
            raise CheckpointError(
                f"teacher {config.teacher} predicts {self.teacher.predicts!r}: a student of few steps needs x0 where alpha is "
                "near 0, and there (x - sigma eps) / alpha is mostly the network's error; train a teacher with predicts: v"
            )
        self._finest = make_grid(self.schedule, config.grid, config.substeps * config.steps[0], config.final).t
        self.phases = tuple(self._phase(number) for number in range(len(config.steps)))
        self.check_calls(*(self.stretches(number) for number in range(len(config.steps))))

    def nodes(self, steps: int) -> np.ndarray:
        """The times (steps + 1,) of so many equal parts of the finest grid; every step's teacher was trained at them."""
        return self._finest[:: (len(self._finest) - 1) // steps]

    def stretches(self, phase: int) -> Stretches:
        """What the teacher of a phase computes, with a stretch for each step of the student."""
        config, steps = self.config, self.config.steps[phase]
        parts = 2 if phase else config.substeps
        nodes = self.nodes(parts * steps)
        times = [nodes[i : i + parts + 1].tolist() for i in range(0, parts * steps, parts)]
        if phase:
            return Stretches("ddim", self.schedule, times)
        return Stretches(config.sampler, self.schedule, times, **config.options)

    def network(self, fresh: bool = True) -> PatchUNet:
        """The teacher's."""
        return copy.deepcopy(self.teacher.network).requires_grad_(True)

    def begin(self, phase: int, before: Checkpoint | None, device: torch.device) -> None:
        """Take the averaged student of the phase before as the teacher."""
        teacher = self.teacher if before is None else before
        self._teaching = self.teaching(teacher.network, device)
        self._stretches = self.stretches(phase)
        grid = Grid(self.schedule, self.nodes(self.config.steps[phase]))
        self._nodes = torch.tensor(np.stack([grid.t, grid.alpha, grid.sigma]), device=device)

    def draw(self, x0: Tensor, labels: Tensor, generator: torch.Generator, phase: int) -> Batch:
        """Images, labels, the number of a step of the student, uniform, and noise."""
        steps = self.config.steps[phase]
        place = (steps * stratified(len(x0), generator)).long().clamp(max=steps - 1)  # rounding may reach the end
        labels = dropped(labels, self.teacher.network.classes, self.config.drop_label, generator)
        return {"x0": x0, "labels": labels, "place": place, "eps": torch.randn(x0.shape, generator=generator)}

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """What teacher and student are called with beside state and time."""
        return {"class_labels": batch["labels"]}

    def loss(self, network: nn.Module, batch: Batch, phase: int) -> Tensor:
        """`weight (x0(x_t, t) - target)^2`, where a DDIM step with the target goes where the teacher goes."""
        place, x0, cond = batch["place"], batch["x0"], self.condition(batch)
        t, alpha, sigma = (column(values, x0) for values in self._nodes[:, place])
        _, alpha_end, sigma_end = (column(values, x0) for values in self._nodes[:, place + 1])
        x_t = (alpha * x0 + sigma * batch["eps"]).to(x0.dtype)
        x_end = self._stretches.run(self._teaching, x_t, place, cond)
        target = student_target(x_t, x_end, alpha, sigma, alpha_end, sigma_end)
        weight = WEIGHTS[self.config.weight]((alpha / sigma).square()).to(x0.dtype)
        prediction = self.model(network).x0(x_t, t.flatten(), **cond)
        return (weight * (prediction - target).square()).mean()

    def checkpoint(self, network: PatchUNet, phase: int, info: dict[str, Any]) -> Checkpoint:
        """The student, with the plan of its steps."""
        steps = self.config.steps[phase]
        plan = ddim_plan(self.schedule, self.nodes(steps))
        student = {"method": self.config.method, "steps": [steps]}
        return Checkpoint(network, self.schedule, self.teacher.predicts, {**info, "student": student}, {steps: plan})

    def _phase(self, number: int) -> Phase:
        config, steps = self.config, self.config.steps[number]
        images = config.last_images if number == len(config.steps) - 1 else config.images
        name = "1-step" if steps == 1 else f"{steps}-steps"
        return Phase(name, images, config.learning_rate, cooldown=images, calls=self.stretches(number).calls)


def student_target(
    x_t: Tensor, x_end: Tensor, alpha: Tensor, sigma: Tensor, alpha_end: Tensor, sigma_end: Tensor
) -> Tensor:
    """The x0 with which one DDIM step from `x_t` lands on `x_end`, shape and dtype of x_t.

    DDIM's step is `x_end = alpha_end x0 + sigma_end (x_t - alpha x0) / sigma`, here solved for x0: Salimans & Ho 2022,
    arXiv:2202.00512, algorithm 2 and appendix G.

    Args:
        x_t, x_end: (B, ...) states at the start of the step and at its end.
        alpha, sigma: of the start, float64, each (B, 1, ...).
        alpha_end, sigma_end: of the end, with `sigma_end / alpha_end < sigma / alpha`; sigma_end may be 0.
    """
    ratio = sigma_end / sigma
    return ((x_end - ratio * x_t) / (alpha_end - ratio * alpha)).to(x_t.dtype)
