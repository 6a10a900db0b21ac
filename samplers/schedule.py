"""Noise schedules: the pair (alpha, sigma) of `x_t = alpha(t) x_0 + sigma(t) eps` as functions of time.

Every schedule is a frozen dataclass with the same methods. Each takes Python floats, NumPy arrays or torch
tensors and answers in kind (NumPy in float64, torch in the dtype and on the device it was given).
`lam = log(alpha / sigma)` is half the log signal-to-noise ratio (Lu et al. 2022, arXiv:2206.00927, section 2.2) and
decreases in t; `sigma_bar = sigma / alpha` is the "sigma" of Karras et al. 2022 (arXiv:2206.00364).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from samplers.errors import check_numbers, float_table

Array = TypeVar("Array", float, np.ndarray, torch.Tensor)


def _as_array(t: Any) -> tuple[Any, Any]:
    """The value as a floating array, and the module (`numpy` or `torch`) that computes on it."""
    if isinstance(t, torch.Tensor):
        return (t if t.is_floating_point() else t.double()), torch
    return np.asarray(t, dtype=np.float64)[()], np


def _quiet(xp: Any) -> AbstractContextManager[Any]:
    """A context in which NumPy divides by zero and takes the log of zero in silence, as torch does."""
    return np.errstate(divide="ignore") if xp is np else nullcontext()


def _log_alpha_of_lam(lam: Any, xp: Any) -> Any:
    """`log alpha` on a variance-preserving schedule: `-log(1 + exp(-2 lam)) / 2`."""
    return -0.5 * xp.logaddexp(-2.0 * lam, xp.zeros_like(lam))


@dataclass(frozen=True)
class Schedule(ABC):
    """What all schedules share.

    Subclasses are frozen dataclasses of their arguments and define `_alpha`, `_sigma`, `_dalpha` and `_t_of_lam` on
    arrays, `_dsigma` too unless alpha^2 + sigma^2 = 1, and `_log_alpha` where log(alpha) would lose digits.
    """

    name: ClassVar[str]
    t_zero: ClassVar[float] = 0.0  # where sigma = 0 and alpha = 1, the end of a last step to clean data

    @property
    @abstractmethod
    def t_min(self) -> float:
        """The time of least noise at which the model is defined, where sampling ends."""

    @property
    @abstractmethod
    def t_max(self) -> float:
        """The time of pure, or nearly pure, noise, where sampling starts."""

    @abstractmethod
    def _alpha(self, t: Any, xp: Any) -> Any: ...

    @abstractmethod
    def _sigma(self, t: Any, xp: Any) -> Any: ...

    @abstractmethod
    def _dalpha(self, t: Any, xp: Any) -> Any: ...

    @abstractmethod
    def _t_of_lam(self, lam: Any, xp: Any) -> Any: ...

    def config(self) -> dict[str, Any]:
        """JSON-ready description; `from_config` makes the same schedule again."""
        arguments = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return {"name": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}}

    def _log_alpha(self, t: Any, xp: Any) -> Any:
        return xp.log(self._alpha(t, xp))

    def _dsigma(self, t: Any, xp: Any) -> Any:
        """From alpha^2 + sigma^2 = 1; a schedule that does not preserve the variance overrides it."""
        with _quiet(xp):
            return -self._alpha(t, xp) * self._dalpha(t, xp) / self._sigma(t, xp)

    def alpha(self, t: Array) -> Array:
        """Scale of the data at time t."""
        return self._alpha(*_as_array(t))

    def sigma(self, t: Array) -> Array:
        """Standard deviation of the noise at time t."""
        return self._sigma(*_as_array(t))

    def lam(self, t: Array) -> Array:
        """`log(alpha / sigma)`; +inf where sigma = 0, -inf where alpha = 0."""
        t, xp = _as_array(t)
        with _quiet(xp):
            return self._log_alpha(t, xp) - xp.log(self._sigma(t, xp))

    def sigma_bar(self, t: Array) -> Array:
        """`sigma / alpha = exp(-lam)`; inf where alpha = 0."""
        t, xp = _as_array(t)
        with _quiet(xp):
            return self._sigma(t, xp) / self._alpha(t, xp)

    def dalpha(self, t: Array) -> Array:
        """`d alpha / d t` at time t, per unit of the schedule's own time; negative, or 0 where alpha is constant.

        At an integer node of a `Discrete` schedule, where alpha has a kink, the slope of the interval below.
        """
        return self._dalpha(*_as_array(t))

    def dsigma(self, t: Array) -> Array:
        """`d sigma / d t` at time t, per unit of the schedule's own time; positive.

        Where alpha^2 + sigma^2 = 1 it is `-alpha dalpha / sigma`, +inf at `t_zero` (sigma leaves 0 like a square root).
        """
        return self._dsigma(*_as_array(t))

    def t_of_lam(self, lam: Array) -> Array:
        """The time at which `lam(t) = lam`; the inverse of `lam`."""
        return self._t_of_lam(*_as_array(lam))


@dataclass(frozen=True)
class VPLinear(Schedule):
    """Variance preserving with `beta(t)` linear: `log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2`.

    Song et al. 2021, arXiv:2011.13456, equation 33; time in [1e-3, 1].
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    name: ClassVar[str] = "vp_linear"
    t_min: ClassVar[float] = 1e-3
    t_max: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_numbers(beta_min=self.beta_min, beta_max=self.beta_max)
        if not 0 < self.beta_min < self.beta_max < math.inf:
            raise ValueError(f"vp_linear needs 0 < beta_min < beta_max < inf, got {self}")

    def _log_alpha(self, t: Any, xp: Any) -> Any:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def _alpha(self, t: Any, xp: Any) -> Any:
        return xp.exp(self._log_alpha(t, xp))

    def _dalpha(self, t: Any, xp: Any) -> Any:
        return -0.5 * (self.beta_min + t * (self.beta_max - self.beta_min)) * self._alpha(t, xp)

    def _sigma(self, t: Any, xp: Any) -> Any:
        return xp.sqrt(-xp.expm1(2.0 * self._log_alpha(t, xp)))

    def _t_of_lam(self, lam: Any, xp: Any) -> Any:
        log_alpha, spread = _log_alpha_of_lam(lam, xp), self.beta_max - self.beta_min
        # the root of the quadratic in the form without cancellation at small t
        return -2.0 * log_alpha / (0.5 * self.beta_min + xp.sqrt(0.25 * self.beta_min**2 - spread * log_alpha))


