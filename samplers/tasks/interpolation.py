"""Interpolation between samples: along an arc of start noise, each point of which the sampler makes an image of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from samplers.errors import unknown
from samplers.job import Job, prepare
from samplers.model import EpsModel
from samplers.tasks.inversion import up, way_back
from samplers.tasks.states import check_beside, check_tensor

_PARALLEL = 1e-6  # sine of the angle below which the arc is a straight line


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """The point at `weight` of the way from a to b along the arc through both, of each sample.

    Shoemake 1985, doi:10.1145/325165.325242. In many dimensions noises are nearly orthogonal and of one length, which points on
    the arc between them keep, and points on the straight line do not: they are too short to be noise (Song et al. 2021,
    arXiv:2010.02502, appendix D.5). Ends of unequal length change length along the way; parallel ones are joined by a line.

    Args:
        a, b: (B, ...).
        weight: 0 gives a, 1 gives b.
    """
    x, y = (v.double().flatten(1) for v in (a, b))
    unit_x, unit_y = (v / v.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny) for v in (x, y))
    # exact near 0 and near pi, unlike the arc cosine of the product
    angle = 2.0 * torch.atan2((unit_x - unit_y).norm(dim=1), (unit_x + unit_y).norm(dim=1))[:, None]
    sine = torch.sin(angle)
    arc = (torch.sin((1.0 - weight) * angle) * x + torch.sin(weight * angle) * y) / sine
    line = torch.lerp(x, y, weight)
    return torch.where(sine < _PARALLEL, line, arc).to(a.dtype).view_as(a)


def lerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """The point at `weight` of the way from a to b (B, ...) on the straight line."""
    return torch.lerp(a, b, weight)


WAYS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"slerp": slerp, "lerp": lerp}


def interpolate(
    model: EpsModel, start: Tensor, end: Tensor, sampler: str, *, frames: int = 8, way: str = "slerp", **how: Any
) -> Tensor:
    """Samples from noises between two.

    A stochastic sampler adds the same noise to every frame of a row, that of the row's index, so that only the start changes.

    Args:
        model: the epsilon-model.
        start, end: (B, ...) start states, as `x_T` of `samplers.sample`.
        sampler: a registered name.
        frames: at least 2, both ends included.
        way: "slerp" or "lerp".
        how: all other arguments of `samplers.sample`; cond with a row for each of the B, which all its frames share.

    Returns:
        (B, frames, ...): a row from the sample of `start` to that of `end`.

    Raises:
        ValueError, TypeError: as `samplers.sample`; frames below 2, an unknown way, or ends of unequal shape or device.
    """
    job = prepare(model, sampler, **how)
    check_tensor(model, "start", start)
    return _film(model, start, end, job, frames, way)


def interpolate_images(
    model: EpsModel, start: Tensor, end: Tensor, sampler: str, *, frames: int = 8, way: str = "slerp", **how: Any
) -> Tensor:
    """Images between two: both are inverted to noise, and `interpolate` goes between the noises.

    Args:
        model: the epsilon-model.
        start, end: (B, ...) images in the model's range.
        sampler: a registered name, of a deterministic sampler.
        frames, way: as in `interpolate`.
        how: all other arguments of `samplers.sample`; the first and last frame are the images up to the round trip's error, which
            `reconstruct` reports.

    Returns:
        (B, frames, ...).

    Raises:
        ValueError, TypeError: as `interpolate` and `invert`.
    """
    job = way_back(model, sampler, how)
    return _film(model, up(model, start, job).x, up(model, end, job).x, job, frames, way)


def _film(model: EpsModel, start: Tensor, end: Tensor, job: Job, frames: int, way: str) -> Tensor:
    if way not in WAYS:
        raise unknown("way", way, WAYS)
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 2:
        raise ValueError(f"frames must be a whole number, at least 2, got {frames!r}")
    check_beside("end", end, "start", start)
    if end.shape != start.shape:
        raise ValueError(f"end must be of the shape of start, {tuple(start.shape)}, got {tuple(end.shape)}")
    between = (WAYS[way](start, end, k / (frames - 1)) for k in range(frames))
    return torch.stack([job.run(model, x).x for x in between], 1)
