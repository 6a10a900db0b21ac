"""From a sampler's name to a plan, and from a plan to samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from samplers.execute import Callback, NoiseSource, check_start
from samplers.grid import Nodes, Points
from samplers.job import Job, prepare
from samplers.model import EpsModel
from samplers.nodes import check_afs, nodes_of
from samplers.plan import Plan
from samplers.registry import get_sampler
from samplers.schedule import Schedule
from samplers.transform import analytical_first_step


def make_plan(
    sampler: str,
    schedule: Schedule,
    *,
    steps: int | None = None,
    nfe: int | None = None,
    timesteps: Nodes | None = None,
    sigmas: Nodes | None = None,
    grid: str | Points | None = None,
    final: str | None = None,
    afs: bool = False,
    **options: Any,
) -> Plan:
    """The plan of a sampler on a schedule.

    Args:
        sampler: a registered name, see `list_samplers()`.
        schedule: the noise schedule.
        steps: number of steps of the grid.
        nfe: budget of network calls; the plan uses as many steps as fit, and never more calls. Calls that are too few for one
            more step of a method of several calls are a last step of lower order, where it has one.
        timesteps: explicit nodes in the schedule's time, end included.
        sigmas: explicit nodes in `sigma_bar = sigma / alpha`, end included; the last may be 0.
        grid: with steps or nfe: a grid's name, or a function `(schedule, n) -> n decreasing times`; None is the
            sampler's recommended grid.
        final: with steps or nfe: "t_min", "zero" or "denoise" (see `grids.make_grid`); None is the grid's own.
        afs: analytical first step: the first network call is replaced by `x / sqrt(alpha^2 + sigma^2)`, which leaves nfe
            another one (see `samplers.transform.analytical_first_step`).
        options: the sampler's own.

    Raises:
        ValueError: an unknown name or option, not exactly one of steps, nfe, timesteps and sigmas, a value out of range, or
            a budget below one step, afs where the first call is the only one or at alpha = 0.
        TypeError: a name, schedule, step count, grid or afs of another type.
    """
    entry = get_sampler(sampler)
    entry.check_options(options)
    check_afs(entry, afs)
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a samplers.schedules schedule, got {type(schedule).__name__}")
    nodes, options = nodes_of(entry, schedule, steps, nfe, timesteps, sigmas, grid, final, options, int(afs))
    plan = entry.plan(nodes, **options)
    return analytical_first_step(plan) if afs else plan


def sample(
    model: EpsModel,
    sampler: str,
    *,
    x_T: Tensor | None = None,
    shape: Sequence[int] | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
    steps: int | None = None,
    nfe: int | None = None,
    timesteps: Nodes | None = None,
    sigmas: Nodes | None = None,
    grid: str | Points | None = None,
    final: str | None = None,
    afs: bool = False,
    noise_source: NoiseSource | None = None,
    callback: Callback | None = None,
    cond: Mapping[str, Any] | None = None,
    check: bool | str = True,
    compile: str | None = None,
    **options: Any,
) -> Tensor:
    """Sample from a model.

    Args:
        model: the epsilon-model.
        sampler: a registered name, see `list_samplers()`.
        x_T: start states (B, ...) in x coordinates, `alpha x_0 + sigma eps` at the first node; or give `shape`.
        shape: (B, ...) of start noise, drawn per sample from seed as `sigma z`, in the network's dtype and device.
        seed: of start noise and step noise, in [0, 2^64).
        indices: (B,) sample indices of this batch; None is 0 .. B-1. Sample i of a seed is the same in any batch, unless the
            sampler is error-controlled: its steps follow from the error of the whole batch, which changes a sample by about
            the tolerance (samples of size 2 by 3e-4 under "rk45" and by 0.03 under "dpm-adaptive-12", at their defaults).
        steps, nfe, timesteps, sigmas, grid, final, afs: as in `make_plan`. An error-controlled sampler passes through the
            nodes, needs none of the first four, and takes nfe as a limit.
        noise_source, callback, cond, check, compile: as in `run_plan`.
        options: the sampler's own.

    Returns:
        Samples (B, ...) at the last node.

    Raises:
        ValueError, TypeError: as `make_plan` and `run_plan`, or not exactly one of x_T and shape.
        SamplingError: NaN or Inf from the network, or an error-controlled sampler that cannot keep to its tolerance.
    """
    run: dict[str, Any] = {"seed": seed, "indices": indices, "noise_source": noise_source, "callback": callback}
    run |= {"cond": cond, "check": check, "compile": compile}
    where: dict[str, Any] = {"steps": steps, "nfe": nfe, "timesteps": timesteps, "sigmas": sigmas, "grid": grid}
    job = prepare(model, sampler, **where, final=final, afs=afs, **run, **options)
    return job.run(model, _start(model, job, x_T, shape)).x


def _start(model: EpsModel, job: Job, x_T: Tensor | None, shape: Sequence[int] | None) -> Tensor:
    """The start states that are given, or noise of that shape in the network's dtype and on its device."""
    if (x_T is None) == (shape is None):
        raise ValueError(f"give exactly one of x_T and shape, got {'none' if x_T is None else 'both'}")
    if x_T is not None:
        check_start(model, x_T)
        return x_T
    size = tuple(shape) if isinstance(shape, Sequence) else ()
    if not size or any(isinstance(n, bool) or not isinstance(n, Integral) or n < 1 for n in size):
        raise ValueError(f"shape must be positive integers (B, ...), got {shape!r}")
    size = tuple(int(n) for n in size)
    weights = model.weights
    like = torch.empty(size) if weights is None else torch.empty(size, dtype=weights.dtype, device=weights.device)
    return job.noise(like).mul_(job.sigma_T)
