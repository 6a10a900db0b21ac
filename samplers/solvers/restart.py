"""Restart sampling: an ODE solver that goes back up an interval of noise levels by adding noise, and down again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from samplers.draft import Draft
from samplers.errors import check_amount
from samplers.grid import Grid
from samplers.plan import Plan
from samplers.solvers.first_order import Level, heun_step, node_level

Interval = tuple[float, float, int, int]
_PUBLISHED: tuple[Interval, ...] = ((0.06, 0.30, 2, 2),)
_FORM = "(sigma_lo, sigma_hi, repeats, steps)"
_RHO = 7.0
# sigma_hi, as alpha = 1 / sigma_hi in t near 1 must keep its digits where a schedule starts at alpha = 0; and counts
_LARGEST, _MOST = 1e6, 1000


def restart(grid: Grid, *, restarts: Sequence[Interval] | None = None, s_noise: float = 1.0) -> Plan:
    """Heun's method, which at chosen noise levels adds noise up to a higher one and comes down again, several times.

    Xu et al. 2023, arXiv:2306.14878, section 3. The noise contracts the errors made so far; the way down is Heun's method
    on nodes uniform in `sigma_bar^(1/7)` (Karras et al. 2022, arXiv:2206.00364, equation 5). All of a restart belongs to the
    step that reaches its lower end. Under `nfe=` an odd call stays unused: one more step would move the node where a restart
    begins.

    Args:
        grid: the nodes.
        restarts: intervals `(sigma_lo, sigma_hi, repeats, steps)` in sigma_bar, up to 1e6. Each begins at the node nearest to
            sigma_lo among those that a step of Heun's method ends at, and takes `2 * repeats * steps` calls more. None is the
            interval published for CIFAR-10 at 18 steps (table 3, whose N_restart counts nodes), (0.06, 0.30, 2, 2), where it
            fits into the grid: where that node lies below sigma_hi and the first one does not.
        s_noise: factor on the noise's standard deviation, at least 0; the authors' code takes 1.003 for images.

    Raises:
        ValueError: also where an interval that was asked for does not fit into the grid.
    """
    check_amount("s_noise", s_noise)
    p = Draft(grid, "eps")
    after = _by_node(p, restarts)
    x = p.x
    for i in p.steps:
        ways = after.get(i + 1, [])
        x = heun_step(p, x, node_level(p, i), node_level(p, i + 1), None if ways else i + 1)
        for k, levels in enumerate(ways):
            top, bottom = levels[0], levels[-1]
            added = top.alpha * math.sqrt((top.sigma / top.alpha) ** 2 - (bottom.sigma / bottom.alpha) ** 2)
            x = p.combine(None, (x, top.alpha / bottom.alpha), (p.noise(), added * s_noise))
            for j in range(len(levels) - 1):
                last = k == len(ways) - 1 and j == len(levels) - 2
                x = heun_step(p, x, levels[j], levels[j + 1], i + 1 if last else None)
    return p.plan()


def _by_node(p: Draft, restarts: Sequence[Interval] | None) -> dict[int, list[list[Level]]]:
    """For each node at which restarts begin, the ways down to it, one for each repeat."""
    sigma_bar = np.exp(-p.grid.lam)
    nodes = [i + 1 for i in p.steps if p.sigma[i + 1] > 0]
    ways: dict[int, list[list[Level]]] = {}
    for k, (low, high, repeats, steps) in enumerate(_PUBLISHED if restarts is None else _checked(restarts)):
        node = nodes[np.abs(sigma_bar[nodes] - low).argmin()] if nodes else 0
        if sigma_bar[node] < high <= sigma_bar[0]:
            points = np.linspace(high ** (1 / _RHO), sigma_bar[node] ** (1 / _RHO), steps + 1)[:-1] ** _RHO
            t = p.grid.schedule.t_of_lam(-np.log(points))
            columns = (t, p.grid.schedule.alpha(t), p.grid.schedule.sigma(t))
            inner = [Level(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]
            ways.setdefault(node, []).extend([[*inner, node_level(p, node)]] * repeats)
        elif restarts is not None:
            raise ValueError(
                f"restarts[{k}] does not fit into the grid: the node nearest to sigma_lo={low:g} is at {sigma_bar[node]:g} and "
                f"the first at {sigma_bar[0]:g}, but sigma_hi={high:g}; take more steps or another interval"
            )
    return ways


def _checked(restarts: Sequence[Interval]) -> Sequence[Interval]:
    if not isinstance(restarts, Sequence) or isinstance(restarts, str):
        raise ValueError(f"restarts must be a sequence of {_FORM}, got {restarts!r}")
    for k, given in enumerate(restarts):
        if not isinstance(given, Sequence) or len(given) != 4 or not _is_interval(*given):
            wanted = f"{_FORM} with 0 <= sigma_lo < sigma_hi <= {_LARGEST:g} and counts from 1 to {_MOST}"
            raise ValueError(f"restarts[{k}] must be {wanted}, got {given!r}")
    return restarts


def _is_interval(low: Any, high: Any, *counts: Any) -> bool:
    numbers = isinstance(low, (int, float)) and isinstance(high, (int, float)) and 0 <= low < high <= _LARGEST
    return numbers and all(type(n) is int and 0 < n <= _MOST for n in counts)
