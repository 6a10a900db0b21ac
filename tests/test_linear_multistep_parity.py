"""LMS, PNDM, iPNDM and DEIS against diffusers: the same samples, or the first difference and its cause.

Maxima measured where they agree: LMS 3e-14, PNDM 6e-15, iPNDM 2e-14, DEIS (as `eab`) 1e-13.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_parity import BETAS, SCHEDULE, X_T, assert_same, follow, scheduler

from samplers import EpsModel, make_plan, run_plan, sample, schedules

pytestmark = pytest.mark.parity
VP = schedules.vp_linear()


@pytest.fixture(scope="module")
def model(mixture):
    return EpsModel(mixture.net(SCHEDULE), SCHEDULE)


def their_states(made, model, x):
    """Their states after every call of `step`."""
    states = []
    for t in made.timesteps:
        x = made.step(model(x, float(t)), t, x).prev_sample
        states.append(x)
    return states


def our_states(plan, model, x):
    states = []
    run_plan(plan, model, x, callback=lambda told: states.append(told.x.clone()))
    return states


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 3, 10, 50])
def test_lms_of_diffusers(model, spacing, order, steps):
    """Its state is x / alpha; it takes Adams-Bashforth to sigma = 0 too."""
    made = scheduler("LMSDiscreteScheduler", steps, timestep_spacing=spacing)
    x_T = X_T / SCHEDULE.alpha(float(made.timesteps[0]))
    theirs = follow(made, model, x_T, scaled=True, order=order)
    assert_same(sample(model, f"lms-{order}", x_T=X_T, steps=steps, grid=spacing), theirs, 1e-10)


def test_nodes_of_lms_of_diffusers():
    """Where they would differ, were the table of sigmas not replaced: first by the node, then by the dtype.

    Between training steps ("linspace") they interpolate sigma_bar linearly, we log alpha. At training step 0 the sigma that
    they compute in float32 has lost three digits.
    """
    away = {}
    for steps in (8, 10):
        made = scheduler_as_it_is("LMSDiscreteScheduler", steps, trained_betas=BETAS, timestep_spacing="linspace")
        times = made.timesteps.numpy().astype(float)
        away[steps] = np.abs(made.sigmas.numpy()[:-1].astype(float) / SCHEDULE.sigma_bar(times) - 1)
    assert (away[8][1:3] > 5e-6).all()  # at 856.3 and 713.6
    assert (away[10][:-1] < 2e-6).all()  # at multiples of 111
    assert (away[10][-1], away[8][-1]) == pytest.approx((8e-5, 8e-5), rel=0.1)


def scheduler_as_it_is(name, steps, **options):
    import diffusers

    made = getattr(diffusers, name)(**options)
    made.set_timesteps(steps)
    return made


def pndm_of_diffusers(model, steps, last, **options):
    """Our nodes, our states and their states at the ends of steps, which are their calls 4, 8, 12, 13, 14, ..."""
    made = scheduler("PNDMScheduler", steps, skip_prk_steps=False, **options)
    nodes = [*made.timesteps[:12:4].tolist(), *made.timesteps[12:].tolist()]
    if last == 0:  # they end at the first training step, as Stable Diffusion does
        made.final_alpha_cumprod = made.alphas_cumprod[0]
    sigmas = [*SCHEDULE.sigma_bar(np.array(nodes, dtype=float)), SCHEDULE.sigma_bar(0.0) if last == 0 else 0.0]
    ours = our_states(make_plan("pndm", SCHEDULE, sigmas=sigmas), model, X_T)
    theirs = their_states(made, model, X_T)
    return nodes, ours, theirs[3:12:4] + theirs[12:]


@pytest.mark.parametrize("steps", [4, 5, 10, 50])
def test_pndm_of_diffusers(model, steps):
    """The same where the stride T / N is even and the last step ends at training step 0."""
    nodes, ours, theirs = pndm_of_diffusers(model, steps, 0, timestep_spacing="leading", steps_offset=1)
    assert len(ours) == len(theirs) == len(nodes) == steps
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b, 1e-10)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_pndm_of_diffusers_to_clean_data(model, spacing):
    """First difference: the last step, which they extrapolate to sigma = 0 with Adams-Bashforth and we take by DDIM."""
    _, ours, theirs = pndm_of_diffusers(model, 10, -1, timestep_spacing=spacing)
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        assert_same(a, b, 1e-10)
    assert (ours[-1] - theirs[-1]).abs().max() > 0.01


def test_pndm_of_diffusers_with_an_odd_stride(model):
    """First difference: step 1. Half of the stride 25 is rounded: the middle, 963.5, is reached as 964 and evaluated at 963."""
    nodes, ours, theirs = pndm_of_diffusers(model, 40, 0, timestep_spacing="leading", steps_offset=1)
    assert nodes[:2] == [976, 951]
    differences = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    assert 1e-6 < differences[0] < 1e-5
    assert max(differences) < 1e-4


@pytest.mark.parametrize("steps", [10, 30])
def test_pndm_of_diffusers_on_another_spacing(model, steps):
    """First difference: step 1, by the node. They step to t - T // N, whatever the next timestep is, and end elsewhere."""
    nodes, ours, theirs = pndm_of_diffusers(model, steps, -1, timestep_spacing="linspace")
    assert nodes[0] - nodes[1] > 1000 // steps
    differences = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    assert differences[0] > 1e-6
    assert differences[-2] > 0.01


