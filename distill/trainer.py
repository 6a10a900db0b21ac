"""The trainer of every method: phases, averaged weights, checkpoints, resuming, a guard against NaN, and several processes.

The random choices of a step are a function of (seed, step) alone, and a batch is divided among the processes by rows: a run
that was killed and resumed is the uninterrupted one, bit for bit on the same machine, and a run on several processes is the
run on one but for the order of sums.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from distill.batches import check_data, data_hash, examples, step_generator
from distill.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from distill.method import Batch, Method
from distill.run_folder import RunFolder, State, begun_with
from distill.weights import Weights
from samplers.errors import unknown

Evaluate = Callable[[Checkpoint, int], dict[str, float]]


class TrainingError(RuntimeError):
    """The loss or the weights are no longer finite, and going back did not help; the last checkpoint is intact."""


class Trainer:
    """A training run. `run` trains it; `folder` holds all of it (see `distill.run_folder`) and resumes it.

    Under `accelerate launch` or `torchrun` the run is divided among processes, with FSDP where accelerate is told so.

    Args:
        method: what is trained.
        folder: of the run.
        device: "cpu", or "auto" for the accelerator that is there.
        evaluate: called with the averaged model and the step, gives figures for the log.

    Attributes:
        weights: the network as it is trained, its averages and its optimiser.
        step: steps done, over all phases.
        log: rows of step, phase, images, mean loss since the last row, learning_rate, images_per_second, the
            seconds trained so far, and what `evaluate` gave (None for NaN or Inf).

    Raises:
        CheckpointError: `folder` holds another run, or no checkpoint of it can be read; or the teacher cannot be used.
        ValueError: settings that do not fit each other.
    """

    def __init__(
        self, method: Method, folder: str | Path, device: str = "cpu", evaluate: Evaluate | None = None
    ) -> None:
        from accelerate import Accelerator

        if device not in ("cpu", "auto"):
            raise unknown("device", device, ("cpu", "auto"))
        config = method.config
        tracker = _tensorboard() if config.tensorboard else None
        self.accelerator = Accelerator(
            cpu=device == "cpu", mixed_precision="no", log_with=tracker, project_dir=str(folder)
        )  # the method casts, as `dtype` says
        config = self.config = method.config = begun_with(config, Path(folder)).on(self.accelerator.device)
        self.method, self.evaluate, self.console = method, evaluate, Console()
        self.folder = RunFolder(Path(folder), config, self._tell, method.identity)
        self._check_division()
        with self.accelerator.main_process_first():  # which may give a folder its name back
            state = self.folder.load()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = method.network(fresh=state is None)
        self.weights = Weights(
            network, self.accelerator, config.ema_half_lives, config.weight_decay, compiles=config.compile
        )
        self.step, self.rate_factor, self.rollbacks = 0, 1.0, 0
        self.log: list[dict[str, Any]] = []
        self._phase = -1  # none has begun
        if state is not None:
            self._check_not_shorter(state)
            self._restore(state)

    # what is trained --------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return sum(phase.steps(self.config.batch_size) for phase in self.method.phases)

    def at(self, step: int) -> tuple[int, int]:
        """Number of the phase that does a step (from 0), and its step within it; after the last step, that of the last."""
        for number, phase in enumerate(self.method.phases):
            count = phase.steps(self.config.batch_size)
            if step < count:
                return number, step
            step -= count
        return len(self.method.phases) - 1, count

    def run(self, images: Tensor, labels: Tensor | None, quiet: bool = False, minutes: float = math.inf) -> Checkpoint:
        """Train all phases, save, and return the averaged weights; resumes by itself.

        Args:
            images: (N, C, H, W) uint8, of the network's shape.
            labels: (N,) integers below the network's classes, or None.
            quiet: show nothing; otherwise a bar in a terminal, and elsewhere a line for each row of the log.
            minutes: after which it saves and returns at the next row of the log, though `step` is below `steps`.

        Raises:
            ValueError: images or labels that do not fit the network.
            TrainingError: the loss or the weights are NaN or Inf, more often than `rollbacks`; the last checkpoint is kept.
            CheckpointError: a checkpoint could not be written, and those before it are whole; or the run began with other data.
        """
        check_data(images, labels, self.weights.network.shape, self.weights.network.classes)
        if labels is None and self.method.needs_labels:
            raise ValueError(f"labels must be given for the method {self.config.method!r}, the data have none")
        self.folder.check_data(data_hash(images, labels))
        if self.config.tensorboard:
            self.accelerator.init_trackers("tensorboard")
        first, losses, deadline = self.step, list[Tensor](), time.perf_counter() + 60.0 * minutes
        if self.step == 0:
            self._save()  # what a rollback goes back to, and the first to find that nothing can be written
        with _bar(quiet or not self.accelerator.is_main_process, self.console) as progress:
            task = progress.add_task("", total=self.steps, completed=self.step, status="")
            began = time.perf_counter()
            while self.step < self.steps:
                losses.append(self._train_step(images, labels))
                if self._ends_phase() or self.step % self.config.log_every == 0:
                    loss = self._mean(losses)  # waits for the steps
                    late = self._any(time.perf_counter() > deadline)
                    if self._end_row(loss, len(losses), time.perf_counter() - began, late):
                        self._show(progress, task, quiet)
                    losses.clear()
                    if late:
                        break
                    began = time.perf_counter()  # evaluations and files are not counted as training
        if first == self.step:  # nothing was left to do, but the model may be missing
            self._save_models()
        trained = self.checkpoint()
        self.accelerator.end_training()  # the processes part
        return trained

    def checkpoint(self, average: int = 0) -> Checkpoint:
        """The averaged weights, ready to sample from; `average` is the place of the half-life."""
        number, _ = self.at(max(self.step - 1, 0))
        info: dict[str, Any] = {"images": self.step * self.config.batch_size, "phases": phase_costs(self.log)}
        info |= {"loss": self.log[-1]["loss"]} if self.log else {}
        info["training"] = self.config.document()
        return self.method.checkpoint(self.weights.averaged(average), number, info)

    # a step -----------------------------------------------------------------------------------------------------------

    def _train_step(self, images: Tensor, labels: Tensor | None) -> Tensor:
        number, within = self.at(self.step)
        self._enter(number)
        config = self.config
        classes, size = self.weights.network.classes, config.batch_size
        seen = examples(images, labels, classes, config.seed, size, self.step, config.mirror)
        batch = self.method.draw(seen["x0"], seen["labels"], step_generator(config.seed, self.step), number)
        total = torch.zeros((), device=self.accelerator.device)
        for part, more in self._parts(batch):
            with self.accelerator.no_sync(self.weights.model) if more else contextlib.nullcontext():
                loss = self.method.loss(self.weights.model, part, number) / config.accumulate
                self.accelerator.backward(loss)
            total += loss.detach()
        self.accelerator.clip_grad_norm_(self.weights.network.parameters(), config.grad_clip)
        for group in self.weights.optimizer.param_groups:
            group["lr"] = self.rate_factor * self.method.phases[number].rate(within, config.batch_size)
        self.weights.optimizer.step()
        self.weights.optimizer.zero_grad()
        self.step += 1
        self.weights.average(config.batch_size, within + 1)
        return total

    def _parts(self, batch: Batch) -> Iterator[tuple[Batch, bool]]:
        """This process's parts of a batch, on its device, and whether more follow."""
        count = self.config.accumulate
        places = range(self.accelerator.process_index * count, (self.accelerator.process_index + 1) * count)
        size = self.config.batch_size // (self.accelerator.num_processes * count)
        for place in places:
            rows = slice(place * size, (place + 1) * size)
            part = {name: t[rows].to(self.accelerator.device, non_blocking=True) for name, t in batch.items()}
            yield part, place + 1 < places.stop

    def _enter(self, number: int) -> None:
        """Begin a phase: where it is new, from the averaged weights of the one before, with a fresh optimiser."""
        if number == self._phase:
            return
        before = load_checkpoint(self.folder.student(self.method.phases[number - 1].name)) if number else None
        self.method.begin(number, before, self.accelerator.device)
        self._phase = number
        if before is not None and self.at(self.step) == (number, 0):
            self.weights.begin(before.network.state_dict())

    # checks and reports -----------------------------------------------------------------------------------------------

    def _mean(self, losses: Sequence[Tensor]) -> float:
        mean = torch.stack(list(losses)).mean()
        return float(self.accelerator.reduce(mean, "mean"))

    def _any(self, happened: bool) -> bool:
        """Whether something happened to any process."""
        return bool(self.accelerator.reduce(torch.tensor(float(happened), device=self.accelerator.device), "sum") > 0)

    def _roll_back(self, what: str) -> None:
        """Go back to the last checkpoint with half the learning rate, or give up."""
        happened = f"{what} is NaN or Inf at step {self.step}"
        factor, rollbacks = 0.5 * self.rate_factor, self.rollbacks + 1
        if rollbacks > self.config.rollbacks:
            raise TrainingError(
                f"{happened}, after {self.rollbacks} rollbacks; the last checkpoint is intact in {self.folder.path}. "
                "Lower learning_rate or grad_clip"
            )
        state = self.folder.load()
        if state is None:
            raise TrainingError(f"{happened}, and {self.folder.path} has no checkpoint to go back to")
        self._restore(replace(state, rate_factor=factor, rollbacks=rollbacks))
        self.accelerator.wait_for_everyone()  # until all have read
        if self.accelerator.is_main_process:  # the rate that failed must not come back with the next start
            self.folder.save(replace(state, rate_factor=factor, rollbacks=rollbacks))
        self.accelerator.wait_for_everyone()
        self._tell(f"{happened}: back to step {self.step} with {factor:g} of the learning rate")

    def _ends_phase(self) -> bool:
        number, within = self.at(self.step - 1)
        return within + 1 == self.method.phases[number].steps(self.config.batch_size)

    def _end_row(self, loss: float, steps: int, seconds: float, saves: bool) -> bool:
        """Log the last steps, and evaluate and save where it is time; or roll back, and return False."""
        saves = saves or self._ends_phase() or self.step % self.config.save_every == 0
        if not math.isfinite(loss) or (saves and self._any(not self.weights.finite())):
            self._roll_back("a weight" if math.isfinite(loss) else "the loss")
            return False
        self._log(loss, steps, seconds)
        if self._ends_phase() and self.step < self.steps:
            self.rate_factor = 1.0  # the next phase has a rate of its own
        if saves:
            self._save()
        return True

    def _log(self, loss: float, steps: int, seconds: float) -> None:
        (number, within), size = self.at(self.step - 1), self.config.batch_size
        phase = self.method.phases[number]
        row: dict[str, Any] = {
            "step": self.step,
            "phase": phase.name,
            "images": self.step * size,
            "loss": loss,
            "learning_rate": self.rate_factor * phase.rate(within, size),
            "images_per_second": round(steps * size / seconds, 1),
            "seconds": round((self.log[-1]["seconds"] if self.log else 0.0) + seconds, 2),
        }
        every = self.config.evaluate_every
        if self.evaluate is not None and (self._ends_phase() or (every and self.step % every == 0)):
            checkpoint = self.checkpoint()
            if self.accelerator.is_main_process:
                figures = self.evaluate(checkpoint, self.step)
                row |= {
                    name: value if math.isfinite(value) else None for name, value in figures.items()
                }  # JSON has no NaN
            self.accelerator.wait_for_everyone()
        self.log.append(row)
        if self.config.tensorboard:
            curves = {name: value for name, value in row.items() if name not in ("step", "phase")}
            self.accelerator.log(curves, step=self.step)

    def _show(self, progress: Progress, task: TaskID, quiet: bool) -> None:
        row = self.log[-1]
        status = f"loss {row['loss']:.4f}  {row['images_per_second']:.0f} images/s"
        progress.update(task, description=row["phase"] or "train", completed=self.step, status=status)
        if progress.disable and not quiet and self.accelerator.is_main_process:
            phase = f"{row['phase']}: " if row["phase"] else ""
            self.console.print(f"{phase}step {self.step} of {self.steps}  {status}", highlight=False)

    def _tell(self, sentence: str) -> None:
        if self.accelerator.is_main_process:
            self.console.print(sentence, highlight=False, soft_wrap=True)

    def _check_division(self) -> None:
        parts = self.accelerator.num_processes * self.config.accumulate
        if self.config.batch_size % parts:
            raise ValueError(
                f"batch_size must be a multiple of processes x accumulate = {self.accelerator.num_processes} x "
                f"{self.config.accumulate}, got {self.config.batch_size}"
            )

    def _check_not_shorter(self, state: State) -> None:
        if state.step > self.steps:
            raise CheckpointError(
                f"{self.folder.path} has trained {state.step} steps; images must not make the run shorter, to {self.steps}"
            )

    # files and weights ------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write the models first and the state last: a kill between them repeats steps, and then writes both again."""
        self._save_models()
        tensors = self.weights.state()
        if self.accelerator.is_main_process:
            self.folder.save(State(self.step, tensors, self.rate_factor, self.rollbacks, self.log))
        self.accelerator.wait_for_everyone()

    def _save_models(self) -> None:
        phase = self.method.phases[self.at(max(self.step - 1, 0))[0]]
        finished = phase.name and self.step > 0 and self._ends_phase()
        for place, half_life in enumerate(self.config.ema_half_lives):
            checkpoint = self.checkpoint(place)
            if not self.accelerator.is_main_process:
                continue
            save_checkpoint(self.folder.path / (f"averages/{half_life}" if place else "model"), checkpoint)
            if finished and place == 0:
                save_checkpoint(self.folder.student(phase.name), checkpoint)
        self.accelerator.wait_for_everyone()

    def _restore(self, state: State) -> None:
        self.weights.restore(state.tensors)
        self.step, self.rate_factor, self.rollbacks = state.step, state.rate_factor, state.rollbacks
        self.log, self._phase = list(state.log), -1


def phase_costs(log: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each phase in a log the images seen and the minutes of training, evaluations and files not counted."""
    costs, before = {}, {"images": 0, "seconds": 0.0}
    for row, after in zip(log, [*log[1:], None], strict=False):
        if after is None or after["phase"] != row["phase"]:
            minutes = (row["seconds"] - before["seconds"]) / 60.0
            costs[row["phase"]] = {"images": row["images"] - before["images"], "minutes": round(minutes, 2)}
            before = row
    return costs


def _tensorboard() -> str:
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("tensorboard=true needs the package tensorboard: pip install 'fewstep[train]'")
    return "tensorboard"


def _bar(hidden: bool, console: Console) -> Progress:
    """A progress bar, disabled where it would not be seen."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
    progress = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)
    progress.disable = hidden or not console.is_terminal
    return progress
