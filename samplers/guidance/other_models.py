"""Guidance by another network than the model's own: a weaker model, or a classifier of noisy states."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from samplers.guidance.conditions import Cond, check_null, replaced
from samplers.guidance.guided import Guided, Interval, Scale
from samplers.model import Affine, EpsModel, Scalar, require_model

_TOLERANCE = 1e-6  # relative, as for explicit nodes of a grid


def autoguidance(
    model: EpsModel,
    weaker: EpsModel,
    scale: Scale,
    *,
    null: Cond | None = None,
    interval: Interval | None = None,
) -> EpsModel:
    """The model guided away from a weaker one: `weaker + scale (model - weaker)`.

    Karras et al. 2024, arXiv:2406.02507, equation 4; their w is the scale.

    Args:
        model: of any kind of prediction, on any schedule, conditional or not.
        weaker: a smaller or less trained model of the same data, such as the same one early in its training. It may predict
            another quantity and have another schedule: it is asked at the same signal-to-noise ratio.
        scale: 1 and more; 1 is the model alone. 1.5 to 2.5 in the paper. Further as for `classifier_free`.
        null: what replaces entries of cond for the weaker model; None is nothing.
        interval: as for `classifier_free`.

    Returns:
        A model that predicts what `model` predicts; a call of each at a state.

    Raises:
        ValueError, TypeError: an argument out of range or of another kind. ValueError at the start of a run that goes where the
            weaker model's schedule does not, or where it does not give what it takes.
    """
    return Autoguided(model, weaker, scale, null, interval)


class Autoguided(Guided):
    """See `autoguidance`."""

    def __init__(
        self, model: EpsModel, weaker: EpsModel, scale: Scale, null: Cond | None, interval: Interval | None
    ) -> None:
        super().__init__(model, scale, interval)
        require_model("weaker", weaker)
        if null is not None:
            check_null("null", null)
        mine, other = model.weights, weaker.weights
        if mine is not None and other is not None and (mine.device, mine.dtype) != (other.device, other.dtype):
            raise ValueError(f"weaker is {other.dtype} on {other.device}, the model {mine.dtype} on {mine.device}")
        self.weaker, self.null, self.same_schedule = weaker, null or {}, weaker.schedule == model.schedule
        self.same_output = self.same_schedule and (weaker.predicts, weaker.sigma_data) == (
            model.predicts,
            model.sigma_data,
        )

    def begin(self) -> EpsModel:
        """The wrapper around what both models are for one run."""
        return self._with(super().begin(), self.weaker.begin())

    def with_networks(self, change: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> EpsModel:
        """A copy in which every network of both models is `change(net)`."""
        return self._with(super().with_networks(change), self.weaker.with_networks(change))

    def affine(self, kind: str, t: Scalar, alpha: Scalar, sigma: Scalar) -> Affine:
        """As of the model inside; ValueError where the weaker model is not defined or does not give what is needed."""
        if not isinstance(alpha, Tensor) and not isinstance(sigma, Tensor) and self._inside(alpha, sigma):
            if not self.same_schedule:
                self._level(alpha, sigma)
            elif not self.same_output:
                self.weaker.affine(self._kind, t, alpha, sigma)
        return super().affine(kind, t, alpha, sigma)

    def guide(
        self, x: Tensor, times: Tensor, alpha: Scalar, sigma: Scalar, cond: Cond, scale: Scalar
    ) -> tuple[Tensor, Tensor]:
        """Raw outputs of the model with and without guidance."""
        plain = self.model.output(x, times, alpha, sigma, cond)
        other = replaced("null", cond, self.null, x)
        if self.same_output:
            return torch.lerp(self.weaker.output(x, times, alpha, sigma, other), plain, scale), plain
        t, a, s, by = (None, alpha, sigma, 1.0) if self.same_schedule else self._level(alpha, sigma)
        at = times if t is None else self._times(t, x)
        weak = self.weaker.output(x * (by.to(x.dtype) if isinstance(by, Tensor) else by), at, a, s, other)
        theirs = self.weaker.relation(self._kind, x, at, a, s)
        mine = self.model.relation(self._kind, x, times, alpha, sigma)
        # weak in terms of this model's output: what both give is the same affine function of the state and either output
        same = Affine((theirs.x * by - mine.x) / mine.out, theirs.out / mine.out).like(x).of(x, weak)
        return torch.lerp(same, plain, scale), plain

    def _times(self, t: Scalar, x: Tensor) -> Tensor:
        """A time of the weaker model, or one for each sample, as (B,)."""
        if not isinstance(t, Tensor):
            return self.weaker.times([t], x)[0]
        return t.to(self.weaker.times([0.0], x)[0]).flatten().expand(len(x))

    @property
    def _kind(self) -> str:
        """What both outputs are compared as: epsilon where x0 would lose digits at large noise, x0 where epsilon would."""
        return "eps" if self.predicts in ("eps", "score") else "x0"

    def _level(self, alpha: Scalar, sigma: Scalar) -> tuple[Scalar, Scalar, Scalar, Scalar]:
        """Time, alpha and sigma of the weaker model at the same ratio of both, and the factor that takes a state there.

        Raises:
            ValueError: it is not defined there, unless alpha and sigma are tensors.
        """
        schedule = self.weaker.schedule
        if isinstance(alpha, Tensor) or isinstance(sigma, Tensor):
            t = schedule.t_of_lam((torch.as_tensor(alpha) / torch.as_tensor(sigma)).log())
            a, s = schedule.alpha(t), schedule.sigma(t)
            return t, a, s, ((a**2 + s**2) / (alpha**2 + sigma**2)) ** 0.5
        at = sigma / alpha if alpha else math.inf
        ends = least, most = [float(schedule.sigma_bar(end)) for end in (schedule.t_min, schedule.t_max)]
        if not least * (1.0 - _TOLERANCE) <= at <= most * (1.0 + _TOLERANCE):
            raise ValueError(
                f"weaker is defined for sigma_bar = sigma / alpha from {least:g} to {most:g}, and is asked at {at:g}; give an "
                "interval inside of it, or a grid"
            )
        at_end = dict(zip(ends, (schedule.t_min, schedule.t_max), strict=True))
        time = at_end[at] if at in at_end else float(schedule.t_of_lam(-math.log(at)))
        weak_alpha, weak_sigma = float(schedule.alpha(time)), float(schedule.sigma(time))
        self.weaker.affine(self._kind, time, weak_alpha, weak_sigma)
        return time, weak_alpha, weak_sigma, math.hypot(weak_alpha, weak_sigma) / math.hypot(alpha, sigma)

    def _with(self, same: Any, weaker: EpsModel) -> EpsModel:
        if weaker is self.weaker:
            return same
        other = copy.copy(same)
        other.weaker, other.compiled = weaker, {}
        return other


def classifier(
    model: EpsModel,
    classify: Callable[..., Tensor],
    scale: Scale,
    *,
    labels: str = "class_labels",
    conditional: bool = False,
    interval: Interval | None = None,
) -> EpsModel:
    """The model guided by a classifier of noisy states: `eps - scale sigma grad_x log p(label | x, t)`.

    Dhariwal & Nichol 2021, arXiv:2105.05233, algorithm 2, for every kind of prediction and every schedule.

    Args:
        model: conditional or not, of any kind of prediction.
        classify: `classify(x, t)` for states (B, ...) in x coordinates and times (B,) in the schedule's own time gives logits
            (B, classes); or log p itself, (B,), of whatever it is. Gradients flow to x, under `torch.no_grad` too; its own
            parameters get none.
        scale: 0 and more; 0 is the model alone, 1 the exact conditional model of a perfect classifier, and the paper has 1 to
            10. Further as for `classifier_free`.
        labels: the entry of cond that has the label of each sample, (B,) integers; for log p itself it is not looked at.
        conditional: whether the network takes that entry too; else it is kept from it.
        interval: as for `classifier_free`; outside of it the classifier is not called either.

    Returns:
        A model that predicts what `model` predicts; one evaluation of its network at a call, beside that of the classifier,
        which a meter of networks does not count.

    Raises:
        ValueError, TypeError: an argument out of range or of another kind; at a call, labels that are missing, or something
            else from the classifier.
    """
    if not callable(classify):
        raise TypeError(f"classify must be callable as classify(x, t), got {type(classify).__name__}")
    return Classified(model, classify, scale, labels, conditional, interval)


class Classified(Guided):
    """See `classifier`."""

    def __init__(
        self,
        model: EpsModel,
        classify: Callable[..., Tensor],
        scale: Scale,
        labels: str,
        conditional: bool,
        interval: Interval | None,
    ) -> None:
        super().__init__(model, scale, interval, neutral=0.0)
        self.classify, self.labels, self.conditional = classify, labels, conditional

    def affine(self, kind: str, t: Scalar, alpha: Scalar, sigma: Scalar) -> Affine:
        """As of the model inside; ValueError where epsilon does not depend on its output, so that it cannot be guided."""
        if not isinstance(alpha, Tensor) and alpha == 0 and self._inside(alpha, sigma):
            raise ValueError(
                f"classifier guidance changes epsilon, which does not depend on the network at t={t:g}, where alpha=0; give an "
                "interval that ends below inf"
            )
        return super().affine(kind, t, alpha, sigma)

    def own(self, cond: Cond) -> Cond:
        """Without the labels, where they are the classifier's alone."""
        return cond if self.conditional else {name: value for name, value in cond.items() if name != self.labels}

    def guide(
        self, x: Tensor, times: Tensor, alpha: Scalar, sigma: Scalar, cond: Cond, scale: Scalar
    ) -> tuple[Tensor, Tensor]:
        """Raw outputs with and without guidance; a change of epsilon is one of the output over what epsilon is per output."""
        plain = self.model.output(x, times, alpha, sigma, self.own(cond))
        factor = scale * (sigma / self.model.relation("eps", x, times, alpha, sigma).out)
        gradient = self._gradient(x, times, cond.get(self.labels))
        return plain - (factor.to(x.dtype) if isinstance(factor, Tensor) else factor) * gradient, plain

    def _gradient(self, x: Tensor, times: Tensor, labels: Tensor | None) -> Tensor:
        """Of log p(label | x, t) to x, for each sample by itself."""
        with torch.inference_mode(False), torch.enable_grad():
            state = x.clone().detach().requires_grad_(True)
            found = self.classify(state, times.clone())
            return torch.autograd.grad(self._log_prob(found, labels, len(x)).sum(), state)[0].to(x.dtype)

    def _log_prob(self, found: Tensor, labels: Tensor | None, batch: int) -> Tensor:
        if not isinstance(found, Tensor) or found.ndim not in (1, 2) or len(found) != batch:
            raise ValueError(f"classify must return logits ({batch}, classes) or log p ({batch},), got {_told(found)}")
        if found.ndim == 1:
            return found
        if not isinstance(labels, Tensor) or labels.shape != (batch,) or labels.is_floating_point():
            raise ValueError(
                f"cond[{self.labels!r}] must be integers ({batch},), the classes to guide to, got {_told(labels)}"
            )
        return found.log_softmax(1).gather(1, labels.long()[:, None])


def _told(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
