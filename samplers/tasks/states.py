"""What tasks ask of the states and images that they are given, and a few sums over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samplers.execute import check_start
from samplers.grid import Grid
from samplers.model import EpsModel, Scalar


def check_tensor(model: EpsModel, name: str, value: Tensor) -> None:
    """Raise TypeError or ValueError where an argument is no batch of states that the model's network can take."""
    check_start(model, value, name)
    if not len(value):
        raise ValueError(f"{name} must be (B, ...) with B > 0, got shape {tuple(value.shape)}")


def check_beside(name: str, value: Tensor, other: str, beside: Tensor) -> None:
    """Raise TypeError or ValueError where an argument is no tensor, or not on the device of another one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.device != beside.device:
        raise ValueError(f"{name} is on {value.device}, {other} on {beside.device}; move one of them")


def broadcasts(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether a tensor of a shape broadcasts against one of another, which keeps its shape."""
    try:
        return torch.broadcast_shapes(tuple(shape), tuple(other)) == tuple(other)
    except RuntimeError:
        return False


def noised(grid: Grid, x0: Tensor, noise: Tensor, node: int = 0) -> Tensor:
    """The state `alpha x0 + sigma noise` at a node."""
    return x0 * float(grid.alpha[node]) + noise * float(grid.sigma[node])


def per_sample(value: Scalar, like: Tensor) -> Scalar:
    """A number, or (B, ...) of one number a sample, so that it broadcasts over `like` (B, ...) in its dtype."""
    return value.to(like.dtype).view(-1, *[1] * (like.ndim - 1)) if isinstance(value, Tensor) else value


def rmse(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square difference of each sample, (B,) float64."""
    return (a.double() - b.double()).view(len(a), -1).square().mean(1).sqrt()
