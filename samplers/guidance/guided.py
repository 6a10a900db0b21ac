"""Guidance in general: several predictions at one state, mixed by a scale that may depend on the noise level."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from samplers.guidance.conditions import Cond, check_null, check_replaces, joined, replaced
from samplers.guidance.wrapped import Wrapped
from samplers.model import EpsModel, Scalar

Scale = float | Tensor | Callable[[float], float]
Interval = tuple[float, float]


class Guided(Wrapped):
    """A model under guidance, which predicts what the model inside predicts.

    Every quantity that a sampler asks for follows from the raw output by an affine map that depends on state and time alone. A
    sum of raw outputs whose weights add up to 1 is therefore the same guidance in epsilon, x0 or v, and no sampler sees a
    difference. What is not such a sum says in its own words where it is taken.

    Args:
        model: the model inside.
        scale: of the guidance; a function of sigma_bar; or (B,), one for each sample.
        interval: (low, high) in `sigma_bar = sigma / alpha`, which is EDM's sigma: guidance where low < sigma_bar <= high, and
            elsewhere the model inside alone. None is everywhere.
        neutral: the scale at which guidance changes nothing, so that the model inside alone is called; None where there is none.

    Raises:
        ValueError, TypeError: a scale that is not finite or of another kind, or an interval out of order.
    """

    def __init__(
        self, model: EpsModel, scale: Scale, interval: Interval | None = None, neutral: float | None = 1.0
    ) -> None:
        super().__init__(model)
        self.scale, self.interval, self.neutral = checked_scale(scale), _checked_interval(interval), neutral

    def output(self, x: Tensor, times: Tensor, alpha: Scalar, sigma: Scalar, cond: Mapping[str, Any]) -> Tensor:
        """The raw output under guidance; where it has no effect, that of the model inside and of no other.

        Where alpha and sigma are tensors, which to look at would wait for the device, guidance is computed for all samples.
        """
        inside, scale = self._inside(alpha, sigma), self._scale(x, alpha, sigma)
        neutral = self.neutral is not None and not isinstance(scale, Tensor) and scale == self.neutral
        if inside is False or neutral:
            return self.model.output(x, times, alpha, sigma, self.own(cond))
        guided, plain = self.guide(x, times, alpha, sigma, cond, scale)
        return torch.where(inside, guided, plain) if isinstance(inside, Tensor) else guided

    def own(self, cond: Cond) -> Cond:
        """The conditions that are the model's inside; here all."""
        return cond

    @abstractmethod
    def guide(
        self, x: Tensor, times: Tensor, alpha: Scalar, sigma: Scalar, cond: Cond, scale: Scalar
    ) -> tuple[Tensor, Tensor]:
        """Raw outputs with and without guidance; arguments as for `output`, and the scale, which broadcasts with x."""

    def _inside(self, alpha: Scalar, sigma: Scalar) -> bool | Tensor:
        if self.interval is None:
            return True
        low, high = self.interval
        level = _ratio(sigma, alpha)
        return (low < level) & (level <= high) if isinstance(level, Tensor) else low < level <= high

    def _scale(self, x: Tensor, alpha: Scalar, sigma: Scalar) -> Scalar:
        scale, column = self.scale, (-1, *[1] * (x.ndim - 1))
        if isinstance(scale, Tensor):
            if scale.shape != (len(x),):
                raise ValueError(f"scale must be a number or of shape ({len(x)},), got {tuple(scale.shape)}")
            if scale.device != x.device:
                raise ValueError(f"scale is on {scale.device}, the states on {x.device}; move one of them")
            return scale.to(x.dtype).view(column)
        if not callable(scale):
            return scale
        level = _ratio(sigma, alpha)
        if not isinstance(level, Tensor):
            return scale(level)
        found = [scale(one) for one in level.flatten().tolist()]
        return torch.tensor(found, dtype=x.dtype, device=x.device).view(column)


class Branching(Guided):
    """Guidance that calls one model with several conditions at each state, in one batch or one after the other.

    Args:
        model, scale, interval, neutral: as for `Guided`.
        nulls: what replaces entries of cond, by the name of the argument that it came from; a call for each beside the
            conditional one.
        batched: whether the calls are one, on a batch that holds the states once for each.

    Raises:
        ValueError, TypeError: as for `Guided`, or a null condition that is none.
    """

    def __init__(
        self,
        model: EpsModel,
        scale: Scale,
        interval: Interval | None,
        nulls: Mapping[str, Cond],
        batched: bool,
        neutral: float | None = 1.0,
    ) -> None:
        super().__init__(model, scale, interval, neutral)
        if not isinstance(batched, bool):
            raise TypeError(f"batched must be True or False, got {batched!r}")
        for name, null in nulls.items():
            check_null(name, null)
        self.nulls, self.batched = nulls, batched

    def output(self, x: Tensor, times: Tensor, alpha: Scalar, sigma: Scalar, cond: Cond) -> Tensor:
        """As `Guided.output`; a condition that is missing is told of at the first call, inside the interval or not."""
        for name, null in self.nulls.items():
            check_replaces(name, cond, null)
        return super().output(x, times, alpha, sigma, cond)

    def branches(self, x: Tensor, times: Tensor, alpha: Scalar, sigma: Scalar, cond: Cond) -> Sequence[Tensor]:
        """Raw outputs: the conditional one, and one for each null condition."""
        conds = [cond, *(replaced(name, cond, null, x) for name, null in self.nulls.items())]
        if not self.batched:
            return [self.model.output(x, times, alpha, sigma, one) for one in conds]
        count = len(conds)
        many = joined(list(self.nulls)[-1], conds, len(x))
        states, at, alpha, sigma = (_repeated(value, count) for value in (x, times, alpha, sigma))
        return self.model.output(states, at, alpha, sigma, many).chunk(count)


def checked_scale(scale: Scale, name: str = "scale") -> Scale:
    """The scale.

    Raises:
        ValueError: not finite, or a tensor that is not (B,).
        TypeError: neither a number, a tensor nor a function.
    """
    if isinstance(scale, Tensor):
        if scale.ndim != 1:
            raise ValueError(f"{name} must be a number or of shape (B,), got {tuple(scale.shape)}")
        return scale
    if callable(scale):
        return scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{name} must be a number, a tensor (B,) or a function of sigma_bar, got {scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"{name} must be finite, got {scale}")
    return float(scale)


def _checked_interval(interval: Interval | None) -> Interval | None:
    if interval is None:
        return None
    if not isinstance(interval, (tuple, list)) or len(interval) != 2:
        raise TypeError(f"interval must be None or (low, high) in sigma_bar, got {interval!r}")
    low, high = interval
    if not 0 <= low < high:
        raise ValueError(f"interval must be (low, high) in sigma_bar with 0 <= low < high, got {interval!r}")
    return float(low), float(high)


def _ratio(sigma: Scalar, alpha: Scalar) -> Scalar:
    return sigma / alpha if isinstance(alpha, Tensor) or alpha != 0 else math.inf


def _repeated(value: Any, count: int) -> Any:
    """A tensor with rows, repeated; anything else as it is."""
    return torch.cat([value] * count) if isinstance(value, Tensor) and value.ndim else value
