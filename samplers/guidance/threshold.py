"""Models whose prediction of the clean data is kept in the data's range."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from samplers.model import EpsModel


def clip(model: EpsModel, max_value: float = 1.0) -> EpsModel:
    """The model with x0 clipped to the data's range, before any sampler sees it ("static thresholding").

    Ho et al. 2020, arXiv:2006.11239 (their code); Saharia et al. 2022, arXiv:2205.11487, section 2.3. A sampler in epsilon
    gets the epsilon that belongs to the clipped x0, unlike in `clip_sample` of diffusers' DDIM without
    `use_clipped_model_output`.

    Args:
        model: of any kind of prediction, on any schedule.
        max_value: the data lies in [-max_value, max_value]; positive.

    Returns:
        A model that predicts x0, with one call of `model` a call.

    Raises:
        ValueError: max_value not positive and finite.
        TypeError: not a model.
    """
    _check(model, max_value)
    return _wrapped(model, partial(torch.clamp, min=-max_value, max=max_value))


def threshold(model: EpsModel, ratio: float = 0.995, max_value: float = 1.0, *, limit: float = math.inf) -> EpsModel:
    """The model with dynamic thresholding of x0: each sample is clipped to its own s and brought back into range by it.

    Saharia et al. 2022, Imagen, arXiv:2205.11487, section 2.3: with s the `ratio`-quantile of a sample's absolute values, but
    at least `max_value` and at most `limit`, x0 becomes `clip(x0, -s, s) max_value / s`. Imagen has no limit. diffusers calls
    the limit `sample_max_value` and sets it to 1 by default, which makes its thresholding `clip`.

    Args:
        model: of any kind of prediction, on any schedule; of samples with at least one number.
        ratio: the quantile, in (0, 1].
        max_value: the data lies in [-max_value, max_value]; positive.
        limit: largest s, at least max_value.

    Returns:
        A model that predicts x0, with one call of `model` a call.

    Raises:
        ValueError: a value out of range.
        TypeError: not a model.
    """
    _check(model, max_value)
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1], got {ratio}")
    if not limit >= max_value:
        raise ValueError(f"limit must be at least max_value={max_value}, got {limit}")
    return _wrapped(model, partial(_dynamic, ratio=ratio, max_value=max_value, limit=limit))


def _dynamic(x0: Tensor, ratio: float, max_value: float, limit: float) -> Tensor:
    rows = x0.unsqueeze(-1).flatten(1)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    s = _quantile(rows.abs(), ratio).clamp(max_value, limit)[:, None]
    return (rows.clamp(-s, s) * (max_value / s)).to(x0.dtype).view_as(x0)


def _quantile(rows: Tensor, ratio: float) -> Tensor:
    """`torch.quantile(rows, ratio, dim=1)`, which refuses more than 2^24 numbers; sorts only what lies above the quantile."""
    position = ratio * (rows.shape[1] - 1)
    below = math.floor(position)
    largest = rows.topk(rows.shape[1] - below, dim=1).values
    low, high = largest[:, -1], largest[:, max(largest.shape[1] - 2, 0)]
    return torch.lerp(low, high, position - below)


def _check(model: EpsModel, max_value: float) -> None:
    if not isinstance(model, EpsModel):
        raise TypeError(f"model must be an EpsModel, got {type(model).__name__}; wrap it: EpsModel(net, schedule)")
    if not 0 < max_value < math.inf:
        raise ValueError(f"max_value must be positive and finite, got {max_value}")


def _wrapped(model: EpsModel, change: Callable[[Tensor], Tensor]) -> EpsModel:
    return EpsModel(_Changed(model, change), model.schedule, predicts="x0")


class _Changed:
    """The network of a wrapped model: x0 of the model, changed."""

    def __init__(self, model: EpsModel, change: Callable[[Tensor], Tensor]) -> None:
        self.model, self.change = model, change
        schedule = model.schedule
        # the one place where such a network has no x0; looking for it waits for the device, so only there
        self.undefined = model.predicts in ("eps", "score") and float(schedule.alpha(schedule.t_max)) == 0

    def parameters(self) -> Iterator[Tensor]:
        """What tells dtype and device of the model's states."""
        weights = self.model.weights
        return iter(() if weights is None else (weights,))

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        if self.undefined and bool((self.model.schedule.alpha(t.double()) == 0).any()):
            raise ValueError(
                f"a network with predicts={self.model.predicts!r} gives no x0 where alpha=0, at t={t.max():g}"
            )
        return self.change(self.model.x0(x, t, **cond))
