"""Checkpoints: tensors as safetensors, everything else as JSON, each folder complete or absent. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.network import PatchUNet
from samplers import schedule as schedules
from samplers.errors import unknown
from samplers.model import PREDICTIONS
from samplers.plan import Plan

FORMAT = 1
PART_BYTES = 15_000_000  # of a file of tensors, which some hosts and tools do not take much larger
_PARTS = "parts"
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_PICKLES = {".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin"}
NETWORKS: dict[str, type[PatchUNet]] = {"PatchUNet": PatchUNet}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


# folders that are complete or absent ---------------------------------------------------------------------------------


def write_folder(folder: Path, tensors: dict[str, dict[str, Tensor]], documents: dict[str, Any]) -> None:
    """Write a folder so that a kill or a power cut at any moment leaves the old one or the new one, never a mixture.

    Between two renames neither bears the name `folder`; `recover_folder` and `load_checkpoint` then find the old one.

    Args:
        folder: replaced as a whole if it exists.
        tensors: {name: {key: tensor}}, each written as `name.safetensors`, and what is beyond 15 MB in it as
            `name.part2.safetensors` and so on.
        documents: {name: JSON-ready object}, each written as `name.json`.

    Raises:
        CheckpointError: the files cannot be written (a full disk, say); `folder` is untouched.
        ValueError: a document holds NaN or Inf; `folder` is untouched.
    """
    new, old = folder.with_name(folder.name + ".new"), _previous(folder)
    try:
        recover_folder(folder)
        shutil.rmtree(new, ignore_errors=True)
        _fill(new, tensors, documents)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        recover_folder(folder)
        raise CheckpointError(f"{folder} cannot be written: {error}; what was there before is whole") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _fill(folder: Path, tensors: dict[str, dict[str, Tensor]], documents: dict[str, Any]) -> None:
    """Write a new folder's files, onto the disk."""
    folder.mkdir(parents=True)
    for name, content in tensors.items():
        on_cpu = {key: value.detach().cpu().contiguous() for key, value in content.items()}
        parts = _parts(on_cpu)
        for number, part in enumerate(parts, 1):
            file = _part_file(folder / f"{name}.safetensors", number)
            file.touch()
            mode = file.stat().st_mode  # that of any new file here: save_file's own lets nobody else read it
            save_file(part, file, {_PARTS: str(len(parts))})
            file.chmod(mode)
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    for path in (*folder.iterdir(), folder):
        _sync(path)


