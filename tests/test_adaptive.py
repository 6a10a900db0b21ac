"""The error-controlled integrator against closed forms, its budget, and what it says when it fails."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bench.mixture import GaussianMixture
from samplers import EpsModel, SamplingError, sample, schedules
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


@pytest.mark.parametrize("method", ["bosh3", "dopri8"])
def test_other_methods(method):
    x = integrate(gaussian(VP), make_grid(VP, "uniform", 1), X_T, method=method, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x, solution(VP, X_T, VP.t_min), rtol=0, atol=1e-4)


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
@pytest.mark.parametrize("value", [0.0, -1e-3, math.nan, math.inf])
def test_bad_tolerances(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, got {value}"):
        sample(gaussian(VP), "rk45", x_T=X_T, **{name: value})


@pytest.mark.parametrize("t_bad", [1.0, 0.5])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_an_error(t_bad, value):
    model = gaussian(VP)
    broken = EpsModel(lambda x, t: torch.where(t[:, None] > t_bad, model.net(x, t), value), VP, "v")
    with pytest.raises(SamplingError, match=r"the adaptive integrator stopped at theta=.* \(t=|ended in NaN or Inf"):
        sample(broken, "rk45", x_T=X_T)


def test_nan_in_the_last_call_is_an_error():
    broken = EpsModel(lambda x, t: torch.full_like(x, math.nan), VP)
    with pytest.raises(SamplingError, match="the adaptive integrator ended in NaN or Inf"):
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
