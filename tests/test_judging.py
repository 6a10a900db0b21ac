"""Figures beside the distance: what a cell has of them, against a direct computation; and a metric of one's own."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from bench import judging
from bench import measure as bench_measure
from bench.cells import identity, resolve
from bench.columns import markdown as columns_table
from bench.columns import undocumented
from bench.engine import run_suite
from bench.intervals import Distance
from bench.judging import Metric, get_metric
from bench.metrics import frechet_infinity
from bench.provenance import machine, provenance
from bench.ranking import metrics_of
from bench.report import write_results
from bench.results import read_rows, unknown_figure
from bench.suite import SamplerSpec, Suite
from bench.table import frame, markdown
from bench.tuning import tuning_of
from bench.zoo import BenchModel, load_model
from samplers import make_plan, sample
from samplers.registry import get_sampler

SUITE = Suite.model_validate(
    {
        "name": "tiny",
        "model": "gmm",
        "nfe": [4],
        "seeds": [0, 5],
        "num_samples": 60,
        "batch_size": 25,
        "metrics": ["rmse", "psnr", "feature_error", "kid"],
        "samplers": ["ddpm", "ddim"],
        "teacher": {"sampler": "heun", "nfe": 40, "grid": "logsnr"},
    }
)


@pytest.fixture(scope="module")
def gmm() -> BenchModel:
    return load_model("gmm")


@pytest.fixture(scope="module")
def rows(gmm: BenchModel, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("run")
    rows = run_suite(SUITE, gmm, out, "cpu", Console(quiet=True))
    assert not (out / "work").exists()
    return rows


def drawn(gmm: BenchModel, seed: int, sampler: str, nfe: int, **options: Any) -> np.ndarray:
    return sample(gmm.model, sampler, nfe=nfe, shape=(60, 2), seed=seed, **options).double().numpy()


def test_solver_error_is_that_from_the_many_step_run_of_the_same_noise(
    gmm: BenchModel, rows: list[dict[str, Any]]
) -> None:
    mine = [row for row in rows if row["label"] == "ddim"]
    assert [row["seed"] for row in mine] == [0, 5]
    for row in mine:
        error = drawn(gmm, row["seed"], "ddim", 4) - drawn(gmm, row["seed"], "heun", 40, grid="logsnr")
        expected = math.sqrt(np.mean(error**2))
        assert row["metrics"]["rmse"]["value"] == pytest.approx(expected, rel=1e-6)
        assert row["metrics"]["psnr"]["value"] == pytest.approx(20 * math.log10(2 / expected), rel=1e-6)
        assert row["metrics"]["feature_error"]["value"] == pytest.approx(np.linalg.norm(error, axis=1).mean(), rel=1e-6)


def test_a_stochastic_sampler_follows_no_solution_and_has_the_other_figures(rows: list[dict[str, Any]]) -> None:
    assert all(set(row["metrics"]) == {"kid"} for row in rows if row["label"] == "ddpm")
    assert all(set(row["metrics"]) == {"kid"} for row in rows if row["role"] == "teacher")


def test_the_teacher_is_listed_last_though_it_is_measured_first(rows: list[dict[str, Any]]) -> None:
    assert [row["role"] for row in rows] == ["sampler"] * 4 + ["teacher"] * 2


def test_the_solution_is_sampled_again_where_its_samples_are_gone(gmm: BenchModel, rows: Any, tmp_path: Path) -> None:
    few = SUITE.changed(["ddpm"])
    run_suite(few, gmm, tmp_path, "cpu", Console(quiet=True))  # the teacher is finished, and its samples removed
    again = run_suite(SUITE, gmm, tmp_path, "cpu", Console(quiet=True))
    values = [[row["metrics"]["rmse"]["value"] for row in found if row["label"] == "ddim"] for found in (rows, again)]
    assert values[0] == values[1]


def test_another_solution_is_another_error(gmm: BenchModel, rows: Any, tmp_path: Path) -> None:
    suite = SUITE.changed(["ddim"], seeds=[0])
    first = run_suite(suite, gmm, tmp_path, "cpu", Console(quiet=True))
    coarse = suite.changed(teacher={"sampler": "heun", "nfe": 6, "grid": "logsnr"})
    second = run_suite(coarse, gmm, tmp_path, "cpu", Console(quiet=True))
    fresh = run_suite(coarse, gmm, tmp_path / "fresh", "cpu", Console(quiet=True))
    assert second[0]["metrics"] == fresh[0]["metrics"] != first[0]["metrics"]


def test_a_sampler_with_the_plan_of_the_teacher_has_its_own_figures(gmm: BenchModel, tmp_path: Path) -> None:
    row = SamplerSpec(sampler="heun", grid="logsnr")
    suite = SUITE.model_copy(update={"samplers": (row,), "nfe": (40,), "seeds": (0,)})
    mine, teacher = run_suite(suite, gmm, tmp_path, "cpu", Console(quiet=True))
    assert mine["value"] == teacher["value"]
    assert mine["metrics"]["rmse"]["value"] == 0.0
    assert mine["metrics"]["psnr"]["value"] is None  # infinite
    assert set(teacher["metrics"]) == {"kid"}


def test_metrics_that_cannot_be_had_are_refused_before_anything_is_measured(gmm: BenchModel, tmp_path: Path) -> None:
    noisy = SUITE.changed(teacher={"sampler": "ddpm", "nfe": 40})
    for suite, message in (
        (noisy, "metric 'rmse' compares with the many-step run, and teacher ddpm is stochastic"),
        (
            SUITE.changed(metrics=["inception_score"]),
            "needs class probabilities, which the judge frechet does not give",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run_suite(suite, gmm, tmp_path, "cpu", Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_a_figure_of_too_few_samples_is_a_gap_with_its_reason(gmm: BenchModel, tmp_path: Path) -> None:
    suite = SUITE.changed(["ddim"], metrics=["fd_infinity"], seeds=[0], num_samples=8)
    found = run_suite(suite, gmm, tmp_path, "cpu", Console(quiet=True))[0]
    assert found["status"] == "done"
    assert found["metrics"]["fd_infinity"]["value"] is None
    assert "at least 9 samples" in found["metrics"]["fd_infinity"]["reason"]
    assert "fd_infinity" not in metrics_of([found])


def test_a_figure_that_nobody_has_is_explained_in_every_file(gmm: BenchModel, tmp_path: Path) -> None:
    """It was not in the table at all; the reason stood in the cell's own file alone."""
    suite = SUITE.changed(["ddim"], metrics=["fd_infinity", "rmse"], seeds=[0], num_samples=8)
    rows = run_suite(suite, gmm, tmp_path, "cpu", Console(quiet=True))
    write_results(suite, gmm, tmp_path, "cpu", rows)
    why = "at least 9 samples for 2 halvings, got 8"
    assert re.search(rf"^- fd_infinity not known: .*{why}\.$", (tmp_path / "table.md").read_text(), re.MULTILINE)
    assert why in frame(rows)["fd_infinity_reason"][0]
    again = read_rows(tmp_path)
    assert [row["metrics"] for row in again] == [row["metrics"] for row in rows]
    assert markdown(again, (), "t") == markdown(rows, (), "t")


