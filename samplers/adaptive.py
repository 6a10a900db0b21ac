"""Error-controlled integration of the probability-flow ODE: the reference that fixed-step samplers are compared with."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from samplers.errors import SamplingError, ToleranceError
from samplers.execute import Callback, Progress, check_finite, is_finite
from samplers.grid import Grid
from samplers.model import EpsModel

_LSODA = "lsoda"


class Network:
    """A model's calls, counted and limited.

    Attributes:
        dtype: what the network takes and gives; the states outside may be of a wider one.
        calls: how many there were.
        t: the time of the last one.
    """

    def __init__(
        self, model: EpsModel, dtype: torch.dtype, cond: Mapping[str, Any] | None, nfe: int | None, tolerances: str
    ) -> None:
        self.model, self.cond, self.nfe, self.tolerances = model.begin(), {} if cond is None else cond, nfe, tolerances
        self.dtype, self.calls, self.t = dtype, 0, math.nan

    def __call__(self, x: Tensor, t: float, alpha: float, sigma: float, kind: str) -> Tensor:
        """The model's output as `kind`, in the dtype of x.

        Raises:
            SamplingError: the network gives NaN or Inf, which no smaller step would make good.
            ToleranceError: the limit is reached.
        """
        if self.nfe is not None and self.calls >= self.nfe:
            raise ToleranceError(
                f"{self.tolerances} needs more than nfe={self.nfe} network calls; allow more calls or a larger tolerance"
            )
        self.calls, self.t = self.calls + 1, t
        out, (by_x, by_out) = self.model.evaluate(x.to(self.dtype), t, alpha, sigma, kind, self.cond)
        if not is_finite(out):
            raise SamplingError(f"NaN or Inf in call {self.calls}: the network's output at t={t:g}")
        out = out.to(x.dtype)
        return out * by_out + x * by_x if by_x else out * by_out


def widened(x: Tensor) -> Tensor:
    """The same in float32 at least: in half precision an error estimate is the state's rounding and little else."""
    return x if x.dtype == torch.float64 else x.float()


