"""Solvers against exact solutions: order of convergence, identities between samplers, moments, budgets, and the ends of time."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.certify.gaussian import moments as moments_of_a_gaussian
from bench.certify.problem import MIXTURE, Problem, network
from samplers import EpsModel, list_samplers, make_plan, run_plan, sample, schedules
from samplers.program import Combine, Evaluate

VP, COSINE, EDM, FLOW = schedules.vp_linear(), schedules.cosine(), schedules.edm(), schedules.flow()
ENTRIES = {s.name: s for s in list_samplers() if not s.adaptive}
every_sampler = pytest.mark.parametrize("name", ENTRIES)
on_every_schedule = pytest.mark.parametrize(
    "schedule", ["vp_linear", "cosine", "edm", "flow", "discrete", "zero_snr"], indirect=True
)


@pytest.fixture(scope="session")
def problems():
    return {s.name: Problem(s) for s in (VP, COSINE, EDM)}


def test_the_fast_network_is_the_mixtures(problems):
    for problem in problems.values():
        for t in (problem.schedule.t_min, 0.4, problem.schedule.t_max):
            times = torch.full((8,), t, dtype=torch.float64)
            expected = MIXTURE.net(problem.schedule)(problem.x_T, times)
            torch.testing.assert_close(network(problem.schedule)(problem.x_T, times), expected, rtol=1e-12, atol=1e-12)


def test_the_reference_is_also_scipys(problems):
    from scipy.integrate import solve_ivp

    problem = problems["cosine"]
    eps = network(COSINE)

    def slope(lam, y):  # d(x/alpha) / d lam = -sigma_bar eps
        t = torch.full((8,), float(COSINE.t_of_lam(lam)), dtype=torch.float64)
        x = torch.from_numpy(y.reshape(8, 2)) * COSINE.alpha(float(t[0]))
        return (-np.exp(-lam) * eps(x, t)).numpy().ravel()

    start, end = (float(COSINE.lam(t)) for t in (COSINE.t_max, COSINE.t_min))
    y_start = (problem.x_T / COSINE.alpha(COSINE.t_max)).numpy().ravel()
    y = solve_ivp(slope, (start, end), y_start, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    x = torch.from_numpy(y.reshape(8, 2)) * COSINE.alpha(COSINE.t_min)
    assert (x - problem.solution).abs().max() < 3e-11


# a start of lower order shows on some of the grids, or the order on finer ones: in the tests of their families
TESTED_WITH_THEIR_START = (
    "dpmpp-3m",
    "dpmpp-3m-sde",
    "eab-3",
    "eab-4",
    "unipc-3",
    "unipc-4",
    "lms-3",
    "lms-4",
    "ipndm-3",
    "ipndm-4",
    "ipndm-v-3",
    "ipndm-v-4",
    "deis-3",
    "deis-4",
)


def variants():
    """Every deterministic solver with each of its settings that must not change the order."""
    for name, entry in ENTRIES.items():
        if name in TESTED_WITH_THEIR_START:
            continue
        if entry.stochastic in ("yes", "tau"):  # sa-solver's orders depend on its options: tests/test_sa_solver.py
            continue
        fixed = {key: value for key, value in (("eta", 0.0), ("lower_order_final", False)) if key in entry.options}
        names = {"solver_type": ("midpoint", "heun"), "variable": ("sigma_bar", "t")}
        settings = [[(key, value) for value in values] for key, values in names.items() if key in entry.options]
        for chosen in itertools.product(*settings):
            yield pytest.param(name, {**fixed, **dict(chosen)}, id="-".join([name, *(value for _, value in chosen)]))


def has_order(problem, order, plan_of):
    """Whether the error falls with the order's slope, to 0.2, over the last doubling: 320 to 640 steps, or to 1280."""
    errors = [problem.error(plan_of(n)) for n in (320, 640)]
    if abs(math.log2(errors[0] / errors[1]) - order) > 0.2:
        errors = [errors[1], problem.error(plan_of(1280))]
    return abs(math.log2(errors[0] / errors[1]) - order) <= 0.2


