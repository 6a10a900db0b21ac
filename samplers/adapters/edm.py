"""Networks of EDM and EDM2 as epsilon-models (Karras et al. 2022, arXiv:2206.00364, and 2024, arXiv:2312.02696)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from samplers import schedules
from samplers.model import EpsModel

_SIGMAS = 0.002, 80.0  # that EDM's samplers stay within
_SIGMA_DATA = 0.5


def eps_model_from_edm(
    net: nn.Module,
    *,
    raw: bool | None = None,
    sigma_data: float | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> EpsModel:
    """A network of EDM or EDM2 as an epsilon-model on `schedules.edm`, where time is sigma.

    Args:
        net: either a preconditioned denoiser `D(x, sigma, class_labels)`, which is what their files hold (EDMPrecond,
            VPPrecond, VEPrecond, iDDPMPrecond, and EDM2's Precond), or a raw network `F(c_in x, c_noise, class_labels)`.
        raw: which of the two; None = raw unless net has one of the attributes `sigma_data`, `sigma_min` and `sigma_max`.
        sigma_data: of a raw network; None = 0.5. A denoiser knows its own.
        sigma_min, sigma_max: of the schedule; None = 0.002 and 80, or what the denoiser has where that is narrower.

    Returns:
        The model. `cond` takes `class_labels`, integers (B,) or one-hot rows (B, label_dim), and whatever else net takes.

    Raises:
        TypeError: not a module.
        ValueError: sigma_data for a denoiser that has another, or sigmas out of order.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"net must be a torch.nn.Module, got {type(net).__name__}; build it and fill it with "
            "samplers.adapters.weights.load_weights"
        )
    known = {name: getattr(net, name, None) for name in ("sigma_data", "sigma_min", "sigma_max")}
    raw = not any(value is not None for value in known.values()) if raw is None else raw
    if not raw and sigma_data is not None and known["sigma_data"] not in (None, sigma_data):
        raise ValueError(f"sigma_data must be None or the denoiser's own {known['sigma_data']}, got {sigma_data}")
    lowest = _SIGMAS[0] if sigma_min is None else sigma_min
    highest = _SIGMAS[1] if sigma_max is None else sigma_max
    if not raw:
        lowest = max(lowest, float(known["sigma_min"] or 0.0)) if sigma_min is None else lowest
        own = math.inf if known["sigma_max"] is None else float(known["sigma_max"])
        highest = min(highest, own) if sigma_max is None else highest
    schedule = schedules.edm(lowest, highest)
    if raw:
        return EpsModel(EDMNet(net), schedule, "edm", sigma_data=_SIGMA_DATA if sigma_data is None else sigma_data)
    return EpsModel(EDMNet(net), schedule, "x0")


class EDMNet:
    """`net(x, t, class_labels=None, **cond)` around a network of EDM, which takes its labels as one-hot rows.

    Args:
        network: a denoiser D, with t = sigma, or a raw network F, with t = c_noise.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.classes = int(getattr(network, "label_dim", 0) or 0)

    def parameters(self) -> Any:
        """Of the network."""
        return self.network.parameters()

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, **cond: Any) -> Tensor:
        """The denoised state, or F, for states x (B, C, H, W) and times (B,), in x's dtype.

        Raises:
            ValueError: labels for an unconditional network, or that are not its classes.
        """
        out = self.network(x, t, class_labels=self._rows(class_labels), **cond)
        return (out[0] if isinstance(out, tuple) else out).to(x.dtype)  # EDM2 adds the log-variance where asked to

    def _rows(self, labels: Tensor | None) -> Tensor | None:
        if labels is None or labels.is_floating_point() or not hasattr(self.network, "label_dim"):
            return labels
        if not self.classes:
            raise ValueError("class_labels must be None for a network without labels (label_dim = 0)")
        if labels.dim() != 1 or bool(((labels < 0) | (labels >= self.classes)).any()):
            raise ValueError(f"class_labels must be integers (B,) in [0, {self.classes}), got {labels}")
        return torch.nn.functional.one_hot(labels, self.classes).float()
