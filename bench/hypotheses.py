"""What may be wrong with a model's interface: the conventions that networks differ in, each with what declares it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from samplers import EpsModel
from samplers.model import PREDICTIONS
from samplers.schedule import EDM, Discrete, Schedule, from_betas

_REACH = 2.5  # |lam|
C_NOISE, C_IN = "log(sigma)/4", "EDM's c_in"
_BETAS = (
    ("DDPM", np.linspace(1e-4, 0.02, 1000), "np.linspace(1e-4, 0.02, 1000)"),
    (
        "Stable Diffusion",
        np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
        "np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2",
    ),
)
_SAME = 0.004  # of its range: a convention that differs from another by less is the same


@dataclass(frozen=True)
class Levels:
    """The noise levels at which hypotheses are tried, as float64 tensors (L,).

    Attributes:
        schedule: the model's.
        t: times, decreasing noise.
        alpha, sigma: of them.
    """

    schedule: Schedule
    t: Tensor
    alpha: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, schedule: Schedule, count: int) -> Levels:
        """Levels evenly spaced in lam, where denoising is neither trivial nor hopeless; whole steps of a discrete schedule."""
        top = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
        low, high = (float(value) for value in schedule.lam(top).clamp(-_REACH, _REACH))
        t = schedule.t_of_lam(torch.linspace(low, high, count, dtype=torch.float64))
        t = t.round() if isinstance(schedule, Discrete) else t
        return cls(schedule, t, schedule.alpha(t), schedule.sigma(t))

    @property
    def sigma_bar(self) -> Tensor:
        """`sigma / alpha`."""
        return self.sigma / self.alpha


@dataclass(frozen=True)
class Hypothesis:
    """A convention.

    Attributes:
        name: as the table has it.
        mend: what declares it to `EpsModel`, or what else to do.
    """

    name: str
    mend: str


@dataclass(frozen=True)
class Time(Hypothesis):
    """What the network takes as time: `values` (L,)."""

    values: Tensor


@dataclass(frozen=True)
class Scaling(Hypothesis):
    """What the network takes as its state: `factors` (L,) times `alpha x0 + sigma eps`."""

    factors: Tensor


@dataclass(frozen=True)
class Prediction(Hypothesis):
    """What the network's output is: x0 = `by_x` x + `by_out` output, (L,) each."""

    by_x: Tensor
    by_out: Tensor


@dataclass(frozen=True)
class Data(Hypothesis):
    """The range of the data that the network was trained on: `scale` times what is given, and `shift`."""

    scale: float | Tensor
    shift: float | Tensor

    def of(self, x: Tensor) -> Tensor:
        """The data in that range."""
        return (self.scale * x + self.shift).to(x.dtype)


def times(model: EpsModel, levels: Levels) -> list[Time]:
    """Conventions of time, the declared one first."""
    t, schedule, noise = levels.t, levels.schedule, levels.sigma_bar.log()
    c_noise = Time(C_NOISE, _lambda("0.25 * schedule.sigma_bar(t).log()"), 0.25 * noise)
    found = [Time("t of the schedule", "time_input=None", t)]
    if isinstance(schedule, Discrete):
        count = len(schedule.alphas_cumprod)
        found += [
            Time(f"t/{count}, in 0..1", _lambda(f"t / {count}"), t / count),
            Time(f"reversed: {count - 1} - t", _lambda(f"{count - 1} - t"), count - 1 - t),
            Time(f"reversed, in 0..1: 1 - t/{count}", _lambda(f"1 - t / {count}"), 1 - t / count),
        ]
    elif isinstance(schedule, EDM):
        found += _places(schedule, t)
    else:
        found += [
            Time("1000 t, in 0..999", _lambda("1000 * t"), 1000 * t),
            Time("reversed: 1 - t", _lambda("1 - t"), 1 - t),
            Time("reversed, in 0..999: 1000 (1 - t)", _lambda("1000 * (1 - t)"), 1000 * (1 - t)),
        ]
    found += [
        c_noise,
        Time("log(sigma)", _lambda("schedule.sigma_bar(t).log()"), noise),
        Time("250 log(sigma)", _lambda("250 * schedule.sigma_bar(t).log()"), 250 * noise),
        Time("sigma", _lambda("schedule.sigma_bar(t)"), levels.sigma_bar),
        Time("log SNR, which is reversed", _lambda("2 * schedule.lam(t)"), -2 * noise),
    ]
    base = c_noise.values if model.predicts == "edm" else t
    asked = base if model.time_input is None else model.time_input(base.clone()).double()
    return _declared_first(found, lambda h: h.values, asked, Time("time_input as declared", "", asked))