@pytest.mark.no_cover
# a solver sees a schedule and a grid as one sequence of alpha and sigma, so not every pair of them says more
@pytest.mark.parametrize(("on", "grid"), [("vp_linear", "quadratic"), ("cosine", "logsnr"), ("edm", "quadratic")])
@pytest.mark.parametrize(("name", "options"), variants())
def test_order_of_convergence(problems, on, grid, name, options):
    problem = problems[on]
    assert has_order(
        problem, ENTRIES[name].order, lambda n: make_plan(name, problem.schedule, steps=n, grid=grid, **options)
    )


@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m", "dpm-solver-3s"])
def test_one_percent_on_one_coefficient_breaks_the_order(problems, name):
    def plan_of(n):
        plan = make_plan(name, VP, steps=n, grid="logsnr")
        return replace(plan, instructions=tuple(map(faulty, plan.instructions)))

    def faulty(step):  # the last coefficient of every step, 1 % too large
        if isinstance(step, Evaluate) or step.node is None:
            return step
        *terms, (value, coefficient) = step.terms
        return step._replace(terms=(*terms, (value, 1.01 * coefficient)))

    assert not has_order(problems["vp_linear"], ENTRIES[name].order, plan_of)


@pytest.mark.parametrize(
    ("name", "degree"),
    [("dpm-solver-1", 0), ("dpm-solver-2s", 1), ("dpm-solver-3s", 2), ("dpm-solver-2m", 1), ("dpmpp-2m", 1)],
)
def test_exact_on_polynomials_in_lam(name, degree):
    wanted = {"solver_type": "heun", "lower_order_final": False}
    options = {key: value for key, value in wanted.items() if key in ENTRIES[name].options}
    plan = make_plan(name, VP, steps=6, grid="quadratic", **options)
    p = np.polynomial.Polynomial([0.3, -0.2, 0.1][: degree + 1])
    model = EpsModel(lambda x, t: torch.full_like(x, p(VP.lam(float(t[0])))), VP, plan.prediction)

    def constant(t, x):  # of integration, of d(x/alpha) = p d exp(-lam), or of d(x/sigma) = p d exp(lam)
        sign, scale = (1, VP.alpha(t)) if plan.prediction == "eps" else (-1, VP.sigma(t))
        lam = VP.lam(t)
        return x / scale - np.exp(-sign * lam) * sum(sign**k * p.deriv(k)(lam) for k in range(degree + 1))

    constants = []
    x_T = torch.ones(1, 1, dtype=torch.float64)
    run_plan(plan, model, x_T, callback=lambda told: constants.append(float(constant(told.t, told.x))))
    assert len(constants) == 6  # the first step of a multistep method is first order, so compare after it
    assert constants == pytest.approx([constants[0]] * 6, rel=1e-11)


@pytest.mark.parametrize("name", ["dpm-solver-2s", "dpm-solver-3s", "dpm-solver-2m", "dpmpp-2m"])
def test_taylor_is_heun(name):
    heun, taylor = (make_plan(name, VP, steps=5, solver_type=kind) for kind in ("heun", "taylor"))
    assert heun == taylor
    assert not heun.close(make_plan(name, VP, steps=5))


# identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "dpm-solver-1", "euler"])
@pytest.mark.parametrize("schedule", ["vp_linear", "cosine", "edm", "flow", "discrete"], indirect=True)
def test_ddim_is_euler_in_x_over_alpha(exact, schedule, name):
    nodes = np.linspace(0.9, 0.1, 9) * schedule.t_max
    x_T = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model, y = exact(schedule), x_T / schedule.alpha(nodes[0])
    for t, t_next in itertools.pairwise(nodes):
        y = y + (schedule.sigma_bar(t_next) - schedule.sigma_bar(t)) * model(schedule.alpha(t) * y, t)
    got = sample(model, name, x_T=x_T, timesteps=nodes)
    torch.testing.assert_close(got, schedule.alpha(nodes[-1]) * y, rtol=1e-11, atol=1e-11)


def test_euler_in_t_is_eulers_method_in_t(exact):
    nodes, model = np.linspace(1.0, 0.1, 9), exact(VP)
    start = x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t, t_next in itertools.pairwise(nodes):  # Song et al. 2021, equation 13, with beta(t) = 0.1 + 19.9 t
        beta = 0.1 + 19.9 * t
        score = -model(x, t) / VP.sigma(t)
        x = x + (t_next - t) * (-0.5 * beta * x - 0.5 * beta * score)
    torch.testing.assert_close(
        sample(model, "euler", x_T=start, timesteps=nodes, variable="t"), x, rtol=1e-11, atol=1e-11
    )


