"""A network on a device, metered, with what a benchmark must know of it."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench.meter import Meter
from bench.prompts import PromptEncoder
from distill.checkpoint import Checkpoint, content_hash
from distill.config import DTYPES as TRAINING_DTYPES
from samplers import EpsModel, Plan
from samplers.adapters.latent import LatentSpace
from samplers.errors import unknown
from samplers.meter import Metered

DTYPES = {**TRAINING_DTYPES, "fp16": torch.float16}  # training has no fp16, whose gradients would need to be scaled


@dataclass(frozen=True)
class Network:
    """A model on a device, ready to sample from.

    Attributes:
        name, hash: as given, and what identifies the weights.
        model: the epsilon-model.
        shape: of one sample.
        classes: number of labels; 0 for an unconditional model.
        dtype: the network computes in, "fp32", "bf16" or "fp16".
        plans: of a student, the plan for each number of calls that it was trained for; empty for any other model.
        scalars: names of further inputs of the network, a number for each sample.
        info: what its checkpoint says of its training.
        space: of a latent model whose samples are to become pixels; None for a model of pixels.
        prompts: of a model that takes texts, what makes conditions of them.
        null_label: the label that stands for none, where there is one.
        rows: conditions of a benchmark, of which sample i has row i modulo their count.
        device: of torch, where the network is.
    """

    name: str
    hash: str
    model: EpsModel
    shape: tuple[int, ...]
    classes: int
    dtype: str
    plans: Mapping[int, Plan] = field(default_factory=dict)
    scalars: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    space: LatentSpace | None = None
    prompts: PromptEncoder | None = None
    null_label: int | None = None
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    device: str = "cpu"

    @cached_property
    def metered(self) -> Metered:
        """The model, counted with all that wraps the network."""
        return Metered(self.model)

    @property
    def meter(self) -> Meter:
        """What counts the network's calls."""
        assert isinstance(self.model.net, Meter), "every model of the zoo is metered"
        return self.model.net

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Of one sample as it is judged and shown: of its image, where a sample is latents."""
        return self.shape if self.space is None else self.space.pixel_shape(self.shape)

    @property
    def images(self) -> bool:
        """Whether what is judged is an image (C, H, W)."""
        return len(self.pixel_shape) == 3

    def decode(self, samples: Tensor) -> Tensor:
        """Pixels (B, *pixel_shape) in about [-1, 1] from samples (B, *shape); those of a pixel model are pixels."""
        return samples if self.space is None else self.space.decode(samples)

    def encode(self, pixels: Tensor) -> Tensor:
        """Clean data (B, *shape) of the model's own space from pixels (B, *pixel_shape)."""
        return pixels if self.space is None else self.space.encode(pixels)

    def cond(self, indices: Tensor) -> dict[str, Tensor]:
        """The condition of samples: labels and prompts cycle with the index, so that any prefix is balanced."""
        labels = {"class_labels": indices % self.classes} if self.classes else {}
        return labels | {name: value[indices % len(value)] for name, value in self.rows.items()}

    def condition(
        self, *, prompts: Sequence[str] | None = None, labels: Sequence[int] | Tensor | None = None
    ) -> dict[str, Tensor]:
        """What to give as `cond=` for samples of these prompts or labels, with a row for each; {} for neither.

        Raises:
            ValueError: prompts or labels that the model does not take, or a label that it has not.
        """
        cond: dict[str, Tensor] = {}
        if prompts is not None:
            if self.prompts is None:
                raise ValueError(f"prompts must be None: model {self.name} takes no text, got {prompts!r}")
            cond |= self.prompts(prompts)
        if labels is not None:
            rows, most = torch.as_tensor(labels), self.classes - (self.null_label is None)
            if not self.classes or rows.is_floating_point() or bool(((rows < 0) | (rows > most)).any()):
                takes = f"takes labels 0 .. {most}" if self.classes else "takes none"
                raise ValueError(f"labels: model {self.name} {takes}, got {rows.tolist()}")
            cond["class_labels"] = rows.reshape(-1).to(self.device, torch.int64)
        return cond

    def null(self, batch: int) -> dict[str, Tensor]:
        """The condition of no condition, for `batch` samples: that of the empty prompt, or the label for none.

        Raises:
            ValueError: the model has no such condition.
        """
        if self.prompts is not None:
            return {name: value.expand(batch, *value.shape[1:]) for name, value in self.prompts.null().items()}
        if self.null_label is not None:
            return {"class_labels": torch.full((batch,), self.null_label, device=self.device)}
        raise ValueError(
            f"model {self.name} has no condition that stands for none, so nothing can be guided away from it"
        )


def on_device(name: str, checkpoint: Checkpoint, device: str, dtype: str) -> Network:
    """A copy of a checkpoint's network on a device, in a dtype as `torch_dtype` takes it."""
    inside = torch_dtype(dtype, device)
    made_of = {
        "predicts": checkpoint.predicts,
        "schedule": checkpoint.schedule.config(),
        **checkpoint.network.arguments,
    }
    digest = model_hash(checkpoint.network.state_dict(), made_of)
    # Convolutions follow the layout of their weights; this one takes two thirds of the time on a processor.
    layout: Any = {"dtype": inside, "memory_format": torch.channels_last}
    network = copy.deepcopy(checkpoint.network).to(device, **layout)
    model = EpsModel(Meter(in_dtype(network, inside)), checkpoint.schedule, predicts=checkpoint.predicts)
    trained: dict[str, Any] = {"plans": checkpoint.plans, "scalars": network.scalars, "info": checkpoint.info}
    trained["null_label"] = network.classes or None
    return Network(name, digest, model, network.shape, network.classes, dtype, device=device, **trained)


def torch_dtype(dtype: str, device: str) -> torch.dtype:
    """The dtype of a network by its name.

    Args:
        dtype: "fp32", "bf16" or, on an accelerator, "fp16".
        device: of torch.

    Raises:
        ValueError: an unknown name, or fp16 on a processor, of which only the newest do not emulate it: a convolution then takes
            several times as long as in float32.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if dtype == "fp16" and torch.device(device).type == "cpu":
        raise ValueError(f"dtype 'fp16' needs an accelerator, got device {device!r}; accepted there: 'fp32', 'bf16'")
    return DTYPES[dtype]


def model_hash(weights: Mapping[str, Tensor], made_of: Mapping[str, Any]) -> str:
    """16 hex digits of the weights and of all else that the network's answers follow from."""
    text = json.dumps({"weights": content_hash(dict(weights)), **made_of}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def in_dtype(network: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    """A network in its own dtype, on states in another."""

    def net(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return network(x.to(dtype), t, **cond).to(x.dtype)

    return net
