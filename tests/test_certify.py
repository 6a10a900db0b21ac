"""The certificates: that they pass on what is sound, fail on what is not, and say what they were made of."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from bench.certify import order, parity, report, summary
from bench.certify.equalities import DETECTED_AT, IDENTITIES, detect, difference, identity_rows
from bench.certify.faults import fault_row, planted, stochastic_fault_rows
from bench.certify.gaussian import (
    STD,
    _growth,
    _late_nodes,
    _measured,
    affine,
    mean_error,
    moments,
    no_strong_order,
    own_strong_error,
    stochastic_orders,
    strong_error,
    variance_error,
)
from bench.certify.problem import MIXTURE, Problem, epsilon, run_from, solution_at
from bench.certify.schedulers import Case, cases
from bench.certify.settings import (
    CHOICES,
    FIXED,
    HALF,
    KNOWN,
    KNOWN_WEAK,
    STATED,
    STATED_WEAK,
    choices,
    deterministic,
    growing,
    growing_restarts,
    known_slope,
    matches,
    noise_rate,
    stated,
    stated_weak,
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


def test_noise_is_certified_at_the_default_or_one_and_at_a_half():
    for entry in PLANNED:
        amounts = {options.get(entry.stochastic) for options in stochastic(entry)}
        if entry.stochastic in ("eta", "tau"):
            assert amounts == {1.0, HALF}
        else:
            assert HALF not in amounts


@pytest.mark.parametrize(
    ("predictor", "corrector", "over_a_run", "of_a_step"),
    [(1, 0, 1, 1), (1, 1, 1, 1), (1, 2, 2, 1), (2, 0, 2, 2), (2, 3, 3, 2)] + [(3, 0, 3, 3), (3, 4, 4, 3), (4, 0, 4, 4)],
)
def test_every_order_of_sa_solver_is_certified(predictor, corrector, over_a_run, of_a_step):
    entry, options = SAMPLERS["sa-solver"], {"predictor_order": predictor, "corrector_order": corrector}
    for settings in (deterministic(entry), stochastic(entry)):
        found = [chosen for chosen in settings if {**chosen, **options} == chosen]
        assert {chosen["weights"] for chosen in found} == {"exact", "published"}
    assert stated(entry, options)[0] == over_a_run
    assert stated(entry, options, local=True)[0] == of_a_step


@pytest.mark.slow
def test_every_stated_exception_matches_a_sampler_and_says_why():
    for row in (*STATED, *KNOWN, *STATED_WEAK, *KNOWN_WEAK):
        assert row.reason
        settings = [(e, {**e.options, **o}) for e in PLANNED for o in (*choices(e), *growing(e), *stochastic(e))]
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
        assert [row["status"] for row in rows] == ["pass", "pass"][: len(rows)]
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


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddpm", {"variance": "fixed_large"}),
        ("ddim", {"eta": 1.0}),
        ("dpm2-ancestral", {"eta": HALF}),
        ("dpmpp-2s", {"eta": HALF}),
        ("dpmpp-sde", {"eta": 1.0}),
        ("dpmpp-3m-sde", {"eta": HALF}),
        ("edm", {"s_churn": 1.0}),
        ("restart", {"restarts": growing_restarts}),
    ],
)
def test_one_percent_on_one_coefficient_fails_mean_variance_and_path(name, options):
    """Also where a mean is exact without the fault, where two noises share a step, and where noise is put back."""
    rows = list(stochastic_fault_rows(SAMPLERS[name], options, "vp_linear", "logsnr"))
    own_limit = name in ("edm", "restart")
    assert [row["kind"] for row in rows] == ["weak, mean given a start", "weak, variance", "strong"][: 3 - own_limit]
    assert [row["coefficient"] for row in rows] == ["an output's", "a noise's", "a noise's"][: 3 - own_limit]
    assert {row["note"] for row in rows} == {"noticed"}
    assert all(row["stated"] - row["slope_with_fault"] > 0.5 for row in rows)


def test_a_fault_is_planted_in_one_coefficient_of_every_step():
    plan = make_plan("ddim", VP, steps=4, grid="logsnr", eta=HALF)
    for noise in (False, True):
        pairs = zip(plan.instructions, planted(plan, 1.5, noise).instructions, strict=True)
        changed = [
            (name[0], c / d)
            for a, b in pairs
            for (name, d), (_, c) in zip(getattr(a, "terms", ()), getattr(b, "terms", ()), strict=True)
            if c != d
        ]
        assert [name for name, _ in changed] == ["z" if noise else "o"] * 4
        assert [ratio for _, ratio in changed] == pytest.approx([1.5] * 4)


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


@pytest.mark.parametrize(("name", "grid"), [("eab-3", "quadratic"), ("unipc-2", "quadratic"), ("dpmpp-2m", "logsnr")])
def test_with_lowered_final_orders_second_order_is_stated_and_judged(name, grid):
    entry = SAMPLERS[name]
    row = list(order.global_orders(entry, next(deterministic(entry)), "vp_linear", grid, (640, 320)))[1]
    assert row["lower_order_final"]
    assert (row["stated"], row["status"]) == (2, "pass"), row
    assert abs(row["slope"] - 2) < 0.2


def test_a_larger_slope_with_lowered_final_orders_is_a_finding_where_what_lowering_adds_is_of_order_two(monkeypatch):
    entry, where = SAMPLERS["eab-3"], ({"predict": "eps"}, "edm", "logsnr", (640, 320))
    row = list(order.global_orders(entry, *where))[1]
    assert (row["stated"], row["status"]) == (2, "finding"), row
    assert row["slope"] > 2.8
    assert abs(row["slope_of_lowering"] - 2) < 0.1
    assert "the last step is of first order" in row["note"]
    monkeypatch.setattr(
        Problem, "apart", lambda self, a, b: float(a.steps) ** -3
    )  # as if lowering added something else
    assert list(order.global_orders(entry, *where))[1]["status"] == "fail"


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


@pytest.mark.parametrize("name", [e.name for e in PLANNED if e.stochastic in ("eta", "tau")])
def test_a_samplers_noise_is_that_of_the_sde_it_is_held_against(name):
    entry = SAMPLERS[name]
    for options in stochastic(entry):
        plan, rate = make_plan(name, VP, steps=320, grid="logsnr", **options), noise_rate(entry, options)
        assert no_strong_order(plan, VP, rate) == ""
        assert "another SDE" in no_strong_order(plan, VP, 2.0 * rate)


@pytest.mark.parametrize("rate", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("schedule", [VP, schedules.edm(), schedules.flow()], ids=lambda s: s.name)
def test_a_deviation_grows_as_the_sdes_mean(schedule, rate):
    """Against the Gaussian's `dy = (1 + rate) eps d sigma_bar`, integrated numerically."""
    lam = np.linspace(-1.0, 1.5, 4001)
    level = np.exp(-lam)  # sigma_bar, and eps = sigma_bar (y - m) / (s^2 + sigma_bar^2)
    slope = (1.0 + rate) * level / (STD**2 + level**2)
    grown = math.exp(float((0.5 * (slope[1:] + slope[:-1]) * np.diff(level)).sum()))
    alpha = schedule.alpha(schedule.t_of_lam(lam[[0, -1]]))
    assert _growth(schedule, lam[:1], lam[-1], rate)[0] == pytest.approx(grown * alpha[1] / alpha[0], rel=1e-6)


