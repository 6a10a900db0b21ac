"""The images of each step of a run, a function of (seed, step) alone, and the generator of its other random choices."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.checkpoint import content_hash
from distill.method import Batch

_HASHED = 1000


def examples(
    images: Tensor, labels: Tensor | None, null_class: int, seed: int, size: int, step: int, mirror: bool = False
) -> Batch:
    """The images `x0` and `labels` of a step, a function of (seed, step) alone; each epoch is one permutation of the data.

    Args:
        images: (N, C, H, W) uint8, on the CPU.
        labels: (N,) integers below `null_class`, or None, which gives the null class to every row.
        null_class: the label that stands for "no label".
        seed: of the permutations.
        size: of the batch.
        step: from 0.
        mirror: whether half of the images are mirrored.
    """
    epochs, places = np.divmod(np.arange(step * size, (step + 1) * size), len(images))
    orders = {int(epoch): _epoch_order(seed, int(epoch), len(images)) for epoch in np.unique(epochs)}
    index = torch.from_numpy(np.concatenate([order[places[epochs == epoch]] for epoch, order in orders.items()]))
    kept = torch.full((size,), null_class) if labels is None else labels[index].long()
    x0 = images[index].float() / 127.5 - 1.0
    if mirror:
        turned = np.random.Generator(np.random.Philox(key=[seed, 2**32 + step])).random(size) < 0.5
        x0 = torch.where(torch.from_numpy(turned).view(-1, 1, 1, 1), x0.flip(-1), x0)
    return {"x0": x0, "labels": kept}


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of a step's random choices."""
    # torch's CPU generator takes 32 bits: multiples of the golden ratio keep the steps of different seeds apart
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + step) % 2**32)


def data_hash(images: Tensor, labels: Tensor | None) -> str:
    """What identifies the data of a run: 16 hex digits of their number, their labels, and at most 1000 images among them."""
    kept: dict[str, Any] = {"images": images[:: -(-len(images) // _HASHED)], "count": np.array(len(images))}
    return content_hash(kept if labels is None else {**kept, "labels": labels})


def check_data(images: Tensor, labels: Tensor | None, shape: tuple[int, ...], classes: int) -> None:
    """Raise ValueError for images that are not (N, *shape) uint8, or labels that are not (N,) integers below `classes`."""
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != shape or not len(images):
        needed = f"(N, {', '.join(map(str, shape))}) uint8 with N > 0"
        raise ValueError(f"images must be {needed}, got {tuple(images.shape)} {images.dtype}")
    if labels is None:
        return
    whole = not labels.is_floating_point() and labels.shape == (len(images),)
    if not whole or labels.min() < 0 or labels.max() >= classes:
        given = f"{labels.min()} .. {labels.max()}" if whole else f"{tuple(labels.shape)} {labels.dtype}"
        raise ValueError(f"labels must be ({len(images)},) integers in 0 .. {classes - 1}, got {given}")
