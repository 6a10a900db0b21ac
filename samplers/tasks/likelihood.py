"""Exact likelihood: the probability-flow ODE carries a density along, and its divergence tells by how much it changes.

Song et al. 2021, arXiv:2011.13456, section 4.3 and appendix D.2; Grathwohl et al. 2019 (FFJORD), arXiv:1810.01367.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samplers.adaptive import Network, Slope, check_positive, solve, widened
from samplers.errors import SamplingError, unknown
from samplers.grid import Grid
from samplers.model import EpsModel, require_model
from samplers.noise import check_seed, sample_indices, standard_normal
from samplers.tasks.states import check_tensor

LogDensity = Callable[[Tensor], Tensor]
PROBES = ("rademacher", "gaussian", "hadamard")
PIXEL_SCALE = 127.5  # from 256 levels to [-1, 1]


@dataclass(frozen=True)
class Likelihood:
    """The log-density of samples.

    Attributes:
        log_p: (B,) float64, in nats.
        error: (B,) float64: standard error of log_p over the probes of the estimate; 0 where the divergence is exact, which it
            also is with a complete set of probes, NaN where there is one probe.
        x_T: (B, ...) the samples' noise, at t_max.
        nfe: network calls, each with a backward pass for every probe, or for every number of a sample.
    """

    log_p: Tensor
    error: Tensor
    x_T: Tensor
    nfe: int

    def bits_per_dimension(self, scale: float = PIXEL_SCALE) -> Tensor:
        """See the function of that name, (B,)."""
        return bits_per_dimension(self.log_p, self.x_T[0].numel(), scale)


def bits_per_dimension(log_p: Tensor, dimension: int, scale: float = PIXEL_SCALE) -> Tensor:
    """`-log p / (D log 2) + log2(scale)`: the code length of the values before they were divided by `scale`.

    Args:
        log_p: log-density of the scaled values, in nats.
        dimension: D, numbers in a sample.
        scale: levels to one unit of the scaled values: 127.5 where levels 0 .. 255 became [-1, 1]. The samples must have been
            dequantised (`dequantise`): the density at a few exact values may be arbitrarily large.
    """
    check_positive(scale=scale)
    return -log_p / (dimension * math.log(2.0)) + math.log2(scale)


def dequantise(
    levels: Tensor, seed: int = 0, indices: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Images of 8 bits in [-1, 1] with uniform noise of one level's width around each value.

    The mean of log_p over the noise bounds the log-probability of the levels from below (Theis et al. 2016, arXiv:1511.01844,
    section 3.1; Uria et al. 2013).

    Args:
        levels: (B, ...) uint8.
        seed, indices: of the noise, drawn for each sample.
        dtype: of the result.

    Raises:
        TypeError: not uint8.
    """
    if levels.dtype != torch.uint8:
        raise TypeError(f"levels must be uint8, got {levels.dtype}")
    check_seed(seed)
    normal = standard_normal(
        seed, sample_indices(indices, len(levels)), 0, levels.shape[1:], torch.float64, levels.device
    )
    return ((levels.double() + torch.special.ndtr(normal) - 0.5) / PIXEL_SCALE - 1.0).to(dtype)