def test_the_error_of_the_mean_is_that_of_the_affine_result():
    plan = make_plan("dpmpp-2m-sde", VP, timesteps=_late_nodes(VP, "logsnr", 20), eta=HALF)
    exact = float(_growth(VP, VP.lam(np.array(plan.times[:1])), float(VP.lam(plan.times[-1])), 0.5)[0])
    assert mean_error(plan, VP, 0.5) == pytest.approx(abs(affine(plan).state - exact), rel=1e-9)
    assert mean_error(plan, VP, 0.5, exact_start=20) == 0


@pytest.mark.parametrize(
    ("name", "options", "order", "start_up"),
    [
        ("ddim", {}, 1, False),
        ("euler-ancestral", {}, 1, False),
        ("dpm2-ancestral", {}, 1, False),
        ("dpmpp-2s", {}, 1, False),
        ("dpmpp-sde", {}, 1, False),
        ("dpmpp-2m-sde", {"predict": "eps"}, 2, False),
        ("dpmpp-2m-sde", {"predict": "x0"}, 2, False),
        ("dpmpp-3m-sde", {"weights": "published"}, 2, False),
        ("dpmpp-3m-sde", {"weights": "exact"}, 3, True),
        ("seeds", {"order": 3, "predict": "x0"}, 3, False),
        ("sa-solver", {"predictor_order": 1, "corrector_order": 2}, 2, False),
        ("sa-solver", {"predictor_order": 3, "corrector_order": 0}, 3, True),
        ("sa-solver", {"predictor_order": 3, "corrector_order": 4}, 4, True),
    ],
)
def test_the_mean_has_an_order_at_half_the_noise(name, options, order, start_up):
    entry = SAMPLERS[name]
    chosen = next(o for o in stochastic(entry) if {**o, **options, entry.stochastic: HALF} == o)
    mean, variance, path = stochastic_orders(entry, chosen, "vp_linear", "logsnr", steps=(320, 640))
    assert (mean["stated"], mean["status"]) == (order, "start-up" if start_up else "pass"), mean
    assert mean["slope_exact_start" if start_up else "slope"] == pytest.approx(order, abs=0.2)
    assert (variance["status"], path["status"], path["stated"]) == ("pass", "pass", 1)


