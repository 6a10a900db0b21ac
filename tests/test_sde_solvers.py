"""Ancestral samplers, churn and exponential integrators of the reverse SDEs: identities, noises, moments, strong order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from samplers import make_plan, run_plan, schedules
from samplers.program import Combine, Evaluate

VP, COSINE, EDM, FLOW = schedules.vp_linear(), schedules.cosine(), schedules.edm(), schedules.flow()
X_T = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FULL = {"lower_order_final": False}
STOCHASTIC = [
    ("euler-ancestral", {}),
    ("dpm2-ancestral", {}),
    ("dpmpp-2s", {"eta": 1.0}),
    ("edm", {"s_churn": 4.0}),
    ("dpmpp-sde", {}),
    ("dpmpp-2m-sde", {}),
    ("dpmpp-2m-sde", {"predict": "eps"}),
    ("dpmpp-3m-sde", {}),
    ("seeds", {}),
    ("seeds", {"order": 2}),
    ("seeds", {"order": 1}),
    ("seeds", {"predict": "x0"}),
]


def evaluations(plan):
    return [s for s in plan.instructions if isinstance(s, Evaluate)]


# identities ------------------------------------------------------------------------------------------------------


SAME = [
    ("dpm2", {}, "dpm-solver-2s", {}),
    ("dpm2-ancestral", {"eta": 0.0}, "dpm2", {}),
    ("dpmpp-sde", {"eta": 0.0}, "dpmpp-2s", {}),
    ("dpmpp-sde", {"eta": 0.0, "r1": 0.3}, "dpmpp-2s", {"r1": 0.3}),
    ("dpmpp-2m-sde", {"eta": 0.0}, "dpmpp-2m", {}),
    ("dpmpp-2m-sde", {"eta": 0.0, "solver_type": "heun"}, "dpmpp-2m", {"solver_type": "heun"}),
    ("dpmpp-2m-sde", {"eta": 0.0, "predict": "eps"}, "dpm-solver-2m", {}),
    ("dpmpp-2m-sde", {"eta": 0.0, "predict": "eps", "solver_type": "heun"}, "eab-2", {"predict": "eps"}),
    ("dpmpp-3m-sde", {"eta": 0.0}, "dpmpp-3m", {"solver_type": "heun"}),
    ("dpmpp-3m-sde", {"eta": 0.0, "weights": "exact"}, "eab-3", {}),
    ("seeds", {"eta": 0.0}, "dpm-solver-3s", {}),
    ("seeds", {"eta": 0.0, "r1": 0.2, "r2": 0.7}, "dpm-solver-3s", {"r1": 0.2, "r2": 0.7}),
    ("seeds", {"eta": 0.0, "predict": "x0"}, "dpmpp-3s", {}),
    ("seeds", {"eta": 0.0, "order": 2, "r1": 0.3}, "dpm-solver-2s", {"r1": 0.3}),
    ("seeds", {"eta": 0.0, "order": 2, "predict": "x0"}, "dpmpp-2s", {}),
    ("seeds", {"eta": 0.0, "order": 1}, "ddim", {}),
    ("seeds", {"order": 1, "predict": "x0"}, "euler-ancestral", {}),
    ("seeds", {"order": 1, "predict": "x0"}, "ddim", {"eta": 1.0}),
    ("edm", {}, "heun", {}),
    ("edm", {"s_churn": 40.0, "s_tmin": 1e6}, "heun", {}),
]


@pytest.mark.parametrize(("a", "of_a", "b", "of_b"), SAME)
@pytest.mark.parametrize("final", ["t_min", "zero"])
@pytest.mark.parametrize("schedule", ["vp_linear", "edm", "discrete"], indirect=True)
def test_samplers_that_are_one(schedule, final, a, of_a, b, of_b):
    plans = [
        make_plan(name, schedule, steps=7, grid="uniform", final=final, **options)
        for name, options in ((a, of_a), (b, of_b))
    ]
    assert plans[0].close(plans[1], rtol=1e-12)


def test_edm_without_churn_is_heun_to_the_bit():
    assert make_plan("edm", VP, steps=6) == make_plan("heun", VP, steps=6)


@pytest.mark.parametrize(("name", "options"), STOCHASTIC)
@pytest.mark.parametrize("off", [{"eta": 0.0}, {"s_noise": 0.0}])
def test_without_noise_none_is_drawn(name, options, off):
    if name == "edm" and "eta" in off:
        off = {"s_churn": 0.0}
    assert make_plan(name, VP, steps=5, **options).stochastic
    assert not make_plan(name, VP, steps=5, **{**options, **off}).stochastic


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("schedule", ["vp_linear", "edm", "discrete"], indirect=True)
def test_sde_dpm_solver_of_first_order_is_seeds_1(schedule, eta):
    """A run of one step, and the last step of a longer one where the order is lowered there."""
    one = [
        make_plan(name, schedule, steps=1, grid="uniform", predict="eps", eta=eta, **order)
        for name, order in (("dpmpp-2m-sde", {}), ("seeds", {"order": 1}))
    ]
    assert one[0].close(one[1], rtol=1e-12)
    long = [
        make_plan(name, schedule, steps=5, grid="uniform", predict="eps", eta=eta, **order)
        for name, order in (("dpmpp-2m-sde", {}), ("seeds", {"order": 1}))
    ]
    ends = [[c for _, c in plan.instructions[-1].terms] for plan in long]
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-12)


def test_sde_dpm_solver_2m_is_the_papers_step():
    """Lu et al. 2022, arXiv:2211.01095: eta = 1, "midpoint", in its own letters."""
    nodes = [0.9, 0.6, 0.4]
    plan = make_plan("dpmpp-2m-sde", VP, timesteps=nodes, predict="eps", lower_order_final=False)
    lam, alpha, sigma = (f(np.array(nodes)) for f in (VP.lam, VP.alpha, VP.sigma))
    h_0, h = np.diff(lam)
    d_1 = sigma[2] * math.expm1(h) * h / h_0
    got = dict(plan.instructions[-1].terms)
    expected = [alpha[2] / alpha[1], -2 * sigma[2] * math.expm1(h) - d_1, d_1, sigma[2] * math.sqrt(math.expm1(2 * h))]
    np.testing.assert_allclose(list(got.values()), expected, rtol=1e-12)


# noises ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), STOCHASTIC)
@pytest.mark.parametrize("schedule", ["vp_linear", "flow", "zero_snr"], indirect=True)
def test_every_noise_that_is_drawn_is_used(exact, schedule, name, options):
    """And none on a step to sigma = 0, but for churn, which comes before it, nor on one from alpha = 0."""
    for steps in (1, 2, 3, 6):
        plan = make_plan(name, schedule, steps=steps, grid="uniform", final="zero", **options)
        at_noise = int(schedule.alpha(schedule.t_max) == 0)
        noisy = steps - 1 if name == "edm" else max(steps - 1 - at_noise, 0)  # edm: none at sigma_max
        calls = options.get("order", 3) if name == "seeds" else 2 if name == "dpmpp-sde" else 1
        assert plan.noises == noisy * calls
        drawn = []
        x_T = torch.ones(2, 2, dtype=torch.float64)
        run_plan(
            plan, exact(schedule, "v"), x_T, noise_source=lambda k, like, d=drawn: d.append(k) or torch.ones_like(like)
        )
        assert drawn == list(range(plan.noises))


def noise_covariance(plan, schedule):
    """Covariance of the states that the first step evaluates or ends in, as far as its noises make them, per alpha^2."""
    matrix, calls = plan.matrix(), evaluations(plan)
    alphas = np.array([call.alpha for call in calls[1:]] + [schedule.alpha(plan.times[-1])])
    rows = matrix[1:, 1 + plan.nfe :] / alphas[:, None]
    bars = np.array([call.sigma / call.alpha for call in calls] + [schedule.sigma_bar(plan.times[-1])])
    return rows @ rows.T, bars


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize(("r1", "r2"), [(None, None), (0.15, 0.8), (0.5, 1.0)])
@pytest.mark.parametrize("schedule", ["vp_linear", "edm", "discrete"], indirect=True)
def test_noises_of_seeds_are_ito_integrals_of_one_path(schedule, eta, r1, r2):
    nodes = [0.8 * schedule.t_max, 0.3 * schedule.t_max]
    for predict in ("eps", "x0"):
        options = {"predict": predict, "eta": eta, "r1": r1, "r2": r2}
        got, bars = noise_covariance(make_plan("seeds", schedule, timesteps=nodes, **options), schedule)
        now, rest = bars[0], bars[1:]
        early = np.maximum.outer(rest, rest)  # the earlier of two points
        if predict == "eps":  # dy = ... + sqrt(2 eta s) dW over s = sigma_bar
            expected = eta * (now**2 - early**2)
        else:  # the same, and x0 = (y - s eps): dy = (1 + eta) y ds / s + ..., of solution y ~ s^(1 + eta)
            expected = np.multiply.outer(rest, rest) ** (1 + eta) * (early ** (-2 * eta) - now ** (-2 * eta))
        np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.parametrize("r1", [0.5, 0.3, 1.0])
def test_noises_of_dpmpp_sde_are_increments_of_one_path_over_sigma(r1):
    plan = make_plan("dpmpp-sde", VP, timesteps=[0.8, 0.3], r1=r1)
    got, (now, mid, after) = noise_covariance(plan, VP)
    up = [to * math.sqrt(1 - (to / now) ** 2) for to in (mid, after)]
    overlap = (now - mid) / math.sqrt(
        (now - mid) * (now - after)
    )  # of W(now) - W(mid) and W(now) - W(after), normalised
    expected = [[up[0] ** 2, up[0] * up[1] * overlap], [up[0] * up[1] * overlap, up[1] ** 2]]
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_dpmpp_sde_becomes_seeds_as_steps_shrink():
    """They differ in the overlap of two noises, which is r1 in both as h goes to 0."""
    differences = []
    for n in (100, 200, 400):
        where = {"steps": n, "grid": "logsnr"}
        a, b = make_plan("dpmpp-sde", VP, **where), make_plan("seeds", VP, **where, order=2, predict="x0")
        assert a.matrix().shape == b.matrix().shape
        differences.append(np.abs(noise_step(a) - noise_step(b)).max())
        # but for the noises they are one method
        quiet = [
            make_plan(name, VP, **where, s_noise=0.0, **o)
            for name, o in (("dpmpp-sde", {}), ("seeds", {"order": 2, "predict": "x0"}))
        ]
        assert quiet[0].close(quiet[1])
    assert differences[1] < 0.4 * differences[0]
    assert differences[2] < 0.4 * differences[1]


def noise_step(plan):
    """Coefficients on the noises in every Combine."""
    return np.array([c for s in plan.instructions if isinstance(s, Combine) for n, c in s.terms if n[0] == "z"])


# moments and paths on a Gaussian ---------------------------------------------------------------------------------

MEAN, STD = 0.7, 0.5


def response(plan):
    """The result for data N(MEAN, STD^2) as coefficients on (x_T, noises..., 1): every value is affine in them."""
    unit = np.eye(2 + plan.noises)
    values = {"x_T": unit[0], **{f"z{k}": unit[1 + k] for k in range(plan.noises)}}
    for step in plan.instructions:
        if isinstance(step, Evaluate):
            away = values[step.src] - step.alpha * MEAN * unit[-1]
            eps = step.sigma / (step.alpha**2 * STD**2 + step.sigma**2) * away
            x0 = MEAN * unit[-1] + step.alpha * STD**2 / (step.alpha**2 * STD**2 + step.sigma**2) * away
            values[step.dst] = eps if step.kind == "eps" else x0
        else:
            values[step.dst] = sum(c * values[name] for name, c in step.terms)
    return values[plan.instructions[-1].dst]


def variance(schedule, t):
    return float(schedule.alpha(t)) ** 2 * STD**2 + float(schedule.sigma(t)) ** 2


def conditional_mean(schedule, eta):
    """d E[x | x_T] / d x_T under the reverse SDE: y - MEAN shrinks as ((STD^2 + s^2)^((1 + eta) / 2)."""
    start, stop = (variance(schedule, t) / float(schedule.alpha(t)) ** 2 for t in (schedule.t_max, schedule.t_min))
    return float(schedule.alpha(schedule.t_min) / schedule.alpha(schedule.t_max)) * (stop / start) ** ((1 + eta) / 2)


def at_least(order, errors):
    return all(math.log2(a / b) > order - 0.15 for a, b in itertools.pairwise(errors))


WEAK = [  # name, options, order of the variance, order of the mean given the start, eta of the SDE (None: not measured)
    ("euler-ancestral", {}, 1, None, 1.0),
    ("euler-ancestral", {"eta": 0.6}, 1, 1, 0.36),  # eta of an ancestral step is the square root of that of the SDE
    ("dpm2-ancestral", {}, 2, 1, 1.0),
    ("dpmpp-2s", {"eta": 1.0}, 2, 1, 1.0),
    ("dpmpp-2s", {"eta": 1.0, "solver_type": "heun", "r1": 0.3}, 2, 1, 1.0),
    ("dpmpp-sde", {}, 2, None, 1.0),
    ("dpmpp-sde", {"eta": 0.6}, 2, 1, 0.36),
    ("dpmpp-2m-sde", {**FULL}, 2, None, 1.0),
    ("dpmpp-2m-sde", {**FULL, "eta": 0.5, "solver_type": "heun"}, 2, 2, 0.5),
    ("dpmpp-2m-sde", {**FULL, "eta": 0.5}, 2, 2, 0.5),
    ("dpmpp-2m-sde", {**FULL, "predict": "eps"}, 2, 2, 1.0),
    ("dpmpp-2m-sde", {**FULL, "predict": "eps", "eta": 0.5, "solver_type": "heun"}, 2, 2, 0.5),
    ("dpmpp-3m-sde", {**FULL, "eta": 0.5}, 2, 2, 0.5),
    ("dpmpp-3m-sde", {**FULL, "eta": 0.5, "weights": "exact"}, 2, 3, 0.5),
    ("seeds", {"order": 1}, 1, 1, 1.0),
    ("seeds", {"order": 2}, 2, 2, 1.0),
    ("seeds", {}, 2, 3, 1.0),
    ("seeds", {"eta": 0.5, "r1": 0.2}, 2, 3, 0.5),
    ("seeds", {"order": 2, "predict": "x0"}, 2, None, 1.0),
    ("seeds", {"order": 3, "predict": "x0", "eta": 0.5}, 2, 3, 0.5),
]


@pytest.mark.parametrize(("name", "options", "of_variance", "of_mean", "eta"), WEAK)
@pytest.mark.parametrize("schedule", ["vp_linear", "edm"], indirect=True)
def test_order_of_variance_and_mean(schedule, name, options, of_variance, of_mean, eta):
    variances, means = [], []
    for steps in (100, 200, 400):
        row = response(make_plan(name, schedule, steps=steps, grid="logsnr", **options))
        got = row[0] ** 2 * variance(schedule, schedule.t_max) + (row[1:-1] ** 2).sum()
        variances.append(abs(got - variance(schedule, schedule.t_min)))
        means.append(abs(row[0] / conditional_mean(schedule, eta) - 1))
    assert at_least(of_variance, variances)
    if (
        of_mean is None
    ):  # under the reverse SDE of eta = 1 the mean of x0 given the state does not change: x0 methods are exact
        assert max(means) < 1e-9
    else:
        assert at_least(of_mean, means)
        if of_mean < 3:
            assert not at_least(of_mean + 1, means)


@pytest.mark.parametrize("name", ["dpmpp-sde", "seeds"])
def test_independent_noises_within_a_step_cost_an_order(name):
    """What the overlap is for; the singlestep SDE scheduler of diffusers draws its noises this way."""
    options = {"order": 2, "predict": "x0"} if name == "seeds" else {}

    def severed(plan):
        instructions = []
        for step in plan.instructions:
            if isinstance(step, Combine) and step.node is not None:
                noises = [(n, c) for n, c in step.terms if n[0] == "z"]
                rest = tuple((n, c) for n, c in step.terms if n[0] != "z")
                step = step._replace(terms=(*rest, (noises[-1][0], math.hypot(*(c for _, c in noises)))))
            instructions.append(step)
        return type(plan)(tuple(instructions), plan.times, plan.prediction, plan.sigma_T)

    errors = []
    for steps in (100, 200, 400):
        row = response(severed(make_plan(name, VP, steps=steps, grid="logsnr", **options)))
        got = row[0] ** 2 * variance(VP, VP.t_max) + (row[1:-1] ** 2).sum()
        errors.append(abs(got - variance(VP, VP.t_min)))
    assert at_least(1, errors)
    assert not at_least(1.3, errors)


def test_churn_keeps_the_variance():
    """Heun's method with churn: the noise leads to the right marginal, and the rest is Heun's error."""
    errors = []
    for steps in (200, 400, 800):
        row = response(make_plan("edm", EDM, steps=steps, grid="logsnr", s_churn=20.0))
        got = row[0] ** 2 * variance(EDM, EDM.t_max) + (row[1:-1] ** 2).sum()
        errors.append(abs(got - variance(EDM, EDM.t_min)))
    assert at_least(1.8, errors)
    half = response(make_plan("edm", EDM, steps=200, grid="logsnr", s_churn=20.0, s_noise=0.5))
    assert abs(half[0] ** 2 * variance(EDM, EDM.t_max) + (half[1:-1] ** 2).sum() - variance(EDM, EDM.t_min)) > 0.01


CLOCKS = [  # the variable over which the noises are increments of a Brownian path
    ("euler-ancestral", {}, lambda lam: np.exp(2 * lam)),
    ("dpm2-ancestral", {}, lambda lam: np.exp(2 * lam)),
    ("dpmpp-2s", {"eta": 1.0}, lambda lam: np.exp(2 * lam)),
    ("dpmpp-sde", {}, lambda lam: -np.exp(-lam)),
    ("dpmpp-2m-sde", {**FULL}, lambda lam: np.exp(2 * lam)),
    ("dpmpp-2m-sde", {**FULL, "eta": 0.5}, lambda lam: np.exp(lam)),
    ("dpmpp-2m-sde", {**FULL, "predict": "eps"}, lambda lam: -np.exp(-2 * lam)),
    ("dpmpp-3m-sde", {**FULL}, lambda lam: np.exp(2 * lam)),
    ("seeds", {"order": 1}, lambda lam: -np.exp(-2 * lam)),
    ("seeds", {"order": 2}, lambda lam: -np.exp(-2 * lam)),
    ("seeds", {}, lambda lam: -np.exp(-2 * lam)),
    ("seeds", {"predict": "x0", "eta": 0.5}, lambda lam: np.exp(lam)),
]


@pytest.mark.parametrize(("name", "options", "clock"), CLOCKS)
def test_strong_order_is_one(name, options, clock):
    """Root mean square of the difference between n and 2n steps on one Brownian path, exact: no sampling.

    On a grid uniform in lam every noise of n steps belongs to a stretch of equal length in lam, which two noises of 2n steps
    divide.
    """
    differences = []
    for steps in (50, 100, 200):
        coarse, fine = (response(make_plan(name, EDM, steps=n, grid="logsnr", **options)) for n in (steps, 2 * steps))
        stretches = len(coarse) - 2
        assert len(fine) - 2 == 2 * stretches
        times = clock(np.linspace(float(EDM.lam(EDM.t_max)), float(EDM.lam(EDM.t_min)), 2 * stretches + 1))
        first = np.sqrt((times[1::2] - times[:-2:2]) / (times[2::2] - times[:-2:2]))
        shared = np.stack([coarse[1:-1] * first, coarse[1:-1] * np.sqrt(1 - first**2)], axis=-1).ravel()
        differences.append(
            math.sqrt((coarse[0] - fine[0]) ** 2 * variance(EDM, EDM.t_max) + ((shared - fine[1:-1]) ** 2).sum())
        )
    assert at_least(1, differences)
    assert not at_least(1.3, differences)


def test_churn_has_its_published_bound_and_no_other():
    most = make_plan("edm", EDM, steps=20, s_churn=1e5)
    assert most == make_plan("edm", EDM, steps=20, s_churn=20.0)  # gamma = sqrt(2) - 1 from 8.3 on


# churn -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["vp_linear", "cosine", "edm", "flow", "discrete", "zero_snr"], indirect=True)
def test_churn_stays_within_the_schedule(schedule):
    nodes = np.linspace(0.99, 0.2, 6) * schedule.t_max
    times = [s.t for s in evaluations(make_plan("edm", schedule, timesteps=nodes, s_churn=1e3))]
    assert max(times) <= schedule.t_max * (1 + 1e-12)
    assert times[0] > nodes[0]
    if schedule.alpha(schedule.t_max) > 0:  # a first step from t_max has no churn
        plan = make_plan("edm", schedule, timesteps=[schedule.t_max, *nodes], s_churn=1e3)
        assert evaluations(plan)[0].t == schedule.t_max
        assert plan.noises == 5


@pytest.mark.parametrize(("name", "options"), [("dpm2-ancestral", {"eta": 1.7}), ("dpmpp-2s", {"eta": 1.7, "r1": 1.0})])
@pytest.mark.parametrize("schedule", ["vp_linear", "discrete", "edm"], indirect=True)
def test_inner_points_stay_within_the_schedule(exact, schedule, name, options):
    for final in ("t_min", "zero", "denoise"):
        plan = make_plan(name, schedule, steps=8, final=final, **options)
        assert min(s.t for s in evaluations(plan)) >= schedule.t_min * (1 - 1e-9) - 1e-9
        assert run_plan(plan, exact(schedule), schedule.sigma(schedule.t_max) * X_T).isfinite().all()


# options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpmpp-sde", {"eta": -1.0}, "eta must be finite and at least 0, got -1"),
        ("dpmpp-sde", {"eta": 1001.0}, "eta must be at most 1000, got 1001"),
        ("seeds", {"eta": 11.0}, "eta must be at most 10 with predict='eps', .* got 11"),
        ("dpmpp-2m-sde", {"eta": 11.0, "predict": "eps"}, "eta must be at most 10 with predict='eps', .* got 11"),
        ("dpm2-ancestral", {"eta": math.nan}, "eta must be finite and at least 0, got nan"),
        ("dpmpp-2m-sde", {"s_noise": math.inf}, "s_noise must be finite and at least 0, got inf"),
        ("dpmpp-2m-sde", {"solver_type": "bh1"}, "unknown solver_type 'bh1'; .*accepted: heun, midpoint, taylor"),
        ("dpmpp-2m-sde", {"lower_order_final": -1}, "lower_order_final must be True, False or a step count, got -1"),
        ("dpmpp-2m-sde", {"predict": "v"}, "unknown predict 'v'"),
        ("dpmpp-3m-sde", {"weights": "exakt"}, "unknown weights 'exakt'; did you mean 'exact'"),
        ("dpmpp-sde", {"r1": 0.0}, r"r1 must lie in \(0, 1\], got 0"),
        ("dpmpp-2s", {"r1": 1.5}, r"r1 must lie in \(0, 1\], got 1.5"),
        ("dpmpp-2s", {"orders": [2, 2]}, "orders must be 5 integers from 1 to 2"),
        ("seeds", {"order": 4}, "order must be 1, 2 or 3, got 4"),
        ("seeds", {"order": 2, "r2": 0.7}, "r2 goes with order 3 and above, got r2=0.7 at order 2"),
        ("seeds", {"r1": 0.7}, "r1 and r2 must satisfy 0 < r1 < r2 <= 1"),
        ("seeds", {"predict": "v"}, "unknown predict 'v'"),
        ("edm", {"s_churn": -1.0}, "s_churn must be finite and at least 0, got -1"),
        ("edm", {"s_churn": math.inf}, "s_churn must be finite and at least 0, got inf"),
        (
            "edm",
            {"s_tmin": 2.0, "s_tmax": 1.0},
            "s_tmin and s_tmax must satisfy 0 <= s_tmin <= s_tmax, got 2.0 and 1.0",
        ),
        ("edm", {"s_tmax": math.nan}, "s_tmin and s_tmax must satisfy"),
    ],
)
def test_bad_option_values(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(name, VP, steps=5, **options)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_seeds_spends_the_budget_of_its_order(order):
    assert make_plan("seeds", VP, nfe=12, order=order).nfe == 12
    with pytest.raises(ValueError, match="order must be 1, 2 or 3, got 0"):
        make_plan("seeds", VP, nfe=12, order=0)
