"""Networks of EDM and EDM2 in the zoo: `edm:FOLDER`, with the code of their repository and weights without a pickle.

FOLDER holds the weights as one `.safetensors`, which `samplers.adapters.weights.load_weights` prints the lines to make of the
published `.pkl`, and a `config.json` that says what they go into:

    {"class": "training.networks.EDMPrecond", "arguments": {"img_resolution": 32, "img_channels": 3, "model_type": "SongUNet"}}

The class is imported from a clone of the repository, which has to be on `PYTHONPATH`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.meter import Meter
from bench.network import Network, model_hash, torch_dtype
from bench.store import plugin_fingerprint
from distill.checkpoint import CheckpointError, read_json, refuse_pickle
from samplers import EpsModel
from samplers.adapters.edm import eps_model_from_edm
from samplers.adapters.weights import load_weights

EDM = "edm:"
_MODULES = ("training.networks", "training.networks_edm2")  # of the two repositories


def load_edm(name: str, device: str, dtype: str) -> Network:
    """The network in a folder, its own preconditioning around it.

    Args:
        name: "edm:" and the folder.
        device: of torch.
        dtype: that autocast computes in, "fp32", "bf16" or, on an accelerator, "fp16"; weights stay in float32.

    Raises:
        ValueError: an unknown dtype, or a clone of the repository that is not on the path.
        distill.checkpoint.CheckpointError: a folder without the two files, a class that is none of EDM's, or weights of another.
    """
    folder = Path(name.removeprefix(EDM))
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        for published in sorted(folder.iterdir()):
            refuse_pickle(published)
    inside, config, file = torch_dtype(dtype, device), _config(folder), _weights(folder)
    made_by = _class(config["class"])
    try:
        network = load_weights(made_by(**config["arguments"]), file).to(device).eval().requires_grad_(False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: {config['class']} cannot be made of config.json and {file.name}: {error}"
        ) from error
    digest = model_hash(network.state_dict(), {**config, "code": plugin_fingerprint(made_by)})
    known: Any = network
    side, channels, classes = known.img_resolution, known.img_channels, int(getattr(network, "label_dim", 0) or 0)
    eps = eps_model_from_edm(network)
    model = EpsModel(Meter(_autocast(eps.net, torch.device(device).type, inside)), eps.schedule, predicts=eps.predicts)
    info = {"class": config["class"], "weights": file.name}
    return Network(name, digest, model, (channels, side, side), classes, dtype, info=info, device=device)


def _autocast(net: Callable[..., Tensor], kind: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """EDM's networks choose dtypes within, so that casting their weights would break them."""

    def autocast(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        with torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32):
            return net(x, t, **cond)

    return autocast


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    fits = isinstance(config, dict) and isinstance(config.get("class"), str) and set(config) <= {"class", "arguments"}
    if not fits or not isinstance(config.setdefault("arguments", {}), dict):
        raise CheckpointError(
            f'{folder / "config.json"} must be {{"class": ..., "arguments": {{...}}}}, the class and what it is made with, '
            f"got {config}"
        )
    return config


def _weights(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise CheckpointError(f"{folder} must hold the weights as one .safetensors file, got {len(files)} of them")
    return files[0]


def _class(path: str) -> type[nn.Module]:
    """A network's class by its full name."""
    module, _, name = path.rpartition(".")
    if module not in _MODULES:
        raise CheckpointError(
            f"class must be of {' or '.join(_MODULES)}, such as training.networks.EDMPrecond, got {path!r}"
        )
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"class {path} cannot be imported ({error}): put a clone of NVlabs/edm, or NVlabs/edm2, on PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise CheckpointError(f"class must be a network of {module}, got {name!r}")
    return found
