"""Train an epsilon-model (the teacher) with the DDPM objective.

Ho et al. 2020, arXiv:2006.11239, equation 14 (`L_simple`) with continuous time; the v-prediction of Salimans & Ho 2022,
arXiv:2202.00512, section 4, as an option; labels dropped to a null class as in Ho & Salimans 2022, arXiv:2207.12598.

The random choices of a step are a function of (seed, step) alone: a run that was killed and resumed is the uninterrupted
one, bit for bit on the same machine.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from distill.checkpoint import (
    Checkpoint,
    CheckpointError,
    build_network,
    load_checkpoint,
    load_weights,
    read_json,
    read_tensors,
    recover_folder,
    save_checkpoint,
    write_folder,
)
from distill.config import DTYPES, TeacherConfig
from distill.widen import widened
from samplers.schedule import Schedule, from_config

_MAY_CHANGE = {"images", "cooldown", "save_every"}  # between two starts of one run


class TrainingError(RuntimeError):
    """The loss or the weights are no longer finite; the last checkpoint is intact."""


@dataclass(frozen=True)
class Batch:
    """One training example a row.

    Attributes:
        x0: clean images (B, C, H, W), float32 in [-1, 1].
        labels: (B,) int64; the number of classes stands for "no label".
        t: times (B,), float32 in the schedule's own unit.
        eps: standard-normal noise, of the shape of `x0`.
    """

    x0: Tensor
    labels: Tensor
    t: Tensor
    eps: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(*(part.to(device, non_blocking=True) for part in (self.x0, self.labels, self.t, self.eps)))


def draw_batch(
    images: Tensor, labels: Tensor | None, null_class: int, schedule: Schedule, config: TeacherConfig, step: int
) -> Batch:
    """The batch of a step, a function of (seed, step) alone; each epoch is one permutation of the data.

    Args:
        images: (N, C, H, W) uint8, on the CPU.
        labels: (N,) integers below `null_class`, or None, which gives the null class to every row.
        null_class: the label that stands for "no label".
        schedule: gives the range of times, over which they are uniform.
        config: of it `seed`, `batch_size` and `drop_label`.
        step: from 0.
    """
    size = config.batch_size
    epochs, places = np.divmod(np.arange(step * size, (step + 1) * size), len(images))
    orders = {int(epoch): _epoch_order(config.seed, int(epoch), len(images)) for epoch in np.unique(epochs)}
    index = np.concatenate([order[places[epochs == epoch]] for epoch, order in orders.items()])
    # torch's CPU generator takes 32 bits: multiples of the golden ratio keep the steps of different seeds apart
    generator = torch.Generator().manual_seed((config.seed * 0x9E3779B1 + step) % 2**32)
    x0 = images[torch.from_numpy(index)].float() / 127.5 - 1.0
    # one stratum of time for each image: t is uniform, and the loss less noisy
    strata = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * strata
    kept = torch.full((size,), null_class) if labels is None else labels[torch.from_numpy(index)].long()
    dropped = torch.rand(size, generator=generator) < config.drop_label
    return Batch(x0, kept.masked_fill(dropped, null_class), t, torch.randn(x0.shape, generator=generator))


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def diffusion_loss(network: nn.Module, batch: Batch, schedule: Schedule, predicts: str, dtype: torch.dtype) -> Tensor:
    """Mean squared error on epsilon, or on v = alpha eps - sigma x0, at x_t = alpha x0 + sigma eps: a float32 scalar.

    Args:
        network: called as `network(x_t, t, labels)`.
        batch: on the network's device.
        schedule: gives alpha and sigma at the times of the batch.
        predicts: "eps" or "v".
        dtype: of autocast; torch.float32 for none.
    """
    alpha, sigma = (f(batch.t).view(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
    x_t = alpha * batch.x0 + sigma * batch.eps
    target = batch.eps if predicts == "eps" else alpha * batch.eps - sigma * batch.x0
    with torch.autocast(batch.x0.device.type, dtype, enabled=dtype != torch.float32):
        prediction = network(x_t, batch.t, batch.labels)
    return (prediction.float() - target).square().mean()


def learning_rate(config: TeacherConfig, step: int) -> float:
    """The learning rate of a step, from 0: linear rise, plateau, linear fall that would reach zero after the last step."""
    seen = step * config.batch_size
    rise = min(1.0, (seen + config.batch_size) / max(config.warmup, 1))
    fall = min(1.0, (config.steps - step) * config.batch_size / max(config.cooldown, 1))
    return config.learning_rate * rise * fall


def ema_decay(config: TeacherConfig, step: int) -> float:
    """The weight of the old average after `step` steps, at least 1.

    The half-life is a twentieth of the images seen until that exceeds `ema_half_life`, so the first weights, which are
    noise, are forgotten at once (the ramp of Karras et al. 2022, arXiv:2206.00364, in their published code).
    """
    return 0.5 ** (config.batch_size / min(config.ema_half_life, 0.05 * step * config.batch_size))


class Trainer:
    """A training run. `run` trains it; `folder` holds all of it and resumes it.

    Args:
        config: what the run is.
        folder: `state/` (what resuming needs), `model/` (a checkpoint of the averaged weights) and `log.jsonl`.
        device: of the network.
        init: folder of a checkpoint whose weights a new run begins with; its network must be the configured one, or a
            narrower one of the same layout, which `widened` makes wider.

    Attributes:
        network, ema: as it is trained, and its averaged weights.
        step: steps done.
        log: rows of step, images, mean loss since the last row, learning_rate, images_per_second since this start.

    Raises:
        CheckpointError: `folder` holds another run, or a damaged one; or `init` does not fit.
        ValueError: a network whose arguments do not fit each other.
    """

    def __init__(
        self, config: TeacherConfig, folder: str | Path, device: str = "cpu", init: str | Path | None = None
    ) -> None:
        self.config, self.folder, self.device = config, Path(folder), torch.device(device)
        self.schedule = from_config(config.schedule)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.network = build_network(config.network)
        resumes = recover_folder(self.folder / "state").exists()
        if init is not None and not resumes:
            self._start_from(Path(init))
        self.network.to(self.device)
        self.ema = copy.deepcopy(self.network).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
        )  # each step sets its learning rate
        self.step = 0
        self.log: list[dict[str, float]] = []
        if resumes:
            self._resume(self.folder / "state")

    def run(self, images: Tensor, labels: Tensor | None, quiet: bool = False) -> Checkpoint:
        """Train to the configured number of images, save, and return the averaged weights; resumes by itself.

        Args:
            images: (N, C, H, W) uint8, of the network's shape.
            labels: (N,) integers below the network's classes, or None.
            quiet: show nothing; otherwise a bar in a terminal, and elsewhere a line for each row of the log.

        Raises:
            ValueError: images or labels that do not fit the network.
            TrainingError: the loss or the weights are NaN or Inf; the last checkpoint is kept.
        """
        self._check_data(images, labels)
        self.network.train()
        losses, began, first = [], time.perf_counter(), self.step
        with _progress(quiet) as progress:
            task = progress.add_task("train", total=self.config.steps, completed=self.step, status="")
            while self.step < self.config.steps:
                losses.append(self._train_step(images, labels))
                last = self.step == self.config.steps
                if last or self.step % self.config.log_every == 0:
                    rate = (self.step - first) * self.config.batch_size / (time.perf_counter() - began)
                    loss = self._log(torch.stack(losses).mean().item(), rate)
                    losses.clear()
                    status = f"loss {loss:.4f}  {rate:.0f} images/s"
                    progress.update(task, completed=self.step, status=status)
                    if progress.disable and not quiet:
                        progress.console.print(f"step {self.step} of {self.config.steps}  {status}", highlight=False)
                if last or self.step % self.config.save_every == 0:
                    self._save()
        if first == self.step:  # nothing was left to do, but the model may be missing
            save_checkpoint(self.folder / "model", self.checkpoint())
        return self.checkpoint()

    def checkpoint(self) -> Checkpoint:
        """The averaged weights, ready to sample from."""
        loss = {"loss": self.log[-1]["loss"]} if self.log else {}
        info = {"images": self.step * self.config.batch_size, "training": asdict(self.config), **loss}
        return Checkpoint(copy.deepcopy(self.ema).eval(), self.schedule, self.config.predicts, info)

    def _start_from(self, init: Path) -> None:
        trained, widths = load_checkpoint(init).network, self.network.arguments["widths"]
        if (
            trained.arguments != self.network.arguments
            and trained.arguments | {"widths": widths} == self.network.arguments
        ):
            try:
                trained = widened(trained, widths, self.config.seed)
            except ValueError as error:
                raise CheckpointError(f"{init} does not fit: {error}") from error
        load_weights(self.network, trained.state_dict(), init)

    def _train_step(self, images: Tensor, labels: Tensor | None) -> Tensor:
        batch = draw_batch(images, labels, self.network.classes, self.schedule, self.config, self.step)
        loss = diffusion_loss(
            self.network, batch.to(self.device), self.schedule, self.config.predicts, DTYPES[self.config.dtype]
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            weight = 1.0 - ema_decay(self.config, self.step)
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.network.parameters()), weight)
        return loss.detach()

    def _log(self, loss: float, rate: float) -> float:
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        seen, lr = self.step * self.config.batch_size, learning_rate(self.config, self.step - 1)
        row = {"step": self.step, "images": seen, "loss": loss, "learning_rate": lr}
        self.log.append(row | {"images_per_second": round(rate, 1)})
        return loss

    def _diverged(self, what: str) -> TrainingError:
        kept = "the last checkpoint is intact" if (self.folder / "state").exists() else "no checkpoint was written yet"
        return TrainingError(f"{what} at step {self.step}; {kept} in {self.folder}. Lower learning_rate or grad_clip")

    def _save(self) -> None:
        """Write the model first and the state last: a kill between them repeats steps, and then writes both again."""
        if not all(p.isfinite().all() for p in self.network.parameters()):
            raise self._diverged("the weights are NaN or Inf")
        save_checkpoint(self.folder / "model", self.checkpoint())
        (self.folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.log))
        state = self.optimizer.state_dict()["state"]
        moments = {f"{key}.{i}": value for i, values in state.items() for key, value in values.items()}
        write_folder(
            self.folder / "state",
            {"network": self.network.state_dict(), "ema": self.ema.state_dict(), "optimizer": moments},
            {"state": {"step": self.step, "config": asdict(self.config)}, "log": self.log},
        )

    def _resume(self, folder: Path) -> None:
        saved, moments = read_json(folder / "state.json"), read_tensors(folder / "optimizer.safetensors")
        parts, parameters = ("step", "exp_avg", "exp_avg_sq"), range(len(self.optimizer.param_groups[0]["params"]))
        try:
            self._check_same_run(folder, int(saved["step"]), saved["config"])
            self.step, self.log = int(saved["step"]), read_json(folder / "log.json")
            state = {i: {part: moments[f"{part}.{i}"] for part in parts} for i in parameters}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder} is not the state of a training run: {error!r}") from error
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        for module, name in ((self.network, "network"), (self.ema, "ema")):
            load_weights(module, read_tensors(folder / f"{name}.safetensors"), folder / f"{name}.safetensors")

    def _check_same_run(self, folder: Path, step: int, before: dict[str, Any]) -> None:
        for name, value in json.loads(json.dumps(asdict(self.config))).items():
            if name not in _MAY_CHANGE and before.get(name) != value:
                was = f"{folder} is another run: {name} was {before.get(name)!r}, now {value!r}"
                raise CheckpointError(f"{was}; give another folder or the old value")
        if step > self.config.steps:
            raise CheckpointError(f"{folder} has trained {step} steps, images={self.config.images} would be fewer")

    def _check_data(self, images: Tensor, labels: Tensor | None) -> None:
        shape, classes = self.network.shape, self.network.classes
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != shape or not len(images):
            needed = f"(N, {', '.join(map(str, shape))}) uint8 with N > 0"
            raise ValueError(f"images must be {needed}, got {tuple(images.shape)} {images.dtype}")
        if labels is None:
            return
        whole = not labels.is_floating_point() and labels.shape == (len(images),)
        if not whole or labels.min() < 0 or labels.max() >= classes:
            given = f"{labels.min()} .. {labels.max()}" if whole else f"{tuple(labels.shape)} {labels.dtype}"
            raise ValueError(f"labels must be ({len(images)},) integers in 0 .. {classes - 1}, got {given}")


def _progress(quiet: bool) -> Progress:
    """A progress bar, disabled where it would not be seen."""
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress("train", BarColumn(), MofNCompleteColumn(), "{task.fields[status]}", *times)
    progress.disable = quiet or not progress.console.is_terminal
    return progress
