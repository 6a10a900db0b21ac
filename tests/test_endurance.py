"""What counts as a fault that cost nothing: an equal table, no whole cell measured twice, nothing left behind."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bench import endurance
from bench.endurance import FAULTS, Fault, outcome, write_report

ROW = {
    "role": "sampler",
    "label": "ddim",
    "budget": 5,
    "nfe": 5,
    "value": 1.5,
    "low": 1.0,
    "high": 2.0,
    "status": "done",
}
EXPECTED = pd.DataFrame([ROW])


def planted(folder: Path) -> str:
    (folder / "cells").mkdir(parents=True)
    (folder / "cells" / "a.json").write_text("{}")
    return "seen"


def run_that(**ends: Any) -> Any:
    """A stand-in for the command that leaves a table, and may do something wrong."""

    def run(folder: Path, patch: str = "") -> subprocess.CompletedProcess[str]:
        pd.DataFrame([{**ROW, **ends.get("row", {})}]).to_csv(folder / "table.csv", index=False)
        if ends.get("again"):
            (folder / "cells" / "a.json").unlink()
        if ends.get("left"):
            (folder / "work").mkdir()
        return subprocess.CompletedProcess([], ends.get("code", 0))

    return run


@pytest.mark.parametrize(
    ("ends", "spoils", "passes"),
    [
        ({}, 0, True),
        ({"row": {"value": 1.5000001}}, 0, False),
        ({"again": True}, 0, False),
        ({"again": True}, 1, True),
        ({}, 1, False),
        ({"left": True}, 0, False),
        ({"code": 1}, 0, False),
    ],
)
def test_a_fault_passes_only_where_nothing_was_lost(
    ends: dict[str, Any], spoils: int, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endurance, "_run", run_that(**ends))
    row = outcome(Fault("a fault", planted, spoils), tmp_path / "run", EXPECTED)
    assert (row["fault"], row["seen"], row["finished_before"], row["passes"]) == ("a fault", "seen", 1, passes)
    write_report([row], tmp_path / "report")
    assert f"{int(passes)} of 1" in (tmp_path / "report" / "README.md").read_text()


def test_there_are_twenty_faults_of_different_names() -> None:
    assert len(FAULTS) >= 20
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
