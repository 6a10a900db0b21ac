"""The epsilon-model: one interface to networks that predict epsilon, x0, v, the score, a flow, or EDM's F."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from samplers.errors import unknown
from samplers.schedule import Schedule

Scalar = float | Tensor
KINDS = ("eps", "x0", "v")
PREDICTIONS = ("eps", "x0", "v", "score", "flow", "edm")
_ROUNDING = 1e-5  # at the ends of time


class Affine(NamedTuple):
    """`value = x * state + out * output`: how a wanted quantity follows from the state and the network's output."""

    x: Scalar
    out: Scalar

    def like(self, x: Tensor) -> Affine:
        """With factors in the dtype of x, so that nothing they are multiplied with changes its own."""
        return Affine(*(value.to(x.dtype) if isinstance(value, Tensor) else value for value in self))

    def of(self, x: Tensor, out: Tensor) -> Tensor:
        """The value itself."""
        return self.out * out if _is_zero(self.x) else self.x * x + self.out * out


def _eps_and_x0(
    predicts: str, alpha: Scalar, sigma: Scalar, dalpha: Scalar, dsigma: Scalar, data: float
) -> tuple[Affine, Affine]:
    """Epsilon and x0 as affine functions of the state and of what the network outputs, for any schedule.

    From `x = alpha x0 + sigma eps` and: `v = alpha eps - sigma x0` (Salimans & Ho 2022, arXiv:2202.00512, appendix D),
    `score = -eps / sigma`, `flow = dalpha x0 + dsigma eps`, and EDM's preconditioning (arXiv:2206.00364, table 1). A
    division by an alpha or sigma that is zero gives inf: that quantity does not follow from that prediction there.
    """
    if predicts == "eps":
        return Affine(0.0, 1.0), Affine(_ratio(1.0, alpha), -_ratio(sigma, alpha))
    if predicts == "x0":
        return Affine(_ratio(1.0, sigma), -_ratio(alpha, sigma)), Affine(0.0, 1.0)
    if predicts == "v":
        norm = alpha**2 + sigma**2
        return Affine(sigma / norm, alpha / norm), Affine(alpha / norm, -sigma / norm)
    if predicts == "score":
        return Affine(0.0, -sigma), Affine(_ratio(1.0, alpha), _ratio(sigma**2, alpha))
    if predicts == "flow":
        det = alpha * dsigma - sigma * dalpha
        return Affine(-dalpha / det, alpha / det), Affine(dsigma / det, -sigma / det)
    # EDM: D(x / alpha) = c_skip x / alpha + c_out F, and eps = (x / alpha - D) alpha / sigma, without the cancellation
    total = sigma**2 + (data * alpha) ** 2
    root = total**0.5
    return Affine(sigma / total, -data * alpha / root), Affine(data**2 * alpha / total, sigma * data / root)


def _ratio(a: Scalar, b: Scalar) -> Scalar:
    return a / b if isinstance(b, Tensor) or b != 0 else float("inf")


