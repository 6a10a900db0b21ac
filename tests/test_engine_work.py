"""How the work of a run is done: batches that do not fit, kills within a cell, shards, and several processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from rich.console import Console

from bench import measure as bench_measure
from bench.api import run as run_in_python
from bench.blocks import Blocks
from bench.cli import main
from bench.engine import Run, run_suite
from bench.measure import OutOfTimeError, Running
from bench.report import write_results
from bench.suite import SamplerSpec, Suite, load_suite
from bench.zoo import BenchModel, load_model

SUITE = Suite.model_validate(
    {
        "name": "tiny",
        "model": "gmm",
        "nfe": [2, 4],
        "num_samples": 40,
        "batch_size": 16,
        "samplers": ["ddpm", "ddim"],
        "teacher": {"sampler": "heun", "nfe": 20, "grid": "logsnr"},
    }
)
QUIET = Console(quiet=True)
COLUMNS = ["role", "label", "budget", "seed", "nfe", "value", "low", "high"]
Command = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def gmm() -> BenchModel:
    return load_model("gmm")


def measure(suite: Suite, model: BenchModel, out: Path, **how: Any) -> list[dict[str, Any]]:
    return Run(suite, model, out, Running("cpu", suite.batch_size, **how), QUIET).rows()


def figures(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(row.get(name) for name in COLUMNS) for row in rows]


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", "gmm", *map(str, arguments)])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_a_batch_that_does_not_fit_is_halved(
    gmm: BenchModel, tmp_path: Path, monkeypatch: Any, error: Exception
) -> None:
    expected = figures(measure(SUITE, gmm, tmp_path / "whole"))
    sizes: list[int] = []
    real = bench_measure.run_network

    def small_machine(model: Any, plan: Any, inputs: Any, *, indices: torch.Tensor, **options: Any) -> torch.Tensor:
        sizes.append(len(indices))
        if len(indices) > 5:
            raise error
        return real(model, plan, inputs, indices=indices, **options)

    monkeypatch.setattr(bench_measure, "run_network", small_machine)
    assert figures(measure(SUITE, gmm, tmp_path / "small")) == expected
    assert max(sizes) == 16
    assert {4, 8} <= set(sizes)


def test_a_sample_that_does_not_fit_is_a_row_with_its_reason(gmm: BenchModel, tmp_path: Path, monkeypatch: Any) -> None:
    def no_machine(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(bench_measure, "run_network", no_machine)
    rows = measure(SUITE, gmm, tmp_path)
    assert {row["status"] for row in rows} == {"failed"}
    assert "out of memory with a batch of one sample: CUDA out of memory" in rows[0]["reason"]


def test_a_bug_is_not_an_outcome(gmm: BenchModel, tmp_path: Path, monkeypatch: Any) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("expected scalar type Half but found Float")

    monkeypatch.setattr(bench_measure, "run_network", broken)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        measure(SUITE, gmm, tmp_path)


def stop_in_the_third_batch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ctrl-C while it is sampled; the first samples of all batches that are begun, also later, come into the list."""
    starts: list[int] = []
    real = bench_measure.run_network

    def stopped(*args: Any, indices: torch.Tensor, **options: Any) -> torch.Tensor:
        starts.append(int(indices[0]))
        if len(starts) == 3:
            raise KeyboardInterrupt
        return real(*args, indices=indices, **options)

    monkeypatch.setattr(bench_measure, "run_network", stopped)
    return starts


