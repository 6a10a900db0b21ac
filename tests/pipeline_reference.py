"""What a pipeline of diffusers must give under a sampler: `samplers.sample` on an epsilon-model written out by hand.

Nothing here goes through `PlanScheduler`: guidance, added conditions and noise are written once more.
A network is a function `(x, t) -> prediction`, with t (B,) in the units that the component of the pipeline takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from samplers import EpsModel, Plan, make_plan, sample, schedules
from samplers.adapters.diffusers import PlanScheduler, eps_model_from_diffusers
from samplers.execute import NoiseSource
from samplers.program import Evaluate
from samplers.schedule import Schedule

# with memory, with two calls a step, with noise; in epsilon and in x0
SAMPLERS = ("ddim", "dpmpp-2m", "unipc-3", "deis-3", "ipndm-3", "heun", "ddpm", "euler-ancestral", "dpmpp-2m-sde")
STEPS, SCALE, SEED = 4, 5.0, 7
PROMPT, NEGATIVE = "a cat", "dog, blurred"
Network = Callable[[Tensor, Tensor], Tensor]


def load(folder: Path, kind: type[DiffusionPipeline]) -> Any:
    """A pipeline as a user loads it, in float64."""
    pipe = kind.from_pretrained(folder, torch_dtype=torch.float64, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int = SEED) -> torch.Generator:
    """A generator of the seed; two of them give the pipeline and the reference the same noise."""
    return torch.Generator().manual_seed(seed)


def noise_from(source: torch.Generator | list[torch.Generator]) -> NoiseSource:
    """The noise that a scheduler of diffusers draws from a generator, step after step."""
    return lambda k, like: randn_tensor(tuple(like.shape), generator=source, dtype=like.dtype)


def guided(positive: Network, negative: Network, scale: float = SCALE) -> Network:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) as pipelines scale it: 1 is no guidance."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        without = negative(x, t)
        return without + scale * (positive(x, t) - without)

    return predict


def unet(pipe: Any, text: Tensor, **cond: Any) -> Network:
    """The pipeline's UNet under embeddings of a text, (B, L, D) or one for all, and further inputs."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return pipe.unet(x, t, encoder_hidden_states=text.expand(len(x), -1, -1), **cond).sample

    return predict


def text_pair(pipe: Any, prompt: str = PROMPT, images: int = 1) -> tuple[Tensor, Tensor]:
    """The embeddings of the prompt and of the negative prompt, from the pipeline's own text encoder."""
    return pipe.encode_prompt(prompt, "cpu", images, True, NEGATIVE)[:2]


def text_guided(pipe: Any, **prompt: Any) -> Network:
    """The pipeline's UNet with guidance between the two prompts."""
    return guided(*(unet(pipe, text) for text in text_pair(pipe, **prompt)))


def controlled(pipe: Any, image: Tensor) -> Network:
    """The UNet with the residuals of a ControlNet that sees the image, and guidance."""

    def told(text: Tensor) -> Network:
        def predict(x: Tensor, t: Tensor) -> Tensor:
            down, mid = pipe.controlnet(x, t, text, image, return_dict=False)
            extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            return unet(pipe, text, **extra)(x, t)

        return predict

    return guided(*map(told, text_pair(pipe)))


def beside(network: Network, *more: Tensor) -> Network:
    """A network that sees further channels beside the latents, which have no noise level."""
    return lambda x, t: network(torch.cat([x, *more], 1), t)


def sized(pipe: Any, sizes: Tensor, negative_sizes: Tensor | None = None) -> Network:
    """SDXL's UNet: pooled embeddings and the numbers that tell sizes (and the score of the refiner) as added conditions."""
    text, no_text, pooled, no_pooled = pipe.encode_prompt(PROMPT, None, "cpu", 1, True, NEGATIVE)

    def told(embeds: Tensor, pool: Tensor, numbers: Tensor) -> Network:
        return unet(pipe, embeds, added_cond_kwargs={"text_embeds": pool, "time_ids": numbers})

    return guided(
        told(text, pooled, sizes), told(no_text, no_pooled, sizes if negative_sizes is None else negative_sizes)
    )


def sd3(pipe: Any, **lengths: int) -> Network:
    """Stable Diffusion 3's transformer with guidance."""
    embeds = pipe.encode_prompt(PROMPT, None, None, "cpu", negative_prompt=NEGATIVE, **lengths)

    def told(text: Tensor, pooled: Tensor) -> Network:
        return lambda x, t: pipe.transformer(x, text, pooled, t).sample

    return guided(told(embeds[0], embeds[2]), told(embeds[1], embeds[3]))


def flux(pipe: Any, side: int, guidance: float, **lengths: int) -> Network:
    """Flux's transformer on packed latents of side x side tokens, whose guidance is an input."""
    text, pooled, text_ids = pipe.encode_prompt(PROMPT, None, "cpu", **lengths)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).to(text)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        inputs = {"guidance": torch.full((len(x),), guidance), "txt_ids": text_ids, "img_ids": places}
        return pipe.transformer(x, text, pooled, t, **inputs).sample

    return predict


def video(pipe: Any, frames: int) -> Network:
    """AnimateDiff's UNet on (B, C, frames, H, W): each frame under the same text, and guidance."""

    def told(text: Tensor) -> Network:
        every_frame = text.repeat_interleave(frames, 0)
        return lambda x, t: pipe.unet(x, t, encoder_hidden_states=every_frame).sample

    return guided(*map(told, text_pair(pipe)))