def test_euler_in_t_ends_and_starts_as_ddim_where_it_has_no_slope():
    # dsigma/dt is infinite at sigma = 0, and eps does not exist at alpha = 0
    t = make_plan("euler", VP, steps=3, grid="quadratic", final="zero", variable="t")
    ddim = make_plan("ddim", VP, steps=3, grid="quadratic", final="zero")
    assert t.instructions[-1] == ddim.instructions[-1]
    assert t.instructions[1] != ddim.instructions[1]
    t, ddim = (make_plan("euler", FLOW, steps=3, variable=variable) for variable in ("t", "sigma_bar"))
    assert t.instructions[:3] == ddim.instructions[:3]


SAME = [
    (("ddim", {}), ("dpm-solver-1", {}), True),
    (("ddim", {}), ("euler", {}), True),
    (("ddim", {"eta": 0.0}), ("euler-ancestral", {"eta": 0.0}), True),
    (("ddim", {"eta": 1.0}), ("ddpm", {"variance": "fixed_small"}), True),
    (("ddim", {"eta": 1.0}), ("ddpm", {"variance": "fixed_large"}), False),
    (("ddim", {"eta": 1.0}), ("euler-ancestral", {}), True),
    (("ddim", {"eta": 0.5}), ("euler-ancestral", {"eta": 0.5}), True),
    (("ddim", {"eta": 0.5}), ("ddim", {"eta": 0.6}), False),
    (("dpm-solver-2s", {"r1": 1.0, "solver_type": "midpoint"}), ("heun", {}), True),
    (("dpm-solver-2s", {"r1": 0.5, "solver_type": "midpoint"}), ("heun", {}), False),
    (("dpm-solver-2m", {}), ("dpmpp-2m", {}), False),
]


@pytest.mark.parametrize(("a", "b", "same"), SAME)
@pytest.mark.parametrize("final", ["t_min", "zero"])
@pytest.mark.parametrize("schedule", ["vp_linear", "cosine", "discrete"], indirect=True)
def test_samplers_that_are_one(schedule, final, a, b, same):
    plans = [make_plan(n, schedule, steps=8, grid="uniform", final=final, **options) for n, options in (a, b)]
    assert plans[0].close(plans[1]) == same
    assert plans[1].close(plans[0]) == same


# moments ---------------------------------------------------------------------------------------------------------

SAMPLERS_OF_THE_MARGINALS = [
    ("ddpm", {"variance": "fixed_small"}),
    ("ddpm", {"variance": "fixed_large"}),
    ("ddim", {"eta": 0.5}),
    ("ddim", {"eta": 1.0}),
    ("euler-ancestral", {}),
    ("heun", {}),
]


@pytest.mark.parametrize(("name", "options"), SAMPLERS_OF_THE_MARGINALS)
@pytest.mark.parametrize("schedule", ["vp_linear", "edm"], indirect=True)
def test_exact_moments_on_a_gaussian(schedule, name, options):
    errors = []
    for steps in (100, 200):
        plan = make_plan(name, schedule, steps=steps, grid="logsnr", **options)
        mean, variance = moments_of_a_gaussian(plan, schedule)
        alpha, sigma = schedule.alpha(schedule.t_min), schedule.sigma(schedule.t_min)
        errors.append((abs(mean - alpha * 0.7), abs(variance - (alpha**2 * 0.25 + sigma**2))))
    for coarse, fine in zip(*errors, strict=True):
        assert fine < 0.03
        assert fine < 0.6 * coarse or fine < 1e-9  # at least first order


def test_half_the_noise_misses_the_variance():
    plan = make_plan("euler-ancestral", VP, steps=300, grid="logsnr", s_noise=0.5)
    assert moments_of_a_gaussian(plan, VP)[1] < 0.2  # the data's variance is 0.25


