"""Runs of a suite: every cell measured once, whatever stops the run, however the work is divided."""

import json
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from bench import measure as bench_measure
from bench.cells import resolve
from bench.cli import main
from bench.engine import run_suite
from bench.report import write_results
from bench.suite import SamplerSpec, Suite, load_suite
from bench.zoo import load_model
from samplers import SamplingError

SUITE = Suite.model_validate(
    {
        "name": "tiny",
        "model": "gmm",
        "nfe": [2, 4],
        "num_samples": 40,
        "batch_size": 16,
        "samplers": ["ddpm", "ddim", "heun"],
        "teacher": {"sampler": "heun", "nfe": 20, "grid": "logsnr"},
    }
)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def gmm():
    return load_model("gmm")


def measure(suite, model, out):
    return run_suite(suite, model, out, "cpu", QUIET)


def values(rows):
    return [(row["label"], row["budget"], row["role"], row.get("value")) for row in rows]


def test_a_run_measures_every_cell_and_writes_its_files(gmm, tmp_path):
    rows = measure(SUITE, gmm, tmp_path)
    assert len(rows) == 3 * 2 + 1
    assert all(row["status"] == "done" and row["low"] <= row["value"] <= row["high"] for row in rows)
    assert all(row["nfe"] <= row["budget"] for row in rows)
    write_results(SUITE, gmm, tmp_path, "cpu", rows)
    table = pd.read_csv(tmp_path / "table.csv")
    assert len(table) == len(rows)
    assert np.allclose(table["value"], [row["value"] for row in rows])
    assert {"plan_hash", "model_hash", "hashes_reference", "seed", "dtype", "seconds", "peak_memory_mb"} <= set(table)
    made_with = json.loads((tmp_path / "provenance.json").read_text())
    assert made_with["suite"]["num_samples"] == 40
    assert made_with["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    with Image.open(tmp_path / "frontier.png") as picture:
        assert picture.size[0] > 1000
    assert len(list((tmp_path / "samples").glob("*.png"))) == len(rows)


def test_a_finished_cell_is_not_measured_again(gmm, tmp_path, monkeypatch):
    first = measure(SUITE, gmm, tmp_path)

    def never(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(bench_measure, "run_network", never)
    assert measure(SUITE, gmm, tmp_path) == first
    with pytest.raises(AssertionError, match="measured again"):
        measure(SUITE.changed(num_samples=41), gmm, tmp_path)


@pytest.mark.parametrize("size", [1, 7, 40])
def test_the_batch_size_changes_nothing(gmm, tmp_path, size):
    reference = measure(SUITE, gmm, tmp_path / "a")
    assert values(measure(SUITE.changed(batch_size=size), gmm, tmp_path / "b")) == values(reference)


def test_a_budget_below_one_step_is_a_row_with_its_reason(gmm, tmp_path):
    rows = measure(SUITE.changed(["ddim", "pndm"], nfe=[1]), gmm, tmp_path)
    absent = [row for row in rows if row["status"] != "done"]
    assert [(row["label"], row["budget"], row["status"]) for row in absent] == [("pndm", 1, "absent")]
    assert "nfe must be at least 4" in absent[0]["reason"]


def test_a_network_that_fails_costs_its_own_cell_only_and_is_tried_again(gmm, tmp_path, monkeypatch):
    calls = []

    def run_network(model, plan, inputs, **options):
        calls.append(plan.sampler)
        if plan.sampler == "ddim":
            raise SamplingError("NaN or Inf in step 2")
        return real(model, plan, inputs, **options)

    real = bench_measure.run_network
    monkeypatch.setattr(bench_measure, "run_network", run_network)
    rows = measure(SUITE, gmm, tmp_path)
    assert {row["label"] for row in rows if row["status"] == "failed"} == {"ddim"}
    assert {row["reason"] for row in rows if row["status"] == "failed"} == {"NaN or Inf in step 2"}
    (tmp_path / "report.html").write_text("of an earlier run")
    write_results(SUITE, gmm, tmp_path, "cpu", [row for row in rows if row["status"] == "failed"])
    assert "Nothing was measured: 2 failed" in (tmp_path / "report.html").read_text(encoding="utf-8")
    calls.clear()
    measure(SUITE, gmm, tmp_path)
    assert set(calls) == {"ddim"}


def test_a_row_reports_the_calls_it_used(gmm, tmp_path):
    rows = measure(SUITE.changed(["pndm"], nfe=[5]), gmm, tmp_path)
    assert (rows[0]["nfe"], rows[0]["budget"]) == (4, 5)


def test_an_error_controlled_sampler_is_a_row_too(gmm, tmp_path):
    suite = SUITE.changed(["rk45"], nfe=[5, 400])
    rows = measure(suite, gmm, tmp_path)
    assert rows[0]["status"] == "absent"
    assert "needs more than nfe=5" in rows[0]["reason"]
    assert 5 < rows[1]["nfe"] <= 400


def test_the_teacher_is_not_measured_twice_where_a_row_is_the_same_plan(gmm, tmp_path):
    suite = SUITE.changed(["heun"], nfe=[20], teacher={"sampler": "heun", "nfe": 20, "label": "many"})
    rows = measure(suite, gmm, tmp_path)
    assert [row["role"] for row in rows] == ["sampler", "teacher"]
    assert rows[0]["measured_at"] == rows[1]["measured_at"]
    assert len(list((tmp_path / "cells").glob("*.json"))) == 1


def test_resolve_puts_the_teacher_last(gmm):
    cells = resolve(SUITE, gmm, "cpu")
    assert [cell.role for cell in cells] == ["sampler"] * 6 + ["teacher"]
    assert [cell.nfe for cell in cells] == [2, 2, 2, 4, 4, 4, 20]


COMMAND = [
    sys.executable,
    "-m",
    "bench",
    "bench",
    "gmm",
    "--num-samples",
    "120",
    "--batch-size",
    "20",
    "--nfe",
    "5,10,20,40,80",
]


QUICK = [*COMMAND[3:], "--samplers", "ddpm,ddim", "--nfe", "5", "--out"]
COLUMNS = ["label", "budget", "nfe", "value", "low", "high"]


def quick_table(folder):
    assert CliRunner().invoke(main, [*QUICK, str(folder)]).exit_code == 0
    return pd.read_csv(folder / "table.csv")[COLUMNS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return quick_table(tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_where_it_stopped(tmp_path, whole, number):
    out = tmp_path / "run"
    # a shell that starts a job in the background has it ignore SIGINT, and its children inherit that
    process = subprocess.Popen(
        [*COMMAND, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while len(list((out / "cells").glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    message = process.communicate(timeout=60)[1]
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}
    assert 2 <= len(before) < 31
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert number == signal.SIGKILL or "the same command goes on from there" in message
    assert not (out / "table.csv").exists()
    resumed = quick_table(out)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    pd.testing.assert_frame_equal(resumed, whole)


def test_a_row_may_ask_for_the_analytical_first_step():
    suite = load_suite("gmm").changed(["ddim"], nfe=[5], metrics=())
    spared = suite.model_copy(update={"samplers": (SamplerSpec(sampler="ddim", afs=True),)})
    model = load_model("gmm")
    (cell, _), (other, _) = resolve(spared, model, "cpu"), resolve(suite, model, "cpu")
    assert cell.plan.nfe == other.plan.nfe == 5
    assert (cell.plan.steps, other.plan.steps) == (6, 5)


def test_pictures_are_those_of_the_table_also_where_they_were_gone_or_anothers(gmm, tmp_path):
    def pictured(grid):
        row = SamplerSpec(sampler="ddim", label="mine", grid=grid)
        changed = SUITE.model_copy(update={"samplers": (row,), "nfe": (2,)})
        measure(changed, gmm, tmp_path)
        return (tmp_path / "samples" / "mine-nfe2.png").read_bytes()

    first, other = pictured("karras"), pictured("logsnr")
    assert other != first
    cells = {path: path.read_bytes() for path in (tmp_path / "cells").glob("*.json")}
    assert pictured("karras") == first  # from its cell, and not beside the picture of the other grid
    (tmp_path / "samples" / "mine-nfe2.png").unlink()
    assert pictured("karras") == first
    assert {path: path.read_bytes() for path in (tmp_path / "cells").glob("*.json")} == cells
    assert not list((tmp_path / "work").glob("*/*"))
