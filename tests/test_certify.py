"""The certificates: that they pass on what is sound, fail on what is not, and say what they were made of."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from bench.certify import order, parity, report
from bench.certify.equalities import IDENTITIES, detect, difference, identity_rows
from bench.certify.faults import fault_row, planted
from bench.certify.gaussian import affine, moments, no_strong_order, stochastic_orders, strong_error
from bench.certify.problem import MIXTURE, Problem, epsilon, run_from, solution_at
from bench.certify.schedulers import Case, cases
from bench.certify.settings import (
    CHOICES,
    FIXED,
    KNOWN,
    STATED,
    STATED_WEAK,
    choices,
    deterministic,
    known_slope,
    matches,
    stochastic,
)
from bench.cli import main
from samplers import list_samplers, make_plan, run_plan, schedules
from samplers.registry import SAMPLERS

VP = schedules.vp_linear()
PLANNED = [entry for entry in list_samplers() if not entry.adaptive]


@pytest.fixture(scope="module")
def problem():
    return order.problem("vp_linear")


# the problem -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp-2m"])
def test_the_short_run_is_the_executors(problem, name):
    plan = make_plan(name, VP, steps=20, grid="logsnr")
    expected = run_plan(plan, problem.model, problem.x_T).numpy()
    np.testing.assert_allclose(run_from(plan, [problem.x_T.numpy()]), expected, rtol=1e-12, atol=1e-13)


def test_given_states_take_the_place_of_the_plans_own(problem):
    plan = make_plan("ddim", VP, steps=3, grid="logsnr")
    states = [problem.x_T.numpy(), np.zeros((8, 2)), np.ones((8, 2))]
    t, t_next = plan.times[2:]
    eps = epsilon(states[2], float(VP.alpha(t)), float(VP.sigma(t)))
    expected = VP.alpha(t_next) * (states[2] / VP.alpha(t) + (VP.sigma_bar(t_next) - VP.sigma_bar(t)) * eps)
    np.testing.assert_allclose(run_from(plan, states), expected, rtol=1e-12)


def test_epsilon_is_the_mixtures(problem):
    expected = MIXTURE.eps(problem.x_T, 0.8, 0.6)
    np.testing.assert_allclose(epsilon(problem.x_T.numpy(), 0.8, 0.6), expected.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["vp_linear", "cosine", "edm"])
def test_two_references_agree(name):
    schedule, solved = order.SCHEDULES[name], order.problem(name)
    lam = np.linspace(float(schedule.lam(schedule.t_max)), float(schedule.lam(schedule.t_min)), 12)
    assert np.abs(solution_at(schedule, lam, solved.x_T.numpy())[-1] - solved.solution.numpy()).max() < 2e-12


# settings --------------------------------------------------------------------------------------------------------


def test_every_option_that_names_a_formula_is_listed():
    named = {name for e in PLANNED for name, default in e.options.items() if isinstance(default, str)}
    assert named <= set(CHOICES) | set(FIXED)


@pytest.mark.parametrize("entry", PLANNED, ids=lambda entry: entry.name)
def test_settings_are_what_they_are_called(entry):
    for options in deterministic(entry):
        assert not make_plan(entry.name, VP, steps=6, **options).stochastic
    for options in stochastic(entry):
        assert make_plan(entry.name, VP, steps=6, **options).stochastic
    assert bool(list(deterministic(entry))) == (entry.stochastic != "yes")
    assert bool(list(stochastic(entry))) == (entry.stochastic != "no")


@pytest.mark.slow
def test_every_stated_exception_matches_a_sampler_and_says_why():
    for row in (*STATED, *KNOWN, *STATED_WEAK):
        assert row.reason
        settings = [(e, {**e.options, **o}) for e in PLANNED for o in choices(e)]
        assert any(matches(row, e, options) for e, options in settings), row


# order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", PLANNED, ids=lambda entry: entry.name)
def test_local_order_of_every_setting(entry):
    for options in deterministic(entry):
        row = order.local_order(entry, options, "vp_linear")
        assert row["status"] == "pass", row


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp-2m", "dpm-solver-3s"])
def test_global_order(name):
    entry = SAMPLERS[name]
    for options in deterministic(entry):
        rows = list(order.global_orders(entry, options, "vp_linear", "logsnr", (640, 320)))
        assert [row["status"] for row in rows] == ["pass", "for the record"][: len(rows)]
        assert len(rows) == 1 + ("lower_order_final" in entry.options)
        assert rows[0]["stated"] == entry.order
        assert abs(rows[0]["deviation"]) < 0.2


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp-2m", "dpm-solver-3s"])
def test_one_percent_on_one_coefficient_fails_both_certificates(problem, name, monkeypatch):
    entry, options = SAMPLERS[name], next(deterministic(SAMPLERS[name]))
    row = fault_row(entry, options, "vp_linear")
    assert (row["status"], row["note"]) == ("pass", "noticed")
    assert row["slope_with_fault"] < row["stated"] - 0.5
    monkeypatch.setattr(order, "make_plan", lambda *a, **k: planted(make_plan(*a, **k)))
    rows = list(order.global_orders(entry, options, "vp_linear", "logsnr", (160, 80)))
    assert rows[0]["status"] == "fail"


def test_a_planted_fault_of_nothing_leaves_the_local_certificate_whole():
    entry = SAMPLERS["ddim"]
    row = order.local_order(entry, {"eta": 0.0}, "vp_linear", lambda plan: planted(plan, 1.0))
    assert row["status"] == "pass"
    assert order.local_order(entry, {"eta": 0.0}, "vp_linear", planted)["status"] == "fail"


def test_the_last_doubling_above_rounding_is_taken():
    errors = {1280: 1e-14, 640: 1e-13, 320: 1e-9, 160: 8e-9, 80: 1.0}
    measured = order.slope(errors.__getitem__, (1280, 640, 320, 160, 80))
    assert (measured.value, measured.steps) == (3.0, "160-320")
    assert math.isnan(order.slope(lambda n: 1e-15, (20, 10)).value)


def test_finer_steps_are_taken_where_the_slope_is_not_the_stated_one():
    measured = order.slope(lambda n: 1.0 / n + 1e5 / n**3, (640, 320), stated=1)
    assert measured.steps == "1280-2560"
    assert order.slope(lambda n: 1.0 / n, (640, 320), stated=1).steps == "320-640"


def test_a_slow_start_is_told_from_a_wrong_order():
    # the quadratic grid begins with long steps in lam where the cosine schedule diverges
    if "eab-3" not in SAMPLERS:
        pytest.skip("eab-3 is not registered")
    rows = order.global_orders(SAMPLERS["eab-3"], {"predict": "eps"}, "cosine", "quadratic", (640, 320))
    row = next(rows)
    assert row["status"] == "start-up"
    assert row["slope"] < 2.6
    assert abs(row["slope_exact_start"] - 3) < 0.2


def test_a_known_slope_is_known_there_only():
    entry = replace(SAMPLERS["ddim"], name="eab-4")
    assert known_slope(entry, {"predict": "eps"}, "edm", "logsnr")
    assert not known_slope(entry, {"predict": "x0"}, "edm", "logsnr")
    assert not known_slope(entry, {"predict": "eps"}, "edm", "quadratic")


# stochastic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("ddim", {"eta": 1.0}), ("dpmpp-2m", {}), ("euler-ancestral", {})])
def test_the_affine_result_is_what_a_run_gives(name, options):
    plan = make_plan(name, VP, steps=5, grid="logsnr", **options)
    result, noises = affine(plan), torch.randn(plan.noises, 3, 1, dtype=torch.float64)
    x_T = torch.randn(3, 1, dtype=torch.float64)

    def eps(x, t):
        alpha, sigma = VP.alpha(t)[:, None], VP.sigma(t)[:, None]
        return sigma * (x - 0.7 * alpha) / (0.25 * alpha**2 + sigma**2)

    from samplers import EpsModel

    got = run_plan(plan, EpsModel(eps, VP), x_T, noise_source=lambda k, like: noises[k])
    expected = result.state * x_T + torch.tensordot(torch.from_numpy(result.noises), noises, 1) + result.offset
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_orders_of_the_reverse_sde():
    rows = {row["kind"]: row for row in stochastic_orders(SAMPLERS["ddim"], {"eta": 1.0}, "vp_linear", "logsnr")}
    assert {kind: row["status"] for kind, row in rows.items()} == dict.fromkeys(
        ("weak, mean given a start", "weak, variance", "strong"), "pass"
    )
    assert abs(rows["weak, variance"]["slope"] - 1) < 0.1
    assert abs(rows["strong"]["slope"] - 1) < 0.1


def test_the_strong_error_is_that_of_a_simulated_path():
    steps, fine = 20, 640
    coarse, dense = (make_plan("ddim", VP, steps=n, grid="logsnr", eta=1.0) for n in (steps, fine))
    lam = VP.lam(np.array(dense.times))
    z = np.random.default_rng(0).standard_normal((4000, fine))
    # a coarse noise is the fine ones weighted by e^lam, normalised: the same Brownian path
    weight = np.exp(lam[1:]) * np.sqrt(-np.expm1(-2 * np.diff(lam)))
    weight = weight.reshape(steps, -1) / np.linalg.norm(weight.reshape(steps, -1), axis=1, keepdims=True)
    z_coarse = (z.reshape(-1, steps, fine // steps) * weight).sum(2)
    start = math.sqrt(0.25 * VP.alpha(1.0) ** 2 + VP.sigma(1.0) ** 2) * np.random.default_rng(1).standard_normal(4000)
    start += 0.7 * VP.alpha(1.0)
    ends = [
        r.state * start + noise @ r.noises + r.offset for r, noise in ((affine(coarse), z_coarse), (affine(dense), z))
    ]
    assert np.sqrt(((ends[0] - ends[1]) ** 2).mean()) == pytest.approx(strong_error(coarse, VP), rel=0.1)


@pytest.mark.parametrize(
    ("name", "options"), [("dpmpp-sde", {}), ("seeds", {"order": 3, "predict": "x0"}), ("seeds", {"order": 2})]
)
def test_a_noise_for_each_call_is_an_increment_of_the_path_too(name, options):
    errors = []
    for steps in (320, 640):
        plan = make_plan(name, VP, steps=steps, grid="logsnr", **options)
        assert plan.noises == plan.nfe > steps
        assert no_strong_order(plan, VP) == ""
        errors.append(strong_error(plan, VP))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("name", "options"), [("restart", {}), ("edm", {"s_churn": 1.0}), ("consistency", {})])
def test_noise_put_back_has_no_strong_order(name, options):
    assert "neither a noise for each step" in no_strong_order(
        make_plan(name, VP, steps=40, grid="logsnr", **options), VP
    )


def test_half_the_noise_has_no_order_and_no_strong_order():
    plan = make_plan("euler-ancestral", VP, steps=100, grid="logsnr", s_noise=0.5)
    assert "another SDE" in no_strong_order(plan, VP)
    assert moments(plan, VP)[1] < 0.2
    rows = list(stochastic_orders(SAMPLERS["euler-ancestral"], {"s_noise": 0.5}, "vp_linear", "logsnr"))
    assert [row["status"] for row in rows] == ["pass", "fail", "not measured"]


# parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("case", [c for c in cases() if c.steps <= 10], ids=lambda c: f"{c.scheduler}-{c.sampler}")
def test_parity_of_short_runs(case):
    row = parity.compare(case)
    assert row["status"] in ("pass", "finding", "not run"), row
    if row["status"] == "pass":
        assert row["difference"] < 1e-12


@pytest.mark.parity
def test_a_difference_is_found_at_its_first_step():
    # our heun is not their midpoint: equal in the first step, which is first order
    theirs = {"solver_type": "midpoint", "timestep_spacing": "linspace"}
    case = Case("DPMSolverMultistepScheduler", theirs, "dpmpp-2m", {"solver_type": "heun"})
    row = parity.compare(case)
    assert (row["status"], row["first_step"]) == ("fail", "2 of 10")
    assert parity.compare(replace(case, cause="weights", first_step=2))["status"] == "finding"
    assert parity.compare(replace(case, cause="weights", first_step=1))["status"] == "fail"


@pytest.mark.parity
def test_a_stated_difference_that_is_gone_fails():
    row = parity.compare(Case("DDIMScheduler", {"clip_sample": False}, "ddim", cause="nothing"))
    assert row["status"] == "fail"


@pytest.mark.parity
def test_their_modules_are_left_as_they_were():
    from diffusers.schedulers import scheduling_ddim

    before = scheduling_ddim.torch, scheduling_ddim.np
    with parity.in_double("DDIMScheduler", iter(())):
        assert scheduling_ddim.torch.float32 is torch.float64
        assert scheduling_ddim.torch.int64 is torch.int64
    assert (scheduling_ddim.torch, scheduling_ddim.np) == before


def test_a_sampler_that_does_not_exist_is_not_run():
    row = parity.compare(Case("DDIMScheduler", {}, "ddimm"))
    assert (row["status"], row["cause"]) == ("not run", "sampler 'ddimm' is not registered")


# equalities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("identity", IDENTITIES, ids=lambda identity: identity.claim)
def test_identities(identity):
    for row in identity_rows(identity):
        assert row["status"] in ("pass", "not run"), row
        if row["status"] == "pass":
            assert row["difference"] < 1e-12


def test_a_claim_that_is_wrong_fails():
    identity = IDENTITIES[0]._replace(b=("heun", {}))
    assert {row["status"] for row in identity_rows(identity)} == {"fail"}
    a, b = (make_plan("ddim", VP, steps=4, grid="logsnr", eta=eta) for eta in (0.5, 0.5000001))
    assert 1e-9 < difference(a, b) < 1e-5
    assert difference(a, make_plan("ddim", VP, steps=5, grid="logsnr", eta=0.5)) == math.inf


def test_names_that_are_one_plan_are_detected():
    entries = [SAMPLERS[name] for name in ("ddim", "euler", "dpm-solver-1", "ddpm", "heun", "dpmpp-2m")]
    rows = list(detect(entries, "vp_linear", "quadratic"))
    assert [set(row["members"].split(" = ")) for row in rows] == [
        {"ddim", "euler", "dpm-solver-1"},
        {"ddim (eta=1.0)", "ddpm"},
    ]


def test_error_controlled_samplers_are_certified_and_a_wrong_one_is_not(monkeypatch):
    from bench.certify import tolerance

    rows = list(tolerance.tolerance_rows(SAMPLERS["rk23"], "vp_linear"))
    assert [row["status"] for row in rows] == ["pass"] * 3
    assert all(row["calls"] > 0 for row in rows)
    sound = SAMPLERS["rk23"]

    def loose(*arguments, rtol, atol, **others):  # the same tolerance whatever is asked for
        return sound.integrate(*arguments, rtol=0.1, atol=0.1, **others)

    monkeypatch.setitem(SAMPLERS, "rk23", replace(sound, integrate=loose))
    assert "fail" in {row["status"] for row in tolerance.tolerance_rows(sound, "vp_linear")}


# the command -----------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(main, ["certify", *map(str, arguments)])


@pytest.mark.parity
def test_certify_writes_tables_summary_and_provenance(tmp_path):
    result = run("--samplers", "ddim,heun", "--quick", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    tables = {name: pd.read_csv(tmp_path / f"{name}.csv") for name in report.COLUMNS}
    for name, table in tables.items():
        assert tuple(table.columns) == report.COLUMNS[name]
    assert set(tables["order"]["sampler"]) == {"ddim", "heun"}
    assert {"global", "local", "weak, variance", "strong"} <= set(tables["order"]["kind"])
    assert set(tables["faults"]["note"]) == {"noticed"}
    summary = (tmp_path / "README.md").read_text()
    assert "Worst slope that passes" in summary
    assert "| ddim | eta=0.0 |" in summary
    made = json.loads((tmp_path / "provenance.json").read_text())
    assert made["samplers"] == ["ddim", "heun"]
    assert made["versions"]["diffusers"]


@pytest.mark.slow
@pytest.mark.parity
def test_a_failing_certificate_is_exit_code_1(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "make_plan", lambda *a, **k: planted(make_plan(*a, **k)))
    result = run("--samplers", "heun", "--quick", "--out", tmp_path)
    assert result.exit_code == 1
    assert "failed: heun" in result.output
    assert "fail" in set(pd.read_csv(tmp_path / "order.csv")["status"])


def test_a_certificate_that_cannot_be_made_is_a_failing_row():
    def broken():
        yield {"status": "pass"}
        raise ValueError("no such step")

    rows = report._made(report.Job("order", "ddim", broken))
    assert [row["status"] for row in rows] == ["pass", "fail"]
    assert rows[1]["note"] == "ValueError: no such step"


def test_an_unknown_sampler_is_a_usage_error(tmp_path):
    result = run("--samplers", "ddimm", "--out", tmp_path)
    assert result.exit_code == 2
    assert "did you mean 'ddim'" in result.output


def test_everything_registered_is_certified():
    labels = {job.label for job in report.jobs() if job.table == "order"}
    assert labels == {entry.name for entry in PLANNED}
    assert {job.label for job in report.jobs(quick=True) if job.table == "faults"} <= labels


def test_the_problem_is_made_for_any_schedule():
    assert Problem(schedules.edm(0.01, 10.0)).error(make_plan("heun", schedules.edm(0.01, 10.0), steps=40)) < 0.1
