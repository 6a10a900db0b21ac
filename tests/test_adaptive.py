"""The error-controlled integrator against closed forms, its budget, and what it says when it fails."""

from __future__ import annotations

import functools
import math
import tracemalloc

import numpy as np
import pytest
import torch

from bench.mixture import GaussianMixture
from samplers import EpsModel, SamplingError, list_samplers, make_plan, run_plan, sample, schedules
from samplers.adaptive import integrate
from samplers.grid import make_grid

VP, FLOW = schedules.vp_linear(), schedules.flow()
MEAN, STD = 0.7, 0.5
X_T = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gaussian(schedule):
    """A v-network of data N(MEAN, STD^2 I), finite at both ends of time."""

    def v(x, t):
        alpha, sigma = schedule.alpha(t.double())[:, None], schedule.sigma(t.double())[:, None]
        total = alpha**2 * STD**2 + sigma**2
        eps, x0 = sigma * (x - alpha * MEAN) / total, MEAN + alpha * STD**2 * (x - alpha * MEAN) / total
        return (alpha * eps - sigma * x0).to(x.dtype)

    return EpsModel(v, schedule, "v")


def solution(schedule, x_T, t_end, t_start=None):
    """The ODE keeps the number of standard deviations from the mean."""
    t_start = schedule.t_max if t_start is None else t_start

    def moments(t):
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        return alpha * MEAN, math.hypot(alpha * STD, sigma)

    (mean, std), (mean_T, std_T) = moments(t_end), moments(t_start)
    return mean + std / std_T * (x_T - mean_T)


@pytest.mark.parametrize("schedule", ["vp_linear", "cosine", "edm", "flow", "discrete", "zero_snr"], indirect=True)
@pytest.mark.parametrize(("tolerance", "error"), [(1e-5, 1e-3), (1e-11, 1e-8)])
def test_a_gaussian_has_a_closed_form(schedule, tolerance, error):
    x_T = schedule.sigma(schedule.t_max) * X_T
    x = sample(gaussian(schedule), "rk45", x_T=x_T, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x, solution(schedule, x_T, schedule.t_min), rtol=0, atol=error)


def test_a_tolerance_is_what_it_costs():
    calls, errors = [], []
    for tolerance in (1e-3, 1e-6, 1e-9):
        x = sample(
            gaussian(VP), "rk45", x_T=X_T, rtol=tolerance, atol=tolerance, callback=lambda p: calls.append(p.nfe)
        )
        errors.append(float((x - solution(VP, X_T, VP.t_min)).abs().max()))
    assert calls == sorted(calls)
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_float32_stays_float32():
    x = sample(gaussian(VP), "rk45", x_T=X_T.float())
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), solution(VP, X_T, VP.t_min), rtol=0, atol=1e-3)


def test_flow_from_pure_noise_in_float32():
    # pi / 2 in float32 lies beyond pi / 2, where no log-SNR exists
    x = sample(gaussian(FLOW), "rk45", x_T=X_T.float())
    torch.testing.assert_close(x.double(), solution(FLOW, X_T, FLOW.t_min), rtol=0, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 4])
def test_last_step_to_clean_data_is_first_order(steps):
    sigmas = [*np.geomspace(100, 0.5, steps), 0.0]
    told = []
    x = sample(gaussian(VP), "rk45", x_T=X_T, sigmas=sigmas, rtol=1e-9, atol=1e-9, callback=told.append)
    t = VP.t_of_lam(-np.log(sigmas[:-1]))
    expected = gaussian(VP).x0(solution(VP, X_T, t[-1], t[0]), t[-1])
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)
    assert [p.step for p in told] == list(range(1, steps + 1))
    assert told[-1].t == 0.0
    assert torch.equal(told[-1].x, x)


def test_callback_is_told_of_every_node():
    told, calls = [], []
    model = gaussian(VP)
    counted = EpsModel(lambda x, t: calls.append(float(t[0])) or model.net(x, t), VP, "v")
    nodes = [1.0, 0.6, 0.3, 0.1]
    x = sample(counted, "rk45", x_T=X_T, timesteps=nodes, rtol=1e-8, atol=1e-8, callback=told.append)
    assert [(p.step, p.steps, p.t) for p in told] == [(1, 3, 0.6), (2, 3, 0.3), (3, 3, 0.1)]
    assert [p.nfe for p in told] == sorted({p.nfe for p in told})
    assert told[-1].nfe == len(calls)
    assert torch.equal(told[-1].x, x)
    for p in told:
        torch.testing.assert_close(p.x, solution(VP, X_T, p.t), rtol=0, atol=1e-6)
    assert all(0.1 - 1e-12 <= t <= 1.0 for t in calls), "the model was called outside the nodes"
    # two of the seven stages stand at a step's end; more calls there are calls beyond it that were moved back
    assert sum(t < 0.1 + 1e-9 for t in calls) == 2


