"""Models whose prediction of the clean data is kept in the data's range."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from samplers.guidance.wrapped import Wrapped
from samplers.model import Affine, EpsModel, Scalar


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
    _check(max_value)
    return _Changed(model, partial(torch.clamp, min=-max_value, max=max_value))


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
    _check(max_value)
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1], got {ratio}")
    if not limit >= max_value:
        raise ValueError(f"limit must be at least max_value={max_value}, got {limit}")
    return _Changed(model, partial(_dynamic, ratio=ratio, max_value=max_value, limit=limit))


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


def _check(max_value: float) -> None:
    if not 0 < max_value < math.inf:
        raise ValueError(f"max_value must be positive and finite, got {max_value}")


class _Changed(Wrapped):
    """The model's x0, changed."""

    def __init__(self, model: EpsModel, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model, "x0")
        self.change = change
        # the one place where such a network has no x0; looking for it waits for the device, so only there
        self.undefined = model.predicts in ("eps", "score") and float(self.schedule.alpha(self.schedule.t_max)) == 0

    def affine(self, kind: str, t: Scalar, alpha: Scalar, sigma: Scalar) -> Affine:
        """As of a network that predicts x0; ValueError where the model inside gives none."""
        self.model.affine("x0", t, alpha, sigma)
        return super().affine(kind, t, alpha, sigma)

    def output(self, x: Tensor, times: Tensor, alpha: Scalar, sigma: Scalar, cond: Mapping[str, Any]) -> Tensor:
        """x0, changed."""
        if self.undefined and isinstance(alpha, Tensor) and bool((alpha == 0).any()):
            self.model.affine("x0", float(times.max()), 0.0, 1.0)  # says what is wrong
        out = self.model.output(x, times, alpha, sigma, cond)
        return self.change(self.model.relation("x0", x, times, alpha, sigma).of(x, out))
