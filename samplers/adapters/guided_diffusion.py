"""Networks of improved-diffusion and guided-diffusion as epsilon-models (arXiv:2102.09672, arXiv:2105.05233)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from samplers import schedules
from samplers.adapters.variance import split
from samplers.errors import unknown
from samplers.model import EpsModel
from samplers.schedule import Discrete

_PREDICTS = ("eps", "x0")
_MOST_BETA = 0.999
_FULL = 1000  # steps for which the linear betas were published


def eps_model_from_guided_diffusion(
    net: nn.Module,
    *,
    schedule: str = "linear",
    steps: int = 1000,
    betas: Sequence[float] | np.ndarray | Tensor | None = None,
    predicts: str = "eps",
    learn_sigma: bool | None = None,
    rescale_timesteps: bool = False,
) -> EpsModel:
    """A network of improved-diffusion or guided-diffusion, as their `create_model` builds it, as an epsilon-model.

    A respaced process is a grid here: give `respaced(model.schedule, "250")` as `sigmas=`.

    Args:
        net: `net(x, timesteps, y=labels)`, filled for instance by `samplers.adapters.weights.load_weights`.
        schedule: "linear" or "cosine", their `noise_schedule`.
        steps: their `diffusion_steps`.
        betas: (steps,) instead of the two.
        predicts: "eps", or "x0" for their `predict_xstart`.
        learn_sigma: whether the network has twice the channels of x out, of which the first half is the prediction; None =
            as its output shows. `samplers.adapters.variance.sample_learned_variance` uses both.
        rescale_timesteps: whether the network takes `1000 t / steps`, as theirs.

    Returns:
        The model, with t the training step. `cond` takes `y` (B,), or `class_labels` for it.

    Raises:
        TypeError: not a module.
        ValueError: an unknown schedule or prediction, steps below 2, or an output of other channels than learn_sigma says.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"net must be a torch.nn.Module, got {type(net).__name__}; build it and fill it with "
            "samplers.adapters.weights.load_weights"
        )
    if predicts not in _PREDICTS:
        raise unknown("predicts", predicts, _PREDICTS)
    table = schedules.from_betas(training_betas(schedule, steps) if betas is None else betas)
    count = len(table.alphas_cumprod)
    time_input = (lambda t: t * (_FULL / count)) if rescale_timesteps and count != _FULL else None
    return EpsModel(GuidedDiffusionNet(net, learn_sigma), table, predicts, time_input)


def training_betas(schedule: str, steps: int) -> np.ndarray:
    """The betas (steps,) of a named schedule.

    "linear": from 1e-4 to 0.02 at 1000 steps, inversely proportional to the steps (Ho et al. 2020, arXiv:2006.11239).
    "cosine": Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17, each at most 0.999.

    Raises:
        ValueError: an unknown schedule, or steps below 2.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    if schedule == "linear":
        return np.linspace(1e-4, 0.02, steps) * (_FULL / steps)
    if schedule == "cosine":
        remaining = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1.0 - remaining[1:] / remaining[:-1], _MOST_BETA)
    raise unknown("schedule", schedule, ("linear", "cosine"))


def respaced(schedule: Discrete, spacing: str | Sequence[int]) -> list[float]:
    """The nodes of their `timestep_respacing` in sigma_bar, for `sigmas=`: from noise to data, which is at 0.

    Args:
        schedule: of the model, with a number of training steps.
        spacing: counts of nodes for equal parts of the training steps, such as "250", "10,10,20" or [10, 10, 20], each
            spaced evenly and rounded; or "ddim25", the steps 0, k, 2 k, ... for the k that gives 25 of them.

    Raises:
        TypeError: a schedule without training steps.
        ValueError: counts that do not fit into their part, or a stride that there is not.
    """
    if not isinstance(schedule, Discrete):
        raise TypeError(f"schedule must be discrete, as model.schedule is, got {type(schedule).__name__}")
    steps = len(schedule.alphas_cumprod)
    if isinstance(spacing, str) and spacing.startswith("ddim"):
        wanted = _counts(spacing.removeprefix("ddim"), spacing)[0]
        strides = [k for k in range(1, steps) if len(range(0, steps, k)) == wanted]
        if not strides:
            raise ValueError(f"spacing {spacing!r}: no stride through {steps} steps gives {wanted}")
        chosen = list(range(0, steps, strides[0]))
    else:
        counts = _counts(spacing, spacing) if isinstance(spacing, str) else [int(count) for count in spacing]
        chosen, start = [], 0
        for number, count in enumerate(counts):
            size = steps // len(counts) + (number < steps % len(counts))
            if not 1 <= count <= size:
                raise ValueError(f"spacing {spacing!r}: a part of {size} steps cannot be divided into {count}")
            stride = (size - 1) / (count - 1) if count > 1 else 1.0
            chosen += [start + round(stride * i) for i in range(count)]
            start += size
    nodes = np.array(sorted(set(chosen), reverse=True), dtype=np.float64)
    return [*schedule.sigma_bar(nodes).tolist(), 0.0]


def _counts(text: str, spacing: Any) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"spacing must be counts such as '250' or '10,10,20', or 'ddim25', got {spacing!r}") from error


class GuidedDiffusionNet:
    """`net(x, t, **cond) -> prediction` around a network of theirs; arguments as in `eps_model_from_guided_diffusion`."""

    def __init__(self, network: nn.Module, learn_sigma: bool | None = None) -> None:
        self.network, self.learn_sigma = network, learn_sigma

    def parameters(self) -> Any:
        """Of the network."""
        return self.network.parameters()

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The prediction for states x (B, C, H, W) and times t (B,), in x's shape."""
        return self.halves(x, t, **cond)[0]

    def halves(self, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor | None]:
        """The prediction, and the other half of the output where there is one.

        Raises:
            ValueError: channels that are not as `learn_sigma` says.
        """
        labels = cond.pop("class_labels", None)
        given = cond if labels is None else {**cond, "y": labels}
        out: Tensor = self.network(x, t, **given)
        prediction, variance = split(out, x)
        if self.learn_sigma is not None and self.learn_sigma != (variance is not None):
            raise ValueError(
                f"learn_sigma={self.learn_sigma} means {1 + self.learn_sigma} x {x.shape[1]} channels out of the network, "
                f"which gives {out.shape[1]}"
            )
        return prediction, variance
