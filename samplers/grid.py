"""Time grids: where a sampler's steps begin and end.

A named grid is a function `(schedule, n) -> n decreasing times` that starts at `t_max`. `Grid` is the checked result with
alpha, sigma and lam at every node, ready for a solver; its last node may be clean data (sigma = 0).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from samplers.errors import unknown
from samplers.grid_points import (
    Nodes,
    Points,
    ays,
    ays_deepfloyd,
    ays_sdxl,
    ays_svd,
    beta,
    from_points,
    leading,
    linspace,
    logsnr,
    power,
    trailing,
    uniform,
    vector,
)
from samplers.schedule import Schedule

__all__ = [
    "FINALS",
    "GRIDS",
    "Grid",
    "Nodes",
    "Points",
    "Spacing",
    "ays",
    "ays_deepfloyd",
    "ays_sdxl",
    "ays_svd",
    "beta",
    "from_points",
    "from_sigmas",
    "from_timesteps",
    "leading",
    "linspace",
    "logsnr",
    "make_grid",
    "points_of",
    "power",
    "trailing",
    "uniform",
]

FINALS = ("t_min", "zero", "denoise")
_RANGE_TOLERANCE, _SIGMA_TOLERANCE = 1e-6, 1e-5  # relative; a step in time is a larger one in sigma
_MOST_STEPS = 10**6
# of a step in lam over max(1, |lam|), which float64 knows to a few 1e-16: its length has three digits or more
_LEAST_STEP = 1e-12
_POWER = re.compile(r"""power\(\s*(?:rho\s*=\s*)?([^\s,()]+)\s*(?:,\s*(?:of\s*=\s*)?["']?(\w+)["']?\s*)?\)""")


class Spacing(NamedTuple):
    """What a grid's name stands for.

    Attributes:
        points: `(schedule, n) -> n decreasing times`.
        final: what the last step is by default, see `make_grid`.
        replaces: whether clean data takes the place of the last node, instead of following it.
    """

    points: Points
    final: str = "t_min"
    replaces: bool = False


GRIDS: dict[str, Spacing] = {
    "uniform": Spacing(uniform),
    "quadratic": Spacing(power(2.0, of="t")),
    "time-uniform": Spacing(power(1.0, of="vp_time")),
    "time-quadratic": Spacing(power(2.0, of="vp_time")),
    "logsnr": Spacing(logsnr),
    "exponential": Spacing(logsnr),
    "karras": Spacing(power(7.0)),
    "beta": Spacing(beta),
    "edm": Spacing(power(7.0), "zero"),
    "sgm": Spacing(uniform, "zero", replaces=True),  # Stability AI's generative-models
    "leading": Spacing(leading, "zero"),
    "linspace": Spacing(linspace, "zero"),
    "trailing": Spacing(trailing, "zero"),
    "ays": Spacing(ays, "zero", replaces=True),
    "ays-deepfloyd": Spacing(ays_deepfloyd, "zero", replaces=True),
    "ays-sdxl": Spacing(ays_sdxl, "zero", replaces=True),
    "ays-svd": Spacing(ays_svd, "zero", replaces=True),
}


@dataclass(frozen=True, eq=False)
class Grid:
    """Nodes t_0 > ... > t_N of a sampling run, float64, on a schedule; the last may be clean data.

    That they lie in the schedule's range is checked by `make_grid`, `from_timesteps` and `from_sigmas`, not here.

    Raises:
        ValueError: fewer than two nodes, a NaN, nodes that do not decrease strictly, or two so close that float64 does not
            resolve the step between them: less than 1e-12 in lam, or of lam where that is above 1.
    """

    schedule: Schedule
    t: np.ndarray

    def __post_init__(self) -> None:
        t = self.t
        if t.ndim != 1 or len(t) < 2:
            raise ValueError(f"a grid needs at least 2 nodes in one dimension, got shape {t.shape}")
        if not np.isfinite(t).all():
            raise ValueError(f"a grid must be finite: node {int(np.argmin(np.isfinite(t)))} is {t[~np.isfinite(t)][0]}")
        _decreasing(t, "t", "a grid")
        self._check_steps()

    def _check_steps(self) -> None:
        """Raise ValueError for a step whose length in lam, which solvers divide by, is mostly rounding error."""
        with np.errstate(invalid="ignore"):  # times that no schedule has are not looked for here
            lam = self.lam
            size = np.where(np.isfinite(lam), np.abs(lam), 0.0)
            close = np.flatnonzero(np.diff(lam) < _LEAST_STEP * np.maximum(1.0, np.maximum(size[:-1], size[1:])))
        if len(close):
            i = int(close[0])
            a, b = float(self.t[i]), float(self.t[i + 1])
            raise ValueError(
                f"a grid must decrease strictly, in steps that float64 resolves: t[{i}]={a!r}, t[{i + 1}]={b!r} are "
                f"{lam[i + 1] - lam[i]:.1e} apart in lam, and must be {_LEAST_STEP:g} or more (of lam, where that is above 1)"
            )

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


def points_of(grid: str | Points) -> Spacing:
    """What a grid's name stands for; a function stands for itself, and "power(5)" or "power(2, t)" for what `power` makes.

    Raises:
        ValueError: an unknown name, or arguments that `power` does not take.
        TypeError: neither a name nor callable.
    """
    if callable(grid):
        return Spacing(grid)
    if not isinstance(grid, str):
        raise TypeError(f"grid must be a name or a function (schedule, n) -> times, got {type(grid).__name__}")
    if made := _POWER.fullmatch(grid.strip()):
        try:
            rho = float(made[1])
        except ValueError:
            raise ValueError(f"rho of grid {grid!r} must be a number, got {made[1]!r}") from None
        return Spacing(power(rho, made[2] or "sigma_bar"))
    if grid not in GRIDS:
        raise unknown("grid", grid, [*GRIDS, "power(rho)"])
    return GRIDS[grid]


def make_grid(schedule: Schedule, grid: str | Points, steps: int, final: str | None = None) -> Grid:
    """A grid by name.

    Args:
        schedule: the noise schedule.
        grid: a name of `GRIDS`, "power(rho)" or "power(rho, of)", or a function `(schedule, n) -> n decreasing times`.
        steps: at least 1.
        final: "t_min" ends at the grid's last node. "zero" ends at clean data after one node less, which "sgm" and "ays" leave
            out at the end and all others by wider spacing; "denoise" adds a step to clean data. None is the grid's own.

    Raises:
        ValueError: an unknown grid or final, steps below 1, or a grid that this schedule does not allow.
    """
    points, default, replaces = points_of(grid)
    final = default if final is None else final
    if final not in FINALS:
        raise unknown("final", final, FINALS)
    if not 1 <= steps <= _MOST_STEPS:
        raise ValueError(f"steps must be {'at least 1' if steps < 1 else f'at most {_MOST_STEPS}'}, got {steps}")
    n = steps if final == "zero" and not replaces else steps + 1
    what = f"grid {grid!r}" if isinstance(grid, str) else f"grid {getattr(grid, '__name__', grid)}"
    t = _numbers(points(schedule, n), f"{what} must give {n} times")
    if t.shape != (n,):
        raise ValueError(f"{what} must give {n} times, got shape {t.shape}")
    if final == "zero":
        t = t[:steps]
    if math.isclose(t[0], schedule.t_max, rel_tol=1e-9):
        t[0] = schedule.t_max  # rounding may miss the end by an ulp, which is a step of its own where alpha = 0
    t = _within(schedule, t, what)
    if final != "t_min":
        t = np.append(t, schedule.t_zero)
    return Grid(schedule, t)


def allows(schedule: Schedule, grid: str | Points) -> bool:
    """Whether a schedule has a grid's nodes: "logsnr" needs a finite start, "ays" the schedule it was published for."""
    points = points_of(grid).points
    try:
        points(schedule, 2)
    except ValueError:
        return False
    return True


def from_timesteps(schedule: Schedule, timesteps: Nodes) -> Grid:
    """A grid from explicit times in the schedule's own time, end included.

    Raises:
        ValueError: fewer than two, not strictly decreasing or closer than a `Grid` may be, NaN, or more than 1e-6 (relative)
            outside `[t_min, t_max]`.
    """
    t = vector(timesteps, "timesteps")
    _decreasing(t, "timesteps")
    return Grid(schedule, _within(schedule, t, "timesteps"))


def from_sigmas(schedule: Schedule, sigmas: Nodes) -> Grid:
    """A grid from explicit values of `sigma_bar = sigma / alpha`, end included; the last may be 0, which is clean data.

    Raises:
        ValueError: fewer than two, not strictly decreasing or closer than a `Grid` may be, NaN, negative, or more than 1e-5
            (relative) outside the schedule's range of sigma_bar.
    """
    values = vector(sigmas, "sigmas")
    if not (values[:-1] > 0).all() or values[-1] < 0:
        raise ValueError(f"sigmas must be positive (only the last may be 0), got {values.tolist()}")
    _decreasing(values, "sigmas")
    positive = values[values > 0]
    ends = schedule.sigma_bar(np.array([schedule.t_min, schedule.t_max]))
    outside = (positive < ends[0] * (1 - _SIGMA_TOLERANCE)) | (positive > ends[1] * (1 + _SIGMA_TOLERANCE))
    if outside.any():
        raise ValueError(
            f"sigmas: {positive[outside][0]:g} is outside [{ends[0]:g}, {ends[1]:g}], the sigma / alpha that schedule "
            f"{schedule.name!r} has"
        )
    # clipped as times too, which the way through lam rounds
    t = np.clip(schedule.t_of_lam(-np.log(np.clip(positive, *ends))), schedule.t_min, schedule.t_max)
    return Grid(schedule, t if len(positive) == len(values) else np.append(t, schedule.t_zero))


def _numbers(values: Nodes, wanted: str) -> np.ndarray:
    """What a grid's function gave, as an array of its own."""
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{wanted}, got {values!r}") from error


def _decreasing(values: np.ndarray, name: str, what: str | None = None) -> None:
    """Raise ValueError where values do not decrease strictly."""
    rising = np.flatnonzero(~(np.diff(values) < 0))
    if len(rising):
        i = int(rising[0])
        raise ValueError(
            f"{what or name} must decrease strictly: {name}[{i}]={values[i]:g}, {name}[{i + 1}]={values[i + 1]:g}"
        )


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
