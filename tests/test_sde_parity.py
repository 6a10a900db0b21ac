"""The same samples as the schedulers of diffusers with inner points and noise, given the same network and noise.

Their tables are float32; where nothing else is, they are replaced by float64 ones, and the formulas behind the derived tables
repeated. What then remains, measured: KDPM2, KDPM2 ancestral, the SDE scheduler and singlestep DPM-Solver++ 2e-13; Euler
ancestral 4e-7 and multistep SDE-DPM-Solver++ 2e-7, which round the state to float32 in every step.
"""

from __future__ import annotations

import itertools
import math
import sys
import types

import numpy as np
import pytest
import torch
from test_parity import BETAS, SCHEDULE, X_T, multistep

from samplers import EpsModel, make_plan, run_plan, schedules
from samplers.program import Combine, Evaluate

pytestmark = pytest.mark.parity

EDM = schedules.edm()


@pytest.fixture(scope="module")
def model(mixture):
    return EpsModel(mixture.net(SCHEDULE), SCHEDULE)


def normal(seed=1, dtype=torch.float64):
    """A noise source that draws from one generator, one noise after another, as theirs do."""
    generator = torch.Generator().manual_seed(seed)
    return lambda k, like: torch.randn(like.shape, generator=generator, dtype=dtype).to(like.dtype)


def scheduler(name, steps, **options):
    """A scheduler of diffusers with its sigmas in float64, and those: sigma / alpha at each node, the last being 0."""
    import diffusers

    made = getattr(diffusers, name)(trained_betas=BETAS, **options)
    made.set_timesteps(steps)
    sigmas = sorted({float(s) for s in made.sigmas}, reverse=True)
    table = [*SCHEDULE.sigma_bar(np.arange(1000.0)), 0.0]
    exact = [min(table, key=lambda value: abs(value - sigma)) for sigma in sigmas]
    np.testing.assert_allclose(sigmas, exact, rtol=1e-4)
    positions = [int(np.argmin(np.abs(np.array(sigmas) - float(s)))) for s in made.sigmas]
    made.sigmas = torch.tensor(exact, dtype=torch.float64)[positions]
    return made, exact


def follow(made, model, plan, x, noise=None, scaled=True):
    """Their loop, the network being asked at the plan's times: theirs are rounded, or interpolated in other ways."""
    times = [step.t for step in plan.instructions if isinstance(step, Evaluate)]
    assert len(times) == len(made.timesteps)
    states = []
    for t, ours in zip(made.timesteps, times, strict=True):
        state = made.scale_model_input(x, t) if scaled else x
        out = model(state, ours)
        options = {} if noise is None else {"variance_noise": noise(0, out)}
        x = made.step(out, t, x, **options).prev_sample
        states.append(x)
    return x, states


def draw(monkeypatch, module):
    """Let a scheduler of theirs draw float64 noise from our source, and none that it multiplies by 0 at the end."""
    source = normal()
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: source(0, torch.empty(shape, dtype=torch.float64)))


