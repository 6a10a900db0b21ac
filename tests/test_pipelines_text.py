"""Every kind of sampler in pipelines that go from a text or a class to latents, against `sample` on the same epsilon-model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
    Network,
    check,
    controlled,
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
    sized,
    text_guided,
    text_pair,
    through,
    under,
    unet,
    video,
)

from samplers import sample, schedules

IMAGE = torch.rand(1, 3, 16, 16, generator=generator(1)).double()
TEXT = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": SCALE}
SHORT = {"max_sequence_length": 16}
FRAMES = 3


class Case(NamedTuple):
    """A pipeline that starts from latents.

    Attributes:
        folder: builds it.
        kind: its class.
        call: what a user passes beside the steps and the latents.
        network: what it calls at every step, written once more.
        latents: the shape of its latents.
        where: for a sampler, the nodes in `sample`'s words; None is the sampler's own grid.
    """

    folder: Callable[[Path], Path]
    kind: type[diffusers.DiffusionPipeline]
    call: dict[str, Any]
    network: Callable[[Any], Network]
    latents: tuple[int, ...] = (1, 4, 8, 8)
    where: Callable[[str], dict[str, Any]] | None = None


CASES = {
    "stable-diffusion": Case(tiny_pipelines.stable_diffusion, diffusers.StableDiffusionPipeline, TEXT, text_guided),
    "controlnet": Case(
        tiny_pipelines.controlnet,
        diffusers.StableDiffusionControlNetPipeline,
        {**TEXT, "image": IMAGE},
        lambda pipe: controlled(pipe, IMAGE),
    ),
    "sdxl": Case(
        tiny_pipelines.stable_diffusion_xl,
        diffusers.StableDiffusionXLPipeline,
        {**TEXT, "original_size": (32, 24), "crops_coords_top_left": (2, 4)},
        lambda pipe: sized(pipe, torch.tensor([[32.0, 24, 2, 4, 16, 16]])),
    ),
    "animatediff": Case(
        tiny_pipelines.animatediff,
        diffusers.AnimateDiffPipeline,
        {**TEXT, "num_frames": FRAMES, "height": 16, "width": 16},
        lambda pipe: video(pipe, FRAMES),
        (1, 4, FRAMES, 8, 8),
    ),
    "sd3": Case(
        tiny_pipelines.sd3,
        diffusers.StableDiffusion3Pipeline,
        {**TEXT, **SHORT, "height": 16, "width": 16},
        lambda pipe: sd3(pipe, **SHORT),
        where=lambda sampler: through(shifted(sampler, 3.0), schedules.flow()),
    ),
    "flux": Case(
        tiny_pipelines.flux,
        diffusers.FluxPipeline,
        {"prompt": PROMPT, "guidance_scale": 3.5, **SHORT, "height": 16, "width": 16},
        lambda pipe: flux(pipe, 4, 3.5, **SHORT),
        (1, 16, 16),
        lambda sampler: through(flux_nodes(), schedules.flow()),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def loaded(request, tiny_pipeline):
    case = CASES[request.param]
    pipe = tiny_pipeline(case.folder, case.kind)
    return pipe, case, case.network(pipe)


@pytest.mark.parametrize("sampler", SAMPLERS)
@torch.no_grad()
def test_a_pipeline_gives_what_sample_gives(loaded, sampler):
    pipe, case, network = loaded
    where = None if case.where is None else case.where(sampler)
    found = run_both(pipe, case.call, network, normal(*case.latents), sampler, where)
    check(case.kind.__name__, sampler, found)


@pytest.mark.parametrize("sampler", SAMPLERS)
@torch.no_grad()
def test_a_class_conditional_transformer(tiny_pipeline, sampler):
    """DiT decodes what it samples, scales no start noise, gives the scheduler no generator, and guides in doubled batches."""
    pipe = tiny_pipeline(tiny_pipelines.dit, diffusers.DiTPipeline)
    labels, none = torch.tensor([0, 207]), torch.tensor([1000, 1000])
    call = {"class_labels": labels.tolist(), "guidance_scale": SCALE}
    found = under(pipe, sampler, {**call, "output_type": "pt"})

    def told(classes: torch.Tensor) -> Network:
        return lambda x, t: pipe.transformer(x, t, classes).sample[:, :4]  # the rest is the learned variance

    model = epsilon_model(pipe.transformer, pipe.scheduler, guided(told(labels), told(none)))
    doubled = noise_from(generator())
    latents = sample(
        model,
        sampler,
        x_T=normal(2, 4, 8, 8, seed=SEED),
        noise_source=lambda k, like: doubled(k, torch.cat([like, like]))[:2],
        steps=STEPS,
    )
    pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    expected = (pixels / 2 + 0.5).clamp(0, 1)
    assert ((expected > 0) & (expected < 1)).double().mean() > 0.5
    check("DiTPipeline", sampler, difference(found, expected))


@torch.no_grad()
def test_single_precision_agrees_to_a_millionth(tiny_folder):
    """As a user loads a pipeline; the network is called in doubled batches on both sides, as its rounding depends on them."""
    case = CASES["stable-diffusion"]
    pipe = case.kind.from_pretrained(tiny_folder(case.folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    both, start = unet(pipe, torch.cat(text_pair(pipe)[::-1])), normal(*case.latents).float()

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        without, told = both(torch.cat([x, x]), t.repeat(2)).chunk(2)
        return without + SCALE * (told - without)

    assert under(pipe, "ddim", {**case.call, "latents": start}).dtype == torch.float32
    errors = {sampler: run_both(pipe, case.call, network, start, sampler) for sampler in SAMPLERS}
    for sampler, error in errors.items():
        print(f"measured in float32 | {case.kind.__name__} | {sampler} | {error:.1e}")
    assert {sampler: error for sampler, error in errors.items() if not error < 1e-6} == {}
    wrong = run_both(pipe, case.call, lambda x, t: (1 + 1e-5) * network(x, t), start, "unipc-3")
    assert wrong > 1e-6  # it would be seen


@torch.no_grad()
def test_a_network_that_is_a_little_different_would_be_seen(loaded):
    pipe, case, network = loaded
    where = None if case.where is None else case.where("unipc-3")
    wrong = run_both(pipe, case.call, lambda x, t: 1.001 * network(x, t), normal(*case.latents), "unipc-3", where)
    assert wrong > 1e-5


@pytest.mark.parametrize("name", ["stable-diffusion", "flux"])
@torch.no_grad()
def test_another_sampler_would_be_seen(tiny_pipeline, name):
    case = CASES[name]
    pipe, start = tiny_pipeline(case.folder, case.kind), normal(*case.latents)
    # not 4 steps: Flux's nodes are then at equal distances in lam, where dpmpp-2m and ipndm-3 do the same
    call = {**case.call, "latents": start, "num_inference_steps": 5}
    results = {sampler: under(pipe, sampler, call) for sampler in SAMPLERS}
    same = {pair for pair in itertools.combinations(SAMPLERS, 2) if difference(*(results[s] for s in pair)) < 1e-5}
    assert same == {("ddpm", "euler-ancestral")}
