"""States and noise as pipelines hand them over: what fits together, and in which precision it is summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from samplers.adapters.diffusers.training import Training
from samplers.adapters.variance import split
from samplers.execute import NoiseSource
from samplers.guidance import clip, threshold
from samplers.program import Evaluate

Generators = torch.Generator | Sequence[torch.Generator] | None


def halves_of(output: Any, sample: Any) -> tuple[Tensor, Tensor | None]:
    """The network's prediction, if it fits to the state, and its learned variance, which is None where it learned none.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes or devices that differ.
    """
    for name, value in (("model_output", output), ("sample", sample)):
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 1:
            found = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{name} must be a floating-point tensor (B, ...), got {found}")
    prediction, variance = split(output, sample)
    check_together("model_output", prediction, "sample", sample)
    return prediction, variance


def check_together(name: str, value: Tensor, with_name: str, with_value: Tensor, *, broadcast: bool = False) -> None:
    """Raise ValueError where two tensors are on different devices or of shapes that differ, or do not even broadcast."""
    if value.device != with_value.device:
        raise ValueError(f"{name} is on {value.device}, {with_name} on {with_value.device}; move one of them")
    if value.shape != with_value.shape and not (broadcast and _broadcast(value, with_value)):
        raise ValueError(
            f"{name} must have the shape of {with_name}, {tuple(with_value.shape)}, got {tuple(value.shape)}"
        )


def _broadcast(a: Tensor, b: Tensor) -> bool:
    return a.ndim == b.ndim and all(n == m or 1 in (n, m) for n, m in zip(a.shape, b.shape, strict=True))


def wide(x: Tensor) -> Tensor:
    """States of half precision are summed in float32, others as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def evaluated(
    training: Training, config: Mapping[str, Any], call: Evaluate, x: Tensor, output: Tensor
) -> tuple[Tensor, Tensor]:
    """What a plan evaluates at a call, and x0 there, from the network's output at state x.

    `clip_sample` and `thresholding` of the config change x0 as `samplers.guidance` does, and epsilon with it.
    """
    model, by = training.model(lambda x, t: training.sign * output), 1.0
    if config.get("thresholding"):
        limit, ratio = config.get("sample_max_value", 1.0), config.get("dynamic_thresholding_ratio", 0.995)
        # they divide by the quantile clamped to [1, limit], which is the limit where that is below 1
        by = min(limit, 1.0)
        model = threshold(model, ratio, by, limit=limit)
    elif config.get("clip_sample"):
        model = clip(model, config.get("clip_sample_range", 1.0))
    else:
        values = {}
        for kind in (call.kind, "x0"):
            by_x, by_out = model.affine(kind, call.t, call.alpha, call.sigma)
            values[kind] = by_out * training.sign * output if by_x == 0 else by_x * x + by_out * training.sign * output
        return values[call.kind], values["x0"]
    x0 = model.x0(x, call.t) / by
    return (x0 if call.kind == "x0" else (x - call.alpha * x0) / call.sigma), x0


def from_generator(generator: Generators, batch: int) -> NoiseSource:
    """Noise from a generator, or from a list with one for each sample, in the order it is asked for.

    Raises:
        ValueError: a list of another length than the batch.
    """
    from diffusers.utils.torch_utils import randn_tensor

    if isinstance(generator, Sequence) and len(generator) not in (1, batch):
        raise ValueError(f"generator must be one or {batch}, one for each sample, got a list of {len(generator)}")

    def draw(k: int, like: Tensor) -> Tensor:
        return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    return draw
