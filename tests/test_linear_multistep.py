"""LMS, iPNDM, PNDM and DEIS against exact solutions, against integrals by SciPy, and against one another."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from test_parity import BETAS, SCHEDULE, X_T
from test_solvers import has_order

from samplers import EpsModel, make_plan, run_plan, schedules
from samplers.program import Combine, Evaluate

VP, COSINE, EDM, FLOW = schedules.vp_linear(), schedules.cosine(), schedules.edm(), schedules.flow()
COARSE = schedules.from_betas(np.linspace(0.01, 0.4, 30))
BY_NAME = {s.name: s for s in (VP, COSINE, EDM)}
CONSTANT_STEP = {1: [1.0], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
UNEVEN = np.array([1.0, 0.7, 0.55, 0.3, 0.22, 0.12, 0.05, 0.01])  # of t_max


def weights_of(plan):
    """Coefficients of the outputs in the state at the end of each step, newest first."""
    steps = [s for s in plan.instructions if isinstance(s, Combine) and s.node is not None]
    return [[c for name, c in step.terms if name[0] == "o"] for step in steps]


def of_epsilon(plan, schedule):
    """The same, in units of the step's first-order weight: they add up to 1."""
    a, s = (f(np.array(plan.times)) for f in (schedule.alpha, schedule.sigma))
    slopes = s[1:] - s[:-1] * a[1:] / a[:-1]
    return [np.array(row) / slope for row, slope in zip(weights_of(plan), slopes, strict=True)]


# weights ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", ["logsnr", "quadratic"])
def test_ipndm_has_the_weights_of_constant_steps(k, grid):
    rows = of_epsilon(make_plan(f"ipndm-{k}", VP, steps=7, grid=grid), VP)
    for i, row in enumerate(rows):
        np.testing.assert_allclose(row, CONSTANT_STEP[min(i + 1, k)], rtol=1e-12)


def test_adams_weights_by_the_textbook():
    """Hairer, Norsett & Wanner 1993, section III.5, for two points; by solving the moment equations for three and four."""
    sigmas = np.array([40.0, 11.0, 10.0, 4.0, 1.5, 0.2])
    for k in (2, 3, 4):
        rows = of_epsilon(make_plan(f"lms-{k}", EDM, sigmas=sigmas), EDM)
        for i in range(k - 1, 5):
            points, end = sigmas[i - k + 1 : i + 1][::-1] - sigmas[i], sigmas[i + 1] - sigmas[i]
            powers = np.arange(k)
            exact = np.linalg.solve((points / end) ** powers[:, None], 1 / (powers + 1))
            np.testing.assert_allclose(rows[i], exact, rtol=1e-10)
            if k == 2:
                ratio = end / (sigmas[i] - sigmas[i - 1])
                np.testing.assert_allclose(rows[i], [1 + ratio / 2, -ratio / 2], rtol=1e-13)


def test_what_is_wrong_with_the_published_variable_step_ipndm():
    """In the diff-sampler toolbox a bracket of the third-order formula ends too late: `1 - a b` stands for `(1 - a) b`.

    Both are 5/6 on constant steps. With the bracket in its place the formula is ours.
    """
    sigmas = np.array([10.0, 6.0, 3.0, 1.0])
    h2, h1, h = np.diff(sigmas)
    a, b = h / (3 * (h + h1)), h * (h + h1) / (h1 * (h1 + h2))

    def third_order(extra):  # in units of the step, newest first
        return np.array([1 + h / h1 / 2 + extra, -h / h1 / 2 - (1 + h1 / h2) * extra, extra * h1 / h2])

    ours = of_epsilon(make_plan("ipndm-v-3", EDM, sigmas=sigmas), EDM)[2]
    published, mended = third_order((1 - a * b) / 2), third_order((1 - a) * b / 2)
    np.testing.assert_allclose(ours, mended, rtol=1e-13)
    assert np.abs(ours - published).max() > 0.05
    second_moment = np.array([0.0, h1, h1 + h2]) ** 2 / h**2  # of the points; the integral of u^2 is 1/3
    assert ours @ second_moment == pytest.approx(1 / 3, rel=1e-12)
    assert published @ second_moment != pytest.approx(1 / 3, rel=0.1)