@pytest.mark.parametrize(("name", "options"), SAMPLERS_OF_THE_MARGINALS)
def test_samples_of_the_mixture_have_its_moments(name, options):
    n, variance = 2048, MIXTURE.covariance().diag().max()
    x_T = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = sample(EpsModel(network(VP), VP), name, x_T=x_T, steps=100, grid="logsnr", seed=5, **options)
    assert (x.mean(0) - MIXTURE.mean()).abs().max() < 4 * (variance / n) ** 0.5
    assert (x.T.cov() - MIXTURE.covariance()).abs().max() < 4 * variance * (2 / n) ** 0.5


# one step, budgets, options --------------------------------------------------------------------------------------


@on_every_schedule
@every_sampler
def test_one_step_of_every_sampler(exact, mixture, schedule, name):
    model = exact(schedule, "v")
    x_T = schedule.sigma(schedule.t_max) * torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double()
    for final in ("t_min", "zero", "denoise"):
        plan = make_plan(name, schedule, steps=1, final=final)
        x = run_plan(plan, model, x_T)
        assert x.isfinite().all()
        if final == "zero":  # a first-order step to sigma = 0 is the mean of the data given the state
            torch.testing.assert_close(x, model.x0(x_T, schedule.t_max), rtol=1e-9, atol=1e-9)
            assert plan.nfe == 1
        assert plan.steps == 1 + (final == "denoise")


@every_sampler
@pytest.mark.parametrize("predicts", ["flow", "v", "x0"])
@pytest.mark.parametrize("steps", [2, 3, 10])
def test_flow_from_pure_noise(exact, mixture, name, predicts, steps):
    x_T = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model, states = exact(FLOW, predicts), []
    x = sample(model, name, x_T=x_T, steps=steps, grid="uniform", callback=lambda p: states.append(p.x.clone()))
    t = make_plan(name, FLOW, steps=steps, grid="uniform").times[1]
    first = t * x_T + (1 - t) * mixture.mean()  # x' = (sigma'/sigma) x + alpha' x0, where x0 is the mean of the data
    if name != "consistency":  # it takes fresh noise there, as in every step
        torch.testing.assert_close(states[0], first, rtol=1e-12, atol=1e-12)
    assert x.isfinite().all()
    if steps == 10:
        assert (x - x_T).abs().max() > 0.1
        assert mixture.log_prob(x).min() > -10


@every_sampler
@pytest.mark.parametrize("schedule", ["flow", "zero_snr"], indirect=True)
def test_an_eps_network_at_pure_noise_is_refused(exact, schedule, name):
    plan = make_plan(name, schedule, steps=2, grid="uniform")
    with pytest.raises(ValueError, match=rf"predicts='eps' gives no x0 at t={schedule.t_max:g}, where alpha=0"):
        run_plan(plan, exact(schedule), torch.ones(1, 2, dtype=torch.float64))


# every remainder by 2 and by 3, the calls of a step; the end of PNDM's three steps of four; and one far from both
BUDGETS = (2, 3, 4, 5, 6, 7, 12, 13, 20)


def fewest_calls(entry, plan, final):
    """Calls of the shortest plan: one step, where its order can be 1 of one call; "denoise" is a step of one call more."""
    return 1 + (final == "denoise") if "orders" in entry.options else plan.nfe


@pytest.mark.no_cover
@every_sampler
@pytest.mark.parametrize("final", ["t_min", "zero", "denoise"])
@pytest.mark.parametrize(
    ("schedule", "grid"),
    [
        ("vp_linear", "logsnr"),
        ("vp_linear", "quadratic"),
        ("discrete", "leading"),
        ("flow", "uniform"),
        ("zero_snr", "trailing"),
        ("zero_snr", "linspace"),
        ("zero_snr", "leading"),
    ],
    indirect=["schedule"],
)
def test_budget_is_never_exceeded(schedule, grid, name, final):
    entry, where = ENTRIES[name], {"grid": grid, "final": final}
    at_noise = schedule.alpha(schedule.t_max) == 0 and grid != "leading"
    fewest = fewest_calls(entry, make_plan(name, schedule, steps=1, **where), final)
    for nfe in range(1, fewest):
        with pytest.raises(ValueError, match=f"nfe must be at least {fewest} for '{name}' here, got {nfe}"):
            make_plan(name, schedule, nfe=nfe, **where)
    for nfe in (fewest, *(nfe for nfe in BUDGETS if nfe > fewest)):
        plan = make_plan(name, schedule, nfe=nfe, **where)
        assert plan.nfe <= nfe
        if entry.mixed_orders:
            assert plan.nfe == nfe or (at_noise and nfe - plan.nfe < entry.calls)
        elif "orders" in entry.options:
            assert plan.nfe == nfe
        else:  # a step more, "denoise" being one of them, would exceed it
            assert make_plan(name, schedule, steps=plan.steps + (final != "denoise"), **where).nfe > nfe
        assert (plan.instructions[-1].node, len(plan.times)) == (plan.steps, plan.steps + 1)