def assert_same(ours, theirs, tolerance):
    difference = float((ours - theirs).abs().max())
    assert difference < tolerance, f"differs by {difference:g}"


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_dpm2(model, spacing, steps):
    made, sigmas = scheduler("KDPM2DiscreteScheduler", steps, timestep_spacing=spacing)
    nodes = torch.tensor(sigmas, dtype=torch.float64)
    middle = nodes.log().lerp(nodes.roll(1).log(), 0.5).exp()
    made.sigmas_interpol = torch.cat([middle[:1], middle[1:].repeat_interleave(2), middle[-1:]])
    plan = make_plan("dpm2", SCHEDULE, sigmas=sigmas)
    y = X_T * (1 + sigmas[0] ** 2) ** 0.5
    theirs, _ = follow(made, model, plan, y)
    assert_same(run_plan(plan, model, X_T), theirs, 1e-10)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_dpm2_ancestral(model, monkeypatch, spacing, steps):
    import diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete as module

    made, sigmas = scheduler("KDPM2AncestralDiscreteScheduler", steps, timestep_spacing=spacing)
    draw(monkeypatch, module)
    now = torch.tensor(sigmas, dtype=torch.float64)
    after = torch.cat([now[1:], torch.zeros(1, dtype=torch.float64)])
    up = (after**2 * (now**2 - after**2) / now**2) ** 0.5
    up[-1], down = 0.0, (after**2 - up**2) ** 0.5
    down[-1] = 0.0
    middle = now.log().lerp(down.log(), 0.5).exp()
    middle[-2:] = 0.0
    for name, values in (("sigmas_interpol", middle), ("sigmas_up", up), ("sigmas_down", down)):
        setattr(made, name, torch.cat([values[:1], values[1:].repeat_interleave(2), values[-1:]]))
    plan = make_plan("dpm2-ancestral", SCHEDULE, sigmas=sigmas)
    theirs, _ = follow(made, model, plan, X_T * (1 + sigmas[0] ** 2) ** 0.5)
    assert_same(run_plan(plan, model, X_T, noise_source=normal()), theirs, 1e-10)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_euler_ancestral(model, monkeypatch, spacing):
    import diffusers.schedulers.scheduling_euler_ancestral_discrete as module

    made, sigmas = scheduler("EulerAncestralDiscreteScheduler", 10, timestep_spacing=spacing)
    draw(monkeypatch, module)
    plan = make_plan("euler-ancestral", SCHEDULE, sigmas=sigmas)
    theirs, _ = follow(made, model, plan, X_T * (1 + sigmas[0] ** 2) ** 0.5)
    assert_same(run_plan(plan, model, X_T, noise_source=normal()), theirs, 2e-6)


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_dpmpp_sde(model, monkeypatch, steps):
    """With one Brownian path over sigma, drawn here in pieces that do not overlap, as k-diffusion's tree gives it."""
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler

    made = DPMSolverSDEScheduler(trained_betas=BETAS, timestep_spacing="trailing")
    made.set_timesteps(steps)
    nodes = make_plan("ddim", SCHEDULE, steps=steps, grid="trailing").times
    sigmas = [*SCHEDULE.sigma_bar(np.array(nodes[:-1])), 0.0]
    exact = torch.tensor(sigmas, dtype=torch.float64)
    np.testing.assert_allclose(made.sigmas[::2], sigmas[:-1], rtol=1e-4)
    made.sigmas = torch.cat([exact[:1], exact[1:-1].repeat_interleave(2), exact[-1:]])
    plan = make_plan("dpmpp-sde", SCHEDULE, sigmas=sigmas)
    levels = [step.sigma / step.alpha for step in plan.instructions if isinstance(step, Evaluate)]
    source = normal()
    pieces = [source(k, X_T) for k in range(plan.noises)]  # of deviation 1, from each level to the next

    def increment(start, stop):
        inside = [
            k for k in range(plan.noises) if float(stop) * 0.9999 < levels[k + 1] and levels[k] < float(start) * 1.0001
        ]
        return sum(pieces[k] * (levels[k] - levels[k + 1]) ** 0.5 for k in inside) / (start - stop) ** 0.5

    made.noise_sampler = increment
    y = X_T * (1 + sigmas[0] ** 2) ** 0.5
    for t, step in zip(made.timesteps, [s for s in plan.instructions if isinstance(s, Evaluate)], strict=True):
        y = made.step(model(y * step.alpha, step.t), t, y).prev_sample
    assert_same(run_plan(plan, model, X_T, noise_source=lambda k, like: pieces[k]), y, 1e-10)


@pytest.mark.parametrize("steps", [2, 5, 14, 15, 30])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_multistep_sde(model, steps, final, solver_type):
    plan, made = multistep_sde("dpmpp-2m-sde", 2, steps, final, solver_type, {"solver_type": solver_type})
    theirs, _ = follow(made, model, plan, X_T, normal(dtype=torch.float32), scaled=False)
    assert_same(run_plan(plan, model, X_T, noise_source=normal(dtype=torch.float32)), theirs, 2e-6)


