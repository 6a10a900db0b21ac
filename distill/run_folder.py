"""The folder of a training run: a rolling set of checkpoints of its state, the models it leaves, its settings and its log.

config.yaml                the settings, resolved
log.jsonl                  a line for each row of the log
checkpoints/step-00000500/ what resuming needs; the newest few are kept
model/                     the averaged weights of the last checkpoint, ready to sample from
averages/200000/           the same for each further half-life of the average
students/4-steps/          what a finished phase left, for a method of several phases
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.checkpoint import CheckpointError, read_json, read_tensors, recover_folder, write_folder, write_text
from distill.config import DTYPES, Training
from distill.documents import read_yaml

_CONFIG = "config.yaml"


@dataclass(frozen=True)
class State:
    """What a run needs to go on as if it had never stopped.

    Attributes:
        step: optimiser steps done, over all phases.
        tensors: {"network", "optimizer", "average-<half-life>"}, each {name: tensor}.
        rate_factor: of the learning rate, halved by each rollback.
        rollbacks: so far.
        log: all rows.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    rate_factor: float
    rollbacks: int
    log: list[dict[str, Any]]


class RunFolder:
    """Reads and writes the files of a run.

    Args:
        path: of the folder, made when something is written.
        config: of the run.
        tell: is called with a sentence about what the user should know.
        identity: of the method.
    """

    def __init__(
        self, path: Path, config: Training, tell: Callable[[str], None], identity: dict[str, str] | None = None
    ) -> None:
        self.path, self.config, self.tell, self.identity = path, config, tell, identity or {}
        self._data: str | None = None  # what the run began with

    def student(self, phase: str) -> Path:
        """Folder of what a phase left."""
        return self.path / "students" / phase

    def save(self, state: State) -> None:
        """Write the state as the newest checkpoint; drop the oldest beyond `keep`, and later ones, which could not be read.

        Raises:
            CheckpointError: it could not be written (a full disk, say); the checkpoints before it are whole.
        """
        folder = self._folder(state.step)
        document = {
            "step": state.step,
            "rate_factor": state.rate_factor,
            "rollbacks": state.rollbacks,
            "config": self.config.document(),
            "identity": self.identity,
            "data": self._data,
        }
        write_folder(folder, state.tensors, {"state": document, "log": state.log})
        write_text(self.path / _CONFIG, self.config.to_yaml())
        write_text(self.path / "log.jsonl", "".join(json.dumps(row) + "\n" for row in state.log))
        found = self._checkpoints()
        place = found.index(folder)
        for other in found[:place] + found[place + self.config.keep :]:
            shutil.rmtree(other)

    def load(self) -> State | None:
        """The newest checkpoint that can be read, or None where there is none; tells of each that cannot.

        Raises:
            CheckpointError: checkpoints of another run, or none that can be read.
        """
        problems = []
        for folder in self._checkpoints():
            try:
                state = self._read(folder)
            except _Damaged as error:
                problems.append(str(error))
                continue
            for problem in problems:
                self.tell(f"{problem}; going on from {folder}")
            return state
        if problems:
            raise CheckpointError(f"no checkpoint in {self.path} can be read: {'; '.join(problems)}")
        return None

    def check_data(self, digest: str) -> None:
        """Take note of what identifies the data.

        Raises:
            CheckpointError: the run began with other data.
        """
        if self._data not in (None, digest):
            raise CheckpointError(
                f"{self.path} is another run: its data had the hash {self._data}, now {digest}; give another folder, or the "
                "old data"
            )
        self._data = digest

    def _folder(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:08d}"

    def _checkpoints(self) -> list[Path]:
        """The newest first."""
        names = {path.name.removesuffix(".old") for path in (self.path / "checkpoints").glob("step-*")}
        complete = [name for name in names if not name.endswith(".new")]
        return [recover_folder(self.path / "checkpoints" / name) for name in sorted(complete, reverse=True)]

    def _read(self, folder: Path) -> State:
        try:
            document, log = read_json(folder / "state.json"), read_json(folder / "log.json")
            step, before, identity = int(document["step"]), dict(document["config"]), dict(document["identity"])
            factor, rollbacks = float(document["rate_factor"]), int(document["rollbacks"])
            if not isinstance(log, list):
                raise TypeError(f"the log is a {type(log).__name__}")
        except CheckpointError as error:
            raise _Damaged(str(error)) from error
        except (KeyError, TypeError, ValueError) as error:
            raise _Damaged(f"{folder} is not the state of a training run: {error!r}") from error
        self._check_same_run(folder, before, identity)
        self._data = document.get("data")
        try:
            tensors = {name: read_tensors(folder / f"{name}.safetensors") for name in self._tensor_names()}
        except CheckpointError as error:
            raise _Damaged(str(error)) from error
        return State(step, tensors, factor, rollbacks, log)

    def _tensor_names(self) -> Iterator[str]:
        yield from ("network", "optimizer")
        yield from (f"average-{half_life}" for half_life in self.config.ema_half_lives)

    def _check_same_run(self, folder: Path, before: dict[str, Any], identity: dict[str, str]) -> None:
        for name, value in self.identity.items():
            if identity.get(name) != value:
                was = (
                    f"{folder} is another run: the weights of its {name} had the hash {identity.get(name)}, now {value}"
                )
                raise CheckpointError(f"{was}; give another folder, or the old {name}")
        for name, value in self.config.document().items():
            if name not in self.config.may_change and before.get(name) != value:
                was = f"{folder} is another run: {name} was {before.get(name)!r}, now {value!r}"
                raise CheckpointError(f"{was}; give another folder or the old value")


def begun_with(config: Training, path: Path) -> Training:
    """The settings with the dtype that a run began with, where there is one in the folder and they leave it open."""
    file = path / _CONFIG
    begun = read_yaml(file).get("dtype") if config.dtype == "auto" and file.is_file() else None
    return config.model_copy(update={"dtype": begun}) if begun in DTYPES else config


class _Damaged(CheckpointError):
    """A checkpoint that cannot be read; an older one may do."""
