"""What comes with the package is found by name, and how students get there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_students_in_bench import checkpoint, suite_of

from bench import ship_students, shipped
from bench.cells import resolve
from bench.ship_teacher import judge
from bench.students import is_student
from bench.zoo import load_model
from distill.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another folder of assets than the package's, to which a run's students were shipped as "tiny"."""
    assets = tmp_path / "assets"
    monkeypatch.setattr(shipped, "ASSETS", assets)
    monkeypatch.setattr(ship_students, "ASSETS", assets)
    for calls in (2, 4):
        save_checkpoint(tmp_path / f"run/students/{calls}-steps", checkpoint(calls, calls))
    save_checkpoint(tmp_path / "run/students/guided", checkpoint(5))
    save_checkpoint(tmp_path / "teacher", checkpoint(0))
    result = CliRunner().invoke(ship_students.main, ["--run", str(tmp_path / "run"), "--name", "tiny"])
    assert result.exit_code == 0, result.output
    return assets


def test_a_run_ships_its_students_in_half_precision(assets, tmp_path):
    assert sorted(path.name for path in (assets / "tiny").iterdir()) == ["2-steps", "4-steps"]  # no plans, no student
    was = load_checkpoint(tmp_path / "run/students/4-steps")
    now = load_checkpoint(assets / "tiny/4-steps")
    assert now.plans == was.plans
    for name, weight in was.network.state_dict().items():
        torch.testing.assert_close(now.network.state_dict()[name], weight.half().float(), rtol=0, atol=0)


def test_shipped_students_are_a_row_by_name(assets, tmp_path):
    model = load_model(str(tmp_path / "teacher"))
    cells = [
        c for c in resolve(suite_of(tmp_path / "teacher", {"student": "tiny"}), model, "cpu") if c.spec.label == "tiny"
    ]
    names = {cell.nfe: cell.model.name for cell in cells if cell.plan is not None}
    assert names == {2: "tiny/2-steps", 4: "tiny/4-steps"}  # and no path of this machine


def test_a_shipped_student_is_a_model_by_name(assets, tmp_path, monkeypatch):
    assert is_student("tiny/4-steps")
    assert not is_student("tiny")
    assert load_model("tiny/4-steps").hash == load_model(str(assets / "tiny/4-steps")).hash
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "tiny/4-steps", checkpoint(9, 4))  # a folder of one's own is meant before a shipped one
    assert load_model("tiny/4-steps").hash != load_model(str(assets / "tiny/4-steps")).hash


def test_a_name_that_nothing_has(assets, tmp_path):
    model = load_model(str(tmp_path / "teacher"))
    with pytest.raises(
        ValueError, match="student 'tinny': there is no folder tinny, and no shipped one of that name; .*tiny"
    ):
        resolve(suite_of(tmp_path / "teacher", {"student": "tinny"}), model, "cpu")


def test_what_may_not_ship(assets, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"run: .*/assets has no students in .*/assets/students"):
        ship_students.ship_students(assets, assets / "none")
    monkeypatch.setattr(ship_students, "LARGEST", 1000)
    with pytest.raises(ValueError, match="student 2-steps takes .* bytes in half precision; at most 1000 may ship"):
        ship_students.ship_students(tmp_path / "run", assets / "large")
    assert not (assets / "large").exists()


def test_a_teacher_is_judged_against_enough_images():
    with pytest.raises(ValueError, match="test_images must be at least 1000, got 200"):
        judge(load_model("mnist"), np.zeros((200, 1, 28, 28), np.uint8))