@dataclass(frozen=True)
class Cosine(Schedule):
    """`alpha(t) = cos(pi/2 (t + s)/(1 + s)) / cos(pi/2 s/(1 + s))`, variance preserving.

    Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17. Time ends at 0.9946, where Lu et al. 2022 (arXiv:2206.00927,
    appendix D.3) stop because the log-SNR diverges at t = 1.
    """

    s: float = 0.008
    name: ClassVar[str] = "cosine"
    t_min: ClassVar[float] = 1e-3
    t_max: ClassVar[float] = 0.9946

    def __post_init__(self) -> None:
        check_numbers(s=self.s)
        if not 0 < self.s < 1:
            raise ValueError(f"cosine needs 0 < s < 1, got s={self.s}")

    def _angle(self, t: Any) -> Any:
        return 0.5 * math.pi * (t + self.s) / (1 + self.s)

    def _alpha(self, t: Any, xp: Any) -> Any:
        return xp.cos(self._angle(t)) / math.cos(self._angle(0.0))

    def _dalpha(self, t: Any, xp: Any) -> Any:
        return xp.sin(self._angle(t)) * (-0.5 * math.pi / (1 + self.s) / math.cos(self._angle(0.0)))

    def _sigma(self, t: Any, xp: Any) -> Any:
        a, b = self._angle(t), self._angle(0.0)
        # cos^2 b - cos^2 a = sin(a - b) sin(a + b), exact also where alpha is near 1
        return xp.sqrt(xp.sin(a - b) * xp.sin(a + b)) / math.cos(b)

    def _t_of_lam(self, lam: Any, xp: Any) -> Any:
        # sin^2 a = 1 - alpha^2 cos^2 b, written with sigma so that no digit is lost at small t
        sigma2, alpha = xp.exp(2.0 * _log_alpha_of_lam(-lam, xp)), xp.exp(_log_alpha_of_lam(lam, xp))
        cos_b, sin_b = math.cos(self._angle(0.0)), math.sin(self._angle(0.0))
        angle = xp.arctan2(xp.sqrt(sigma2 * cos_b**2 + sin_b**2), alpha * cos_b)
        return angle * (1 + self.s) * 2.0 / math.pi - self.s


