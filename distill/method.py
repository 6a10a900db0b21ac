"""What the trainer asks of a method: phases, random draws, and the loss of a batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill.checkpoint import Checkpoint
from distill.config import Training
from distill.network import PatchUNet
from samplers.model import EpsModel
from samplers.schedule import Schedule

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one objective and one course of the learning rate.

    Attributes:
        name: of the student that it leaves, and of its folder; "" for a method that leaves one model.
        images: training images to see, rounded up to whole batches.
        learning_rate: of the plateau.
        warmup, cooldown: first images, over which the learning rate rises linearly, and last, over which it falls to zero.
        calls: network calls without gradient for each image, which a cost estimate needs; one with gradient is counted
            as three.
    """

    name: str
    images: int
    learning_rate: float
    warmup: int = 0
    cooldown: int = 0
    calls: float = 0.0

    def steps(self, batch_size: int) -> int:
        """Optimiser steps of the phase."""
        return math.ceil(self.images / batch_size)

    def rate(self, step: int, batch_size: int) -> float:
        """The learning rate of a step of the phase, from 0: linear rise, plateau, linear fall to zero after the last."""
        rise = min(1.0, (step + 1) * batch_size / max(self.warmup, 1))
        fall = min(1.0, (self.steps(batch_size) - step) * batch_size / max(self.cooldown, 1))
        return self.learning_rate * rise * fall


class Method(ABC):
    """A training method: everything that differs between the teacher and the students.

    The trainer calls `network` once, `begin` at the start of each phase and after each resumption, then `draw` and `loss`
    for every step, and `checkpoint` whenever it saves.

    Attributes:
        config: the settings, of the class `settings`.
        schedule: the noise schedule.
        phases: what is trained in turn, each from the averaged weights of the one before.
    """

    settings: ClassVar[type[Training]]
    schedule: Schedule
    phases: tuple[Phase, ...]

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def needs_labels(self) -> bool:
        """Whether data without labels would teach something else than asked."""
        return False

    @property
    def identity(self) -> dict[str, str]:
        """What a run depends on beside its settings, as hashes: it may not change between two starts of one run."""
        return {}

    @abstractmethod
    def network(self, fresh: bool = True) -> PatchUNet:
        """The network as training begins, on the CPU; fresh weights come from torch's global generator, which is seeded.

        Args:
            fresh: False where a checkpoint of the run will replace the weights.

        Raises:
            CheckpointError: the teacher cannot be used.
            ValueError: settings that do not fit each other or the teacher.
        """

    def begin(self, phase: int, before: Checkpoint | None, device: torch.device) -> None:  # noqa: B027
        """Make ready for a phase, on a device.

        Args:
            phase: its number, from 0.
            before: what the phase before left; None for the first.
            device: of the batches to come.
        """

    @abstractmethod
    def draw(self, x0: Tensor, labels: Tensor, generator: torch.Generator, phase: int) -> Batch:
        """The batch of a step, on the CPU, each entry with a row for each image.

        Args:
            x0: clean images (B, C, H, W), float32 in [-1, 1].
            labels: (B,) int64; the network's number of classes stands for "no label".
            generator: of every random choice, seeded for this step.
            phase: number of the phase.
        """

    @abstractmethod
    def loss(self, network: nn.Module, batch: Batch, phase: int) -> Tensor:
        """The mean loss over the rows, a float32 scalar, of the network being trained; `batch` is on its device."""

    @abstractmethod
    def checkpoint(self, network: PatchUNet, phase: int, info: dict[str, Any]) -> Checkpoint:
        """What the phase leaves, around a network in evaluation mode on the CPU."""


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """Uniform draws (count,) in [0, 1], float32, one in each of `count` equal parts, shuffled: a loss of less noise."""
    return (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count


def dropped(labels: Tensor, null_class: int, share: float, generator: torch.Generator) -> Tensor:
    """The labels (B,), each replaced by `null_class` with probability `share` (Ho & Salimans 2022, arXiv:2207.12598)."""
    return labels.masked_fill(torch.rand(len(labels), generator=generator) < share, null_class)


def noisy(x0: Tensor, eps: Tensor, schedule: Schedule, t: Tensor) -> Tensor:
    """`alpha x0 + sigma eps` at times t (B,), float32."""
    return column(schedule.alpha(t), x0) * x0 + column(schedule.sigma(t), x0) * eps


def as_model(network: nn.Module, schedule: Schedule, predicts: str, dtype: torch.dtype) -> EpsModel:
    """A network as an epsilon-model that computes in a dtype, on states in another."""

    def net(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return network(x, t, **cond).to(x.dtype)

    return EpsModel(net, schedule, predicts)


def column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ...), to multiply images."""
    return values.view(-1, *[1] * (like.dim() - 1))