@pytest.mark.parametrize("steps", [1, 2, 5, 15])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2])
def test_multistep_sde_in_epsilon(model, steps, solver_type, order):
    """Their float32 coefficients leave up to 2e-4; with float64 ones, in `fewstep certify`, 2e-12 is left."""
    name, options = ("seeds", {"order": 1}) if order == 1 else ("dpmpp-2m-sde", {"solver_type": solver_type})
    options = {**options, "predict": "eps"}
    plan, made = multistep_sde(name, order, steps, "sigma_min", solver_type, options, "sde-dpmsolver")
    theirs, _ = follow(made, model, plan, X_T, normal(dtype=torch.float32), scaled=False)
    ours = run_plan(plan, model, X_T, noise_source=normal(dtype=torch.float32))
    assert_same(ours, theirs, 2e-4)


def multistep_sde(name, order, steps, final, solver_type, options, algorithm="sde-dpmsolver++"):
    made, where = multistep(steps, final, algorithm_type=algorithm, solver_order=order, solver_type=solver_type)
    return make_plan(name, SCHEDULE, **where, **options), made


def test_third_order_multistep_sde_differs_by_a_sign(model):
    """Theirs has -1/2 where the expansion of the second difference has +1/2, from the first third-order step on.

    So it subtracts alpha' times the second difference of x0, which is of the second order in the step: theirs is first order
    (variance on a Gaussian: slope 1.02 from 400 to 800 steps, where ours is 2).
    """
    plan, made = multistep_sde("dpmpp-3m-sde", 3, 20, "sigma_min", "heun", {})
    states = []
    run_plan(
        plan, model, X_T, noise_source=normal(dtype=torch.float32), callback=lambda told: states.append(told.x.clone())
    )
    _, theirs = follow(made, model, plan, X_T, normal(dtype=torch.float32), scaled=False)
    assert_same(states[0], theirs[0], 2e-6)
    assert_same(states[1], theirs[1], 2e-6)
    assert (states[2] - theirs[2]).abs().max() > 1e-4
    nodes = np.array(plan.times[:4])
    lam, before = SCHEDULE.lam(nodes), [X_T, *states[:2]]
    x0 = [model.x0(x, t) for x, t in zip(before, nodes, strict=False)]
    h = lam[3] - lam[2]
    d1_0, d1_1 = (x0[2] - x0[1]) * h / (lam[2] - lam[1]), (x0[1] - x0[0]) * h / (lam[1] - lam[0])
    second = (d1_0 - d1_1) * h / (lam[2] - lam[0])
    assert_same(theirs[2], states[2] - SCHEDULE.alpha(nodes[3]) * second, 2e-6)


@pytest.mark.parametrize("steps", [3, 7, 21])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_singlestep(model, steps, solver_type):
    """Their step of second order takes two intervals of the grid, whose middle node is the inner point."""
    made, sigmas = singlestep(steps, "dpmsolver++", solver_type)
    plan = make_plan("dpmpp-2s", SCHEDULE, sigmas=sigmas[::2] + [0.0], solver_type=solver_type)
    theirs, _ = follow(made, model, plan, X_T, scaled=False)
    assert_same(run_plan(plan, model, X_T), theirs, 1e-10)


def singlestep(steps, algorithm, solver_type):
    import diffusers

    made = diffusers.DPMSolverSinglestepScheduler(
        trained_betas=BETAS,
        solver_order=2,
        algorithm_type=algorithm,
        solver_type=solver_type,
        use_exponential_sigmas=True,
        final_sigmas_type="zero",
    )
    made.set_timesteps(steps)
    sigmas = np.geomspace(SCHEDULE.sigma_bar(999.0), SCHEDULE.sigma_bar(0.0), steps).tolist()
    np.testing.assert_allclose(made.sigmas[:-1], sigmas, rtol=1e-4)
    made.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
    return made, sigmas


def test_singlestep_sde_has_independent_noises(model, monkeypatch):
    """Theirs draws a noise for the inner point and another for the end, where one path gives two that overlap."""
    import diffusers.schedulers.scheduling_dpmsolver_singlestep as module

    made, sigmas = singlestep(7, "sde-dpmsolver++", "midpoint")
    draw(monkeypatch, module)
    plan = make_plan("seeds", SCHEDULE, sigmas=sigmas[::2] + [0.0], order=2, predict="x0")
    theirs, states = follow(made, model, plan, X_T, scaled=False)
    assert (run_plan(plan, model, X_T, noise_source=normal()) - theirs).abs().max() > 1e-3
    instructions = []
    for step in plan.instructions:
        if isinstance(step, Combine) and sum(name[0] == "z" for name, _ in step.terms) == 2:
            *terms, (_, first), (name, second) = step.terms
            step = step._replace(terms=(*terms, (name, (first**2 + second**2) ** 0.5)))
        instructions.append(step)
    severed = type(plan)(tuple(instructions), plan.times, plan.prediction, plan.sigma_T)
    assert_same(run_plan(severed, model, X_T, noise_source=normal()), theirs, 1e-10)
    assert len(states) == plan.nfe