def test_a_divergence_has_an_interval_and_so_a_set_of_the_best(gmm: BenchModel, tmp_path: Path) -> None:
    suite = SUITE.changed(["ddpm", "heun"], metrics=["gaussian_kl"], seeds=[0])
    rows = run_suite(suite, gmm, tmp_path, "cpu", Console(quiet=True))
    for row in rows:
        figure = row["metrics"]["gaussian_kl"]
        assert 0 <= figure["low"] < figure["value"] < figure["high"]


def test_infinitely_many_samples_take_as_many_halvings_as_there_can_be(gmm: BenchModel) -> None:
    features = {n: np.random.default_rng(0).standard_normal((n, 2)) for n in (16, 17)}
    for n, halvings in ((16, 2), (17, 3)):
        found = get_metric("fd_infinity").figures({"features": features[n]}, gmm.judge)["fd_infinity"]
        assert found == frechet_infinity(features[n], gmm.judge.reference, halvings)


def test_a_row_names_its_device_and_its_key_does_not(gmm: BenchModel, rows: list[dict[str, Any]]) -> None:
    assert {row["device_name"] for row in rows} == {machine("cpu")["device"]}
    assert all("device_name" not in identity(cell, "cpu") for cell in resolve(SUITE, gmm, "cpu"))


def test_every_column_of_a_run_is_documented(rows: list[dict[str, Any]]) -> None:
    assert undocumented(frame(rows).columns) == []
    assert undocumented(["value", "brightness"]) == ["brightness"]
    for table in Path(__file__).parent.parent.glob("results/*/table.csv"):
        names = table.read_text().splitlines()[0].split(",")
        assert table.parent.name in ("speed", "metrics_speed") or undocumented(names) == [], table
    assert columns_table() in (Path(__file__).parent.parent / "docs/benchmark.md").read_text()


