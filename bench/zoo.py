"""The models a benchmark runs on, each with the way its samples are judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from bench.edm import EDM, load_edm
from bench.features import load_extractor, moments_hash
from bench.floor import EXACT, Floor, floor_of_samples, most_rows
from bench.judge import DIGITS, FEATURES, Judge, JudgeSpec, digit_judge, folder_judge, judge_of
from bench.meter import Meter
from bench.metrics import FrechetReference
from bench.network import DTYPES, Network, on_device
from bench.pipelines import HUB, Reading, is_pipeline, load_pipeline
from bench.problems import NAMES, Problem, load_problem
from bench.shipped import ASSETS, found, shipped_models
from distill.checkpoint import load_checkpoint
from samplers import EpsModel, schedules
from samplers.errors import did_you_mean, unknown

TEACHER = ASSETS / "mnist-teacher"
_MNIST = "mnist"
_REFERENCE_SAMPLES = 10_000  # of a model that can be sampled exactly
_FOLDERS = (
    "a checkpoint folder",
    "a diffusers pipeline's folder",
    "hf:ID of one on the hub",
    "edm:FOLDER of a network of EDM",
)
_CIFAR10 = "runs/cifar10"  # where the suite of that name has its model


@dataclass(frozen=True, kw_only=True)
class BenchModel(Network):
    """A model in the zoo.

    Attributes:
        judge: how its samples are judged.
    """

    judge: Judge


def load_model(
    name: str,
    device: str = "cpu",
    dtype: str = "fp32",
    judge: str | Path | JudgeSpec | None = None,
    num_samples: int = 0,
    **reading: Any,
) -> BenchModel:
    """A model by name, or from a folder.

    Args:
        name: "mnist"; "gmm", "gmm-16" (of 16 dimensions), "cifar10-gmm" or "ideal:DATA", whose epsilon is exact; a checkpoint
            folder of training; the folder of a diffusers pipeline, or "hf:" and its id on the hub; "edm:" and a folder, see
            `bench.edm`.
        device: of torch.
        dtype: "fp32", "bf16" or, on an accelerator, "fp16", the network's; states stay in float32. An exact epsilon has no
            network and ignores it.
        judge: of images that no shipped judge is for, a folder as `bench.judge.folder_judge` takes it, or an extractor with
            real images; None is the shipped one, which judges 28 x 28 digits.
        num_samples: that will be judged, on which FID's name depends.
        **reading: of a pipeline, fields of `bench.pipelines.Reading`.

    Raises:
        ValueError: an unknown name or dtype, prompts for a model that takes none, a judge for a model that has its own or of
            images of another shape, or none.
        distill.checkpoint.CheckpointError: a checkpoint that cannot be used.
    """
    return with_judge(load_network(name, device, dtype, **reading), judge, num_samples)


def with_judge(network: Network, judge: str | Path | JudgeSpec | None = None, num_samples: int = 0) -> BenchModel:
    """A network, as `load_network` gives it, with the judge of its samples; arguments and errors as in `load_model`."""
    if isinstance(network, BenchModel):
        if judge is not None:
            raise ValueError(f"judge is for a model of images, model {network.name!r} has its own; got {str(judge)!r}")
        return network
    if isinstance(judge, JudgeSpec):
        return judged(network, judge_of(judge, network.pixel_shape, num_samples, network.device))
    return judged(network, _judge_in(judge, network))


def load_network(name: str, device: str, dtype: str, **reading: Any) -> Network:
    """The network of a model, as `load_model` takes it, without a judge of its samples; of one without error, with its own."""
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    asked = _asked(name, reading)
    problem = load_problem(name)
    if problem is not None:
        return _exact(problem, device)
    if name == _MNIST:
        return on_device(name, load_checkpoint(TEACHER), device, dtype)
    if is_pipeline(name):
        return load_pipeline(name, device, dtype, **asked)
    if name.startswith(EDM):
        return load_edm(name, device, dtype)
    if found(name).exists():
        return on_device(name, load_checkpoint(found(name)), device, dtype)
    if "/" in name:
        hint = f", such as {HUB}{name}" if name.count("/") == 1 and name[0] not in "./~" else ""
        if name.startswith(_CIFAR10):
            hint = f"; `python -m bench.cifar10 --data FOLDER --out {_CIFAR10}` makes it, or give {HUB}google/ddpm-cifar10-32"
        close = did_you_mean(name, shipped_models())
        raise ValueError(
            f"model {name!r}: there is no such folder; {close}give {', '.join((_MNIST, *NAMES, *_FOLDERS))}{hint}"
        )
    raise unknown("model", name, (_MNIST, *NAMES, *shipped_models(), *_FOLDERS))


def _asked(name: str, reading: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked of a pipeline beyond the usual.

    Raises:
        ValueError: something of what is none.
    """
    asked = {key: value for key, value in reading.items() if value != getattr(Reading(), key)}
    if asked and not is_pipeline(name):
        raise ValueError(f"{next(iter(asked))} is for a pipeline of diffusers; model {name!r} is none")
    return asked


def judged(network: Network, judge: Judge) -> BenchModel:
    """The network with a judge of its samples."""
    return BenchModel(**{part.name: getattr(network, part.name) for part in fields(Network)}, judge=judge)


def _judge_in(judge: str | Path | None, network: Network) -> Judge:
    """The judge in a folder, or the shipped one."""
    if judge is None:
        if network.pixel_shape != DIGITS:
            raise ValueError(
                f"model {network.name} gives samples of shape {network.pixel_shape}; the shipped judge is for {DIGITS}: "
                "give a judge"
            )
        return digit_judge(network.device)
    extractor = load_extractor(Path(judge) / FEATURES, network.device)
    if extractor.shape != network.pixel_shape:
        raise ValueError(
            f"judge {judge} is for images of shape {extractor.shape}, model {network.name} gives {network.pixel_shape}"
        )
    return folder_judge(Path(judge), network.device)


def _exact(problem: Problem, device: str) -> BenchModel:
    """A model without error, judged against the moments of its data."""
    schedule, features = schedules.vp_linear(), problem.features
    exact = lru_cache(maxsize=1)(lambda: np.asarray(features(problem.sample(_REFERENCE_SAMPLES, 1))))
    hashes = {"reference": moments_hash(problem.reference)}
    reference = FrechetReference(problem.reference)

    def floors(count: int) -> tuple[Floor, ...]:
        """Draws of the data itself: with exact moments as the reference, there is nothing to halve."""
        rows = min(most_rows(count, problem.reference.dim), max(count, _REFERENCE_SAMPLES))
        return (floor_of_samples(features(problem.sample(rows, 1)), reference, count, EXACT),)

    about = {"extractor": None, "reference": "exact moments", "rounding": None}
    judge = Judge(problem.metric, features, reference, hashes, lru_cache(floors), about, samples=exact)
    model = EpsModel(Meter(problem.net(schedule)), schedule)
    given: dict[str, Any] = {"info": problem.info, "judge": judge, "device": device}
    return BenchModel(problem.name, problem.hash, model, problem.shape, 0, "fp32", **given)
