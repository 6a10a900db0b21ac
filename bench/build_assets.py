"""Train the shipped feature extractor and compute the reference statistics again: `python -m bench.build_assets`."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from bench.classifier_training import ClassifierTraining, train_classifier
from bench.data import DataError, ImageData, load_images
from bench.features import (
    EXTRACTORS,
    STATISTICS,
    FeatureExtractor,
    content_hash,
    load_extractor,
    save_extractor,
    save_statistics,
)
from bench.judge import SAMPLES, TEST_SAMPLES
from bench.metrics import Moments, frechet_distance
from bench.reference import save_reference_samples
from bench.shipped import ASSETS

NAME = "mnist_cnn"
REFERENCE_SAMPLES = 5000


def build_assets(
    train_parquet: str | Path,
    test_parquet: str | Path,
    out: str | Path = ASSETS,
    training: ClassifierTraining | None = None,
) -> dict[str, Any]:
    """Write the extractor `mnist_cnn`, the statistics `mnist`, and features of some training and all test images under `out`.

    Args:
        train_parquet: the training images of MNIST with labels, in any form that `load_images` reads.
        test_parquet: the test images, likewise.
        out: the folder that gets `mnist-features/`, `mnist-stats/`, `mnist-reference/` and `mnist-test/`, which are replaced.
        training: None = the shipped extractor's.

    Returns:
        The extractor's hash, its accuracy on the test images, and the Frechet distance between the two splits.

    Raises:
        DataError: unreadable data, or data without labels.
    """
    files = {"train": Path(train_parquet), "test": Path(test_parquet)}
    data = {split: load_images(file) for split, file in files.items()}
    extractor = build_extractor(files, data, Path(out) / EXTRACTORS[NAME].name, training or ClassifierTraining())
    moments = build_statistics(files, data, Path(out) / STATISTICS["mnist"].name, extractor)
    for split, folder in (("train", SAMPLES), ("test", TEST_SAMPLES)):
        build_samples(split, files[split], data[split], Path(out) / folder.name, extractor)
    return {
        "hash": extractor.hash,
        "test_accuracy": extractor.info["test_accuracy"],
        "frechet_distance": frechet_distance(moments["train"], moments["test"]),
    }


def build_extractor(
    files: dict[str, Path], data: dict[str, ImageData], folder: Path, training: ClassifierTraining
) -> FeatureExtractor:
    """Train on `data["train"]`, measure on `data["test"]`, save in `folder`."""
    labels = {split: _labels(data[split], file) for split, file in files.items()}
    network, _ = train_classifier(data["train"].images, labels["train"], training)
    save_extractor(folder, NAME, network, {})
    predicted = load_extractor(folder).classify(data["test"].images)
    info = {
        "test_accuracy": float(np.mean(predicted == labels["test"])),
        "training": asdict(training),
        "threads": torch.get_num_threads(),
        "data": {split: describe(data[split], file) for split, file in files.items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    save_extractor(folder, NAME, network, info)
    return load_extractor(folder)


def build_statistics(
    files: dict[str, Path], data: dict[str, ImageData], folder: Path, extractor: FeatureExtractor
) -> dict[str, Moments]:
    """Moments of the features of each split, saved in `folder`."""
    moments = {split: Moments.of(extractor.features(images.images)) for split, images in data.items()}
    save_statistics(folder, extractor, moments, {split: describe(data[split], file) for split, file in files.items()})
    return moments


def build_samples(split: str, file: Path, data: ImageData, folder: Path, extractor: FeatureExtractor) -> None:
    """Features of images of a split, saved in `folder`: the first of the training images, all test images."""
    some = data.images[:REFERENCE_SAMPLES] if split == "train" else data.images
    about = {"split": split, "first": len(some), **describe(data, file)}
    save_reference_samples(folder, extractor, extractor.features(some), about)


def describe(data: ImageData, file: Path) -> dict[str, Any]:
    """What identifies a data set: the hash of its pixels, whatever file they come in, and the digest of this file."""
    return {
        "images": len(data),
        "hash": content_hash({"images": data.images}),
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }


def _labels(data: ImageData, file: Path) -> np.ndarray:
    if data.labels is None:
        raise DataError(f"{file} has no labels; a classifier needs them")
    return data.labels


@click.command()
@click.option("--train", required=True, type=click.Path(exists=True, path_type=Path), help="MNIST training images.")
@click.option("--test", required=True, type=click.Path(exists=True, path_type=Path), help="MNIST test images.")
@click.option("--out", default=ASSETS, show_default=True, type=click.Path(path_type=Path), help="Folder of the assets.")
@click.option("--epochs", default=ClassifierTraining.epochs, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=ClassifierTraining.seed, show_default=True)
@click.option(
    "--threads", default=1, show_default=True, type=click.IntRange(min=1), help="The weights' last digits depend on it."
)
def main(train: Path, test: Path, out: Path, epochs: int, seed: int, threads: int) -> None:
    """Train the shipped feature extractor and compute the reference statistics of MNIST."""
    torch.set_num_threads(threads)
    try:
        report = build_assets(train, test, out, ClassifierTraining(epochs=epochs, seed=seed))
    except DataError as error:
        raise click.ClickException(str(error)) from error
    for name, value in report.items():
        click.echo(f"{name}: {value}")


if __name__ == "__main__":
    main()
