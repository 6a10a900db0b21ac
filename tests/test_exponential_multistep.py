"""Multistep methods in lam against exact solutions, against one another, and against diffusers; 3S of DPM-Solver++ too."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from test_parity import SCHEDULE, X_T, assert_same, multistep, scheduler
from test_solvers import network

from samplers import EpsModel, make_plan, run_plan, schedules
from samplers.grid import Grid, from_timesteps
from samplers.program import Combine, Evaluate
from samplers.solvers import exponential_multistep
from samplers.solvers.exponential import singlestep

VP, COSINE, EDM, FLOW = schedules.vp_linear(), schedules.cosine(), schedules.edm(), schedules.flow()
BY_NAME = {s.name: s for s in (VP, COSINE, EDM)}
ALL = [f"eab-{k}" for k in (1, 2, 3, 4)] + ["dpm-solver-3m", "dpmpp-3m"]


def slope(problem, name, grid, n, **options):
    """Slope of the global error from n to 2 n steps."""
    errors = [
        problem.error(make_plan(name, problem.schedule, steps=steps, grid=grid, lower_order_final=False, **options))
        for steps in (n, 2 * n)
    ]
    return math.log2(errors[0] / errors[1])


# A first-order start leaves an error of second order in its step. It shows where the first step is long in lam, as on the
# quadratic grid of the cosine schedule, and there no method that starts so is of higher order; elsewhere it is so small that
# the order k shows down to errors of 1e-10.
@pytest.mark.parametrize(
    ("name", "options", "on", "grid", "n", "order"),
    [
        *(("eab-3", {}, on, "logsnr", 640, 3) for on in BY_NAME),
        *(("eab-3", {"predict": "eps"}, on, "logsnr", 640, 3) for on in BY_NAME),
        ("eab-3", {}, "vp_linear", "quadratic", 640, 3),
        ("eab-3", {}, "edm", "quadratic", 1280, 3),
        ("eab-3", {"predict": "eps"}, "edm", "quadratic", 640, 3),
        ("eab-3", {}, "cosine", "quadratic", 640, 2),
        ("eab-4", {}, "vp_linear", "logsnr", 640, 4),
        ("eab-4", {}, "cosine", "logsnr", 640, 4),
        ("eab-4", {}, "vp_linear", "quadratic", 320, 4),
        ("eab-4", {}, "edm", "quadratic", 1280, 4),
        ("eab-4", {}, "cosine", "quadratic", 640, 2),
        ("eab-2", {"predict": "eps"}, "vp_linear", "quadratic", 640, 2),
        ("dpmpp-3m", {}, "edm", "quadratic", 2560, 2),
        *(("dpmpp-3m", {}, on, "logsnr", 640, 2) for on in BY_NAME),
        *(("dpmpp-3m", {"weights": "exact"}, on, "logsnr", 640, 3) for on in BY_NAME),
        *(("dpm-solver-3m", {"weights": "exact"}, on, "logsnr", 640, 3) for on in BY_NAME),
        ("dpmpp-3m", {"weights": "exact"}, "vp_linear", "quadratic", 640, 3),
        ("dpm-solver-3m", {"weights": "exact"}, "vp_linear", "quadratic", 640, 3),
    ],
)
def test_global_order(problem_on, name, options, on, grid, n, order):
    assert abs(slope(problem_on(on), name, grid, n, **options) - order) <= 0.2


# one step from exact history -------------------------------------------------------------------------------------------

GAPS = np.array([1.0, 1.2, 0.9, 1.1, 0.8, 1.0])  # of the nodes in lam, in units of h


def exact_states(schedule, nodes, h):
    """Times of nodes of spacing about h in lam, and the exact solution there, through eight fixed states."""
    lam = 0.6 + h * np.append(0.0, np.cumsum(GAPS[: nodes - 1]))
    eps, middle = network(schedule), nodes // 2
    t = schedule.t_of_lam(lam)
    z = torch.randn(8, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64).numpy()

    def derivative(value, y):  # d(x / alpha) / d lam = -sigma_bar eps
        time = torch.full((8,), float(schedule.t_of_lam(value)), dtype=torch.float64)
        x = torch.from_numpy(y.reshape(8, 2)) * float(schedule.alpha(float(time[0])))
        return (-np.exp(-value) * eps(x, time)).numpy().ravel()

    start = (0.8 * z + np.exp(-lam[middle]) * z[::-1]).ravel()
    found = []
    for value in lam:
        y = start
        if value != lam[middle]:
            y = solve_ivp(derivative, (lam[middle], value), start, method="DOP853", rtol=1e-13, atol=1e-14).y[:, -1]
        found.append(torch.from_numpy(y.reshape(8, 2)))
    return t, [x * float(schedule.alpha(float(time))) for x, time in zip(found, t, strict=True)]


def last_step(plan, model, states):
    """The last step of a plan with one call a step, from exact states and the outputs there."""
    values, node = {}, 0
    for step in plan.instructions:
        if isinstance(step, Evaluate):
            values[step.src] = states[node]
            time = torch.full((8,), step.t, dtype=torch.float64)
            values[step.dst] = (model.eps if step.kind == "eps" else model.x0)(states[node], time)
            node += 1
    return sum(c * values[name] for name, c in plan.instructions[-1].terms)


def local_error(name, schedule, nodes, h, **options):
    t, states = exact_states(schedule, nodes, h)
    plan = make_plan(name, schedule, timesteps=t, lower_order_final=False, **options)
    model = EpsModel(network(schedule), schedule)
    return float((last_step(plan, model, states) - states[-1]).pow(2).mean().sqrt())


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        *((f"eab-{k}", {"predict": predict}, k) for k in (1, 2, 3, 4) for predict in ("x0", "eps")),
        *((name, {}, 2) for name in ("dpmpp-3m", "dpm-solver-3m")),
        *((name, {"weights": "exact"}, 3) for name in ("dpmpp-3m", "dpm-solver-3m")),
    ],
)
@pytest.mark.parametrize("on", BY_NAME)
def test_local_order(on, name, options, order):
    nodes = int(name[-1] if name.startswith("eab") else 3) + 1
    coarse = 0.02 if order == 4 else 0.005
    errors = [local_error(name, BY_NAME[on], nodes, h, **options) for h in (coarse, coarse / 2)]
    assert abs(math.log2(errors[0] / errors[1]) - (order + 1)) <= 0.2


def test_one_percent_on_one_weight_breaks_the_local_order(monkeypatch):
    def faulty(points, z):
        weights = exact(points, z)
        weights[..., -1] *= 1.01
        return weights

    exact = exponential_multistep.exponential_adams
    monkeypatch.setattr(exponential_multistep, "exponential_adams", faulty)
    for name, nodes, order in (("eab-2", 3, 2), ("eab-3", 4, 3), ("eab-4", 5, 4)):
        errors = [local_error(name, VP, nodes, h) for h in (0.02, 0.01)]
        assert abs(math.log2(errors[0] / errors[1]) - (order + 1)) > 0.2


# weights ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predict", ["x0", "eps"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_eab_is_exact_on_polynomials_in_lam(k, predict):
    """Where the predicted quantity is a polynomial of degree k - 1 in lam, every step after the start is exact."""
    plan = make_plan(f"eab-{k}", VP, steps=8, grid="quadratic", predict=predict, lower_order_final=False)
    p = np.polynomial.Polynomial([0.3, -0.2, 0.1, 0.05][:k])
    model = EpsModel(lambda x, t: torch.full_like(x, p(VP.lam(float(t[0])))), VP, predict)
    sign = 1 if predict == "eps" else -1
    constants = []

    def constant(told):  # of integration, of d(x/alpha) = p d exp(-lam), or of d(x/sigma) = p d exp(lam)
        lam, scale = VP.lam(told.t), VP.alpha(told.t) if predict == "eps" else VP.sigma(told.t)
        particular = sum(sign**j * p.deriv(j)(lam) for j in range(k))
        constants.append(float(told.x / scale - np.exp(-sign * lam) * particular))

    run_plan(plan, model, torch.ones(1, 1, dtype=torch.float64), callback=constant)
    after = constants[k - 2 :] if k > 1 else constants
    assert after == pytest.approx([after[0]] * len(after), rel=1e-10)
    if k > 2:
        assert constants[0] != pytest.approx(after[0], rel=1e-6)


SAME = [
    (("eab-1", {}), ("ddim", {}), True),
    (("eab-1", {"predict": "eps"}), ("ddim", {}), True),
    (("eab-2", {}), ("dpmpp-2m", {"solver_type": "heun"}), True),
    (("eab-2", {}), ("dpmpp-2m", {"solver_type": "midpoint"}), False),
    (("eab-2", {"predict": "eps"}), ("dpm-solver-2m", {"solver_type": "taylor"}), True),
    (("eab-2", {"predict": "eps"}), ("eab-2", {"predict": "x0"}), False),
    (("eab-3", {}), ("dpmpp-3m", {"solver_type": "heun", "weights": "exact"}), True),
    (("eab-3", {}), ("dpmpp-3m", {"solver_type": "midpoint", "weights": "exact"}), False),
    (("eab-3", {}), ("dpmpp-3m", {"solver_type": "heun", "weights": "published"}), False),
    (("eab-3", {"predict": "eps"}), ("dpm-solver-3m", {"solver_type": "heun", "weights": "exact"}), True),
    (("dpmpp-3m", {"solver_type": "heun"}), ("dpmpp-3m", {"solver_type": "taylor"}), True),
    (
        ("dpmpp-3m", {}),
        ("dpmpp-3m", {"weights": "published", "solver_type": "midpoint", "lower_order_final": 15}),
        True,
    ),
]


@pytest.mark.parametrize(("a", "b", "same"), SAME)
@pytest.mark.parametrize("final", ["t_min", "zero"])
@pytest.mark.parametrize("schedule", ["vp_linear", "edm", "flow", "discrete"], indirect=True)
def test_methods_that_are_one(schedule, final, a, b, same):
    plans = [make_plan(n, schedule, steps=8, grid="uniform", final=final, **options) for n, options in (a, b)]
    assert plans[0].close(plans[1], rtol=1e-12) == same


@pytest.mark.parametrize("predict", ["x0", "eps"])
def test_published_third_order_takes_half_of_the_second_difference(predict):
    """A step of the published form is the mean of the exact one and the one without the second difference."""
    name = "dpmpp-3m" if predict == "x0" else "dpm-solver-3m"
    times = VP.t_of_lam(np.array([-1.0, -0.3, 0.1, 0.7]))
    outputs, lam = np.array([0.3, -0.4, 1.1]), [-1.0, -0.3, 0.1, 0.7]
    by_weights = {
        w: make_plan(name, VP, timesteps=times, weights=w, lower_order_final=False).instructions[-1].terms
        for w in ("published", "exact")
    }
    published, exact = (sum(c * outputs[2 - j] for j, (_, c) in enumerate(terms[1:])) for terms in by_weights.values())
    h, sign, scale = 0.6, *((1, VP.sigma(times[3])) if predict == "eps" else (-1, VP.alpha(times[3])))
    newest, *_ = outputs[::-1]
    slopes = [(outputs[j + 1] - outputs[j]) / (lam[j + 1] - lam[j]) for j in range(2)]
    curvature = (slopes[1] - slopes[0]) / (lam[2] - lam[0])
    slope_now = slopes[1] + curvature * (lam[2] - lam[1])
    psi_1 = math.expm1(sign * h)
    psi_2 = psi_1 / (sign * h) - 1
    psi_3 = psi_2 / (sign * h) - 0.5
    without = -scale * (psi_1 * newest + psi_2 * h * slope_now)
    assert exact == pytest.approx(without - scale * psi_3 * 2 * h**2 * curvature, rel=1e-12)
    assert published == pytest.approx(0.5 * (without + exact), rel=1e-12)


# ends, start, options --------------------------------------------------------------------------------------------------


def terms_of(plan):
    """Names of the outputs in each combination."""
    return [[n for n, _ in s.terms if n[0] == "o"] for s in plan.instructions if isinstance(s, Combine)]


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [
        ("eab-3", {}, [1, 2, 3, 3, 3, 2, 1]),
        ("eab-4", {"lower_order_final": False}, [1, 2, 3, 4, 4, 4, 4]),
        ("eab-4", {"lower_order_final": 7}, [1, 2, 3, 4, 4, 4, 4]),
        ("eab-4", {"lower_order_final": 8}, [1, 2, 3, 4, 3, 2, 1]),
        ("dpmpp-3m", {}, [1, 2, 3, 3, 3, 2, 1]),
        ("dpm-solver-3m", {"lower_order_final": False}, [1, 2, 3, 3, 3, 3, 3]),
    ],
)
def test_orders_rise_and_fall(name, options, counts):
    plan = make_plan(name, VP, steps=7, **options)
    assert list(map(len, terms_of(plan))) == counts
    to_zero = make_plan(name, VP, steps=7, final="zero", **options)
    assert list(map(len, terms_of(to_zero))) == [*counts[:-1], 1]


@pytest.mark.parametrize("name", ALL)
def test_a_start_at_pure_noise_never_enters_the_history(name):
    plan = make_plan(name, FLOW, steps=5, grid="uniform", lower_order_final=False)
    assert terms_of(plan)[0] == ["o0"]
    assert terms_of(plan)[1] == ["o1"]
    assert not any("o0" in names for names in terms_of(plan)[1:])


@pytest.mark.parametrize("name", ALL)
def test_the_step_to_zero_noise_is_ddims(name):
    options = {"lower_order_final": False, "grid": "logsnr"}
    last = make_plan(name, VP, steps=6, final="zero", **options).instructions[-1]
    if name.startswith("eab") or name == "dpmpp-3m":
        assert last.terms == (("o5", 1.0),)  # x0 itself
    else:
        ddim = make_plan("ddim", VP, steps=6, grid="logsnr", final="zero").instructions[-1]
        assert [c for _, c in last.terms] == [c for _, c in ddim.terms]


@pytest.mark.parametrize("name", ALL)
def test_ten_steps_have_their_digits_on_a_grid_of_short_and_long_steps(name):
    """Steps of 1e-6 in lam beside steps of 3: weights from differences this small stay finite and sum to psi_1."""
    lam = np.array([-4.0, -1.0, -1.0 + 1e-6, 0.0, 2e-6, 1.0, 4.0])
    plan = make_plan(name, VP, timesteps=VP.t_of_lam(lam), lower_order_final=False)
    nodes = from_timesteps(VP, VP.t_of_lam(lam))
    for i, step in enumerate(s for s in plan.instructions if isinstance(s, Combine)):
        whole = sum(c for n, c in step.terms if n[0] == "o")
        if plan.prediction == "eps":
            expected = nodes.sigma[i + 1] - nodes.sigma[i] * nodes.alpha[i + 1] / nodes.alpha[i]
        else:
            expected = nodes.alpha[i + 1] - nodes.alpha[i] * nodes.sigma[i + 1] / nodes.sigma[i]
        largest = max(abs(c) for _, c in step.terms)
        assert whole == pytest.approx(expected, abs=1e-14 * largest, rel=1e-8)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("eab-2", {"predict": "v"}, "unknown predict 'v'; .*accepted: eps, x0"),
        ("eab-2", {"lower_order_final": -1}, "lower_order_final must be True, False or a step count, got -1"),
        ("dpmpp-3m", {"weights": "exat"}, "unknown weights 'exat'; did you mean 'exact'"),
        ("dpmpp-3m", {"solver_type": "bh1"}, "unknown solver_type 'bh1'"),
        ("dpmpp-2m", {"weights": "exact"}, "unknown option of sampler 'dpmpp-2m': 'weights'"),
        ("dpmpp-3s", {"r1": 0.9}, "r1 and r2 must satisfy"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(name, VP, steps=5, **options)


# diffusers -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(mixture):
    return EpsModel(mixture.net(SCHEDULE), SCHEDULE)


def follow(made, model, monkeypatch):
    """Their loop, with the float32 that they round the state to made float64."""
    x = X_T
    for t in made.timesteps:
        out = model(x, float(t))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "float32", torch.float64)
            x = made.step(out, t, x).prev_sample
    return x


@pytest.mark.parity
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 14, 15, 30])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize(
    ("name", "algorithm", "final"),
    [
        ("dpmpp-3m", "dpmsolver++", "zero"),
        ("dpmpp-3m", "dpmsolver++", "sigma_min"),
        ("dpm-solver-3m", "dpmsolver", "sigma_min"),
    ],
)
def test_third_order_multistep_dpm_solver(model, monkeypatch, name, algorithm, final, solver_type, steps):
    made, where = multistep(steps, final, solver_order=3, algorithm_type=algorithm, solver_type=solver_type)
    got = run_plan(make_plan(name, SCHEDULE, solver_type=solver_type, **where), model, X_T)
    assert_same(got, follow(made, model, monkeypatch), 1e-10)


def singlestep_scheduler(order, steps, algorithm, solver_type, final):
    """Theirs on our nodes: one of its timesteps for each call, the inner ones at equal fractions in lam."""
    made = scheduler(
        "DPMSolverSinglestepScheduler",
        steps,
        solver_order=order,
        algorithm_type=algorithm,
        solver_type=solver_type,
        final_sigmas_type=final,
        lower_order_final=True,
    )
    orders = [1]  # of whole steps: their list counts the calls of each, 1, 2, 3, 1, 2, 3, ...
    for before, after in itertools.pairwise(made.order_list):
        orders = [*orders[:-1], after] if after == before + 1 else [*orders, 1]
    lam = np.linspace(SCHEDULE.lam(999.0), SCHEDULE.lam(0.0), len(orders) + 1)
    every = [a + (b - a) * j / k for (a, b), k in zip(itertools.pairwise(lam), orders, strict=True) for j in range(k)]
    made.timesteps = torch.tensor(SCHEDULE.t_of_lam(np.array(every)))
    last = 0.0 if final == "zero" else math.exp(-lam[-1])
    made.sigmas = torch.tensor([*np.exp(-np.array(every)), last], dtype=torch.float64)
    times = SCHEDULE.t_of_lam(lam)
    return made, np.append(times[:-1], SCHEDULE.t_zero if final == "zero" else times[-1]), orders


@pytest.mark.parity
@pytest.mark.parametrize("steps", [1, 2, 6, 7, 8, 20])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize(
    ("prediction", "algorithm", "final"),
    [("x0", "dpmsolver++", "zero"), ("x0", "dpmsolver++", "sigma_min"), ("eps", "dpmsolver", "sigma_min")],
)
@pytest.mark.parametrize("order", [2, 3])
def test_singlestep_dpm_solver(model, order, prediction, algorithm, final, solver_type, steps):
    made, times, orders = singlestep_scheduler(order, steps, algorithm, solver_type, final)
    x = X_T
    for index, t in enumerate(made.timesteps):
        if order == 3:
            # The second inner point of their third-order "midpoint" step comes from the midpoint form of second order. The
            # paper (arXiv:2206.00927, algorithm 2) and ours take psi_2 there, which is what they call "heun".
            inner = made.order_list[index] == 2 and made.order_list[index + 1 : index + 2] == [3]
            made.register_to_config(solver_type="heun" if inner else solver_type)
        x = made.step(model(x, float(t)), t, x).prev_sample
    plan = singlestep(Grid(SCHEDULE, times), prediction=prediction, order=order, solver_type=solver_type, orders=orders)
    assert_same(run_plan(plan, model, X_T), x, 1e-10)