def test_a_row_says_every_option_and_its_last_step(rows: list[dict[str, Any]], tmp_path: Path, gmm: BenchModel) -> None:
    """Defaults were {} and '' in a table, which is what nobody could repeat."""
    samplers = [{"sampler": "dpm-solver-2m", "label": "two"}, {"sampler": "edm", "grid": "sgm"}, "ddim"]
    suite = Suite.model_validate(
        {**SUITE.model_dump(exclude={"models"}), "samplers": samplers, "metrics": [], "seeds": [0]}
    )
    rows = run_suite(suite, gmm, tmp_path, "cpu", Console(quiet=True))
    write_results(suite, gmm, tmp_path, "cpu", rows)
    read = read_rows(tmp_path)
    assert [row["options"] for row in read] == [row["options"] for row in rows]
    two, edm, ddim, _ = read
    assert two["options"] == get_sampler("dpm-solver-2m").options
    assert two["options"]["lower_order_final"] == 15
    assert (two["final"], edm["final"], ddim["final"]) == ("t_min", "zero", "t_min")
    assert edm["options"]["s_tmax"] == math.inf
    for row in (two, edm, ddim):  # and so it is the plan that was measured
        given = {"grid": row["grid"], "final": row["final"], "afs": row["afs"], **row["options"]}
        plan = make_plan(row["sampler"], gmm.model.schedule, nfe=row["budget"], **given)
        assert hashlib.sha256(plan.to_json().encode()).hexdigest()[:16] == row["plan_hash"]
    known = resolve(suite, gmm, "cpu")[0]
    assert identity(known, "cpu")["options"] == {}  # what was measured before stays measured


def test_a_recommended_grid_was_tuned_on_the_error_that_judges_it(rows: list[dict[str, Any]]) -> None:
    own = {row["label"]: row for row in rows if row["role"] == "sampler"}
    assert own["ddim"]["tuned_metrics"] == ["rmse", "psnr", "feature_error"]
    assert "tuned" not in own["ddpm"]  # which stays on its published grid
    noisy = tuning_of(SamplerSpec(sampler="dpmpp-2m-sde"), "mnist")
    assert "chosen by the distance" in noisy["tuned"]
    assert "fd_mnist_cnn" in noisy["tuned_metrics"]
    assert "| ddim§ |" in markdown(rows, (), "t").split("## rmse")[1].split("##")[0]
    assert "| ddim |" in markdown(rows, (), "t").split("## ")[0]
    assert "§ ddim: its recommended grid was chosen by rmse on mixtures like this one." in markdown(rows, (), "t")