def test_conditions_reach_the_network_and_x_T_is_kept():
    seen, kept = set(), X_T.clone()
    model = EpsModel(lambda x, t, label: seen.add(label) or 0.5 * x, VP)
    sample(model, "rk45", x_T=X_T, cond={"label": 3})
    assert seen == {3}
    assert torch.equal(X_T, kept)


@pytest.mark.parametrize("nfe", [1, 5, 20])
def test_a_budget_too_small_is_an_error(nfe):
    calls = []
    model = gaussian(VP)
    counted = EpsModel(lambda x, t: calls.append(1) or model.net(x, t), VP, "v")
    with pytest.raises(SamplingError, match=rf"rtol=1e-08, atol=1e-05 needs more than nfe={nfe} network calls"):
        sample(counted, "rk45", x_T=X_T, nfe=nfe, rtol=1e-8)
    assert len(calls) == nfe


def test_a_budget_covers_the_step_to_clean_data():
    told = []
    where = {"steps": 2, "final": "zero"}
    sample(gaussian(VP), "rk45", x_T=X_T, **where, callback=told.append)
    grid = make_grid(VP, "uniform", 2, "zero")
    integrate(gaussian(VP), grid, X_T, nfe=told[-1].nfe)
    with pytest.raises(SamplingError, match=f"needs more than nfe={told[-1].nfe - 1} network calls"):
        integrate(gaussian(VP), grid, X_T, nfe=told[-1].nfe - 1)