@dataclass(frozen=True)
class EDM(Schedule):
    """`alpha = 1, sigma = t`: time is the noise level (Karras et al. 2022, arXiv:2206.00364, table 1)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    name: ClassVar[str] = "edm"

    def __post_init__(self) -> None:
        check_numbers(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"edm needs 0 < sigma_min < sigma_max < inf, got {self}")

    @property
    def t_min(self) -> float:
        """`sigma_min`."""
        return self.sigma_min

    @property
    def t_max(self) -> float:
        """`sigma_max`."""
        return self.sigma_max

    def _alpha(self, t: Any, xp: Any) -> Any:
        return xp.ones_like(t)[()]

    def _dalpha(self, t: Any, xp: Any) -> Any:
        return xp.zeros_like(t)[()]

    def _sigma(self, t: Any, xp: Any) -> Any:
        return t

    def _dsigma(self, t: Any, xp: Any) -> Any:
        return xp.ones_like(t)[()]

    def _t_of_lam(self, lam: Any, xp: Any) -> Any:
        return xp.exp(-lam)


@dataclass(frozen=True)
class Flow(Schedule):
    """Rectified flow: `alpha = 1 - t, sigma = t`, pure noise at t = 1 (Liu et al. 2022, arXiv:2209.03003)."""

    name: ClassVar[str] = "flow"
    t_min: ClassVar[float] = 1e-3
    t_max: ClassVar[float] = 1.0

    def _alpha(self, t: Any, xp: Any) -> Any:
        return 1.0 - t

    def _dalpha(self, t: Any, xp: Any) -> Any:
        return -xp.ones_like(t)[()]

    def _sigma(self, t: Any, xp: Any) -> Any:
        return t

    def _dsigma(self, t: Any, xp: Any) -> Any:
        return xp.ones_like(t)[()]

    def _t_of_lam(self, lam: Any, xp: Any) -> Any:
        return 1.0 / (1.0 + xp.exp(lam))


@dataclass(frozen=True)
class Discrete(Schedule):
    """A table of `alphas_cumprod`; between its nodes `log alpha` is linear in t (arXiv:2206.00927, appendix D.4).

    Integer t is the training step, t in [0, T - 1]; t = -1 is clean data (the empty product of alphas). Where the last
    entry is 0 (zero terminal SNR, Lin et al. 2023, arXiv:2305.08891) alpha itself is linear in the last interval.
    """

    alphas_cumprod: tuple[float, ...]
    _nodes: np.ndarray = field(init=False, repr=False, compare=False)  # of log alpha: t = -1, 0, ..., T - 1
    _slopes: np.ndarray = field(init=False, repr=False, compare=False)  # of log alpha: from t = i - 1 to i
    _copies: dict[Any, torch.Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)
    name: ClassVar[str] = "discrete"
    t_min: ClassVar[float] = 0.0
    t_zero: ClassVar[float] = -1.0

    def __post_init__(self) -> None:
        table = float_table("alphas_cumprod", self.alphas_cumprod)
        bad = np.flatnonzero(~(np.diff(table, prepend=1.0) < 0) | ~(table >= 0))
        if len(bad):
            raise ValueError(f"alphas_cumprod must decrease strictly within [0, 1): entry {bad[0]} is {table[bad[0]]}")
        with _quiet(np):
            nodes = 0.5 * np.log(np.concatenate([[1.0], table]))
        slopes = np.where(np.isinf(nodes[1:]), -1.0, np.diff(nodes))  # of no use, but finite, where alpha ends at 0
        object.__setattr__(self, "_nodes", nodes)
        object.__setattr__(self, "_slopes", slopes)

    @property
    def t_max(self) -> float:
        """The last training step, T - 1."""
        return float(len(self.alphas_cumprod) - 1)

    def _table(self, name: str, like: Any) -> Any:
        """The table `_nodes` or `_slopes` to index and combine with `like`; a device gets its copy once."""
        if not isinstance(like, torch.Tensor):
            return getattr(self, name)
        key = (name, like.dtype, like.device)
        if key not in self._copies:
            self._copies[key] = torch.as_tensor(getattr(self, name), dtype=like.dtype, device=like.device)
        return self._copies[key]

    def _interval(self, whole: Any, like: Any, xp: Any) -> tuple[Any, Any, Any, Any]:
        """Index, first node, slope and `alpha_is_linear` of interval `whole`, the nearest for times outside.

        The latter is None where it holds nowhere, as alpha does not end at 0.
        """
        last = len(self._slopes) - 1
        # a time that is NaN takes any interval, and gives NaN as on other schedules
        i = np.fmin(np.fmax(whole, 0), last).astype(np.int64) if xp is np else whole.nan_to_num(0).clamp(0, last).long()
        alpha_is_linear = i == last if self.alphas_cumprod[-1] == 0 else None
        return i, self._table("_nodes", like)[i], self._table("_slopes", like)[i], alpha_is_linear

    def _forms(self, t: Any, xp: Any) -> tuple[Any, Any, Any]:
        """`log alpha` where it is linear in t, `alpha_is_linear`, and alpha where that holds: each finite, so are gradients.

        The last two are None where alpha does not end at 0.
        """
        i, node, slope, alpha_is_linear = self._interval(xp.floor(t) + 1, t, xp)
        w = t + 1 - i  # position in the interval, 0 .. 1
        alpha = None if alpha_is_linear is None else xp.exp(node) * (1.0 - w.clip(max=1.0))
        return node + w * slope, alpha_is_linear, alpha

    def _log_alpha(self, t: Any, xp: Any) -> Any:
        log_alpha, alpha_is_linear, alpha = self._forms(t, xp)
        if alpha is None:
            return log_alpha
        with _quiet(xp):
            return xp.where(alpha_is_linear, xp.log(alpha), log_alpha)[()]

    def _alpha(self, t: Any, xp: Any) -> Any:
        log_alpha, alpha_is_linear, alpha = self._forms(t, xp)
        return xp.exp(log_alpha) if alpha is None else xp.where(alpha_is_linear, alpha, xp.exp(log_alpha))[()]

    def _dalpha(self, t: Any, xp: Any) -> Any:
        _, node, slope, alpha_is_linear = self._interval(xp.ceil(t), t, xp)
        dalpha = slope * self._alpha(t, xp)
        return dalpha if alpha_is_linear is None else xp.where(alpha_is_linear, -xp.exp(node), dalpha)[()]

    def _sigma(self, t: Any, xp: Any) -> Any:
        log_alpha, alpha_is_linear, alpha = self._forms(t, xp)
        variance = 0.0 - xp.expm1(2.0 * log_alpha)  # 0 - 0 is +0, so 1 / sigma is +inf at t = -1
        return xp.sqrt(variance if alpha is None else xp.where(alpha_is_linear, 1.0 - alpha**2, variance))[()]

    def _t_of_lam(self, lam: Any, xp: Any) -> Any:
        log_alpha = _log_alpha_of_lam(lam, xp)
        number = xp.searchsorted(-self._table("_nodes", lam), -log_alpha) - 1
        i, node, slope, alpha_is_linear = self._interval(number, lam, xp)
        change = log_alpha - node
        w = change / slope
        return i - 1 + (w if alpha_is_linear is None else xp.where(alpha_is_linear, -xp.expm1(change), w))


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0) -> VPLinear:
    """Continuous variance-preserving schedule with linear beta, t in [1e-3, 1]; see `VPLinear`."""
    return VPLinear(beta_min, beta_max)


def cosine(s: float = 0.008) -> Cosine:
    """Cosine schedule, t in [1e-3, 0.9946]; see `Cosine`."""
    return Cosine(s)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> EDM:
    """`alpha = 1, sigma = t`, t in [sigma_min, sigma_max]; see `EDM`."""
    return EDM(sigma_min, sigma_max)


def flow() -> Flow:
    """Rectified flow, t in [1e-3, 1]; see `Flow`."""
    return Flow()


def from_alphas_cumprod(alphas_cumprod: Sequence[float] | np.ndarray | torch.Tensor) -> Discrete:
    """The schedule of a discrete model from its table of `alphas_cumprod`, shape (T,); see `Discrete`.

    Raises:
        TypeError: not numbers.
        ValueError: entries that are not in [0, 1), not strictly decreasing or NaN; fewer than two entries.
    """
    return Discrete(tuple(float_table("alphas_cumprod", alphas_cumprod).tolist()))


def from_betas(betas: Sequence[float] | np.ndarray | torch.Tensor) -> Discrete:
    """The schedule of a discrete model from its betas, shape (T,), each in (0, 1] (1 only at the end); see `Discrete`.

    Raises:
        TypeError: not numbers.
        ValueError: a beta outside (0, 1], or NaN; fewer than two entries.
    """
    table = float_table("betas", betas)
    bad = np.flatnonzero(~((table > 0) & (table <= 1)))
    if len(bad):
        raise ValueError(f"betas must lie in (0, 1]: entry {bad[0]} is {table[bad[0]]}")
    return from_alphas_cumprod(np.cumprod(1.0 - table))


_FACTORIES: dict[str, Callable[..., Schedule]] = {c.name: c for c in (VPLinear, Cosine, EDM, Flow)}
_FACTORIES[Discrete.name] = from_alphas_cumprod


def from_config(config: dict[str, Any]) -> Schedule:
    """The schedule that `config()` described.

    Raises:
        ValueError: an unknown name, or arguments that the schedule does not have.
    """
    options = dict(config)
    name = options.pop("name", None)
    if name not in _FACTORIES:
        raise ValueError(f"schedule name must be one of {sorted(_FACTORIES)}, got {name!r}")
    try:
        return _FACTORIES[name](**options)
    except TypeError as error:
        raise ValueError(f"schedule {name!r}: {error}") from error
