"""Conditions of a network without, or with other ones, and several sets of them as one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Cond = Mapping[str, Any]


def check_null(name: str, null: Any) -> None:
    """Raise TypeError or ValueError where a null condition is no mapping with entries.

    Args:
        name: of the argument.
        null: what was given.
    """
    example = "such as {'class_labels': 10} or {'encoder_hidden_states': embedding_of_the_empty_prompt}"
    if not isinstance(null, Mapping):
        raise TypeError(f"{name} must be a dict of what replaces entries of cond, {example}, got {type(null).__name__}")
    if not null:
        raise ValueError(f"{name} must name at least one entry of cond, {example}, got {{}}")


def replaced(name: str, cond: Cond, null: Cond, x: Tensor) -> dict[str, Any]:
    """The conditions with some entries replaced.

    Args:
        name: of the argument that `null` came from, for messages.
        cond: of a call.
        null: what replaces its entries: a tensor with a row for each sample, with one row, or with none; a number, which fills
            a tensor like the entry's; None; or a mapping, which replaces entries of a mapping.
        x: the states (B, ...).

    Raises:
        ValueError: an entry that the call does not have, a tensor of another shape or on another device.
        TypeError: a value of another kind.
    """
    check_replaces(name, cond, null)
    changed = {key: _in_place_of(f"{name}[{key!r}]", cond[key], value, x) for key, value in null.items()}
    return {**cond, **changed}


def check_replaces(name: str, cond: Cond, null: Cond) -> None:
    """Raise ValueError for an entry that replaces nothing: a call without the condition has nothing to be guided by."""
    for key in null:
        if key not in cond:
            has = ", ".join(map(repr, cond)) or "none"
            raise ValueError(
                f"{name}[{key!r}] replaces a condition that the call does not have (it has: {has}); pass it as cond, such as "
                f"sample(..., cond={{{key!r}: ...}}), or guide a model that takes it"
            )


def _in_place_of(name: str, given: Any, value: Any, x: Tensor) -> Any:
    if isinstance(value, Mapping):
        if not isinstance(given, Mapping):
            raise TypeError(f"{name} is a dict, and the condition it replaces a {type(given).__name__}")
        return replaced(name, given, value, x)
    if isinstance(value, Tensor):
        return _tensor(name, given, value, x)
    if isinstance(value, (int, float)) and isinstance(given, Tensor):
        return torch.full_like(given, value)
    if value is None or isinstance(value, (int, float, str)):
        return value
    raise TypeError(f"{name} must be a tensor, a number, a text, None or a dict, got {type(value).__name__}")


def _tensor(name: str, given: Any, value: Tensor, x: Tensor) -> Tensor:
    """The tensor with a row for each sample."""
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, the states on {x.device}; move one of them")
    if not isinstance(given, Tensor):
        return value
    rows = value[None] if value.ndim == given.ndim - 1 else value
    if rows.ndim != given.ndim or (rows.ndim and len(rows) not in (1, len(x))):
        raise ValueError(
            f"{name} must have the shape of the condition it replaces, {tuple(given.shape)}, or of one row of it, got "
            f"{tuple(value.shape)}"
        )
    return rows.expand(len(x), *rows.shape[1:]).to(given.dtype) if rows.ndim else rows.to(given.dtype)


def joined(name: str, conds: Sequence[Cond], batch: int) -> dict[str, Any]:
    """Several conditions of the same entries as one, for a batch that holds the states once for each.

    Args:
        name: of the argument that made them differ, for messages.
        conds: with the same keys.
        batch: samples, B; a tensor with B rows is one that has a row for each.

    Raises:
        ValueError: entries that differ and are not tensors of one shape and device.
    """
    return {key: _joined(f"{name}[{key!r}]", [cond[key] for cond in conds], batch) for key in conds[0]}


def _joined(name: str, values: Sequence[Any], batch: int) -> Any:
    first = values[0]
    if all(isinstance(value, Mapping) for value in values):
        return joined(name, values, batch)
    if all(isinstance(value, (list, tuple)) and len(value) == len(first) for value in values):
        together = [_joined(f"{name}[{i}]", parts, batch) for i, parts in enumerate(zip(*values, strict=True))]
        return type(first)(together)
    same = all(value is first for value in values)
    if all(isinstance(value, Tensor) for value in values):
        if same and (not first.ndim or len(first) != batch):
            return first
        return _stacked(name, values, batch)
    if same or all(not isinstance(value, Tensor) and value == first for value in values):
        return first
    kinds = " and ".join(dict.fromkeys(type(value).__name__ for value in values))
    raise ValueError(f"{name}: {kinds} do not make one batch; give tensors, or batched=False for a call of each")


def _stacked(name: str, values: Sequence[Tensor], batch: int) -> Tensor:
    rows = [value.expand(batch, *value.shape[1:]) if value.ndim and len(value) == 1 else value for value in values]
    kinds = list(dict.fromkeys((tuple(value.shape[1:]), str(value.device)) for value in rows))
    if len(kinds) > 1 or not rows[0].ndim:
        told = " and ".join(f"{tuple(value.shape)} on {value.device}" for value in values)
        raise ValueError(f"{name}: tensors {told} do not make one batch; pad or move one, or give batched=False")
    return torch.cat(rows)
