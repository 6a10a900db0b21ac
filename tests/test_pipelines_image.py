"""Every kind of sampler in pipelines on pixels and in those that start from an image, against `sample`."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny_pipelines
import torch
from pipeline_reference import (
    NEGATIVE,
    PROMPT,
    SAMPLERS,
    SCALE,
    SEED,
    STEPS,
    beside,
    changed,
    check,
    difference,
    epsilon_model,
    flux,
    flux_nodes,
    generator,
    guided,
    noise_from,
    normal,
    run_both,
    sd3,
    shifted,
    text_guided,
    text_pair,
    through,
    under,
    unet,
)
from torch import Tensor

from samplers import make_plan, sample

TEXT = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": SCALE}
IMAGE = torch.rand(1, 3, 16, 16, generator=generator(1)).double()
MASK = torch.zeros(1, 1, 16, 16).index_fill_(3, torch.arange(8, 16), 1.0)  # the right half is painted anew
LATENTS = (1, 4, 8, 8)
SHORT = {"max_sequence_length": 16}
FROM_NOISE = ("ddim", "dpmpp-2m", "heun", "dpm2", "dpmpp-2s", "dpm-solver-3s", "dpmpp-sde")  # up to three calls a step
FLOAT32_TIMES = 2e-8  # a pipeline asks for the noise of a time that it holds in float32


def encoded(pipe: Any, image: Tensor, source: torch.Generator) -> Tensor:
    """An image in [-1, 1] as latents, drawn from the posterior as pipelines do."""
    return pipe.vae.config.scaling_factor * pipe.vae.encode(image).latent_dist.sample(source)


@pytest.mark.parametrize("sampler", SAMPLERS)
@torch.no_grad()
def test_pixels(tiny_pipeline, sampler):
    pipe = tiny_pipeline(tiny_pipelines.ddpm, diffusers.DDPMPipeline)
    source = generator()
    start = torch.randn(2, 3, 16, 16, generator=source, dtype=torch.float64)
    model = epsilon_model(pipe.unet, pipe.scheduler, lambda x, t: pipe.unet(x, t).sample)
    expected = sample(model, sampler, x_T=start, noise_source=noise_from(source), steps=STEPS)

    states: list[Tensor] = []
    found = under(pipe, sampler, {"batch_size": 2, "output_type": "pt"}, states)
    assert torch.allclose(found, (expected / 2 + 0.5).clamp(0, 1), atol=1e-12)
    check("DDPMPipeline", sampler, difference(states[-1], expected))


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
@torch.no_grad()
def test_image_to_image(tiny_pipeline, sampler, strength):
    """The last int(steps * strength) steps are taken, as a plan of their own, from the image with their first node's noise."""
    pipe = tiny_pipeline(tiny_pipelines.stable_diffusion, diffusers.StableDiffusionImg2ImgPipeline)
    found = under(pipe, sampler, {**TEXT, "image": IMAGE, "strength": strength})

    source = generator()
    clean = encoded(pipe, 2 * IMAGE - 1, source)
    noise = torch.randn(LATENTS, generator=source, dtype=torch.float64)
    model = epsilon_model(pipe.unet, pipe.scheduler, text_guided(pipe))
    nodes = make_plan(sampler, model.schedule, steps=STEPS).times[STEPS - int(STEPS * strength) :]
    start = model.schedule.alpha(nodes[0]) * clean + model.schedule.sigma(nodes[0]) * noise
    where = through(nodes, model.schedule)
    expected = sample(model, sampler, x_T=start, noise_source=noise_from(source), **where)
    check(f"StableDiffusionImg2ImgPipeline {strength}", sampler, difference(found, expected), FLOAT32_TIMES)


@pytest.mark.parametrize("sampler", FROM_NOISE)
@torch.no_grad()
def test_image_to_image_on_a_flow(tiny_pipeline, sampler):
    """The first step of the whole grid, from pure noise, has one call; the last int(steps * strength) are taken still."""
    pipe = tiny_pipeline(tiny_pipelines.sd3, diffusers.StableDiffusion3Img2ImgPipeline)
    call = {**TEXT, **SHORT, "height": 16, "width": 16}
    found = under(pipe, sampler, {**call, "image": IMAGE, "strength": 0.5})

    source = generator()
    clean = pipe.vae.encode(2 * IMAGE - 1).latent_dist.sample(source) - pipe.vae.config.shift_factor
    noise = torch.randn(LATENTS, generator=source, dtype=torch.float64)
    model = epsilon_model(pipe.transformer, pipe.scheduler, sd3(pipe, **SHORT))
    *_, before, last, end = shifted(sampler, 3.0)
    start = (1 - before) * pipe.vae.config.scaling_factor * clean + before * noise
    torch.manual_seed(SEED)  # this pipeline gives no generator to the scheduler
    drawn = noise_from(torch.default_generator)
    expected = sample(model, sampler, x_T=start, noise_source=drawn, **through([before, last, end], model.schedule))
    check("StableDiffusion3Img2ImgPipeline, strength 0.5", sampler, difference(found, expected), FLOAT32_TIMES)


