"""Students: models that sample with their own plans, in the few network calls they were trained for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from samplers import EpsModel, Plan, run_plan
from samplers.draft import Draft
from samplers.grid import Grid
from samplers.noise import check_seed, sample_indices, standard_normal
from samplers.schedule import Schedule


@dataclass(frozen=True)
class Student:
    """A distilled model with the plans it was trained for.

    Attributes:
        model: the network as an epsilon-model, which any sampler takes.
        plans: for each number of network calls that it was trained for, how it samples.
        info: as in its checkpoint; `info["student"]` names the method, and for a guided student the range of `guidance`.
        scalars: names of further inputs of the network.
        classes: number of labels; one more, the number `classes`, stands for "no label".
        shape: of one image, (C, H, W).
    """

    model: EpsModel
    plans: dict[int, Plan]
    info: dict[str, Any]
    scalars: tuple[str, ...]
    classes: int
    shape: tuple[int, ...]

    def sample(
        self,
        calls: int,
        *,
        x_T: Tensor | None = None,
        shape: Sequence[int] | None = None,
        seed: int = 0,
        indices: Tensor | None = None,
        cond: Mapping[str, Any] | None = None,
        stochastic: bool = False,
        guidance: float | None = None,
    ) -> Tensor:
        """Sample in a number of network calls that the student was trained for.

        Args:
            calls: of the network, for each sample.
            x_T: start states (B, C, H, W) in x coordinates; or give `shape`.
            shape: (B, C, H, W) of start noise, drawn per sample from seed.
            seed: of start noise and step noise, in [0, 2^64).
            indices: (B,) sample indices of this batch; None is 0 .. B-1.
            cond: passed to every network call, such as `{"class_labels": ...}`, (B,).
            stochastic: whether noise is added after each step but the last, see `stochastic_plan`. The student was trained
                for steps of half that length.
            guidance: weight of the guidance, for a guided student; None is 0, or what is nearest to it in its range.

        Returns:
            Samples (B, C, H, W), in [-1, 1] but for the student's error.

        Raises:
            ValueError: calls or a guidance weight that it was not trained for, guidance for a student that takes none, not
                exactly one of x_T and shape, or another shape than the student's.
            SamplingError: NaN or Inf from the network.
        """
        if calls not in self.plans:
            raise ValueError(f"calls must be one that the student was trained for, {sorted(self.plans)}, got {calls}")
        plan = self.plans[calls]
        if stochastic:
            plan = stochastic_plan(self.model.schedule, plan.times)
        start = self._start(x_T, shape, seed, indices, plan.sigma_T)
        inputs = network_inputs(self.info, self.scalars, calls, guidance)
        cond = {**(cond or {}), **filled(inputs, start)}
        return run_plan(plan, self.model, start, seed=seed, indices=indices, cond=cond)

    def _start(
        self, x_T: Tensor | None, shape: Sequence[int] | None, seed: int, indices: Tensor | None, sigma: float
    ) -> Tensor:
        if (x_T is None) == (shape is None):
            raise ValueError(f"give exactly one of x_T and shape, got {'none' if x_T is None else 'both'}")
        name, size = ("shape", tuple(shape)) if shape is not None else ("x_T", tuple(x_T.shape))  # type: ignore[union-attr]
        if not size or size[0] < 1 or size[1:] != self.shape:
            raise ValueError(f"{name} must be (B, {', '.join(map(str, self.shape))}) with B > 0, got {size}")
        if x_T is not None:
            return x_T
        weights, count = self.model.weights, sample_indices(indices, size[0])
        device = torch.device("cpu") if weights is None else weights.device
        dtype = torch.float32 if weights is None else weights.dtype
        return standard_normal(check_seed(seed), count, 0, size[1:], dtype, device).mul_(sigma)


def network_inputs(
    info: Mapping[str, Any], scalars: Sequence[str], calls: int, guidance: float | None
) -> dict[str, float]:
    """What a network takes beside state, time and label, the same for every sample.

    Args:
        info: of its checkpoint.
        scalars: names of the inputs it takes.
        calls: network calls of the plan; an input that tells them has the value of the nearest number trained for.
        guidance: weight; None is 0, which is no guidance, or what is nearest to it in the range trained for.

    Raises:
        ValueError: a guidance weight for a network that takes none, or outside what it was trained for; or an input whose
            value its checkpoint does not tell.
    """
    student = info.get("student", {})
    told = {int(known): inputs for known, inputs in student.get("scalars", {}).items()}
    inputs = dict(told[nearest(told, calls)]) if told else {}
    if "guidance" in scalars:
        inputs["guidance"] = _weight(student.get("guidance"), guidance)
    elif guidance is not None:
        raise ValueError(f"guidance must be None for a network that does not take it, got {guidance:g}")
    missing = sorted(set(scalars) - set(inputs))
    if missing:
        raise ValueError(f"the network takes {missing[0]!r}, and its checkpoint does not tell the value")
    return inputs


def nearest(trained: Iterable[int], calls: int) -> int:
    """The number of calls, of those a student was trained for, whose ratio to another is the least."""
    return min(trained, key=lambda known: abs(math.log(known / calls)))


def filled(inputs: Mapping[str, float], like: Tensor) -> dict[str, Tensor]:
    """Inputs (B,) float32, the same for every sample, for states or indices (B, ...) on their device."""
    return {name: torch.full((len(like),), value, device=like.device) for name, value in inputs.items()}


def _weight(trained: Sequence[float] | None, guidance: float | None) -> float:
    low, high = trained or (-math.inf, math.inf)
    if guidance is None:
        return min(max(0.0, low), high)
    if not low <= guidance <= high:
        raise ValueError(f"guidance must be in the range trained for, {low:g} to {high:g}, got {guidance:g}")
    return float(guidance)


def load_student(folder: str | Path, device: torch.device | str = "cpu") -> Student:
    """Load a student that `save_checkpoint` wrote, in fp32.

    Args:
        folder: of the checkpoint.
        device: where its network goes.

    Raises:
        CheckpointError: it cannot be read, or has no plans.
    """
    found = load_checkpoint(folder)
    if not found.plans:
        raise CheckpointError(
            f"{folder} has no plans: it is no student but a model for any sampler; use load_checkpoint"
        )
    network = found.network.to(device)
    model = EpsModel(network, found.schedule, found.predicts)
    return Student(model, found.plans, found.info, network.scalars, network.classes, network.shape)


def ddim_plan(schedule: Schedule, nodes: Sequence[float] | np.ndarray) -> Plan:
    """DDIM, written in x0: what `get_sampler("ddim")` computes in epsilon, but for rounding.

    A long first step in epsilon divides by an alpha near 0: in bf16, one step of the shipped MNIST model from t_max then has a
    root mean square error of 0.3, against 0.003 here.

    Args:
        schedule: the noise schedule.
        nodes: decreasing times in the schedule's time; the last may be `schedule.t_zero`.

    Raises:
        ValueError: fewer than two nodes, or nodes that do not decrease.
    """
    p = Draft(Grid(schedule, np.array(nodes, dtype=np.float64)), "x0", first_step=False)
    x = p.x
    for i in p.steps:
        x = p.first_order(i, x, p.evaluate(x, i))
    return replace(p.plan(), sampler="ddim")


def stochastic_plan(schedule: Schedule, nodes: Sequence[float] | np.ndarray) -> Plan:
    """A DDIM step over two intervals, then noise back over one, until a DDIM step over the last interval.

    Meng et al. 2023, arXiv:2210.03142, section 3 (N-step stochastic sampling). N calls, N - 1 noises.

    Args:
        schedule: the noise schedule.
        nodes: N + 1 decreasing times in the schedule's time; the last may be `schedule.t_zero`.

    Raises:
        ValueError: fewer than two nodes, or nodes that do not decrease.
    """
    p = Draft(Grid(schedule, np.array(nodes, dtype=np.float64)), "x0", first_step=False)
    x = p.x
    for i in p.steps:
        there, back = min(i + 2, len(p.t) - 1), i + 1
        shrink, ratio = p.sigma[there] / p.sigma[i], p.alpha[back] / p.alpha[there]
        added = p.sigma[back] ** 2 - (ratio * p.sigma[there]) ** 2  # 0 in the last interval, where there = back
        x0 = p.evaluate(x, i)
        terms = (x, ratio * shrink), (x0, ratio * (p.alpha[there] - p.alpha[i] * shrink))
        x = p.combine(i + 1, *terms, (p.noise(), math.sqrt(added)))
    return replace(p.plan(), sampler="stochastic")


def to_diffusers(checkpoint: Checkpoint, folder: str | Path) -> None:
    """Save the network as a folder that `diffusers.UNet2DModel.from_pretrained` loads.

    diffusers' model is called with `network.time_scale * t` for the schedule's time t, and always with labels.

    Args:
        checkpoint: of a network that is a `UNet2DModel` but for the scale of time: patch 1, no scalars.
        folder: made with its parents; files of the same names are replaced.

    Raises:
        ValueError: a network that `UNet2DModel` cannot be.
    """
    network = checkpoint.network
    if network.patch != 1:
        raise ValueError(
            f"the network must have patch=1 to be a diffusers UNet2DModel, which has no layer that makes blocks of pixels "
            f"channels, got patch={network.patch}"
        )
    if network.scalars:
        raise ValueError(
            f"the network must have no scalars to be a diffusers UNet2DModel, which takes time and labels alone, got "
            f"scalars={list(network.scalars)}"
        )
    network.unet.save_pretrained(Path(folder), safe_serialization=True)
