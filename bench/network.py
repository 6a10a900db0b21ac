"""A network on a device, metered, with what a benchmark must know of it."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.meter import Meter
from distill.checkpoint import Checkpoint, content_hash
from distill.config import DTYPES
from samplers import EpsModel, Plan


@dataclass(frozen=True)
class Network:
    """A model on a device, ready to sample from.

    Attributes:
        name, hash: as given, and what identifies the weights.
        model: the epsilon-model.
        shape: of one sample.
        classes: number of labels; 0 for an unconditional model.
        dtype: the network computes in, "fp32" or "bf16".
        plans: of a student, the plan for each number of calls that it was trained for; empty for any other model.
        scalars: names of further inputs of the network, a number for each sample.
        info: what its checkpoint says of its training.
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

    @property
    def meter(self) -> Meter:
        """What counts the network's calls."""
        assert isinstance(self.model.net, Meter), "every model of the zoo is metered"
        return self.model.net

    @property
    def images(self) -> bool:
        """Whether a sample is an image (C, H, W)."""
        return len(self.shape) == 3

    def cond(self, indices: Tensor) -> dict[str, Tensor]:
        """The condition of samples: labels cycle with the index, so that any prefix is balanced."""
        return {"class_labels": indices % self.classes} if self.classes else {}


def on_device(name: str, checkpoint: Checkpoint, device: str, dtype: str) -> Network:
    """A copy of a checkpoint's network on a device, in a dtype of `DTYPES`."""
    made_of = {
        "predicts": checkpoint.predicts,
        "schedule": checkpoint.schedule.config(),
        **checkpoint.network.arguments,
    }
    digest = model_hash(checkpoint.network.state_dict(), made_of)
    # Convolutions follow the layout of their weights; this one takes two thirds of the time on a processor.
    layout: Any = {"dtype": DTYPES[dtype], "memory_format": torch.channels_last}
    network = copy.deepcopy(checkpoint.network).to(device, **layout)
    model = EpsModel(Meter(in_dtype(network, DTYPES[dtype])), checkpoint.schedule, predicts=checkpoint.predicts)
    trained: dict[str, Any] = {"plans": checkpoint.plans, "scalars": network.scalars, "info": checkpoint.info}
    return Network(name, digest, model, network.shape, network.classes, dtype, **trained)


def model_hash(weights: Mapping[str, Tensor], made_of: Mapping[str, Any]) -> str:
    """16 hex digits of the weights and of all else that the network's answers follow from."""
    text = json.dumps({"weights": content_hash(dict(weights)), **made_of}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def in_dtype(network: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    """A network in its own dtype, on states in another."""

    def net(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return network(x.to(dtype), t, **cond).to(x.dtype)

    return net
