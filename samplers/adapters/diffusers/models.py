"""Networks of diffusers as epsilon-models: the scheduler that a network was saved with says what it predicts and at which times.

Nothing of diffusers is imported here: a network and a scheduler are what they say of themselves in their `config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from samplers import schedules
from samplers.adapters.diffusers.networks import DiffusersNet, flow_time
from samplers.errors import unknown
from samplers.model import EpsModel
from samplers.schedule import Schedule

_PREDICTS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
_EDM = {"epsilon": 1.0, "v_prediction": -1.0}  # the sign of c_out


def eps_model_from_diffusers(network: nn.Module, scheduler: Any) -> EpsModel:
    """A network of diffusers with its scheduler, as an epsilon-model.

    Args:
        network: such as `UNet2DModel`, `UNet2DConditionModel` or a transformer (DiT, PixArt, SD3, Flux): `network(x, t, **cond)`
            gives a tensor, or an object with `sample`. One that learned the variance too gives twice the channels of x, of
            which the first half is the prediction; `samplers.adapters.variance` samples with both.
        scheduler: of any kind that holds `alphas_cumprod` (DDPM, DDIM, DPM-Solver, ...: t is the training step, 0 .. T - 1),
            one that matches flows (t in [0, 1], and the network takes `num_train_timesteps * t`, or t where it is one of those
            that do), one of EDM's, or the variance-exploding one of score SDEs (t is sigma). Only the noise schedule and the
            prediction are taken from it. How it steps is not, nor a flow scheduler's `shift`, which says where the nodes of
            its grid lie and nothing of what the network was trained on: give shifted nodes as `timesteps=`.

    Returns:
        The model; further inputs of the network (`encoder_hidden_states`, `class_labels`, ...) go through `cond`.

    Raises:
        TypeError: a network that is not a module, or a scheduler without a config.
        ValueError: a scheduler whose noise schedule or prediction is of another kind.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise TypeError(f"scheduler must be a diffusers scheduler with a config, got {type(scheduler).__name__}")
    if "sigma_data" in config and "sigma_max" in config:
        return _edm_model(network, scheduler, config)
    if config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        return _continuous_v_model(network, config)
    if "snr" in config and "sigma_max" in config:  # Song et al. 2021, arXiv:2011.13456: the network is given sigma
        return EpsModel(DiffusersNet(network), schedules.edm(*_range(config)), "score")
    schedule, predicts, time_input = _described(network, scheduler, config)
    return EpsModel(DiffusersNet(network), schedule, predicts, time_input)


def _described(
    network: nn.Module, scheduler: Any, config: Mapping[str, Any]
) -> tuple[Schedule, str, Callable[[Tensor], Tensor] | None]:
    """The noise schedule, what the network predicts, and the time that it takes."""
    table = getattr(scheduler, "alphas_cumprod", None)
    prediction = config.get("prediction_type", "epsilon")
    matches_flows = table is None and "num_train_timesteps" in config and "shift" in config
    if matches_flows or (config.get("use_flow_sigmas") and prediction == "flow_prediction"):
        factor = flow_time(network, float(config["num_train_timesteps"]))
        return schedules.flow(), "flow", None if factor == 1 else lambda t: factor * t
    if table is None:
        raise ValueError(
            "scheduler must hold alphas_cumprod, match flows, be one of EDM's or that of a variance-exploding SDE, got "
            f"{type(scheduler).__name__}"
        )
    if prediction not in _PREDICTS:
        raise unknown("prediction_type of the scheduler", str(prediction), _PREDICTS)
    if prediction == "flow_prediction":
        raise ValueError(
            "prediction_type of the scheduler is 'flow_prediction' beside alphas_cumprod; use a flow scheduler, or one with "
            "use_flow_sigmas=True"
        )
    return schedules.from_alphas_cumprod(_exact(table, config)), _PREDICTS[prediction], None


def _exact(table: Any, config: Mapping[str, Any]) -> Tensor:
    """alphas_cumprod (T,) in float64: computed anew from the betas where diffusers made it from them in float32.

    A schedule that was rescaled to zero terminal SNR, or whose betas are of another kind, keeps the table as it is, but for the
    2^-24 that some schedulers put in place of the zero.
    """
    given = torch.as_tensor(table).double()
    steps, start, end = (config.get(name) for name in ("num_train_timesteps", "beta_start", "beta_end"))
    kind = config.get("beta_schedule")
    if config.get("trained_betas") is None and kind in ("linear", "scaled_linear") and steps and start and end:
        root = 2.0 if kind == "scaled_linear" else 1.0
        betas = torch.linspace(start ** (1 / root), end ** (1 / root), steps, dtype=torch.float64) ** root
        exact = torch.cumprod(1.0 - betas, 0)
        if (exact - given).abs().max() < 1e-5:
            return exact
    if config.get("rescale_betas_zero_snr") and given[-1] < 1e-6:
        given[-1] = 0.0
    return given


def _edm_model(network: nn.Module, scheduler: Any, config: Mapping[str, Any]) -> EpsModel:
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _EDM:
        raise unknown("prediction_type of the scheduler", str(prediction), _EDM)
    to_noise = getattr(scheduler, "precondition_noise", None)
    if not callable(to_noise):  # that of consistency models, say, whose preconditioning is another
        raise ValueError(f"scheduler must precondition its network as EDM's do, got {type(scheduler).__name__}")
    probe = torch.tensor([0.1, 7.0], dtype=torch.float64)
    usual = torch.allclose(to_noise(probe), 0.25 * probe.log())
    return EpsModel(
        DiffusersNet(network, _EDM[prediction]),
        schedules.edm(*_range(config)),
        "edm",
        None if usual else lambda c_noise: to_noise(torch.exp(4.0 * c_noise)),
        sigma_data=float(config["sigma_data"]),
    )


def _continuous_v_model(network: nn.Module, config: Mapping[str, Any]) -> EpsModel:
    """v-prediction at sigmas beyond any table (`timestep_type="continuous"`): EDM's F with unit data and the sign of v."""
    net = DiffusersNet(network, _EDM["v_prediction"])
    return EpsModel(net, schedules.edm(*_range(config)), "edm", sigma_data=1.0)


def _range(config: Mapping[str, Any]) -> tuple[float, float]:
    """The smallest and the largest sigma of a scheduler that is defined by them.

    Raises:
        ValueError: it does not say.
    """
    found = config.get("sigma_min"), config.get("sigma_max")
    if None in found:
        raise ValueError(f"scheduler must have sigma_min and sigma_max, got {found[0]} and {found[1]}")
    return float(found[0]), float(found[1])  # type: ignore[arg-type]
