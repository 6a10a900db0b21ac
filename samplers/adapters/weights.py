"""Weights from files into a module, without ever running code that a file holds."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samplers.errors import unknown

_TENSORS_ONLY = (".pt", ".pth", ".ckpt", ".bin")
_PICKLES = (".pkl", ".pickle")
_CONVERT = """\
import pickle, safetensors.torch                     # in a clone of the repository that wrote the file, whose code it runs
with open({path!r}, "rb") as f:
    net = pickle.load(f)["ema"]                      # EDM and EDM2 keep the network under "ema"
safetensors.torch.save_file({{k: v.contiguous() for k, v in net.state_dict().items()}}, {target!r})
print(net.init_args, net.init_kwargs)                # what to build the module with"""


def load_weights(module: nn.Module, path: str | Path, *, key: str | None = None, prefix: str = "") -> nn.Module:
    """Fill a module with the weights in a file.

    Args:
        module: of the architecture that the weights belong to; changed in place.
        path: a `.safetensors` file, or a `.pt`, `.pth`, `.ckpt` or `.bin` of `torch.save` that holds tensors alone, as
            `torch.save(module.state_dict(), path)` writes and guided-diffusion publishes.
        key: of the state_dict, where the file holds several, such as "state_dict" or "ema".
        prefix: of the names in the file that belong to the module, which are taken without it, such as "module.".

    Returns:
        The module.

    Raises:
        TypeError: not a module.
        FileNotFoundError: no such file.
        ValueError: a `.pkl`, or a file that holds anything but tensors, neither of which is read because unpickling runs the
            code that a file names; or weights of another module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    path = Path(path)
    weights = _chosen(_read(path), path, key)
    mine = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    _check(module, mine, weights, path, prefix)
    module.load_state_dict(mine)
    return module


def _read(path: Path) -> dict[str, Any]:
    if path.suffix in _PICKLES:
        target = str(path.with_suffix(".safetensors"))
        raise ValueError(
            f"path {path} is a pickle: to read one is to run whatever code its author put into it, so no pickle is read here. "
            f"If you trust the file, convert it once:\n\n{_CONVERT.format(path=str(path), target=target)}\n\n"
            f"and then load_weights(module, {target!r})"
        )
    if path.suffix not in (".safetensors", *_TENSORS_ONLY):
        raise unknown("kind of file in path", path.suffix or path.name, (".safetensors", *_TENSORS_ONLY))
    if not path.is_file():
        raise FileNotFoundError(f"path {path}: there is no such file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"path {path} is not a safetensors file: {error}") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, AttributeError) as error:
        # of a pickle torch's text is advice to read it anyway
        lines = [] if isinstance(error, pickle.UnpicklingError) else str(error).splitlines()
        why = (lines or [type(error).__name__])[0]
        raise ValueError(
            f"path {path} is not a file of tensors alone, and nothing else is read because that would run code from it "
            f"({why}): where it comes from, write torch.save(module.state_dict(), ...) or a safetensors file"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"path {path} must hold a dictionary of tensors, got {type(found).__name__}")
    return found


def _chosen(found: dict[str, Any], path: Path, key: str | None) -> dict[str, Tensor]:
    """The state_dict in what a file holds."""
    inside = {name: value for name, value in found.items() if isinstance(value, dict) and _all_tensors(value)}
    if key is not None:
        if key not in inside:
            raise unknown(f"key in {path}", key, inside)
        return inside[key]
    if found and _all_tensors(found):
        return found
    if len(inside) == 1:
        return next(iter(inside.values()))
    raise ValueError(f"key must say which of {', '.join(sorted(inside)) or 'nothing'} in {path} is the network's")


def _all_tensors(values: dict[str, Any]) -> bool:
    return bool(values) and all(isinstance(value, Tensor) for value in values.values())


def _check(module: nn.Module, mine: dict[str, Tensor], weights: dict[str, Tensor], path: Path, prefix: str) -> None:
    """Raise ValueError where the weights are not the module's, with the likely reason."""
    own = module.state_dict()
    missing, over = sorted(set(own) - set(mine)), sorted(set(mine) - set(own))
    if missing or over:
        ends = [name for name in weights if missing and name != missing[0] and name.endswith("." + missing[0])]
        hint = f"; try prefix={ends[0].removesuffix(missing[0])!r}" if ends else ""
        what = (
            f"lacks {missing[0]!r} and {len(missing) - 1} others" if missing else f"has {over[0]!r}, which it has not"
        )
        raise ValueError(f"path {path} is of another network than {type(module).__name__}: it {what}{hint}")
    wrong = [name for name, value in own.items() if value.shape != mine[name].shape]
    if wrong:
        shapes = tuple(mine[wrong[0]].shape), tuple(own[wrong[0]].shape)
        raise ValueError(
            f"path {path}: {wrong[0]} has shape {shapes[0]}, module {type(module).__name__} needs {shapes[1]}"
        )