def tab_weight(schedule, t, i, k, j):
    """`alpha' integral l_j(t) d sigma_bar` over step i by SciPy, with l_j through the last k nodes."""
    nodes = t[i - k + 1 : i + 1][::-1]

    def density(time):
        alpha, sigma, dalpha, dsigma = (
            f(time) for f in (schedule.alpha, schedule.sigma, schedule.dalpha, schedule.dsigma)
        )
        value = (dsigma * alpha - sigma * dalpha) / alpha**2
        for m in range(k):
            if m != j:
                value *= (time - nodes[m]) / (nodes[j] - nodes[m])
        return value

    precise = {"epsabs": 0.0, "epsrel": 1e-13, "limit": 200}
    if schedule.name == "discrete":
        edges = np.unique([t[i + 1], t[i], *np.arange(math.ceil(t[i + 1]), t[i])])
        parts = [quad(density, low, high, **precise)[0] for low, high in itertools.pairwise(edges)]
    else:
        edges = np.linspace(math.log(t[i + 1]), math.log(t[i]), 9)
        parts = [
            quad(lambda s: density(math.exp(s)) * math.exp(s), low, high, **precise)[0]
            for low, high in itertools.pairwise(edges)
        ]
    return -schedule.alpha(t[i + 1]) * math.fsum(parts)


