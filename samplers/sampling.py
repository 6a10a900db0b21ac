"""From a sampler's name to a plan, and from a plan to samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samplers.execute import Callback, NoiseSource, check_start, run_plan, sample_indices
from samplers.grid import Grid, Nodes, Points, from_sigmas, from_timesteps, make_grid, points_of
from samplers.grid_points import logsnr
from samplers.model import EpsModel
from samplers.noise import check_seed, standard_normal
from samplers.plan import Plan
from samplers.registry import Sampler, get_sampler
from samplers.schedule import Schedule
from samplers.solvers.exponential import mixed_orders
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
        nfe: budget of network calls; the plan uses as many steps as fit, and never more calls.
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
        TypeError: a schedule, step count, grid or afs of another type.
    """
    entry = get_sampler(sampler)
    entry.check_options(options)
    _check_afs(entry, afs)
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
        indices: (B,) sample indices of this batch; None is 0 .. B-1. Sample i of a seed is the same in any batch.
        steps, nfe, timesteps, sigmas, grid, final, afs: as in `make_plan`. An error-controlled sampler passes through the
            nodes, needs none of the first four, and takes nfe as a limit.
        noise_source, callback, cond, check, compile: as in `run_plan`.
        options: the sampler's own.

    Returns:
        Samples (B, ...) at the last node.

    Raises:
        ValueError, TypeError: as `make_plan` and `run_plan`, or not exactly one of x_T and shape.
        SamplingError: NaN or Inf from the network.
    """
    if not isinstance(model, EpsModel):
        raise TypeError(f"model must be an EpsModel, got {type(model).__name__}; wrap it: EpsModel(net, schedule)")
    entry = get_sampler(sampler)
    where: dict[str, Any] = {"steps": steps, "nfe": nfe, "timesteps": timesteps, "sigmas": sigmas, "grid": grid}
    if entry.integrate is None:
        plan = make_plan(sampler, model.schedule, **where, final=final, afs=afs, **options)
        start = _start(model, x_T, shape, seed, indices, plan.sigma_T)
        drawn: dict[str, Any] = {"seed": seed, "indices": indices, "noise_source": noise_source}
        return run_plan(plan, model, start, **drawn, callback=callback, cond=cond, check=check, compile=compile)
    entry.check_options(options)
    _check_afs(entry, afs)
    for name, value, usual in (
        ("compile", compile, None),
        ("noise_source", noise_source, None),
        ("check", check, True),
    ):
        if value is not usual:
            raise ValueError(
                f"sampler {sampler!r} chooses its steps while it samples: {name} must be {usual}, got {value!r}"
            )
    nodes, _ = nodes_of(entry, model.schedule, **where, final=final, options=options, spared=0)
    start = _start(model, x_T, shape, seed, indices, float(nodes.sigma[0]))
    if not len(start):  # an error norm over nothing controls nothing
        return start.clone()
    return entry.integrate(model, nodes, start, nfe=nfe, callback=callback, cond=cond, **options)


def nodes_of(
    entry: Sampler,
    schedule: Schedule,
    steps: int | None,
    nfe: int | None,
    timesteps: Nodes | None,
    sigmas: Nodes | None,
    grid: str | Points | None,
    final: str | None,
    options: dict[str, Any],
    spared: int,
) -> tuple[Grid, dict[str, Any]]:
    """The grid that the arguments of `make_plan` describe, and the options with the step orders that a budget implies.

    `spared` is the number of calls of the sampler's plan that afs does without.
    """
    counts = {"steps": steps, "nfe": nfe}
    given = [name for name, value in {**counts, "timesteps": timesteps, "sigmas": sigmas}.items() if value is not None]
    if len(given) != 1 and not (entry.adaptive and not given):
        raise ValueError(f"give exactly one of steps, nfe, timesteps and sigmas, got {', '.join(given) or 'none'}")
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, np.integer))):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, extra in (("grid", grid), ("final", final)):
        if extra is not None and (timesteps is not None or sigmas is not None):
            raise ValueError(
                f"{name} goes with steps or nfe; explicit {given[0]} are the whole grid, got {name}={extra!r}"
            )
    if timesteps is not None:
        return from_timesteps(schedule, timesteps), options
    if sigmas is not None:
        return from_sigmas(schedule, sigmas), options
    grid = entry.grid_on(schedule) if grid is None else grid
    if nfe is None or entry.adaptive:
        return make_grid(schedule, grid, int(steps or 1), final), options
    return _budgeted(entry, schedule, int(nfe), grid, final, options, spared)


def _check_afs(entry: Sampler, afs: bool) -> None:
    if not isinstance(afs, bool):
        raise TypeError(f"afs must be True or False, got {afs!r}")
    if afs and entry.adaptive:
        raise ValueError(f"afs=True replaces the first network call of a plan, and sampler {entry.name!r} has no plan")


def _budgeted(
    entry: Sampler,
    schedule: Schedule,
    nfe: int,
    grid: str | Points,
    final: str | None,
    options: dict[str, Any],
    spared: int,
) -> tuple[Grid, dict[str, Any]]:
    """The longest grid whose plan takes at most `nfe` calls beside the `spared` ones.

    A step from alpha = 0 and a step to sigma = 0 are first order and take one call, whatever a full step takes; no other
    step takes fewer calls than a full one.
    """
    final = points_of(grid).final if final is None else final
    cheap_first, cheap_last = int(_starts_at_noise(schedule, grid)), int(final != "t_min")
    extra = int(final == "denoise")  # the call more that "denoise" takes
    budget = nfe + spared
    mixed = entry.mixed_orders and options.get("orders") is None
    if mixed:
        orders = [1] * cheap_first + mixed_orders(entry.order, budget - cheap_first)
        if cheap_last and orders[-1] != 1:
            orders = [1] * cheap_first + mixed_orders(entry.order, budget - cheap_first - 1) + [1]
        if len(orders) > extra:
            return _mixed_grid(schedule, orders, grid, final), {**options, "orders": orders}
        raise ValueError(f"nfe must be at least {1 + extra - spared} for {entry.name!r} here, got {nfe}")
    calls = entry.calls_with(options)
    most = (budget + (calls - 1) * (cheap_first + cheap_last)) // calls - extra
    for steps in range(most, 0, -1):  # fewer where the plan has steps of more calls, as only the plan itself knows
        nodes = make_grid(schedule, grid, steps, final)
        if entry.plan(nodes, **options).nfe <= budget:
            return nodes, options
    fewest = entry.plan(make_grid(schedule, grid, 1, final), **options).nfe - spared
    raise ValueError(f"nfe must be at least {fewest} for {entry.name!r} here, got {nfe}")


def _starts_at_noise(schedule: Schedule, grid: str | Points) -> bool:
    """Whether a grid starts where alpha = 0; "leading", for one, starts lower."""
    return bool(schedule.alpha(schedule.t_max) == 0 and make_grid(schedule, grid, 1, "t_min").alpha[0] == 0)


def _mixed_grid(schedule: Schedule, orders: list[int], grid: str | Points, final: str) -> Grid:
    """Nodes for steps of unequal order: equal steps in lam, or else steps as long as the calls they take.

    The reference implementation of DPM-Solver (arXiv:2206.00927, appendix D) does the same.
    """
    extra = int(final == "denoise")
    if points_of(grid).points is logsnr:
        return make_grid(schedule, grid, len(orders) - extra, final)
    fine = make_grid(schedule, grid, sum(orders) - extra, final)
    return Grid(schedule, fine.t[np.cumsum([0, *orders])])


def _start(
    model: EpsModel, x_T: Tensor | None, shape: Sequence[int] | None, seed: int, indices: Tensor | None, sigma: float
) -> Tensor:
    if (x_T is None) == (shape is None):
        raise ValueError(f"give exactly one of x_T and shape, got {'none' if x_T is None else 'both'}")
    check_seed(seed)
    if x_T is not None:
        check_start(model, x_T)
        return x_T
    size = tuple(shape) if isinstance(shape, Sequence) else ()
    if not size or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(f"shape must be positive integers (B, ...), got {shape!r}")
    weights = model.weights
    dtype, device = (torch.float32, torch.device("cpu")) if weights is None else (weights.dtype, weights.device)
    return standard_normal(seed, sample_indices(indices, size[0]), 0, size[1:], dtype, device).mul_(sigma)
