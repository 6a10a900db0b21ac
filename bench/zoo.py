"""The models a benchmark runs on, each with the way its samples are judged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.features import ASSETS, FeatureExtractor, content_hash, load_extractor, load_statistics, moments_hash
from bench.metrics import FrechetReference, Moments, frechet_distance
from bench.mixture import GaussianMixture
from distill.checkpoint import Checkpoint, load_checkpoint
from distill.config import DTYPES
from distill.network import PatchUNet
from samplers import EpsModel, Plan, schedules
from samplers.errors import unknown

TEACHER = ASSETS / "mnist-teacher"
DIGITS = (1, 28, 28)
FEATURES, MOMENTS = "features", "statistics"  # folders of a judge


@dataclass(frozen=True)
class Judge:
    """How samples become a distance.

    Attributes:
        metric: the column's name; a distance that is not on Inception-v3 features is never called FID.
        features: samples (N, ...) to features (N, d).
        reference: the moments they are compared with.
        floor: distance of the reference from an independent set of real data (0 where the reference is exact).
        hashes: what identifies extractor and reference.
        classify: samples to class labels (N,), where there are classes.
    """

    metric: str
    features: Callable[[Tensor], np.ndarray]
    reference: FrechetReference
    floor: float
    hashes: dict[str, str]
    classify: Callable[[Tensor], np.ndarray] | None = None


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
    def images(self) -> bool:
        """Whether a sample is an image (C, H, W)."""
        return len(self.shape) == 3

    def cond(self, indices: Tensor) -> dict[str, Tensor]:
        """The condition of samples: labels cycle with the index, so that any prefix is balanced."""
        return {"class_labels": indices % self.classes} if self.classes else {}


@dataclass(frozen=True, kw_only=True)
class BenchModel(Network):
    """A model in the zoo.

    Attributes:
        judge: how its samples are judged.
    """

    judge: Judge


def load_model(name: str, device: str = "cpu", dtype: str = "fp32", judge: str | Path | None = None) -> BenchModel:
    """A model by name, or from a folder that training wrote.

    Args:
        name: "mnist", "gmm", or a path to a checkpoint folder.
        device: of torch.
        dtype: "fp32" or "bf16", the network's; states stay in float32. "gmm" has no network and ignores it.
        judge: of a checkpoint folder, as `folder_judge` takes it; None is the shipped one, which judges 28 x 28 digits.

    Raises:
        ValueError: an unknown name or dtype, a judge for a model that has its own or of images of another shape, or none.
        distill.checkpoint.CheckpointError: a checkpoint that cannot be used.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if name in _ZOO:
        if judge is not None:
            raise ValueError(f"judge is for a checkpoint folder, model {name!r} has its own; got {str(judge)!r}")
        return _ZOO[name](device, dtype)
    if Path(name).exists():
        return _from_folder(name, Path(name), device, dtype, judge)
    if "/" in name:
        raise ValueError(
            f"model {name!r}: there is no such folder; give a checkpoint folder, or one of {', '.join(_ZOO)}"
        )
    raise unknown("model", name, (*_ZOO, "a checkpoint folder"))


def _mnist(device: str, dtype: str) -> BenchModel:
    return _from_folder("mnist", TEACHER, device, dtype, None)


def _from_folder(name: str, folder: Path, device: str, dtype: str, judge: str | Path | None) -> BenchModel:
    checkpoint = load_checkpoint(folder)
    shape = checkpoint.network.shape
    if judge is None:
        if shape != DIGITS:
            raise ValueError(
                f"model {name} gives samples of shape {shape}; the shipped judge is for {DIGITS}: give a judge"
            )
        return judged(on_device(name, checkpoint, device, dtype), digit_judge(device))
    extractor = load_extractor(Path(judge) / FEATURES, device)
    if extractor.shape != shape:
        raise ValueError(f"judge {judge} is for images of shape {extractor.shape}, model {name} gives {shape}")
    return judged(on_device(name, checkpoint, device, dtype), folder_judge(Path(judge), device))


def on_device(name: str, checkpoint: Checkpoint, device: str, dtype: str) -> Network:
    """A copy of a checkpoint's network on a device, in a dtype of `DTYPES`."""
    digest = content_hash(checkpoint.network.state_dict())
    # Convolutions follow the layout of their weights; this one takes two thirds of the time on a processor.
    layout: Any = {"dtype": DTYPES[dtype], "memory_format": torch.channels_last}
    network = copy.deepcopy(checkpoint.network).to(device, **layout)
    model = EpsModel(partial(_in_dtype, network, DTYPES[dtype]), checkpoint.schedule, predicts=checkpoint.predicts)
    trained: dict[str, Any] = {"plans": checkpoint.plans, "scalars": network.scalars, "info": checkpoint.info}
    return Network(name, digest, model, network.shape, network.classes, dtype, **trained)


def judged(network: Network, judge: Judge) -> BenchModel:
    """The network with a judge of its samples."""
    return BenchModel(**{part.name: getattr(network, part.name) for part in fields(network)}, judge=judge)


def _in_dtype(network: PatchUNet, dtype: torch.dtype, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
    """The network in its own dtype on states in another."""
    return network(x.to(dtype), t, **cond).to(x.dtype)


@lru_cache(maxsize=2)
def digit_judge(device: str) -> Judge:
    """The shipped judge of MNIST's digits: a classifier's features against the training set's statistics."""
    extractor = load_extractor("mnist_cnn", device)
    return _judge(extractor, *(load_statistics("mnist", split, extractor) for split in ("train", "test")))


@lru_cache(maxsize=2)
def folder_judge(folder: Path, device: str) -> Judge:
    """A judge made for other images: `folder/features` is an extractor, `folder/statistics` has the splits train and test.

    Raises:
        distill.checkpoint.CheckpointError: either cannot be used, or they do not belong together.
    """
    extractor = load_extractor(folder / FEATURES, device)
    return _judge(extractor, *(load_statistics(folder / MOMENTS, split, extractor) for split in ("train", "test")))


def _judge(extractor: FeatureExtractor, train: Moments, test: Moments) -> Judge:
    reference = FrechetReference(train)
    return Judge(
        metric=f"fd_{extractor.name}",
        features=extractor.features,
        reference=reference,
        floor=frechet_distance(test, reference),
        hashes={"extractor": extractor.hash, "reference": moments_hash(train)},
        classify=extractor.classify,
    )


def _gmm(device: str, dtype: str) -> BenchModel:
    """The two-dimensional mixture with exact epsilon, in float32 always, judged against its exact moments."""
    mixture = GaussianMixture.random(dim=2, components=5, seed=0)
    schedule = schedules.vp_linear()
    moments = Moments.of_mixture(mixture)
    judge = Judge("frechet", _flat, FrechetReference(moments), 0.0, {"reference": moments_hash(moments)})
    digest = content_hash({"means": mixture.means, "weights": mixture.weights})
    return BenchModel("gmm", digest, EpsModel(mixture.net(schedule), schedule), mixture.shape, 0, "fp32", judge=judge)


def _flat(samples: Tensor) -> np.ndarray:
    return samples.detach().cpu().double().flatten(1).numpy()


_ZOO: dict[str, Callable[[str, str], BenchModel]] = {"mnist": _mnist, "gmm": _gmm}
