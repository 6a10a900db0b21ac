"""What the config of a diffusers scheduler says about the network: its noise schedule, its prediction, the time it takes.

A scheduler's config mixes how a network was trained with how the scheduler steps. Only the first is read here, in float64 and
for every kind there is; nothing of diffusers is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samplers import schedules
from samplers.errors import unknown
from samplers.model import EpsModel
from samplers.schedule import Schedule

TRAINING_STEPS = 1000  # where a config does not say
BETA_ENDS = {"beta_start": 1e-4, "beta_end": 0.02}  # likewise, DDPM's
PREDICTS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
EDM_SIGNS = {"epsilon": 1.0, "v_prediction": -1.0}  # of c_out
_MAX_BETA = 0.999  # of the schedules that are given by their cumulative product
_CLOSE = 1e-5  # float32's error in a table of alphas_cumprod


@dataclass(frozen=True)
class Training:
    """How a network was trained, as far as sampling needs to know.

    Attributes:
        schedule: the noise schedule.
        predicts: as `EpsModel` takes it.
        takes: the time the network is given: "step" (the training step, the schedule's own time), "flow" (`steps * t`),
            "c_noise" (EDM's `log(sigma) / 4`) or "angle" (`2 atan(sigma) / pi`).
        steps: training steps.
        sigma_data: EDM's.
        sign: of the network's output.
    """

    schedule: Schedule
    predicts: str
    takes: str
    steps: int = TRAINING_STEPS
    sigma_data: float = 0.5
    sign: float = 1.0

    def network_time(self, t: Tensor) -> Tensor:
        """The schedule's time as the network takes it; float64 of any shape."""
        if self.takes == "flow":
            return self.steps * t
        if self.takes == "c_noise":
            return 0.25 * t.log()
        return 2.0 / math.pi * t.atan() if self.takes == "angle" else t

    def schedule_time(self, tau: Tensor) -> Tensor:
        """The inverse of `network_time`."""
        if self.takes == "flow":
            return tau / self.steps
        if self.takes == "c_noise":
            return torch.exp(4.0 * tau)
        return torch.tan(0.5 * math.pi * tau) if self.takes == "angle" else tau

    def levels(self, tau: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma at the network's times (B,) or one, in float64, of a shape that broadcasts with states (B, ...).

        Raises:
            ValueError: times of another shape, or beyond what the network was trained on.
        """
        on = like.device if like.device.type != "mps" else torch.device("cpu")  # mps has no float64
        tau = torch.as_tensor(tau).to(device=on, dtype=torch.float64)
        if tau.ndim > 1 or (tau.ndim == 1 and len(tau) not in (1, len(like))):
            raise ValueError(f"timesteps must be one or {len(like)}, one for each sample, got shape {tuple(tau.shape)}")
        t = self.schedule_time(tau)
        latest = self.schedule.t_max
        if on.type == "cpu" and not bool(((t >= self.schedule.t_zero) & (t <= latest * (1 + 1e-6))).all()):
            last = float(self.network_time(torch.tensor(latest, dtype=torch.float64)))
            raise ValueError(f"timesteps must be at most {last:g}, the network's last, got {tau.tolist()}")
        t = t.clamp(max=latest).view(-1, *[1] * (like.ndim - 1))
        return self.schedule.alpha(t).to(like.device), self.schedule.sigma(t).abs().to(like.device)

    def model(self, net: Callable[..., Tensor]) -> EpsModel:
        """The epsilon-model of a network `net(x, t, **cond)`, whose output has this training's sign already."""
        time_input: Callable[[Tensor], Tensor] | None = None
        if self.takes == "flow":
            time_input = self.network_time
        elif self.takes == "angle":  # EpsModel makes it c_noise first
            time_input = lambda c_noise: self.network_time(torch.exp(4.0 * c_noise))  # noqa: E731
        return EpsModel(net, self.schedule, self.predicts, time_input, sigma_data=self.sigma_data)


def training_of(config: Mapping[str, Any], name: str = "PlanScheduler", table: Any = None) -> Training:
    """What a scheduler's config says.

    Args:
        config: of any scheduler with a noise schedule: with betas, matching flows, or EDM's.
        name: the scheduler's class, for the message.
        table: its `alphas_cumprod`, (T,), where it holds one: taken instead of betas of a kind that is not known here.

    Raises:
        ValueError: no noise schedule that is known here, a prediction that does not exist, values out of range.
    """
    prediction = config.get("prediction_type") or ("flow_prediction" if is_flow(config) else "epsilon")
    if is_edm(config):
        if "clip_denoised" in config:
            raise ValueError(f"scheduler must precondition its network as EDM's do, got {name}, of a consistency model")
        return _edm(config, prediction)
    if prediction not in PREDICTS:
        raise unknown("prediction_type of the scheduler", str(prediction), PREDICTS)
    steps = training_steps(config)
    if is_flow(config):
        return Training(schedules.flow(), PREDICTS[prediction], "flow", steps)
    if not has_betas(config) and table is None:
        raise ValueError(
            "scheduler must hold alphas_cumprod, match flows, be one of EDM's or that of a variance-exploding SDE, got "
            f"{name}"
        )
    if prediction == "flow_prediction":
        raise ValueError(
            "prediction_type of the scheduler is 'flow_prediction' beside alphas_cumprod; use a flow scheduler, or one with "
            "use_flow_sigmas=True"
        )
    schedule = schedules.from_alphas_cumprod(_alphas_cumprod(config, steps, table))
    return Training(schedule, PREDICTS[prediction], "step", len(schedule.alphas_cumprod))


def has_schedule(config: Mapping[str, Any]) -> bool:
    """Whether a config says what the noise schedule is."""
    return has_betas(config) or is_flow(config) or is_edm(config)


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a config is of a scheduler that matches flows: one with `shift`, or told to use a flow's sigmas."""
    return bool(config.get("use_flow_sigmas")) or ("shift" in config and not has_betas(config))


def is_edm(config: Mapping[str, Any]) -> bool:
    """Whether a config is of a network with EDM's preconditioning.

    One whose v-prediction is given continuous sigmas (Stable Video Diffusion) has it with data of unit variance.
    """
    return ("sigma_data" in config and "sigma_max" in config) or is_continuous(config)


def is_continuous(config: Mapping[str, Any]) -> bool:
    """Whether a config with betas is of a network that takes `log(sigma) / 4` all the same."""
    return config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"


def has_betas(config: Mapping[str, Any]) -> bool:
    """Whether a config has a table of betas."""
    return config.get("beta_schedule") is not None or config.get("trained_betas") is not None


def training_steps(config: Mapping[str, Any]) -> int:
    """`num_train_timesteps`, checked.

    Raises:
        ValueError: not an integer of at least 2.
    """
    steps = config.get("num_train_timesteps", TRAINING_STEPS)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"num_train_timesteps of the scheduler must be an integer of at least 2, got {steps!r}")
    return steps


def _edm(config: Mapping[str, Any], prediction: str) -> Training:
    if prediction not in EDM_SIGNS:
        raise unknown("prediction_type of the scheduler", str(prediction), EDM_SIGNS)
    ends = [config.get(key) for key in ("sigma_min", "sigma_max")]
    if is_continuous(config) and None in ends:
        table = schedules.from_alphas_cumprod(_alphas_cumprod(config, training_steps(config), None))
        inner = (float(table.sigma_bar(t)) for t in (table.t_min, table.t_max))
        ends = [own if given is None else given for given, own in zip(ends, inner, strict=True)]
    if not all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in ends):
        raise ValueError(f"sigma_min and sigma_max of the scheduler must be numbers, got {ends[0]!r} and {ends[1]!r}")
    data = 1.0 if is_continuous(config) else float(config["sigma_data"])
    takes = "angle" if config.get("time_input") == "angle" else "c_noise"
    schedule = schedules.edm(float(ends[0]), float(ends[1]))  # type: ignore[arg-type]
    return Training(schedule, "edm", takes, training_steps(config), data, EDM_SIGNS[prediction])


def _alphas_cumprod(config: Mapping[str, Any], steps: int, table: Any) -> np.ndarray:
    """alphas_cumprod (T,) in float64: computed anew from the betas where diffusers made it from them in float32.

    A table that does not follow from the config is taken as it is, but for the 2^-24 that some schedulers put in place of the
    zero at the end.
    """
    given = None if table is None else torch.as_tensor(table).double().cpu().numpy()
    if given is not None and config.get("beta_schedule") not in BETAS and config.get("trained_betas") is None:
        exact = given.copy()
    else:
        exact = np.cumprod(1.0 - betas_of(config, steps))
        if config.get("snr_shift_scale") is not None:  # Hoogeboom et al. 2023, arXiv:2301.11093, as CogVideoX has it
            scale = float(config["snr_shift_scale"])
            exact = exact / (scale + (1.0 - scale) * exact)
        if config.get("rescale_betas_zero_snr"):
            exact = _to_zero(exact)
        if given is not None and (given.shape != exact.shape or np.abs(given - exact).max() > _CLOSE):
            exact = given.copy()
    if config.get("rescale_betas_zero_snr") and exact[-1] < 1e-6:
        exact[-1] = 0.0
    return exact


def _to_zero(alphas_cumprod: np.ndarray) -> np.ndarray:
    """The table whose last entry is 0 and whose first is kept, by shifting and scaling alpha (arXiv:2305.08891, algorithm 1)."""
    alpha = np.sqrt(alphas_cumprod)
    return ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))) ** 2