@pytest.mark.parametrize(
    ("row", "model", "tuned"),
    [
        ({"sampler": "heun"}, "gmm-16", True),
        ({"sampler": "heun"}, "mnist", True),
        ({"sampler": "heun", "grid": "karras"}, "gmm", True),  # the recommended one by its name
        ({"sampler": "heun", "grid": "logsnr"}, "gmm", False),
        ({"sampler": "heun"}, "cifar10-gmm", False),
        ({"sampler": "rk45"}, "gmm", False),
        ({"sampler": "euler-ancestral"}, "gmm", False),
    ],
)
def test_which_rows_are_tuned(row: dict[str, Any], model: str, tuned: bool) -> None:
    assert bool(tuning_of(SamplerSpec(**row), model)) is tuned
    assert tuning_of(SamplerSpec(**row, tuned="on it"), model) == {"tuned": "on it"}


def test_the_model_stands_beside_every_row_and_the_provenance_says_how_it_was_judged(
    gmm: BenchModel, tmp_path: Path
) -> None:
    suite = SUITE.changed(["ddim"], metrics=["kid"], seeds=[0, 5])
    rows = run_suite(suite, gmm, tmp_path, "cpu", Console(quiet=True))
    table = frame(rows)
    for row in rows:
        many = next(other for other in rows if other["role"] == "teacher" and other["seed"] == row["seed"])
        line = table[(table.label == row["label"]) & (table.seed == row["seed"])].iloc[0]
        assert line.model_value == many["value"]
        assert line.kid_model_value == many["metrics"]["kid"]["value"]
    write_results(suite, gmm, tmp_path, "cpu", rows)
    made = json.loads((tmp_path / "provenance.json").read_text())
    assert [(floor["what"], floor["count"]) for floor in made["floors"]] == [
        ("exact samples against the reference", 60)
    ]
    assert made["judge"]["reference"] == "exact moments"
    assert "model_value" not in read_rows(tmp_path)[0]


def test_the_provenance_of_digits_names_averaging_split_and_rounding() -> None:
    model = load_model("mnist")
    made = provenance(SUITE, model, "cpu", [])
    assert made["model"]["training"]["ema_half_life"] > 0
    assert (made["judge"]["reference"]["split"], made["judge"]["reference"]["count"]) == ("train", 60_000)
    assert made["judge"]["extractor"]["name"] == "mnist_cnn"
    assert "8 bits" in made["judge"]["rounding"]
    assert json.dumps(made)