def test_a_cell_goes_on_from_its_last_batch(gmm: BenchModel, tmp_path: Path, monkeypatch: Any) -> None:
    expected = figures(measure(SUITE, gmm, tmp_path / "whole"))
    starts = stop_in_the_third_batch(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        measure(SUITE, gmm, tmp_path / "run")
    assert starts == [0, 16, 32]
    assert figures(measure(SUITE, gmm, tmp_path / "run")) == expected
    assert starts[3:5] == [32, 0]  # what was left of the first cell, then the second
    assert not (tmp_path / "run" / "work").exists()


def test_what_a_kill_between_record_and_removal_leaves_is_removed(
    gmm: BenchModel, tmp_path: Path, monkeypatch: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Blocks, "remove", lambda self: None)
        first = measure(SUITE, gmm, tmp_path)
    assert len(list((tmp_path / "work").iterdir())) == len(first)
    assert measure(SUITE, gmm, tmp_path) == first
    assert not (tmp_path / "work").exists()


def test_a_sampler_whose_network_calls_are_not_those_of_its_plan_is_an_error(
    gmm: BenchModel, tmp_path: Path, monkeypatch: Any
) -> None:
    real = bench_measure.run_network

    def one_call_more(model: Any, *args: Any, indices: torch.Tensor, **options: Any) -> torch.Tensor:
        model.metered(torch.zeros(len(indices), 2), 0.5)
        return real(model, *args, indices=indices, **options)

    monkeypatch.setattr(bench_measure, "run_network", one_call_more)
    with pytest.raises(RuntimeError, match="ddpm: the plan says 2 network calls, the network counted 3"):
        measure(SUITE, gmm, tmp_path)


def test_cells_share_their_first_call_and_count_it(gmm: BenchModel, tmp_path: Path, monkeypatch: Any) -> None:
    expected = measure(SUITE, gmm, tmp_path / "a")
    calls = []
    net = gmm.meter.net
    monkeypatch.setattr(gmm.meter, "net", lambda x, t, **cond: calls.append(len(x)) or net(x, t, **cond))
    shared = measure(SUITE, gmm, tmp_path / "b", share_first_call=True)
    assert figures(shared) == figures(expected)
    assert all(row["shared_first_call"] for row in shared)
    whole = sum(row["nfe"] for row in expected) * 3
    assert len(calls) == whole - 3 * 4  # three batches of five cells have one first call
    assert [row["evaluations"] for row in shared] == [row["nfe"] for row in shared]


def test_only_calls_from_the_start_noise_are_shared(gmm: BenchModel, tmp_path: Path) -> None:
    rows = (SamplerSpec(sampler="ddim", afs=True), SamplerSpec(sampler="ddim", label="plain"))
    suite = SUITE.model_copy(update={"samplers": rows, "nfe": (3, 5)})
    expected, shared = (measure(suite, gmm, tmp_path / name, share_first_call=name == "b") for name in "ab")
    assert figures(shared) == figures(expected)
    assert [row.get("shared_first_call", False) for row in shared] == [False, True, False, True, True]
    assert not gmm.meter._known


@pytest.mark.slow
def test_an_error_controlled_row_is_another_in_other_batches(gmm: BenchModel, tmp_path: Path) -> None:
    suite = SUITE.changed(["rk45", "ddim"], nfe=[400])
    whole = measure(suite, gmm, tmp_path)
    parts = measure(suite.changed(batch_size=7), gmm, tmp_path)
    assert whole[0]["value"] != parts[0]["value"]
    assert whole[1] == parts[1]  # taken from the store
    assert re.fullmatch(r"torchdiffeq [\d.]+, scipy [\d.]+", whole[0]["integrators"])
    assert "integrators" not in whole[1]


def test_several_seeds_are_cells_of_their_own(gmm: BenchModel, tmp_path: Path) -> None:
    rows = measure(SUITE.changed(seeds=[0, 3]), gmm, tmp_path)
    assert [row["seed"] for row in rows] == [0, 3] * 5
    assert figures(rows)[::2] == figures(measure(SUITE, gmm, tmp_path / "one"))
    assert rows[0]["value"] != rows[1]["value"]
    names = {path.name for path in (tmp_path / "samples").iterdir()}
    assert {"ddim-nfe2.png", "ddim-nfe2-seed3.png"} <= names


def test_a_row_may_have_a_model_of_its_own(gmm: BenchModel, tmp_path: Path) -> None:
    other = SUITE.model_copy(update={"samplers": (SamplerSpec(sampler="ddim", label="other", model="gmm"),)})
    assert measure(other, gmm, tmp_path)[0]["value"] == measure(SUITE, gmm, tmp_path / "own")[1]["value"]
    mnist = SUITE.model_copy(update={"samplers": (SamplerSpec(sampler="ddim", label="other", model="mnist"),)})
    with pytest.raises(ValueError, match="model 'mnist': mnist gives samples of shape"):
        Run(mnist, gmm, tmp_path, Running("cpu", 4), QUIET)


def test_shards_together_measure_every_cell_once(tmp_path: Path) -> None:
    given = ("--num-samples", 40, "--nfe", "2,4", "--samplers", "ddpm,ddim", "--out")
    part = bench(*given, tmp_path / "parts", "--shard", "0/2")
    assert part.exit_code == 0, part.output
    assert "2 of 5 cells are left to other shards" in part.output
    assert sorted(pd.read_csv(tmp_path / "parts" / "table.csv")["status"]) == ["done"] * 3 + ["missing"] * 2
    assert "left to another shard" in (tmp_path / "parts" / "table.md").read_text()
    before = {path: path.read_bytes() for path in (tmp_path / "parts/cells").glob("*.json")}
    assert len(before) == 3
    assert bench(*given, tmp_path / "parts", "--shard", "1/2").exit_code == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert bench(*given, tmp_path / "whole").exit_code == 0
    parts, whole = (pd.read_csv(tmp_path / name / "table.csv")[COLUMNS] for name in ("parts", "whole"))
    pd.testing.assert_frame_equal(parts, whole)


@pytest.mark.slow
def test_shards_in_folders_of_their_own_merge_to_the_table_of_all(tmp_path: Path) -> None:
    given = ("--num-samples", 40, "--nfe", "2,4", "--samplers", "ddpm,ddim", "--metrics", "rmse", "--out")
    for i in range(2):
        assert bench(*given, tmp_path / f"s{i}", "--shard", f"{i}/2").exit_code == 0
    assert bench(*given, tmp_path / "whole").exit_code == 0
    merged = CliRunner().invoke(
        main, ["merge", *(str(tmp_path / s) for s in ("s0", "s1")), "--out", str(tmp_path / "m")]
    )
    assert merged.exit_code == 0, merged.output
    parts, whole = (pd.read_csv(tmp_path / name / "table.csv") for name in ("m", "whole"))
    columns = ["role", "label", "budget", "value", "low", "high", "rmse", "model_value"]
    pd.testing.assert_frame_equal(parts[columns], whole[columns])
    for name in ("m", "whole"):
        assert "The model itself" in (tmp_path / name / "table.md").read_text()
        assert (tmp_path / name / "report.html").stat().st_size > 1000


def test_a_shard_that_ends_last_writes_what_others_measured_meanwhile(tmp_path: Path, monkeypatch: Any) -> None:
    given = ("--num-samples", 40, "--nfe", "2", "--samplers", "ddpm,ddim", "--out", tmp_path, "--shard")
    written: list[int] = []

    def write(*arguments: Any) -> str:
        title = write_results(*arguments)
        written.append(sum(row["status"] == "missing" for row in arguments[4]))
        if len(written) == 1:  # the other shard begins and ends between what the first read and its end
            assert bench(*given, "1/2").exit_code == 0
        return title

    monkeypatch.setattr("bench.report.write_results", write)
    assert bench(*given, "0/2").exit_code == 0
    assert written == [1, 0, 0]
    assert (pd.read_csv(tmp_path / "table.csv")["status"] == "done").all()


@pytest.mark.parametrize(
    ("shard", "message"), [("2/2", "0 <= i < n, got 2/2"), ("1", "--shard takes I/N"), ("a/b", "--shard takes I/N")]
)
def test_a_shard_that_there_is_not(shard: str, message: str, tmp_path: Path) -> None:
    result = bench("--shard", shard, "--out", tmp_path)
    assert result.exit_code == 2
    assert message in result.output


def test_a_full_disk_is_one_line_and_the_run_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    given = ("--num-samples", 40, "--nfe", "2", "--samplers", "ddpm,ddim", "--out", tmp_path)
    real, written = Blocks.put, []

    def full(self: Blocks, *arguments: Any) -> None:
        written.append(1)
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Blocks, "put", full)
        result = bench(*given)
    assert (result.exit_code, result.exception.__class__) == (1, SystemExit)
    assert "Error: [Errno 28] No space left on device; what was finished before is kept" in result.output
    assert len(list(tmp_path.glob("cells/*.json"))) == 1
    assert bench(*given).exit_code == 0


