"""The teacher: an epsilon-model trained with the DDPM objective.

Ho et al. 2020, arXiv:2006.11239, equation 14 (`L_simple`) with continuous time; the v-prediction of Salimans & Ho 2022,
arXiv:2202.00512, section 4, as an option; labels dropped to a null class as in Ho & Salimans 2022, arXiv:2207.12598.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from distill.checkpoint import Checkpoint, CheckpointError, build_network, check_network, load_checkpoint, load_weights
from distill.config import Training
from distill.method import Batch, Method, Phase, column, dropped, noisy, stratified
from distill.network import PatchUNet
from distill.widen import widened
from samplers.schedule import from_config


class TeacherConfig(Training):
    """What a teacher's run is.

    Attributes:
        network: `{"class": name, **arguments}`.
        schedule: as `Schedule.config()` gives it.
        predicts: "eps" or "v".
        images: training images to see in all, rounded up to whole batches.
        learning_rate: of the plateau.
        warmup, cooldown: first images, over which the learning rate rises linearly, and last, over which it falls.
        drop_label: probability with which a label is replaced by the null class, in [0, 1].
        init: folder of a checkpoint whose weights a new run begins with; its network must be the configured one, or a
            narrower one of the same layout, which `widened` makes wider.
    """

    may_change: ClassVar[frozenset[str]] = Training.may_change | {"images", "warmup", "cooldown", "init"}

    method: Literal["teacher"] = "teacher"
    network: dict[str, Any] = Field(default_factory=lambda: {"class": "PatchUNet"})
    schedule: dict[str, Any] = Field(default_factory=lambda: {"name": "cosine"})
    predicts: Literal["eps", "v"] = "v"
    images: int = Field(default=2_400_000, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup: int = Field(default=50_000, ge=0)
    cooldown: int = Field(default=600_000, ge=0)
    drop_label: float = Field(default=0.1, ge=0, le=1)
    init: str | None = None

    @field_validator("network")
    @classmethod
    def _known_network(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_network(value)
        return value

    @field_validator("schedule")
    @classmethod
    def _known_schedule(cls, value: dict[str, Any]) -> dict[str, Any]:
        from_config(value)
        return value


class Teacher(Method):
    """Trains a teacher; see `TeacherConfig`."""

    settings = TeacherConfig

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__(config)
        self.schedule = from_config(config.schedule)
        self.phases = (Phase("", config.images, config.learning_rate, config.warmup, config.cooldown),)

    def network(self, fresh: bool = True) -> PatchUNet:
        """The configured network with fresh weights, or those of `init`."""
        network = build_network(self.config.network)
        if fresh and self.config.init is not None:
            self._start_from(network, Path(self.config.init))
        self._null_class = network.classes
        return network

    def draw(self, x0: Tensor, labels: Tensor, generator: torch.Generator, phase: int) -> Batch:
        """Images, labels, uniform times and noise."""
        t_min, t_max = self.schedule.t_min, self.schedule.t_max
        t = t_min + (t_max - t_min) * stratified(len(x0), generator)
        labels = dropped(labels, self._null_class, self.config.drop_label, generator)
        return {"x0": x0, "labels": labels, "t": t, "eps": torch.randn(x0.shape, generator=generator)}

    def loss(self, network: nn.Module, batch: Batch, phase: int) -> Tensor:
        """Mean squared error on epsilon, or on v = alpha eps - sigma x0, at x_t = alpha x0 + sigma eps."""
        x0, t, eps = batch["x0"], batch["t"], batch["eps"]
        alpha, sigma = column(self.schedule.alpha(t), x0), column(self.schedule.sigma(t), x0)
        target = eps if self.config.predicts == "eps" else alpha * eps - sigma * x0
        with torch.autocast(x0.device.type, self.config.autocast, enabled=self.config.dtype != "fp32"):
            prediction = network(noisy(x0, eps, self.schedule, t), t, batch["labels"])
        return (prediction.float() - target).square().mean()

    def checkpoint(self, network: PatchUNet, phase: int, info: dict[str, Any]) -> Checkpoint:
        """The model."""
        return Checkpoint(network, self.schedule, self.config.predicts, info)

    def _start_from(self, network: PatchUNet, init: Path) -> None:
        begun, mine = load_checkpoint(init), {"predicts": self.config.predicts, "schedule": self.schedule.config()}
        for name, value in {"predicts": begun.predicts, "schedule": begun.schedule.config()}.items():
            if value != mine[name]:
                raise CheckpointError(f"{init} does not fit: {name} is {value!r}, here {mine[name]!r}")
        trained, widths = begun.network, network.arguments["widths"]
        if trained.arguments != network.arguments and trained.arguments | {"widths": widths} == network.arguments:
            try:
                trained = widened(trained, widths, self.config.seed)
            except ValueError as error:
                raise CheckpointError(f"{init} does not fit: {error}") from error
        load_weights(network, trained.state_dict(), init)
