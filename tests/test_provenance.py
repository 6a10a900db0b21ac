"""What a run takes: peak memory of a cell, and the energy that an accelerator's driver counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench import provenance
from bench.provenance import energy_joules, peak_memory_mb, reset_peak_memory


@pytest.fixture
def resets() -> None:
    """Skips where the system does not let a process reset its peak."""
    try:
        provenance._CLEAR.write_text(provenance._RESET)
    except OSError as error:
        pytest.skip(f"peak memory cannot be reset here: {error}")


def test_the_peak_of_a_cell_is_not_that_of_the_one_before(resets: None) -> None:
    reset_peak_memory("cpu")
    large = np.ones(2**25)  # 256 MB
    whole = peak_memory_mb("cpu")
    del large
    reset_peak_memory("cpu")
    assert 0 < peak_memory_mb("cpu") < whole - 200


def test_where_the_peak_cannot_be_reset_it_is_that_of_the_process(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(provenance, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(provenance, "_CLEAR", tmp_path)  # which cannot be written
    before = peak_memory_mb("cpu")
    reset_peak_memory("cpu")
    assert peak_memory_mb("cpu") >= before > 1.0


def test_the_commit_is_marked_where_sources_differ_and_not_where_results_do(tmp_path: Path, monkeypatch: Any) -> None:
    source, table = tmp_path / "bench" / "provenance.py", tmp_path / "results" / "table.csv"
    for file in (source, table):
        file.parent.mkdir()
        file.write_text("a\n")
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c")
    for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "a")):
        subprocess.run((*git, *command), check=True)
    monkeypatch.setattr(provenance, "__file__", str(source))
    commit = provenance._commit()
    assert commit is not None
    assert len(commit) == 40
    table.write_text("b\n")
    assert provenance._commit() == commit
    source.write_text("b\n")
    assert provenance._commit() == commit + "+changes"


class NoCounter(Exception):
    """What NVML raises of a card that does not count."""


@pytest.fixture
def driver(monkeypatch: Any) -> dict[str, float]:
    """A stand-in for NVML, whose counter in millijoules by the card's name is here."""
    counters = {"GPU-7": 1500.0}

    def count(handle: str) -> float:
        if handle not in counters:
            raise NoCounter
        return counters[handle]

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetTotalEnergyConsumption=count,
        NVMLError=NoCounter,
        __spec__=SimpleNamespace(),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=device[5:]))
    return counters


def test_energy_is_what_the_driver_counts_of_the_card(driver: dict[str, float]) -> None:
    assert energy_joules("cuda:7") == 1.5
    driver["GPU-7"] += 250.0
    assert energy_joules("cuda:7") == 1.75


def test_energy_is_0_where_nothing_counts_it(driver: dict[str, float], monkeypatch: Any) -> None:
    assert energy_joules("cuda:8") == 0.0  # of a card without a counter
    assert energy_joules("cpu") == 0.0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(provenance.importlib.util, "find_spec", lambda name: None)
    assert energy_joules("cuda:7") == 0.0
