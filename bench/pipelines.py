"""Pipelines of diffusers, from a folder or the hub, as networks of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench.meter import Meter
from bench.network import Network, in_dtype, model_hash
from distill.config import DTYPES
from samplers.adapters.diffusers import eps_model_from_diffusers

HUB = "hf:"
INDEX = "model_index.json"


def is_pipeline(name: str) -> bool:
    """Whether a name is that of a folder which `save_pretrained` of a pipeline wrote, or "hf:" and an id of the hub."""
    return name.startswith(HUB) or (Path(name) / INDEX).is_file()


def load_pipeline(name: str, device: str, dtype: str) -> Network:
    """The network and noise schedule of a pipeline whose samples are pixels.

    Args:
        name: a folder, or "hf:" and an id of the hub, such as "hf:google/ddpm-cifar10-32", which is then downloaded; weights
            are read from safetensors only.
        device, dtype: as for `bench.zoo.load_model`.

    Raises:
        ValueError: no such folder or id, no safetensors, a pipeline that works on latents or text, or a scheduler that is not
            understood.
    """
    from diffusers import DiffusionPipeline

    place, local = name.removeprefix(HUB), not name.startswith(HUB)
    try:
        pipeline = DiffusionPipeline.from_pretrained(place, local_files_only=local, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"model {name!r} is no pipeline that can be loaded: {str(error).splitlines()[0]}") from error
    beyond = [
        part for part in ("vae", "text_encoder", "vqvae", "image_encoder") if getattr(pipeline, part, None) is not None
    ]
    if beyond:
        raise ValueError(f"model {name!r} must be a pipeline whose samples are pixels, got one with a {beyond[0]}")
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    if network is None:
        raise ValueError(
            f"model {name!r} must be a pipeline with a unet or a transformer, got {type(pipeline).__name__}"
        )
    made_of = {"network": dict(network.config), "scheduler": dict(pipeline.scheduler.config)}
    digest = model_hash(network.state_dict(), made_of)
    layout: Any = {"dtype": DTYPES[dtype], "memory_format": torch.channels_last}
    network = network.eval().requires_grad_(False).to(device, **layout)
    model = eps_model_from_diffusers(network, pipeline.scheduler)
    model.net = Meter(in_dtype(model.net, DTYPES[dtype]))
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    classes = int(network.config.get("num_class_embeds") or 0)
    return Network(name, digest, model, (network.config.in_channels, height, width), classes, dtype)