@torch.no_grad()
def log_likelihood(
    model: EpsModel,
    x: Tensor,
    *,
    divergence: str = "estimate",
    probes: int = 1,
    kind: str = "rademacher",
    prior: LogDensity | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    seed: int = 0,
    indices: Tensor | None = None,
    nfe: int | None = None,
    cond: Mapping[str, Any] | None = None,
) -> Likelihood:
    """Log-density of samples under the probability-flow ODE, from t_min to t_max, by torchdiffeq.

    With `y = x / sqrt(alpha^2 + sigma^2)` and `theta = atan(sigma / alpha)` as in `samplers.adaptive`, `d log p / d theta` along
    the path is `-trace(dv / dx)`. Hutchinson's estimator replaces the trace by `e^T (dv / dx) e` with probes e of mean 0 and
    covariance I, each kept along the whole path, so that the estimate of log p is unbiased but for the integrator's tolerance.
    With A the integral of dv / dx along the path, made symmetric, and |A|^2 the sum of its squared entries, the estimate of n
    probes has the variance

    - "gaussian": `2 |A|^2 / n` (Avron & Toledo 2011, doi:10.1145/1944345.1944349);
    - "rademacher": `2 |A - diag A|^2 / n`, the least of probes with independent entries (Hutchinson 1990);
    - "hadamard": that of "rademacher" times `(N - n) / (N - 1)`, N the least power of 2 that is at least D, and so none with
      n = N probes. They are different rows of the Hadamard matrix of size N, cut to D columns with a random sign for each: a
      draw without replacement from N numbers whose mean is the trace. With replacement they are the mixed unit vectors of
      Avron & Toledo; unsigned and in order, the Hadamard vectors of Bekas et al. 2007, doi:10.1016/j.apnum.2007.01.003.

    Args:
        model: the epsilon-model, whose network torch can differentiate.
        x: (B, ...) states at t_min, that is, samples with as little noise as the model knows.
        divergence: "estimate" (Hutchinson) or "exact", which takes a backward pass for every number of a sample.
        probes: of the estimate, at least 1, and at most N of kind "hadamard"; the result says the standard error over them.
        kind: "rademacher" (+1 or -1), "gaussian", or "hadamard" (+1 or -1, orthogonal if D is a power of 2).
        prior: log-density (B,) of states at t_max; None: that of N(0, sigma_T^2 I), the start noise of sampling. The model's own
            density there differs from it by what is left of the data: about `(alpha_T / sigma_T)^2` for centred data.
        t_min, t_max: in the schedule's time; None: the schedule's.
        method: of torchdiffeq: "dopri5", "bosh3", "dopri8".
        rtol, atol: tolerances on y and log p, in a norm over the batch: results depend on the batch to this extent.
        seed, indices: of the probes, drawn per sample.
        nfe: the most network calls; None is no limit.
        cond: passed to every network call.

    Returns:
        log p at t_min, in nats; `bits_per_dimension()` gives the other unit.

    Raises:
        ValueError, TypeError: bad arguments, or a model that gives no v at alpha = 0 (take a t_max below).
        SamplingError: NaN or Inf, a step size that underflows, or a tolerance that `nfe` calls do not reach.
    """
    if divergence not in ("estimate", "exact"):
        raise unknown("divergence", divergence, ("estimate", "exact"))
    require_model("model", model)
    check_tensor(model, "x", x)
    check_positive(rtol=rtol, atol=atol)
    grid = _range(model, t_min, t_max)
    wide = widened(x)
    directions = _units(wide) if divergence == "exact" else _probes(wide, probes, kind, seed, indices)
    network = Network(model, x.dtype, cond, nfe, f"rtol={rtol:g}, atol={atol:g}")
    flow = _Flow(Slope(network, grid), directions, divergence == "exact", x.shape)
    x_T, change = _to_noise(flow, wide, grid, method, rtol, atol)
    at_noise = _normal(x_T, float(grid.sigma[0])) if prior is None else prior(x_T).double()
    each = at_noise[:, None] + change
    complete = 1 if flow.exact else _rows(wide) if kind == "hadamard" else math.inf
    return Likelihood(each.mean(1), _error(each, complete), x_T.to(x.dtype), network.calls)


def _to_noise(flow: _Flow, x: Tensor, grid: Grid, method: str, rtol: float, atol: float) -> tuple[Tensor, Tensor]:
    """States (B, ...) at t_max, and by how much log p is larger at x than there, (B, 1) or one for each probe, in float64."""
    theta = torch.atan2(*(torch.as_tensor(a[::-1].copy(), dtype=torch.float64) for a in (grid.sigma, grid.alpha)))
    norm_T, norm = ((grid.alpha**2 + grid.sigma**2) ** 0.5).tolist()
    start = torch.cat([x.flatten(1) / norm, x.new_zeros(len(x), 1 if flow.exact else len(flow.directions))], 1)
    end = solve(flow, start, theta, method, rtol, atol)
    if not torch.isfinite(end).all():
        raise SamplingError("the likelihood's integrator ended in NaN or Inf")
    dimension = x[0].numel()
    change = end[:, dimension:].double() + dimension * math.log(norm_T / norm)
    return (end[:, :dimension] * norm_T).view(x.shape), change


def _error(each: Tensor, complete: float) -> Tensor:
    """Standard error (B,) of the mean of estimates (B, probes), drawn without replacement from `complete` many."""
    count = each.shape[1]
    if count == complete:
        return torch.zeros_like(each[:, 0])
    if count == 1:
        return torch.full_like(each[:, 0], math.nan)
    return each.std(1) * math.sqrt((1.0 - count / complete) / count)


