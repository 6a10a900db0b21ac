"""Classifier-free guidance: a prediction with the condition, moved away from the one without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from samplers.grid import Nodes, from_timesteps
from samplers.guidance.conditions import Cond
from samplers.guidance.guided import Branching, Interval, Scale
from samplers.model import EpsModel, Scalar, require_model
from samplers.plan import Plan
from samplers.schedule import Schedule

_ROUNDING = 1e-9


def classifier_free(
    model: EpsModel,
    scale: Scale,
    null: Cond,
    *,
    interval: Interval | None = None,
    rescale: float = 0.0,
    batched: bool = True,
) -> EpsModel:
    """The model under classifier-free guidance: `null + scale (conditional - null)`.

    Ho & Salimans 2022, arXiv:2207.12598; their w is `scale - 1`. Scale 1 is the conditional model, and costs one call.

    Args:
        model: conditional, of any kind of prediction, on any schedule.
        scale: 1 and more; as usual 1.5 to 3 for classes, 5 to 8 for text. Also a function of `sigma_bar = sigma / alpha`, or
            (B,), one for each sample.
        null: what replaces entries of `cond` in the second prediction: `{"class_labels": 10}` for a null class,
            `{"encoder_hidden_states": e}` for the empty prompt, or for a negative one. A number fills a tensor like the
            entry's; a tensor has a row for each sample, or one for all; None stands for itself and needs `batched=False`; a
            dict replaces entries of a dict.
        interval: (low, high) in sigma_bar, outside of which the conditional model is called alone (Kynkäänniemi et al. 2024,
            arXiv:2404.07724: low < sigma_bar <= high). None is everywhere.
        rescale: phi in [0, 1]: how far the standard deviation of each sample's prediction is brought back to that of the
            conditional one (Lin et al. 2023, arXiv:2305.08891, section 3.4, with 0.7). It is taken on what the network
            itself predicts, as in the paper and in diffusers.
        batched: whether both predictions come from one call of twice the batch, or from two calls.

    Returns:
        A model that predicts what `model` predicts.

    Raises:
        ValueError, TypeError: an argument out of range or of another kind. At a call: a null condition for which the call has
            no condition, or of another shape or device.
    """
    return ClassifierFree(model, scale, null, interval=interval, rescale=rescale, batched=batched)


def cfg_plus_plus(
    model: EpsModel,
    scale: float,
    null: Cond,
    grid: Plan | Nodes,
    *,
    batched: bool = True,
) -> EpsModel:
    """The model under CFG++ for one grid: data from the guided prediction, and noise added back from the one without condition.

    Chung et al. 2024, arXiv:2406.08070, algorithm 2: `x' = alpha' x0_guided + sigma' eps_null`, where x0_guided follows from
    `eps_null + scale (eps - eps_null)`. Written out, this is the DDIM step with classifier-free guidance of the scale
    `scale / (1 - exp(-h))`, where h is the step's length in lam = log(alpha / sigma). So CFG++ is classifier-free guidance
    whose scale depends on the step: with `ddim` it is the paper's algorithm to rounding, and with any other sampler it is
    that scale at each of its calls, which takes h from the step of the grid that the call lies in. Shorter steps guide more:
    a scale is one for a number of steps.

    Args:
        model, null, batched: as for `classifier_free`.
        scale: lambda in the paper, in (0, 1]; 0.6 there, for 50 steps.
        grid: a plan, or times in the schedule's own unit that decrease, end included: what will be sampled on.

    Returns:
        A model that predicts what `model` predicts, for that grid.

    Raises:
        ValueError, TypeError: as for `classifier_free`, or a grid that is none.
    """
    require_model("model", model)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"scale must be a positive number, in (0, 1] as a rule, got {scale!r}")
    return classifier_free(
        model, StepScale.on(model.schedule, _times(model.schedule, grid), scale), null, batched=batched
    )


def _times(schedule: Schedule, grid: Plan | Nodes) -> Sequence[float] | np.ndarray:
    """The times of a grid, which was given by that name."""
    if isinstance(grid, Plan):
        return grid.times
    if grid is None or isinstance(grid, str):
        raise TypeError(f"grid must be a plan, as of make_plan, or decreasing times, got {grid!r}")
    try:
        return from_timesteps(schedule, grid).t
    except (TypeError, ValueError) as error:
        raise type(error)(f"grid must be a plan, as of make_plan, or decreasing times: {error}") from error


@dataclass(frozen=True)
class StepScale:
    """The scale of classifier-free guidance that makes CFG++ of it, a function of sigma_bar that is constant on each step.

    Attributes:
        levels: sigma_bar where each step begins, decreasing.
        scales: of each step.
    """

    levels: tuple[float, ...]
    scales: tuple[float, ...]

    @classmethod
    def on(cls, schedule: Schedule, times: Sequence[float] | np.ndarray, scale: float) -> StepScale:
        """For a grid of times that decrease; `1 - exp(-h)` is one less the ratio of sigma_bar after and before a step."""
        levels = [float(schedule.sigma_bar(float(t))) for t in times]
        pairs = pairwise(levels)
        return cls(tuple(levels[:-1]), tuple(scale / (1.0 - b / a if a < math.inf else 1.0) for a, b in pairs))

    def __call__(self, sigma_bar: float) -> float:
        """The scale of the last step that has begun there; before the first one, of the first."""
        begun = [scale for a, scale in zip(self.levels, self.scales, strict=True) if sigma_bar <= a * (1.0 + _ROUNDING)]
        return begun[-1] if begun else self.scales[0]


class ClassifierFree(Branching):
    """See `classifier_free`."""

    def __init__(
        self,
        model: EpsModel,
        scale: Scale,
        null: Cond,
        *,
        interval: Interval | None = None,
        rescale: float = 0.0,
        batched: bool = True,
    ) -> None:
        super().__init__(model, scale, interval, {"null": null}, batched)
        if isinstance(rescale, bool) or not isinstance(rescale, (int, float)) or not 0 <= rescale <= 1:
            raise ValueError(f"rescale must be a number in [0, 1], got {rescale!r}")
        self.rescale = rescale

    def guide(
        self, x: Tensor, times: Tensor, alpha: Scalar, sigma: Scalar, cond: Cond, scale: Scalar
    ) -> tuple[Tensor, Tensor]:
        """Raw outputs with and without guidance."""
        plain, null = self.branches(x, times, alpha, sigma, cond)
        guided = torch.lerp(null, plain, scale)
        return (rescaled(guided, plain, self.rescale) if self.rescale else guided), plain


def rescaled(guided: Tensor, plain: Tensor, amount: float) -> Tensor:
    """The guided prediction, its standard deviation in each sample brought back to that of the other by `amount`.

    Lin et al. 2023, arXiv:2305.08891, equations 15 and 16.
    """
    deviations = (wide(value).flatten(1).std(1) for value in (plain, guided))
    ratio = next(deviations) / next(deviations)
    factor = torch.lerp(torch.ones_like(ratio), ratio, amount).to(guided.dtype)
    return guided * factor.view(-1, *[1] * (guided.ndim - 1))


def wide(value: Tensor) -> Tensor:
    """A tensor of half precision in float32, for a sum over a sample."""
    return value if value.dtype == torch.float64 else value.float()