def test_a_run_stops_when_its_time_is_over_and_goes_on(gmm: BenchModel, tmp_path: Path, monkeypatch: Any) -> None:
    expected = figures(measure(SUITE, gmm, tmp_path / "whole"))
    clock, begun = [0.0], []
    real = bench_measure.run_network

    def a_minute(*args: Any, indices: torch.Tensor, **options: Any) -> torch.Tensor:
        clock[0] += 60.0
        begun.append(int(indices[0]))
        return real(*args, indices=indices, **options)

    monkeypatch.setattr(bench_measure, "run_network", a_minute)
    monkeypatch.setattr(bench_measure.time, "monotonic", lambda: clock[0])
    out, stops = tmp_path / "pieces", 0
    while True:
        try:
            rows = measure(SUITE, gmm, out, deadline=clock[0] + 200.0)  # four batches, of which a cell has three
        except OutOfTimeError:
            stops += 1
            continue
        break
    assert figures(rows) == expected
    assert stops == 3
    assert begun == [0, 16, 32] * 5  # no batch twice
    assert not (out / "work").exists()


def test_the_command_stops_after_its_minutes(tmp_path: Path) -> None:
    given = ("--num-samples", 40, "--nfe", "2", "--samplers", "ddim", "--out", tmp_path)
    stopped = bench(*given, "--minutes", 1e-9)
    assert stopped.exit_code == 75, stopped.output
    assert "stopped, as its time is over; finished batches are kept" in stopped.output
    assert not (tmp_path / "table.csv").exists()
    assert bench(*given, "--minutes", 10).exit_code == 0
    assert (tmp_path / "table.csv").exists()
    assert bench("--minutes", 0).exit_code == 2