class _Flow:
    """The slope of y and of the log-density's change along each direction, as one state (B, D + directions)."""

    def __init__(self, slope: Slope, directions: list[Tensor], exact: bool, shape: torch.Size) -> None:
        self.slope, self.directions, self.exact, self.shape = slope, directions, exact, shape
        self.dimension = math.prod(shape[1:])

    def __call__(self, theta: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = torch.clone(y[:, : self.dimension].detach()).requires_grad_()
            dx = self.slope(theta, x.view(self.shape)).flatten(1)
            traces = []
            for k, e in enumerate(self.directions):
                kept = k + 1 < len(self.directions)
                (back,) = torch.autograd.grad(dx, x, e, retain_graph=kept)
                traces.append((back * e).sum(1))
        change = torch.stack(traces, 1)
        return torch.cat([dx.detach(), change.sum(1, keepdim=True) if self.exact else change], 1)

    def stopped(self, why: str) -> SamplingError:
        """The error of an integrator that gave up."""
        return self.slope.stopped(why)


def _range(model: EpsModel, t_min: float | None, t_max: float | None) -> Grid:
    """The two ends, noise first."""
    schedule = model.schedule
    ends = [schedule.t_max if t_max is None else t_max, schedule.t_min if t_min is None else t_min]
    if not schedule.t_min <= ends[1] < ends[0] <= schedule.t_max:
        raise ValueError(
            f"t_min and t_max must be in order within [{schedule.t_min:g}, {schedule.t_max:g}], got t_min={ends[1]}, "
            f"t_max={ends[0]}"
        )
    grid = Grid(schedule, np.array(ends, dtype=np.float64))
    model.affine("v", float(grid.t[0]), float(grid.alpha[0]), float(grid.sigma[0]))
    return grid


def _probes(x: Tensor, probes: int, kind: str, seed: int, indices: Tensor | None) -> list[Tensor]:
    """(B, D) each."""
    if kind not in PROBES:
        raise unknown("kind", kind, PROBES)
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes must be a whole number, at least 1, got {probes!r}")
    check_seed(seed)
    rows = sample_indices(indices, len(x))
    if kind == "hadamard":
        return _hadamard(x, probes, seed, rows)
    drawn = (standard_normal(seed, rows, k, (x[0].numel(),), x.dtype, x.device) for k in range(probes))
    return [_signs(z) if kind == "rademacher" else z for z in drawn]


def _hadamard(x: Tensor, probes: int, seed: int, indices: Tensor) -> list[Tensor]:
    """Rows of a Hadamard matrix, another choice of them for each sample, with random signs of the columns, (B, D) each."""
    complete = _rows(x)
    if probes > complete:
        raise ValueError(
            f"probes must be at most {complete} of kind 'hadamard' in {x[0].numel()} dimensions, where the estimate is exact, "
            f"got {probes}"
        )
    signs = _signs(standard_normal(seed, indices, 0, (x[0].numel(),), x.dtype, x.device))
    chosen = standard_normal(seed, indices, 1, (complete,), torch.float64, x.device).argsort(1)[:, :probes]
    columns = torch.arange(x[0].numel(), device=x.device)
    return [torch.where(_odd(row[:, None] & columns), -signs, signs) for row in chosen.unbind(1)]


def _signs(z: Tensor) -> Tensor:
    """+1 or -1, as the numbers of a symmetric distribution."""
    return torch.where(z < 0, -1.0, 1.0).to(z.dtype)


def _rows(x: Tensor) -> int:
    """Rows of the Hadamard matrix for samples of x's size, the next power of 2."""
    return 1 << (x[0].numel() - 1).bit_length()


def _odd(numbers: Tensor) -> Tensor:
    """Whether an odd number of the binary digits of an int64 are 1."""
    for shift in (32, 16, 8, 4, 2, 1):
        numbers = numbers ^ (numbers >> shift)
    return (numbers & 1).bool()


def _units(x: Tensor) -> list[Tensor]:
    """Each unit vector, as (B, D)."""
    eye = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
    return [row.expand(len(x), -1) for row in eye]


def _normal(x: Tensor, sigma: float) -> Tensor:
    """Log-density of N(0, sigma^2 I), (B,) float64."""
    rows = x.double().flatten(1) / sigma
    return -0.5 * rows.square().sum(1) - rows.shape[1] * (math.log(sigma) + 0.5 * math.log(2.0 * math.pi))
