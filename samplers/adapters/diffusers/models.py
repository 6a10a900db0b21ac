"""Networks of diffusers as epsilon-models: the scheduler that a network was saved with says what it predicts and at which times.

Nothing of diffusers is imported here: a network and a scheduler are what they say of themselves in their `config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from samplers import schedules
from samplers.errors import unknown
from samplers.model import EpsModel
from samplers.schedule import Schedule

_PREDICTS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
_EDM = {"epsilon": 1.0, "v_prediction": -1.0}  # the sign of c_out


def eps_model_from_diffusers(network: nn.Module, scheduler: Any) -> EpsModel:
    """A network of diffusers with its scheduler, as an epsilon-model.

    Args:
        network: such as `UNet2DModel`, `UNet2DConditionModel` or a transformer: `network(x, t, **cond)` gives a tensor, or an
            object with `sample`. One that learned the variance too gives twice the channels of x, of which the first half is
            the prediction.
        scheduler: of any kind that holds `alphas_cumprod` (DDPM, DDIM, DPM-Solver, ...: t is the training step, 0 .. T - 1),
            one that matches flows (t in [0, 1], and the network takes `num_train_timesteps * t`), or one of EDM's. Only the
            noise schedule and the prediction are taken from it; how it steps is not.

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
    schedule, predicts, time_input = _described(scheduler, config)
    return EpsModel(DiffusersNet(network), schedule, predicts, time_input)


class DiffusersNet:
    """`net(x, t, **cond) -> prediction` around a network of diffusers; arguments as in `eps_model_from_diffusers`.

    Args:
        network: of diffusers.
        sign: of the prediction.
    """

    def __init__(self, network: nn.Module, sign: float = 1.0) -> None:
        self.network, self.sign = network, sign

    def parameters(self) -> Any:
        """Of the network."""
        return self.network.parameters()

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The prediction for states x (B, C, ...) and times t (B,), in x's shape and dtype."""
        found = self.network(x, t, **cond)
        out = found if isinstance(found, Tensor) else found[0] if isinstance(found, tuple) else found.sample
        if out.dim() == x.dim() and out.shape[1] == 2 * x.shape[1]:
            out = out[:, : x.shape[1]]
        return out if self.sign > 0 else -out


def _described(scheduler: Any, config: Mapping[str, Any]) -> tuple[Schedule, str, Callable[[Tensor], Tensor] | None]:
    """The noise schedule, what the network predicts, and the time that it takes."""
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None and "num_train_timesteps" in config and "shift" in config:
        steps = float(config["num_train_timesteps"])
        return schedules.flow(), "flow", lambda t: steps * t
    if table is None:
        raise ValueError(
            f"scheduler must hold alphas_cumprod, match flows or be one of EDM's, got {type(scheduler).__name__}"
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _PREDICTS:
        raise unknown("prediction_type of the scheduler", str(prediction), _PREDICTS)
    if prediction == "flow_prediction":
        raise ValueError(
            "prediction_type of the scheduler is 'flow_prediction' beside alphas_cumprod; use a flow scheduler"
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
    schedule = schedules.edm(float(config["sigma_min"]), float(config["sigma_max"]))
    net = DiffusersNet(network, _EDM[prediction])
    return EpsModel(net, schedule, "edm", sigma_data=float(config["sigma_data"]))
