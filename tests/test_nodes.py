"""From a budget of network calls to a grid: as many steps as fit, whatever a step takes, found from few plans."""

from __future__ import annotations

import dataclasses

import pytest

from samplers import make_plan, schedules
from samplers.nodes import nodes_of
from samplers.registry import get_sampler

VP, EDM = schedules.vp_linear(), schedules.edm()


@pytest.mark.parametrize("grid", ["uniform", "karras"])
@pytest.mark.parametrize("eta", [1.0, 1.2, 1.5, 2.0])
def test_steps_of_noise_only_make_room_for_more(eta, grid):
    def of(**where):
        return make_plan("dpm2-ancestral", VP, grid=grid, eta=eta, **where)

    sizes = [of(steps=n).nfe for n in range(1, 16)]
    assert (sizes[-1] < 30) == (eta > 1.0)  # what a budget that counts two calls a step does not know
    for nfe in range(sizes[0], 15):
        plan, full = of(nfe=nfe), of(steps=max(n for n, size in enumerate(sizes, 1) if size <= nfe))
        if eta == 1.0 and full.nfe < nfe:  # the call that is left over is a step more
            assert (plan.steps, plan.nfe) == (full.steps + 1, nfe)
        else:
            assert plan == full


@pytest.mark.parametrize("eta", [1.2, 1.5, 2.0])
def test_steps_of_noise_only_make_room_for_more_where_orders_mix(eta):
    for nfe in (5, 12, 20):
        plan = make_plan("dpmpp-2s", VP, nfe=nfe, eta=eta)
        full = [make_plan("dpmpp-2s", VP, steps=n, eta=eta).nfe for n in range(1, nfe + 1)]
        assert plan.nfe <= nfe
        assert plan.steps >= max(n for n, size in enumerate(full, 1) if size <= nfe)
        assert plan.steps > (nfe + 1) // 2


@pytest.mark.parametrize(("final", "steps"), [("t_min", 3), ("denoise", 2)])
def test_given_orders_are_the_steps_of_a_budget(final, steps):
    where = {"orders": [2, 2, 1], "final": final}
    plan = make_plan("dpmpp-2s", VP, nfe=5, **where)
    assert plan.nfe == 5
    assert plan == make_plan("dpmpp-2s", VP, steps=steps, **where)
    assert plan == make_plan("dpmpp-2s", VP, nfe=7, **where)
    with pytest.raises(ValueError, match="nfe must be at least 5 for 'dpmpp-2s' here, got 4"):
        make_plan("dpmpp-2s", VP, nfe=4, **where)


@pytest.mark.parametrize("orders", [5, [], [2, 3]])
def test_bad_orders_under_a_budget(orders):
    with pytest.raises(ValueError, match=r"orders must be \d+ integers from 1 to 2, one for each step"):
        make_plan("dpmpp-2s", VP, nfe=5, orders=orders)


@pytest.mark.parametrize(
    ("name", "options", "nfe", "most"),
    [
        ("ddim", {}, 300, 1),
        ("heun", {}, 300, 2),
        ("heun", {}, 301, 3),
        ("pndm", {}, 300, 3),
        ("restart", {"restarts": [(0.06, 0.3, 10, 7)]}, 300, 3),
        ("dpm2-ancestral", {"eta": 1.2}, 300, 12),
    ],
)
def test_a_budget_takes_few_plans(name, options, nfe, most):
    entry, built = get_sampler(name), []

    def build(grid, **chosen):
        built.append(grid.steps)
        return entry.build(grid, **chosen)

    counting = dataclasses.replace(entry, build=build)
    where = dict.fromkeys(("steps", "timesteps", "sigmas", "final"))
    grid, chosen = nodes_of(counting, EDM, nfe=nfe, grid="karras", options=options, spared=0, **where)
    assert len(built) <= most
    assert (
        entry.plan(grid, **chosen).nfe <= nfe < make_plan(name, EDM, steps=grid.steps + 1, grid="karras", **options).nfe
    )