def test_a_budget_that_suffices_changes_nothing():
    assert torch.equal(sample(gaussian(VP), "rk45", x_T=X_T, nfe=10_000), sample(gaussian(VP), "rk45", x_T=X_T))


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("value", [0.0, -1e-3, math.nan, math.inf, 10**309])
def test_bad_tolerances(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, got {value}"):
        sample(gaussian(VP), "rk45", x_T=X_T, **{name: value})


@pytest.mark.parametrize("t_bad", [1.0, 0.5])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_an_error(t_bad, value):
    model = gaussian(VP)
    broken = EpsModel(lambda x, t: torch.where(t[:, None] > t_bad, model.net(x, t), value), VP, "v")
    with pytest.raises(SamplingError, match=r"NaN or Inf in call \d+: the network's output at t="):
        sample(broken, "rk45", x_T=X_T)


def test_nan_in_the_last_call_is_an_error():
    broken = EpsModel(lambda x, t: torch.full_like(x, math.nan), VP)
    with pytest.raises(SamplingError, match="NaN or Inf in call 1: the network's output at t="):
        sample(broken, "rk45", x_T=X_T, sigmas=[80.0, 0.0])


def test_an_eps_network_at_pure_noise_is_refused():
    with pytest.raises(ValueError, match="predicts='eps' gives no v at t=1, where alpha=0"):
        sample(EpsModel(lambda x, t: x, FLOW), "rk45", x_T=X_T)


@pytest.mark.parametrize("predicts", ["eps", "v", "score", "edm"])
def test_the_mixture_is_solved_whatever_the_network_predicts(exact, predicts):
    x_T = X_T[:, :2]
    reference = sample(exact(VP, "x0"), "rk45", x_T=x_T)
    x = sample(exact(VP, predicts), "rk45", x_T=x_T)
    torch.testing.assert_close(x, reference, rtol=0, atol=1e-9)


def test_samples_have_the_datas_moments():
    mixture = GaussianMixture.isotropic([[1.0, 0.0], [-0.5, 0.8], [0.0, -1.0]], 0.3)
    x = sample(EpsModel(mixture.net(VP), VP), "rk45", shape=(4096, 2), seed=1).double()
    variance = mixture.covariance().diag().max()
    assert (x.mean(0) - mixture.mean()).abs().max() < 4 * (variance / 4096) ** 0.5
    assert (x.T.cov() - mixture.covariance()).abs().max() < 4 * variance * (2 / 4096) ** 0.5


# every error-controlled sampler ----------------------------------------------------------------------------------

# tolerance, and by how much it may be missed at the end
EVERY = {
    "rk45": (1e-8, 1e-7),
    "rk23": (1e-7, 1e-6),
    "dopri8": (1e-9, 1e-8),
    "scipy-lsoda": (1e-9, 1e-7),
    "dpm-adaptive-12": (1e-4, 1e-3),
    "dpm-adaptive-23": (1e-6, 1e-5),
}
every_method = pytest.mark.parametrize("name", EVERY)


def test_these_are_all():
    assert {s.name for s in list_samplers() if s.adaptive} == set(EVERY)


@pytest.fixture(scope="module")
def references(exact):
    """Start states and solutions of the mixture by schedule."""

    @functools.cache
    def reference(schedule):
        x_T = float(schedule.sigma(schedule.t_max)) * X_T[:, :2]
        return x_T, sample(exact(schedule, "v"), "dopri8", x_T=x_T, rtol=1e-12, atol=1e-12)

    return reference


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("schedule", ["vp_linear", "edm", "flow", "zero_snr"], indirect=True)
def test_all_agree_on_the_mixture(exact, references, schedule, name):
    x_T, expected = references(schedule)
    tolerance, error = EVERY[name]
    x = sample(exact(schedule, "v"), name, x_T=x_T, rtol=tolerance, atol=tolerance)
    assert (x - expected).abs().max() < error


@every_method
def test_a_tighter_tolerance_is_nearer_and_costs_more(name):
    calls, errors = [], []
    for factor in (1e4, 1e2, 1.0):
        tolerance = EVERY[name][0] * factor
        told = []
        x = sample(gaussian(VP), name, x_T=X_T, rtol=tolerance, atol=tolerance, callback=told.append)
        calls.append(told[-1].nfe)
        errors.append(float((x - solution(VP, X_T, VP.t_min)).abs().max()))
    assert calls == sorted(set(calls))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


@every_method
def test_all_stop_at_nodes_and_end_in_clean_data(name):
    told, calls = [], []
    model = gaussian(VP)
    counted = EpsModel(lambda x, t: calls.append(float(t[0])) or model.net(x, t), VP, "v")
    sigmas = [100.0, 3.0, 0.2, 0.0]
    options = {"rtol": EVERY[name][0], "atol": EVERY[name][0]}
    x = sample(counted, name, x_T=X_T, sigmas=sigmas, callback=told.append, **options)
    t = VP.t_of_lam(-np.log(sigmas[:-1]))
    for progress, at in zip(told, t[1:], strict=False):
        torch.testing.assert_close(progress.x, solution(VP, X_T, at, t[0]), rtol=0, atol=20 * options["atol"])
    torch.testing.assert_close(x, model.x0(told[1].x, t[-1]), rtol=0, atol=1e-12)
    assert [p.step for p in told] == [1, 2, 3]
    assert told[-1].nfe == len(calls)
    assert all(t[-1] - 1e-9 <= at <= t[0] + 1e-9 for at in calls), "the model was called outside the nodes"


@every_method
def test_all_keep_to_their_budget(name):
    for nfe in (1, 7):
        calls = []
        model = gaussian(VP)
        counted = EpsModel(lambda x, t: calls.append(1) or model.net(x, t), VP, "v")  # noqa: B023
        with pytest.raises(SamplingError, match=rf"rtol=1e-08, .* needs more than nfe={nfe} network calls"):
            sample(counted, name, x_T=X_T, nfe=nfe, rtol=1e-8)
        assert len(calls) == nfe


@every_method
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_all_stop_at_nan(name, value):
    model = gaussian(VP)
    broken = EpsModel(lambda x, t: torch.where(t[:, None] > 0.5, model.net(x, t), value), VP, "v")
    with pytest.raises(SamplingError, match=r"NaN or Inf in call \d+: the network's output at t="):
        sample(broken, name, x_T=X_T)
    with pytest.raises(ValueError, match="x_T must be finite, got NaN or Inf in sample 2"):
        sample(model, name, x_T=X_T.index_fill(0, torch.tensor([2]), value))


@every_method
def test_all_keep_dtype_shape_and_start(name):
    x_T = X_T.float().reshape(5, 3, 1)
    kept = x_T.clone()
    model = EpsModel(lambda x, t: x / (1 + t.view(-1, 1, 1)), VP)
    x = sample(model, name, x_T=x_T, rtol=1e-3, atol=1e-3)
    assert x.dtype == torch.float32
    assert x.shape == x_T.shape
    assert torch.equal(x_T, kept)
    assert x.isfinite().all()


@every_method
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_a_network_of_half_precision_costs_its_own_rounding_only(name, dtype, error):
    told, seen = [], set()
    model = gaussian(VP)
    half = EpsModel(lambda x, t: seen.add(x.dtype) or model.net(x, t), VP, "v")
    options = {"rtol": 1e-3, "atol": 1e-3}
    if name.startswith("dpm"):
        options["h_init"] = 5.0  # rejected, by a ratio whose square is no number in float16
    x = sample(half, name, x_T=X_T.to(dtype), steps=2, callback=told.append, **options)
    assert {x.dtype, *(p.x.dtype for p in told), *seen} == {dtype}
    assert torch.equal(told[-1].x, x)
    assert (x.double() - solution(VP, X_T.to(dtype).double(), VP.t_min)).abs().max() < error


@every_method
@pytest.mark.parametrize("option", ["rtol", "atol"])
def test_all_check_their_tolerances(name, option):
    with pytest.raises(ValueError, match=f"{option} must be positive and finite, got 0"):
        sample(gaussian(VP), name, x_T=X_T, **{option: 0.0})


@every_method
@pytest.mark.parametrize("schedule", ["flow", "zero_snr"], indirect=True)
def test_all_refuse_an_eps_network_at_pure_noise(schedule, name):
    with pytest.raises(ValueError, match=r"predicts='eps' gives no (v|x0) at t=\d+, where alpha=0"):
        sample(EpsModel(lambda x, t: x, schedule), name, x_T=X_T)


# DPM-Solver with adaptive step size ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpm-adaptive-12", {"h_init": 0.0}, "h_init must be positive and finite, got 0"),
        ("dpm-adaptive-23", {"h_init": math.nan}, "h_init must be positive and finite, got nan"),
        ("dpm-adaptive-23", {"h_init": 10**400}, "h_init must be positive and finite, got 10"),
        ("dpm-adaptive-23", {"theta": 0.0}, "theta must be positive and finite, got 0"),
        ("dpm-adaptive-23", {"theta": 1.1}, r"theta must lie in \(0, 1\], got 1.1"),
        ("dpm-adaptive-23", {"order": 2}, "unknown option of sampler 'dpm-adaptive-23': 'order'"),
        ("rk45", {"theta": 0.9}, "unknown option of sampler 'rk45': 'theta'"),
        ("scipy-lsoda", {"method": "bdf"}, "unknown option of sampler 'scipy-lsoda': 'method'"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        sample(gaussian(VP), name, x_T=X_T, **options)


@pytest.mark.parametrize(
    ("name", "higher"), [("dpm-adaptive-12", "dpm-solver-2s"), ("dpm-adaptive-23", "dpm-solver-3s")]
)
def test_an_accepted_step_is_that_of_the_higher_order(name, higher):
    told = []
    nodes = np.array([0.5, 0.49])
    x = sample(gaussian(VP), name, x_T=X_T, timesteps=nodes, h_init=10.0, callback=told.append)
    assert told[-1].nfe == int(name[-1])  # one step, accepted
    plan = make_plan(higher, VP, timesteps=nodes)
    torch.testing.assert_close(x, run_plan(plan, gaussian(VP), X_T), rtol=1e-12, atol=1e-12)


def test_a_rejected_step_keeps_its_first_call():
    times = []
    model = gaussian(VP)
    counted = EpsModel(lambda x, t: times.append(float(t[0])) or model.net(x, t), VP, "v")
    sample(counted, "dpm-adaptive-12", x_T=X_T, rtol=1e-4, atol=1e-4, h_init=5.0)
    assert times.count(1.0) == 1
    assert times[2] > times[1]  # the second try is a shorter step
    assert len(set(times)) == len(times)


def test_a_hopeless_step_underflows():
    noisy = EpsModel(lambda x, t: torch.randn_like(x), VP)  # no step is short enough
    with pytest.raises(SamplingError, match=r"stopped at t=.*: underflow in the step size"):
        sample(noisy, "dpm-adaptive-12", x_T=X_T, rtol=1e-14, atol=1e-14)


def test_the_papers_tolerance_takes_few_calls(exact):
    told = []
    x = sample(exact(VP), "dpm-adaptive-23", x_T=X_T[:, :2], callback=told.append)
    assert told[-1].nfe < 70
    assert (x - sample(exact(VP), "rk45", x_T=X_T[:, :2], rtol=1e-9, atol=1e-9)).abs().max() < 0.05


# SciPy -----------------------------------------------------------------------------------------------------------


def test_lsoda_turns_to_implicit_steps_where_the_problem_is_stiff():
    spread = EpsModel(lambda x, t: 3e3 * (x - torch.sin(20 * t)[:, None]), VP)
    told = []
    x = sample(spread, "scipy-lsoda", x_T=X_T, timesteps=[0.6, 0.4], rtol=1e-6, atol=1e-6, callback=told.append)
    assert x.isfinite().all()
    assert told[-1].nfe < 2000  # an explicit method needs about as many steps as the stiffness is large
    assert (x - x.mean()).abs().max() < 1e-3


def test_lsoda_needs_memory_for_the_state_not_for_its_square():
    x_T = torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tracemalloc.start()
    x = sample(gaussian(VP), "scipy-lsoda", x_T=x_T, rtol=1e-4, atol=1e-4)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    torch.testing.assert_close(x, solution(VP, x_T, VP.t_min), rtol=0, atol=1e-3)
    assert most < 300 * x_T.numel() * 8