def test_a_mean_of_a_lower_order_than_stated_fails(monkeypatch):
    from bench.certify import gaussian

    entry, where = SAMPLERS["dpmpp-sde"], ("vp_linear", "logsnr")
    monkeypatch.setattr(
        gaussian, "stated_weak", lambda *_: stated_weak(entry, {"eta": 1.0})
    )  # 2, which is so in x0 at 1
    assert next(stochastic_orders(entry, {"eta": 1.0}, *where, steps=(320, 640)))["note"] == "exact"
    assert next(stochastic_orders(entry, {"eta": HALF}, *where, steps=(320, 640)))["status"] == "fail"


def test_rounding_is_no_order():
    row = _measured({160: 1e-6, 320: 1e-9, 640: 1e-13}.__getitem__, 3, (320, 640))
    assert (row["status"], row["steps_used"]) == ("fail", "160-320")
    assert _measured(lambda n: 1e-14, 3)["note"] == "exact"


def test_a_known_reason_is_for_a_slope_beyond_the_tolerance():
    assert _measured(lambda n: 7.0 * n**-2.05, 2, known="a reason")["status"] == "pass"
    assert _measured(lambda n: 7.0 * n**-2.5, 2, known="a reason")["note"] == "a reason"


def test_one_doubling_alone_is_no_order_but_the_last_is():
    def found(*errors):
        steps = [80 * 2**k for k in range(len(errors))]
        row = _measured(dict(zip(steps, errors, strict=True)).__getitem__, 1, steps[1:])
        return row["status"], row["steps_used"]

    assert found(8, 4, 2, 1, 1) == ("pass", "160-320")
    assert found(8, 4, 2.8, 2.6, 2.6) == ("fail", "640-1280"), "its way to 0 goes through 1"
    assert found(9, 8, 6, 4, 2) == ("pass", "640-1280"), "the last of all"
    assert found(9e-12, 8e-12, 4e-12, 5e-13, 1e-13) == ("pass", "160-320"), "the last above rounding"


def test_a_path_that_settles_late_only_is_a_finding_and_gives_both_slopes():
    """In epsilon the first steps of this grid, long in lam, leave an error of second order that hides the path's own."""
    options = {"eta": HALF, "predict": "eps"}
    *_, row = stochastic_orders(SAMPLERS["dpmpp-2m-sde"], options, "cosine", "quadratic", steps=(320, 640))
    assert (row["kind"], row["stated"], row["status"]) == ("strong", 1, "finding")
    assert row["slope"] > 1.5
    assert "from the log-SNR -1 on 1.00 at 320-640 steps" in row["note"]


