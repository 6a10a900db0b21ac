"""Restart sampling and multistep consistency sampling: what they compute, their calls, and their marginals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from test_solvers import EDM, FLOW, VP

from bench.certify.gaussian import moments as moments_of_a_gaussian
from bench.certify.problem import MIXTURE, network
from samplers import EpsModel, make_plan, run_plan, sample, schedules
from samplers.program import Combine, Evaluate

X_T = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SIGMAS = [80.0, 20.0, 5.0, 1.0, 0.2, 0.05, 0.02]


def noise(k, like):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(100 + k), dtype=like.dtype)


# restart ---------------------------------------------------------------------------------------------------------


def karras(low, high, steps):
    return np.linspace(high ** (1 / 7), low ** (1 / 7), steps + 1) ** 7


def restart_by_hand(model, y, sigmas, low, high, repeats, steps, s_noise):
    """The paper's algorithm in y = x / alpha, on the sigma_bar nodes."""
    schedule, drawn = model.schedule, iter(range(100))

    def slope(y, sigma):
        t = float(schedule.t_of_lam(-math.log(sigma)))
        return model(schedule.alpha(t) * y, t)

    def heun(y, nodes):
        for now, after in itertools.pairwise(nodes):
            d = slope(y, now)
            predicted = y + (after - now) * d
            y = predicted if after == 0 else y + (after - now) * (d + slope(predicted, after)) / 2
        return y

    for now, after in itertools.pairwise(sigmas):
        y = heun(y, [now, after])
        if after == low:
            for _ in range(repeats):
                y = y + s_noise * math.sqrt(high**2 - low**2) * noise(next(drawn), y)
                y = heun(y, karras(low, high, steps))
    return y


@pytest.mark.parametrize("schedule", ["vp_linear", "edm", "discrete"], indirect=True)
@pytest.mark.parametrize("end", [[], [0.0]])
@pytest.mark.parametrize(("low", "high", "repeats", "steps"), [(1.0, 5.0, 3, 2), (0.2, 30.0, 1, 4), (0.05, 0.3, 2, 1)])
def test_restart_is_the_papers_algorithm(exact, schedule, end, low, high, repeats, steps):
    sigmas = [*SIGMAS, *end]
    model, alpha = exact(schedule), [schedule.alpha(schedule.t_of_lam(-math.log(s))) if s else 1.0 for s in sigmas]
    got = sample(
        model,
        "restart",
        x_T=alpha[0] * 80 * X_T,
        sigmas=sigmas,
        restarts=[(1.1 * low, high, repeats, steps)],
        s_noise=1.003,
        noise_source=noise,
    )
    expected = alpha[-1] * restart_by_hand(model, 80 * X_T, sigmas, low, high, repeats, steps, 1.003)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_the_published_interval_is_the_default():
    # Xu et al. 2023, table 3: CIFAR-10 with 18 steps of EDM's grid and NFE 43
    plan = make_plan("restart", EDM, steps=18, grid="edm")
    assert plan.nfe == 43
    assert plan.noises == 2
    assert plan == make_plan("restart", EDM, steps=18, grid="edm", restarts=[(0.06, 0.30, 2, 2)])
    assert make_plan("restart", EDM, steps=36, grid="edm", restarts=IMAGENET).nfe == 203


IMAGENET = [(19.35, 40.79, 1, 3), (1.09, 1.92, 1, 3), (0.59, 1.09, 5, 3), (0.30, 0.59, 5, 3), (0.06, 0.30, 6, 5)]


def test_two_restarts_at_one_node_follow_each_other():
    twice = make_plan("restart", VP, sigmas=SIGMAS, restarts=[(1.0, 5.0, 1, 2), (1.0, 5.0, 1, 2)])
    assert twice == make_plan("restart", VP, sigmas=SIGMAS, restarts=[(1.0, 5.0, 2, 2)])


def test_no_restart_is_heun():
    for schedule in (VP, EDM, FLOW):
        for final in ("t_min", "zero"):
            where = {"steps": 7, "grid": "uniform", "final": final}
            assert make_plan("restart", schedule, restarts=(), **where) == make_plan("heun", schedule, **where)
    where = {"sigmas": [80.0, 20.0, 5.0, 1.0]}  # ends above the published interval
    assert make_plan("restart", VP, **where) == make_plan("heun", VP, **where)
    assert make_plan("restart", EDM, steps=1, final="zero").nfe == 1


def test_without_noise_a_restart_is_not_nothing():
    quiet = make_plan("restart", VP, sigmas=SIGMAS, s_noise=0.0)
    assert not quiet.stochastic
    assert quiet.nfe == 2 * 6 + 8


