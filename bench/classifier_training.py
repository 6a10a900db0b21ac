"""Train the classifier whose features the benchmark measures distances in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F

from bench.features import ImageClassifier, dequantise
from distill.config import default_dtype


@dataclass(frozen=True)
class ClassifierTraining:
    """How a classifier is trained: Adam under the one-cycle rule of Smith & Topin 2017, arXiv:1708.07120.

    Attributes:
        epochs: passes over the data.
        batch_size: images a step; the rest of an epoch that does not fill a batch is left out of it.
        learning_rate: the peak.
        shift: random translation, up to so many pixels each way.
        rotation: random rotation, up to so many degrees each way.
        scale: random zoom by a factor in 1 - scale .. 1 + scale.
        flip: whether half of the images are mirrored.
        width, hidden, levels: of the `ImageClassifier`.
        seed: of the start weights, the order of the images and the augmentation.
    """

    epochs: int = 10
    batch_size: int = 256
    learning_rate: float = 4e-3
    shift: float = 1.5
    rotation: float = 8.0
    scale: float = 0.08
    flip: bool = False
    width: int = 32
    hidden: int = 64
    levels: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "width", "hidden", "levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 for batch normalisation, got {self.batch_size}")


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    training: ClassifierTraining | None = None,
    progress: bool = True,
    device: str = "cpu",
) -> tuple[ImageClassifier, list[float]]:
    """Train a classifier.

    The result is a function of the arguments, the number of threads, the processor and the version of torch.

    Args:
        images: (N, C, H, H) uint8.
        labels: (N,) integers from 0 on; the largest one gives the number of classes.
        training: None = the shipped extractor's.
        progress: show a bar on the terminal.
        device: on which it is trained.

    Returns:
        The network on the CPU in evaluation mode, its weights rounded to half precision, and the cross-entropy of every step.

    Raises:
        ValueError: images or labels of another shape, dtype or range, or fewer than one batch.
    """
    training = training or ClassifierTraining()
    _check(images, labels, training)
    generator = torch.Generator().manual_seed(training.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        channels, size, classes = images.shape[1], images.shape[2], int(labels.max()) + 1
        network = ImageClassifier(training.width, training.hidden, channels, size, classes, training.levels)
    x, y = torch.from_numpy(images), torch.from_numpy(labels).long()
    losses = _fit(network.to(device), x, y, training, generator, progress)
    return calibrate(round_to_half(network.cpu().eval()), images), losses


@torch.no_grad()
def calibrate(network: ImageClassifier, images: np.ndarray, batch_size: int = 250) -> ImageClassifier:
    """Set the mean and standard deviation of the features to those of images (N, C, H, H) uint8, in half precision."""
    batches = torch.from_numpy(images).split(batch_size)
    pooled = torch.cat([network.pooled(dequantise(batch)) for batch in batches]).double()
    std = pooled.std(0)
    network.feature_mean.copy_(pooled.mean(0).half())
    network.feature_std.copy_(torch.where(std > 1e-3, std, torch.ones_like(std)).half())  # a dead unit stays 0
    return network


def round_to_half(network: ImageClassifier) -> ImageClassifier:
    """Round every weight to half precision in place, so that what is measured is what is saved."""
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.half())
    return network


def augment(x: Tensor, training: ClassifierTraining, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W) in [-1, 1], each under its own rotation, zoom, shift and reflection; the border is black."""
    draws = torch.rand(4, len(x), generator=generator) * 2 - 1
    angle, zoom = torch.deg2rad(draws[0] * training.rotation), 1 + draws[1] * training.scale
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    shift = draws[2:] * training.shift * 2 / x.shape[-1]  # affine_grid's coordinates span 2 over the image
    matrix = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    if training.flip:
        matrix[:, :, 0] *= torch.where(torch.rand(len(x), generator=generator) < 0.5, -1.0, 1.0)[:, None]
    grid = F.affine_grid(matrix.to(x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # grid_sample pads with 0; black is -1


def _fit(
    network: ImageClassifier,
    images: Tensor,
    labels: Tensor,
    training: ClassifierTraining,
    generator: torch.Generator,
    progress: bool,
) -> list[float]:
    per_epoch = len(images) // training.batch_size
    optimizer = torch.optim.Adam(network.parameters(), lr=training.learning_rate)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=training.epochs * per_epoch
    )
    losses: list[float] = []
    device = network.head.weight.device
    network.train()
    with _bar(disable=not progress) as bar:
        task = bar.add_task("training the classifier", total=training.epochs * per_epoch, loss=float("nan"))
        for _ in range(training.epochs):
            order = torch.randperm(len(images), generator=generator)
            for rows in order[: per_epoch * training.batch_size].split(training.batch_size):
                x = augment(dequantise(images[rows].to(device)), training, generator)
                losses.append(_step(network, x, labels[rows].to(device), optimizer))
                cycle.step()
                bar.update(task, advance=1, loss=losses[-1])
    return losses


def _step(network: ImageClassifier, x: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer) -> float:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=default_dtype(x.device) == "bf16"):
        logits = network(x)
    loss = F.cross_entropy(logits.float(), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def _bar(disable: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=disable)


def _check(images: np.ndarray, labels: np.ndarray, training: ClassifierTraining) -> None:
    if images.ndim != 4 or images.shape[2] != images.shape[3] or images.dtype != np.uint8:
        raise ValueError(f"images must be (N, C, H, H) uint8, got {images.shape} {images.dtype}")
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be ({len(images)},) integers, got {labels.shape} {labels.dtype}")
    if len(images) < training.batch_size:
        raise ValueError(f"images must fill a batch of {training.batch_size}, got {len(images)}")
    if labels.min() < 0:
        raise ValueError(f"labels must be at least 0, got {labels.min()}")
