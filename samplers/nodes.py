"""From what a user says of the steps, a count, a budget of network calls or the nodes themselves, to a sampler's grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from numbers import Integral
from typing import Any

import numpy as np

from samplers.errors import BudgetError
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
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
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
    """The longest grid whose plan takes at most `nfe` calls beside the `spared` ones, as the plans themselves count them.

    A step may take fewer calls than a full one (from alpha = 0, to sigma = 0, or where eta > 1 asks for noise only) and more (at
    a restart). Where the orders of the steps are given, so is their number. Calls that are too few for one more full step are a
    step of lower order, the last one above clean data, for every sampler with the option `orders`.
    """
    final = points_of(grid).final if final is None else final
    at_noise, at_data = int(_starts_at_noise(schedule, grid)), int(final != "t_min")
    extra = int(final == "denoise")  # the call more that "denoise" takes
    budget, given = nfe + spared, options.get("orders")
    mixed = entry.mixed_orders and given is None

    def made(size: int, last: int | None = None) -> tuple[Grid, dict[str, Any]]:
        """With `size` steps, the last of them of order `last`, or with steps whose orders add up to `size`."""
        if not mixed:
            nodes = make_grid(schedule, grid, size, final)
            return nodes, options if last is None else {**options, "orders": _lowered(nodes, calls, last, at_data)}
        orders = [1] * at_noise + mixed_orders(entry.order, size - at_noise)
        if at_data and orders[-1] != 1:
            orders = [1] * at_noise + mixed_orders(entry.order, size - at_noise - 1) + [1]
        return _mixed_grid(schedule, orders, grid, final), {**options, "orders": orders}

    @cache
    def room(size: int, last: int | None = None) -> int:
        nodes, chosen = made(size, last)
        return budget - entry.plan(nodes, **chosen).nfe

    if mixed:
        calls, least, most, guess = 1, 1 + extra, entry.order * budget, budget
    elif isinstance(given, Sequence):
        calls = 1
        least = most = guess = max(len(given) - extra, 1)
    else:
        calls, least, most = entry.calls_with(options), 1, budget - extra
        guess = (budget + (calls - 1) * (at_noise + at_data)) // calls - extra
    size = _largest(room, least, most, guess, calls)
    if fills := not mixed and given is None and "orders" in entry.options:
        left = room(size) if size >= least else budget
        for last in range(min(left, calls - 1), 0, -1):
            if room(size + 1, last) >= 0:
                return made(size + 1, last)
    if size < least:
        fewest = nfe - room(least, 1 if fills else None)
        raise BudgetError(f"nfe must be at least {fewest} for {entry.name!r} here, got {nfe}")
    return made(size)


def _lowered(grid: Grid, order: int, last: int, at_data: int) -> list[int]:
    """Step orders: `last` for the last step, or for the one before that to clean data, and `order` for all others.

    There, and on a grid of one step more, the calls that are left over do most: on Gaussian mixtures the distance to the exact
    solutions falls to 0.19 of what it is without them (`heun` and `dpm2` at 4 to 12 calls, geometric mean over four grids and
    three schedules); as the first step to 0.31, and in steps as long as their calls to 0.32 (last) and 0.50 (first).
    """
    orders = [order] * grid.steps
    orders[max(grid.steps - 1 - at_data, 0)] = last
    return orders


def _largest(room: Callable[[int], int], least: int, most: int, guess: int, each: int) -> int:
    """The largest size from `least` to `most` that leaves `room(size) >= 0`, or `least - 1` where none does.

    Room falls as the size grows, by `each` for one more as a rule: that leads from a guess to the next, and halving where it
    leads out of the sizes that are left. If room ever rose, the size found would still be one whose next has none.
    """
    fits, over = least - 1, most + 1
    while over - fits > 1:
        size = guess if fits < guess < over else (fits + over) // 2
        left = room(size)
        if left >= 0:
            fits, guess = size, size + max(1, left // each)
        else:
            over, guess = size, size + left // each
    return fits


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
