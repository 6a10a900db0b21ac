"""Judges: how samples become a distance, with the features of a network and the statistics of real data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bench.extractors import load_any_extractor
from bench.features import STATISTICS, FeatureExtractor, load_extractor, load_statistics
from bench.floor import Floor, floor_of_halves, floor_of_moments, floor_of_samples, most_rows
from bench.metrics import FrechetReference
from bench.reference import judge_parts, load_reference_samples, reference_features, reference_of, some_images
from bench.shipped import ASSETS
from distill.checkpoint import read_json
from distill.documents import Strict

DIGITS = (1, 28, 28)
FEATURES, MOMENTS = "features", "statistics"  # folders of a judge
SAMPLES, TEST_SAMPLES = ASSETS / "mnist-reference", ASSETS / "mnist-test"
FOLDER_SAMPLES, FOLDER_TEST_SAMPLES = "samples", "test-samples"  # the same of a judge's folder
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
        hashes: what identifies extractor and reference.
        floors: the floors of the distance at a number of samples, see `bench.floor`; none where no real data is at hand.
        about: what a reader of a table needs to know of it: extractor, reference with its split, rounding.
        classify: samples to class labels (N,), where there are classes.
        probabilities: samples to the probabilities of the classes (N, classes), likewise.
        samples: gives the features (M, d) of reference samples, for the metrics that compare with those.
    """

    metric: str
    features: Callable[[Tensor], np.ndarray]
    reference: FrechetReference
    hashes: dict[str, str]
    floors: Callable[[int], tuple[Floor, ...]] = lambda count: ()
    about: Mapping[str, Any] = field(default_factory=dict)
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
    parts = judge_parts(extractor, train, samples)

    def floors(count: int) -> tuple[Floor, ...]:
        """Of the images that the floors look at, features are computed and kept; of statistics nothing but the whole is known."""
        found, rows = [], most_rows(count, extractor.dims)
        if test is not None and (images := some_images(spec.test, rows)) is not None:
            features = reference_features(extractor, images, CACHE, "test")
            found.append(floor_of_samples(features, parts["reference"], count))
        elif test is not None:
            found.append(floor_of_moments(test, parts["reference"]))
        if (images := some_images(spec.reference, rows)) is not None and len(images) >= 4:
            found.append(floor_of_halves(reference_features(extractor, images, CACHE), count))
        return tuple(found)

    about = {"reference": {"data": spec.reference, "split": "train", "images": train.count}, "test": spec.test or None}
    return Judge(
        **{**parts, "about": {**parts["about"], **about}},
        floors=lru_cache(floors),
        samples=lru_cache(maxsize=1)(lambda: reference_features(extractor, spec.reference, CACHE)),
    )


@lru_cache(maxsize=2)
def digit_judge(device: str) -> Judge:
    """The shipped judge of MNIST's digits: a classifier's features against the training set's statistics."""
    return _judge(load_extractor("mnist_cnn", device), STATISTICS["mnist"], SAMPLES, TEST_SAMPLES)


@lru_cache(maxsize=2)
def folder_judge(folder: Path, device: str) -> Judge:
    """A judge made for other images: `folder/features` is an extractor, `folder/statistics` has the splits train and test.

    Features of images of the splits may lie in `folder/samples` and `folder/test-samples`, as
    `bench.reference.save_reference_samples` writes them: they are what further metrics and the floors are made of.

    Raises:
        distill.checkpoint.CheckpointError: either cannot be used, or they do not belong together.
    """
    extractor = load_extractor(folder / FEATURES, device)
    return _judge(extractor, folder / MOMENTS, folder / FOLDER_SAMPLES, folder / FOLDER_TEST_SAMPLES)


def _judge(extractor: FeatureExtractor, statistics: Path, samples: Path, test_samples: Path) -> Judge:
    """A judge on files, of which those of samples may be absent."""
    train, test = (load_statistics(statistics, split, extractor) for split in ("train", "test"))
    parts = {**judge_parts(extractor, train, 1), "metric": f"fd_{extractor.name}"}  # of no network that FID is on
    of_reference, of_test = (
        lru_cache(maxsize=1)(lambda folder=folder: load_reference_samples(folder, extractor))
        if folder.exists()
        else None
        for folder in (samples, test_samples)
    )

    def floors(count: int) -> tuple[Floor, ...]:
        reference = parts["reference"]
        whole = floor_of_samples(of_test(), reference, count) if of_test else floor_of_moments(test, reference)
        return (whole, floor_of_halves(of_reference(), count)) if of_reference else (whole,)

    hashes = dict(parts["hashes"])
    if of_reference:
        hashes["samples"] = str(read_json(samples / "config.json")["hash"])
    splits = read_json(statistics / "config.json")["splits"]
    about = {"reference": {"split": "train", **splits["train"]}, "test": {"split": "test", **splits["test"]}}
    return Judge(
        **{**parts, "hashes": hashes, "about": {**parts["about"], **about}},
        floors=lru_cache(floors),
        samples=of_reference,
    )
