"""Networks of diffusers as epsilon-models: the scheduler that a network was saved with says what it predicts and at which times.

Nothing of diffusers is imported here: a network and a scheduler are what they say of themselves in their `config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from samplers import schedules
from samplers.adapters.diffusers.classes import NETWORKS, of_class
from samplers.adapters.diffusers.keys import check_known
from samplers.adapters.diffusers.networks import DiffusersNet, flow_time
from samplers.adapters.diffusers.training import training_of
from samplers.model import EpsModel


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
        ValueError: a scheduler whose noise schedule or prediction is of another kind, or a key of its config that no scheduler
            has.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise TypeError(f"scheduler must be a diffusers scheduler with a config, got {type(scheduler).__name__}")
    name = type(scheduler).__name__
    if name in NETWORKS:
        raise ValueError(f"scheduler of class {name}: {NETWORKS[name]}")
    check_known(config, type(scheduler))
    if "snr" in config and "sigma_max" in config:  # Song et al. 2021, arXiv:2011.13456: the network is given sigma
        return EpsModel(DiffusersNet(network), schedules.edm(config["sigma_min"], config["sigma_max"]), "score")
    training = training_of(of_class(config, name), name, getattr(scheduler, "alphas_cumprod", None))
    net = DiffusersNet(network, training.sign)
    if training.takes != "flow":
        return training.model(net)
    factor = flow_time(network, float(training.steps))
    return EpsModel(net, training.schedule, training.predicts, None if factor == 1 else lambda t: factor * t)
