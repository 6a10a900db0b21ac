"""The models a benchmark runs on, each with the way its samples are judged."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.features import ASSETS, content_hash, load_extractor, load_statistics, moments_hash
from bench.metrics import FrechetReference, Moments, frechet_distance
from bench.mixture import GaussianMixture
from distill.checkpoint import load_checkpoint
from distill.network import PatchUNet
from samplers import EpsModel, schedules
from samplers.errors import unknown

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEACHER = ASSETS / "mnist-teacher"


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
class BenchModel:
    """A model in the zoo.

    Attributes:
        name, hash: as given, and what identifies the weights.
        model: the epsilon-model.
        shape: of one sample.
        classes: number of labels; 0 for an unconditional model.
        dtype: the network computes in, "fp32" or "bf16".
        judge: how its samples are judged.
    """

    name: str
    hash: str
    model: EpsModel
    shape: tuple[int, ...]
    classes: int
    dtype: str
    judge: Judge

    @property
    def images(self) -> bool:
        """Whether a sample is an image (C, H, W)."""
        return len(self.shape) == 3

    def cond(self, indices: Tensor) -> dict[str, Tensor]:
        """The condition of samples: labels cycle with the index, so that any prefix is balanced."""
        return {"class_labels": indices % self.classes} if self.classes else {}


def load_model(name: str, device: str = "cpu", dtype: str = "fp32") -> BenchModel:
    """A model by name, or from a folder that training wrote.

    Args:
        name: "mnist", "gmm", or a path to a checkpoint folder of 28 x 28 digits.
        device: of torch.
        dtype: "fp32" or "bf16", the network's; states stay in float32. "gmm" has no network and ignores it.

    Raises:
        ValueError: an unknown name or dtype.
        distill.checkpoint.CheckpointError: a checkpoint that cannot be used.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if name in _ZOO:
        return _ZOO[name](device, dtype)
    if Path(name).exists():
        return _digits(name, Path(name), device, dtype)
    raise unknown("model", name, (*_ZOO, "a checkpoint folder"))


def default_dtype(device: str) -> str:
    """The faster dtype that leaves distances unchanged: bf16 where the hardware multiplies it natively, else fp32."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if platform.system() == "Linux" and cpuinfo.exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def _mnist(device: str, dtype: str) -> BenchModel:
    return _digits("mnist", TEACHER, device, dtype)


def _digits(name: str, folder: Path, device: str, dtype: str) -> BenchModel:
    checkpoint = load_checkpoint(folder)
    digest = content_hash(checkpoint.network.state_dict())
    network = checkpoint.network.to(device, DTYPES[dtype])
    net = partial(_in_dtype, network, DTYPES[dtype])
    model = EpsModel(net, checkpoint.schedule, predicts=checkpoint.predicts)
    return BenchModel(name, digest, model, network.shape, network.classes, dtype, _digit_judge(device))


def _in_dtype(network: PatchUNet, dtype: torch.dtype, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
    """The network in its own dtype on states in another."""
    return network(x.to(dtype), t, **cond).to(x.dtype)


def _digit_judge(device: str) -> Judge:
    extractor = load_extractor("mnist_cnn", device)
    train, test = (load_statistics("mnist", split, extractor) for split in ("train", "test"))
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
    return BenchModel("gmm", digest, EpsModel(mixture.net(schedule), schedule), mixture.shape, 0, "fp32", judge)


def _flat(samples: Tensor) -> np.ndarray:
    return samples.detach().cpu().double().flatten(1).numpy()


_ZOO: dict[str, Callable[[str, str], BenchModel]] = {"mnist": _mnist, "gmm": _gmm}
