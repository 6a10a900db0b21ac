"""Steps so short that float64 does not tell their ends apart: refused, with the two nodes; the shortest others are harmless."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from samplers import list_samplers, make_plan, run_plan, schedules
from samplers.grid import Grid, from_sigmas, from_timesteps, make_grid

# their correctors divide by the length of the step before, as published: on a short step they amplify any error there is
EXTRAPOLATING = {"unipc-2", "unipc-3", "unipc-4", "sa-solver"}
HARMLESS = [s.name for s in list_samplers() if not s.adaptive and s.name not in EXTRAPOLATING]
FLOW = schedules.flow()


@pytest.mark.parametrize("schedule", ["vp_linear", "cosine", "edm", "flow", "discrete"], indirect=True)
@pytest.mark.parametrize("apart", [0.0, 1e-15, 1e-13])
def test_a_step_that_float64_does_not_resolve_is_refused(schedule, apart):
    t = np.array([0.9, 0.5, 0.5, 0.1]) * schedule.t_max
    t[2] = min(np.nextafter(t[1], 0), t[1] * (1 - apart))
    named = rf"a grid must decrease strictly, .* t\[1\]={float(t[1])!r}, t\[2\]={float(t[2])!r} are .* apart in lam"
    for make in (from_timesteps, Grid, lambda schedule, t: make_grid(schedule, lambda schedule, n: t, 3)):
        with pytest.raises(ValueError, match=named):
            make(schedule, t)
    sigmas = [2.0, 1.0, min(np.nextafter(1.0, 0), 1 - apart), 0.1]
    with pytest.raises(ValueError, match=r"a grid must decrease strictly.* t\[1\]=.*, t\[2\]="):
        from_sigmas(schedule, sigmas)


def test_where_alpha_is_nearly_0_an_ulp_of_time_is_a_step():
    grid = from_timesteps(FLOW, [1.0, 1.0 - 2**-53, 1.0 - 2**-52, 0.5])
    assert grid.alpha[:3].tolist() == [0.0, 2**-53, 2**-52]
    assert np.diff(grid.lam)[1] == pytest.approx(math.log(2.0), rel=1e-12)


@pytest.mark.parametrize("schedule", ["vp_linear", "edm", "flow"], indirect=True)
@pytest.mark.parametrize("name", HARMLESS)
def test_a_short_step_that_is_resolved_does_what_a_longer_one_does(exact, schedule, name):
    x_T = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for apart in (1e-8, 4e-12):  # at 4e-16, or an ulp, results differ by up to 5
        t = np.array([0.99, 0.5, 0.5 * (1 - apart), 0.2, 0.05]) * schedule.t_max
        plan = make_plan(name, schedule, timesteps=t)
        # without noise: a multistep method divides the noise of the short step by its length
        results.append(run_plan(plan, exact(schedule), plan.sigma_T * x_T, noise_source=lambda k, like: 0.0 * like))
    torch.testing.assert_close(*results, rtol=5e-3, atol=5e-3)
