"""What a run answers beside its table: exit codes, what it counts as overhead, and the short forms that Python takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from rich.console import Console

from bench import measure as bench_measure
from bench import report
from bench.api import run as run_in_python
from bench.cli import main
from bench.engine import Run
from bench.measure import Running
from bench.suite import load_suite
from bench.zoo import load_model

SUITE = load_suite("gmm").changed(
    ["heun", "ddim", "rk45"],
    nfe=[1, 4],
    num_samples=40,
    batch_size=16,
    metrics=["rmse"],
    teacher={"sampler": "heun", "nfe": 20, "grid": "logsnr"},
)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables without plot and page, which take a second each and say nothing here."""
    for name in ("save_frontier", "write_html_report"):
        monkeypatch.setattr(report, name, lambda *args: None)


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.mark.slow
def test_a_failed_cell_is_in_the_table_and_in_the_exit_code(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(SUITE.model_dump(mode="json")))
    given = (tmp_path / "few.yaml", "--out", tmp_path)
    within = bench(*given)
    assert within.exit_code == 0, within.output  # that rk45 takes more than four calls is no failure
    assert pd.read_csv(tmp_path / "table.csv").status.value_counts().to_dict() == {"done": 5, "absent": 2}
    assert "Not measured: rk45 at 1, 4; rtol=0.01, atol=0.01 needs more than nfe=4" in " ".join(within.output.split())
    real = bench_measure.run_network

    def fails(model: Any, plan: Any, *args: Any, **options: Any) -> torch.Tensor:
        if (plan.sampler, plan.nfe) == ("ddim", 4):
            raise bench_measure.SamplingError("NaN or Inf in step 2")
        return real(model, plan, *args, **options)

    monkeypatch.setattr(bench_measure, "run_network", fails)
    failed = bench(*given[:-1], tmp_path / "failed")
    assert (failed.exit_code, failed.exception.__class__) == (1, SystemExit)
    assert "1 of 7 cells failed, for the reasons in the table; the same command tries them again" in failed.output
    table = pd.read_csv(tmp_path / "failed" / "table.csv")
    assert table[table.status == "failed"][["label", "budget", "reason"]].values.tolist() == [
        ["ddim", 4, "NaN or Inf in step 2"]
    ]
    part = bench(*given[:-1], tmp_path / "part", "--shard", "0/2", "--minutes", 10)  # ddim at 4 is the other one's
    assert part.exit_code == 0, part.output


def test_a_solution_that_is_sampled_again_is_no_overhead(tmp_path: Path, monkeypatch: Any) -> None:
    """The second shard of a folder of its own has no many-step run, which here takes a second a batch."""
    clock, real = [0.0], bench_measure.run_network

    def slow(model: Any, plan: Any, *args: Any, **options: Any) -> torch.Tensor:
        clock[0] += 1.0 if plan.nfe == 20 else 0.01
        return real(model, plan, *args, **options)

    monkeypatch.setattr(bench_measure, "run_network", slow)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    suite = SUITE.changed(["ddim"], nfe=[4])
    run = Run(suite, load_model("gmm"), tmp_path, Running("cpu", suite.batch_size), Console(quiet=True), (1, 2))
    assert [row["status"] for row in run.rows()] == ["done", "missing"]
    assert run.cost["sampling"] == pytest.approx(3.03)
    assert run.overhead == pytest.approx(0.0)


def test_one_name_or_number_stands_for_a_list_of_it(tmp_path: Path) -> None:
    one = run_in_python(SUITE, tmp_path / "one", samplers="ddim", nfe=4, seeds=3, metrics="kid", quiet=True)
    lists = run_in_python(SUITE, tmp_path / "list", samplers=["ddim"], nfe=[4], seeds=[3], metrics=["kid"], quiet=True)
    columns = ["role", "label", "budget", "seed", "nfe", "value", "low", "high", "kid"]
    pd.testing.assert_frame_equal(one[columns], lists[columns])
    with pytest.raises(ValueError, match="unknown sampler 'dddim'; did you mean 'ddim'"):
        run_in_python(SUITE, tmp_path / "none", samplers="dddim", quiet=True)