def test_nodes_are_told_once_and_in_order(exact):
    told = []
    x_T = 80 * VP.alpha(VP.t_of_lam(-math.log(80.0))) * X_T
    sample(exact(VP), "restart", x_T=x_T, sigmas=SIGMAS, restarts=[(1.0, 5.0, 2, 1)], callback=told.append)
    assert [p.step for p in told] == [1, 2, 3, 4, 5, 6]
    assert [p.nfe for p in told] == [2, 4, 10, 12, 14, 16]


@pytest.mark.parametrize("final", ["t_min", "zero", "denoise"])
def test_a_budget_takes_the_most_steps_that_fit(final):
    where = {"grid": "karras", "final": final}
    sizes = [make_plan("restart", EDM, steps=n, **where).nfe for n in range(1, 30)]
    for nfe in range(1, 50):
        fitting = [n for n, size in enumerate(sizes, 1) if size <= nfe]
        if fitting:
            plan = make_plan("restart", EDM, nfe=nfe, **where)
            assert plan == make_plan("restart", EDM, steps=fitting[-1], **where)
        else:
            with pytest.raises(ValueError, match=f"nfe must be at least {sizes[0]} for 'restart' here, got {nfe}"):
                make_plan("restart", EDM, nfe=nfe, **where)


@pytest.mark.parametrize("schedule", ["vp_linear", "edm"], indirect=True)
def test_moments_of_a_gaussian_under_restart(schedule):
    errors = []
    for n in (40, 80):
        plan = make_plan("restart", schedule, steps=n, restarts=[(0.3, 2.0, 3, n // 4)])
        mean, variance = moments_of_a_gaussian(plan, schedule)
        alpha, sigma = schedule.alpha(schedule.t_min), schedule.sigma(schedule.t_min)
        errors.append((abs(mean - alpha * 0.7), abs(variance - (alpha**2 * 0.25 + sigma**2))))
    for coarse, fine in zip(*errors, strict=True):
        assert fine < 1e-3
        assert fine < 0.35 * coarse or fine < 1e-9  # second order


def test_restarts_contract_errors_made_before(exact):
    def run(x_T, restarts):
        return sample(exact(EDM), "restart", x_T=x_T, steps=30, restarts=restarts, seed=1)

    apart = [
        float((run(80 * X_T, restarts) - run(80 * X_T + 4.0, restarts)).norm())
        for restarts in ((), [(0.3, 2.0, 1, 8)], [(0.3, 2.0, 4, 8)])
    ]
    assert apart[0] > 1.5 * apart[1] > 1.5**2 * apart[2] > 0


def test_samples_of_the_mixture_have_its_moments():
    n, variance = 2048, MIXTURE.covariance().diag().max()
    x_T = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = sample(EpsModel(network(VP), VP), "restart", x_T=x_T, steps=60, restarts=[(0.3, 3.0, 3, 10)], seed=5)
    assert (x.mean(0) - MIXTURE.mean()).abs().max() < 4 * (variance / n) ** 0.5
    assert (x.T.cov() - MIXTURE.covariance()).abs().max() < 4 * variance * (2 / n) ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"s_noise": -1.0}, "s_noise must be finite and at least 0, got -1"),
        ({"s_noise": math.nan}, "s_noise must be finite and at least 0, got nan"),
        (
            {"restarts": [(0.3, 0.1, 1, 1)]},
            r"restarts\[0\] must be \(sigma_lo, sigma_hi, repeats, steps\) with 0 <= sigma_lo",
        ),
        ({"restarts": [(0.1, math.inf, 1, 1)]}, r"restarts\[0\] must be"),
        ({"restarts": [(0.1, 2e6, 1, 1)]}, r"restarts\[0\] must be .* sigma_lo < sigma_hi <= 1e\+06 and"),
        ({"restarts": [(0.1, 0.3, 0, 1)]}, r"restarts\[0\] must be .* counts from 1 to 1000, got \(0.1, 0.3, 0, 1\)"),
        ({"restarts": [(1.0, 5.0, 1, 1), (0.1, 0.3, 1, 1.5)]}, r"restarts\[1\] must be"),
        ({"restarts": [(0.1, 0.3, True, 1)]}, r"restarts\[0\] must be"),
        ({"restarts": [(0.1, 0.3)]}, r"restarts\[0\] must be .* got \(0.1, 0.3\)"),
        ({"restarts": ""}, "restarts must be a sequence of .* got ''"),
        ({"restarts": 5}, r"restarts must be a sequence of .* got 5"),
        ({"restarts": [0.1]}, r"restarts\[0\] must be .* got 0.1"),
        ({"restarts": [("a", "b", 1, 1)]}, r"restarts\[0\] must be"),
        (
            {"restarts": [(0.9, 0.95, 1, 1)]},
            r"restarts\[0\] does not fit .* nearest to sigma_lo=0.9 is at 1 and .* sigma_hi=0.95",
        ),
        ({"restarts": [(1.0, 90.0, 1, 1)]}, r"restarts\[0\] does not fit into the grid: .* the first at 80"),
    ],
)
def test_bad_restarts(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan("restart", VP, sigmas=SIGMAS, **options)


# consistency -----------------------------------------------------------------------------------------------------


def consistency_model(schedule, end, mean=0.7, std=0.5):
    """The exact consistency function of data N(mean, std^2): from any time to sigma_bar = end, over alpha."""

    def x0(x, t):
        alpha, sigma = (f(t.double())[:, None] for f in (schedule.alpha, schedule.sigma))
        away = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2).sqrt()
        return mean + math.hypot(std, end) * away

    return EpsModel(x0, schedule, "x0")


