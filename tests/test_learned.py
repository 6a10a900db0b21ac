"""Plans as parameters: gradients against finite differences, the start equal to the plan, and training that helps."""

from __future__ import annotations

import pytest
import torch

from samplers import LearnedPlan, make_plan, run_plan, sample, schedules
from samplers.plan import Plan, PlanError

VP, EDM = schedules.vp_linear(), schedules.edm()
DISCRETE = schedules.from_betas([1e-4 + 2e-5 * i for i in range(1000)])


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


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp-2m", "euler-ancestral"])
@pytest.mark.parametrize(("schedule", "predicts"), [(VP, "eps"), (VP, "v"), (EDM, "edm"), (DISCRETE, "v")])
def test_gradients_are_finite_differences(exact, name, schedule, predicts):
    learned = LearnedPlan(make_plan(name, schedule, steps=3), schedule)
    model, x_T = exact(schedule, predicts), start(schedule)

    def run(coefficients, times):
        state = {"coefficients": coefficients, "times": times}
        return torch.func.functional_call(learned, state, (model, x_T), {"seed": 1})

    # one-sided at the first time would leave the schedule's range
    # and a discrete schedule has a kink at every training step
    inside = (learned.times * 0.99 + (0.37 if schedule is DISCRETE else 0.0)).detach().requires_grad_()
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


def test_nothing_but_the_numbers_is_learned(exact):
    learned = LearnedPlan(make_plan("dpmpp-2m", VP, steps=5), VP)
    assert {name for name, _ in learned.named_parameters()} == {"coefficients", "times"}
    with torch.no_grad():
        learned.times[1] = learned.times[0] + 1
    with pytest.raises(PlanError, match="times: must be at least 2 and decrease strictly"):
        learned.plan()
