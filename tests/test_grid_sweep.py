"""The grid sweep: exact ends of trajectories, the rows it makes, and what it makes of them."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from bench.grid_sweep import SCHEDULES, Digits, Problem, fixed_samplers, main, markdown, ratios, sweep
from bench.metrics import gaussian_frechet
from samplers import EpsModel, make_plan, run_plan, sample
from samplers.registry import get_sampler


@pytest.mark.parametrize("name", SCHEDULES)
def test_solutions_are_converged(name):
    schedule = SCHEDULES[name]
    problem = Problem(schedule, dim=2, samples=4)
    model = EpsModel(problem.mixture.net(schedule), schedule)
    x_T = schedule.sigma(schedule.t_max) * problem.noise
    torch.testing.assert_close(
        problem.solution[False], sample(model, "rk45", x_T=x_T, rtol=1e-9, atol=1e-9), rtol=1e-6, atol=1e-6
    )
    # clean data: what is left from t_min on is the curvature of x0 over the last step, of second order in sigma_bar
    last = (problem.solution[True] - model.x0(problem.solution[False], schedule.t_min)).abs().max()
    assert 0 < last < 20 * schedule.sigma_bar(schedule.t_min) ** 2
    errors = [problem.error(make_plan("dpmpp-2m", schedule, steps=n, grid="logsnr")) for n in (100, 400)]
    assert errors[1] < errors[0] / 10 < 1e-3
    assert problem.error(make_plan("dpmpp-2m", schedule, steps=400, grid="logsnr", final="zero")) < 1e-3


def test_fixed_samplers():
    names, noisy = fixed_samplers(), fixed_samplers(stochastic=True)
    assert {"ddim", "heun", "dpmpp-2m", "dpm-solver-3s"} <= set(names)
    assert not {"ddpm", "euler-ancestral", "rk45"} & set(names)
    assert {"ddpm", "euler-ancestral", "dpmpp-2m-sde", "seeds", "restart"} <= set(noisy)
    assert not {*names, "consistency", "rk45"} & set(noisy)


def test_stochastic_samplers_are_judged_by_their_distance():
    problem = Problem(SCHEDULES["vp_linear"], dim=2, samples=1000)
    coarse, fine = (
        problem.error(make_plan("ddpm", problem.schedule, steps=n, grid="logsnr"), distance=True) for n in (3, 100)
    )
    assert coarse > 10 * fine > 0
    plan = make_plan("ddpm", problem.schedule, steps=3, grid="logsnr")
    samples = run_plan(plan, problem.model, plan.sigma_T * problem.noise)
    assert coarse == gaussian_frechet(problem.mixture, samples)
    one = make_plan("ddpm", problem.schedule, steps=1, grid="logsnr", final="zero")
    assert not one.stochastic  # and its distance is none to the converged solution all the same
    x = run_plan(one, problem.model, one.sigma_T * problem.noise)
    (row,) = sweep(["ddpm"], ["edm"], [1], [problem], distance=True).to_dict("records")
    assert row["error"] == pytest.approx(gaussian_frechet(problem.mixture, x), rel=0.1)


def test_digits_are_judged_by_the_shipped_classifier():
    problem = Digits(12)
    plan = make_plan("ddpm", problem.schedule, steps=2)
    assert 0 < problem.error(plan, distance=True) < math.inf


@pytest.mark.parametrize("name", SCHEDULES)
def test_why_leading_is_not_the_grid_of_pndm(name):
    """Its error is less at 8 calls, from a start far below t_max; with one step it starts at t_min, from next to no noise."""
    where = SCHEDULES[name]
    assert get_sampler("pndm").grid == "karras"
    leading = {nfe: make_plan("pndm", where, nfe=nfe, grid="leading") for nfe in (1, 8, 20)}
    assert leading[1].times[0] == pytest.approx(where.t_min)
    assert leading[8].times[0] < 0.6 * where.t_max
    problem = Problem(where, dim=2, samples=16)
    karras = {nfe: problem.error(make_plan("pndm", where, nfe=nfe)) for nfe in (8, 20)}
    if name != "edm":
        assert problem.error(leading[8]) < karras[8]
    if name != "cosine":
        assert problem.error(leading[20]) > karras[20]


def test_rows():
    problem = Problem(SCHEDULES["vp_linear"], dim=2, samples=2)
    rows = sweep(["ddim", "dpm-solver-1", "heun", "restart"], ["uniform", "ays", "edm"], [1, 4], [problem])
    cells = rows.set_index(["sampler", "grid", "nfe"])
    assert "ays" not in set(rows["grid"])  # not for this schedule
    assert ("restart", "uniform", 1) not in cells.index  # its step takes two calls, and a restart more
    assert cells.loc[("heun", "uniform", 4), "calls"] == 4
    assert cells.loc[("heun", "edm", 4), ["calls", "steps"]].tolist() == [4, 3]  # the last two steps take one each
    assert cells.loc[("ddim", "edm", 4), "error"] == cells.loc[("dpm-solver-1", "edm", 4), "error"]
    assert (rows["error"] > 0).all()


def cell(sampler, grid, nfe, error):
    return {"sampler": sampler, "grid": grid, "schedule": "edm", "dim": 2, "nfe": nfe, "error": error}


ROWS = pd.DataFrame(
    [
        *(cell("ddim", "uniform", 5, 0.2), cell("ddim", "uniform", 10, 0.2)),
        *(cell("ddim", "karras", 5, 0.1), cell("ddim", "karras", 10, 0.8)),
        *(cell("ddim", "logsnr", 5, math.inf), cell("ddim", "logsnr", 10, 0.2)),
        *(cell("heun", "karras", 5, 1.0), cell("heun", "karras", 10, 0.1), cell("heun", "uniform", 10, 0.01)),
    ]
)


def test_ratios_are_geometric_means_over_the_best():
    table = ratios(ROWS)
    assert table.loc["ddim", "uniform"] == pytest.approx(2**0.5)
    assert table.loc["ddim", "karras"] == pytest.approx(2.0)
    assert table.loc["ddim", "logsnr"] == math.inf
    assert table.loc["heun", "karras"] == pytest.approx(10**0.5)
    assert math.isnan(table.loc["heun", "uniform"])  # not in every cell


def test_summary():
    text = markdown(ROWS)
    assert "| ddim | uniform | 1.41 | karras | 2 | time-uniform |  | karras | uniform |" in text  # not among the rows
    assert "| heun | karras | 3.16 |  |  | karras | 3.16 | karras | uniform |" in text


def test_command(tmp_path):
    problem = ["--schedules", "edm", "--nfe", "5", "--dim", "2", "--out", str(tmp_path)]
    arguments = ["--samplers", "ddim,heun", "--grids", "uniform,karras", *problem]
    done = CliRunner().invoke(main, [*arguments, "--samples", "2"])
    assert done.exit_code == 0, done.output
    assert len(pd.read_csv(tmp_path / "gmm.csv")) == 4
    assert "| ddim |" in (tmp_path / "gmm.md").read_text()
    noisy = ["--stochastic", "--samplers", "ddpm", "--grids", "uniform", *problem]
    done = CliRunner().invoke(main, [*noisy, "--samples", "64"])
    assert done.exit_code == 0, done.output
    assert "Frechet distance of 64 samples" in (tmp_path / "gmm-stochastic.md").read_text()
    assert json.loads((tmp_path / "gmm-stochastic.provenance.json").read_text())["samples"] == 64
    wrong = CliRunner().invoke(main, ["--grids", "karas"])
    assert wrong.exit_code == 2
    assert "unknown grid 'karas'; did you mean 'karras'" in " ".join(wrong.output.replace("│", " ").split())
