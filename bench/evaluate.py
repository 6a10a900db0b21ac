"""What a training run looks like as it goes: pictures from the same noise each time, and the distance where it can be judged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.judge import DIGITS, digit_judge
from bench.metrics import Moments, frechet_distance
from bench.network import Network, on_device
from bench.plots import save_samples
from bench.students import inputs_of, run_network
from distill.checkpoint import Checkpoint
from distill.config import default_dtype
from samplers import Plan, make_plan

_CALLS = 20  # of a teacher's pictures
_SHOWN = 80  # samples in a picture
_BATCH = 125
_SEED = 0


def evaluator(folder: Path, samples: int, device: str) -> Callable[[Checkpoint, int], dict[str, float]]:
    """The `evaluate` of a `distill.trainer.Trainer`.

    Sample k is from the same noise and has the same label at every evaluation. A student is sampled with its own plans, a
    teacher with DDIM at 20 calls. The inputs of a network are those that `bench.students.inputs_of` gives by itself.

    Args:
        folder: of the run; a picture for each number of calls goes to `folder/samples`.
        samples: that are judged, where the judge of digits fits their shape; below 2 there are pictures only.
        device: of torch.

    Returns:
        A function of the averaged model and the step, which gives {"fd_mnist_cnn@<calls>": distance}, or {}.
    """

    def evaluate(checkpoint: Checkpoint, step: int) -> dict[str, float]:
        network = on_device("the model", checkpoint, device, default_dtype(device))
        judge = digit_judge(device) if samples >= 2 and network.shape == DIGITS else None
        plans = checkpoint.plans or {_CALLS: make_plan("ddim", checkpoint.schedule, nfe=_CALLS)}
        figures = {}
        for calls, plan in plans.items():
            images = _sample(network, plan, max(samples, _SHOWN) if judge else _SHOWN, device)
            save_samples(images[:_SHOWN], folder / "samples" / f"step-{step:08d}-{calls}-calls.png", images=True)
            if judge:
                distance = frechet_distance(Moments.of(judge.features(images[:samples])), judge.reference)
                figures[f"{judge.metric}@{calls}"] = round(distance, 4)
        return figures

    return evaluate


def _sample(network: Network, plan: Plan, count: int, device: str) -> Tensor:
    """Images (count, C, H, W), on the CPU."""
    inputs, parts = inputs_of(network, plan.nfe), torch.arange(count).split(_BATCH)
    return torch.cat([run_network(network, plan, inputs, seed=_SEED, indices=part.to(device)).cpu() for part in parts])
