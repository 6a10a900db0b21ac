"""What a training run is: `TeacherConfig`, read from YAML and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml

from distill.checkpoint import check_network
from samplers.errors import unknown
from samplers.schedule import from_config

MNIST_CONFIG = Path(__file__).parent / "configs" / "mnist.yaml"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class TeacherConfig:
    """What a training run is. Between two starts of one run `images`, `cooldown` and `save_every` may change.

    Attributes:
        network: `{"class": name, **arguments}`.
        schedule: as `Schedule.config()` gives it.
        predicts: "eps" or "v".
        images: training images to see in all, rounded up to whole batches.
        batch_size: images a step.
        learning_rate, weight_decay: of AdamW; the learning rate is that of the plateau.
        warmup, cooldown: first images, over which the learning rate rises linearly, and last, over which it falls.
        grad_clip: largest norm of the gradient.
        ema_half_life: in images, of the averaged weights, which are judged and shipped.
        drop_label: probability with which a label is replaced by the null class, in [0, 1].
        dtype: "bf16" (autocast) or "fp32".
        seed: in [0, 2^31), of the first weights and of every batch.
        log_every, save_every: steps between two rows of the log, and between two checkpoints, a multiple of the first.

    Raises:
        ValueError: a value out of range, or a network or schedule that does not exist.
    """

    network: dict[str, Any] = field(default_factory=lambda: {"class": "PatchUNet"})
    schedule: dict[str, Any] = field(default_factory=lambda: {"name": "cosine"})
    predicts: str = "v"
    images: int = 2_400_000
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: int = 50_000
    cooldown: int = 600_000
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema_half_life: int = 50_000
    drop_label: float = 0.1
    dtype: str = "bf16"
    seed: int = 0
    log_every: int = 50
    save_every: int = 500

    def __post_init__(self) -> None:
        check_network(self.network)
        from_config(self.schedule)
        for name, accepted in (("predicts", ("eps", "v")), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in accepted:
                raise unknown(name, getattr(self, name), accepted)
        least = dict.fromkeys(("images", "batch_size", "ema_half_life", "log_every", "save_every"), 1)
        least |= dict.fromkeys(("warmup", "cooldown", "weight_decay", "drop_label", "seed"), 0)
        for name, bound in least.items():
            if not bound <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least {bound} and finite, got {getattr(self, name)}")
        for name in ("learning_rate", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name, largest in (("drop_label", 1), ("seed", 2**31 - 1)):
            if getattr(self, name) > largest:
                raise ValueError(f"{name} must be at most {largest}, got {getattr(self, name)}")
        if self.save_every % self.log_every:
            raise ValueError(f"save_every must be a multiple of log_every={self.log_every}, got {self.save_every}")

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return math.ceil(self.images / self.batch_size)


def load_config(path: str | Path, **overrides: Any) -> TeacherConfig:
    """Read a training run from YAML; what the file leaves out has TeacherConfig's default.

    Args:
        path: a mapping of TeacherConfig's names, such as `MNIST_CONFIG`.
        **overrides: values that replace those of the file.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: not YAML, an unknown name, a value of the wrong type or out of range; the message names the file.
    """
    path = Path(path)
    try:
        given = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path} must map the names of TeacherConfig to values, got a {type(given).__name__}")
    _check_settings(given, str(path))
    _check_settings(overrides, f"the overrides of {path}")
    try:
        return TeacherConfig(**{**given, **overrides})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _check_settings(settings: dict[Any, Any], source: str) -> None:
    kinds = get_type_hints(TeacherConfig)
    for name, value in settings.items():
        if name not in kinds:
            raise unknown(f"setting in {source}:", name, kinds)
        kind = getattr(kinds[name], "__origin__", kinds[name])
        if not isinstance(value, int | float if kind is float else kind) or isinstance(value, bool):
            hint = " (YAML takes 1e-3 for a text; write 1.0e-3)" if kind is float and isinstance(value, str) else ""
            raise ValueError(f"{source}: {name} must be of type {kind.__name__}, got {value!r}{hint}")