def through_nodes(
    network: Network, grid: Grid, x_T: Tensor, callback: Callback | None, advance: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """The state at the last node, by `advance(x, i)` from each node to the next; one first-order step to sigma = 0.

    `advance` gets and gives widened states; the result, and what the callback is told, have the dtype of x_T.

    Raises:
        ValueError: x_T has NaN or Inf.
        SamplingError: the result has.
    """
    check_finite(x_T)
    x = widened(x_T)
    for i in range(grid.steps):
        if grid.sigma[i + 1] == 0:
            x = network(x, float(grid.t[i]), float(grid.alpha[i]), float(grid.sigma[i]), "x0")
        else:
            x = advance(x, i)
        if callback is not None:
            callback(Progress(i + 1, grid.steps, float(grid.t[i + 1]), network.calls, x.to(x_T.dtype)))
    x = x.to(x_T.dtype)
    if not is_finite(x):
        raise SamplingError("the adaptive integrator ended in NaN or Inf")
    return x


def check_positive(**values: float) -> None:
    """Raise ValueError for a value that is not positive and finite."""
    for name, value in values.items():
        if not 0 < value <= sys.float_info.max:  # an int may be larger
            raise ValueError(f"{name} must be positive and finite, got {value}")


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
        method: of torchdiffeq: "dopri5" (Dormand & Prince 1980), "bosh3", "dopri8"; or "lsoda", SciPy's, which works in
            float64 on the CPU. Where LSODA turns to implicit steps, the Jacobian is approximated by its diagonal, so that its
            memory grows with the batch and not with its square.
        rtol, atol: tolerances on y, in the norm over the whole batch: a sample depends on its batch to that extent. Less than
            a network of half precision rounds buys nothing, and costs "dopri8" and "lsoda" hundreds to thousands of calls.
        nfe: the most network calls; None is no limit.
        callback: called with a `Progress` at every node.
        cond: passed to every network call.

    Returns:
        The state at the last node, shape and dtype of x_T; between the calls it is kept in float32 at least.

    Raises:
        ValueError: a tolerance that is not positive, NaN or Inf in x_T.
        SamplingError: NaN or Inf from the network, a step size that underflows, or a tolerance that `nfe` calls do not reach.
    """
    check_positive(rtol=rtol, atol=atol)
    network = Network(model, x_T.dtype, cond, nfe, f"rtol={rtol:g}, atol={atol:g}")
    slope = Slope(network, grid)
    segment = _lsoda if method == _LSODA else solve
    theta = torch.atan2(*(torch.as_tensor(a, dtype=torch.float64) for a in (grid.sigma, grid.alpha)))
    norm = ((grid.alpha**2 + grid.sigma**2) ** 0.5).tolist()

    def advance(x: Tensor, i: int) -> Tensor:
        return segment(slope, x / norm[i], theta[i : i + 2], method, rtol, atol) * norm[i + 1]

    return through_nodes(network, grid, x_T, callback, advance)


def solve(slope: Stoppable, y: Tensor, theta: Tensor, method: str, rtol: float, atol: float) -> Tensor:
    """The solution at the end of `theta` (2,), which may rise or fall, from y at its start.

    Args:
        slope: `slope(theta, y)` is dy / dtheta; `slope.stopped(why)` the error of an integrator that gave up.
        y: (B, ...).
        theta: start and end, float64.
        method: of torchdiffeq.
        rtol, atol: tolerances on y.
    """
    from torchdiffeq import odeint

    theta = theta.to(y.device, torch.float64 if y.dtype == torch.float64 else torch.float32)
    try:
        # step_t: without it the integrator steps past the end, where the model is not defined, and interpolates back
        return odeint(slope, y, theta, method=method, rtol=rtol, atol=atol, options={"step_t": theta[1:]})[-1]
    except AssertionError as error:  # torchdiffeq's step-size underflow
        raise slope.stopped(str(error)) from error


def _lsoda(slope: Slope, y: Tensor, theta: Tensor, method: str, rtol: float, atol: float) -> Tensor:
    from scipy.integrate import solve_ivp

    def flat(at: float, values: Any) -> Any:
        return slope(at, torch.as_tensor(values).view(y.shape).to(y)).double().cpu().flatten().numpy()

    start = y.double().cpu().flatten().numpy()
    found = solve_ivp(flat, theta.tolist(), start, method="LSODA", rtol=rtol, atol=atol, lband=0, uband=0)
    if not found.success:
        raise slope.stopped(found.message)
    return torch.as_tensor(found.y[:, -1]).view(y.shape).to(y)


class Stoppable(Protocol):
    """The slope of an equation that `solve` integrates."""

    def __call__(self, theta: Tensor, y: Tensor) -> Tensor:
        """`dy/dtheta`."""

    def stopped(self, why: str) -> SamplingError:
        """The error of an integrator that gave up."""


class Slope:
    """`dy/dtheta` of the probability-flow ODE.

    Args:
        network: what is called.
        grid: whose range the times keep to.
    """

    def __init__(self, network: Network, grid: Grid) -> None:
        self.network, self.grid, self.theta = network, grid, math.nan

    def __call__(self, theta: Tensor | float, y: Tensor) -> Tensor:
        """`v / sqrt(alpha^2 + sigma^2)`."""
        self.theta = float(theta)
        grid, schedule = self.grid, self.grid.schedule
        last = grid.t[-1] if grid.sigma[-1] > 0 else grid.t[-2]
        # rounding of theta may leave the range by an ulp, at alpha = 0 to where no log-SNR exists
        inside = 0.0 < self.theta < 0.5 * math.pi
        t = schedule.t_of_lam(-math.log(math.tan(self.theta))) if inside else grid.t[0] if self.theta > 0 else last
        t = float(min(max(t, last), grid.t[0]))
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        norm = math.hypot(alpha, sigma)
        return self.network(y * norm, t, alpha, sigma, "v") / norm

    def stopped(self, why: str) -> SamplingError:
        """The error of an integrator that gave up."""
        return SamplingError(f"the adaptive integrator stopped at theta={self.theta:g} (t={self.network.t:g}): {why}")
