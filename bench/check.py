"""Whether a model's interface is declared right: every convention is tried on noised data, by the error of one denoising step.

A network that is told the wrong time, given another scale, or whose output is read as something else still gives numbers, and a
sampler still makes pictures of them, bad ones. One step tells: noise clean data, ask the model for x0, and compare. The error is
in units of what one gets who knows the data's mean and variance alone, `variance sigma_bar^2 / (variance + sigma_bar^2)`, so
that 1 is no better than that at any noise level.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench.hypotheses import (
    Data,
    Hypothesis,
    Levels,
    Prediction,
    Scaling,
    Time,
    by_edm,
    data_ranges,
    predictions,
    scalings,
    times,
)
from samplers import EpsModel
from samplers.model import require_model
from samplers.noise import standard_normal

FAMILIES = ("prediction", "time", "input", "data")
MARGIN = 1.15  # the error of a declared convention over that of the best, within which it is right
_USEFUL = 0.95  # largest error of a network that denoises
_LEVELS, _FEW, _KEPT = 6, 4, 4  # samples on which every combination is tried, and how many of those on all
Cond = Callable[[Tensor], Mapping[str, Any]]


@dataclass(frozen=True)
class Interface:
    """A convention of every family."""

    prediction: Prediction
    time: Time
    input: Scaling
    data: Data


@dataclass(frozen=True)
class Row:
    """A convention with the others as they fit best.

    Attributes:
        family: of `FAMILIES`.
        name: of the convention.
        error: of one denoising step, relative to that of the data's mean and variance; inf where the network takes no such input.
        declared, best: whether it is what the model declares, and what fits best.
    """

    family: str
    name: str
    error: float
    declared: bool
    best: bool


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        right: whether the declared interface fits, and as well as any.
        text: one sentence, or a few.
        mends: for each mistake the argument that mends it.
        declared_error, best_error: of the interface as declared, and of the best one.
        rows: every convention that was tried.
    """

    right: bool
    text: str
    mends: tuple[str, ...]
    declared_error: float
    best_error: float
    rows: tuple[Row, ...]


def check_model(
    model: EpsModel,
    data: Tensor,
    *,
    cond: Cond | None = None,
    ranges: Sequence[Data] = (),
    batch_size: int = 64,
    seed: int = 0,
) -> Verdict:
    """Try what a model declares (prediction, time, scale of the input, range of the data) against what else it may be.

    Args:
        model: to be checked; of one under guidance, the network inside.
        data: clean data (N, ...) as the model is believed to take it, on its device, N at least 4; a single Gaussian cloud
            does not tell conventions apart, images do.
        cond: `(indices) -> cond` of the data (B,), for a conditional network.
        ranges: further conventions of the data's range, instead of [0, 1] for data in [-1, 1].
        batch_size: states for each network call.
        seed: of the noise.

    Raises:
        TypeError: not a model, or data that is no tensor of floating point.
        ValueError: fewer than 4 samples, data without variation or not finite.
    """
    _check(model, data)
    trial = _Trial(model, data.detach(), cond or (lambda _: {}), Levels.of(model.schedule, _LEVELS), batch_size, seed)
    choices: dict[str, Sequence[Any]] = {
        "prediction": predictions(model, trial.levels),
        "time": times(model, trial.levels),
        "input": scalings(model, trial.levels),
        "data": data_ranges(data, ranges),
    }
    declared = Interface(**{family: found[0] for family, found in choices.items()})
    best = _best(trial, choices, declared)
    rows, errors = [], {"declared": trial.error(declared), "best": trial.error(best)}
    for family, found in choices.items():
        for h in found:
            error = trial.error(replace(best, **{family: h}))
            rows.append(Row(family, h.name, error, h is found[0], h is getattr(best, family)))
    return _verdict(declared, best, errors["declared"], errors["best"], rows)


def _best(trial: _Trial, choices: Mapping[str, Sequence[Any]], declared: Interface) -> Interface:
    """The interface of least error, as near to the declared one as the margin allows.

    Every combination on few samples, the best of them on all; then whatever makes no difference is as declared.
    """
    few = trial.first(_FEW)
    found = [Interface(*parts) for parts in itertools.product(*(choices[family] for family in FAMILIES))]
    ranked = sorted(found, key=few.error)
    best = min([declared, *ranked[:_KEPT]], key=trial.error)
    for family in FAMILIES:
        back = replace(best, **{family: getattr(declared, family)})
        if trial.error(back) <= MARGIN * trial.error(best):
            best = back
    return best


