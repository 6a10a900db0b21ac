"""What users do with pipelines beside a prompt, under a PlanScheduler: adapters, several images, callbacks, grids, refiners."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import tiny_pipelines
import torch
from pipeline_reference import (
    NEGATIVE,
    PROMPT,
    SCALE,
    STEPS,
    changed,
    check,
    difference,
    epsilon_model,
    generator,
    guided,
    load,
    noise_from,
    normal,
    run_both,
    sized,
    text_guided,
    text_pair,
    through,
    under,
    unet,
)

from samplers import make_plan, sample
from samplers.adapters.diffusers import PlanScheduler

FEW = ("ddim", "dpmpp-2m", "unipc-3", "heun", "dpmpp-2m-sde")
TEXT = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": SCALE}
START = normal(1, 4, 8, 8)
EXACT = 1e-12


@pytest.fixture
def text_to_image(tiny_pipeline):
    return tiny_pipeline(tiny_pipelines.stable_diffusion, diffusers.StableDiffusionPipeline)


@pytest.fixture(scope="module")
def with_lora(tiny_folder, tmp_path_factory):
    """A pipeline with LoRA weights of rank 2 in its UNet, loaded from a safetensors file."""
    import peft

    folder, kind = tiny_folder(tiny_pipelines.stable_diffusion), diffusers.StableDiffusionPipeline
    trained, file = load(folder, kind).unet, tmp_path_factory.mktemp("lora")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trained.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    weights = diffusers.utils.convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(trained))
    kind.save_lora_weights(file, unet_lora_layers=weights)
    assert [path.suffix for path in file.iterdir()] == [".safetensors"]
    pipe = load(folder, kind)
    pipe.load_lora_weights(file)
    return pipe


@pytest.mark.parametrize("sampler", FEW)
@torch.no_grad()
def test_lora(with_lora, text_to_image, sampler):
    check("StableDiffusionPipeline, LoRA", sampler, run_both(with_lora, TEXT, text_guided(with_lora), START, sampler))
    assert run_both(with_lora, TEXT, text_guided(text_to_image), START, sampler) > 1e-3


@pytest.fixture(scope="module")
def with_word(tiny_folder, tmp_path_factory):
    """A pipeline that learned the word "<fox>", as two vectors from a safetensors file."""
    file = tmp_path_factory.mktemp("word") / "fox.safetensors"
    safetensors.torch.save_file({"<fox>": normal(2, tiny_pipelines.WIDTH, seed=2).float()}, file)
    pipe = load(tiny_folder(tiny_pipelines.stable_diffusion), diffusers.StableDiffusionPipeline)
    pipe.load_textual_inversion(file)
    return pipe


@pytest.mark.parametrize("sampler", FEW)
@torch.no_grad()
def test_textual_inversion(with_word, sampler):
    call = {**TEXT, "prompt": "a <fox>"}
    found = run_both(with_word, call, text_guided(with_word, prompt="a <fox>"), START, sampler)
    check("StableDiffusionPipeline, textual inversion", sampler, found)
    assert run_both(with_word, call, text_guided(with_word, prompt="a fox"), START, sampler) > 1e-3


@torch.no_grad()
def test_the_prompts_and_the_scale_change_the_result(text_to_image):
    pipe = text_to_image
    results = [
        under(pipe, "dpmpp-2m", {**TEXT, "latents": START.clone(), **change})
        for change in ({}, {"prompt": "a dog"}, {"negative_prompt": "sharp"}, {"guidance_scale": 2.0})
    ]
    assert min(difference(other, results[0]) for other in results[1:]) > 1e-3
    positive, _ = text_pair(pipe)
    alone = {**TEXT, "guidance_scale": 1.0}
    assert run_both(pipe, alone, unet(pipe, positive), START, "dpmpp-2m") < EXACT


@pytest.mark.parametrize("sampler", ["dpmpp-2m", "euler-ancestral"])
@torch.no_grad()
def test_several_images_of_a_prompt(text_to_image, sampler):
    """With a list of generators an image is the same in any batch."""
    pipe = text_to_image
    seeds = [generator(11), generator(12)]
    found = under(pipe, sampler, {**TEXT, "num_images_per_prompt": 2, "generator": seeds})
    alone = under(pipe, sampler, {**TEXT, "generator": generator(12)})
    assert difference(found[1:], alone) < EXACT

    sources = [generator(11), generator(12)]
    start = noise_from(sources)(0, torch.empty(2, 4, 8, 8, dtype=torch.float64))
    model = epsilon_model(pipe.unet, pipe.scheduler, text_guided(pipe, images=2))
    sigma = make_plan(sampler, model.schedule, steps=STEPS).sigma_T
    expected = sample(model, sampler, x_T=sigma * start, noise_source=noise_from(sources), steps=STEPS)
    assert difference(found, expected) < EXACT


@torch.no_grad()
def test_rescaled_guidance(text_to_image):
    """Lin et al. 2023, arXiv:2305.08891, section 3.4: the guided prediction with the deviation of the positive one."""
    pipe = text_to_image
    positive, negative = (unet(pipe, text) for text in text_pair(pipe))
    both = guided(positive, negative)

    def rescaled(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        out = both(x, t)
        deviation = positive(x, t).std((1, 2, 3), keepdim=True) / out.std((1, 2, 3), keepdim=True)
        return 0.7 * out * deviation + 0.3 * out

    assert run_both(pipe, {**TEXT, "guidance_rescale": 0.7}, rescaled, START, "unipc-3") < EXACT
    assert run_both(pipe, {**TEXT, "guidance_rescale": 0.7}, both, START, "unipc-3") > 1e-3


@torch.no_grad()
def test_a_callback_sees_every_step(text_to_image):
    pipe, seen, expected = text_to_image, [], []

    def see(pipe, step, timestep, inputs):
        seen.append((step, float(timestep), inputs["latents"]))
        return inputs

    under(pipe, "dpmpp-2m", {**TEXT, "latents": START.clone(), "callback_on_step_end": see})
    model = epsilon_model(pipe.unet, pipe.scheduler, text_guided(pipe))
    plan = make_plan("dpmpp-2m", model.schedule, steps=STEPS)
    sample(model, "dpmpp-2m", x_T=plan.sigma_T * START, steps=STEPS, callback=lambda p: expected.append(p.x.clone()))
    assert [step for step, *_ in seen] == list(range(STEPS))
    assert [time for _, time, _ in seen] == pytest.approx(plan.times[:-1])
    assert max(difference(x, y) for (*_, x), y in zip(seen, expected, strict=True)) < EXACT


@pytest.mark.parametrize("sampler", FEW)
@torch.no_grad()
def test_a_callback_may_change_the_latents(text_to_image, sampler):
    pipe = text_to_image

    def shrink(pipe, step, timestep, inputs):
        return {"latents": 0.9 * inputs["latents"]}

    found = under(pipe, sampler, {**TEXT, "latents": START.clone(), "callback_on_step_end": shrink})
    model = epsilon_model(pipe.unet, pipe.scheduler, text_guided(pipe))
    plan = make_plan(sampler, model.schedule, steps=STEPS)
    expected = changed(plan, model, plan.sigma_T * START, lambda x, *_: 0.9 * x, noise_from(generator()))
    assert difference(found, expected) < EXACT


@pytest.mark.parametrize("sampler", FEW)
@torch.no_grad()
def test_grids_of_ones_own(text_to_image, sampler):
    pipe, network = text_to_image, text_guided(text_to_image)
    schedule = epsilon_model(pipe.unet, pipe.scheduler, network).schedule
    times = {**TEXT, "timesteps": [900, 600, 250, 40], "num_inference_steps": None}
    assert run_both(pipe, times, network, START, sampler, through([900, 600, 250, 40, -1], schedule)) < EXACT
    levels = [12.0, 4.0, 1.5, 0.4, 0.0]
    sigmas = {**TEXT, "sigmas": levels, "num_inference_steps": None}
    found = run_both(pipe, sigmas, network, START, sampler, {"sigmas": levels})
    check("StableDiffusionPipeline, sigmas=", sampler, found)


@pytest.mark.parametrize("sampler", FEW)
@torch.no_grad()
def test_a_prediction_of_v_from_noise_alone(tiny_folder, sampler):
    """A schedule with zero terminal SNR begins at alpha = 0."""
    pipe = load(tiny_folder(tiny_pipelines.stable_diffusion), diffusers.StableDiffusionPipeline)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False
    )
    check("StableDiffusionPipeline, zero SNR", sampler, run_both(pipe, TEXT, text_guided(pipe), START, sampler))


@pytest.mark.parametrize(
    ("sampler", "final"),
    [
        *((name, None) for name in ("ddim", "dpmpp-2m", "unipc-3", "deis-3", "heun", "euler-ancestral")),
        ("heun", "zero"),
    ],
)
@torch.no_grad()
def test_a_base_and_a_refiner_share_a_grid(tiny_pipeline, sampler, final):
    """The base stops at a node of its plan, and the refiner's plan begins there.

    The base of a two-call sampler stops after the first call of a step, where Heun's state is Euler's at the next node. With
    clean data at the end pipelines take the refiner a step back, which a `denoising_start` below that node makes good.
    """
    base = tiny_pipeline(tiny_pipelines.stable_diffusion_xl, diffusers.StableDiffusionXLPipeline)
    refiner = tiny_pipeline(tiny_pipelines.stable_diffusion_xl_refiner, diffusers.StableDiffusionXLImg2ImgPipeline)
    size = [16.0, 16, 0, 0]
    first = epsilon_model(base.unet, base.scheduler, sized(base, torch.tensor([[*size, 16, 16]])))
    scored = (torch.tensor([[*size, score]]) for score in (6.0, 2.5))  # the aesthetic scores the pipeline assumes
    second = epsilon_model(refiner.unet, refiner.scheduler, sized(refiner, *scored))
    plan = make_plan(sampler, first.schedule, steps=STEPS, final=final)
    done = sum(t >= 400 for t in plan.times[:-1])
    assert 1 < done < STEPS

    handed = under(base, sampler, {**TEXT, "latents": START.clone(), "denoising_end": 0.6}, final=final)
    begin = 0.6 if final is None else 1 - (plan.times[done] - 1) / 1000
    call = {**TEXT, "image": handed, "denoising_start": begin, "generator": generator(3)}
    found = under(refiner, sampler, call, final=final)

    states = []
    sample(
        first,
        sampler,
        x_T=plan.sigma_T * START,
        steps=STEPS,
        final=final,
        noise_source=noise_from(generator()),
        callback=lambda progress: states.append(progress.x.clone()),
    )
    if sampler == "heun":
        states[done - 1] = sample(first, "euler", x_T=states[done - 2], timesteps=plan.times[done - 1 : done + 1])
    what = "" if final is None else f", final={final}"
    check(f"StableDiffusionXLPipeline, denoising_end{what}", sampler, difference(handed, states[done - 1]))
    rest = through(plan.times[done:], second.schedule)
    expected = sample(second, sampler, x_T=handed, noise_source=noise_from(generator(3)), **rest)
    check(f"StableDiffusionXLImg2ImgPipeline, denoising_start{what}", sampler, difference(found, expected))


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp-2m", "unipc-3", "deis-3", "heun"])
@torch.no_grad()
def test_half_precision(tiny_folder, text_to_image, sampler):
    folder, call = tiny_folder(tiny_pipelines.stable_diffusion), {**TEXT, "latents": START.clone()}
    half = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, local_files_only=True)
    half.set_progress_bar_config(disable=True)
    found = under(half, sampler, {**call, "latents": START.bfloat16()})
    assert found.dtype == torch.bfloat16
    exact = under(text_to_image, sampler, call)
    assert difference(found.double(), exact) < 0.05


@pytest.mark.parametrize("sampler", ["unipc-3", "heun", "dpmpp-2m-sde"])
@torch.no_grad()
def test_a_pipeline_is_saved_with_its_sampler(tiny_folder, tmp_path: Path, sampler):
    pipe = load(tiny_folder(tiny_pipelines.stable_diffusion), diffusers.StableDiffusionPipeline)
    pipe.scheduler = PlanScheduler.from_config(pipe.scheduler.config, sampler=sampler)
    pipe.save_pretrained(tmp_path)
    again = load(tmp_path, diffusers.StableDiffusionPipeline)
    assert isinstance(again.scheduler, PlanScheduler)
    assert again.scheduler.config.sampler == sampler
    call = {**TEXT, "num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
    first, second = (p(**call, generator=generator())[0] for p in (pipe, again))
    assert difference(first, second) < EXACT
