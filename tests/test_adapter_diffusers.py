"""Networks of diffusers as epsilon-models, against what the scheduler itself makes of the network's output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from samplers import sample
from samplers.adapters.diffusers import eps_model_from_diffusers

diffusers = pytest.importorskip("diffusers")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
KINDS = {
    "DDPMScheduler": {},
    "DDIMScheduler": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "DPMSolverMultistepScheduler": {"beta_schedule": "squaredcos_cap_v2"},
    "EulerDiscreteScheduler": {"trained_betas": [0.1, 0.2, 0.3, 0.5]},
}


@pytest.fixture
def unet(tiny_unet: nn.Module) -> nn.Module:
    return tiny_unet


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_x0_and_epsilon_are_those_of_the_scheduler(unet: nn.Module, kind: str, prediction: str) -> None:
    scheduler = getattr(diffusers, kind)(prediction_type=prediction, **KINDS[kind])
    model = eps_model_from_diffusers(unet, scheduler)
    step = 2
    out = unet(X, step).sample
    signal = scheduler.alphas_cumprod[step].sqrt()
    noise = (1 - scheduler.alphas_cumprod[step]).sqrt()
    x0 = {"epsilon": (X - noise * out) / signal, "sample": out, "v_prediction": signal * X - noise * out}[prediction]
    assert torch.allclose(model.x0(X, step), x0, atol=2e-4)
    sigma = float(
        model.schedule.sigma(step)
    )  # the scheduler's own, of a table in float32, has three digits at such a step
    assert sigma == pytest.approx(float(noise), rel=2e-3)
    assert torch.allclose(signal * model.x0(X, step) + sigma * model.eps(X, step), X, atol=1e-5)


def test_a_sampler_gives_what_the_pipeline_gives(unet: nn.Module) -> None:
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False, timestep_spacing="leading", steps_offset=0, set_alpha_to_one=True
    )
    scheduler.set_timesteps(10)
    x = X
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    model = eps_model_from_diffusers(unet, scheduler)
    sigmas = [*model.schedule.sigma_bar(scheduler.timesteps.double()).tolist(), 0.0]
    assert (sample(model, "ddim", x_T=X, sigmas=sigmas) - x).abs().max() < 1e-4


def test_a_learned_variance_is_left_out(unet: nn.Module) -> None:
    class Both(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, **cond: Any) -> torch.Tensor:
            return torch.cat([unet(x, t).sample, torch.full_like(x, 7.0)], 1)

    scheduler = diffusers.DDPMScheduler()
    assert torch.equal(
        eps_model_from_diffusers(Both(), scheduler)(X, 30), eps_model_from_diffusers(unet, scheduler)(X, 30)
    )


def test_a_flow_takes_a_thousand_times_its_time_and_gives_the_slope() -> None:
    seen: list[torch.Tensor] = []

    class Flow(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor]:
            seen.append(t)
            return (2.0 * x,)

    model = eps_model_from_diffusers(Flow(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert torch.allclose(model.x0(X, 0.25), X - 0.25 * 2 * X)  # x = (1 - t) x0 + t eps and u = eps - x0
    assert torch.allclose(model.eps(X, 0.25), X + 0.75 * 2 * X)
    assert torch.allclose(seen[0], torch.full((2,), 250.0))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_is_preconditioned_as_its_scheduler_does(unet: nn.Module, prediction: str) -> None:
    scheduler = diffusers.EDMEulerScheduler(prediction_type=prediction, sigma_data=0.7)
    model, sigma = eps_model_from_diffusers(unet, scheduler), 3.0
    out = unet(scheduler.precondition_inputs(X, sigma), scheduler.precondition_noise(sigma)).sample
    assert torch.allclose(model.x0(X, sigma), scheduler.precondition_outputs(X, out, sigma), atol=1e-5)


def test_a_rescaled_schedule_ends_in_noise_alone(unet: nn.Module) -> None:
    for kind in ("DDIMScheduler", "EulerDiscreteScheduler"):
        scheduler = getattr(diffusers, kind)(
            rescale_betas_zero_snr=True, prediction_type="v_prediction", beta_schedule="scaled_linear"
        )
        schedule = eps_model_from_diffusers(unet, scheduler).schedule
        assert schedule.alpha(schedule.t_max) == 0


def test_a_saved_pipeline_loads_into_the_same_model(unet: nn.Module, tmp_path: Path) -> None:
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction", beta_schedule="linear")
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path, local_files_only=True)
    loaded = eps_model_from_diffusers(pipeline.unet.eval(), pipeline.scheduler)
    assert torch.equal(loaded(X, 500), eps_model_from_diffusers(unet, scheduler)(X, 500))


def test_what_is_not_understood_is_an_error(unet: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"network must be a torch\.nn\.Module, got int"):
        eps_model_from_diffusers(3, diffusers.DDPMScheduler())  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="scheduler must be a diffusers scheduler with a config, got UNet2DModel|NoneType"
    ):
        eps_model_from_diffusers(unet, None)
    with pytest.raises(ValueError, match="CMStochasticIterativeScheduler: .* consistency models"):
        eps_model_from_diffusers(unet, diffusers.CMStochasticIterativeScheduler())
    with pytest.raises(ValueError, match="VQDiffusionScheduler: it is for discrete tokens"):
        eps_model_from_diffusers(unet, diffusers.VQDiffusionScheduler(num_vec_classes=8))
    with pytest.raises(ValueError, match="unknown prediction_type of the scheduler 'noise'"):
        eps_model_from_diffusers(unet, diffusers.DDPMScheduler(prediction_type="noise"))


def test_a_misspelt_key_of_the_config_is_an_error(unet: nn.Module) -> None:
    misspelt = diffusers.DDPMScheduler.from_config({"beta_strat": 0.00085})
    with pytest.raises(
        ValueError, match="unknown key of the scheduler's config 'beta_strat'; did you mean 'beta_start'"
    ):
        eps_model_from_diffusers(unet, misspelt)


@pytest.mark.parametrize("kind", ["ScoreSdeVeScheduler", "LCMScheduler", "UniPCMultistepScheduler", "RePaintScheduler"])
def test_every_key_of_a_scheduler_s_own_class_is_known(unet: nn.Module, kind: str) -> None:
    made = getattr(diffusers, kind)
    assert eps_model_from_diffusers(unet, made()).schedule is not None
    assert eps_model_from_diffusers(unet, made.from_config(diffusers.PNDMScheduler().config)).schedule is not None
