"""Guidance by a part of the difference between predictions: the one across what it is added to."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from samplers.errors import check_amount
from samplers.guidance.classifier_free import wide
from samplers.guidance.conditions import Cond
from samplers.guidance.guided import Branching, Interval, Scale
from samplers.model import Affine, EpsModel, Scalar


def apg(
    model: EpsModel,
    scale: Scale,
    null: Cond,
    *,
    eta: float = 0.0,
    norm_threshold: float = math.inf,
    momentum: float = 0.0,
    interval: Interval | None = None,
    batched: bool = True,
) -> EpsModel:
    """The model under adaptive projected guidance, which saturates less than classifier-free guidance at large scales.

    Sadat et al. 2024, arXiv:2410.02416, algorithm 1, on x0 whatever the network predicts. Of the difference
    `d = x0(conditional) - x0(null)` the part along x0(conditional) is scaled by eta, so that
    `x0 = x0(conditional) + (scale - 1) (d_across + eta d_along)`. With eta = 1 and nothing else it is classifier-free guidance.

    Args:
        model, scale, null, interval, batched: as for `classifier_free`; the scale is the same quantity.
        eta: weight of the part along the prediction; the paper has 0.
        norm_threshold: the longest that d may be, as a Euclidean norm over a sample; longer ones are shortened. It is r in the
            paper, which has 2.5 to 15 for images of 256 pixels or latents of 64; inf is none.
        momentum: beta in the paper: d has beta times what it was in the call before added to it; the paper has -0.75 to -0.5,
            and 0 is none. The memory is that of one run of `sample` or `run_plan`, and of each sample: it begins empty, counts
            the calls inside the interval, and a call of the model outside a run has none.

    Returns:
        A model that predicts what `model` predicts.

    Raises:
        ValueError, TypeError: as for `classifier_free`, or another argument out of range. ValueError at the start of a run
            that begins at alpha = 0 with a network that gives no x0 there.
    """
    return Projected(model, scale, null, eta, norm_threshold, momentum, interval=interval, batched=batched)


class Projected(Branching):
    """See `apg`."""

    def __init__(
        self,
        model: EpsModel,
        scale: Scale,
        null: Cond,
        eta: float,
        norm_threshold: float,
        momentum: float,
        *,
        interval: Interval | None,
        batched: bool,
    ) -> None:
        super().__init__(model, scale, interval, {"null": null}, batched)
        for name, value in (("eta", eta), ("momentum", momentum)):
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        if not norm_threshold > 0:
            raise ValueError(f"norm_threshold must be positive, or inf for none, got {norm_threshold}")
        self.eta, self.norm_threshold, self.momentum = eta, norm_threshold, momentum
        self.running, self.average = False, None  # type: tuple[bool, Tensor | None]

    def begin(self) -> EpsModel:
        """With momentum, a copy without memory, which is filled by the run."""
        begun = super().begin()
        if not self.momentum:
            return begun
        other = copy.copy(begun)
        other.running, other.average = True, None  # type: ignore[attr-defined]
        return other

    def affine(self, kind: str, t: Scalar, alpha: Scalar, sigma: Scalar) -> Affine:
        """As of the model inside; ValueError where it gives no x0."""
        self.model.affine("x0", t, alpha, sigma)
        return super().affine(kind, t, alpha, sigma)

    def guide(
        self, x: Tensor, times: Tensor, alpha: Scalar, sigma: Scalar, cond: Cond, scale: Scalar
    ) -> tuple[Tensor, Tensor]:
        """Raw outputs with and without guidance; the difference is taken to x0 and back."""
        plain, null = self.branches(x, times, alpha, sigma, cond)
        x0 = self.model.relation("x0", x, times, alpha, sigma)
        step = self._changed(x0.out * (plain - null), x0.of(x, plain))
        return plain + step * ((scale - 1.0) / x0.out), plain

    def _changed(self, difference: Tensor, x0: Tensor) -> Tensor:
        """The difference with what is remembered, of bounded length, its part along x0 scaled."""
        if self.running:
            if self.average is not None:
                difference = difference + self.momentum * self.average
            self.average = difference
        if self.norm_threshold < math.inf:
            length = inner(difference, difference).sqrt()
            difference = difference * (self.norm_threshold / length).clamp(max=1.0).to(difference.dtype)
        return difference - (1.0 - self.eta) * along(difference, x0)


def perp_neg(
    model: EpsModel,
    scale: Scale,
    null: Cond,
    negative: Cond,
    *,
    negative_scale: float = 1.0,
    interval: Interval | None = None,
    batched: bool = True,
) -> EpsModel:
    """The model under guidance with a negative prompt that leaves what it shares with the positive one alone.

    Perp-Neg, Armandpour et al. 2023, arXiv:2304.04968, section 4: with `p = conditional - null` and `n = negative - null`,
    `null + scale (p - negative_scale n_across)`, where n_across is the part of n that is perpendicular to p. The projection is
    the same for every kind of prediction.

    Args:
        model, scale, null, interval, batched: as for `classifier_free`; null is the empty prompt.
        negative: what replaces entries of cond, such as the embedding of a negative prompt. Where the empty prompt's place is
            simply taken by a negative one, that is `classifier_free` with the negative one as `null`.
        negative_scale: weight of the negative prompt beside the positive one, at least 0; the paper's weights are its negative.

    Returns:
        A model that predicts what `model` predicts; three evaluations of each sample at a call.

    Raises:
        ValueError, TypeError: as for `classifier_free`, or a negative_scale out of range.
    """
    check_amount("negative_scale", negative_scale)
    return PerpendicularNegative(model, scale, interval, null, negative, negative_scale, batched)


class PerpendicularNegative(Branching):
    """See `perp_neg`."""

    def __init__(
        self,
        model: EpsModel,
        scale: Scale,
        interval: Interval | None,
        null: Cond,
        negative: Cond,
        negative_scale: float,
        batched: bool,
    ) -> None:
        super().__init__(model, scale, interval, {"null": null, "negative": negative}, batched, neutral=None)
        self.negative_scale = negative_scale

    def guide(
        self, x: Tensor, times: Tensor, alpha: Scalar, sigma: Scalar, cond: Cond, scale: Scalar
    ) -> tuple[Tensor, Tensor]:
        """Raw outputs with and without guidance."""
        plain, null, negative = self.branches(x, times, alpha, sigma, cond)
        towards, away = plain - null, negative - null
        across = away - along(away, towards)
        return null + scale * (towards - self.negative_scale * across), plain


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over each sample (B, 1, ...), at least in float32."""
    return (wide(a) * wide(b)).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))


def along(a: Tensor, b: Tensor) -> Tensor:
    """The part of a along b in each sample; 0 where b is 0."""
    length = inner(b, b)
    part = torch.where(length > 0, inner(a, b) / length, 0.0)
    return part.to(a.dtype) * b
