"""Samples by request: from noise, from an image, or around what of an image is kept; with labels, prompts and guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.data import decode
from bench.features import dequantise
from bench.guidance import NOT_GUIDED
from bench.network import Network
from bench.students import inputs_of
from distill.student import filled
from samplers import EpsModel, Plan, metered, run_plan, tasks
from samplers.execute import Callback, Progress
from samplers.job import prepare
from samplers.meter import Counts
from samplers.noise import standard_normal
from samplers.tasks import Result

DEFAULT_SAMPLER, DEFAULT_NFE = "dpmpp-2m", 20


@dataclass(frozen=True)
class Request:
    """What is to be sampled.

    Attributes:
        network: the model.
        sampler: a registered name; None: a student's own plan, or else "dpmpp-2m".
        where: nfe, steps and grid, as for `samplers.sample`.
        options: the sampler's own.
        seed: of all noise.
        labels: of which sample i has number i modulo their count; empty: all labels in turn.
        prompts: likewise.
        negative: a prompt that guidance leads away from; "": none.
        guidance: scale of classifier-free guidance, of which 1 is none; a network that takes a weight is given one less. None:
            without.
        image: (C, H, W) in [-1, 1], of pixels, to start from or to paint in.
        mask: (H, W) bool, true where to paint.
        task: strength, and with a mask resamplings and jump, as for `samplers.tasks`.
    """

    network: Network
    sampler: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    labels: Sequence[int] = ()
    prompts: Sequence[str] = ()
    negative: str = ""
    guidance: float | None = None
    image: Tensor | None = None
    mask: Tensor | None = None
    task: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError for what the model does not take."""
        network, classes = self.network, self.network.classes
        for label in self.labels:
            if not 0 <= label < classes:
                takes = f"has classes 0 .. {classes - 1}" if classes else "has no classes"
                raise ValueError(f"--class: model {network.name} {takes}, got {label}")
        if network.prompts is None and (self.prompts or self.negative):
            given = f"--prompt {self.prompts[0]!r}" if self.prompts else f"--negative-prompt {self.negative!r}"
            raise ValueError(f"{given}: model {network.name} takes no text")
        if self.negative and self.guidance is None:
            raise ValueError("--negative-prompt needs --guidance, which leads away from it")
        if self.image is not None and tuple(self.image.shape) != network.pixel_shape:
            want, got = network.pixel_shape, tuple(self.image.shape)
            raise ValueError(f"--init-image must be {_size(want)} for model {network.name}, got {_size(got)}")
        if self.mask is not None and tuple(self.mask.shape) != network.pixel_shape[-2:]:
            want, got = network.pixel_shape, tuple(self.mask.shape)
            raise ValueError(f"--mask must be of the size of the image, {_size(want)}, got {_size(got)}")
        if self.mask is not None and not self.mask.any():
            raise ValueError("--mask is white nowhere, so nothing would be painted")

    @property
    def own_plan(self) -> bool:
        """Whether a student's plan is run."""
        return bool(self.network.plans) and self.sampler is None

    @property
    def calls(self) -> int:
        """The budget, where it is known: of a student's plan those it was trained for."""
        given = self.where.get("nfe") or self.where.get("steps")
        return int(given or (max(self.network.plans) if self.own_plan else DEFAULT_NFE))


def generate(request: Request, indices: Tensor, callback: Callback | None = None) -> tuple[Result, Counts]:
    """The samples of some indices, in the model's own space, and what the networks were asked for them.

    Args:
        request: what is wanted, checked.
        indices: (B,) int64 on the model's device; sample i of a request is the same in any batch.
        callback: as in `samplers.sample`.

    Raises:
        ValueError, TypeError: a sampler, an option or a budget that cannot be.
        SamplingError: NaN or Inf from the network, or a tolerance that the budget does not reach.
    """
    network, like = request.network, torch.zeros(len(indices), *request.network.shape, device=indices.device)
    bare, cond = _guided(request, indices)
    model = metered(bare)
    how: dict[str, Any] = {"seed": request.seed, "indices": indices, "cond": cond, "callback": callback}
    if request.own_plan:
        plan = _own_plan(request)
        x_T = standard_normal(request.seed, indices, 0, network.shape, device=indices.device) * plan.sigma_T
        return Result(run_plan(plan, model, x_T, **how), plan.times, plan.nfe, plan), model.counts
    how |= dict(request.where) | dict(request.options)
    sampler = request.sampler or DEFAULT_SAMPLER
    if request.image is None:
        job = prepare(model, sampler, **how)
        return job.run(model, job.noise(like) * float(job.grid.sigma[0])), model.counts
    start = network.encode(request.image[None].to(indices.device)).to(like).expand_as(like)
    if request.mask is None:
        return tasks.img2img(model, start, sampler, **{"strength": 1.0, **request.task}, **how), model.counts
    mask = _in_space(request.mask, network).to(indices.device)
    return tasks.inpaint(model, start, mask, sampler, **request.task, **how), model.counts


