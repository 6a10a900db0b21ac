"""Where grids put their nodes: functions `(schedule, n) -> n decreasing times` that start at `t_max`, and their makers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from samplers.errors import unknown
from samplers.schedule import EDM, Discrete, Schedule

Points = Callable[[Schedule, int], np.ndarray]
Nodes = Sequence[float] | np.ndarray | Tensor
_TRAINING_STEPS = 1000
_VP_END = 1e-3  # where VP time ends; it starts at 1
_RHO = (0.1, 100.0)  # beyond, powers overflow, or neighbours of a fine grid agree in all digits


def uniform(schedule: Schedule, n: int) -> np.ndarray:
    """Uniform in t."""
    return np.linspace(schedule.t_max, schedule.t_min, n)


def logsnr(schedule: Schedule, n: int) -> np.ndarray:
    """Uniform in lam (Lu et al. 2022, arXiv:2206.00927, section 3.3); the same as exponential in sigma_bar."""
    _finite_start(schedule, "grid 'logsnr'")
    return schedule.t_of_lam(np.linspace(schedule.lam(schedule.t_max), schedule.lam(schedule.t_min), n))


def power(rho: float, of: str = "sigma_bar") -> Points:
    """A grid that is uniform in the rho-th root of a variable; `grid=grids.power(5)`, or as text `grid="power(5)"`.

    In sigma_bar, rho = 7 is "karras" (Karras et al. 2022, arXiv:2206.00364, equation 5). In t, rho = 2 is "quadratic" (DDIM:
    Song et al. 2021, arXiv:2010.02502, appendix D.2). In VP time, rho = 1 and 2 are "time-uniform" and "time-quadratic",
    the grids of DEIS (Zhang & Chen 2023, arXiv:2204.13902, appendix H.3). VP time is the t of the variance-preserving
    schedule with linear beta whose sigma_bar at t = 1 and t = 1e-3 is this schedule's at t_max and t_min: on `vp_linear` it
    is t itself, and through it an EDM or discrete model takes the same noise levels.

    Args:
        rho: in [0.1, 100]; the larger, the more nodes at low noise, where on a discrete schedule (t_min = 0) powers of t come so
            close that a long grid is refused.
        of: "sigma_bar", "t" or "vp_time".

    Raises:
        ValueError: rho out of range, or an unknown variable; from the grid itself, a schedule that starts at
            alpha = 0 where the variable is infinite there, or whose ends no VP schedule with rising beta has.
    """
    if isinstance(rho, bool) or not _RHO[0] <= rho <= _RHO[1]:
        raise ValueError(f"rho must be in [{_RHO[0]:g}, {_RHO[1]:g}], got {rho}")
    if of not in _POWERS:
        raise unknown("of", of, _POWERS)
    return _Power(float(rho), of)


@dataclass(frozen=True)
class _Power:
    """The grid that `power` makes; as text, what makes it."""

    rho: float
    of: str

    def __call__(self, schedule: Schedule, n: int) -> np.ndarray:
        return _POWERS[self.of](schedule, n, self.rho)

    def __repr__(self) -> str:
        return f"power({self.rho:g}, of={self.of!r})"


def _power_of_sigma_bar(schedule: Schedule, n: int, rho: float) -> np.ndarray:
    _finite_start(schedule, "a grid in powers of sigma_bar")
    start, end = (schedule.sigma_bar(t) ** (1 / rho) for t in (schedule.t_max, schedule.t_min))
    return schedule.t_of_lam(-rho * np.log(np.linspace(start, end, n)))


def _power_of_t(schedule: Schedule, n: int, rho: float) -> np.ndarray:
    return np.linspace(schedule.t_max ** (1 / rho), schedule.t_min ** (1 / rho), n) ** rho


def _power_of_vp_time(schedule: Schedule, n: int, rho: float) -> np.ndarray:
    _finite_start(schedule, "a grid in VP time")
    # -2 log alpha = slope t + curve t^2 on the VP schedule, and log(1 + sigma_bar^2) on any
    first, last = (np.log1p(schedule.sigma_bar(t) ** 2) for t in (schedule.t_max, schedule.t_min))
    curve = (first - last / _VP_END) / (1.0 - _VP_END)
    if curve <= 0:
        raise ValueError(
            f"grids in VP time need a schedule that reaches less noise: log(1 + sigma_bar^2) of {schedule.name!r} is "
            f"{last:.3g} at t_min, and must be below {_VP_END:g} of the {first:.3g} at t_max"
        )
    u = np.linspace(1.0, _VP_END ** (1 / rho), n) ** rho
    return schedule.t_of_lam(-0.5 * np.log(np.expm1(u * (first + curve * (u - 1.0)))))


_POWERS: dict[str, Callable[..., np.ndarray]] = {
    "sigma_bar": _power_of_sigma_bar,
    "t": _power_of_t,
    "vp_time": _power_of_vp_time,
}


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
    """Training steps T - 1, T - 1 - T/n, ..., rounded, as diffusers' `timestep_spacing="trailing"`.

    For 62 of the 1000 possible n (61 is the first) rounding lets diffusers add a time of -1 at the end; here there are n.
    """
    total = _training_steps(schedule, n)
    return _training_time(schedule, np.round(np.arange(total, 0, -total / n))[:n] - 1)


def from_points(values: Nodes, of: str = "t") -> Points:
    """A grid from a list of one's own: exactly the list at its own length, and resampled to any other number of nodes.

    Between two values the grid is linear in `of` over the node's index, so it is as monotone as the list and takes its ends;
    with `of="lam"` that is the log-linear interpolation of Align Your Steps. A step to clean data is no part of the list but
    `final="zero"`; steps = N takes N + 1 nodes with `final="t_min"`, which is the default for such a grid, else N.

    Args:
        values: at least two nodes, from noise to data: decreasing t, decreasing and positive sigma_bar, or rising lam.
        of: "t" (the schedule's own), "sigma_bar" or "lam": what the values are.

    Raises:
        ValueError: an unknown `of`, fewer than two values, NaN, or values in another order.
    """
    if of not in ("t", "sigma_bar", "lam"):
        raise unknown("of", of, ("t", "sigma_bar", "lam"))
    nodes = vector(values, "values")
    if of == "sigma_bar" and nodes.min() <= 0:
        raise ValueError(f"values of sigma_bar must be positive, got {nodes.min():g}; a step to 0 is final='zero'")
    wrong = np.flatnonzero(~(np.diff(nodes) * (1 if of == "lam" else -1) > 0))
    if len(wrong):
        i, order = int(wrong[0]), "rise" if of == "lam" else "decrease"
        raise ValueError(
            f"values of {of} must {order} strictly: values[{i}]={nodes[i]:g}, values[{i + 1}]={nodes[i + 1]:g}"
        )

    def points(schedule: Schedule, n: int) -> np.ndarray:
        resampled = _resampled(nodes, n)
        if of == "t":
            return resampled
        return schedule.t_of_lam(resampled if of == "lam" else -np.log(resampled))

    return points


_AYS_SD = (999.0, 850.0, 736.0, 645.0, 545.0, 455.0, 343.0, 233.0, 124.0, 24.0, 0.0)
_AYS_SDXL = (999.0, 845.0, 730.0, 587.0, 443.0, 310.0, 193.0, 116.0, 53.0, 13.0, 0.0)
_AYS_DEEPFLOYD = (995.0, 920.0, 811.0, 686.0, 555.0, 418.0, 315.0, 174.0, 109.0, 12.0, 0.0)
_AYS_SVD = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)


def ays(schedule: Schedule, n: int) -> np.ndarray:
    """Align Your Steps for Stable Diffusion 1.5: the 11 published training steps, log-linear in sigma_bar to other n.

    Sabour et al. 2024, arXiv:2404.14507, and the authors' quickstart guide. By default clean data takes the place of the
    last node, as in diffusers; with `final="t_min"` the grid ends at training step 0, as in the guide.

    Raises:
        ValueError: a schedule that is not Stable Diffusion's.
    """
    return _ays(schedule, n, "ays", Discrete, 14.6146, 0.0291672, _AYS_SD)


def ays_sdxl(schedule: Schedule, n: int) -> np.ndarray:
    """Align Your Steps for Stable Diffusion XL, which has the schedule of Stable Diffusion 1.5; see `ays`."""
    return _ays(schedule, n, "ays-sdxl", Discrete, 14.6146, 0.0291672, _AYS_SDXL)


def ays_deepfloyd(schedule: Schedule, n: int) -> np.ndarray:
    """Align Your Steps for the first stage of DeepFloyd IF, on the cosine schedule of 1000 training steps with beta to 0.999.

    It starts at training step 995, sigma_bar = 160.4, and start noise is that of this level; see `ays`.
    """
    return _ays(schedule, n, "ays-deepfloyd", Discrete, 20291.2, 0.00642541, _AYS_DEEPFLOYD)


def ays_svd(schedule: Schedule, n: int) -> np.ndarray:
    """Align Your Steps for Stable Video Diffusion, sigma from 700 to 0.002, on `edm(0.002, 700)`; see `ays`."""
    return _ays(schedule, n, "ays-svd", EDM, 700.0, 0.002, _AYS_SVD)


def _ays(
    schedule: Schedule, n: int, name: str, kind: type[Schedule], start: float, end: float, t: Sequence[float]
) -> np.ndarray:
    """The published times, on the schedule they were published for: its kind, and sigma_bar at its ends to 1 %."""
    ends = schedule.sigma_bar(np.array([schedule.t_max, schedule.t_min]))
    whole = not isinstance(schedule, Discrete) or len(schedule.alphas_cumprod) == _TRAINING_STEPS
    if not isinstance(schedule, kind) or not whole or not np.allclose(ends, (start, end), rtol=0.01, atol=0.0):
        steps = f" of {_TRAINING_STEPS} training steps" if kind is Discrete else ""
        raise ValueError(
            f"grid {name!r} is published for schedule {kind.name!r}{steps} with sigma_bar from {start:g} to {end:g}; "
            f"this one is {schedule.name!r}, from {ends[0]:g} to {ends[1]:g}"
        )
    nodes = np.array(t)
    return nodes if n == len(nodes) else schedule.t_of_lam(_resampled(schedule.lam(nodes), n))


def _resampled(nodes: np.ndarray, n: int) -> np.ndarray:
    return np.interp(np.linspace(0, len(nodes) - 1, n), np.arange(len(nodes)), nodes)


def vector(values: Any, argument: str) -> np.ndarray:
    """At least two finite numbers as a float64 vector.

    Raises:
        ValueError: anything else, by the argument's name.
    """
    try:
        array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument} must be a sequence of numbers, got {values!r}") from error
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"{argument} needs at least 2 values in one dimension, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{argument} must be finite, got {array[~np.isfinite(array)][0]}")
    return array


def _finite_start(schedule: Schedule, what: str) -> None:
    if math.isinf(schedule.lam(schedule.t_max)):
        raise ValueError(
            f"{what} needs a finite log-SNR at t_max, and schedule {schedule.name!r} starts at alpha = 0; "
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