def _places(schedule: EDM, sigma: Tensor) -> list[Time]:
    """The place of a sigma among 1000, as an index or a share, counted from data or from noise (reversed); and DDPM's indices.

    The sigmas are those of EDM's steps (Karras et al. 2022, arXiv:2206.00364, equation 5), or of a variance-exploding network
    (Song et al. 2021, arXiv:2011.13456, appendix C). A denoiser around a network of DDPM or Stable Diffusion has its table.
    """
    low, high = schedule.sigma_min ** (1 / 7), schedule.sigma_max ** (1 / 7)
    span = math.log(schedule.sigma_max / schedule.sigma_min)
    spaced = {
        "rho 7": (f"(t**(1/7) - {low:.6g}) / {high - low:.6g}", (sigma ** (1 / 7) - low) / (high - low)),
        "even in log": (
            f"(t / {schedule.sigma_min:g}).log() / {span:.6g}",
            (sigma / schedule.sigma_min).log() / span,
        ),
    }
    found = []
    for name, (text, place) in spaced.items():
        found += [
            Time(f"index 0..999 of sigmas {name}", _lambda(f"999 * {text}"), 999 * place),
            Time(f"place 0..1 among sigmas {name}", _lambda(text), place),
            Time(f"reversed: index 999..0 of sigmas {name}", _lambda(f"999 * (1 - {text})"), 999 * (1 - place)),
            Time(f"reversed: place 1..0 among sigmas {name}", _lambda(f"1 - {text}"), 1 - place),
        ]
    for name, betas, text in _BETAS:
        index = from_betas(betas).t_of_lam(-sigma.log())
        found.append(
            Time(f"index 0..999 of {name}'s sigmas", _lambda(f"schedules.from_betas({text}).t_of_lam(-t.log())"), index)
        )
    return found


def scalings(model: EpsModel, levels: Levels) -> list[Scaling]:
    """Conventions of the input's scale, the declared one first."""
    alpha, sigma, data = levels.alpha, levels.sigma, model.sigma_data
    c_in = (sigma**2 + (data * alpha) ** 2).rsqrt()
    found = [
        Scaling("x = alpha x0 + sigma eps", "net=net, with the state as it is", torch.ones_like(alpha)),
        Scaling("x/alpha", _net("x / schedule.alpha(t).view(-1, 1, 1, 1)"), 1 / alpha),
        Scaling(
            "x/sqrt(alpha^2 + sigma^2)",
            _net("x / (schedule.alpha(t)**2 + schedule.sigma(t)**2).sqrt().view(-1, 1, 1, 1)"),
            (alpha**2 + sigma**2).rsqrt(),
        ),
        Scaling(f"{C_IN}, sigma_data {data:g}", 'predicts="edm", which scales by c_in', c_in),
    ]
    asked = c_in if model.predicts == "edm" else torch.ones_like(alpha)
    return _declared_first(found, lambda h: h.factors, asked, found[0])


