"""Where a PlanScheduler's steps are, as diffusers has them: on flows, for distilled students, for networks told a sigma."""

from __future__ import annotations

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
from samplers import make_plan, schedules  # noqa: E402  after the check that diffusers is there
from samplers.adapters.diffusers import PlanScheduler  # noqa: E402

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def test_continuous_v_prediction_is_edm_with_unit_data() -> None:
    """The scheduler of Stable Video Diffusion, whose sigmas go far beyond its betas."""
    theirs = diffusers.EulerDiscreteScheduler(
        **BETAS,
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    ours = PlanScheduler.from_config(theirs.config, sampler="euler", grid="config")
    theirs.set_timesteps(6)
    ours.set_timesteps(6)
    assert torch.allclose(ours.timesteps, theirs.timesteps, rtol=1e-5)
    assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-4)
    generator = torch.Generator().manual_seed(0)
    x = 700.0 * torch.randn(2, 4, 3, 3, generator=generator)
    a = b = x
    for t, s in zip(ours.timesteps, theirs.timesteps, strict=True):
        given = ours.scale_model_input(a, t)
        assert torch.allclose(given, theirs.scale_model_input(b, s), rtol=1e-4, atol=1e-5)
        out = torch.tanh(given)
        a, b = ours.step(out, t, a).prev_sample, theirs.step(out, s, b).prev_sample
    assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def test_flow_shift_moves_the_nodes() -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = PlanScheduler.from_config(theirs.config, sampler="euler")
    sigmas = np.linspace(1.0, 1 / 8, 8)
    theirs.set_timesteps(sigmas=sigmas)
    ours.set_timesteps(sigmas=sigmas)
    assert torch.allclose(ours.timesteps, theirs.timesteps)
    assert torch.allclose(ours.sigmas, theirs.sigmas)
    ours.set_timesteps(8)
    uniform = make_plan("euler", schedules.flow(), steps=8, grid="uniform").times
    assert np.allclose(ours.plan.times[:-1], 3 * np.array(uniform)[:-1] / (1 + 2 * np.array(uniform)[:-1]))
    assert ours.plan.times[-1] == uniform[-1]  # the end stays what it is


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("terminal", [None, 0.1])
def test_dynamic_shift_is_mus(kind: str, terminal: float | None) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind, shift_terminal=terminal, shift=7.0
    )
    ours = PlanScheduler.from_config(theirs.config, sampler="euler")
    sigmas = np.linspace(1.0, 1 / 6, 6)
    theirs.set_timesteps(sigmas=sigmas, mu=0.9)
    ours.set_timesteps(sigmas=sigmas, mu=0.9)
    assert torch.allclose(ours.timesteps, theirs.timesteps, atol=1e-3)
    with pytest.raises(ValueError, match="mu must be given: the scheduler's config has use_dynamic_shifting=True"):
        ours.set_timesteps(6)