def test_a_failed_solution_costs_what_is_compared_with_it_and_no_more(
    gmm: BenchModel, tmp_path: Path, monkeypatch: Any
) -> None:
    suite, quiet = SUITE.changed(seeds=[0]), Console(quiet=True)
    whole = run_suite(suite, gmm, tmp_path / "whole", "cpu", quiet)
    real = bench_measure.run_network

    def fails(model: Any, plan: Any, *args: Any, **options: Any) -> torch.Tensor:
        if plan.nfe > 4:
            raise bench_measure.SamplingError("NaN or Inf in step 7")
        return real(model, plan, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(bench_measure, "run_network", fails)
        found = run_suite(suite, gmm, tmp_path / "run", "cpu", quiet)
    assert {row["label"]: row["status"] for row in found} == {"ddpm": "done", "ddim": "done", "heun": "failed"}
    assert found[2]["reason"] == "NaN or Inf in step 7"
    why = "the many-step run failed: NaN or Inf in step 7"
    ddim = {
        label: next(row for row in rows if row["label"] == "ddim") for label, rows in (("was", whole), ("is", found))
    }
    for name in ("value", "low", "high"):
        assert ddim["is"][name] == ddim["was"][name]
    lost = {"rmse", "psnr", "feature_error"}
    for name, figure in ddim["was"]["metrics"].items():
        assert ddim["is"]["metrics"][name] == (unknown_figure(why) if name in lost else figure)
    assert f"rmse not known of ddim at 4: {why}." in markdown(found, (), "t")
    again = run_suite(
        suite, gmm, tmp_path / "run", "cpu", quiet
    )  # tries the many-step run, and what it takes, once more
    assert [(row["value"], row.get("metrics")) for row in again] == [
        (row["value"], row.get("metrics")) for row in whole
    ]


def test_an_unknown_metric_offers_the_closest() -> None:
    with pytest.raises(ValueError, match="suite 'tiny': metrics: unknown metric 'rmsee'; did you mean 'rmse'"):
        SUITE.changed(metrics=["rmsee"])


@pytest.fixture
def added(add_plugin: Any) -> Any:
    """`added(value)`: a package is installed that adds a metric."""
    return lambda value: add_plugin("fewstep.metrics", value, judging.metrics)


def test_an_installed_package_adds_a_metric(gmm: BenchModel, tmp_path: Path, added: Any) -> None:
    def largest(arrays: Any, judge: Any) -> Distance:
        return Distance(float(np.abs(arrays["features"]).max()), math.nan, math.nan, math.nan, len(arrays["features"]))

    added(Metric("largest", largest))
    found = run_suite(
        SUITE.changed(["ddim"], metrics=["largest"], seeds=[0]), gmm, tmp_path, "cpu", Console(quiet=True)
    )
    expected = np.abs(drawn(gmm, 0, "ddim", 4)).max()
    nothing = {"low": None, "high": None, "standard_error": None}
    assert found[0]["metrics"] == {"largest": {"value": pytest.approx(expected), **nothing}}


def test_a_metric_of_several_figures_names_them_and_what_is_better(added: Any, gmm: BenchModel, tmp_path: Path) -> None:
    def pair(arrays: Any, judge: Any) -> dict[str, Distance]:
        mean = float(np.abs(arrays["features"]).mean())
        return {name: Distance(mean, mean - 0.1, mean + 0.1, 0.05, 10) for name in ("good_a", "good_b")}

    added(Metric("pair", pair, higher_is_better=True, columns=("good_a", "good_b")))
    rows = run_suite(SUITE.changed(["ddim"], metrics=["pair"], seeds=[0]), gmm, tmp_path, "cpu", Console(quiet=True))
    assert set(rows[0]["metrics"]) == {"good_a", "good_b"}
    assert "- Larger is better." in markdown(rows, (), "t").split("## good_a")[1].split("##")[0]
    with pytest.raises(ValueError, match=r"metric 'pair' has the columns \('pair',\), but gave \('good_a', 'good_b'\)"):
        Metric("pair", pair).figures({"features": np.ones(3)}, None)


@pytest.mark.parametrize("column", ["value", "seconds", "mine_low", "mine_model_value"])
def test_a_metric_takes_no_column_of_every_table(column: str) -> None:
    with pytest.raises(ValueError, match=f"cannot have the column '{column}', which means something else"):
        Metric("mine", lambda arrays, judge: Distance(0, 0, 0, 0, 1), columns=(column,))


def test_two_metrics_do_not_share_a_column(added: Any) -> None:
    added(Metric("mine", lambda arrays, judge: Distance(0, 0, 0, 0, 1), columns=("recall",)))
    with pytest.raises(ValueError, match="metrics 'manifold' and 'mine' both have the column 'recall'"):
        get_metric("rmse")


def test_an_entry_point_that_is_no_metric_or_takes_a_name_is_refused(added: Any) -> None:
    added(3)
    with pytest.raises(TypeError, match=r"entry point 'mine' of fewstep\.metrics must be a Metric, got int"):
        get_metric("rmse")
    added(Metric("kid", lambda arrays, judge: Distance(0, 0, 0, 0, 1)))
    with pytest.raises(ValueError, match="the name 'kid' is taken"):
        get_metric("rmse")