def betas_of(config: Mapping[str, Any], steps: int) -> np.ndarray:
    """The betas (T,) that a config describes, in float64.

    Raises:
        ValueError: a beta_schedule that does not exist, or betas outside (0, 1].
    """
    trained = config.get("trained_betas")
    if trained is not None:
        betas = np.asarray(trained, dtype=np.float64)
        if betas.ndim != 1 or len(betas) < 2:
            raise ValueError(f"trained_betas of the scheduler must be a list of numbers, got shape {betas.shape}")
    else:
        kind = config.get("beta_schedule")
        if kind not in BETAS:
            raise unknown("beta_schedule of the scheduler", str(kind), BETAS)
        start, end = (_beta(config, name, default) for name, default in BETA_ENDS.items())
        betas = BETAS[kind](start, end, steps)
    if not ((betas > 0) & (betas <= 1)).all():
        raise ValueError(f"betas of the scheduler must lie in (0, 1], got {betas.min():g} to {betas.max():g}")
    return betas


def _beta(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"{name} of the scheduler must lie in (0, 1), got {value!r}")
    return float(value)


def _linear(start: float, end: float, steps: int) -> np.ndarray:
    return np.linspace(start, end, steps)


def _scaled_linear(start: float, end: float, steps: int) -> np.ndarray:
    """Linear in the root of beta (Rombach et al. 2022, arXiv:2112.10752)."""
    return np.linspace(start**0.5, end**0.5, steps) ** 2


