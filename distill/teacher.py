"""Train an epsilon-model (the teacher) with the DDPM objective.

Ho et al. 2020, arXiv:2006.11239, equation 14 (`L_simple`) with continuous time; the v-prediction of Salimans & Ho 2022,
arXiv:2202.00512, section 4, as an option; labels dropped to a null class as in Ho & Salimans 2022, arXiv:2207.12598.

Every random choice of step k is a function of (seed, k) alone, so a run that was killed and resumed is the uninterrupted run.
"""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from distill.checkpoint import (
    Checkpoint,
    CheckpointError,
    build_network,
    load_weights,
    read_json,
    read_tensors,
    recover_folder,
    save_checkpoint,
    write_folder,
)
from samplers import schedule as schedules

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class TrainingError(RuntimeError):
    """The loss is no longer finite; the last checkpoint is intact."""


@dataclass(frozen=True)
class TeacherConfig:
    """What a training run is. `images` may grow between two sessions of the same run; nothing else may change.

    Attributes:
        network: `{"class": name, **arguments}`.
        schedule: as `Schedule.config()` gives it.
        predicts: "eps" or "v".
        images: training images to see in all.
        learning_rate: of AdamW, after `warmup` images of linear rise and until the last `cooldown` images, over which it falls to zero linearly.
        ema_half_life: in images, of the averaged weights that are judged and shipped.
        drop_label: probability with which a label is replaced by the null class.
        dtype: "bf16" (autocast) or "fp32".
        log_every, save_every: in steps; save_every is a multiple of log_every.
    """

    network: dict[str, Any] = field(default_factory=lambda: {"class": "PatchUNet"})
    schedule: dict[str, Any] = field(default_factory=lambda: {"name": "cosine"})
    predicts: str = "v"
    images: int = 2_400_000
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: int = 50_000
    cooldown: int = 600_000
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema_half_life: int = 50_000
    drop_label: float = 0.1
    dtype: str = "bf16"
    seed: int = 0
    log_every: int = 50
    save_every: int = 500

    def __post_init__(self) -> None:
        if self.predicts not in ("eps", "v"):
            raise ValueError(f"predicts must be 'eps' or 'v', got {self.predicts!r}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {sorted(_DTYPES)}, got {self.dtype!r}")
        for name in ("images", "batch_size", "log_every", "save_every", "ema_half_life"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.save_every % self.log_every:
            raise ValueError(f"save_every must be a multiple of log_every={self.log_every}, got {self.save_every}")
        if not 0 <= self.drop_label <= 1:
            raise ValueError(f"drop_label must lie in [0, 1], got {self.drop_label}")

    @property
    def steps(self) -> int:
        return math.ceil(self.images / self.batch_size)


@dataclass(frozen=True)
class Batch:
    """One training example a row: clean images (B, C, H, W) in [-1, 1], labels (B,), times (B,), noise like the images."""

    x0: Tensor
    labels: Tensor
    t: Tensor
    eps: Tensor


def draw_batch(
    images: Tensor,
    labels: Tensor | None,
    null_class: int,
    schedule: schedules.Schedule,
    config: TeacherConfig,
    step: int,
) -> Batch:
    """The batch of a step, a function of (seed, step) alone; each epoch is one permutation of the data.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) integers below `null_class`, or None.
    """
    first = step * config.batch_size
    positions = np.arange(first, first + config.batch_size)
    index = np.empty(config.batch_size, dtype=np.int64)
    for epoch in np.unique(positions // len(images)):
        order = np.random.Generator(np.random.Philox(key=[config.seed, epoch])).permutation(len(images))
        here = positions // len(images) == epoch
        index[here] = order[positions[here] % len(images)]
    generator = torch.Generator().manual_seed((config.seed << 32) + step)
    x0 = images[torch.from_numpy(index)].float() / 127.5 - 1.0
    # one stratum of time for each image: t is uniform, and the loss less noisy
    strata = (
        torch.randperm(config.batch_size, generator=generator) + torch.rand(config.batch_size, generator=generator)
    ) / config.batch_size
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * strata
    kept = torch.full((config.batch_size,), null_class) if labels is None else labels[torch.from_numpy(index)].long()
    dropped = torch.rand(config.batch_size, generator=generator) < config.drop_label
    return Batch(x0, kept.masked_fill(dropped, null_class), t, torch.randn(x0.shape, generator=generator))


def diffusion_loss(
    network: nn.Module, batch: Batch, schedule: schedules.Schedule, predicts: str, dtype: torch.dtype
) -> Tensor:
    """Mean squared error on epsilon, or on v = alpha eps - sigma x0, at x_t = alpha x0 + sigma eps."""
    alpha, sigma = (f(batch.t).view(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
    x_t = alpha * batch.x0 + sigma * batch.eps
    target = batch.eps if predicts == "eps" else alpha * batch.eps - sigma * batch.x0
    with torch.autocast(batch.x0.device.type, dtype, enabled=dtype != torch.float32):
        prediction = network(x_t, batch.t, batch.labels)
    return (prediction.float() - target).square().mean()


def learning_rate(config: TeacherConfig, step: int) -> float:
    """Linear rise, plateau, linear fall to zero at the last step."""
    seen = step * config.batch_size
    rise = min(1.0, (seen + config.batch_size) / max(config.warmup, 1))
    fall = min(1.0, (config.steps - step) * config.batch_size / max(config.cooldown, 1))
    return config.learning_rate * rise * fall


class Trainer:
    """The state of a training run: network, averaged weights, optimiser, step and log. `run` trains; `folder` holds all of it."""

    def __init__(self, config: TeacherConfig, folder: str | Path, device: str = "cpu") -> None:
        self.config, self.folder, self.device = config, Path(folder), torch.device(device)
        torch.manual_seed(config.seed)
        self.schedule = schedules.from_config(config.schedule)
        self.network = build_network(config.network).to(self.device)
        self.ema = copy.deepcopy(self.network).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.step = 0
        self.log: list[dict[str, float]] = []
        if recover_folder(self.folder / "state").exists():
            self._resume()

    def run(self, images: Tensor, labels: Tensor | None, quiet: bool = False) -> Checkpoint:
        """Train to the configured number of images and save; resumes by itself.

        Args:
            images: (N, C, H, W) uint8; labels: (N,) integers, or None.

        Raises:
            ValueError: images or labels that do not fit the network.
            TrainingError: the loss is NaN or Inf; the last checkpoint is kept.
        """
        self._check_data(images, labels)
        self.network.train()
        losses: list[Tensor] = []
        began, began_at = time.perf_counter(), self.step
        columns = (
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, disable=quiet) as progress:
            task = progress.add_task("train", total=self.config.steps, completed=self.step, status="")
            while self.step < self.config.steps:
                losses.append(self._train_step(images, labels))
                if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                    rate = (self.step - began_at) * self.config.batch_size / (time.perf_counter() - began)
                    loss = self._log(torch.stack(losses).mean().item(), rate)
                    losses = []
                    progress.update(task, completed=self.step, status=f"loss {loss:.4f}  {rate:.0f} images/s")
                if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                    self._save()
        return self.checkpoint()

    def checkpoint(self) -> Checkpoint:
        """The averaged weights, ready to sample from."""
        info = {"images": self.step * self.config.batch_size, "training": asdict(self.config)}
        if self.log:
            info["loss"] = self.log[-1]["loss"]
        return Checkpoint(copy.deepcopy(self.ema).eval(), self.schedule, self.config.predicts, info)

    def _train_step(self, images: Tensor, labels: Tensor | None) -> Tensor:
        batch = draw_batch(images, labels, self.network.classes, self.schedule, self.config, self.step)
        batch = Batch(
            *(getattr(batch, name).to(self.device, non_blocking=True) for name in ("x0", "labels", "t", "eps"))
        )
        loss = diffusion_loss(self.network, batch, self.schedule, self.config.predicts, _DTYPES[self.config.dtype])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimizer.step()
        self.step += 1
        self._average()
        return loss.detach()

    @torch.no_grad()
    def _average(self) -> None:
        """Exponential moving average whose half-life grows with the run until it is the configured one (arXiv:2206.00364, code)."""
        seen = self.step * self.config.batch_size
        decay = 0.5 ** (self.config.batch_size / min(self.config.ema_half_life, 0.05 * seen))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.network.parameters()), 1.0 - decay)

    def _log(self, loss: float, rate: float) -> float:
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.step}; the last checkpoint in {self.folder} is intact. Lower learning_rate or grad_clip"
            )
        self.log.append(
            {
                "step": self.step,
                "images": self.step * self.config.batch_size,
                "loss": loss,
                "learning_rate": learning_rate(self.config, self.step - 1),
                "images_per_second": round(rate, 1),
            }
        )
        return loss

    def _save(self) -> None:
        moments = {
            f"{key}.{i}": value
            for i, state in self.optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }
        write_folder(
            self.folder / "state",
            {"network": self.network.state_dict(), "ema": self.ema.state_dict(), "optimizer": moments},
            {"state": {"step": self.step, "config": asdict(self.config)}, "log": self.log},
        )
        save_checkpoint(self.folder / "model", self.checkpoint())
        (self.folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.log))

    def _resume(self) -> None:
        state_folder = self.folder / "state"
        state = read_json(state_folder / "state.json")
        free = {"images", "cooldown", "save_every"}
        changed = [
            key
            for key, value in json.loads(json.dumps(asdict(self.config))).items()
            if key not in free and state["config"].get(key) != value
        ]
        if changed:
            raise CheckpointError(
                f"{state_folder} is another run: {changed[0]} was {state['config'].get(changed[0])!r}, now "
                f"{getattr(self.config, changed[0])!r}; give another folder or the old value"
            )
        self.step, self.log = int(state["step"]), read_json(state_folder / "log.json")
        for module, name in ((self.network, "network"), (self.ema, "ema")):
            load_weights(
                module, read_tensors(state_folder / f"{name}.safetensors"), state_folder / f"{name}.safetensors"
            )
        saved: dict[int, dict[str, Tensor]] = {}
        for key, value in read_tensors(state_folder / "optimizer.safetensors").items():
            moment, index = key.rsplit(".", 1)
            saved.setdefault(int(index), {})[moment] = value
        self.optimizer.load_state_dict({"state": saved, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _check_data(self, images: Tensor, labels: Tensor | None) -> None:
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.network.shape:
            raise ValueError(
                f"images must be (N, {', '.join(map(str, self.network.shape))}) uint8, got {tuple(images.shape)} {images.dtype}"
            )
        if labels is not None and (
            len(labels) != len(images) or not 0 <= int(labels.min()) <= int(labels.max()) < self.network.classes
        ):
            raise ValueError(f"labels must be {len(images)} integers in 0 .. {self.network.classes - 1}")