# published formulas that diffusers does not have ------------------------------------------------------------------


def noise_sources(plan, seed=1):
    """The plan's noises, and the source that hands them out."""
    noises = torch.randn(plan.noises, *X_T.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noises, lambda k, like: noises[k]


@pytest.mark.parametrize(("s_churn", "s_tmin", "s_tmax"), [(3.0, 0.05, 50.0), (1e3, 0.0, 40.0), (5.0, 0.0, math.inf)])
def test_edm_is_algorithm_2(exact, s_churn, s_tmin, s_tmax):
    """On its own schedule; the first node is below sigma_max, at which sigma_hat ends here and not there."""
    sigmas = [*make_plan("heun", schedules.edm(sigma_max=60.0), steps=6, grid="karras").times, 0.0]
    plan = make_plan("edm", EDM, sigmas=sigmas, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=1.1)
    noises, source = noise_sources(plan)
    model, x, k = exact(EDM), 60.0 * X_T, 0
    for t, t_next in itertools.pairwise(sigmas):
        gamma = min(s_churn / 7, math.sqrt(2) - 1) if s_tmin <= t <= s_tmax else 0.0
        t_hat = min(t + gamma * t, 80.0)
        x_hat = x
        if gamma:
            x_hat, k = x + math.sqrt(t_hat**2 - t**2) * 1.1 * noises[k], k + 1
        d = (x_hat - model.x0(x_hat, t_hat)) / t_hat
        x = x_hat + (t_next - t_hat) * d
        if t_next > 0:
            d_next = (x - model.x0(x, t_next)) / t_next
            x = x_hat + (t_next - t_hat) * (d + d_next) / 2
    torch.testing.assert_close(run_plan(plan, model, 60.0 * X_T, noise_source=source), x, rtol=1e-10, atol=1e-10)
    assert k == plan.noises


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", ["edm", "vp_linear"], indirect=True)
def test_3m_sde_is_k_diffusions(exact, schedule, eta):
    nodes = make_plan("ddim", schedule, steps=7, grid="karras", final="zero").times
    plan = make_plan("dpmpp-3m-sde", schedule, timesteps=nodes[:-1], eta=eta, s_noise=0.9, lower_order_final=False)
    noises, source = noise_sources(plan)
    model, lam = exact(schedule), schedule.lam(np.array(nodes[:-1]))
    x_T = schedule.sigma(nodes[0]) * X_T
    y, past = x_T / schedule.alpha(nodes[0]), []
    for i, t in enumerate(nodes[:-2]):
        past = [model.x0(schedule.alpha(t) * y, t), *past]
        h, eta_h = lam[i + 1] - lam[i], (1 + eta) * (lam[i + 1] - lam[i])
        y = math.exp(-eta_h) * y - math.expm1(-eta_h) * past[0]
        phi_2 = math.expm1(-eta_h) / eta_h + 1
        if i >= 2:
            r0, r1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
            d1_0, d1_1 = (past[0] - past[1]) / r0, (past[1] - past[2]) / r1
            d1, d2 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1), (d1_0 - d1_1) / (r0 + r1)
            y = y + phi_2 * d1 - (phi_2 / eta_h - 0.5) * d2
        elif i == 1:
            y = y + phi_2 * (past[0] - past[1]) * h / (lam[1] - lam[0])
        if eta:
            y = y + noises[i] * math.exp(-lam[i + 1]) * math.sqrt(-math.expm1(-2 * h * eta)) * 0.9
    got = run_plan(plan, model, x_T, noise_source=source)
    torch.testing.assert_close(got, schedule.alpha(nodes[-2]) * y, rtol=1e-10, atol=1e-10)
