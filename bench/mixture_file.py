"""Mixtures on disk: a folder with the parameters as safetensors and everything else as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.mixture import GaussianMixture
from bench.spectral import SpectralMixture
from distill.checkpoint import CheckpointError, content_hash, read_json, read_tensors, write_folder

FORMAT = 1
Mixture = GaussianMixture | SpectralMixture
_NAME, _CONFIG = "mixture", "config"
_BASIS = "basis"  # nearly all of the numbers
_HALVED = {_BASIS: torch.float16}
_OTHERS = {torch.float64: torch.float32, torch.int64: torch.int32}
_INSIDE = ("weights", "means", "residual", "basis", "variances")
_AROUND = ("centre", "order", "outside")


@dataclass(frozen=True)
class MixtureFile:
    """What a folder holds.

    Attributes:
        mixture: the model.
        hash: of the stored numbers, the same on every machine.
        info: free JSON-ready description, such as the data that it was fitted to.
    """

    mixture: Mixture
    hash: str
    info: dict[str, Any]


def save_mixture(folder: str | Path, mixture: Mixture, info: dict[str, Any], half: bool = False) -> str:
    """Save as `folder/mixture.safetensors` and `folder/config.json`, whole or not at all.

    Args:
        folder: made with its parents, or replaced.
        mixture: what to save.
        info: JSON-ready.
        half: keep the bases in half precision, and the other numbers in single; otherwise all are as they were. What
            is loaded is a mixture a little beside the one that was saved, and as exact.

    Returns:
        The content hash.

    Raises:
        ValueError: `info` holds NaN or Inf, or a number is too large for half precision.
        distill.checkpoint.CheckpointError: the folder cannot be written.
    """
    tensors = _tensors(mixture)
    if half:
        tensors = {name: value.to(_HALVED.get(name, _OTHERS[value.dtype])) for name, value in tensors.items()}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} has numbers too large for {value.dtype}; nothing was saved")
    digest = content_hash(tensors)
    config = {"format": FORMAT, "kind": type(mixture).__name__, "shape": mixture.shape, "hash": digest, "info": info}
    write_folder(Path(folder), {_NAME: tensors}, {_CONFIG: config})
    return digest


def load_mixture(folder: str | Path) -> MixtureFile:
    """Load a folder that `save_mixture` wrote.

    Raises:
        distill.checkpoint.CheckpointError: a file is missing, truncated or damaged, has another format or other numbers than
            were saved, or the numbers are no mixture.
    """
    file = Path(folder) / f"{_CONFIG}.json"
    config = read_json(file)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"{file}: format must be {FORMAT}, got {found!r}")
    numbers = Path(folder) / f"{_NAME}.safetensors"
    tensors = read_tensors(numbers)
    try:
        kind, shape, saved, info = (config[key] for key in ("kind", "shape", "hash", "info"))
        if (digest := content_hash(tensors)) != saved:
            raise ValueError(
                f"the numbers have the hash {digest}, {file.name} says {saved}; one of the two was changed"
            )
        return MixtureFile(_mixture(kind, tuple(shape), tensors), digest, info)
    except KeyError as error:
        raise CheckpointError(f"{numbers} or {file.name}: {error} is missing") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{numbers} is not a usable mixture: {error}") from error


def _tensors(mixture: Mixture) -> dict[str, Tensor]:
    inside = mixture.inside if isinstance(mixture, SpectralMixture) else mixture
    named = {name: getattr(inside, name) for name in _INSIDE}
    if isinstance(mixture, SpectralMixture):
        named |= {name: getattr(mixture, name) for name in _AROUND}
    return {name: value for name, value in named.items() if value is not None}


def _mixture(kind: str, shape: tuple[int, ...], tensors: dict[str, Tensor]) -> Mixture:
    """The mixture of stored numbers."""
    kinds = (GaussianMixture.__name__, SpectralMixture.__name__)
    if kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)}, got {kind!r}")
    inner = {name: tensors[name].double() for name in _INSIDE if name in tensors}
    if _BASIS in tensors and tensors[_BASIS].dtype == torch.float16:
        inner[_BASIS] = _orthonormal(inner[_BASIS])
    inside = GaussianMixture(
        inner["weights"], inner["means"], inner["residual"], inner.get(_BASIS), inner.get("variances")
    )
    if kind == GaussianMixture.__name__:
        if inside.shape != shape:
            raise ValueError(f"means are of shape {inside.shape}, the configuration says {shape}")
        return inside
    return SpectralMixture(inside, tensors["centre"].view(shape), tensors["order"], tensors["outside"])


def _orthonormal(columns: Tensor) -> Tensor:
    """The nearest matrices (..., n, m) with orthonormal columns, where those given are so to the rounding of half precision.

    Newton and Schulz' iteration for the polar factor (Higham 2008, Functions of Matrices, section 8.3): the error e of
    `Q^T Q` becomes 3/4 e^2, so that 1e-3 is beyond float64 after three steps. It has no pivots or signs to choose, and gives
    the same numbers to rounding on every machine.
    """
    for _ in range(4):
        columns = 1.5 * columns - 0.5 * columns @ (columns.mT @ columns)
    return columns