def test_a_flow_told_other_times_than_its_own() -> None:
    """CogView4 and GLM-Image give both: the noise levels are shifted, what the network is told is not."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    times, sigmas = np.linspace(1000.0, 1.0, 5), np.linspace(1.0, 0.001, 5)
    ours = PlanScheduler.from_config(theirs.config, sampler="ddim")
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(timesteps=times, sigmas=sigmas, mu=0.6)
    assert torch.allclose(ours.timesteps, theirs.timesteps)
    assert torch.allclose(ours.sigmas, theirs.sigmas)
    two_calls = PlanScheduler.from_config(theirs.config, sampler="heun")
    with pytest.raises(ValueError, match="9 of each for sampler 'heun', got 5|8 of each for sampler 'heun', got 5"):
        two_calls.set_timesteps(timesteps=times, sigmas=sigmas, mu=0.6)


def test_dpm_solver_configs_of_flows_are_flows() -> None:
    theirs = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, num_train_timesteps=1000
    )
    ours = PlanScheduler.from_config(theirs.config, sampler="unipc-2")
    ours.set_timesteps(4)
    assert ours.plan.times[0] == 1.0
    assert ours.timesteps[1] == pytest.approx(1000 * 5 * ours_uniform(4)[1] / (1 + 4 * ours_uniform(4)[1]))


def ours_uniform(steps: int) -> np.ndarray:
    return np.array(make_plan("unipc-2", schedules.flow(), steps=steps, grid="uniform").times)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_a_distilled_student_is_asked_at_the_times_it_knows(steps: int, strength: float) -> None:
    theirs = diffusers.LCMScheduler()
    ours = PlanScheduler.from_config(theirs.config, sampler="consistency", grid="config")
    for original in (None, 25):
        theirs.set_timesteps(steps, original_inference_steps=original, strength=strength)
        ours.set_timesteps(steps, original_inference_steps=original, strength=strength)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    with pytest.raises(
        ValueError, match="num_inference_steps must be at most .* the steps of the distillation, got 60"
    ):
        ours.set_timesteps(60, strength=strength)


def test_latent_consistency_models_sample_as_they_do_with_their_own_scheduler() -> None:
    """But for the boundary condition of a consistency function, whose share at these times is below a thousandth."""
    theirs = diffusers.LCMScheduler()
    ours = PlanScheduler.from_config(theirs.config, sampler="consistency", grid="config")
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(4)
        y, generator = x.clone(), torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            out = torch.tanh(y) + 0.1 * torch.sin(t / 300)
            y, x0 = scheduler.step(out, t, y, generator=generator, return_dict=False)
        assert torch.allclose(x0, y, atol=1e-2)  # what these pipelines decode
        results.append(y)
    assert torch.allclose(*results, rtol=1e-2, atol=1e-2)


def test_strength_takes_the_last_steps_of_any_grid() -> None:
    ours = PlanScheduler.from_config(BETAS, sampler="dpmpp-2m")
    ours.set_timesteps(10)
    whole = ours.plan.times
    ours.set_timesteps(10, strength=0.35)
    assert ours.plan.times == whole[7:]
    ours.set_timesteps(timesteps=[900, 600, 300, 100], strength=0.5)
    assert ours.timesteps.tolist() == [300, 100]
    for bad in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"strength must lie in \(0, 1\]"):
            ours.set_timesteps(10, strength=bad)


def test_the_network_of_stable_audio_is_told_an_angle() -> None:
    """Its scheduler needs a package that may be missing; its config, as a file has it, does not."""
    config = {
        "_class_name": "CosineDPMSolverMultistepScheduler",
        **{"sigma_min": 0.3, "sigma_max": 500, "sigma_data": 1.0, "sigma_schedule": "exponential"},
        **{"num_train_timesteps": 1000, "solver_order": 2, "prediction_type": "v_prediction", "rho": 7.0},
        **{"solver_type": "midpoint", "lower_order_final": True, "euler_at_final": False, "final_sigmas_type": "zero"},
    }
    ours = PlanScheduler.from_config(config, sampler="dpmpp-2m-sde", grid="config")
    ours.set_timesteps(5)
    again = PlanScheduler.from_config(ours.config)  # the class's name is another now
    again.set_timesteps(5)
    for scheduler in (ours, again):
        sigmas = torch.logspace(np.log10(500), np.log10(0.3), 5)
        assert torch.allclose(scheduler.sigmas[:-1], sigmas, rtol=1e-4)
        assert torch.allclose(scheduler.timesteps, sigmas.atan() / np.pi * 2, rtol=1e-5)


def test_edm_is_scaled_for_the_network() -> None:
    x = 80 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = diffusers.EDMEulerScheduler()
    ours = PlanScheduler.from_config(theirs.config, sampler="euler", grid="config")
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(4)
    t = ours.timesteps[0]
    assert torch.allclose(ours.scale_model_input(x, t), theirs.scale_model_input(x, t), rtol=1e-5)
    assert ours.step_index == 0
    plain = PlanScheduler.from_config(BETAS, sampler="ddim")
    assert plain.scale_model_input(x, 999) is x


def test_sigmas_out_of_range_are_named_as_sigmas() -> None:
    scheduler = PlanScheduler(sampler="ddim")
    with pytest.raises(
        ValueError, match=r"sigmas must lie in \[0\.0100005, 157\.407\], but for the last, got \[200\.0"
    ):
        scheduler.set_timesteps(sigmas=[200.0, 10.0, 0.0])
    scheduler.set_timesteps(sigmas=[100.0, 10.0, 0.0])
    assert torch.allclose(scheduler.sigmas, torch.tensor([100.0, 10.0, 0.0]))


def test_a_begin_that_counts_calls_as_steps_says_what_to_use() -> None:
    scheduler = PlanScheduler(sampler="heun")
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="begin_index must be 0 to 7, got 8; a pipeline that counts calls as steps"):
        scheduler.set_begin_index(8)
