"""SA-Solver: orders without noise, exactness with it, the samplers it contains, and diffusers' implementation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_parity import SCHEDULE, X_T, assert_same, follow, scheduler
from test_solvers import COSINE, EDM, FLOW, VP, has_order

from bench.certify.gaussian import moments as moments_of_a_gaussian
from bench.certify.problem import Problem
from samplers import EpsModel, make_plan, run_plan, sample, schedules
from samplers.program import Combine

EVERYWHERE = {"tau_start": math.inf, "tau_end": 0.0}


@pytest.fixture(scope="module")
def problem():
    return Problem(VP)


@pytest.mark.parametrize(
    ("predictor", "corrector", "order"),
    [(1, 0, 1), (2, 0, 2), (3, 0, 3), (4, 0, 4), (1, 1, 1), (1, 2, 2), (2, 3, 3), (3, 4, 4)],
)
@pytest.mark.parametrize("weights", ["exact", "published"])
def test_order_without_noise(problem, predictor, corrector, order, weights):
    options = {"predictor_order": predictor, "corrector_order": corrector, "weights": weights}
    assert has_order(
        problem,
        order,
        lambda n: make_plan("sa-solver", VP, steps=n, grid="quadratic", tau=0.0, lower_order_final=False, **options),
    )


@pytest.mark.parametrize("tau", [0.0, 0.7, 2.0])
@pytest.mark.parametrize(("predictor", "corrector"), [(1, 0), (2, 0), (3, 0), (4, 0), (2, 2), (3, 4), (4, 1), (1, 4)])
def test_exact_on_polynomials_in_lam(predictor, corrector, tau):
    # the mean of the SDE solution, where x0 is a polynomial that both formulas integrate exactly
    degree = min(predictor, corrector or predictor) - 1
    p = np.polynomial.Polynomial([0.3, -0.2, 0.1, 0.05][: degree + 1])
    model = EpsModel(lambda x, t: torch.full_like(x, p(VP.lam(float(t[0])))), VP, "x0")
    plan = make_plan(
        "sa-solver",
        VP,
        steps=7,
        grid="quadratic",
        tau=tau,
        predictor_order=predictor,
        corrector_order=corrector,
        lower_order_final=False,
        **EVERYWHERE,
    )
    c, constants = 1 + tau**2, []

    def told(progress):  # d(e^(tau^2 lam) x / sigma) = c e^(c lam) x0 dlam
        lam, x = VP.lam(progress.t), float(progress.x)
        solved = math.exp(c * lam) * sum((-1 / c) ** k * p.deriv(k)(lam) for k in range(degree + 1))
        constants.append((x / VP.sigma(progress.t)) * math.exp(tau**2 * lam) - solved)

    x_T = torch.ones(1, 1, dtype=torch.float64)
    run_plan(plan, model, x_T, callback=told, noise_source=lambda k, like: torch.zeros_like(like))
    scale = math.exp(c * VP.lam(VP.t_min))
    exact = np.array(constants[degree:])  # before that there is no history of that many points
    assert np.abs(exact - exact[0]).max() < 1e-12 * scale


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("options", [{}, {"predictor_order": 2, "corrector_order": 0}, {"corrector_order": 2}])
@pytest.mark.parametrize("schedule", ["vp_linear", "cosine", "edm", "flow"], indirect=True)
def test_a_point_of_data_has_exact_moments_in_any_number_of_steps(schedule, tau, options):
    # x0 is constant there, so the drift is integrated exactly and the variance must be that of the noise
    nodes = np.linspace(0.8, 0.1, 5) * schedule.t_max
    plan = make_plan("sa-solver", schedule, timesteps=nodes, tau=tau, **EVERYWHERE, **options)
    mean, variance = moments_of_a_gaussian(plan, schedule, std=0.0)
    assert mean == pytest.approx(0.7 * schedule.alpha(nodes[-1]), rel=1e-10)
    assert variance == pytest.approx(schedule.sigma(nodes[-1]) ** 2, rel=1e-10)
    assert plan.noises == (4 if tau else 0)


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.5])
@pytest.mark.parametrize(("predictor", "corrector", "order"), [(1, 0, 1), (2, 0, 2), (3, 4, 2)])
def test_weak_order_on_a_gaussian(predictor, corrector, order, tau):
    errors = []
    for steps in (200, 400):
        options = {"predictor_order": predictor, "corrector_order": corrector, "lower_order_final": False}
        plan = make_plan("sa-solver", VP, steps=steps, grid="logsnr", tau=tau, **EVERYWHERE, **options)
        mean, variance = moments_of_a_gaussian(plan, VP)
        alpha, sigma = VP.alpha(VP.t_min), VP.sigma(VP.t_min)
        assert mean == pytest.approx(0.7 * alpha, rel=1e-12)
        errors.append(abs(variance - (alpha**2 * 0.25 + sigma**2)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


def test_noise_one_percent_too_large_misses_the_variance():
    plan = make_plan("sa-solver", VP, steps=400, **EVERYWHERE)
    louder = [
        s._replace(terms=tuple((name, c * (1.01 if name[0] == "z" else 1.0)) for name, c in s.terms))
        if isinstance(s, Combine)
        else s
        for s in plan.instructions
    ]
    exact, wrong = (moments_of_a_gaussian(p, VP)[1] for p in (plan, replace(plan, instructions=tuple(louder))))
    truth = VP.alpha(VP.t_min) ** 2 * 0.25 + VP.sigma(VP.t_min) ** 2
    assert abs(exact - truth) < 1e-4 < abs(wrong - truth)


# what it contains ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "where",
    [{"steps": 8, "grid": "logsnr"}, {"steps": 20, "grid": "logsnr"}, {"sigmas": [50.0, 9.0, 2.0, 0.5, 0.1, 0.0]}],
)
def test_without_noise_and_corrector_it_is_exponential_adams_bashforth(order, where):
    plan = make_plan("sa-solver", VP, tau=0.0, predictor_order=order, corrector_order=0, **where)
    assert plan.close(make_plan(f"eab-{order}", VP, predict="x0", **where))


@pytest.mark.parametrize("schedule", ["vp_linear", "cosine", "edm", "flow", "discrete"], indirect=True)
@pytest.mark.parametrize("final", ["t_min", "zero"])
def test_at_order_one_it_is_ddim_and_ddpm(schedule, final):
    where = {"steps": 6, "grid": "uniform", "final": final}
    first = {"predictor_order": 1, "corrector_order": 0, **EVERYWHERE}
    assert make_plan("sa-solver", schedule, tau=0.0, **first, **where).close(make_plan("ddim", schedule, **where))
    assert make_plan("sa-solver", schedule, tau=1.0, **first, **where).close(make_plan("ddpm", schedule, **where))
    assert not make_plan("sa-solver", schedule, tau=0.9, **first, **where).close(make_plan("ddpm", schedule, **where))


def test_published_weights_differ_at_order_two_only():
    def plans(**options):
        return (make_plan("sa-solver", VP, steps=6, weights=weights, **options) for weights in ("exact", "published"))

    exact, published = plans(predictor_order=1, corrector_order=1)
    assert exact == published
    for options in ({"predictor_order": 2, "corrector_order": 0}, {"predictor_order": 1, "corrector_order": 2}):
        exact, published = plans(**options)
        assert not exact.close(published, rtol=1e-3)


# the interval of noise -------------------------------------------------------------------------------------------


def noisy_steps(plan):
    return [s.node for s in plan.instructions if isinstance(s, Combine) and any(n[0] == "z" for n, _ in s.terms)]


def test_noise_is_added_on_steps_that_begin_in_the_interval():
    sigmas = [90.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1]
    assert noisy_steps(make_plan("sa-solver", VP, sigmas=sigmas)) == [3, 4, 5]
    assert noisy_steps(make_plan("sa-solver", VP, sigmas=sigmas, tau_start=9.0)) == [4, 5]
    assert noisy_steps(make_plan("sa-solver", VP, sigmas=sigmas, tau_end=0.2)) == [3, 4, 5, 6]
    assert noisy_steps(make_plan("sa-solver", VP, sigmas=sigmas, **EVERYWHERE)) == [1, 2, 3, 4, 5, 6]
    assert noisy_steps(make_plan("sa-solver", VP, sigmas=[*sigmas, 0.0], **EVERYWHERE)) == [1, 2, 3, 4, 5, 6]
    assert noisy_steps(make_plan("sa-solver", VP, sigmas=sigmas, tau=0.0)) == []


def test_the_default_interval_is_that_of_training_steps_200_to_800():
    table = SCHEDULE.sigma_bar(np.arange(1000.0))
    assert np.flatnonzero((table >= 0.72) & (table <= 25.8)).tolist() == list(range(200, 801))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 20])
@pytest.mark.parametrize("options", [{}, {"corrector_order": 0}, {"predictor_order": 4, "lower_order_final": False}])
def test_one_call_a_step_and_a_first_order_step_to_zero(steps, options):
    for schedule in (VP, COSINE, EDM, FLOW, schedules.from_betas(np.linspace(1e-4, 0.02, 1000))):
        plan = make_plan(
            "sa-solver", schedule, steps=steps, grid="uniform", final="zero", tau=1.0, **EVERYWHERE, **options
        )
        assert plan.nfe == steps
        assert plan.noises == (steps - 1 if schedule is not FLOW else max(steps - 2, 0))
        *_, last = plan.instructions
        assert [(name[0], coefficient) for name, coefficient in last.terms] == [("o", 1.0)]


# diffusers -------------------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("steps", [1, 2, 5, 16, 50])
@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize(("predictor", "corrector"), [(1, 1), (2, 2), (3, 3), (3, 4), (4, 2)])
def test_diffusers(mixture, steps, final, predictor, corrector):
    tau = 0.8
    made = scheduler(
        "SASolverScheduler",
        steps,
        predictor_order=predictor,
        corrector_order=corrector,
        lower_order_final=final,
        timestep_spacing="linspace",
        tau_func=lambda t: tau if 200 <= t <= 800 else 0.0,
    )
    model = EpsModel(mixture.net(SCHEDULE), SCHEDULE)
    times = made.timesteps.tolist()
    theirs = follow(made, model, X_T, generator=torch.Generator().manual_seed(1))
    ours = torch.Generator().manual_seed(1)
    drawn = [torch.randn(X_T.shape, generator=ours, dtype=X_T.dtype) for _ in times]  # they draw on every step
    used = [noise for noise, t in zip(drawn, times, strict=True) if 200 <= t <= 800]
    got = sample(
        model,
        "sa-solver",
        x_T=X_T,
        timesteps=[*times, 0],
        noise_source=lambda k, like: used[k],
        tau=tau,
        predictor_order=predictor,
        corrector_order=corrector,
        lower_order_final=final,
        weights="published",
    )
    assert_same(got, theirs, 1e-10)


# bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor_order": 0}, "predictor_order must be 1, 2, 3 or 4, got 0"),
        ({"predictor_order": 5}, "predictor_order must be 1, 2, 3 or 4, got 5"),
        ({"predictor_order": True}, "predictor_order must be 1, 2, 3 or 4, got True"),
        ({"corrector_order": -1}, r"corrector_order must be 0 \(none\), 1, 2, 3 or 4, got -1"),
        ({"corrector_order": 5}, "corrector_order must be 0"),
        ({"tau": -0.1}, r"tau must lie in \[0, 1000\], got -0.1"),
        ({"tau": math.nan}, r"tau must lie in \[0, 1000\], got nan"),
        ({"tau": math.inf}, r"tau must lie in \[0, 1000\], got inf"),
        (
            {"tau": lambda sigma: 1 if sigma > 1 else 0},
            r"tau must be a number or a function of sigma_bar .* array, got <",
        ),
        ({"tau": lambda: 1.0}, "tau must be a number or a function"),
        ({"tau": 10**400}, "tau must be a number or a function"),
        ({"tau_end": 30.0}, "tau_start and tau_end must satisfy 0 <= tau_end <= tau_start, got 25.8 and 30"),
        ({"tau_end": -1.0}, "tau_start and tau_end must satisfy"),
        ({"tau_start": math.nan}, "tau_start and tau_end must satisfy"),
        ({"weights": "exat"}, "unknown weights 'exat'; did you mean 'exact'"),
        ({"lower_order_final": -1}, "lower_order_final must be True, False or a step count, got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan("sa-solver", VP, steps=5, **options)


def test_large_tau_stays_finite():
    plan = make_plan("sa-solver", VP, steps=5, tau=1000.0, **EVERYWHERE)  # x0 and fresh noise at every node
    assert moments_of_a_gaussian(plan, VP, std=0.0)[1] == pytest.approx(VP.sigma(VP.t_min) ** 2, rel=1e-9)


def test_tau_may_be_a_function_of_sigma_bar():
    options = {"tau_start": math.inf, "tau_end": 0.0, "steps": 6, "grid": "logsnr"}
    number, constant = (make_plan("sa-solver", VP, tau=tau, **options) for tau in (0.7, lambda s: np.full(len(s), 0.7)))
    assert constant == number
    seen = []
    ramp = make_plan("sa-solver", VP, tau=lambda s: seen.append(s) or np.where(s > 1.0, 1.0, 0.0), **options)
    sigma_bar = VP.sigma_bar(np.array(ramp.times[:-1]))
    np.testing.assert_allclose(seen[0], sigma_bar)
    assert ramp.noises == (sigma_bar > 1.0).sum()
    assert ramp == make_plan("sa-solver", VP, **{**options, "tau_end": 1.0})


@pytest.mark.parametrize(
    ("tau", "message"),
    [
        (lambda s: s[:2], r"tau must give a value for each of 6 steps, got shape \(2,\)"),
        (lambda s: -s, r"tau must lie in \[0, 1000\], got \[-"),
        (lambda s: None, "^tau must be a number or a function of sigma_bar .*, got <.*>, which gives None$"),
        (lambda s: "0.5", "^tau must be a number or a function of sigma_bar .*, got <.*>, which gives '0.5'$"),
        (lambda s: [None] * 6, r"^tau must .*, got <.*>, which gives \[None, None"),
        (lambda s: 1j * s, "^tau must .*, got <.*>, which gives array"),
        (lambda s: 1 / 0, "^tau must .*, got <.*>: ZeroDivisionError: division by zero$"),
        (lambda s: {}["s"], "^tau must .*, got <.*>: KeyError: 's'$"),
        (lambda s: torch.ones(6, requires_grad=True), "^tau must .*, got <.*>: RuntimeError: Can't call numpy"),
        (lambda s: s * math.nan, r"tau must lie in \[0, 1000\], got \[nan"),
    ],
)
def test_a_function_for_tau_is_checked(tau, message):
    with pytest.raises(ValueError, match=message):
        make_plan("sa-solver", VP, tau=tau, steps=6)


def test_what_a_function_for_tau_raised_is_the_cause():
    with pytest.raises(ValueError, match="tau must be") as error:
        make_plan("sa-solver", VP, tau=lambda s: 1 / 0, steps=6)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_only_tau_may_be_a_function():
    with pytest.raises(TypeError, match="tau_end of sampler 'sa-solver' must be like its default"):
        make_plan("sa-solver", VP, tau_end=lambda s: s, steps=6)