class EpsModel:
    """A network with its noise schedule, seen as epsilon, x0 or v, whatever it was trained to predict.

    Args:
        net: `net(x, t, **cond) -> output`, with x (B, ...), t (B,) of x's dtype (float32 where x is of half precision),
            and an output of x's shape, which each call may write where the last one did (but not into several buffers by
            turns). It must not write to x. For `predicts="edm"` it is the raw network F, called with `c_in x / alpha` and
            `c_noise = log(sigma / alpha) / 4`.
        schedule: the noise schedule the network was trained on.
        predicts: "eps", "x0", "v", "score", "flow" (dx/dt of the interpolant) or "edm".
        time_input: maps the schedule's time (B,) to what the network takes, e.g. `lambda t: 1000 * t`; None: passed as it is.
        sigma_data: EDM's standard deviation of the data; used by `predicts="edm"` only.

    Raises:
        TypeError: `net` or `time_input` cannot be called, or `schedule` is not a Schedule.
        ValueError: an unknown `predicts`, or a sigma_data that is not positive.
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        schedule: Schedule,
        predicts: str = "eps",
        time_input: Callable[[Tensor], Tensor] | None = None,
        *,
        sigma_data: float = 0.5,
    ) -> None:
        if not callable(net):
            raise TypeError(f"net must be callable as net(x, t, **cond), got {type(net).__name__}")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a samplers.schedules schedule, got {type(schedule).__name__}")
        if time_input is not None and not callable(time_input):
            raise TypeError(f"time_input must be None or callable, got {type(time_input).__name__}")
        if predicts not in PREDICTIONS:
            raise unknown("predicts", predicts, PREDICTIONS)
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data must be positive and finite, got {sigma_data}")
        self.net, self.schedule, self.predicts, self.time_input, self.sigma_data = (
            net,
            schedule,
            predicts,
            time_input,
            sigma_data,
        )
        self.compiled: dict[Any, Any] = {}  # loops of `samplers.compiled`, which live as long as the model
        self._inputs: list[Tensor] | None = None  # in a run, what `_scaled` writes to

    @property
    def weights(self) -> Tensor | None:
        """The network's first parameter, whose dtype and device a state must have; None where it has none."""
        parameters = getattr(self.net, "parameters", None)
        return next(iter(parameters()), None) if callable(parameters) else None

    def begin(self) -> EpsModel:
        """The model for one run: itself, or a copy with a memory of its own where it remembers or writes to one."""
        if self.predicts != "edm":
            return self
        other = copy.copy(self)
        other._inputs = []
        return other

    def with_networks(self, change: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> EpsModel:
        """A copy whose network is `change(net)`; of a model that is made of others, every network in it."""
        other = copy.copy(self)
        other.net, other.compiled = change(self.net), {}
        return other

    def __call__(self, x: Tensor, t: Scalar, **cond: Any) -> Tensor:
        """Epsilon at states x (B, ...) and time t, a float or a (B,) tensor; the same as `eps`.

        Here and in `eps`, `x0` and `v`, t may lie beyond `schedule.t_max`, where a sampler that adds noise may lead. A (B,)
        tensor of times is not looked at, because that would wait for the device: where one of them has no answer, the result
        is NaN or Inf.

        Raises:
            ValueError: a float t at which the schedule is not defined, or where the network does not give what is asked for.
        """
        return self.eps(x, t, **cond)

    def eps(self, x: Tensor, t: Scalar, **cond: Any) -> Tensor:
        """The noise in x, shape of x: `(x - alpha x0) / sigma`."""
        return self._predict(x, t, "eps", cond)

    def x0(self, x: Tensor, t: Scalar, **cond: Any) -> Tensor:
        """The clean data behind x, shape of x: `(x - sigma eps) / alpha`."""
        return self._predict(x, t, "x0", cond)

    def v(self, x: Tensor, t: Scalar, **cond: Any) -> Tensor:
        """The velocity `alpha eps - sigma x0`, shape of x."""
        return self._predict(x, t, "v", cond)

    def affine(self, kind: str, t: Scalar, alpha: Scalar, sigma: Scalar) -> Affine:
        """How `kind` follows from the state and the network's raw output at a time.

        Args:
            kind: "eps", "x0" or "v".
            t, alpha, sigma: of the time, Python floats; or tensors without dimensions, through which gradients flow.

        Raises:
            ValueError: an unknown kind, or, where the numbers are floats, it does not follow there (epsilon-prediction where
                alpha = 0).
        """
        affine = self._affine(kind, t, alpha, sigma)
        if self.predicts == "edm" and not isinstance(alpha, Tensor) and alpha == 0:
            raise ValueError(
                f"a network with predicts='edm' takes log(sigma / alpha), which is infinite at t={t:g}, where alpha=0"
            )
        if any(not isinstance(factor, Tensor) and math.isinf(factor) for factor in affine):
            raise ValueError(
                f"a network with predicts={self.predicts!r} gives no {kind} at t={t:g}, where alpha={alpha:g} and sigma={sigma:g}"
            )
        return affine

    def relation(self, kind: str, x: Tensor, times: Tensor, alpha: Scalar, sigma: Scalar) -> Affine:
        """`affine` from inside a call, as `output` gets its arguments: factors that broadcast with x, nothing checked."""
        t: Scalar = 0.0
        if self.predicts == "flow":  # the one kind whose factors depend on more than alpha and sigma
            t = times.double().view(-1, *[1] * (x.ndim - 1))
        return self._affine(kind, t, alpha, sigma).like(x)

    def times(self, values: Sequence[float], x: Tensor) -> tuple[Tensor, ...]:
        """Each time as the (B,) tensor a network takes beside states x, all made at once; no later copy to the device."""
        one_each = torch.tensor(values, dtype=_time_dtype(x), device=x.device)
        return one_each[:, None].expand(-1, len(x)).contiguous().unbind()

    def output(self, x: Tensor, times: Tensor, alpha: Scalar, sigma: Scalar, cond: Mapping[str, Any]) -> Tensor:
        """One network call: the raw output at states x (B, ...) and `times` (B,).

        Raises:
            TypeError: the network does not return a tensor.
            ValueError: it returns another shape, or writes to x, where that is counted: not of an x that is a view of another
                tensor, in inference mode or while it is compiled.
        """
        state, version = x, _version(x)
        if self.predicts == "edm":  # c_in x / alpha and c_noise
            total = sigma**2 + (self.sigma_data * alpha) ** 2
            state = self._scaled(x, total**-0.5 if not isinstance(total, Tensor) else total.rsqrt().to(x.dtype))
            times = (-0.25 * self.schedule.lam(times.double())).to(times.dtype)
        if self.time_input is not None:
            times = self.time_input(times)
        out = self.net(state, times, **cond)
        if _version(x) != version:
            raise ValueError("net must not write to the x it is given, as x.mul_ does; let it work on x.clone()")
        if not isinstance(out, Tensor):
            raise TypeError(
                f"net must return a tensor, got {type(out).__name__}; wrap it, e.g. lambda x, t: net(x, t).sample"
            )
        if out.shape != x.shape:
            raise ValueError(f"net must return the shape of x, {tuple(x.shape)}, got {tuple(out.shape)}")
        if self._inputs and out.untyped_storage().data_ptr() == self._inputs[0].untyped_storage().data_ptr():
            return out.clone()  # its own input, which the next call writes to
        return out

    def _scaled(self, x: Tensor, by: Scalar) -> Tensor:
        """`by * x`; in a run without gradient, where the last call's was."""
        if self._inputs is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return x * by
        if not self._inputs or (self._inputs[0].shape, self._inputs[0].dtype) != (x.shape, x.dtype):
            self._inputs[:] = [torch.empty_like(x)]
        return torch.mul(x, by, out=self._inputs[0])

    def evaluate(
        self, x: Tensor, t: float, alpha: float, sigma: float, kind: str, cond: Mapping[str, Any]
    ) -> tuple[Tensor, Affine]:
        """`output` and `affine` at one time, given as a float."""
        affine = self.affine(kind, t, alpha, sigma)
        return self.output(x, self.times([t], x)[0], alpha, sigma, cond), affine

    def _predict(self, x: Tensor, t: Scalar, kind: str, cond: Mapping[str, Any]) -> Tensor:
        if not isinstance(t, Tensor) or t.ndim == 0:
            try:
                t = float(t)
            except (TypeError, ValueError) as error:
                raise TypeError(f"t must be a number or a tensor of shape ({len(x)},), got {t!r}") from error
            out, affine = self.evaluate(x, t, *self._noise_level(t), kind, cond)
        else:
            if t.shape != (len(x),):
                raise ValueError(f"t must be a float or of shape ({len(x)},), got {tuple(t.shape)}")
            t = t.to(dtype=torch.float64, device=x.device)
            column = t.view(-1, *[1] * (x.ndim - 1))
            alpha, sigma = self.schedule.alpha(column), self.schedule.sigma(column)
            affine = self._affine(kind, column, alpha, sigma).like(x)
            out = self.output(x, t.to(_time_dtype(x)), alpha, sigma, cond)
        return affine.of(x, out)

    def _noise_level(self, t: float) -> tuple[float, float]:
        """Alpha and sigma at a time at which the schedule is defined, up to rounding at its ends."""
        schedule = self.schedule
        with np.errstate(all="ignore"):
            alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        below = min(schedule.t_zero, schedule.t_min) - t
        if not (below <= _ROUNDING * (1 + abs(t)) and all(-_ROUNDING <= level < math.inf for level in (alpha, sigma))):
            raise ValueError(
                f"t must be a time of schedule {schedule.name!r}, {schedule.t_min:g} to {schedule.t_max:g}, or near it; "
                f"got {t}, where alpha={alpha:g} and sigma={sigma:g}"
            )
        return alpha, sigma

    def _affine(self, kind: str, t: Scalar, alpha: Scalar, sigma: Scalar) -> Affine:
        if kind not in KINDS:
            raise unknown("kind", kind, KINDS)
        dalpha, dsigma = self._slopes(t) if self.predicts == "flow" else (0.0, 0.0)
        eps, x0 = _eps_and_x0(self.predicts, alpha, sigma, dalpha, dsigma, self.sigma_data)
        if kind == "v":
            if self.predicts == "v":
                return Affine(0.0, 1.0)
            # at either end of time the infinite one of the two comes with a zero factor
            parts = [(alpha, eps), (-sigma, x0)]
            return Affine(*(sum(f * getattr(a, field) for f, a in parts if not _is_zero(f)) for field in ("x", "out")))
        return eps if kind == "eps" else x0

    def _slopes(self, t: Scalar) -> tuple[Scalar, Scalar]:
        if isinstance(t, Tensor):
            return self.schedule.dalpha(t), self.schedule.dsigma(t)
        return float(self.schedule.dalpha(t)), float(self.schedule.dsigma(t))


def require_model(name: str, model: EpsModel) -> None:
    """Raise TypeError where an argument is no model."""
    if not isinstance(model, EpsModel):
        raise TypeError(f"{name} must be an EpsModel, got {type(model).__name__}; wrap it: EpsModel(net, schedule)")


def _version(x: Tensor) -> int:
    """How often a tensor has been written to; 0 where nobody counts, or others of its memory too, as in an engine's pool."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() or x._is_view() else x._version


def _time_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _is_zero(value: Scalar) -> bool:
    return not isinstance(value, Tensor) and value == 0
