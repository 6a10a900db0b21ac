"""Singlestep methods as stages: where a step evaluates the model again, and by which coefficients the state gets there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from samplers.draft import Draft
from samplers.grid import Grid
from samplers.plan import Plan


class Stage(NamedTuple):
    """A point inside every step of a grid, or the end of every step, and the coefficients that lead to it; one entry a step.

    Attributes:
        t, alpha, sigma: the point.
        state: coefficient of the state at the step's start.
        first: of the output there.
        latest: of the output at the stage before; 0 in the first stage.
        noises: of the step's noises; a stage may bring new ones.
    """

    t: list[float]
    alpha: list[float]
    sigma: list[float]
    state: list[float]
    first: list[float]
    latest: list[float]
    noises: list[list[float]]

    def reach(self, p: Draft, node: int | None, i: int, x: str, first: str, latest: str, noises: list[str]) -> str:
        """The state at this stage of step i."""
        weights = self.noises[i]
        while len(noises) < len(weights):
            noises.append(p.noise())
        outputs = (first, self.first[i]), (latest, self.latest[i])
        return p.combine(node, (x, self.state[i]), *outputs, *zip(noises, weights, strict=False))


def finite_lam(grid: Grid) -> np.ndarray:
    """The nodes' lam, with a step of length 1 in place of an infinite one, which no formula of a solver uses."""
    finite = grid.lam[np.isfinite(grid.lam)]
    low, high = (finite[0] - 1.0, finite[-1] + 1.0) if len(finite) else (0.0, 1.0)
    return np.clip(grid.lam, low, high)


def stage(
    grid: Grid,
    lam: np.ndarray | None,
    state: np.ndarray,
    first: np.ndarray,
    latest: np.ndarray | float,
    *noises: np.ndarray,
) -> Stage:
    """The stage at lam, one value a step, or (None) at the end of the steps; coefficients are of x / alpha."""
    if lam is None:
        t, alpha, sigma = grid.t[1:], grid.alpha[1:], grid.sigma[1:]
    else:
        t = grid.schedule.t_of_lam(lam)
        alpha, sigma = grid.schedule.alpha(t), grid.schedule.sigma(t)
    with np.errstate(divide="ignore", invalid="ignore"):
        by_state = alpha * state / grid.alpha[:-1]  # no number where alpha = 0, a step that Draft writes
    by_noise = alpha[:, None] * np.stack(noises, axis=-1) if noises else np.empty((len(t), 0))
    columns = (t, alpha, sigma, by_state, alpha * first, alpha * latest, by_noise)
    return Stage(*(column.tolist() for column in columns))


def staged_plan(p: Draft, methods: Mapping[int, Sequence[Stage]], orders: Sequence[int]) -> Plan:
    """The plan whose i-th step goes through the stages `methods[orders[i]]`; a step to sigma = 0 is first order without noise."""
    x = p.x
    for i in p.steps:
        first = latest = p.evaluate(x, i)
        if p.sigma[i + 1] == 0:
            x = p.first_order(i, x, first)
            continue
        *inner, last = methods[orders[i]]
        noises: list[str] = []
        for point in inner:
            u = point.reach(p, None, i, x, first, latest, noises)
            latest = p.evaluate_at(u, point.t[i], point.alpha[i], point.sigma[i])
        x = last.reach(p, i + 1, i, x, first, latest, noises)
    return p.plan()
