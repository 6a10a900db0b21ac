"""The analytical first step: what it replaces, in every sampler, what it saves, and where it is refused."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from samplers import EpsModel, Plan, list_samplers, make_plan, run_plan, sample, schedules
from samplers.program import Combine, Evaluate
from samplers.transform import analytical_first_step

VP, EDM, FLOW = schedules.vp_linear(), schedules.edm(), schedules.flow()
ENTRIES = {s.name: s for s in list_samplers() if not s.adaptive}
every_sampler = pytest.mark.parametrize("name", ENTRIES)
X_T = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def known_at_first(model):
    """The model with `x / sqrt(alpha^2 + sigma^2)` at its first call."""
    calls = []

    def net(x, t):
        calls.append(float(t[0]))
        alpha, sigma = (float(f(calls[0])) for f in (model.schedule.alpha, model.schedule.sigma))
        return x / math.hypot(alpha, sigma) if len(calls) == 1 else model(x, t)

    return EpsModel(net, model.schedule), calls


@every_sampler
@pytest.mark.parametrize("schedule", [VP, EDM], ids=["vp", "edm"])
def test_only_the_first_call_is_replaced(exact, schedule, name):
    plan = make_plan(name, schedule, steps=4, grid="karras")
    short = make_plan(name, schedule, steps=4, grid="karras", afs=True)
    assert short.nfe == plan.nfe - 1
    assert short.calls == plan.calls[1:]
    x_T = schedule.sigma(schedule.t_max) * X_T
    model, calls = known_at_first(exact(schedule))
    expected = run_plan(plan, model, x_T)
    assert len(calls) == plan.nfe
    torch.testing.assert_close(run_plan(short, exact(schedule), x_T), expected, rtol=1e-9, atol=1e-9)
    assert (expected - run_plan(plan, exact(schedule), x_T)).abs().max() > 1e-9  # and it does matter


@every_sampler
@pytest.mark.parametrize("final", ["t_min", "zero", "denoise"])
def test_a_budget_has_room_for_one_call_more(name, final):
    fewest = make_plan(name, VP, steps=1, grid="quadratic", final=final).nfe
    for nfe in range(1, fewest + 12):

        def plan_of(nfe, afs):
            return make_plan(name, VP, nfe=nfe, grid="quadratic", final=final, afs=afs)

        try:
            plan = plan_of(nfe + 1, False)
        except ValueError as error:
            least = int(re.search(r"nfe must be at least (\d+)", str(error))[1]) - 1
            with pytest.raises(ValueError, match=f"nfe must be at least {least} for '{name}' here, got {nfe}"):
                plan_of(nfe, True)
            continue
        if plan.nfe == 1:
            with pytest.raises(ValueError, match="this plan has no other"):
                plan_of(nfe, True)
            continue
        short = plan_of(nfe, True)
        assert short.nfe == plan.nfe - 1 <= nfe
        assert short.times == plan.times


def test_one_step_of_published_code():
    # Euler on EDM's equation with d = x / sqrt(1 + sigma^2) in the first step
    plan = make_plan("euler", EDM, sigmas=[80.0, 10.0, 0.0], afs=True)
    states = []
    run_plan(plan, EpsModel(lambda x, t: 0 * x, EDM), 80 * X_T, callback=lambda p: states.append(p.x.clone()))
    torch.testing.assert_close(states[0], 80 * X_T * (1 - 70 / math.sqrt(1 + 80**2)), rtol=1e-12, atol=0)


def test_x0_is_the_same_statement_as_epsilon():
    eps, x0 = (make_plan(name, VP, steps=2, afs=True) for name in ("dpm-solver-2m", "dpmpp-2m"))
    (_, by_eps), (_, by_x0) = eps.instructions[0].terms[0], x0.instructions[0].terms[0]
    alpha, sigma = VP.alpha(1.0), VP.sigma(1.0)
    assert by_eps == pytest.approx(1 / math.hypot(alpha, sigma), rel=1e-14)
    assert by_x0 == pytest.approx((1 - sigma * by_eps) / alpha, rel=1e-10)  # that form loses digits


@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m", "heun", "ddpm"])
def test_it_shows_in_the_exported_plan(name):
    plan = make_plan(name, VP, steps=3, afs=True)
    document = json.loads(plan.to_json())
    assert document["sampler"] == plan.sampler == f"{name}+afs"
    assert [step["op"] for step in document["instructions"][:2]] == ["combine", "combine"]
    assert document["instructions"][0]["terms"][0][0] == "x_T"
    assert document["instructions"][0]["node"] is None
    back = Plan.from_json(plan.to_json())
    assert (back, back.sampler) == (plan, plan.sampler)
    assert plan != make_plan(name, VP, steps=3)
    assert plan == analytical_first_step(make_plan(name, VP, steps=3))


def test_a_callback_sees_every_step(exact):
    told = []
    x = sample(exact(VP), "heun", x_T=X_T, steps=4, afs=True, callback=lambda p: told.append((p.step, p.nfe)))
    assert told == [(1, 1), (2, 3), (3, 5), (4, 7)]
    assert torch.equal(x, run_plan(make_plan("heun", VP, steps=4, afs=True), exact(VP), X_T))


def test_in_the_plans_matrix():
    plan, short = (make_plan("ddim", VP, steps=2, grid="uniform", afs=afs) for afs in (False, True))
    full, reduced = plan.matrix(), short.matrix()
    std = math.hypot(VP.alpha(1.0), VP.sigma(1.0))
    assert reduced[-1, 0] == pytest.approx(full[-1, 0] + full[-1, 1] / std, rel=1e-12)
    assert reduced[-1, 1] == pytest.approx(full[-1, 2], rel=1e-12)


def test_little_is_lost_where_the_data_hardly_shows(exact):
    # sigma_bar = 80, ten times the width of the mixture: the first step's error is far below that of ten steps
    full, first = (sample(exact(EDM), "dpmpp-2m", x_T=80 * X_T, steps=10, afs=afs) for afs in (False, True))
    solution = sample(exact(EDM), "rk45", x_T=80 * X_T, rtol=1e-9, atol=1e-9)
    assert (full - first).abs().max() < 0.3 * (full - solution).abs().max()


@every_sampler
def test_nothing_would_be_left(name):
    plan = make_plan(name, VP, steps=1, final="zero")
    if plan.nfe == 1:
        with pytest.raises(ValueError, match="afs=True replaces the first network call, and this plan has no other"):
            make_plan(name, VP, steps=1, final="zero", afs=True)


@every_sampler
@pytest.mark.parametrize("how", ["steps", "nfe"])
def test_no_epsilon_at_alpha_zero(name, how):
    with pytest.raises(ValueError, match=r"afs=True needs alpha > 0 at the first .* starts at alpha = 0 \(t=1\)"):
        make_plan(name, FLOW, grid="uniform", afs=True, **{how: 60})
    assert make_plan(name, FLOW, timesteps=[0.9, 0.5, 0.1], afs=True).nfe >= 1


@pytest.mark.parametrize("call", [make_plan, lambda *a, **k: sample(EpsModel(lambda x, t: x, VP), a[0], x_T=X_T, **k)])
@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("ddim", {"afs": 1, "steps": 3}, TypeError, "afs must be True or False, got 1"),
        ("ddim", {"afs": "yes", "steps": 3}, TypeError, "afs must be True or False, got 'yes'"),
        ("rk45", {"afs": True, "nfe": 30}, ValueError, "afs=True .* and sampler 'rk45' has no plan"),
        ("ddim", {"afs": True, "nfe": 1, "final": "denoise"}, None, ""),
        ("heun", {"afs": True, "nfe": 1, "final": "zero"}, None, ""),
        ("restart", {"afs": True, "nfe": 1, "final": "zero"}, ValueError, "this plan has no other"),
        (
            "restart",
            {"afs": True, "nfe": 1, "final": "denoise"},
            ValueError,
            "nfe must be at least 10 for 'restart' here, got 1",
        ),
    ],
)
def test_bad_arguments(call, name, options, error, message):
    if error is None:
        call(name, VP, **options)
        return
    with pytest.raises(error, match=message):
        call(name, VP, **options)


def test_every_name_is_defined_before_it_is_used():
    plan = make_plan("dpm-solver-3s", VP, steps=2, afs=True)
    assert isinstance(plan.instructions[0], Combine)
    assert plan.instructions[0].dst == "o0"
    assert all(step.dst != "o0" for step in plan.instructions[1:])
    assert sum(isinstance(step, Evaluate) for step in plan.instructions) == 5
