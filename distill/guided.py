"""Guidance distillation: one network that takes the guidance weight, then students of it in fewer and fewer steps.

Meng et al. 2023, arXiv:2210.03142. Stage one (section 3.1) folds the two calls of classifier-free guidance (Ho & Salimans
2022, arXiv:2207.12598) into one; stage two (section 3.2) is progressive distillation of what came out.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from distill.checkpoint import Checkpoint, CheckpointError
from distill.method import Batch, Phase, column, dropped, noisy, stratified
from distill.network import PatchUNet, with_scalars
from distill.progressive import WEIGHTS, Progressive, ProgressiveConfig

NAME = "guidance"  # of the network's scalar input, and of the option of a student


class GuidedConfig(ProgressiveConfig):
    """What a guidance distillation is: the fields of `ProgressiveConfig`, and those of stage one.

    Attributes:
        guidance: range of the guidance weight w, which is uniform in it; a prediction under guidance is
            `(1 + w) conditional - w unconditional`, so 0 is none.
        stage_one_images: training images of stage one.
        stage_one_learning_rate: at its start; it falls linearly to zero.
        drop_label: as in progressive distillation, but 0 by default: without a label there is nothing to guide.
    """

    method: Literal["guided"] = "guided"  # type: ignore[assignment]
    guidance: tuple[float, float] = (0.0, 4.0)
    stage_one_images: int = Field(default=256_000, ge=1)
    stage_one_learning_rate: float = Field(default=3e-4, gt=0)
    drop_label: float = Field(default=0.0, ge=0, le=1)

    @field_validator("guidance")
    @classmethod
    def _range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not (all(map(math.isfinite, value)) and value[0] < value[1]):
            raise ValueError(f"must be a range of two finite weights, the first below the second, got {list(value)}")
        return value


class Guided(Progressive):
    """Distils a teacher under guidance; see `GuidedConfig`. Phase 0 is stage one, the others are progressive."""

    settings = GuidedConfig

    def __init__(self, config: GuidedConfig) -> None:
        """Read the teacher; errors as in `Progressive`, and CheckpointError for one that never saw the null class."""
        super().__init__(config)
        if self.teacher.info.get("training", {}).get("drop_label") == 0:
            raise CheckpointError(
                f"teacher {config.teacher} was trained with drop_label=0, so it has no prediction without a label, which "
                "guidance needs"
            )
        images = config.stage_one_images
        stage_one = Phase("guided", images, config.stage_one_learning_rate, cooldown=images, calls=2.0)
        self.phases = (stage_one, *self.phases)

    def network(self, fresh: bool = True) -> PatchUNet:
        """The teacher's, with a further input whose weight is zero at first."""
        return with_scalars(self.teacher.network, [NAME]).requires_grad_(True)

    def begin(self, phase: int, before: Checkpoint | None, device: torch.device) -> None:
        """In stage one the teacher is the teacher, later the averaged network of the phase before."""
        if phase == 0:
            self._teaching = self.teaching(self.teacher.network, device)
        else:
            super().begin(phase - 1, before, device)

    def draw(self, x0: Tensor, labels: Tensor, generator: torch.Generator, phase: int) -> Batch:
        """What progressive distillation draws, in stage one times instead of steps, and guidance weights."""
        low, high = self.config.guidance
        if phase:
            batch = super().draw(x0, labels, generator, phase - 1)
        else:
            t_min, t_max = self.schedule.t_min, self.schedule.t_max
            batch = {
                "x0": x0,
                "t": t_min + (t_max - t_min) * stratified(len(x0), generator),
                "labels": dropped(labels, self.teacher.network.classes, self.config.drop_label, generator),
                "eps": torch.randn(x0.shape, generator=generator),
            }
        return {**batch, NAME: low + (high - low) * stratified(len(x0), generator)}

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """Labels and guidance weights."""
        return {**super().condition(batch), NAME: batch[NAME]}

    def loss(self, network: nn.Module, batch: Batch, phase: int) -> Tensor:
        """In stage one `weight (x0(x_t, t, w) - (1 + w) x0(x_t, t, label) + w x0(x_t, t))^2`."""
        if phase:
            return super().loss(network, batch, phase - 1)
        x0, t, w = batch["x0"], batch["t"], column(batch[NAME], batch["x0"])
        x_t = noisy(x0, batch["eps"], self.schedule, t)
        target = guided_x0(self._teaching.x0, x_t, t, batch["labels"], self.teacher.network.classes, w)
        snr = column((self.schedule.alpha(t) / self.schedule.sigma(t)).square(), x0)
        prediction = self.model(network).x0(x_t, t, **self.condition(batch))
        return (WEIGHTS[self.config.weight](snr) * (prediction - target).square()).mean()

    def checkpoint(self, network: PatchUNet, phase: int, info: dict[str, Any]) -> Checkpoint:
        """Of stage one a model that takes the guidance weight, for any sampler; then the students."""
        trained = {NAME: list(self.config.guidance)}
        if phase == 0:
            student = {"method": self.config.method, "steps": [], **trained}
            return Checkpoint(network, self.schedule, self.teacher.predicts, {**info, "student": student})
        made = super().checkpoint(network, phase - 1, info)
        made.info["student"].update(trained)
        return made


@torch.no_grad()
def guided_x0(predict: Any, x_t: Tensor, t: Tensor, labels: Tensor, null_class: int, w: Tensor) -> Tensor:
    """x0 under classifier-free guidance, `(1 + w) x0(x_t, t, label) - w x0(x_t, t)`: Meng et al. 2023, section 3.1.

    Args:
        predict: `predict(x, t, class_labels=...)`, the teacher's x0; called once for both predictions.
        x_t: (B, ...) states.
        t: (B,) times.
        labels: (B,) int64.
        null_class: the label that stands for none.
        w: weights (B, 1, ...).
    """
    both = torch.cat([labels, torch.full_like(labels, null_class)])
    conditional, unconditional = predict(torch.cat([x_t, x_t]), torch.cat([t, t]), class_labels=both).chunk(2)
    return (1.0 + w) * conditional - w * unconditional