def test_the_provenance_says_what_the_run_took_beside_sampling(tmp_path: Path, monkeypatch: Any) -> None:
    given = ("--num-samples", 40, "--batch-size", 16, "--nfe", "2", "--samplers", "ddpm,ddim", "--out", tmp_path)
    with monkeypatch.context() as patch:
        stop_in_the_third_batch(patch)
        assert bench(*given).exit_code == 130
    assert bench(*given).exit_code == 0
    run = json.loads((tmp_path / "provenance.json").read_text())["run"]
    assert (run["measured_cells"], run["cells"]) == (3, 3)
    useful = run["sampling_seconds"] + run["judging_seconds"]
    assert 0 < useful < run["wall_seconds"]
    assert run["overhead"] > 0  # though two batches of the first cell are of the run before
    (tmp_path / "table.csv").unlink()
    assert bench(*given).exit_code == 0  # measures nothing
    assert json.loads((tmp_path / "provenance.json").read_text())["run"] == run


def test_every_row_has_its_sequential_depth(gmm: BenchModel, tmp_path: Path) -> None:
    rows = measure(SUITE, gmm, tmp_path)
    assert [row["sequential_calls"] for row in rows] == [row["nfe"] for row in rows]
    assert all("guided_evaluations" not in row for row in rows)


@pytest.mark.slow
def test_a_suite_of_several_models_has_a_table_for_each(tmp_path: Path) -> None:
    document = {**SUITE.model_dump(mode="json", exclude_unset=True), "model": ["gmm", "gmm-3"], "nfe": [2]}
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(document))
    both, one = (tmp_path / name for name in ("both", "one"))
    result = CliRunner().invoke(main, ["bench", str(file), "--out", str(both)])
    assert result.exit_code == 0, result.output
    tables = [pd.read_csv(both / name / "table.csv") for name in ("gmm", "gmm-3")]
    assert [set(table["model"]) for table in tables] == [{"gmm"}, {"gmm-3"}]
    assert [sum(table["role"] == "teacher") for table in tables] == [1, 1]
    again = run_in_python(load_suite(str(file)), out=both, quiet=True)  # takes all from there
    assert list(again["model"]) == ["gmm"] * 3 + ["gmm-3"] * 3
    assert list(again["value"]) == [*tables[0]["value"], *tables[1]["value"]]
    alone = CliRunner().invoke(main, ["bench", str(file), "--model", "gmm-3", "--out", str(one)])
    assert alone.exit_code == 0, alone.output
    pd.testing.assert_frame_equal(pd.read_csv(one / "table.csv")[COLUMNS], tables[1][COLUMNS])