def epsilon_model(component: Any, scheduler: Any, network: Network) -> EpsModel:
    """The epsilon-model of a network: schedule, prediction and time of `component` with the scheduler it was saved with."""
    base = eps_model_from_diffusers(component, scheduler)
    return EpsModel(network, base.schedule, base.predicts, base.time_input)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number of what is expected."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def through(nodes: Sequence[float], schedule: Schedule) -> dict[str, Any]:
    """The arguments of `sample` for a grid through given nodes, which may end at clean data."""
    ends_clean = nodes[-1] == schedule.t_zero
    return {
        "steps": len(nodes) - 1,
        "grid": lambda _, n: np.asarray(nodes[:n]),
        "final": "zero" if ends_clean else "t_min",
    }


def shifted(sampler: str, shift: float) -> list[float]:
    """The nodes of the sampler's own grid on a flow, every time but the last shifted (Esser et al. 2024, 2403.03206, eq. 23)."""
    *t, end = make_plan(sampler, schedules.flow(), steps=STEPS).times
    return [*(shift * time / (1 + (shift - 1) * time) for time in t), end]


def flux_nodes() -> list[float]:
    """Flux's pipelines ask for 1, ..., 1 / N themselves, shifted by exp(mu) where mu grows with the number of tokens, here 16."""
    mu = 0.5 + (16 - 256) * (1.15 - 0.5) / (4096 - 256)
    t = np.linspace(1, 1 / STEPS, STEPS)
    return [*(math.exp(mu) / (math.exp(mu) + 1 / t - 1)).tolist(), 0.0]


def under(pipe: Any, sampler: str, call: dict[str, Any], states: list[Tensor] | None = None, **options: Any) -> Tensor:
    """What a user gets from the pipeline under a PlanScheduler; it has its own scheduler again afterwards.

    Args:
        pipe: the pipeline.
        sampler: a registered name.
        call: what a user passes beside the steps and the generator.
        states: takes what every step of the scheduler returns, where the pipeline shows its pixels alone.
        options: of `PlanScheduler.from_config`.
    """
    saved = pipe.scheduler
    pipe.scheduler = PlanScheduler.from_config(saved.config, sampler=sampler, **options)
    if states is not None:
        step = pipe.scheduler.step

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            states.append(result.prev_sample)
            return result

        pipe.scheduler.step = watched
    torch.manual_seed(SEED)  # some pipelines give no generator to the scheduler, which then takes torch's own
    try:
        usual = {"num_inference_steps": STEPS, "output_type": "latent", "generator": generator()}
        return pipe(return_dict=False, **{**usual, **call})[0]
    finally:
        pipe.scheduler = saved


def run_both(
    pipe: Any,
    call: dict[str, Any],
    network: Network,
    start: Tensor,
    sampler: str,
    where: dict[str, Any] | None = None,
    drawn: Sequence[tuple[int, ...]] = (),
) -> float:
    """How far a pipeline under a PlanScheduler is from `sample`, from the same start noise and with the same step noise.

    Args:
        pipe: with the scheduler that it was saved with.
        call: what a user passes beside the steps, the latents and the generator.
        network: what the pipeline calls at every step, guidance and all.
        start: standard-normal latents.
        sampler: a registered name.
        where: arguments of `sample` that say where the nodes are; None is the sampler's own grid with `STEPS` steps.
        drawn: shapes of what the pipeline draws from its generator before the first step.
    """
    where = where or {"steps": STEPS}
    component = getattr(pipe, "unet", None) or pipe.transformer
    calls: list[Any] = []
    hook = component.register_forward_pre_hook(lambda *_: calls.append(1))
    found = under(pipe, sampler, {"latents": start.clone(), **call})
    hook.remove()
    model, source = epsilon_model(component, pipe.scheduler, network), generator()
    for shape in drawn:
        torch.randn(shape, generator=source, dtype=torch.float64)
    plan = make_plan(sampler, model.schedule, **where)
    assert len(calls) == plan.nfe
    expected = sample(model, sampler, x_T=plan.sigma_T * start, noise_source=noise_from(source), **where)
    return difference(found, expected)


def changed(plan: Plan, model: EpsModel, x: Tensor, change: Callable[..., Tensor], draw: NoiseSource) -> Tensor:
    """A plan read instruction by instruction, with `change(x, alpha, sigma)` of the state after every step of the pipeline."""
    values, noises = {"x_T": x}, 0
    for number, step in enumerate(plan.instructions):
        if isinstance(step, Evaluate):
            if number:
                values[step.src] = change(values[step.src], step.alpha, step.sigma)
            at = values[step.src]
            values[step.dst] = model.eps(at, step.t) if step.kind == "eps" else model.x0(at, step.t)
            continue
        for name, _ in step.terms:
            if name not in values:
                values[name] = draw(noises, x)
                noises += 1
        values[step.dst] = sum(c * values[name] for name, c in step.terms)
    return change(values[plan.instructions[-1].dst], 1.0, 0.0)


def check(what: str, sampler: str, found: float, limit: float = 1e-12) -> None:
    """Assert a difference and print it; `pytest -rP tests/test_pipelines_*.py | grep measured` is the table of the documents."""
    print(f"measured | {what} | {sampler} | {found:.1e}")
    assert found < limit