@pytest.mark.parametrize(("name", "eta", "rate"), [("ddim", 1.0, 1.0), ("dpmpp-2m-sde", HALF, HALF)])
def test_the_strong_error_is_that_of_a_simulated_path(name, eta, rate):
    steps, fine = 20, 640
    options = {"lower_order_final": False} if name != "ddim" else {}
    coarse, dense = (make_plan(name, VP, steps=n, grid="logsnr", eta=eta, **options) for n in (steps, fine))
    lam = VP.lam(np.array(dense.times))
    z = np.random.default_rng(0).standard_normal((4000, fine))
    # a coarse noise is the fine ones weighted by e^(rate lam), normalised: the same Brownian path
    weight = np.exp(rate * lam[1:]) * np.sqrt(-np.expm1(-2 * rate * np.diff(lam)))
    weight = weight.reshape(steps, -1) / np.linalg.norm(weight.reshape(steps, -1), axis=1, keepdims=True)
    z_coarse = (z.reshape(-1, steps, fine // steps) * weight).sum(2)
    start = math.sqrt(0.25 * VP.alpha(1.0) ** 2 + VP.sigma(1.0) ** 2) * np.random.default_rng(1).standard_normal(4000)
    start += 0.7 * VP.alpha(1.0)
    ends = [
        r.state * start + noise @ r.noises + r.offset for r, noise in ((affine(coarse), z_coarse), (affine(dense), z))
    ]
    assert np.sqrt(((ends[0] - ends[1]) ** 2).mean()) == pytest.approx(strong_error(coarse, VP, rate), rel=0.1)


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


@pytest.mark.parametrize("name", ["edm", "restart"])
def test_noise_put_back_has_an_order_to_its_own_limit(name):
    options = growing(SAMPLERS[name])[0] if name == "restart" else {"s_churn": 1.0}
    rows = {row["kind"]: row for row in stochastic_orders(SAMPLERS[name], options, "vp_linear", "logsnr")}
    assert {row["status"] for row in rows.values()} == {"pass"}
    stated = {"edm": [1, 2, 1], "restart": [2, 2, 2]}[name]
    assert [row["stated"] for row in rows.values()] == stated
    assert "to its own limit on the same noises" in rows["strong"]["note"]


def test_an_own_limit_needs_noises_that_go_together():
    late = [_late_nodes(VP, "logsnr", n) for n in (40, 80, 120)]
    plans = [make_plan("ddim", VP, timesteps=nodes, eta=1.0) for nodes in late]
    assert own_strong_error(plans[0], plans[0], VP) == 0
    assert 0 < own_strong_error(*plans[:2], VP) < 0.1
    assert math.isnan(own_strong_error(plans[0], plans[2], VP))


@pytest.mark.parametrize("name", ["restart", "consistency"])
def test_what_has_no_order_does_not_pass(name):
    rows = list(stochastic_orders(SAMPLERS[name], {}, "vp_linear", "logsnr"))
    assert [row["status"] for row in rows] == ["not an order"] * 3
    assert all(row["note"] and math.isnan(row["stated"]) for row in rows)


@pytest.mark.slow
def test_a_slope_above_the_stated_one_does_not_pass(monkeypatch):
    from bench.certify import gaussian

    entry, where = SAMPLERS["dpmpp-2m-sde"], ("vp_linear", "logsnr")
    low = gaussian.stated_weak(entry, {})._replace(variance=1)
    monkeypatch.setattr(gaussian, "stated_weak", lambda *_: low)
    monkeypatch.setattr(gaussian, "STEPS", (320, 640))
    rows = {row["kind"]: row for row in stochastic_orders(entry, {"eta": 1.0}, *where)}
    assert (rows["weak, variance"]["status"], rows["strong"]["status"]) == ("fail", "pass")
    assert rows["weak, variance"]["slope"] > 1.8


@pytest.mark.parametrize("eta", [1.0, HALF])
@pytest.mark.parametrize("k", [1, 2])
def test_the_leading_term_of_seeds_in_epsilon_cancels_over_the_whole_way_only(k, eta):
    """What the certificate says of it: slopes above k on steps of one length in lam, from noise to data."""

    def slope(nodes_of):
        plans = [make_plan("seeds", VP, timesteps=nodes_of(n), order=k, predict="eps", eta=eta) for n in (320, 640)]
        return math.log2(variance_error(plans[0], VP) / variance_error(plans[1], VP))

    assert slope(lambda n: make_plan("ddim", VP, steps=n, grid="logsnr").times) > k + 0.7
    assert slope(lambda n: _late_nodes(VP, "logsnr", n)) == pytest.approx(k, abs=0.2)
    options = {"order": k, "predict": "eps", "eta": eta}
    rows = {r["kind"]: r for r in stochastic_orders(SAMPLERS["seeds"], options, "edm", "logsnr")}
    assert rows["weak, variance"]["status"] == "finding"


@pytest.mark.parametrize(("name", "options"), [("restart", {}), ("edm", {"s_churn": 1.0}), ("consistency", {})])
def test_noise_put_back_has_no_strong_order(name, options):
    assert "neither a noise for each step" in no_strong_order(
        make_plan(name, VP, steps=40, grid="logsnr", **options), VP
    )


def test_half_the_noise_has_no_order_and_no_strong_order():
    plan = make_plan("euler-ancestral", VP, steps=100, grid="logsnr", s_noise=0.5)
    assert "another SDE" in no_strong_order(plan, VP)
    assert moments(plan, VP)[1] < 0.2
    where = ("vp_linear", "logsnr")
    rows = list(stochastic_orders(SAMPLERS["euler-ancestral"], {"s_noise": 0.5}, *where, steps=(320, 640)))
    assert [row["status"] for row in rows] == ["pass", "fail", "pass"]
    assert "another SDE than the reverse one" in rows[2]["note"]


# parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("case", [c for c in cases() if c.steps <= 10], ids=lambda c: f"{c.scheduler}-{c.sampler}")
def test_parity_of_short_runs(case):
    row = parity.compare(case)
    assert row["status"] in ("pass", "finding", "not run"), row
    if row["status"] != "not run" and not row["first_step"]:
        assert row["difference"] < 2e-12
        assert (
            (row["status"] == "finding") == (row["difference_as_shipped"] > 1e-5) == bool(row["first_step_as_shipped"])
        )


@pytest.mark.parity
def test_what_float32_costs_is_a_finding_with_its_first_step():
    theirs = {"final_sigmas_type": "sigma_min", "timestep_spacing": "linspace", "solver_order": 3}
    row = parity.compare(Case("DPMSolverMultistepScheduler", theirs, "dpmpp-3m", steps=15))
    assert (row["status"], row["first_step"], row["first_step_as_shipped"]) == ("finding", "", "15 of 15")
    assert row["cause"].startswith("dtype")
    assert row["difference"] < 1e-12 < 1e-5 < row["difference_as_shipped"]
    one = parity.compare(Case("DPMSolverMultistepScheduler", {**theirs, "solver_order": 2}, "dpmpp-2m", steps=1))
    assert one["first_step_as_shipped"] == "1 of 1"


@pytest.mark.parity
@pytest.mark.parametrize(
    "case", [c for c in cases() if c.scheduler == "PNDMScheduler"], ids=lambda c: "-".join(map(str, c.theirs.values()))
)
def test_pndm_on_every_spacing_of_diffusers(case):
    row = parity.compare(case)
    assert row["status"] == ("finding" if case.cause else "pass"), row
    start = not case.theirs.get("skip_prk_steps") and case.theirs["timestep_spacing"] != "linspace"
    assert row["first_step"] == ("" if not case.cause else "20 of 20" if start else "1 of 20")
    if not case.cause:  # down to the level of training step 0, where this spacing is not yet
        assert case.theirs == {"timestep_spacing": "trailing", "set_alpha_to_one": False}
        assert row["difference"] < 2e-12


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


def detected(schedule, grid, final, steps):
    names = [f"{name}-{k}" for name in ("lms", "ipndm-v", "deis") for k in (2, 3, 4)]
    rows = detect([SAMPLERS[name] for name in names], schedule, grid, final, steps)
    return {frozenset(row["members"].split(" = ")) for row in rows}


@pytest.mark.parametrize("grid", ["logsnr", "quadratic"])
@pytest.mark.parametrize("schedule", ["vp_linear", "cosine"])
def test_deis_rhoab_lms_and_ipndm_v_are_detected_as_one_plan(schedule, grid):
    """DEIS lowers the order of the last steps of fewer than 15, and LMS keeps its order in a step to sigma = 0."""
    for k in (2, 3, 4):
        lms, ours, rhoab = f"lms-{k}", f"ipndm-v-{k}", f"deis-{k} (variant=rhoab)"
        assert {lms, ours, rhoab} in detected(schedule, grid, "t_min", 16)
        assert {lms, ours} in detected(schedule, grid, "t_min", 8)
        assert {ours, rhoab} in detected(schedule, grid, "zero", 16)
        lowered_once = {ours, rhoab} in detected(
            schedule, grid, "zero", 8
        )  # in the last step, which is first order anyway
        assert lowered_once == (k == 2)


def test_the_detector_runs_at_both_lengths_and_endings():
    found = {job.rows.args[3:] for job in report.jobs() if job.label == "detector"}
    assert found == {(final, steps) for final in ("t_min", "zero") for steps in DETECTED_AT}


def test_groups_are_told_with_the_settings_they_hold_under():
    head = {"kind": "detected", "members": "a = b", "grid": "logsnr"}
    row = {**head, "schedule": "edm", "final": "t_min", "steps": 8}
    rows = [row, {**row, "steps": 16}, {**row, "members": "c = d", "steps": 16, "schedule": "cosine"}]
    assert summary._detected(rows) == [
        "- a = b [any ending: edm logsnr]",
        "- c = d [t_min, 16 steps: cosine logsnr]",
    ]
    assert summary._detected(rows[:2]) == ["- a = b [everywhere]"]


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


def test_the_table_fits_into_80_columns():
    from io import StringIO

    from rich.console import Console

    rows = {name: [{"status": "for the record"}] * 1234 for name in report.COLUMNS}
    shown = StringIO()
    Console(file=shown, width=80).print(summary.terminal(rows, 1.0))
    words = shown.getvalue().split()
    assert "…" not in shown.getvalue()
    assert {"start-up", "finding", "record", "order", "run", "equalities", "1234"} <= set(words)
    assert max(map(len, shown.getvalue().splitlines())) <= 80


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
