"""Checkpoints: tensors as safetensors, everything else as JSON, each folder complete or absent. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.network import PatchUNet
from samplers import schedule as schedules

FORMAT = 1
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_PICKLES = {".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin"}
NETWORKS: dict[str, type[PatchUNet]] = {"PatchUNet": PatchUNet}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


def write_folder(folder: Path, tensors: dict[str, dict[str, Tensor]], documents: dict[str, Any]) -> None:
    """Write `name.safetensors` and `name.json` files so that `folder` is, at every moment, the old one or the new one."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for name, content in tensors.items():
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in content.items()}, new / f"{name}.safetensors"
        )
    for name, document in documents.items():
        (new / f"{name}.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    for file in new.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> Path:
    """Finish a `write_folder` that a kill interrupted between its two renames."""
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():
        old.rename(folder)
    return folder


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: the file is absent, truncated, a pickle, or not safetensors.
    """
    if file.suffix in _PICKLES:
        raise CheckpointError(
            f"checkpoint {file} is a pickle, which can run code when it is read; give a folder with {_WEIGHTS}"
        )
    if not file.exists():
        raise CheckpointError(f"checkpoint file {file} does not exist")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint file {file} is truncated or not safetensors: {error}") from error


def read_json(file: Path) -> Any:
    """A JSON document.

    Raises:
        CheckpointError: the file is absent or not JSON.
    """
    if not file.exists():
        raise CheckpointError(f"checkpoint file {file} does not exist")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"checkpoint file {file} is not JSON: {error}") from error


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and what it takes to sample from it.

    Attributes:
        network: in evaluation mode, fp32.
        schedule: the noise schedule it was trained on.
        predicts: what it outputs, as in `EpsModel`.
        info: free description: training images, data, loss.
    """

    network: PatchUNet
    schedule: schedules.Schedule
    predicts: str
    info: dict[str, Any]


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
    """Save as `folder/model.safetensors` (weights in `dtype`) and `folder/config.json`."""
    config = {
        "format": FORMAT,
        "network": {"class": type(checkpoint.network).__name__, **checkpoint.network.arguments},
        "schedule": checkpoint.schedule.config(),
        "predicts": checkpoint.predicts,
        "info": checkpoint.info,
    }
    weights = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in checkpoint.network.state_dict().items()
    }
    write_folder(Path(folder), {"model": weights}, {"config": config})


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Load a folder that `save_checkpoint` wrote.

    Raises:
        CheckpointError: a missing, truncated or pickled file, an unknown format, or weights of another architecture.
    """
    folder = Path(folder)
    if folder.suffix in _PICKLES:
        raise CheckpointError(
            f"checkpoint {folder} is a pickle, which can run code when it is read; give a folder with {_WEIGHTS}"
        )
    config = read_json(folder / _CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"{folder / _CONFIG}: format must be {FORMAT}, got {found!r}")
    try:
        network = build_network(config["network"])
        schedule = schedules.from_config(config["schedule"])
        predicts, info = config["predicts"], config.get("info", {})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / _CONFIG}: {type(error).__name__}: {error}") from error
    load_weights(
        network,
        {k: v.float() if v.is_floating_point() else v for k, v in read_tensors(folder / _WEIGHTS).items()},
        folder / _WEIGHTS,
    )
    return Checkpoint(network.eval(), schedule, predicts, info)


def build_network(config: dict[str, Any]) -> PatchUNet:
    """The network that `{"class": name, **arguments}` describes, with fresh weights."""
    arguments = dict(config)
    name = arguments.pop("class", None)
    if name not in NETWORKS:
        raise CheckpointError(f"network class must be one of {sorted(NETWORKS)}, got {name!r}")
    return NETWORKS[name](**arguments)


def load_weights(network: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Load weights that must fit exactly.

    Raises:
        CheckpointError: names or shapes differ from the network's.
    """
    expected = network.state_dict()
    for name, value in expected.items():
        if name not in weights:
            raise CheckpointError(f"{source} is of another architecture: it has no tensor {name!r}")
        if weights[name].shape != value.shape:
            raise CheckpointError(
                f"{source} is of another architecture: {name!r} is {tuple(weights[name].shape)}, the network's {tuple(value.shape)}"
            )
    unexpected = sorted(set(weights) - set(expected))
    if unexpected:
        raise CheckpointError(f"{source} is of another architecture: the network has no tensor {unexpected[0]!r}")
    network.load_state_dict(weights)