def _parts(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Tensors in parts of at most `PART_BYTES`, or of one tensor that is larger; one part where there are none."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in tensors.items():
        if parts[-1] and size + value.nbytes > PART_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = value
        size += value.nbytes
    return parts


def _part_file(file: Path, number: int) -> Path:
    return file if number == 1 else file.with_name(f"{file.stem}.part{number}{file.suffix}")


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        CheckpointError: it cannot be written (a full disk, say); `file` is as it was.
    """
    new = file.with_name(file.name + ".new")
    try:
        new.write_text(text)
        new.replace(file)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise CheckpointError(f"{file} cannot be written: {error}; what was there before is whole") from error


def recover_folder(folder: Path) -> Path:
    """Finish a `write_folder` that was killed between its renames: the old folder gets its name back.

    For the process that writes `folder`; a reader that renamed could get between the renames of a live writer.
    """
    if not folder.exists() and _previous(folder).exists():
        _previous(folder).rename(folder)
    return folder


def _previous(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, onto the disk."""
    if os.name != "posix":  # other systems do not open a folder, nor sync what is open for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# files ---------------------------------------------------------------------------------------------------------------


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, and of the further parts that it says it has, on the CPU.

    Raises:
        CheckpointError: a file is absent, truncated, a pickle, or not safetensors.
    """
    tensors, parts = _read_part(file)
    for number in range(2, parts + 1):
        tensors |= _read_part(_part_file(file, number))[0]
    return tensors


def _read_part(file: Path) -> tuple[dict[str, Tensor], int]:
    """The tensors of one file, and the number of files there are."""
    refuse_pickle(file)
    if not file.is_file():
        raise CheckpointError(f"checkpoint file {file} does not exist")
    try:
        with safe_open(file, framework="pt") as opened:
            parts = int((opened.metadata() or {}).get(_PARTS, "1"))
        return load_file(file), parts
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"checkpoint file {file} is truncated or not safetensors: {error}") from error


def read_json(file: Path) -> Any:
    """A JSON document.

    Raises:
        CheckpointError: the file is absent or not JSON.
    """
    if not file.is_file():
        raise CheckpointError(f"checkpoint file {file} does not exist")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"checkpoint file {file} is not JSON: {error}") from error


def refuse_pickle(path: Path) -> None:
    """Raise CheckpointError for a file whose name is that of a pickle."""
    if path.suffix.lower() in _PICKLES:
        raise CheckpointError(
            f"checkpoint {path} is a pickle, which can run code when it is read; give a folder with {_WEIGHTS}; "
            "see docs/models.md, EDM and EDM2, for how to convert it"
        )


def content_hash(arrays: Mapping[str, np.ndarray | Tensor]) -> str:
    """First 16 hex digits of the SHA-256 of names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        value = arrays[name]
        value = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        # A fixed byte order makes the hash the same on every machine.
        little = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
        digest.update(f"{name} {value.dtype.name} {value.shape}\n".encode())
        digest.update(little.tobytes())
    return digest.hexdigest()[:16]


# checkpoints ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and what it takes to sample from it.

    Attributes:
        network: in evaluation mode, fp32.
        schedule: the noise schedule it was trained on.
        predicts: what it outputs, as in `EpsModel`.
        info: free JSON-ready description: training images, settings, loss.
        plans: for a student, the plan it samples with at each number of network calls that it was trained for; without
            plans it is a model for any sampler.
    """

    network: PatchUNet
    schedule: schedules.Schedule
    predicts: str
    info: dict[str, Any]
    plans: dict[int, Plan] = field(default_factory=dict)


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
    """Save as `folder/model.safetensors`, `folder/config.json` and a student's `folder/plan-<calls>.json`, atomically.

    Args:
        folder: made with its parents, or replaced.
        checkpoint: what to save.
        dtype: of the saved weights; torch.float16 halves the file, and `load_checkpoint` returns fp32 again.

    Raises:
        ValueError: `dtype` is not a floating type, or the weights hold NaN, Inf or values too large for it.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating type such as torch.float16, got {dtype}")
    config = {
        "format": FORMAT,
        "network": {"class": type(checkpoint.network).__name__, **checkpoint.network.arguments},
        "schedule": checkpoint.schedule.config(),
        "predicts": checkpoint.predicts,
        "info": checkpoint.info,
        "calls": sorted(checkpoint.plans),
    }
    plans = {_plan_name(calls): json.loads(plan.to_json()) for calls, plan in checkpoint.plans.items()}
    state = checkpoint.network.state_dict()
    weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"weight {name!r} is NaN, Inf, or too large for {dtype}; nothing was saved")
    write_folder(Path(folder), {"model": weights}, {"config": config, **plans})


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Load a folder that `save_checkpoint` wrote; the network is on the CPU, in fp32 and evaluation mode.

    Raises:
        CheckpointError: a missing, truncated or pickled file, an unknown format, a network, schedule or prediction that
            does not exist, or weights of another architecture.
    """
    folder = _readable(Path(folder))
    for inside in ("model", "students"):
        if not (folder / _CONFIG).exists() and (folder / inside).is_dir():
            raise CheckpointError(
                f"{folder} is the folder of a training run; give a checkpoint in it, such as {folder / 'model'}"
            )
    config = read_json(folder / _CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"{folder / _CONFIG}: format must be {FORMAT}, got {found!r}")
    try:
        network = build_network(config["network"])
        schedule = schedules.from_config(config["schedule"])
        predicts, info = config["predicts"], config.get("info", {})
        files = {int(calls): folder / f"{_plan_name(int(calls))}.json" for calls in config.get("calls", [])}
        if predicts not in PREDICTIONS:
            raise unknown("predicts", predicts, PREDICTIONS)
    except KeyError as error:
        raise CheckpointError(f"{folder / _CONFIG}: the key {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / _CONFIG}: {error}") from error
    load_weights(network, read_tensors(folder / _WEIGHTS), folder / _WEIGHTS)
    return Checkpoint(network.eval(), schedule, predicts, info, {n: _read_plan(file) for n, file in files.items()})


def _plan_name(calls: int) -> str:
    return f"plan-{calls}"


def _read_plan(file: Path) -> Plan:
    try:
        return Plan.from_json(json.dumps(read_json(file)))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is not a plan: {error}") from error


def _readable(folder: Path) -> Path:
    """The folder to read, or the one that a killed `write_folder` left in its place."""
    refuse_pickle(folder)
    if folder.is_file():
        raise CheckpointError(f"checkpoint {folder} is a file; give the folder that holds {_WEIGHTS} and {_CONFIG}")
    if not folder.exists() and _previous(folder).exists():
        return _previous(folder)
    if folder.is_dir() and not (folder / _WEIGHTS).exists():
        for file in sorted(folder.iterdir()):
            refuse_pickle(file)
    return folder


def check_network(config: dict[str, Any]) -> None:
    """Check the names in `{"class": name, **arguments}`, without building the network.

    Raises:
        ValueError: not a dictionary, or a class or an argument that does not exist; the message offers the closest names.
    """
    if not isinstance(config, dict):
        raise ValueError(f"network must be a dictionary with a class and its arguments, got {config!r}")
    name = config.get("class")
    if name not in NETWORKS:
        raise unknown("network class", name, NETWORKS)
    accepted = inspect.signature(NETWORKS[name]).parameters
    for argument in config:
        if argument != "class" and argument not in accepted:
            raise unknown(f"argument of network {name}", argument, accepted)


def build_network(config: dict[str, Any]) -> PatchUNet:
    """The network that `{"class": name, **arguments}` describes, with fresh weights from torch's global generator.

    Raises:
        ValueError: a class or an argument that does not exist, or arguments that do not fit each other.
    """
    check_network(config)
    return NETWORKS[config["class"]](**{name: value for name, value in config.items() if name != "class"})


def load_weights(network: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Copy weights, of any floating type, into a network that they must fit exactly.

    Raises:
        CheckpointError: names or shapes differ from the network's; the network is untouched.
    """
    expected = network.state_dict()
    wrong = f"{source} is of another architecture"
    for name, value in expected.items():
        if name not in weights:
            raise CheckpointError(f"{wrong}: it has no tensor {name!r}")
        if weights[name].shape != value.shape:
            found, needed = tuple(weights[name].shape), tuple(value.shape)
            raise CheckpointError(f"{wrong}: {name!r} is {found}, the network's {needed}")
        if weights[name].is_floating_point() != value.is_floating_point():
            raise CheckpointError(f"{wrong}: {name!r} is {weights[name].dtype}, the network's {value.dtype}")
    unexpected = sorted(set(weights) - set(expected))
    if unexpected:
        raise CheckpointError(f"{wrong}: the network has no tensor {unexpected[0]!r}")
    network.load_state_dict(weights)
