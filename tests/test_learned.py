"""Plans as parameters: gradients against finite differences, the start equal to the plan, and training that helps."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import SCHEDULES

from samplers import EpsModel, LearnedPlan, make_plan, run_plan, sample, schedules
from samplers.plan import Plan, PlanError

VP, EDM = schedules.vp_linear(), schedules.edm()
DISCRETE = schedules.from_betas([1e-4 + 2e-5 * i for i in range(1000)])
FLOW = schedules.flow()


def start(schedule, n=3):
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return schedule.sigma(schedule.t_max) * z


@pytest.mark.parametrize("name", ["ddim", "ddpm", "heun", "dpmpp-2m", "dpm-solver-3s"])
@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
def test_untrained_it_is_the_plan(exact, name, predicts):
    plan, model, x_T = make_plan(name, VP, steps=4, final="zero"), exact(VP, predicts), start(VP)
    learned = LearnedPlan(plan, VP)
    assert learned.plan() == plan
    torch.testing.assert_close(learned(model, x_T, seed=3), run_plan(plan, model, x_T, seed=3), rtol=1e-12, atol=1e-12)


def test_a_stochastic_plan_has_gradients_by_torch_func_too():
    learned = LearnedPlan(make_plan("dpmpp-2m-sde", VP, steps=3), VP)
    model, x_T = EpsModel(lambda x, t: 0.5 * x, VP), torch.randn(2, 3)
    leaf = x_T.clone().requires_grad_()
    learned(model, leaf).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: learned(model, x).square().sum())(x_T), leaf.grad)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp-2m", "euler-ancestral"])
@pytest.mark.parametrize(("schedule", "predicts"), [(VP, "eps"), (VP, "v"), (EDM, "edm"), (DISCRETE, "v")])
def test_gradients_are_finite_differences(exact, name, schedule, predicts):
    learned = LearnedPlan(make_plan(name, schedule, steps=3), schedule)
    model, x_T = exact(schedule, predicts), start(schedule)

    def run(coefficients, times):
        state = {"coefficients": coefficients, "times": times}
        return torch.func.functional_call(learned, state, (model, x_T), {"seed": 1})

    # one-sided at the ends would leave the schedule's range
    # and a discrete schedule has a kink at every training step
    inside = (0.99 * learned.times + 0.01 * learned.times.mean() + (0.37 if schedule is DISCRETE else 0.0)).detach()
    inside.requires_grad_()
    learned(model, x_T, seed=1).sum().backward()
    assert learned.times.grad.isfinite().all()  # also at the end of the range
    # a network sees (B,) times, so its own derivative in t counts too
    assert torch.autograd.gradcheck(run, (learned.coefficients, inside), eps=1e-6, rtol=1e-4, atol=1e-6)


def test_training_brings_ddim_nearer_to_the_solution(exact):
    model, x_T = exact(VP), start(VP, 64)
    solution = sample(model, "rk45", x_T=x_T, rtol=1e-8, atol=1e-8)
    learned = LearnedPlan(make_plan("ddim", VP, steps=5), VP)

    def error(x):
        return (x - solution).square().mean()

    before = float(error(run_plan(learned.plan(), model, x_T)))
    optimizer = torch.optim.Adam(learned.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        error(learned(model, x_T)).backward()
        optimizer.step()
    trained = learned.plan()
    assert float(error(run_plan(trained, model, x_T))) < 0.5 * before
    assert Plan.from_json(trained.to_json()) == trained
    assert trained.sigma_T == VP.sigma(trained.times[0])


@pytest.mark.parametrize("schedule", list(SCHEDULES), indirect=True)
@pytest.mark.parametrize("predicts", ["eps", "v", "x0", "flow"])
@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m"])
def test_a_first_step_of_training_is_finite_on_every_schedule(exact, schedule, predicts, name):
    if predicts == "eps" and schedule.alpha(schedule.t_max) == 0:
        predicts = "v"
    learned, model = LearnedPlan(make_plan(name, schedule, steps=3), schedule), exact(schedule, predicts)
    optimizer = torch.optim.Adam(learned.parameters(), lr=1e-4 * schedule.t_max)
    for _ in range(3):
        optimizer.zero_grad()
        learned(model, start(schedule)).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in learned.parameters())
        optimizer.step()
    assert run_plan(learned.plan(), model, start(schedule)).isfinite().all()


@pytest.mark.parametrize(("end", "outside"), [(0, 1.05), (-1, -0.2)])
def test_a_time_that_left_the_range_is_used_at_its_end_and_can_come_back(exact, end, outside):
    learned, model = LearnedPlan(make_plan("heun", FLOW, steps=3), FLOW), exact(FLOW, "flow")
    limit = (FLOW.t_max, FLOW.t_min)[end]
    with torch.no_grad():
        learned.times[end] = limit
    at_the_end = learned(model, start(FLOW))
    at_the_end.sum().backward()
    expected = learned.times.grad.clone()
    with torch.no_grad():
        learned.times[end] = outside
    learned.times.grad = None
    beyond = learned(model, start(FLOW))
    beyond.sum().backward()
    assert torch.equal(beyond, at_the_end)
    assert torch.equal(learned.times.grad, expected)
    assert expected[end] != 0
    call = learned.plan().calls[end]
    assert (call.t, call.alpha, call.sigma) == (limit, 1 - limit, limit)


def test_two_times_at_one_end_are_no_plan(exact):
    learned = LearnedPlan(make_plan("ddim", FLOW, steps=3), FLOW)
    with torch.no_grad():
        learned.times[:2] = 2.0
    with pytest.raises(PlanError, match="times: must be at least 2 and decrease strictly"):
        learned.plan()


def test_times_that_are_nan_are_no_plan():
    learned = LearnedPlan(make_plan("ddim", DISCRETE, steps=3), DISCRETE)
    with torch.no_grad():
        learned.times[1] = math.nan
    with pytest.raises(PlanError, match="times: must be at least 2 and decrease strictly"):
        learned.plan()


def test_another_schedule_is_refused():
    with pytest.raises(ValueError, match=r"made on another schedule: its call at t=1 has alpha=0\.0065"):
        LearnedPlan(make_plan("dpmpp-2m", VP, steps=4), schedules.cosine())


def test_epsilon_at_pure_noise_is_refused_as_in_a_run(exact):
    learned = LearnedPlan(make_plan("ddim", FLOW, steps=3), FLOW)
    with pytest.raises(ValueError, match="predicts='eps' gives no x0 at t=1, where alpha=0"):
        learned(exact(FLOW, "eps"), start(FLOW))


def test_nothing_but_the_numbers_is_learned(exact):
    learned = LearnedPlan(make_plan("dpmpp-2m", VP, steps=5), VP)
    assert {name for name, _ in learned.named_parameters()} == {"coefficients", "times"}
    with torch.no_grad():
        learned.times[1] = learned.times[0] + 1
    with pytest.raises(PlanError, match="times: must be at least 2 and decrease strictly"):
        learned.plan()
