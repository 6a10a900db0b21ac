"""Error-controlled integration of the probability-flow ODE: the reference that fixed-step samplers are compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from samplers.errors import SamplingError
from samplers.execute import Callback, Progress
from samplers.grid import Grid
from samplers.model import EpsModel


@torch.no_grad()
def integrate(
    model: EpsModel,
    grid: Grid,
    x_T: Tensor,
    *,
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    nfe: int | None = None,
    callback: Callback | None = None,
    cond: Mapping[str, Any] | None = None,
) -> Tensor:
    """Solve the probability-flow ODE from the grid's first node to its last, to a tolerance.

    With the angle `theta = atan(sigma / alpha)` and `y = x / sqrt(alpha^2 + sigma^2)` the equation is
    `dy/dtheta = cos(theta) eps - sin(theta) x0 = v / sqrt(alpha^2 + sigma^2)` on every schedule: finite and of unit scale
    also where alpha = 0 (Salimans & Ho 2022, arXiv:2202.00512, appendix D). The inner nodes are points the
    solution passes, where the callback is told; they do not limit the integrator's own steps. A last node at sigma = 0 is
    reached by one first-order step from the node before it, as by every other sampler.

    Args:
        model: the epsilon-model.
        grid: the nodes.
        x_T: start state (B, ...).
        method: of torchdiffeq: "dopri5" (Dormand & Prince 1980), "bosh3", "dopri8".
        rtol, atol: tolerances on y, in the norm over the whole batch.
        nfe: the most network calls; None is no limit.
        callback: called with a `Progress` at every node.
        cond: passed to every network call.

    Returns:
        The state at the last node, shape of x_T.

    Raises:
        ValueError: a tolerance that is not positive.
        SamplingError: NaN or Inf, a step size that underflows, or a tolerance that `nfe` calls do not reach.
    """
    from torchdiffeq import odeint

    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if not 0 < tolerance < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {tolerance}")
    slope = _Slope(model, grid, {} if cond is None else cond, nfe, f"rtol={rtol:g}, atol={atol:g}")
    inner = grid.steps + 1 - int(grid.sigma[-1] == 0)
    theta = torch.atan2(*(torch.as_tensor(a[:inner], dtype=torch.float64) for a in (grid.sigma, grid.alpha)))
    norm = (grid.alpha**2 + grid.sigma**2) ** 0.5
    y = x_T / float(norm[0])
    for i in range(1, inner):
        y = _segment(odeint, slope, y, theta[i - 1 : i + 1].to(x_T.device), method, rtol, atol)
        if callback is not None:
            callback(Progress(i, grid.steps, float(grid.t[i]), slope.calls, y * float(norm[i])))
    x = y * float(norm[inner - 1])
    if inner == grid.steps:
        x = slope.denoise(x, inner - 1)
        if callback is not None:
            callback(Progress(inner, grid.steps, float(grid.t[-1]), slope.calls, x))
    if not torch.isfinite(x).all():
        raise SamplingError("the adaptive integrator ended in NaN or Inf")
    return x


def _segment(odeint: Any, slope: _Slope, y: Tensor, theta: Tensor, method: str, rtol: float, atol: float) -> Tensor:
    theta = theta if y.dtype == torch.float64 else theta.to(torch.float32)
    try:
        # step_t: without it the integrator steps past the end, where the model is not defined, and interpolates back
        return odeint(slope, y, theta, method=method, rtol=rtol, atol=atol, options={"step_t": theta[1:]})[-1]
    except AssertionError as error:  # torchdiffeq's step-size underflow, which NaN also causes
        raise SamplingError(
            f"the adaptive integrator stopped at theta={slope.theta:g} (t={slope.t:g}): {error}"
        ) from error


class _Slope:
    """`dy/dtheta`, counting its calls."""

    def __init__(
        self, model: EpsModel, grid: Grid, cond: Mapping[str, Any], budget: int | None, tolerances: str
    ) -> None:
        self.model, self.grid, self.cond, self.budget, self.tolerances = model, grid, cond, budget, tolerances
        self.calls, self.theta, self.t = 0, math.nan, math.nan

    def __call__(self, theta: Tensor, y: Tensor) -> Tensor:
        self.theta = float(theta)
        grid, schedule = self.grid, self.grid.schedule
        last = grid.t[-1] if grid.sigma[-1] > 0 else grid.t[-2]
        # rounding of theta may leave the range by an ulp, at alpha = 0 to where no log-SNR exists
        inside = 0.0 < self.theta < 0.5 * math.pi
        t = schedule.t_of_lam(-math.log(math.tan(self.theta))) if inside else grid.t[0] if self.theta > 0 else last
        self.t = float(min(max(t, last), grid.t[0]))
        alpha, sigma = float(schedule.alpha(self.t)), float(schedule.sigma(self.t))
        norm = math.hypot(alpha, sigma)
        return self._output(y * norm, self.t, alpha, sigma, "v") / norm

    def _output(self, x: Tensor, t: float, alpha: float, sigma: float, kind: str) -> Tensor:
        if self.budget is not None and self.calls >= self.budget:
            raise SamplingError(
                f"{self.tolerances} needs more than nfe={self.budget} network calls; allow more calls or a larger tolerance"
            )
        self.calls += 1
        out, (by_x, by_out) = self.model.evaluate(x, t, alpha, sigma, kind, self.cond)
        return out * by_out + x * by_x if by_x else out * by_out

    def denoise(self, x: Tensor, i: int) -> Tensor:
        """The step from node i to clean data: x0."""
        return self._output(x, float(self.grid.t[i]), float(self.grid.alpha[i]), float(self.grid.sigma[i]), "x0")