def predictions(model: EpsModel, levels: Levels) -> list[Prediction]:
    """Conventions of the output, the declared one first."""
    found = []
    for kind in PREDICTIONS:
        other = EpsModel(model.net, model.schedule, kind, sigma_data=model.sigma_data)
        where = zip(levels.t.tolist(), levels.alpha.tolist(), levels.sigma.tolist(), strict=True)
        factors = torch.tensor([[float(value) for value in other.affine("x0", *level)] for level in where])
        by_x, by_out = factors.double().unbind(1)
        found.append(Prediction(kind, f'predicts="{kind}"', by_x, by_out))
        if kind in ("v", "flow"):  # x0 - eps instead of eps - x0, as where time runs from noise to data
            mend = f'predicts="{kind}" and net=lambda x, t, **cond: -net(x, t, **cond)'
            found.append(Prediction(f"-{kind}", mend, by_x, -by_out))
    mine = next(h for h in found if h.name == model.predicts)
    return _distinct([mine, *found], lambda h: torch.stack([h.by_x, h.by_out]))


def data_ranges(data: Tensor, extra: Sequence[Data] = ()) -> list[Data]:
    """Conventions of the data's range, the given one first.

    Args:
        data: as given, (N, ...).
        extra: further ones, such as `latent_ranges`; none = that data in [-1, 1] may have been meant in [0, 1], or the other
            way round.
    """
    mean, std = float(data.double().mean()), float(data.double().std())
    unit = Data("mean 0, deviation 1", f"data as (x - {mean:.4g}) / {std:.4g}, and samples back", 1 / std, -mean / std)
    if float(data.min()) >= 0:
        other = Data("[-1, 1]", "data as 2 * x - 1, and samples back as (samples + 1) / 2", 2.0, -1.0)
    else:
        other = Data("[0, 1]", "data as (x + 1) / 2, and samples back as 2 * samples - 1", 0.5, 0.5)
    found = [Data("as given", "", 1.0, 0.0), *(extra or [other]), unit]
    return found[:-1] if any(_standard(h.of(data)) for h in found[:-1]) else found


def latent_ranges(scale: Tensor, shift: Tensor) -> list[Data]:
    """Mistakes with the factors of a VAE, `latents = (z - shift) * scale`: applied where they should not be, or not applied.

    Args:
        scale, shift: numbers (1 or C, 1, 1), as of `samplers.adapters.latent.LatentSpace`; 1 and 0 leave no mistake.
    """
    if bool((scale == 1).all()) and not bool(shift.any()):
        return []
    without = "latents as the VAE gives them: set scaling_factor to 1 and shift_factor to 0 in its config"
    scaled = "latents as (z - shift_factor) * scaling_factor of the VAE's z, and samples back before it decodes them"
    return [
        Data("latents without the VAE's scaling and shift", without, 1 / scale, shift),
        Data("latents with the VAE's scaling and shift", scaled, scale, -shift * scale),
    ]


def _standard(data: Tensor) -> bool:
    return abs(float(data.double().mean())) < 0.05 and math.isclose(float(data.double().std()), 1, abs_tol=0.05)


H = TypeVar("H", bound=Hypothesis)


def _declared_first(found: list[H], values: Callable[[H], Tensor], asked: Tensor, otherwise: H) -> list[H]:
    mine = next((h for h in found if _same(values(h), asked)), otherwise)
    return _distinct([mine, *found], values)


def _distinct(found: Sequence[H], values: Callable[[H], Tensor]) -> list[H]:
    """The hypotheses without those that are the same as an earlier one."""
    kept: list[H] = []
    for h in found:
        if not any(_same(values(h), values(other)) for other in kept):
            kept.append(h)
    return kept


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= _SAME * b.abs().max())


def by_edm(prediction: Prediction, h: Hypothesis) -> bool:
    """Whether a convention of time or scale comes with `predicts="edm"` and needs no declaration of its own."""
    return prediction.name == "edm" and (h.name == C_NOISE or h.name.startswith(C_IN))


def _lambda(text: str) -> str:
    return f"time_input=lambda t: {text}"


def _net(text: str) -> str:
    return f"net=lambda x, t, **cond: net({text}, t, **cond)"
