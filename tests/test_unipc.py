"""UniPC against exact solutions, against samplers that it contains, and against diffusers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_exponential_multistep import BY_NAME, exact_states, last_step, slope, terms_of
from test_parity import SCHEDULE, X_T, assert_same, scheduler
from test_solvers import network

from samplers import EpsModel, make_plan, run_plan, schedules
from samplers.draft import Draft
from samplers.program import Combine, Evaluate

VP, FLOW = schedules.vp_linear(), schedules.flow()
VARIANTS, ORDERS = ("bh1", "bh2", "vary_coeff"), (1, 2, 3, 4)


# A corrected first-order start leaves an error of third order in its step, which shows where the first step is long in lam:
# on the quadratic grid of the cosine schedule.
@pytest.mark.parametrize(
    ("p", "options", "on", "grid", "n", "order"),
    [
        *((1, {"variant": v, "predict": q}, "vp_linear", "logsnr", 320, 2) for v in VARIANTS for q in ("x0", "eps")),
        *((2, {"variant": v, "predict": q}, "vp_linear", "logsnr", 320, 3) for v in VARIANTS for q in ("x0", "eps")),
        *((2, {"variant": v}, "edm", "quadratic", 640, 3) for v in VARIANTS),
        *((2, {"variant": v}, "vp_linear", "quadratic", 320, 3) for v in VARIANTS),
        (2, {}, "cosine", "quadratic", 320, 3),
        (2, {"predict": "eps"}, "edm", "quadratic", 320, 3),
        (3, {}, "vp_linear", "logsnr", 1280, 4),
        (3, {"predict": "eps"}, "vp_linear", "logsnr", 1280, 4),
        (3, {}, "vp_linear", "quadratic", 320, 4),
        (3, {"predict": "eps"}, "vp_linear", "quadratic", 320, 4),
        (3, {}, "cosine", "logsnr", 1280, 4),
        (3, {}, "edm", "logsnr", 1280, 4),
        (3, {}, "edm", "quadratic", 640, 4),
        (3, {"predict": "eps"}, "cosine", "quadratic", 640, 3),
        *((4, {}, on, "logsnr", 320, 5) for on in BY_NAME),
        *((4, {"predict": "eps"}, on, "logsnr", 320, 5) for on in BY_NAME),
        (4, {}, "vp_linear", "quadratic", 320, 5),
        (4, {}, "edm", "quadratic", 640, 5),
        (4, {"predict": "eps"}, "cosine", "quadratic", 640, 3),
        # without the corrector, order p, or 2 where the start shows
        *((p, {"corrector": False}, "vp_linear", "quadratic", 320, p) for p in (1, 2, 3, 4)),
        *((p, {"corrector": False}, "cosine", "quadratic", 640, 2) for p in (2, 3, 4)),
        (3, {"corrector": False, "predict": "eps"}, "edm", "logsnr", 320, 3),
    ],
)
def test_global_order(problem_on, p, options, on, grid, n, order):
    assert abs(slope(problem_on(on), f"unipc-{p}", grid, n, **options) - order) <= 0.2


def corrected(full, bare, state, outputs):
    """The corrected state before the last step, from the predicted one: the last step's combination without what the
    predictor alone takes of the outputs, divided by the factor on the state."""
    ours, theirs = full.instructions[-1].terms, bare.instructions[-1].terms
    values = {f"o{j}": out for j, out in enumerate(outputs)} | {ours[0][0]: state}
    following = sum(c * values[n] for n, c in ours) - sum(c * values[n] for n, c in theirs[1:])
    return following / ours[0][1]


def local_errors(p, schedule, h, **options):
    """Errors of one predicted and of one corrected state, each from exact history."""
    t, states = exact_states(schedule, p + 2, h)
    model = EpsModel(network(schedule), schedule)

    def plan(nodes, corrector):
        return make_plan(
            f"unipc-{p}", schedule, timesteps=t[:nodes], lower_order_final=False, corrector=corrector, **options
        )

    predicted = last_step(plan(p + 1, False), model, states)
    quantity = model.eps if options["predict"] == "eps" else model.x0
    outputs = [
        quantity(x, torch.full((8,), float(time), dtype=torch.float64))
        for x, time in zip([*states[:p], predicted], t, strict=False)
    ]
    fixed = corrected(plan(p + 2, True), plan(p + 2, False), predicted, outputs)
    return [float((x - states[p]).pow(2).mean().sqrt()) for x in (predicted, fixed)]


@pytest.mark.parametrize("predict", ["x0", "eps"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("on", BY_NAME)
def test_local_orders(on, p, variant, predict):
    coarse, fine = (local_errors(p, BY_NAME[on], h, variant=variant, predict=predict) for h in (0.02, 0.01))
    of_predictor, of_corrector = (math.log2(a / b) for a, b in zip(coarse, fine, strict=True))
    assert abs(of_predictor - (p + 1)) <= 0.2
    assert abs(of_corrector - (p + 2)) <= 0.2


@pytest.mark.parametrize("p", ORDERS)
def test_one_percent_on_the_newest_output_breaks_the_local_order(monkeypatch, p):
    exact = Draft.combine

    def faulty(self, node, *terms):
        return exact(
            self, node, *(terms if len(terms) < p + 2 else (terms[0], (terms[1][0], 1.01 * terms[1][1]), *terms[2:]))
        )

    monkeypatch.setattr(Draft, "combine", faulty)
    coarse, fine = (local_errors(p, VP, h, variant="bh2", predict="x0") for h in (0.02, 0.01))
    assert abs(math.log2(coarse[1] / fine[1]) - (p + 2)) > 0.2


# what it contains ------------------------------------------------------------------------------------------------------

BARE = {"corrector": False}
SAME = [
    (("unipc-1", BARE), ("ddim", {}), True),
    (("unipc-1", BARE | {"predict": "eps", "variant": "bh1"}), ("ddim", {}), True),
    (("unipc-1", {}), ("ddim", {}), False),
    (("unipc-2", BARE), ("dpmpp-2m", {"solver_type": "midpoint"}), True),
    (("unipc-2", BARE | {"predict": "eps"}), ("dpm-solver-2m", {"solver_type": "midpoint"}), True),
    (("unipc-2", BARE | {"variant": "bh1"}), ("dpmpp-2m", {"solver_type": "midpoint"}), False),
    (("unipc-2", BARE | {"variant": "vary_coeff"}), ("dpmpp-2m", {"solver_type": "heun"}), True),
    (("unipc-3", BARE), ("dpmpp-3m", {"weights": "exact"}), True),
    (("unipc-3", BARE | {"variant": "vary_coeff"}), ("eab-3", {}), True),
    (("unipc-4", BARE | {"variant": "vary_coeff"}), ("eab-4", {}), True),
    (("unipc-4", BARE | {"variant": "vary_coeff", "predict": "eps"}), ("eab-4", {"predict": "eps"}), True),
    (("unipc-3", {"variant": "bh1"}), ("unipc-3", {"variant": "bh2"}), False),  # by their starts and ends alone
    (("unipc-3", {}), ("unipc-3", {"variant": "bh2", "predict": "x0", "lower_order_final": 15}), True),
]


@pytest.mark.parametrize(("a", "b", "same"), SAME)
@pytest.mark.parametrize("final", ["t_min", "zero"])
@pytest.mark.parametrize("schedule", ["vp_linear", "edm", "flow", "discrete"], indirect=True)
def test_methods_that_are_one(schedule, final, a, b, same):
    plans = [make_plan(n, schedule, steps=8, grid="uniform", final=final, **options) for n, options in (a, b)]
    assert plans[0].close(plans[1], rtol=1e-12) == same


@pytest.mark.parametrize("predict", ["x0", "eps"])
def test_b_of_h_cancels_where_the_weights_are_solved_for(predict):
    """From the fourth step of unipc-3 on, predictor and corrector are of order 3, and the variants agree."""
    bh1, bh2, vary = (
        make_plan("unipc-3", VP, steps=9, variant=v, predict=predict, lower_order_final=False).instructions
        for v in VARIANTS
    )
    for i, (a, b, c) in enumerate(zip(bh1, bh2, vary, strict=True)):
        if isinstance(a, Combine):
            equal = all(
                x == pytest.approx(y, rel=1e-11) == z
                for (_, x), (_, y), (_, z) in zip(a.terms, b.terms, c.terms, strict=True)
            )
            assert equal == (i >= 7 or i == 1)  # the first prediction is DDIM's


def reference(schedule, times, model, x, p, variant, predict, corrector):
    """UniPC as the paper states it, step by step: the linear systems for the weights on D_m / r_m, and separate states."""
    alpha, sigma, lam = schedule.alpha(times), schedule.sigma(times), schedule.lam(times)
    quantity = model.eps if predict == "eps" else model.x0
    outputs, steps = [quantity(x, float(times[0]))], len(times) - 1

    def step(i, x, order, points):
        """From node i, with the outputs at these nodes beside the one there; first order to sigma = 0."""
        if sigma[i + 1] == 0:
            return outputs[i] if predict == "x0" else (x - sigma[i] * outputs[i]) / alpha[i]
        h = lam[i + 1] - lam[i]
        z = h if predict == "eps" else -h
        keep, scale = (alpha, sigma) if predict == "eps" else (sigma, alpha)
        new = keep[i + 1] / keep[i] * x - scale[i + 1] * math.expm1(z) * outputs[i]
        r = np.array([(lam[j] - lam[i]) / h for j in points])
        if not len(r):
            return new
        psi = [math.expm1(z)]
        for k in range(len(r)):
            psi.append(psi[-1] / z - 1 / math.factorial(k + 1))  # psi_2, psi_3, ...
        b = z if variant == "bh1" else math.expm1(z)
        if variant != "vary_coeff":  # R rho = b / B(h)
            right = [math.factorial(k + 1) * psi[k + 1] / b for k in range(len(r))]
            rho = np.linalg.solve(np.stack([r**k for k in range(len(r))]), right)
            rho = np.array([0.5]) if len(r) == 1 else rho
            weights = b * rho
        else:  # all of A = C^-1, where C_mk = r_m^(k-1) / k!
            inverse = np.linalg.inv(np.stack([r**k / math.factorial(k + 1) for k in range(len(r))], axis=1))
            weights = np.array(psi[1:]) @ inverse
        return new - scale[i + 1] * sum(
            w / m * (outputs[j] - outputs[i]) for w, m, j in zip(weights, r, points, strict=True)
        )

    for i in range(steps):
        order = min(i + 1, p)
        before = list(range(i - 1, i - order, -1))
        predicted = step(i, x, order, before)
        if i + 1 == steps:
            return predicted
        outputs.append(quantity(predicted, float(times[i + 1])))
        x = step(i, x, order, [*before, i + 1]) if corrector else predicted


@pytest.mark.parametrize("to_zero", [False, True])
@pytest.mark.parametrize("corrector", [True, False])
@pytest.mark.parametrize("predict", ["x0", "eps"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("p", ORDERS)
def test_the_papers_linear_systems_give_the_same(exact, p, variant, predict, corrector, to_zero):
    sigmas = np.append(np.geomspace(20.0, 0.1, 8), [0.0] * to_zero)
    model, x_T = exact(VP), torch.randn(4, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options = {"variant": variant, "predict": predict, "corrector": corrector, "lower_order_final": False}
    plan = make_plan(f"unipc-{p}", VP, sigmas=sigmas**1.1, **options)
    want = reference(VP, np.array(plan.times), model, x_T, p, variant, predict, corrector)
    torch.testing.assert_close(run_plan(plan, model, x_T), want, rtol=1e-11, atol=1e-11)


# shape of the plan, ends, options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("final", ["t_min", "zero"])
@pytest.mark.parametrize("p", ORDERS)
def test_one_call_and_one_combination_a_step(p, final):
    plan = make_plan(f"unipc-{p}", VP, steps=20, final=final)
    assert [type(s) for s in plan.instructions] == [Evaluate, Combine] * 20
    assert [s.node for s in plan.instructions[1::2]] == list(range(1, 21))
    assert all(len([n for n, _ in s.terms if n[0] != "o"]) == 1 for s in plan.instructions[1:-1:2])
    counts = [len(names) for names in terms_of(plan)]
    if final == "t_min":
        assert counts == [min(i, p) + 1 for i in range(20)]
    else:  # in x0 a step to sigma = 0 takes nothing but the last output
        assert counts == [*(min(i, p) + 1 for i in range(19)), 1]


def test_a_start_at_pure_noise_never_enters_the_history():
    plan = make_plan("unipc-3", FLOW, steps=6, grid="uniform", lower_order_final=False)
    assert [sorted(names) for names in terms_of(plan)] == [
        ["o0"],
        ["o1"],
        ["o1", "o2"],
        ["o1", "o2", "o3"],
        ["o1", "o2", "o3", "o4"],
        ["o2", "o3", "o4", "o5"],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "bh3"}, "unknown variant 'bh3'; did you mean .*accepted: bh1, bh2, vary_coeff"),
        ({"predict": "x"}, "unknown predict 'x'; .*accepted: eps, x0"),
        ({"lower_order_final": -2}, "lower_order_final must be True, False or a step count, got -2"),
        ({"solver_type": "bh1"}, "unknown option of sampler 'unipc-2': 'solver_type'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan("unipc-2", VP, steps=5, **options)


# diffusers -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(mixture):
    return EpsModel(mixture.net(SCHEDULE), SCHEDULE)


def their_states(made, model):
    states = [X_T]
    for t in made.timesteps:
        states.append(made.step(model(states[-1], float(t)), t, states[-1]).prev_sample)
    return states[1:]


def both(model, p, steps, variant, predict, corrector, lower, final):
    """The states of diffusers and ours, after each step."""
    made = scheduler(
        "UniPCMultistepScheduler",
        steps,
        solver_order=p,
        solver_type=variant,
        predict_x0=predict == "x0",
        disable_corrector=[] if corrector else list(range(steps)),
        lower_order_final=lower,
        final_sigmas_type=final,
    )
    times = made.timesteps.tolist()
    if final == "zero":
        where = {"sigmas": [*SCHEDULE.sigma_bar(np.array(times, dtype=float)), 0.0]}
    else:
        where = {"timesteps": [*times, 0]}
    options = {"variant": variant, "predict": predict, "corrector": corrector, "lower_order_final": lower}
    plan, ours = make_plan(f"unipc-{p}", SCHEDULE, **where, **options), []
    run_plan(plan, model, X_T, callback=lambda told: ours.append(told.x.clone()))
    return their_states(made, model), ours


@pytest.mark.parity
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("corrector", [True, False])
@pytest.mark.parametrize("predict", ["x0", "eps"])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("p", ORDERS)
def test_every_state_is_diffusers(model, p, variant, predict, corrector, lower):
    for steps in (1, 2, 3, 10, 20):
        theirs, ours = both(model, p, steps, variant, predict, corrector, lower, "sigma_min")
        assert_same(torch.stack(ours), torch.stack(theirs), 1e-10)


@pytest.mark.parity
@pytest.mark.parametrize("predict", ["x0", "eps"])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("p", ORDERS)
def test_a_last_step_to_zero_noise_where_diffusers_gives_nan(model, p, variant, predict):
    """Theirs is 0 times infinite for B(h) = h and in eps; with lower_order_final=False, infinite or a singular system."""
    theirs, ours = both(model, p, 10, variant, predict, True, True, "zero")
    assert_same(torch.stack(ours[:-1]), torch.stack(theirs[:-1]), 1e-10)
    assert ours[-1].isfinite().all()
    if variant == "bh2" and predict == "x0":
        assert_same(ours[-1], theirs[-1], 1e-10)
    else:
        assert theirs[-1].isnan().all()
