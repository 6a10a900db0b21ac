"""The CIFAR-10 script on a few small images and tiny networks: cut off again and again, it comes to the same end."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from bench import cifar10
from distill.checkpoint import PART_BYTES, load_checkpoint
from distill.methods import load_config, make_method


def write_images(file: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        pixels = np.clip(rng.normal(40 + 80 * (i % 3), 20, (32, 32, 3)), 0, 255).astype(np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "PNG")
        rows.append({"bytes": encoded.getvalue(), "path": None})
    pq.write_table(pa.table({"image": rows, "label": [i % 3 for i in range(count)]}), file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cifar10")
    for seed, (split, count) in enumerate((("train", 300), ("test", 280))):
        write_images(root / f"{split}.parquet", count, seed)
    shared = {
        "batch_size": 16,
        "dtype": "fp32",
        "log_every": 2,
        "save_every": 2,
        "ema_half_lives": [32],
        "mirror": True,
    }
    network = {"class": "PatchUNet", "channels": 3, "size": 32, "patch": 8, "widths": [16], "classes": 3}
    teacher = {"method": "teacher", "network": network, "images": 96, "warmup": 16, "cooldown": 32, **shared}
    students = {"method": "progressive", "teacher": "", "steps": [2, 1], "images": 32, "last_images": 48, **shared}
    suite = {
        "name": "tiny",
        "note": "a copy",
        "model": "x",
        "num_samples": 30,
        "nfe": [1, 2, 4],
        "samplers": [{"student": "x", "label": "progressive"}, "ddim"],
        "teacher": {"sampler": "ddim", "nfe": 8},
    }
    for name, document in (("teacher", teacher), ("students", students), ("suite", suite)):
        (root / f"{name}.yaml").write_text(yaml.safe_dump(document))
    return root


def call(folder: Path, *options: str) -> str:
    given = ["--data", folder, "--out", folder / "run", "--device", "cpu", "--epochs", "1"]
    given += [word for name in ("teacher", "students", "suite") for word in (f"--{name}", folder / f"{name}.yaml")]
    result = CliRunner().invoke(cifar10.main, [*map(str, given), *options])
    assert result.exit_code == (0 if "all done" in result.output else 75), result.output
    return result.output


@pytest.mark.slow
def test_pieces_of_no_time_at_all_come_to_the_end(folder: Path) -> None:
    ends = []
    while not ends or not ends[-1].startswith("all done"):
        ends.append(call(folder, "--minutes", "0").splitlines()[-1])
        assert len(ends) < 20
    stages = [end.split(";")[0].split()[-1] for end in ends[:-1]]
    rows = {"teacher": 3, "students": 3}  # each call does one row of the log, and stops before the next stage
    assert stages == [*["teacher"] * rows["teacher"], *["students"] * rows["students"], "table"]
    last = load_checkpoint(folder / "run/students/students/1-step")
    assert (list(last.plans), last.info["images"]) == ([1], 80)
    table = (folder / "run/results/table.md").read_text()
    assert "fd_cifar_cnn of 30 samples" in table
    assert "- A copy." in table
    assert "- Not measured: progressive at 4; trained for 1, 2 calls." in table
    again = call(folder, "--export", str(folder / "copy"))
    assert again.splitlines()[-1] == f"all done: {folder / 'run/results'}"
    files = [path for path in (folder / "copy").rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= PART_BYTES + 100_000
    for name in ("teacher/model", "students/students/2-steps", "students/students/1-step"):
        assert load_checkpoint(folder / "copy" / name).network.shape == (3, 32, 32)
    info = json.loads((folder / "copy/judge/features/config.json").read_text())["info"]
    assert 0.0 <= info["test_accuracy"] <= 1.0
    given = ["--data", folder, "--out", folder / "run", "--device", "cpu", "--epochs", "2"]
    result = CliRunner().invoke(cifar10.main, list(map(str, given)))
    assert result.exit_code == 2
    assert "was trained with epochs=1, now 2; give the old value, or another folder" in " ".join(result.output.split())


def test_a_folder_without_the_files_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cifar10.main, ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--device", "cpu"]
    )
    assert result.exit_code == 2
    assert "--data must be a folder with train.parquet and test.parquet" in " ".join(result.output.split())


def test_a_misspelt_suite_is_told_before_anything_is_trained(folder: Path) -> None:
    options = ["--data", str(folder), "--out", str(folder / "other"), "--device", "cpu", "--suite", "cifar11"]
    result = CliRunner().invoke(cifar10.main, options)
    assert result.exit_code == 2
    assert "did you mean 'cifar10'" in result.output
    assert not (folder / "other").exists()


def test_cells_that_failed_end_with_exit_code_1(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = [{"status": "done"}, {"status": "failed"}, {"status": "absent"}]
    for name in ("load_model", "write_results", "terminal"):
        monkeypatch.setattr(cifar10, name, lambda *_: SimpleNamespace(judge=SimpleNamespace(floors=lambda _: [])))
    monkeypatch.setattr(cifar10, "run_suite", lambda *_: failed)
    monkeypatch.setattr(cifar10, "STAGES", {"table": cifar10.measure})
    given = ["--data", folder, "--out", tmp_path, "--device", "cpu", "--suite", folder / "suite.yaml"]
    result = CliRunner().invoke(cifar10.main, list(map(str, given)))
    assert result.exit_code == 1
    assert "cells failed, for the reasons in" in " ".join(result.output.split())
    failed.pop(1)
    assert CliRunner().invoke(cifar10.main, list(map(str, given))).exit_code == 0


def test_the_shipped_runs_are_of_the_size_they_say() -> None:
    method = make_method(load_config("cifar10"))
    network = method.network()
    assert 10e6 < sum(p.numel() for p in network.parameters()) < 15e6
    assert network.shape == (3, 32, 32)
    assert load_config("cifar10-progressive", teacher="x").model_dump()["steps"] == (8, 4, 2, 1)
