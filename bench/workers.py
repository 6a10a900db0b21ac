"""The processes of one run: alone, or side by side under `torchrun` and `accelerate launch`."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, TypeVar

import torch

_Value = TypeVar("_Value")
_PATIENCE = timedelta(hours=2)  # of the slowest batch of a cell


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
        except RuntimeError as error:
            raise WorkerLostError(
                f"another of the {self.size} processes is gone ({str(error).splitlines()[0]}); finished batches are kept, and "
                "the same command goes on from there"
            ) from error
        return values

    def close(self) -> None:
        """Part from the other processes."""
        if self.size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
