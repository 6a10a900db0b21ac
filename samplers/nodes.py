"""From what a user says of the steps, a count, a budget of network calls or the nodes themselves, to a sampler's grid."""

from __future__ import annotations

from typing import Any

import numpy as np

from samplers.grid import Grid, Nodes, Points, from_sigmas, from_timesteps, make_grid, points_of
from samplers.grid_points import logsnr
from samplers.registry import Sampler
from samplers.schedule import Schedule
from samplers.solvers.exponential import mixed_orders


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

    Raises:
        ValueError, TypeError: as `make_plan`.
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


def check_afs(entry: Sampler, afs: bool) -> None:
    """Raise TypeError or ValueError where an analytical first step cannot be."""
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