def orders_of(plan):
    """Network calls between the ends of steps."""
    calls, orders = 0, []
    for step in plan.instructions:
        calls += isinstance(step, Evaluate)
        if isinstance(step, Combine) and step.node is not None:
            orders.append(calls)
            calls = 0
    return orders


@pytest.mark.parametrize(
    ("name", "nfe", "expected"),
    [
        ("dpm-solver-3s", 3, [2, 1]),
        ("dpm-solver-3s", 10, [3, 3, 3, 1]),
        ("dpm-solver-3s", 11, [3, 3, 3, 2]),
        ("dpm-solver-3s", 12, [3, 3, 3, 2, 1]),
        ("dpm-solver-2s", 10, [2] * 5),
        ("dpm-solver-2s", 11, [2] * 5 + [1]),
        ("heun", 10, [2] * 5),
        ("heun", 11, [2] * 5 + [1]),
        ("seeds", 9, [3, 3, 3]),
        ("seeds", 10, [3, 3, 3, 1]),
        ("seeds", 11, [3, 3, 3, 2]),
    ],
)
def test_budget_is_spent_on_full_steps(name, nfe, expected):
    assert orders_of(make_plan(name, VP, nfe=nfe, grid="logsnr")) == expected


def test_mixed_orders_take_steps_as_long_as_their_calls():
    uniform = make_plan("dpm-solver-3s", VP, nfe=11, grid="uniform")
    np.testing.assert_allclose(np.diff(uniform.times) / (VP.t_min - VP.t_max) * 11, [3, 3, 3, 2], rtol=1e-12)
    logsnr = make_plan("dpm-solver-3s", VP, nfe=11, grid="logsnr")
    lengths = np.diff(VP.lam(np.array(logsnr.times)))
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-9)


FILLED = [name for name, entry in ENTRIES.items() if "orders" in entry.options and not entry.mixed_orders]


def test_samplers_of_several_calls_a_step_fill_a_budget():
    several = {name for name, entry in ENTRIES.items() if entry.calls > 1}
    assert several - {"restart"} == {*FILLED, *(name for name in several if ENTRIES[name].mixed_orders)}


@pytest.mark.parametrize("name", FILLED)
@pytest.mark.parametrize(("grid", "final"), [(None, "t_min"), ("edm", None), ("karras", "denoise")])
def test_calls_that_are_left_over_are_one_lower_step_at_the_end(name, grid, final):
    entry, where = ENTRIES[name], {"grid": grid, "final": final}
    at_data = final != "t_min"  # a step there has one call, whatever its order
    for nfe in range(1 + (final == "denoise"), 13):
        plan = make_plan(name, VP, nfe=nfe, **where)
        full, left = divmod(nfe - at_data, entry.calls)
        assert orders_of(plan) == [entry.calls] * full + [left] * (left > 0) + [1] * at_data
        orders = [entry.calls] * full + [left] * (left > 0) + [entry.calls] * at_data
        steps = len(orders) - (final == "denoise")
        assert plan == make_plan(name, VP, steps=steps, orders=orders, **where)
        if not left:
            assert plan == make_plan(name, VP, steps=steps, **where)


