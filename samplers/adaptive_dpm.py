"""DPM-Solver with adaptive step size: two orders of one step, from the same network calls, give its error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samplers.adaptive import Network, check_positive, through_nodes
from samplers.errors import SamplingError
from samplers.execute import Callback
from samplers.grid import Grid
from samplers.model import EpsModel
from samplers.solvers.exponential import psi
from samplers.solvers.first_order import Level

_SMALLEST_STEP = 1e-10
_INNER = {2: (1 / 2,), 3: (1 / 3, 2 / 3)}  # fractions of the step in lam at which the model is called


@torch.no_grad()
def integrate_dpm(
    model: EpsModel,
    grid: Grid,
    x_T: Tensor,
    *,
    order: int,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    theta: float = 0.9,
    nfe: int | None = None,
    callback: Callback | None = None,
    cond: Mapping[str, Any] | None = None,
) -> Tensor:
    """DPM-Solver-12 and DPM-Solver-23: steps in lam whose length follows from the difference of two orders.

    Lu et al. 2022, arXiv:2206.00927, appendix C: DPM-Solver-1 inside DPM-Solver-2 (r1 = 1/2), or DPM-Solver-2 (r1 = 1/3)
    inside DPM-Solver-3. A step is accepted where `max over samples of rms((higher - lower) / delta) <= 1` with
    `delta = max(atol, rtol max(|lower|, |lower before|))`, and then, as after a rejection, `h <- theta h E^(-1/order)`. A
    rejected step is tried again from the same first call. Inner nodes are reached exactly; a last node at sigma = 0 by one
    first-order step. From alpha = 0, where lam is infinite, one first-order step leads to `alpha / sigma = sqrt(atol / 10)`,
    or to the next node if that comes first: its error is of the order of its square.

    Args:
        model: the epsilon-model.
        grid: the nodes.
        x_T: start state (B, ...).
        order: 2 or 3, the higher of the two.
        rtol, atol: tolerances on x; the defaults are the paper's for images in [-1, 1].
        h_init: first step length in lam.
        theta: safety factor, in (0, 1].
        nfe: the most network calls; None is no limit.
        callback: called with a `Progress` at every node.
        cond: passed to every network call.

    Returns:
        The state at the last node, shape and dtype of x_T; between the calls it is kept in float32 at least.

    Raises:
        ValueError: a value out of range.
        SamplingError: NaN or Inf, a step size that underflows, or a tolerance that `nfe` calls do not reach.
    """
    check_positive(rtol=rtol, atol=atol, h_init=h_init, theta=theta)
    if theta > 1:
        raise ValueError(f"theta must lie in (0, 1], got {theta}")
    network = Network(model, x_T.dtype, cond, nfe, f"rtol={rtol:g}, atol={atol:g}")
    control = _Control(network, grid, order, rtol, atol, h_init, theta)
    return through_nodes(network, grid, x_T, callback, control.advance)


class _Control:
    """Steps of one run, with the step length it has arrived at and the last accepted state of lower order."""

    def __init__(
        self, network: Network, grid: Grid, order: int, rtol: float, atol: float, h_init: float, theta: float
    ) -> None:
        self.network, self.grid, self.order = network, grid, order
        self.rtol, self.atol, self.h, self.theta = rtol, atol, h_init, theta
        self.before: Tensor | None = None

    def advance(self, x: Tensor, i: int) -> Tensor:
        """From node i to node i + 1."""
        lam, end = float(self.grid.lam[i]), float(self.grid.lam[i + 1])
        if math.isinf(lam):
            lam = min(0.5 * math.log(0.1 * self.atol), end)
            x = self._from_noise(x, i, self._at(lam, i))
        out: Tensor | None = None
        while lam < end:
            h = min(self.h, end - lam)
            after = end if h == end - lam else lam + h
            points = [self._at(at, i) for at in (lam, *(lam + r * h for r in _INNER[self.order]), after)]
            out = self.network(x, *points[0], "eps") if out is None else out
            lower, higher = (_order_12 if self.order == 2 else _order_23)(self.network, x, out, points, h)
            error = self._error(lower, higher, x if self.before is None else self.before)
            if not math.isfinite(error):
                raise SamplingError(f"the adaptive integrator stopped at t={points[0].t:g}: NaN or Inf")
            if error <= 1:
                x, self.before, out, lam = higher, lower, None, after
            self.h = self.theta * h * error ** (-1 / self.order) if error > 0 else math.inf
            if self.h < _SMALLEST_STEP and error > 1:
                raise SamplingError(f"the adaptive integrator stopped at t={points[0].t:g}: underflow in the step size")
        return x

    def _at(self, lam: float, i: int) -> Level:
        """The point of that lam between nodes i and i + 1, which are themselves exact."""
        grid, schedule = self.grid, self.grid.schedule
        for node in (i, i + 1):
            if lam == grid.lam[node]:
                return Level(float(grid.t[node]), float(grid.alpha[node]), float(grid.sigma[node]))
        t = min(max(float(schedule.t_of_lam(lam)), float(grid.t[i + 1])), float(grid.t[i]))
        return Level(t, float(schedule.alpha(t)), float(schedule.sigma(t)))

    def _from_noise(self, x: Tensor, i: int, to: Level) -> Tensor:
        sigma = float(self.grid.sigma[i])
        return x * (to.sigma / sigma) + self.network(x, float(self.grid.t[i]), 0.0, sigma, "x0") * to.alpha

    def _error(self, lower: Tensor, higher: Tensor, before: Tensor) -> float:
        delta = torch.maximum(lower.abs(), before.abs()).mul_(self.rtol).clamp_(min=self.atol)
        return float(((higher - lower) / delta).reshape(len(lower), -1).square().mean(1).sqrt().max())


def _order_12(network: Network, x: Tensor, out: Tensor, points: list[Level], h: float) -> tuple[Tensor, Tensor]:
    """DPM-Solver-1 and DPM-Solver-2; the paper's algorithm 1 with r1 = 1/2."""
    start, middle, end = points
    change = network(_first_order(x, out, start, middle, h / 2), *middle, "eps") - out
    lower = _first_order(x, out, start, end, h)
    return lower, lower - change * (end.sigma * math.expm1(h))


def _order_23(network: Network, x: Tensor, out: Tensor, points: list[Level], h: float) -> tuple[Tensor, Tensor]:
    """DPM-Solver-2 with r1 = 1/3 and DPM-Solver-3 with r1 = 1/3, r2 = 2/3; the paper's algorithms 4 and 2."""
    start, near, far, end = points
    change = network(_first_order(x, out, start, near, h / 3), *near, "eps") - out
    state = _first_order(x, out, start, far, 2 * h / 3) - change * (2.0 * far.sigma * _psi_2(2 * h / 3))
    further = network(state, *far, "eps") - out
    first = _first_order(x, out, start, end, h)
    return first - change * (1.5 * end.sigma * math.expm1(h)), first - further * (1.5 * end.sigma * _psi_2(h))


def _first_order(x: Tensor, out: Tensor, start: Level, end: Level, h: float) -> Tensor:
    return x * (end.alpha / start.alpha) - out * (end.sigma * math.expm1(h))


def _psi_2(h: float) -> float:
    return float(psi(2, np.array(h)))
