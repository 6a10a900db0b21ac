"""Time grids: where a sampler's steps begin and end.

A named grid is a function `(schedule, n) -> n decreasing times` that starts at `t_max`. `Grid` is the checked result with
alpha, sigma and lam at every node, ready for a solver; its last node may be clean data (sigma = 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from samplers.errors import unknown
from samplers.schedule import Discrete, Schedule

Points = Callable[[Schedule, int], np.ndarray]
Nodes = Sequence[float] | np.ndarray | Tensor
FINALS = ("t_min", "zero", "denoise")
_RANGE_TOLERANCE = 1e-6
_TRAINING_STEPS = 1000


def uniform(schedule: Schedule, n: int) -> np.ndarray:
    """Uniform in t."""
    return np.linspace(schedule.t_max, schedule.t_min, n)


def polynomial(schedule: Schedule, n: int, rho: float = 2.0) -> np.ndarray:
    """Uniform in `t^(1/rho)`; rho = 2 is the quadratic grid of DDIM (Song et al. 2021, arXiv:2010.02502, appendix D.2)."""
    return np.linspace(schedule.t_max ** (1 / rho), schedule.t_min ** (1 / rho), n) ** rho


def logsnr(schedule: Schedule, n: int) -> np.ndarray:
    """Uniform in lam (Lu et al. 2022, arXiv:2206.00927, section 3.3); the same as exponential in sigma_bar."""
    _finite_start(schedule, "logsnr")
    return schedule.t_of_lam(np.linspace(schedule.lam(schedule.t_max), schedule.lam(schedule.t_min), n))


def karras(schedule: Schedule, n: int, rho: float = 7.0) -> np.ndarray:
    """Uniform in `sigma_bar^(1/rho)` (Karras et al. 2022, arXiv:2206.00364, equation 5)."""
    _finite_start(schedule, "karras")
    start, end = (schedule.sigma_bar(t) ** (1 / rho) for t in (schedule.t_max, schedule.t_min))
    return schedule.t_of_lam(-rho * np.log(np.linspace(start, end, n)))


def sgm(schedule: Schedule, n: int) -> np.ndarray:
    """Uniform in t without the last node (Stability AI's generative-models); followed by clean data."""
    return uniform(schedule, n + 1)[:-1]


def beta(schedule: Schedule, n: int, a: float = 0.6, b: float = 0.6) -> np.ndarray:
    """Quantiles of a Beta(a, b) distribution over t (Lee et al. 2024, arXiv:2407.12173, section 4)."""
    from scipy.special import betaincinv

    return schedule.t_min + (schedule.t_max - schedule.t_min) * betaincinv(a, b, np.linspace(1.0, 0.0, n))


def leading(schedule: Schedule, n: int, offset: int = 0) -> np.ndarray:
    """Every (T // n)-th training step from `offset` on, as diffusers' `timestep_spacing="leading"`."""
    total = _training_steps(schedule, n)
    return _training_time(schedule, np.arange(n)[::-1] * (total // n) + offset)


def linspace(schedule: Schedule, n: int) -> np.ndarray:
    """Training steps from T - 1 to 0, rounded, as diffusers' `timestep_spacing="linspace"`."""
    total = _training_steps(schedule, n)
    return _training_time(schedule, np.linspace(0, total - 1, n).round()[::-1])


def trailing(schedule: Schedule, n: int) -> np.ndarray:
    """Training steps T - 1, T - 1 - T/n, ..., rounded, as diffusers' `timestep_spacing="trailing"`."""
    total = _training_steps(schedule, n)
    return _training_time(schedule, np.round(np.arange(total, 0, -total / n))[:n] - 1)


def _quadratic(schedule: Schedule, n: int) -> np.ndarray:
    return polynomial(schedule, n, rho=2.0)


# name -> (points, what the last step is by default)
GRIDS: dict[str, tuple[Points, str]] = {
    "uniform": (uniform, "t_min"),
    "quadratic": (_quadratic, "t_min"),
    "logsnr": (logsnr, "t_min"),
    "karras": (karras, "t_min"),
    "exponential": (logsnr, "t_min"),
    "beta": (beta, "t_min"),
    "edm": (karras, "zero"),
    "sgm": (sgm, "zero"),
    "leading": (leading, "zero"),
    "linspace": (linspace, "zero"),
    "trailing": (trailing, "zero"),
}


@dataclass(frozen=True, eq=False)
class Grid:
    """Nodes t_0 > ... > t_N of a sampling run, float64, on a schedule; the last may be clean data.

    Raises:
        ValueError: fewer than two nodes, a NaN, nodes that do not decrease strictly or lie outside the schedule's range.
    """

    schedule: Schedule
    t: np.ndarray

    def __post_init__(self) -> None:
        t = self.t
        if t.ndim != 1 or len(t) < 2:
            raise ValueError(f"a grid needs at least 2 nodes in one dimension, got shape {t.shape}")
        if not np.isfinite(t).all():
            raise ValueError(f"a grid must be finite: node {int(np.argmin(np.isfinite(t)))} is {t[~np.isfinite(t)][0]}")
        rising = np.flatnonzero(~(np.diff(t) < 0))
        if len(rising):
            i = int(rising[0])
            raise ValueError(f"a grid must decrease strictly: t[{i}]={t[i]:g}, t[{i + 1}]={t[i + 1]:g}")

    @property
    def steps(self) -> int:
        """Number of steps, one less than nodes."""
        return len(self.t) - 1

    @cached_property
    def alpha(self) -> np.ndarray:
        """Scale of the data at each node."""
        return self.schedule.alpha(self.t)

    @cached_property
    def sigma(self) -> np.ndarray:
        """Standard deviation of the noise at each node."""
        return np.abs(self.schedule.sigma(self.t))  # no negative zero at clean data

    @cached_property
    def lam(self) -> np.ndarray:
        """`log(alpha / sigma)` at each node; +inf at clean data, -inf where alpha = 0."""
        return self.schedule.lam(self.t)


def points_of(grid: str | Points) -> tuple[Points, str]:
    """The function behind a grid's name (or a function itself), and its default `final`.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor callable.
    """
    if callable(grid):
        return grid, "t_min"
    if not isinstance(grid, str):
        raise TypeError(f"grid must be a name or a function (schedule, n) -> times, got {type(grid).__name__}")
    if grid not in GRIDS:
        raise unknown("grid", grid, GRIDS)
    return GRIDS[grid]


def make_grid(schedule: Schedule, grid: str | Points, steps: int, final: str | None = None) -> Grid:
    """A grid by name.

    Args:
        schedule: the noise schedule.
        grid: a name of `GRIDS`, or a function `(schedule, n) -> n decreasing times`.
        steps: at least 1.
        final: "t_min" ends at the grid's last point; "zero" replaces that by a step to clean data, "denoise" adds one;
            None is the grid's own convention.

    Raises:
        ValueError: an unknown grid or final, steps below 1, or a grid that this schedule does not allow.
    """
    points, default = points_of(grid)
    final = default if final is None else final
    if final not in FINALS:
        raise unknown("final", final, FINALS)
    n = steps if final == "zero" else steps + 1
    t = np.array(points(schedule, n), dtype=np.float64)
    if t.shape != (n,):
        raise ValueError(f"grid {grid!r} must give {n} times, got shape {t.shape}")
    if math.isclose(t[0], schedule.t_max, rel_tol=1e-9):
        t[0] = schedule.t_max  # rounding may miss the end by an ulp, which is a step of its own where alpha = 0
    t = _within(schedule, t, f"grid {grid!r}")
    if final != "t_min":
        t = np.append(t, schedule.t_zero)
    return Grid(schedule, t)


def from_timesteps(schedule: Schedule, timesteps: Nodes) -> Grid:
    """A grid from explicit times in the schedule's own time, end included.

    Raises:
        ValueError: fewer than two, not strictly decreasing, NaN, or more than 1e-6 (relative) outside `[t_min, t_max]`.
    """
    t = _vector(timesteps, "timesteps")
    Grid(schedule, t)
    return Grid(schedule, _within(schedule, t, "timesteps"))


def from_sigmas(schedule: Schedule, sigmas: Nodes) -> Grid:
    """A grid from explicit values of `sigma_bar = sigma / alpha`, end included; the last may be 0, which is clean data.

    Raises:
        ValueError: as `from_timesteps`, or a negative sigma.
    """
    values = _vector(sigmas, "sigmas")
    if not (values[:-1] > 0).all() or values[-1] < 0:
        raise ValueError(f"sigmas must be positive (only the last may be 0), got {values.tolist()}")
    rising = np.flatnonzero(~(np.diff(values) < 0))
    if len(rising):
        i = int(rising[0])
        raise ValueError(f"sigmas must decrease strictly: sigmas[{i}]={values[i]:g}, sigmas[{i + 1}]={values[i + 1]:g}")
    positive = values[values > 0]
    t = _within(schedule, schedule.t_of_lam(-np.log(positive)), "sigmas")
    return Grid(schedule, t if len(positive) == len(values) else np.append(t, schedule.t_zero))


def _vector(values: Any, argument: str) -> np.ndarray:
    try:
        vector = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument} must be a sequence of numbers, got {values!r}") from error
    if vector.ndim != 1 or len(vector) < 2:
        raise ValueError(f"{argument} needs at least 2 values in one dimension, got shape {vector.shape}")
    if not np.isfinite(vector).all():
        raise ValueError(f"{argument} must be finite, got {vector[~np.isfinite(vector)][0]}")
    return vector


def _within(schedule: Schedule, t: np.ndarray, what: str) -> np.ndarray:
    """The times clipped to the schedule's range, where they are outside by rounding only."""
    low, high = schedule.t_min, schedule.t_max
    slack_low, slack_high = (_RANGE_TOLERANCE * (abs(end) if end else 1.0) for end in (low, high))
    outside = (t < low - slack_low) | (t > high + slack_high)
    if outside.any():
        raise ValueError(
            f"{what}: time {t[outside][0]:g} is outside [{low:g}, {high:g}], the range of schedule {schedule.name!r}"
        )
    return np.clip(t, low, high)


def _finite_start(schedule: Schedule, name: str) -> None:
    if math.isinf(schedule.lam(schedule.t_max)):
        raise ValueError(
            f"grid {name!r} needs a finite log-SNR at t_max, and schedule {schedule.name!r} starts at alpha = 0; "
            "use a grid in t such as 'uniform' or 'quadratic'"
        )


def _training_steps(schedule: Schedule, n: int) -> int:
    total = len(schedule.alphas_cumprod) if isinstance(schedule, Discrete) else _TRAINING_STEPS
    if n > total:
        raise ValueError(f"this grid has at most {total} points, one for each training step, got {n}")
    return total


def _training_time(schedule: Schedule, index: np.ndarray) -> np.ndarray:
    """Training steps 0 .. T - 1 as times: themselves on a discrete schedule, spread over the range on a continuous one."""
    if isinstance(schedule, Discrete):
        return index.astype(np.float64)
    return schedule.t_min + (schedule.t_max - schedule.t_min) * index / (_TRAINING_STEPS - 1)