@pytest.mark.parametrize("schedule", ["vp_linear", "edm", "flow", "zero_snr"], indirect=True)
@pytest.mark.parametrize("final", ["t_min", "zero"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_an_exact_consistency_model_keeps_the_marginals(schedule, final, steps):
    plan = make_plan("consistency", schedule, steps=steps, grid="uniform", final=final)
    end = 0.0 if final == "zero" else float(schedule.sigma_bar(schedule.t_min))
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    alpha, sigma = float(schedule.alpha(schedule.t_max)), float(schedule.sigma(schedule.t_max))
    start = alpha * (0.7 + 0.5 * torch.randn(n, 1, generator=generator, dtype=torch.float64))
    start += sigma * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    told = []

    def check(progress):
        told.append(progress.step)
        a, s = float(schedule.alpha(progress.t)), float(schedule.sigma(progress.t))
        variance = a**2 * 0.25 + s**2
        assert abs(float(progress.x.mean()) - 0.7 * a) < 4 * math.sqrt(variance / n)
        assert abs(float(progress.x.var()) - variance) < 4 * variance * math.sqrt(2 / n)

    run_plan(plan, consistency_model(schedule, end), start, callback=check)
    assert told == list(range(1, steps + 1))
    assert plan.nfe == steps
    assert plan.noises == steps - 1


def test_rounding_is_no_noise_in_the_last_step():
    end = VP.t_min + np.arange(40) / 100
    assert (VP.alpha(end) * (VP.sigma(end) / VP.alpha(end)) != VP.sigma(end)).any()  # it does round
    for t in end:
        plan = make_plan("consistency", VP, timesteps=[1.0, 0.5 * (1.0 + t), t])
        assert plan.noises == 1
        assert [len(step.terms) for step in plan.instructions if isinstance(step, Combine)] == [2, 1]


def test_consistency_forgets_the_state_at_every_step():
    plan = make_plan("consistency", FLOW, steps=4)
    for step in plan.instructions:
        if isinstance(step, Combine):
            assert [name[0] for name, _ in step.terms] == (["o"] if step.node == 4 else ["o", "z"])
        elif isinstance(step, Evaluate):
            assert step.kind == "x0"


@pytest.mark.parity
def test_consistency_is_diffusers():
    from diffusers import CMStochasticIterativeScheduler

    made = CMStochasticIterativeScheduler(num_train_timesteps=40, clip_denoised=False)
    made.set_timesteps(timesteps=[30, 20, 10, 3])
    made.sigmas = made.sigmas.double()
    made.sigmas[-1] = 0.002  # rounded to float32 it leaves them noise of deviation 6e-7 in the last step
    sigmas = made.sigmas[:4].tolist()
    model = consistency_model(schedules.edm(), 0.002)
    ours, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    x = x_T = sigmas[0] * X_T
    for t, sigma in zip(made.timesteps, sigmas, strict=True):
        made.scale_model_input(x, t)
        skip, out = made.get_scalings_for_boundary_condition(
            torch.tensor(sigma, dtype=torch.float64)
        )  # they are the model's matter here
        raw = (model.x0(x, sigma) - skip * x) / out
        x = made.step(raw, t, x, generator=theirs).prev_sample
    got = sample(
        model,
        "consistency",
        x_T=x_T,
        sigmas=[*sigmas, 0.002],
        noise_source=lambda k, like: torch.randn(like.shape, generator=ours, dtype=like.dtype),
    )
    difference = float((got - x).abs().max())
    assert difference < 1e-10, f"differs by {difference:g}"