def test_a_dry_run_shows_the_cells_and_measures_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = ("--num-samples", 40, "--nfe", "1,4", "--samplers", "pndm,ddim", "--seed", "0,1", "--out", out)
    shown = bench(*given, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "10 cells" in shown.output
    assert not out.exists()
    assert bench(*given).exit_code == 0
    assert bench(*given, "--dry-run").output.count("done") == 8  # of ten, two have no plan


STOPPED = SUITE.changed(
    num_samples=200, batch_size=20, nfe=[20, 40]
)  # a cell of ten batches, tens of milliseconds each


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """`command(out)`: the arguments of `fewstep` that measure `STOPPED` in a folder."""
    file = tmp_path_factory.mktemp("suite") / "tiny.yaml"
    file.write_text(yaml.safe_dump(STOPPED.model_dump(mode="json", exclude_unset=True)))
    return lambda out: ["bench", str(file), "--out", str(out)]


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--main_process_port=0"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no", "--num_processes"]


def process(arguments: list[str], ranks: int = 1, launcher: list[str] = TORCHRUN) -> subprocess.Popen[str]:
    """`fewstep` in a process of its own, or in several that a launcher starts."""
    group = [*launcher, str(ranks)] if ranks > 1 else []
    started = [sys.executable, *group, "-m", "bench", *arguments]
    return subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_batches(out: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(glob(f"{out}/work/*/*.npz")) < count and time.monotonic() < deadline:
        time.sleep(0.001)


def finished(arguments: list[str], out: Path) -> pd.DataFrame:
    """The table that the command ends with, in this process."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return pd.read_csv(out / "table.csv")[COLUMNS]


@pytest.fixture(scope="module")
def whole(command: Command, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The table of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole")
    return finished(command(out), out)


@pytest.mark.slow
def test_a_kill_within_a_cell_costs_the_batch_in_flight(tmp_path: Path, command: Command, whole: pd.DataFrame) -> None:
    out = tmp_path / "run"
    killed = process(command(out))
    wait_for_batches(out, 3)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("work/*/[0-9]*.npz")}
    assert kept
    pd.testing.assert_frame_equal(finished(command(out), out), whole)
    assert not (out / "work").exists()


@pytest.mark.slow
def test_two_processes_on_one_folder_share_the_cells(tmp_path: Path, command: Command, whole: pd.DataFrame) -> None:
    out = tmp_path / "run"
    other = process(command(out))
    wait_for_batches(out, 1)
    ours = finished(command(out), out)
    text = other.communicate(timeout=300)
    assert other.returncode == 0, text
    pd.testing.assert_frame_equal(ours, whole)
    pd.testing.assert_frame_equal(pd.read_csv(out / "table.csv")[COLUMNS], whole)
    assert len(list(out.glob("cells/*.json"))) == len(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "ranks"), [(TORCHRUN, 3), (ACCELERATE, 2)], ids=["torchrun", "accelerate"])
def test_processes_of_a_launcher_divide_the_samples(
    tmp_path: Path, command: Command, whole: pd.DataFrame, launcher: list[str], ranks: int
) -> None:
    """Of three, neither the 200 samples nor the ten batches of a cell divide evenly."""
    group = process(command(tmp_path), ranks, launcher)
    said, wrong = group.communicate(timeout=300)
    assert group.returncode == 0, wrong
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "table.csv")[COLUMNS], whole, rtol=1e-6)
    records = [json.loads(path.read_text()) for path in tmp_path.glob("cells/*.json")]
    assert {record["processes"] for record in records} == {ranks}
    assert said.count("table, plot and pictures") == 1


@pytest.mark.slow
def test_a_lost_worker_ends_the_run_cleanly_and_it_goes_on(
    tmp_path: Path, command: Command, whole: pd.DataFrame
) -> None:
    out = tmp_path / "run"
    group = process(command(out), 2)
    wait_for_batches(out, 2)
    workers = [int(pid) for pid in Path(f"/proc/{group.pid}/task/{group.pid}/children").read_text().split()]
    os.kill(workers[-1], signal.SIGKILL)
    said = "\n".join(group.communicate(timeout=120))
    assert group.returncode != 0
    assert "finished batches are kept, and the same command goes on from there" in said
    assert "WorkerLostError" not in said  # a sentence and no traceback
    pd.testing.assert_frame_equal(finished(command(out), out), whole)


def test_run_suite_is_a_run_with_the_suites_batches(gmm: BenchModel, tmp_path: Path) -> None:
    rows = run_suite(SUITE, gmm, tmp_path / "a", "cpu", QUIET)
    assert np.allclose([row["value"] for row in rows], [row["value"] for row in measure(SUITE, gmm, tmp_path / "b")])
