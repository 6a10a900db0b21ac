"""The processes of one run: what they see of one folder, and how one ends that a launcher tells to."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from bench import workers as bench_workers
from bench.workers import WorkerLostError, Workers


class Two(Workers):
    """One of two processes, the other of which answers as it is told."""

    def __init__(self, rank: int, other_sees: bool = True, told: str = "") -> None:
        super().__init__()
        self.size, self.rank, self._other_sees, self._told = 2, rank, other_sees, told

    def gathered(self, value: Any) -> list[Any]:
        if isinstance(value, tuple):
            other = (self._other_sees, "elsewhere")
        else:
            other = self._told or value
        return [value, other] if self.rank == 0 else [other, value]


@pytest.fixture(autouse=True)
def quick(monkeypatch: Any) -> None:
    monkeypatch.setattr(bench_workers, "_ARRIVES", 0.0)


def test_processes_that_see_one_folder_leave_nothing_in_it(tmp_path: Path) -> None:
    out = tmp_path / "new" / "run"
    Two(0).check_shared(out)
    assert out.is_dir()
    (out / ".shared-0").touch()  # as the leading process does
    Two(1, told=".shared-0").check_shared(out)
    (out / ".shared-0").unlink()
    assert not list(out.iterdir())


def test_a_folder_that_is_not_shared_is_refused_by_every_process(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"must be one that all 2 processes see; .* not seen by process 1 on elsewhere"
    ):
        Two(0, other_sees=False).check_shared(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="what process 0 on elsewhere wrote there is not seen by process 1 on"):
        Two(1, told=".shared-0").check_shared(tmp_path / "other")


def test_a_process_alone_checks_nothing(tmp_path: Path) -> None:
    Workers().check_shared(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_process_that_is_told_to_end_says_what_is_kept(monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(bench_workers.torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(bench_workers.torch.distributed, "destroy_process_group", lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    workers = Workers()
    with pytest.raises(
        WorkerLostError, match="told to end by SIGTERM, .*; finished batches are kept, and the same command"
    ):
        os.kill(os.getpid(), signal.SIGTERM)
    workers.close()
    assert signal.getsignal(signal.SIGTERM) is before