def ipndm_of_diffusers(sigmas, alphas):
    """Their scheduler on other nodes; its own start at alpha = 0."""
    made = scheduler_as_it_is("IPNDMScheduler", len(sigmas) - 1)
    made.betas, made.alphas = torch.tensor(sigmas), torch.tensor(alphas)
    made.timesteps = torch.atan2(made.betas, made.alphas)[:-1] / math.pi * 2
    return made


@pytest.mark.parametrize("steps", [4, 5, 20])
def test_ipndm_of_diffusers(exact, steps):
    """It takes v on a VP schedule. First difference: the last step, which they extrapolate to sigma = 0."""
    model = exact(VP, "v")
    plan = make_plan("ipndm-4", VP, steps=steps, grid="quadratic", final="zero")
    times = np.array(plan.times)
    made, x, theirs = ipndm_of_diffusers(VP.sigma(times), VP.alpha(times)), X_T, []
    for node, t in zip(plan.times, made.timesteps, strict=False):
        x = made.step(model.v(x, node), t, x).prev_sample
        theirs.append(x)
    ours = our_states(plan, model, X_T)
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        assert_same(a, b, 1e-10)
    assert (ours[-1] - theirs[-1]).abs().max() > 1e-4


def test_ipndm_of_diffusers_forgets_x0_at_pure_noise():
    """Its own nodes start at alpha = 0, where it takes x0 = 0 / 1e-8 = 0; we take x0 = -v, what the network says."""
    made = scheduler_as_it_is("IPNDMScheduler", 5)
    assert (float(made.alphas[0]), float(made.betas[0])) == (0.0, 1.0)
    for v in (X_T, 100 * X_T):
        made.set_timesteps(5)
        assert_same(made.step(v, made.timesteps[0], X_T).prev_sample, made.betas[1] * X_T, 1e-6)


@pytest.mark.parametrize("steps", [5, 14, 15, 40])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_of_diffusers_is_another_method(model, order, steps):
    """First difference: the first second-order step, by the weights.

    Their polynomial is in log sigma_bar, neither tAB nor rhoAB: that is exponential Adams-Bashforth of epsilon in lam, `eab`.
    """
    made = scheduler("DEISMultistepScheduler", steps, solver_order=order, timestep_spacing="linspace")
    nodes = [*made.timesteps.tolist(), 0]
    theirs = their_states(made, model, X_T)
    eab = our_states(make_plan(f"eab-{order}", SCHEDULE, timesteps=nodes, predict="eps"), model, X_T)
    for a, b in zip(eab, theirs, strict=True):
        assert_same(a, b, 1e-10)
    for variant in ("tab", "rhoab"):
        ours = our_states(make_plan(f"deis-{order}", SCHEDULE, timesteps=nodes, variant=variant), model, X_T)
        assert_same(ours[0], theirs[0], 1e-10)
        assert ((ours[1] - theirs[1]).abs().max() > 1e-8) == (order > 1)
