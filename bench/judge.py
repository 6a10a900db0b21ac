"""Judges: how samples become a distance, with the features of a network and the statistics of real data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import Tensor

from bench.extractors import load_any_extractor
from bench.features import FeatureExtractor, load_extractor, load_statistics, moments_hash
from bench.metrics import FrechetReference, Moments, frechet_distance
from bench.reference import judge_parts, load_reference_samples, reference_features, reference_of
from bench.shipped import ASSETS
from distill.checkpoint import read_json
from distill.documents import Strict

DIGITS = (1, 28, 28)
FEATURES, MOMENTS = "features", "statistics"  # folders of a judge
SAMPLES = ASSETS / "mnist-reference"
CACHE = Path.home() / ".cache" / "fewstep"


class JudgeSpec(Strict):
    """A judge made of an extractor and real images.

    Attributes:
        extractor: as `bench.extractors.load_any_extractor` takes it, such as "inception:WEIGHTS", "dinov2:FOLDER" or "pixels".
        reference: images, or their statistics, as `bench.reference.reference_of` takes them.
        test: an independent set of real images, for the floor; "" for none.
    """

    extractor: str
    reference: str
    test: str = ""


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
        probabilities: samples to the probabilities of the classes (N, classes), likewise.
        samples: gives the features (M, d) of reference samples, for the metrics that compare with those.
    """

    metric: str
    features: Callable[[Tensor], np.ndarray]
    reference: FrechetReference
    floor: float
    hashes: dict[str, str]
    classify: Callable[[Tensor], np.ndarray] | None = None
    probabilities: Callable[[Tensor], np.ndarray] | None = None
    samples: Callable[[], np.ndarray] | None = None


def judge_of(spec: JudgeSpec, shape: tuple[int, ...], samples: int, device: str) -> Judge:
    """The judge that a suite describes.

    Moments and features of the images are kept in `CACHE`, so that they are computed once.

    Args:
        spec: of the judge.
        shape: (C, H, W) of the samples.
        samples: that will be judged, on which FID's name depends.
        device: of the extractor.

    Raises:
        ValueError, FileNotFoundError: an extractor or images that cannot be used, or do not fit the samples.
        distill.checkpoint.CheckpointError: weights or statistics that cannot be used.
    """
    if len(shape) != 3:
        raise ValueError(f"judge is for images (C, H, W), the model gives samples of shape {shape}")
    extractor = load_any_extractor(spec.extractor, device, (shape[0], shape[1], shape[2]))
    train = reference_of(extractor, spec.reference, CACHE)
    test = reference_of(extractor, spec.test, CACHE, "test") if spec.test else None
    parts = judge_parts(extractor, train, test, samples)
    floor = parts["floor"] or 0.0
    rows = lru_cache(maxsize=1)(lambda: reference_features(extractor, spec.reference, CACHE))
    return Judge(**{**parts, "floor": floor}, samples=rows)


@lru_cache(maxsize=2)
def digit_judge(device: str) -> Judge:
    """The shipped judge of MNIST's digits: a classifier's features against the training set's statistics."""
    extractor = load_extractor("mnist_cnn", device)
    judge = _judge(extractor, *(load_statistics("mnist", split, extractor) for split in ("train", "test")))
    hashes = {**judge.hashes, "samples": str(read_json(SAMPLES / "config.json")["hash"])}
    samples = lru_cache(maxsize=1)(lambda: load_reference_samples(SAMPLES, extractor))
    return replace(judge, hashes=hashes, samples=samples)


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
        probabilities=extractor.probabilities,
    )
