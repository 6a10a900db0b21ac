"""Image to image: sampling that starts at a noise level between data and noise, from a noised image."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from torch import Tensor

from samplers.grid import Grid
from samplers.job import Job, Result, prepare
from samplers.model import EpsModel
from samplers.tasks.states import check_beside, check_tensor, noised


def img2img(
    model: EpsModel,
    image: Tensor,
    sampler: str,
    *,
    strength: float,
    noise: Tensor | None = None,
    **how: Any,
) -> Result:
    """Sample from a noised image: SDEdit (Meng et al. 2022, arXiv:2108.01073, algorithm 1).

    The grid is made as for `sample`, and its last `int(strength * steps)` steps are executed, as diffusers counts them: with
    `steps=10, strength=0.6` sampling starts at the fifth of the 11 nodes and takes 6 steps. An error-controlled sampler that is
    given no grid starts at that share of the time instead. With `strength=1` and explicit `timesteps` or `sigmas`, sampling
    starts at whatever level these start at.

    Args:
        model: the epsilon-model.
        image: (B, ...) in the model's range, such as [-1, 1].
        sampler: a registered name, see `list_samplers()`.
        strength: share of the way that is gone, in (0, 1]; 1 keeps what the schedule's last level leaves of the image.
        noise: (B, ...) the start noise, of standard deviation 1; None: that of `seed` and `indices`.
        how: all other arguments of `samplers.sample`, such as nfe, grid, seed, cond, and the sampler's options. `nfe` is the
            budget of the whole grid; the result says how many calls were made.

    Returns:
        The samples, with the nodes, steps and network calls that were executed.

    Raises:
        ValueError, TypeError: as `samplers.sample`; strength out of range, or so small that no step is left; image or noise on
            another device than the network, or of another shape.
    """
    job = from_strength(prepare(model, sampler, **how), strength)
    check_tensor(model, "image", image)
    if noise is None:
        noise = job.noise(image)
    check_beside("noise", noise, "image", image)
    if noise.shape != image.shape:
        raise ValueError(f"noise must be of the shape of image, {tuple(image.shape)}, got {tuple(noise.shape)}")
    return job.run(model, noised(job.grid, image, noise.to(image.dtype)))


def from_strength(job: Job, strength: float) -> Job:
    """The end of a job's grid that `img2img` goes through; strength and errors as there."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], got {strength!r}")
    if strength == 1:
        return job
    steps = job.grid.steps
    if job.entry.adaptive and steps == 1:
        end, start = job.grid.t[-1], job.grid.t[0]
        return dataclasses.replace(job, grid=Grid(job.grid.schedule, np.array([end + strength * (start - end), end])))
    executed = min(int(steps * strength), steps)
    if executed < 1:
        raise ValueError(
            f"strength={strength:g} of {steps} step{'s'[: steps > 1]} leaves none to take; give a strength of at least "
            f"{1 / steps:.3g}, or more steps"
        )
    return job.tail(executed)