def pixels(request: Request, samples: Tensor) -> Tensor:
    """Samples as they are shown, (B, *pixel_shape) float32 on the CPU; what is kept of an image is the image."""
    decoded = request.network.decode(samples).float().cpu()
    if request.mask is None or request.image is None:
        return decoded
    return torch.where(request.mask, decoded, request.image)


def filmed(frames: list[Tensor], request: Request, most: int) -> Callback:
    """A callback that keeps the first `most` states of each step, over the size of noise and data together, as pixels."""
    schedule = request.network.model.schedule

    def keep(progress: Progress) -> None:
        alpha, sigma = float(schedule.alpha(progress.t)), float(schedule.sigma(progress.t))
        frames.append(request.network.decode(progress.x[:most] / np.hypot(alpha, sigma)).float().cpu())

    return keep


def read_image(path: Path, channels: int) -> Tensor:
    """An image file as (C, H, W) float32 in [-1, 1], grey where `channels` is 1 and in three colours where it is 3.

    Raises:
        FileNotFoundError, ValueError: nothing there, or no image.
    """
    found = torch.from_numpy(decode(_read(path), str(path)).copy())
    if len(found) != channels and channels == 3:
        found = found.expand(3, -1, -1)
    elif len(found) != channels and channels == 1:
        grey = Image.fromarray(found.permute(1, 2, 0).numpy()).convert("L")
        found = torch.from_numpy(np.array(grey))[None]
    return dequantise(found)


def read_mask(path: Path) -> Tensor:
    """A mask file as (H, W) bool: true where it is lighter than middle grey, which is where to paint.

    Raises:
        FileNotFoundError, ValueError: nothing there, or no image.
    """
    return read_image(path, 1)[0] > 0


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; give an image file")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    return path.read_bytes()


def _in_space(mask: Tensor, network: Network) -> Tensor:
    """The mask (H, W) in the model's own space: latents are painted where any of their pixels is."""
    if network.space is None:
        return mask
    return torch.nn.functional.max_pool2d(mask[None].float(), network.space.factor)[0] > 0


def _own_plan(request: Request) -> Plan:
    network, calls = request.network, request.calls
    if calls in network.plans and not request.options and request.image is None and not request.where.get("grid"):
        return network.plans[calls]
    takes = "no image, grid or option" if calls in network.plans else f"--nfe of {sorted(network.plans)}, got {calls}"
    raise ValueError(f"model {network.name} is a student with plans of its own, which take {takes}; or give --sampler")


def _guided(request: Request, indices: Tensor) -> tuple[EpsModel, dict[str, Tensor]]:
    """The model under guidance, and the conditions of the samples."""
    network, cond = request.network, _conditions(request, indices)
    if network.scalars or request.own_plan:  # its guidance, if any, is an input
        weight = None if request.guidance is None else request.guidance - 1.0
        return network.model, cond | filled(inputs_of(network, request.calls, weight), indices)
    if request.guidance is None:
        return network.model, cond
    from samplers.guidance.classifier_free import classifier_free

    null = network.condition(prompts=[request.negative]) if request.negative else network.null(1)
    return classifier_free(
        network.model, request.guidance, {k: v for k, v in null.items() if k not in NOT_GUIDED}
    ), cond


def _conditions(request: Request, indices: Tensor) -> dict[str, Tensor]:
    network, rows = request.network, indices.tolist()
    cond = network.cond(indices)
    if request.labels:
        cond |= network.condition(labels=[request.labels[i % len(request.labels)] for i in rows])
    if request.prompts:
        cond |= network.condition(prompts=[request.prompts[i % len(request.prompts)] for i in rows])
    return cond


def _size(shape: Sequence[int]) -> str:
    """Width x height as image programs tell them, and channels."""
    channels = f" in {shape[0]} channel{'s'[: shape[0] > 1]}" if len(shape) == 3 else ""
    return f"{shape[-1]} x {shape[-2]} pixels{channels}"