@pytest.mark.parametrize(
    ("schedule", "nodes"),
    [
        (VP, [1.0, 0.5, 0.2, 0.05, 1e-3]),
        (VP, [1.0, 0.99, 0.98, 0.97, 1e-3]),
        (COSINE, [0.9946, 0.4, 0.2, 0.1, 1e-3]),
        (COSINE, [0.9946, 0.9, 0.8, 0.7, 1e-3]),
        (EDM, [80.0, 30.0, 5.0, 1.0, 0.002]),
        (EDM, [80.0, 79.0, 78.0, 77.0, 0.002]),
        (FLOW, [0.999, 0.9, 0.5, 0.2, 1e-3]),
        (FLOW, [0.9999, 0.999, 0.998, 0.997, 1e-3]),
        (COARSE, [29.0, 20.5, 13.0, 4.2, 0.0]),
        (SCHEDULE, [999.0, 980.0, 950.5]),
        (SCHEDULE, [30.0, 25.0, 12.3, 0.0]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_deis_integrates_to_machine_precision(schedule, nodes):
    for k in range(2, len(nodes)):
        plan = make_plan(f"deis-{k}", schedule, timesteps=nodes, lower_order_final=False)
        for i in range(1, len(nodes) - 1):
            order = min(i + 1, k)
            exact = [tab_weight(schedule, nodes, i, order, j) for j in range(order)]
            np.testing.assert_allclose(weights_of(plan)[i], exact, rtol=1e-13)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("schedule", [VP, COSINE, EDM, COARSE], ids=lambda s: s.name)
def test_exact_on_polynomials(schedule, k):
    """Epsilon is a polynomial of degree k - 1 in what the method interpolates in: the solution is exact after the start."""
    poly = np.polynomial.Polynomial([0.3, -0.2, 0.1, 0.05][:k])
    nodes = UNEVEN * schedule.t_max
    top = schedule.sigma_bar(nodes[0])
    integral = poly.integ()
    for name, options in ((f"lms-{k}", {}), (f"ipndm-v-{k}", {}), (f"deis-{k}", {"variant": "rhoab"})):
        options = {**options, "lower_order_final": False}
        model = EpsModel(lambda x, t: torch.full_like(x, poly(schedule.sigma_bar(float(t[0])) / top)), schedule)
        constants = []

        def watch(told, constants=constants):
            at = schedule.sigma_bar(told.t) / top
            constants.append(float(told.x) / schedule.alpha(told.t) - top * integral(at))

        run_plan(
            make_plan(name, schedule, timesteps=nodes, **options), model, torch.ones(1, 1).double(), callback=watch
        )
        np.testing.assert_allclose(constants[max(k - 2, 0) :], constants[-1], rtol=0, atol=1e-13 * top)


# order -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "on", "grid"),
    [
        *((name, "vp_linear", "logsnr") for name in ("lms-2", "lms-3", "lms-4", "deis-2", "deis-3", "deis-4")),
        *((name, "cosine", "logsnr") for name in ("ipndm-v-4", "deis-4", "ipndm-4", "pndm")),
        *((name, "edm", "logsnr") for name in ("lms-3", "deis-4", "ipndm-2", "ipndm-4", "pndm")),
        *((name, "vp_linear", "quadratic") for name in ("lms-3", "deis-3", "ipndm-2", "ipndm-4", "pndm")),
        *((name, "edm", "quadratic") for name in ("lms-3", "deis-3", "ipndm-2", "ipndm-4", "pndm")),
    ],
)
def test_order_of_convergence(problem_on, name, on, grid):
    order = 2 if name.startswith("ipndm-") and "v" not in name else 2 if name == "pndm" else int(name[-1])
    options = {} if name == "pndm" else {"lower_order_final": False}
    assert has_order(problem_on(on), order, lambda n: make_plan(name, BY_NAME[on], steps=n, grid=grid, **options))


def test_constant_step_weights_miss_by_a_twelfth_of_the_change_of_step():
    """Why `ipndm-3` and `ipndm-4` are second order: the mean of u over the step comes out wrong by (ratio - 1) / 12.

    With two points the error is (ratio - 1) / 2. The smaller constant is why the slopes of `ipndm-3` settle late.
    """
    for k, constant in ((2, 1 / 2), (3, 1 / 12), (4, 1 / 12)):
        for excess in (1e-3, 1e-4):  # each step is so much longer in sigma_bar than the one before
            steps = (1 + excess) ** -np.arange(4.0)  # newest first
            points = -np.concatenate([[0.0], np.cumsum(steps[1:])])
            mean = np.array(CONSTANT_STEP[k]) @ points[:k]
            assert mean - 1 / 2 == pytest.approx(-constant * excess, rel=0.02)


@pytest.mark.slow
def test_ipndm_3_gets_to_its_second_order_late(problem_on):
    errors = [
        problem_on("vp_linear").error(make_plan("ipndm-3", VP, steps=n, grid="logsnr"))
        for n in (320, 640, 1280, 2560, 5120)
    ]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes[0] < 1.5
    assert slopes == sorted(slopes)
    assert slopes[-1] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("name", ["lms-4", "deis-4"])
def test_a_first_order_start_shows_where_the_first_step_is_long(problem_on, name):
    problem = problem_on("cosine")
    plans = [make_plan(name, COSINE, steps=n, grid="quadratic", lower_order_final=False) for n in (640, 1280)]
    slope = math.log2(problem.error(plans[0]) / problem.error(plans[1]))
    assert slope < 2.5


@pytest.mark.parametrize("name", ["lms-3", "deis-4", "pndm"])
def test_one_percent_on_one_coefficient_breaks_the_order(problem_on, name):
    def faulty(step):  # the last coefficient of every step, 1 % too large
        if isinstance(step, Evaluate) or step.node is None:
            return step
        *terms, (value, coefficient) = step.terms
        return step._replace(terms=(*terms, (value, 1.01 * coefficient)))

    def plan_of(n):
        plan = make_plan(name, VP, steps=n, grid="logsnr")
        return replace(plan, instructions=tuple(map(faulty, plan.instructions)))

    assert not has_order(problem_on("vp_linear"), 2 if name == "pndm" else int(name[-1]), plan_of)


# identities ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("schedule", [VP, COSINE, EDM, FLOW, COARSE], ids=lambda s: s.name)
def test_three_names_of_adams_bashforth(schedule, k):
    for final, same in (("t_min", True), ("zero", k == 1)):
        where = {"steps": 7, "grid": "quadratic", "final": final, "lower_order_final": False}
        lms, ipndm_v = (make_plan(f"{name}-{k}", schedule, **where) for name in ("lms", "ipndm-v"))
        rhoab = make_plan(f"deis-{k}", schedule, variant="rhoab", **where)
        assert ipndm_v == rhoab
        assert (lms == ipndm_v) == same
        assert lms.close(ipndm_v) == same
        assert rhoab.close(make_plan(f"deis-{k}", schedule, **where)) == (k == 1 or schedule is EDM)


def test_ipndm_is_adams_bashforth_on_constant_steps():
    for k in (1, 2, 3, 4):
        uniform, other = (
            [make_plan(f"{name}-{k}", EDM, steps=8, grid=grid) for name in ("ipndm", "ipndm-v")]
            for grid in ("uniform", "karras")
        )
        assert uniform[0].close(uniform[1])
        assert other[0].close(other[1]) == (k == 1)


@pytest.mark.parametrize("name", ["lms-1", "ipndm-1", "ipndm-v-1", "deis-1"])
@pytest.mark.parametrize("final", ["t_min", "zero", "denoise"])
def test_order_one_is_ddim(name, final):
    where = {"steps": 6, "grid": "quadratic", "final": final}
    for schedule in (VP, COSINE, EDM, FLOW, COARSE):
        assert make_plan(name, schedule, **where).close(make_plan("ddim", schedule, **where))


@pytest.mark.parametrize("name", ["lms-4", "ipndm-4", "ipndm-v-4", "deis-4"])
@pytest.mark.parametrize(
    ("lower_order_final", "expected"),
    [(False, [1, 2, 3, 4, 4, 4]), (True, [1, 2, 3, 3, 2, 1]), (6, [1, 2, 3, 4, 4, 4]), (7, [1, 2, 3, 3, 2, 1])],
)
def test_orders_rise_and_fall(name, lower_order_final, expected):
    plan = make_plan(name, VP, steps=6, grid="quadratic", lower_order_final=lower_order_final)
    assert [len(row) for row in weights_of(plan)] == expected
    zero = make_plan(name, VP, steps=6, grid="quadratic", final="zero", lower_order_final=lower_order_final)
    assert [len(row) for row in weights_of(zero)] == [*expected[:-1], expected[-1] if name == "lms-4" else 1]
    noise = make_plan(name, FLOW, steps=7, grid="uniform", lower_order_final=lower_order_final)
    assert [len(row) for row in weights_of(noise)][1:] == (expected if lower_order_final != 7 else [1, 2, 3, 3, 2, 1])


@pytest.mark.parametrize(
    ("name", "default"), [("lms-4", False), ("ipndm-4", False), ("ipndm-v-4", False), ("deis-4", 15)]
)
def test_default_of_lower_order_final(name, default):
    for steps in (14, 15):
        where = {"steps": steps, "grid": "quadratic"}
        assert make_plan(name, VP, **where) == make_plan(name, VP, lower_order_final=default, **where)
        assert (make_plan(name, VP, **where) == make_plan(name, VP, lower_order_final=True, **where)) == (
            default == 15 and steps == 14
        )


@pytest.mark.parametrize("final", ["t_min", "zero", "denoise"])
@pytest.mark.parametrize("name", ["lms-4", "ipndm-4", "ipndm-v-4", "deis-4", "pndm"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_short_grids(exact, mixture, name, final, steps):
    """On every kind of grid; the zero-SNR schedule goes on from any node of its last interval."""
    zero_snr = schedules.from_alphas_cumprod(np.append(np.cumprod(1 - BETAS)[:-1], 0.0))
    x_T = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for schedule in (VP, COSINE, EDM, FLOW, COARSE, zero_snr):
        x = run_plan(
            make_plan(name, schedule, steps=steps, grid="uniform", final=final),
            exact(schedule, "v"),
            schedule.sigma(schedule.t_max) * x_T,
        )
        assert x.isfinite().all()
    nodes = [999.0, 998.999999, 998.3, 998.0, 0.0][: steps + 1]
    make_plan(name, zero_snr, timesteps=nodes)  # a plan with a coefficient that is not finite is an error


# pndm ------------------------------------------------------------------------------------------------------------------


def pndm_by_hand(model, schedule, t, x):
    """Algorithm 2 of the paper as it is written there: every stage from the state at the start of the step."""

    def transfer(x, eps, start, end):
        ratio = schedule.alpha(end) / schedule.alpha(start)
        return ratio * x + (schedule.sigma(end) - ratio * schedule.sigma(start)) * eps

    history = []
    for i, (start, end) in enumerate(itertools.pairwise(t)):
        history.append(model(x, start))
        combined = history[-1]
        if end != schedule.t_zero:
            if i < 3:
                middle = (start + end) / 2
                second = model(transfer(x, history[-1], start, middle), middle)
                third = model(transfer(x, second, start, middle), middle)
                fourth = model(transfer(x, third, start, end), end)
                combined = (history[-1] + 2 * second + 2 * third + fourth) / 6
            else:
                combined = (55 * history[-1] - 59 * history[-2] + 37 * history[-3] - 9 * history[-4]) / 24
        x = transfer(x, combined, start, end)
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("final", ["t_min", "zero"])
@pytest.mark.parametrize("schedule", [VP, EDM, COARSE], ids=lambda s: s.name)
def test_pndm_is_its_algorithm(exact, schedule, final, steps):
    plan = make_plan("pndm", schedule, steps=steps, grid="quadratic", final=final)
    x_T = schedule.sigma(schedule.t_max) * X_T
    expected = pndm_by_hand(exact(schedule), schedule, plan.times, x_T)
    torch.testing.assert_close(run_plan(plan, exact(schedule), x_T), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("nfe", "final", "steps", "used"),
    [
        (4, "t_min", 1, 4),
        (7, "t_min", 1, 4),
        (8, "t_min", 2, 8),
        (12, "t_min", 3, 12),
        (13, "t_min", 4, 13),
        (50, "t_min", 41, 50),
        (1, "zero", 1, 1),
        (5, "zero", 2, 5),
        (12, "zero", 3, 9),
        (13, "zero", 4, 13),
        (5, "denoise", 2, 5),
    ],
)
def test_the_budget_of_pndm(nfe, final, steps, used):
    plan = make_plan("pndm", VP, nfe=nfe, grid="quadratic", final=final)
    assert (plan.steps, plan.nfe) == (steps, used)


def test_pndm_from_pure_noise_starts_at_the_second_node():
    plan = make_plan("pndm", FLOW, steps=6, grid="uniform")
    assert plan.nfe == 1 + 3 * 4 + 2
    assert [s.kind for s in plan.instructions if isinstance(s, Evaluate)][:2] == ["x0", "eps"]


# bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deis-3", {"variant": "tabs"}, "unknown variant 'tabs'; did you mean 'tab'.* accepted: rhoab, tab"),
        *(
            (name, {"lower_order_final": -1}, "lower_order_final must be True, False or a step count, got -1")
            for name in ("lms-2", "ipndm-2", "ipndm-v-2", "deis-2")
        ),
        ("pndm", {"lower_order_final": True}, "unknown option of sampler 'pndm': 'lower_order_final'"),
        ("lms-2", {"order": 3}, "unknown option of sampler 'lms-2': 'order'"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(name, VP, steps=5, **options)