@pytest.mark.parametrize(
    ("name", "first", "options"),
    [
        ("heun", "euler", {}),
        ("edm", "euler", {}),
        ("dpm2", "euler", {}),
        ("dpm2-ancestral", "euler-ancestral", {"eta": 0.7, "s_noise": 1.1}),
        ("dpmpp-sde", "euler-ancestral", {"eta": 0.7, "s_noise": 1.1}),
        ("seeds", "seeds", {"order": 1, "eta": 0.7}),
    ],
)
def test_a_step_of_order_1_is_that_of_the_family(name, first, options):
    given = {option: value for option, value in options.items() if option != "order"}
    lowest = make_plan(name, VP, steps=5, grid="logsnr", orders=[1] * 5, **given)
    assert lowest.close(make_plan(first, VP, steps=5, grid="logsnr", **options))
    mixed = make_plan(name, VP, steps=2, grid="logsnr", orders=[ENTRIES[name].calls, 1], **given)
    assert mixed.nfe == ENTRIES[name].calls + 1


def test_seeds_of_order_2_within_order_3_are_those_of_order_2():
    two = make_plan("seeds", VP, steps=4, order=2, r1=0.5)
    assert make_plan("seeds", VP, steps=4, orders=[2] * 4, r1=0.2, r2=0.7) == two
    assert make_plan("seeds", VP, nfe=7, order=2) == make_plan("seeds", VP, steps=4, order=2, orders=[2, 2, 2, 1])


@pytest.mark.parametrize("name", FILLED)
def test_orders_that_no_step_has_are_refused(name):
    for orders in ([1], [1, 2, 4], [0, 1, 1], [True, 1, 1], "121"):
        with pytest.raises(ValueError, match="orders must be 3 integers from 1 to"):
            make_plan(name, VP, steps=3, orders=orders)


@pytest.mark.parametrize("name", ["heun", "dpm2"])
@pytest.mark.parametrize("nfe", [5, 7, 9, 11])
def test_the_call_that_was_left_over_brings_the_solution_nearer(exact, name, nfe):
    x_T = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = sample(exact(VP), "dpm-solver-3s", x_T=x_T, steps=100, grid="logsnr")
    with_it, without = (
        (sample(exact(VP), name, x_T=x_T, nfe=calls) - solution).square().mean().sqrt() for calls in (nfe, nfe - 1)
    )
    assert with_it < 0.8 * without


def test_orders_are_taken_as_given():
    plan = make_plan("dpm-solver-3s", VP, steps=4, orders=[1, 3, 2, 3])
    assert orders_of(plan) == [1, 3, 2, 3]
    assert make_plan("dpm-solver-3s", VP, steps=4, orders=[1] * 4).close(
        make_plan("ddim", VP, steps=4, grid="time-quadratic")
    )
    assert make_plan("dpm-solver-3s", VP, steps=4, orders=[2] * 4).close(make_plan("dpm-solver-2s", VP, steps=4))
    assert make_plan("dpm-solver-3s", VP, steps=4, orders=[3] * 4) == make_plan("dpm-solver-3s", VP, steps=4)
    assert make_plan("dpm-solver-2s", VP, nfe=8, orders=[2] * 4) == make_plan("dpm-solver-2s", VP, steps=4)


@pytest.mark.parametrize(
    ("name", "fractions"), [("dpm-solver-2s", {"r1": 0.3}), ("dpm-solver-3s", {"r1": 0.2, "r2": 0.9})]
)
def test_inner_points_lie_where_they_are_asked_for(name, fractions):
    plan = make_plan(name, VP, steps=3, **fractions)
    lam = [VP.lam(s.t) for s in plan.instructions if isinstance(s, Evaluate)]
    calls = 1 + len(fractions)
    for i, (start, end) in enumerate(itertools.pairwise(VP.lam(np.array(plan.times)))):
        inner = [(value - start) / (end - start) for value in lam[calls * i + 1 : calls * (i + 1)]]
        assert inner == pytest.approx(list(fractions.values()), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("dpm-solver-2s", {"r1": 0.3}, 2),
        ("dpm-solver-3s", {"r1": 0.2}, 3),
        # third order needs b_2 = 0 and b_3 c_3^2 = 1/3 (Hochbruck & Ostermann 2010, section 2.4), so c_3 = 2/3
        ("dpm-solver-3s", {"r2": 0.9}, 2),
    ],
)
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_order_with_other_inner_points(problems, name, options, order, solver_type):
    assert has_order(
        problems["vp_linear"],
        order,
        lambda n: make_plan(name, VP, steps=n, grid="logsnr", solver_type=solver_type, **options),
    )


