"""What every way of distilling shares: the teacher, and the settings of the path that it shows."""

from __future__ import annotations

import copy
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import nn

from distill.checkpoint import CheckpointError, content_hash, load_checkpoint
from distill.config import Training
from distill.method import Method, as_model
from distill.rows import Stretches
from samplers import EpsModel, Plan
from samplers.grid import points_of
from samplers.registry import get_sampler

_SAME_TIME = 1e-9


class DistillationConfig(Training):
    """What every distillation is told.

    Attributes:
        teacher: folder of its checkpoint. Its network, schedule and prediction are the student's. It is known by its weights:
            between two starts of one run the folder may move, but not change.
        sampler, options: what takes the teacher along its path, a deterministic sampler with a plan.
        drop_label: probability with which a label is replaced by the null class, so that a student can be guided, in [0, 1].
    """

    may_change = Training.may_change | {"teacher"}

    teacher: str
    sampler: str = "ddim"
    options: dict[str, Any] = Field(default_factory=dict)
    grid: str = "sgm"
    drop_label: float = Field(default=0.1, ge=0, le=1)

    @field_validator("sampler")
    @classmethod
    def _known_sampler(cls, value: str) -> str:
        return get_sampler(value).name

    @field_validator("grid")
    @classmethod
    def _known_grid(cls, value: str) -> str:
        points_of(value)
        return value


class Distillation(Method):
    """A method with a teacher.

    Attributes:
        teacher: its checkpoint, on the CPU; its weights do not change.
    """

    def __init__(self, config: Any) -> None:
        """Read the teacher.

        Raises:
            CheckpointError: it cannot be read, or takes further inputs, as students may.
        """
        super().__init__(config)
        self.teacher = load_checkpoint(config.teacher)
        network = self.teacher.network.requires_grad_(False)
        if network.scalars:
            raise CheckpointError(
                f"teacher {config.teacher} takes {', '.join(network.scalars)} beside state, time and label; give one that "
                "does not"
            )
        self.schedule = self.teacher.schedule

    @property
    def needs_labels(self) -> bool:
        """Whether the teacher takes labels: without any, the student would learn what the teacher does for none."""
        return self.teacher.network.classes > 0

    @property
    def identity(self) -> dict[str, str]:
        """The teacher's weights."""
        return {"teacher": content_hash(self.teacher.network.state_dict())}

    def model(self, network: nn.Module) -> EpsModel:
        """A network as an epsilon-model that computes in the run's dtype."""
        return as_model(network, self.schedule, self.teacher.predicts, self.config.autocast)

    def teaching(self, network: nn.Module, device: torch.device) -> EpsModel:
        """A frozen copy of a network on a device, as the epsilon-model that shows the path."""
        frozen = copy.deepcopy(network).eval().requires_grad_(False)
        return self.model(frozen.to(device, memory_format=torch.channels_last))  # type: ignore[call-overload]

    def check_calls(self, *taught: Stretches, plans: tuple[Plan, ...] = ()) -> None:
        """Check that the teacher can be asked what the plans ask of it.

        Args:
            taught: the teacher's way in each phase.
            plans: of the student.

        Raises:
            ValueError: what a plan takes does not follow from the teacher's prediction.
            CheckpointError: the teacher is a student itself, and the first of `taught` calls it at times it was not trained for.
        """
        model = EpsModel(self.teacher.network, self.schedule, self.teacher.predicts)
        for plan in (*plans, *(plan for stretches in taught for plan in stretches.plans)):
            for call in plan.calls:
                model.affine(call.kind, call.t, call.alpha, call.sigma)
        trained = [call.t for plan in self.teacher.plans.values() for call in plan.calls]
        asked = {call.t for plan in taught[0].plans for call in plan.calls} if trained else set()
        strange = sorted(t for t in asked if min(abs(t - known) for known in trained) > _SAME_TIME)
        if strange:
            raise CheckpointError(
                f"teacher {self.config.teacher} is a student of {', '.join(map(str, sorted(self.teacher.plans)))} steps, and was "
                f"trained at their times alone, not at t = {strange[0]:g}: give it sampler: ddim, substeps: 2 and steps that are "
                "half of its own, or another teacher"
            )