def _sigmoid(start: float, end: float, steps: int) -> np.ndarray:
    """Xu et al. 2022, GeoDiff, arXiv:2203.02923."""
    return start + (end - start) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, steps)))


def _from_product(product: Callable[[np.ndarray], np.ndarray]) -> Callable[[float, float, int], np.ndarray]:
    """Betas whose cumulative product of 1 - beta is a function of t in [0, 1]."""

    def betas(start: float, end: float, steps: int) -> np.ndarray:
        values = product(np.arange(steps + 1) / steps)
        return np.minimum(1.0 - values[1:] / values[:-1], _MAX_BETA)

    return betas


def _cosine(t: np.ndarray) -> np.ndarray:
    """Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17."""
    return np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: np.ndarray) -> np.ndarray:
    """Hang et al. 2024, arXiv:2407.03297, table 1, as diffusers has it."""
    lam = -0.5 * np.copysign(1.0, 0.5 - t) * np.log(1.0 - 2.0 * np.abs(0.5 - t) + 1e-6)
    return np.sqrt(1.0 / (1.0 + np.exp(-lam)))


BETAS: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "sigmoid": _sigmoid,
    "squaredcos_cap_v2": _from_product(_cosine),
    "exp": _from_product(lambda t: np.exp(-12.0 * t)),
    "laplace": _from_product(_laplace),
}
