"""The processes of one run: alone, or side by side under `torchrun` and `accelerate launch`."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

_Value = TypeVar("_Value")
_PATIENCE = timedelta(hours=2)  # of the slowest batch of a cell
_ARRIVES = 10.0  # seconds until a file is there on every machine of a shared folder
_KEPT = "finished batches are kept, and the same command goes on from there"


class WorkerLostError(RuntimeError):
    """A process of the run is gone; what was measured is kept."""


class Workers:
    """This process among those of the run.

    The samples of a cell are divided by batches, and each process writes its own blocks into the one results folder; between
    them go only decisions and outcomes. So the folder must be one that all of them see.

    Attributes:
        rank, size: the number of this process, from 0, and how many there are.
        local_rank: its number on this machine, which is the number of its accelerator.
    """

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank, self.local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
        if self.size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=_PATIENCE)  # numbers in Python only, never images
        self._before: Any = None  # what SIGTERM did
        if self.size > 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, _told_to_end)

    @property
    def leads(self) -> bool:
        """Whether this process writes what all of them found."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The accelerator of this process where `name` leaves it open."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.size > 1 else name

    def agreed(self, value: _Value) -> _Value:
        """The value that the leading process has.

        Raises:
            WorkerLostError: a process is gone.
        """
        return self.gathered(value)[0]

    def gathered(self, value: _Value) -> list[_Value]:
        """What every process has, by rank; waits for all of them.

        Raises:
            WorkerLostError: a process is gone.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            torch.distributed.all_gather_object(values, value)
        except WorkerLostError:  # told to end meanwhile
            raise
        except RuntimeError as error:
            raise WorkerLostError(
                f"another of the {self.size} processes is gone ({str(error).splitlines()[0]}); {_KEPT}"
            ) from error
        return values

    def check_shared(self, folder: Path) -> None:
        """Make a folder, and see that it is the same one for every process.

        Raises:
            ValueError: a process does not see what the leading one writes there; names it and its machine.
            WorkerLostError: a process is gone.
        """
        if self.size == 1:
            return
        sign = folder / self.agreed(f".shared-{uuid.uuid4().hex}")
        if self.leads:
            folder.mkdir(parents=True, exist_ok=True)
            sign.touch()
        self.gathered(None)
        seen = self.gathered((_arrives(sign), socket.gethostname()))
        if self.leads:
            sign.unlink()
        blind = [f"{rank} on {host}" for rank, (sees, host) in enumerate(seen) if not sees]
        if blind:
            raise ValueError(
                f"results folder {folder} must be one that all {self.size} processes see; what process 0 on {seen[0][1]} wrote "
                f"there is not seen by process {', '.join(blind)}"
            )

    def close(self) -> None:
        """Part from the other processes."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
        if self.size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _told_to_end(number: int, frame: Any) -> None:
    """What a launcher does to the other processes when one is gone, and a queue to all of them when their time is up."""
    raise WorkerLostError(f"told to end by SIGTERM, as when another process of the run is gone; {_KEPT}")


def _arrives(file: Path) -> bool:
    """Whether a file is there within the time that it may take to get there."""
    until = time.monotonic() + _ARRIVES
    while not file.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