@pytest.mark.parametrize("sampler", FROM_NOISE)
@torch.no_grad()
def test_image_to_image_where_the_pipeline_counts_calls(tiny_pipeline, sampler):
    """Flux gives the nodes, and so takes strength as a share of the calls."""
    pipe = tiny_pipeline(tiny_pipelines.flux, diffusers.FluxImg2ImgPipeline)
    call = {"prompt": PROMPT, "guidance_scale": 3.5, **SHORT, "height": 16, "width": 16}
    found = under(pipe, sampler, {**call, "image": IMAGE, "strength": 0.5})

    source = generator()
    clean = pipe.vae.encode(2 * IMAGE - 1).latent_dist.sample(source) - pipe.vae.config.shift_factor
    noise = torch.randn(LATENTS, generator=source, dtype=torch.float64)
    model = epsilon_model(pipe.transformer, pipe.scheduler, flux(pipe, 4, 3.5, **SHORT))
    before, last, end = flux_nodes()[-3:]
    start = (1 - before) * pipe.vae.config.scaling_factor * clean + before * noise
    start = pipe._pack_latents(start, 1, 4, 8, 8)
    torch.manual_seed(SEED)
    drawn = noise_from(torch.default_generator)
    expected = sample(model, sampler, x_T=start, noise_source=drawn, **through([before, last, end], model.schedule))
    check("FluxImg2ImgPipeline, strength 0.5", sampler, difference(found, expected), FLOAT32_TIMES)


@torch.no_grad()
def test_pndm_begins_where_its_own_nodes_do(tiny_pipeline):
    """Where a sampler cannot begin half way, strength 1 and nodes from a lower noise level on do the same."""
    pipe = tiny_pipeline(tiny_pipelines.stable_diffusion, diffusers.StableDiffusionImg2ImgPipeline)
    with pytest.raises(ValueError, match=r"use another sampler, or strength=1 and timesteps= or sigmas= that begin"):
        under(pipe, "pndm", {**TEXT, "image": IMAGE, "strength": 0.5})
    nodes = [600, 450, 300, 150, 20]
    found = under(
        pipe, "pndm", {**TEXT, "image": IMAGE, "strength": 1.0, "timesteps": nodes, "num_inference_steps": None}
    )

    source = generator()
    clean = encoded(pipe, 2 * IMAGE - 1, source)
    noise = torch.randn(LATENTS, generator=source, dtype=torch.float64)
    model = epsilon_model(pipe.unet, pipe.scheduler, text_guided(pipe))
    start = model.schedule.alpha(600.0) * clean + model.schedule.sigma(600.0) * noise
    expected = sample(model, "pndm", x_T=start, **through([*nodes, -1], model.schedule))
    assert difference(found, expected) < FLOAT32_TIMES


@pytest.mark.parametrize("sampler", SAMPLERS)
@torch.no_grad()
def test_upscaling(tiny_pipeline, sampler):
    """The network sees the small image, with noise of level 20, and that level; it predicts v."""
    pipe = tiny_pipeline(tiny_pipelines.upscale, diffusers.StableDiffusionUpscalePipeline)
    kept = pipe.low_res_scheduler.alphas_cumprod[20].double()
    small = kept.sqrt() * (2 * IMAGE - 1) + (1 - kept).sqrt() * normal(1, 3, 16, 16, seed=SEED)
    network = guided(*(beside(unet(pipe, text, class_labels=torch.tensor([20])), small) for text in text_pair(pipe)))
    call = {**TEXT, "image": IMAGE, "noise_level": 20}
    found = run_both(pipe, call, network, normal(1, 4, 16, 16), sampler, drawn=[small.shape])
    check("StableDiffusionUpscalePipeline", sampler, found)


@pytest.mark.parametrize("sampler", SAMPLERS)
@torch.no_grad()
def test_inpainting_with_a_network_for_it(tiny_pipeline, sampler):
    """The network sees the mask and the masked image beside the latents."""
    pipe = tiny_pipeline(tiny_pipelines.inpaint, diffusers.StableDiffusionInpaintPipeline)
    masked = encoded(pipe, (2 * IMAGE - 1) * (MASK < 0.5), generator())
    network = guided(*(beside(unet(pipe, text), MASK[..., ::2, ::2].double(), masked) for text in text_pair(pipe)))
    call = {**TEXT, "image": IMAGE, "mask_image": MASK, "height": 16, "width": 16, "strength": 1.0}
    found = run_both(pipe, call, network, normal(*LATENTS), sampler, drawn=[LATENTS])
    check("StableDiffusionInpaintPipeline, 9 channels", sampler, found)


@pytest.mark.parametrize("strength", [0.8, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
@torch.no_grad()
def test_inpainting_with_any_network(tiny_pipeline, sampler, strength):
    """After each call the pipeline puts the image, with the noise of the next call, where nothing is to be painted."""
    pipe = tiny_pipeline(tiny_pipelines.stable_diffusion, diffusers.StableDiffusionInpaintPipeline)
    call = {"image": IMAGE, "mask_image": MASK, "height": 16, "width": 16, "strength": strength}
    found = under(pipe, sampler, {**TEXT, **call})

    source = generator()
    clean = encoded(pipe, 2 * IMAGE - 1, source)
    noise = torch.randn(LATENTS, generator=source, dtype=torch.float64)
    encoded(pipe, (2 * IMAGE - 1) * (MASK < 0.5), source)  # which is for the networks of the other kind
    paint = MASK[..., ::2, ::2].double()

    def change(x: Tensor, alpha: float, sigma: float) -> Tensor:
        return paint * x + (1 - paint) * (alpha * clean + sigma * noise)

    model = epsilon_model(pipe.unet, pipe.scheduler, text_guided(pipe))
    nodes = make_plan(sampler, model.schedule, steps=STEPS).times[STEPS - int(STEPS * strength) :]
    plan = make_plan(sampler, model.schedule, **through(nodes, model.schedule))
    start = plan.sigma_T * noise + (0 if strength == 1 else model.schedule.alpha(nodes[0]) * clean)
    expected = changed(plan, model, start, change, noise_from(source))
    check(
        f"StableDiffusionInpaintPipeline, 4 channels, {strength}", sampler, difference(found, expected), FLOAT32_TIMES
    )
