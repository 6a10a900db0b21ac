"""The same samples as the schedulers of diffusers, on the same training steps, with the same network and noise.

Their schedulers keep alphas and sigmas in float32 and some round the state to it at every step. Where they let us, the
tables are replaced by the float64 ones that the schedule here has. What then remains, measured: DDIM, DDPM and Heun 3e-14,
Euler 5e-7, multistep DPM-Solver 2e-6.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from samplers import EpsModel, make_plan, run_plan, sample, schedules

pytestmark = pytest.mark.parity

BETAS = np.linspace(1e-4, 0.02, 1000)
SCHEDULE = schedules.from_betas(BETAS)
X_T = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def model(mixture):
    return EpsModel(mixture.net(SCHEDULE), SCHEDULE)


def scheduler(name, steps, **options):
    """A scheduler of diffusers in float64, with its timesteps set."""
    import diffusers

    if name in ("DDIMScheduler", "DDPMScheduler"):
        options["clip_sample"] = False
    made = getattr(diffusers, name)(trained_betas=BETAS, **options)
    made.alphas_cumprod = torch.tensor(SCHEDULE.alphas_cumprod, dtype=torch.float64)
    if hasattr(made, "final_alpha_cumprod"):
        made.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    made.set_timesteps(steps)
    if hasattr(made, "sigmas"):  # sigma / alpha at each node, ends included
        table = SCHEDULE.sigma_bar(np.arange(1000.0))
        exact = [min((*table, 0.0), key=lambda s: abs(s - float(sigma))) for sigma in made.sigmas]
        np.testing.assert_allclose(made.sigmas, exact, rtol=1e-4)
        made.sigmas = torch.tensor(exact, dtype=torch.float64)
    return made


def follow(made, model, x, scaled=False, **options):
    """Their loop; `scaled` where their state is x / alpha and the network's input is scaled by them."""
    for t in made.timesteps:
        state = made.scale_model_input(x, t) if scaled else x
        x = made.step(model(state, float(t)), t, x, **options).prev_sample
    return x


def multistep(steps, final, **options):
    """Their multistep DPM-Solver on "linspace", and its nodes: steps + 1 points without the last, then sigma of step 0, or 0."""
    spaced = {"final_sigmas_type": final, "timestep_spacing": "linspace"}
    made = scheduler("DPMSolverMultistepScheduler", steps, **spaced, **options)
    times = made.timesteps.tolist()
    if final == "zero":
        return made, {"sigmas": [*SCHEDULE.sigma_bar(np.array(times, dtype=float)), 0.0]}
    return made, {"timesteps": [*times, 0]}


def assert_same(ours, theirs, tolerance):
    difference = float((ours - theirs).abs().max())
    assert difference < tolerance, f"differs by {difference:g}"


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 5, 10, 50])
def test_ddim(model, spacing, steps):
    theirs = follow(scheduler("DDIMScheduler", steps, timestep_spacing=spacing), model, X_T)
    assert_same(sample(model, "ddim", x_T=X_T, steps=steps, grid=spacing), theirs, 1e-10)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_noise(model, eta):
    made = scheduler("DDIMScheduler", 10, timestep_spacing="trailing")
    # they draw and add noise of variance 0 on the last step too
    theirs = follow(made, model, X_T, eta=eta, generator=torch.Generator().manual_seed(1))
    ours = torch.Generator().manual_seed(1)

    def source(k, like):
        return torch.randn(like.shape, generator=ours, dtype=like.dtype)

    got = sample(model, "ddim", x_T=X_T, steps=10, grid="trailing", noise_source=source, eta=eta)
    assert_same(got, theirs, 1e-10)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [10, 100])
def test_ddpm(model, variance, steps):
    made = scheduler("DDPMScheduler", steps, variance_type=variance, timestep_spacing="leading")
    theirs = follow(made, model, X_T, generator=torch.Generator().manual_seed(1))
    ours = torch.Generator().manual_seed(1)

    def source(k, like):
        return torch.randn(like.shape, generator=ours, dtype=like.dtype)

    got = sample(model, "ddpm", x_T=X_T, steps=steps, grid="leading", noise_source=source, variance=variance)
    assert_same(got, theirs, 1e-10)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(("ours", "theirs"), [("euler", "EulerDiscreteScheduler"), ("heun", "HeunDiscreteScheduler")])
def test_euler_and_heun(model, spacing, ours, theirs):
    made = scheduler(theirs, 10, timestep_spacing=spacing)
    x_T = X_T / SCHEDULE.alpha(float(made.timesteps[0]))
    got = sample(model, ours, x_T=X_T, steps=10, grid=spacing)
    # Euler rounds its state to float32 in every step
    assert_same(got, follow(made, model, x_T, scaled=True), 1e-6 if ours == "euler" else 1e-10)


@pytest.mark.parametrize("steps", [2, 5, 14, 15, 50])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize(
    ("ours", "algorithm", "final"),
    [
        ("dpmpp-2m", "dpmsolver++", "zero"),
        ("dpmpp-2m", "dpmsolver++", "sigma_min"),
        ("dpm-solver-2m", "dpmsolver", "sigma_min"),
    ],
)
def test_multistep_dpm_solver(model, ours, algorithm, final, solver_type, steps):
    made, where = multistep(steps, final, algorithm_type=algorithm, solver_type=solver_type)
    got = run_plan(make_plan(ours, SCHEDULE, solver_type=solver_type, **where), model, X_T)
    assert_same(got, follow(made, model, X_T), 5e-6)  # they round the state to float32 in every step