def test_lower_order_final_has_one_default_and_one_exception():
    defaults = {s.name: s.options["lower_order_final"] for s in list_samplers() if "lower_order_final" in s.options}
    keep = {name for name in defaults if name.rpartition("-")[0] in ("lms", "ipndm", "ipndm-v")}
    assert len(keep) == 12
    assert all(value is False if name in keep else value == 15 for name, value in defaults.items())


@pytest.mark.parametrize(
    ("lower_order_final", "steps", "last"),
    [(True, 20, 1), (False, 5, 2), (15, 14, 1), (15, 15, 2), (0, 5, 2), (6, 5, 1)],
)
def test_lower_order_final(lower_order_final, steps, last):
    plan = make_plan("dpmpp-2m", VP, steps=steps, lower_order_final=lower_order_final)
    outputs = [sum(n.startswith("o") for n, _ in s.terms) for s in plan.instructions if isinstance(s, Combine)]
    assert outputs == [1] + [2] * (steps - 2) + [last]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddpm", {"variance": "fixed_smal"}, "unknown variance 'fixed_smal'; did you mean 'fixed_small'"),
        ("euler", {"variable": "sigma"}, "unknown variable 'sigma'; did you mean 'sigma_bar'"),
        ("dpmpp-2m", {"solver_type": "bh1"}, "unknown solver_type 'bh1'; .*accepted: heun, midpoint, taylor"),
        ("dpm-solver-2s", {"solver_type": "mid"}, "unknown solver_type 'mid'; did you mean 'midpoint'"),
        ("dpmpp-2m", {"lower_order_final": -1}, "lower_order_final must be True, False or a step count, got -1"),
        ("ddim", {"eta": -0.1}, "eta must be finite and at least 0, got -0.1"),
        ("ddim", {"eta": math.nan}, "eta must be finite and at least 0, got nan"),
        ("euler-ancestral", {"eta": math.inf}, "eta must be finite"),
        ("euler-ancestral", {"s_noise": -1.0}, "s_noise must be finite and at least 0, got -1"),
        ("dpm-solver-2s", {"r1": 0.0}, r"r1 must lie in \(0, 1\], got 0"),
        ("dpm-solver-2s", {"r1": 1.5}, r"r1 must lie in \(0, 1\], got 1.5"),
        ("dpm-solver-3s", {"r1": 0.7}, "r1 and r2 must satisfy 0 < r1 < r2 <= 1, got r1=0.7, r2=0.66"),
        ("dpm-solver-3s", {"r2": 1.1}, "r1 and r2 must satisfy"),
        ("dpm-solver-3s", {"orders": [3, 3]}, r"orders must be 5 integers from 1 to 3, .* got \[3, 3\]"),
        ("dpm-solver-2s", {"orders": [2, 2, 2, 2, 3]}, "orders must be 5 integers from 1 to 2"),
        ("dpm-solver-2s", {"orders": [2, 2, 2, 2, True]}, "orders must be 5 integers"),
    ],
)
def test_bad_option_values(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(name, VP, steps=5, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddim", {"eta": "1"}),
        ("ddim", {"eta": True}),
        ("ddim", {"eta": None}),
        ("dpmpp-2m", {"lower_order_final": 0.5}),
    ],
)
def test_options_of_another_type(name, options):
    (option, value), *_ = options.items()
    with pytest.raises(TypeError, match=f"{option} of sampler '{name}' must be like its default .*, got {value!r}"):
        make_plan(name, VP, steps=5, **options)


@pytest.mark.parametrize("z", [1e-9, 1e-3, 0.49, 0.51, 2.0, 30.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_psi_has_its_digits_everywhere(z, sign):
    from fractions import Fraction

    from samplers.solvers.exponential import psi

    exact_z, term, total = Fraction(sign * z), Fraction(1), Fraction(0)
    series = []
    for n in range(1, 160):  # sum z^n / n!, exact rational arithmetic
        term = term * exact_z / n
        series.append(term)
    total = sum(series)
    for k, value in ((1, total), (2, total / exact_z - 1), (3, (total / exact_z - 1) / exact_z - Fraction(1, 2))):
        assert float(psi(k, np.array([sign * z]))[0]) == pytest.approx(float(value), rel=2e-15 * (1 if k == 1 else 8))
