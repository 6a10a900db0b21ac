"""Seeds made one, the set of the best, and `fewstep pick`: which sampler, how sure, and its plan."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from scipy.stats import norm

from bench import judging
from bench.judging import Metric
from bench.ranking import Best, aggregated, best_of, beyond_model, chances_of_first, choose, higher_is_better, of_metric
from bench.reading_cli import diff, doctor, merge, pick
from bench.store import code_fingerprint
from bench.table import frame
from bench.zoo import load_network
from samplers import Plan, make_plan, schedules

COMMANDS = click.Group(commands={"pick": pick, "diff": diff, "merge": merge, "doctor": doctor})
REACH = norm.ppf(0.975)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(COMMANDS, [str(a) for a in arguments])


def said(result: Result) -> str:
    return " ".join(result.output.split())


def row(label: str, budget: int, value: float, error: float = 0.1, **changes: Any) -> dict[str, Any]:
    """A measured row of a sampler."""
    fields: dict[str, Any] = {
        **{"role": "sampler", "label": label, "model": "gmm", "model_hash": "m0", "sampler": "ddim", "options": {}},
        **{
            "grid": "uniform",
            "final": "",
            "afs": False,
            "budget": budget,
            "nfe": budget,
            "num_samples": 100,
            "seed": 0,
        },
        **{
            "metric": "frechet",
            "dtype": "fp32",
            "device": "cpu",
            "torch": "2",
            "code": "c0",
            "plan_hash": f"p{budget}",
        },
        **{"status": "done", "value": value, "low": max(0.0, value - REACH * error), "high": value + REACH * error},
        **{"standard_error": error, "seconds": 2.0, "images_per_second": 50.0, "peak_memory_mb": 300.0},
        **{"measured_at": "2026-01-01T00:00:00+00:00", "threads": 1, "hashes": {"reference": "r0"}},
    }
    return {**fields, **changes}


def folder(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.mkdir(parents=True)
    (path / "table.csv").write_text(frame(rows).to_csv(index=False))
    return path


# seeds ---------------------------------------------------------------------------------------------------------------


def test_two_seeds_are_their_mean_with_the_errors_of_both() -> None:
    (mean,) = aggregated([row("a", 4, 1.0, 0.3), row("a", 4, 2.0, 0.4, seed=1)])
    assert (mean["value"], mean["standard_error"]) == (1.5, pytest.approx(0.5 / 2))
    assert (mean["low"], mean["high"]) == (pytest.approx(1.5 - REACH * 0.25), pytest.approx(1.5 + REACH * 0.25))
    assert mean["seeds"] == 2
    assert "seed" not in mean


def test_from_three_seeds_on_the_spread_is_the_least_error() -> None:
    far, near = [0.5, 1.0, 6.0], [1.0, 1.001, 1.002]
    wide, narrow = (
        aggregated([row("a", 4, v, 0.1, seed=i) for i, v in enumerate(values)])[0] for values in (far, near)
    )
    assert wide["standard_error"] == pytest.approx(statistics.stdev(far) / math.sqrt(3))
    assert narrow["standard_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert wide["low"] == 0.0


def test_further_metrics_costs_and_calls_are_averaged_too() -> None:
    further = [
        {"kd": {"value": v, "low": None, "high": None, "standard_error": e}} for v, e in ((1.0, None), (3.0, 0.2))
    ]
    rows = [row("a", 4, 1.0, seed=i, metrics=further[i], seconds=1.0 + i, nfe=3 + i) for i in range(2)]
    (mean,) = aggregated(rows)
    assert mean["metrics"]["kd"] == {"value": 2.0, "low": None, "high": None, "standard_error": None}
    assert (mean["seconds"], mean["nfe"]) == (1.5, 4)


def test_an_estimate_that_may_be_negative_is_not_cut_off() -> None:
    (mean,) = aggregated([row("a", 4, v, 0.1, seed=i, low=v - 0.2, high=v + 0.2) for i, v in enumerate((-0.3, 0.1))])
    assert (mean["value"], mean["low"]) == (pytest.approx(-0.1), pytest.approx(-0.1 - REACH * 0.1 / 2**0.5))


def test_a_metric_without_a_value_is_unknown() -> None:
    infinite = {"psnr": {"value": None, "low": None, "high": None, "standard_error": None}}
    rows = [row("a", 4, 1.0, metrics=infinite), row("b", 4, 1.0, metrics={"psnr": {**infinite["psnr"], "value": 3.0}})]
    assert [(r["label"], r["status"]) for r in of_metric(aggregated(rows), "psnr")] == [("a", "unknown"), ("b", "done")]
    with pytest.raises(ValueError, match="unknown metric 'psnr'"):
        of_metric(rows[:1], "psnr")


def test_seeds_that_failed_are_left_out_and_a_cell_without_any_stays_as_it_is() -> None:
    failed = {**row("a", 4, 0.0, seed=1), "status": "failed", "reason": "NaN"}
    assert aggregated([failed, row("a", 4, 1.0)]) == [row("a", 4, 1.0, seeds=1, of_seeds=2)]
    assert aggregated([failed]) == [failed]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1, "num_samples": 200}, "not seeds of one cell, num_samples is 100 and 200"),
        ({"seed": 1, "plan_hash": "x"}, "plan_hash is p4 and x"),
        ({}, "there are 2 rows with seed 0"),
    ],
)
def test_what_is_not_another_seed_is_not_averaged(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"a at 4: .*{message}"):
        aggregated([row("a", 4, 1.0), row("a", 4, 2.0, **change)])


def test_two_models_of_one_label_are_told_apart() -> None:
    rows = aggregated([row("a", 4, 1.0), row("a", 4, 2.0, model="x"), row("b", 4, 3.0)])
    assert [r["label"] for r in rows] == ["a (gmm)", "a (x)", "b"]


# the best ------------------------------------------------------------------------------------------------------------


def test_the_best_is_a_set_of_overlapping_intervals() -> None:
    rows = [row("a", 4, 1.0), row("b", 4, 1.39), row("c", 4, 1.40), row("a", 8, 3.0), row("b", 8, 2.0)]
    rows.append({**row("t", 8, 0.1), "role": "teacher"})
    rows.append({"role": "sampler", "status": "failed", "label": "d", "budget": 8})
    assert pytest.approx(0.392, abs=1e-3) == 2 * REACH * 0.1  # between b and c
    assert best_of(rows) == {4: Best("a", frozenset({"b"})), 8: Best("b", frozenset())}


def test_a_metric_that_counts_the_other_way_has_its_largest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    recall = Metric("some_recall", lambda arrays, judge: None, higher_is_better=True)  # type: ignore[arg-type,return-value]
    known = {recall.name: recall, "manifold": judging.get_metric("manifold")}
    monkeypatch.setattr(judging, "metrics", lambda: known)
    values = {"a": 0.5, "b": 0.9, "t": 0.7}
    further = {
        label: {"some_recall": {"value": v, "low": v - 0.01, "high": v + 0.01, "standard_error": 0.005}}
        for label, v in values.items()
    }
    rows = [row("a", 4, 1.0, metrics=further["a"]), row("b", 4, 2.0, metrics=further["b"])]
    rows.append({**row("t", 50, 0.5, metrics=further["t"]), "role": "teacher"})
    assert best_of(rows)[4].label == "a"
    assert best_of(of_metric(rows, "some_recall"))[4].label == "b"
    assert higher_is_better("precision")  # one of the figures of a metric that has another name
    assert not higher_is_better("kid")
    assert beyond_model(of_metric(rows, "some_recall")) == {("b", 4)}
    assert choose(rows, 4, "some_recall").row["label"] == "b"


def test_rows_better_than_their_own_models_many_steps_are_found() -> None:
    teachers = [
        {**row("t", 50, 1.0), "role": "teacher"},
        {**row("t", 50, 3.0, model="x", model_hash="m1"), "role": "teacher"},
    ]
    rows = [row("a", 4, 0.9), row("b", 4, 2.0), row("c", 4, 2.0, model="x", model_hash="m1")]
    assert beyond_model([*rows, *teachers]) == {("a", 4), ("c", 4)}
    student = row("s", 4, 0.5, model_hash="other")
    assert beyond_model([student, teachers[0]]) == {("s", 4)}  # the only model that there is to compare with
    assert beyond_model([student, *teachers]) == set()
    weights = [row(f"w{w}", 4, 0.5, model_hash="other", inputs={"guidance": w}) for w in (0.0, 3.0)]
    assert beyond_model([*weights, teachers[0]]) == {("w0.0", 4)}  # with a weight it samples something else


# how sure ------------------------------------------------------------------------------------------------------------


def test_the_chance_of_being_first_of_two_has_a_closed_form() -> None:
    chance = norm.cdf((1.3 - 1.0) / math.hypot(0.2, 0.4))
    assert chances_of_first([1.3, 1.0], [0.4, 0.2]) == pytest.approx([1 - chance, chance], abs=1e-4)


def test_the_chances_of_several_are_those_of_a_simulation() -> None:
    values, errors = np.array([1.0, 1.1, 1.3, 4.0]), np.array([0.2, 0.1, 0.5, 0.1])
    draws = np.random.default_rng(0).normal(values, errors, (400_000, 4))
    found = np.bincount(draws.argmin(axis=1), minlength=4) / len(draws)
    assert chances_of_first(values.tolist(), errors.tolist()) == pytest.approx(found.tolist(), abs=3e-3)


def test_exact_values_leave_no_doubt_and_equal_ones_share() -> None:
    assert chances_of_first([1.0, 2.0], [0.0, 0.0]) == [1.0, 0.0]
    assert chances_of_first([1.0, 1.0], [0.0, 0.0]) == [0.5, 0.5]
    with pytest.raises(ValueError, match="errors must be at least 0"):
        chances_of_first([1.0], [-1.0])


# pick ----------------------------------------------------------------------------------------------------------------


def test_each_sampler_enters_with_its_most_calls_within_the_budget() -> None:
    rows = [row("a", 5, 2.0), row("a", 10, 1.0), row("b", 5, 1.5, nfe=4), row("b", 10, 0.5, nfe=9)]
    assert [(r["label"], r["nfe"]) for r in choose(rows, 8).candidates] == [("b", 4), ("a", 5)]
    assert [(r["label"], r["nfe"]) for r in choose(rows, 9).candidates] == [("b", 9), ("a", 5)]
    assert choose(rows, 4).candidates == (rows[2],)
    with pytest.raises(ValueError, match="budget must be at least 4, the fewest calls that were measured, got 3"):
        choose(rows, 3)


def test_a_row_with_fewer_calls_and_a_better_value_is_told() -> None:
    rows = [row("a", 5, 0.7), row("a", 10, 1.0)]
    assert choose(rows, 10).cheaper == rows[0]
    assert choose(rows, 5).cheaper is None


def test_pick_answers_and_writes_the_plan_that_was_measured(tmp_path: Path) -> None:
    best = row("mine", 6, 1.0, sampler="euler", options={"variable": "t"}, grid="quadratic", tuned="tuned on the judge")
    out = folder(tmp_path / "run", [best, row("b", 6, 1.2), {**row("t", 50, 1.1), "role": "teacher"}])
    result = run("pick", "--results", out, "--budget", 8, "--out", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    sure = 100 * norm.cdf(0.2 / math.hypot(0.1, 0.1))
    for text in (
        "use: mine with 6 calls, frechet 1.00 ± 0.20 of 100 samples",
        f"{sure:.1f} % that it is really the best",
        "tied (=), the 95 % intervals overlap: b",
        "the model, not the sampler, is ranked",
        "tuned on the judge",
        "samplers.sample(model, 'euler', nfe=6, grid='quadratic', variable='t')",
    ):
        assert text in said(result)
    expected = make_plan("euler", schedules.vp_linear(), nfe=6, grid="quadratic", variable="t")
    assert Plan.from_json((tmp_path / "plan.json").read_text()) == expected


def test_pick_reads_the_shipped_results_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("pick", "--budget", 8, "--out", "plan.json")
    assert result.exit_code == 0, result.output
    assert json.loads(Path("plan.json").read_text())["sampler"] in result.output


def test_pick_reads_the_newest_results_of_a_model_and_writes_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = {"gmm": 3.0, "gmm-2000": 2.0, "gmm-500": 1.0, "gmm-students-9": 0.5}
    for age, name in enumerate(["gmm-500", "gmm", "gmm-2000", "gmm-students-9"]):
        folder(tmp_path / "results" / name, [row(f"my {name}", 4, made[name])])
        os.utime(tmp_path / "results" / name / "table.csv", (age, age))
    told = said(run("pick", "--budget", 4, "--model", "gmm"))
    assert "use: my gmm-2000 with 4 calls" in told
    assert "by the results in results/gmm-2000" in told
    assert "plan: my-gmm-2000-4.json (not bit for bit the measured plan, which was made by another version" in told
    expected = make_plan("ddim", schedules.vp_linear(), nfe=4, grid="uniform")
    assert Plan.from_json(Path("my-gmm-2000-4.json").read_text()) == expected


def test_pick_says_why_a_plan_is_not_the_measured_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = make_plan("ddim", schedules.vp_linear(), nfe=4, grid="uniform")
    digest = hashlib.sha256(plan.to_json().encode()).hexdigest()[:16]
    mine = {"model_hash": load_network("gmm", "cpu", "fp32").hash, "code": code_fingerprint()}

    numbers = itertools.count()

    def told(**changes: Any) -> str:
        out = tmp_path / f"run{next(numbers)}"
        return said(run("pick", "--results", folder(out, [row("a", 4, 1.0, **changes)]), "--budget", 4))

    assert "plan: a-4.json" in told(plan_hash=digest)
    assert "not bit for bit" not in told(plan_hash=digest)
    assert "which was made by another version of fewstep" in told(**{**mine, "code": "c0"})
    assert "which was that of a model other than gmm" in told(**{**mine, "model_hash": "m0"})
    assert "which was made on another processor" in told(**mine)
    adaptive = told(sampler="rk45")
    assert "no plan is written: a chooses its steps while it runs and has no plan" in adaptive
    assert "use: a with 4 calls" in adaptive


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", 3], "budget must be at least 4, the fewest calls that were measured, got 3"),
        (["--budget", 4, "--metric", "frechte"], "unknown metric 'frechte'; did you mean 'frechet'"),
        (["--budget", 4, "--model", "nobody", "--out", "x.json"], "unknown model 'nobody'"),
        (["--budget", 9, "--out", "x.json"], "rk chooses its steps while it runs and has no plan"),
    ],
)
def test_what_pick_cannot_answer_is_one_line(tmp_path: Path, arguments: list[object], message: str) -> None:
    out = folder(tmp_path / "run", [row("a", 4, 1.0), row("rk", 9, 0.1, sampler="rk45")])
    result = run("pick", "--results", out, *arguments)
    assert result.exit_code == 2
    assert message in said(result)


def test_pick_without_results_says_where_it_looked(tmp_path: Path) -> None:
    assert "there is no results folder" in said(run("pick", "--budget", 4, "--results", tmp_path / "x"))
    assert "there are no results of 'nobody'" in said(run("pick", "--budget", 4, "--model", "nobody"))
    assert "holds no results: neither table.csv nor cells" in said(run("pick", "--budget", 4, "--results", tmp_path))


def test_a_choice_is_not_sure_where_a_value_is_not_known_and_takes_no_part_of_seeds() -> None:
    none = {"value": None, "low": None, "high": None, "standard_error": None, "reason": "it is inf"}
    known = {"value": 19.0, "low": 17.0, "high": 21.0, "standard_error": 1.0}
    rows = [row("a", 4, 2.0, metrics={"psnr": none}), row("b", 4, 5.0, metrics={"psnr": known})]
    assert math.isnan(choose(rows, 4, "psnr").chances[0])
    assert choose(rows, 4).chances[0] > 0.999
    failed = {**row("c", 4, 1.0, seed=1), "status": "failed", "reason": "NaN"}
    assert choose([*rows, row("c", 4, 1.0), failed], 4).row["label"] == "a"
