"""Pipelines of diffusers, from a folder or the hub, as networks of a benchmark: on pixels or latents, with labels or prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.guidance import null_of
from bench.meter import Meter
from bench.network import Network, in_dtype, model_hash, torch_dtype
from bench.prompts import PromptEncoder, has_prompts, prompts_in
from samplers.adapters.diffusers import eps_model_from_diffusers
from samplers.adapters.latent import LatentSpace

HUB = "hf:"
INDEX = "model_index.json"
_PICKLED = "; weights are read from safetensors only, as .bin is a pickle, which can run code"
_PATCHED = "FluxTransformer2DModel"  # whose channels are those of patches of 2 x 2
_LABELLED = "DiTTransformer2DModel"  # whose last label, after the classes, is none


@dataclass(frozen=True)
class Reading:
    """How a pipeline becomes a model.

    Attributes:
        prompts: for a pipeline that takes them: texts, of which sample i has number i modulo their count, or a file with one
            prompt a line.
        guidance: scale of classifier-free guidance, which makes two evaluations of a call; None or 1 = none.
        pixels: whether samples of a latent model come out as pixels, which a benchmark judges and shows; else as latents.
        size: height and width in pixels; None = what the pipeline was trained for.
        tiles: whether its VAE decodes tile by tile.
    """

    prompts: str | tuple[str, ...] = ()
    guidance: float | None = None
    pixels: bool = True
    size: int | None = None
    tiles: bool = False


def is_pipeline(name: str) -> bool:
    """Whether a name is that of a folder which `save_pretrained` of a pipeline wrote, or "hf:" and an id of the hub."""
    return name.startswith(HUB) or (Path(name) / INDEX).is_file()


def load_pipeline(name: str, device: str, dtype: str, **reading: Any) -> Network:
    """The network and noise schedule of a pipeline; on latents where it has a VAE, whose samples `decode` makes pixels.

    Args:
        name: a folder, or "hf:" and an id of the hub, such as "hf:google/ddpm-cifar10-32", which is then downloaded; weights
            are read from safetensors only.
        device, dtype: as for `bench.zoo.load_model`. The VAE and text encoders compute in float32.
        **reading: fields of `Reading`.

    Raises:
        ValueError: no such folder or id, no safetensors, a kind of pipeline or scheduler that is not understood, a VAE that
            does not fit, or prompts for a pipeline that takes none.
    """
    torch_dtype(dtype, device)  # refused before weights are read
    return _loaded(_opened(name), name, device, dtype, Reading(**reading))


def _pickled(place: str) -> bool:
    """Whether a folder has a part whose weights are there as .bin alone."""
    parts = {file.parent for file in Path(place).glob("*/*.bin")}
    return any(not list(part.glob("*.safetensors")) for part in parts)


def _opened(name: str) -> Any:
    from diffusers import DiffusionPipeline

    place, local = name.removeprefix(HUB), not name.startswith(HUB)
    try:
        return DiffusionPipeline.from_pretrained(place, local_files_only=local, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        only_bin = "necessary `safetensors`" in str(error) or (local and _pickled(place))
        why = str(error).splitlines()[0] + (_PICKLED if only_bin else "")
        raise ValueError(f"model {name!r} is no pipeline that can be loaded: {why}") from error


def _loaded(pipeline: Any, name: str, device: str, dtype: str, how: Reading) -> Network:
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    if network is None:
        raise ValueError(
            f"model {name!r} must be a pipeline with a unet or a transformer, got {type(pipeline).__name__}"
        )
    _check_network(network, name)
    kind = type(network).__name__
    channels = network.config.in_channels // (4 if kind == _PATCHED else 1)
    space = _space(pipeline, channels, name, device, how)
    factor = space.factor if space else 1
    height, width = _sides(pipeline, network, factor, how)
    digest = model_hash(network.state_dict(), _made_of(pipeline, network, space, how))
    inside = torch_dtype(dtype, device)
    layout: Any = {"dtype": inside, "memory_format": torch.channels_last}
    network = nn.Module.to(network.eval().requires_grad_(False), device, **layout)  # without a remark of diffusers' own
    model = eps_model_from_diffusers(network, pipeline.scheduler)
    model.net = Meter(in_dtype(model.net, inside))
    encoder = None
    if has_prompts(pipeline):
        encoder = PromptEncoder(pipeline, network, (height * factor, width * factor), device)
    labelled = kind == _LABELLED
    classes = int(network.config.get("num_embeds_ada_norm" if labelled else "num_class_embeds") or 0)
    found = Network(
        *(name, digest, model, (channels, height, width), classes, dtype),
        space=space if how.pixels else None,
        prompts=encoder,
        null_label=classes if labelled else None,
        device=device,
    )
    return _conditioned(found, how)


def _check_network(network: Any, name: str) -> None:
    kind = type(network).__name__
    if kind == "UNetMotionModel" or "3D" in kind:
        raise ValueError(f"model {name!r} must be a pipeline of images, got one with a {kind}, which makes videos")
    taken, given = network.config.in_channels, network.config.get("out_channels")
    if given and taken > given:
        raise ValueError(
            f"model {name!r}: its network takes more than the latents ({taken} channels in, {given} out), as of inpainting or "
            "upscaling; use the pipeline itself with PlanScheduler"
        )


def _space(pipeline: Any, channels: int, name: str, device: str, how: Reading) -> LatentSpace | None:
    """The latent space of a pipeline with a VAE, on the device in float32."""
    vae = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    if vae is None:
        return None
    try:
        vae = nn.Module.to(vae.eval().requires_grad_(False), device, torch.float32)
        return LatentSpace.of(vae, tiles=how.tiles, channels=channels)
    except ValueError as error:
        raise ValueError(f"model {name!r}: {error}") from error


def _sides(pipeline: Any, network: Any, factor: int, how: Reading) -> tuple[int, int]:
    """Height and width of a sample, in the model's own space."""
    if how.size is not None:
        step = 2 * factor if type(network).__name__ == _PATCHED else factor
        if how.size < step or how.size % step:
            raise ValueError(f"size must be a multiple of {step} pixels, got {how.size}")
        return how.size // factor, how.size // factor
    size = network.config.get("sample_size") or getattr(pipeline, "default_sample_size", None)
    if size is None:
        raise ValueError(f"size must be given: {type(pipeline).__name__} does not say what it was trained for")
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _made_of(pipeline: Any, network: Any, space: LatentSpace | None, how: Reading) -> dict[str, Any]:
    """What a sample follows from beside the weights of the network."""
    made_of: dict[str, Any] = {"network": dict(network.config), "scheduler": dict(pipeline.scheduler.config)}
    if space is not None and how.pixels:
        made_of["vae"] = model_hash(space.vae.state_dict(), dict(space.vae.config))
    if how.size is not None or how.tiles:
        made_of["size"] = [how.size, how.tiles]
    return made_of


def _conditioned(network: Network, how: Reading) -> Network:
    """The network with the conditions of a benchmark, and guided where that is wanted."""
    if how.prompts:
        texts = prompts_in(how.prompts)
        rows = network.condition(prompts=texts)
        network = replace(network, rows=rows, hash=model_hash(rows, {"network": network.hash, "prompts": texts}))
    elif network.prompts is not None:
        network = replace(network, rows=network.null(1))
    if how.guidance is None or how.guidance == 1:
        return network
    if network.prompts is not None and not how.prompts:
        raise ValueError(f"guidance={how.guidance:g} guides towards prompts, of which none are given; give prompts")
    from samplers.guidance.classifier_free import classifier_free

    model = classifier_free(network.model, how.guidance, null_of(network))
    return replace(network, model=model, hash=model_hash({}, {"network": network.hash, "guidance": how.guidance}))