class _Trial:
    """Errors of interfaces on one set of noised data; a network's answer to the same input is asked for once."""

    def __init__(self, model: EpsModel, data: Tensor, cond: Cond, levels: Levels, batch_size: int, seed: int) -> None:
        self.model, self.data, self.cond, self.levels = model, data, cond, levels
        self.batch_size, self.seed = batch_size, seed
        self._outputs: dict[tuple[int, int, int], Tensor | None] = {}

    def first(self, count: int) -> _Trial:
        """The same on the first samples."""
        return _Trial(self.model, self.data[:count], self.cond, self.levels, self.batch_size, self.seed)

    def error(self, interface: Interface) -> float:
        """Of one denoising step, relative to the data's mean and variance, a mean over levels."""
        clean = interface.data.of(self.data)
        out = self._output(interface, clean)
        if out is None:
            return math.inf
        by_x, by_out = (self._column(value) for value in (interface.prediction.by_x, interface.prediction.by_out))
        x0 = by_x * self._noised(clean) + by_out * out.double()
        square = (x0.unflatten(0, (-1, len(clean))) - clean.double()).square().flatten(1).mean(1).cpu()
        variance = float(clean.double().var())
        trivial = variance * self.levels.sigma_bar**2 / (variance + self.levels.sigma_bar**2)
        error = float((square / trivial).mean())
        return error if math.isfinite(error) else math.inf

    def _column(self, values: Tensor) -> Tensor:
        """A number for each level as one for each row, (L N, 1, ...)."""
        rows = values.repeat_interleave(len(self.data)).to(self.data.device)
        return rows.view(-1, *[1] * (self.data.dim() - 1))

    def _noised(self, clean: Tensor) -> Tensor:
        """States (L N, ...) float64, one after the other level."""
        x = clean.double().repeat(len(self.levels.t), *[1] * (clean.dim() - 1))
        return self._column(self.levels.alpha) * x + self._column(self.levels.sigma) * self._noise

    @cached_property
    def _noise(self) -> Tensor:
        indices, shape = torch.arange(len(self.data)), self.data.shape[1:]
        draws = [
            standard_normal(self.seed, indices, level, shape, torch.float64) for level in range(len(self.levels.t))
        ]
        return torch.cat(draws).to(self.data.device)

    @torch.no_grad()
    def _output(self, interface: Interface, clean: Tensor) -> Tensor | None:
        """The network's raw output for every level and sample; None where it takes no such time."""
        key = (id(interface.time), id(interface.input), id(interface.data))
        if key not in self._outputs:
            state = (self._column(interface.input.factors) * self._noised(clean)).to(clean.dtype)
            values = interface.time.values.repeat_interleave(len(clean)).to(clean.device)
            t = values if clean.dtype == torch.float64 else values.float()
            indices = torch.arange(len(clean), device=clean.device).repeat(len(self.levels.t))
            try:
                parts = [
                    self.model.net(state[rows], t[rows], **self.cond(indices[rows]))
                    for rows in torch.arange(len(state), device=clean.device).split(self.batch_size)
                ]
                self._outputs[key] = torch.cat(parts)
            except IndexError:  # a network that looks its time up in a table
                self._outputs[key] = None
        return self._outputs[key]


def _verdict(declared: Interface, best: Interface, mine: float, least: float, rows: Sequence[Row]) -> Verdict:
    wrong = [family for family in FAMILIES if getattr(best, family) is not getattr(declared, family)]
    own = [family for family in wrong if not by_edm(best.prediction, getattr(best, family))]
    mends = tuple(getattr(best, family).mend for family in own or wrong)
    if least > _USEFUL:
        text = (
            f"no convention makes this network denoise: the best has error {least:.3g}, where the data's mean and variance alone "
            "give 1. Look at the weights, the condition, and whether these data are what it was trained on."
        )
        return Verdict(False, text, (), mine, least, tuple(rows))
    if not wrong:
        alike = [
            f"{row.family} {row.name!r}" for row in rows if not row.declared and row.error <= MARGIN * max(least, 1e-12)
        ]
        beside = f" These data do not tell it from {', '.join(alike)}." if alike else ""
        text = f"the interface is right: error {mine:.3g}, and nothing else that was tried fits better.{beside}"
        return Verdict(True, text, (), mine, least, tuple(rows))
    told = "; ".join(_mistake(family, getattr(declared, family), getattr(best, family)) for family in wrong)
    text = f"the interface is wrong: {told}. That brings the error from {mine:.3g} to {least:.3g}."
    return Verdict(False, text, mends, mine, least, tuple(rows))


def _mistake(family: str, declared: Hypothesis, best: Hypothesis) -> str:
    if family == "prediction":
        return f"the network predicts {best.name}, not {declared.name} as declared"
    if family == "time":
        return f"the network takes time as {best.name}, and is given {declared.name}"
    if family == "input":
        return f"the network takes its state as {best.name}, and is given {declared.name}"
    return f"the network was trained on data of range {best.name}, and not on data as given"


def _check(model: EpsModel, data: Tensor) -> None:
    require_model("model", model)
    if not isinstance(data, Tensor) or not data.is_floating_point() or data.dim() < 2:
        raise TypeError(
            f"data must be a floating-point tensor (N, ...), got {getattr(data, 'dtype', type(data).__name__)}"
        )
    if len(data) < _FEW:
        raise ValueError(f"data must be at least {_FEW} samples, got {len(data)}")
    if not bool(torch.isfinite(data).all()) or float(data.double().var()) == 0:
        raise ValueError("data must be finite and vary")
