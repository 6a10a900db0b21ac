"""Figures beside the distance: what a cell has of them, against a direct computation; and a metric of one's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from bench import judging
from bench import measure as bench_measure
from bench.engine import run_suite
from bench.intervals import Distance
from bench.judging import Metric, get_metric
from bench.ranking import metrics_of
from bench.suite import SamplerSpec, Suite
from bench.zoo import BenchModel, load_model
from samplers import sample

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
    suite = SUITE.changed(["ddim"], metrics=["fd_infinity"], seeds=[0], num_samples=10)
    found = run_suite(suite, gmm, tmp_path, "cpu", Console(quiet=True))[0]
    assert found["status"] == "done"
    assert found["metrics"]["fd_infinity"]["value"] is None
    assert "at least 17 samples" in found["metrics"]["fd_infinity"]["reason"]
    assert "fd_infinity" not in metrics_of([found])


def test_a_failed_solution_costs_the_cells_that_are_compared_with_it(
    gmm: BenchModel, tmp_path: Path, monkeypatch: Any
) -> None:
    real = bench_measure.run_network

    def fails(model: Any, plan: Any, *args: Any, **options: Any) -> torch.Tensor:
        if plan.nfe > 4:
            raise bench_measure.SamplingError("NaN or Inf in step 7")
        return real(model, plan, *args, **options)

    monkeypatch.setattr(bench_measure, "run_network", fails)
    found = run_suite(SUITE.changed(seeds=[0]), gmm, tmp_path, "cpu", Console(quiet=True))
    assert {row["label"]: row["status"] for row in found} == {"ddpm": "done", "ddim": "failed", "heun": "failed"}
    reasons = {row["label"]: row["reason"] for row in found if row["status"] == "failed"}
    assert reasons == {"ddim": "the many-step run failed: NaN or Inf in step 7", "heun": "NaN or Inf in step 7"}


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


def test_an_entry_point_that_is_no_metric_or_takes_a_name_is_refused(added: Any) -> None:
    added(3)
    with pytest.raises(TypeError, match=r"entry point 'mine' of fewstep\.metrics must be a Metric, got int"):
        get_metric("rmse")
    added(Metric("kid", lambda arrays, judge: Distance(0, 0, 0, 0, 1)))
    with pytest.raises(ValueError, match="the name 'kid' is taken"):
        get_metric("rmse")
