"""A plan walked through by a caller, against the executor's own loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from samplers import list_samplers, make_plan, run_plan
from samplers.noise import SeededNoise
from samplers.stepwise import Stepwise

X = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("schedule", ["vp_linear", "flow"], indirect=True)
@pytest.mark.parametrize("name", [entry.name for entry in list_samplers() if entry.build is not None])
def test_it_computes_what_the_executor_does(schedule, exact, name) -> None:
    model = exact(schedule, "v")
    plan = make_plan(name, schedule, steps=5)
    noise = SeededNoise(0, torch.arange(3))
    walk = Stepwise(plan)
    assert walk.starts_at_once
    x = walk.start(X, noise)
    for call in plan.calls:
        x = walk.feed(model.eps(x, call.t) if call.kind == "eps" else model.x0(x, call.t), noise)
    assert walk.done == plan.nfe
    wanted = run_plan(plan, model, X, seed=0)
    assert (x - wanted).abs().max() < 1e-9 * wanted.abs().max()


def test_it_keeps_no_more_than_it_needs(schedule_of_steps) -> None:
    walk = Stepwise(make_plan("dpmpp-2m", schedule_of_steps, steps=9))
    x, most = walk.start(X, _none), 0
    for _ in walk.plan.calls:
        x = walk.feed(x, _none)
        most = max(most, len(walk._values))
    assert most <= 3  # the state, the output and the one before


def test_a_state_that_the_caller_changed_takes_the_place_of_the_plans(schedule_of_steps) -> None:
    plan = make_plan("ddim", schedule_of_steps, steps=2)
    zero = torch.zeros_like(X)
    walk, changed = Stepwise(plan), Stepwise(plan)
    walk.start(X, _none)
    changed.start(zero, _none)
    assert torch.equal(walk.feed(zero, _none), changed.feed(zero, _none, x=X))


def test_there_is_an_end(schedule_of_steps) -> None:
    walk = Stepwise(make_plan("ddim", schedule_of_steps, steps=2))
    x = walk.start(X, _none)
    for _ in range(2):
        x = walk.feed(x, _none)
    with pytest.raises(RuntimeError, match="all 2 calls of the plan are done"):
        walk.feed(x, _none)
    assert walk.done == 2


def _none(k: int, like: Tensor) -> Tensor:
    raise AssertionError("this plan has no noise")


@pytest.fixture
def schedule_of_steps():
    from samplers import schedules

    return schedules.vp_linear()
