"""What installed packages add to a registry, as entry points of a group."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

_Kind = TypeVar("_Kind")


def _loaded(point: EntryPoint, group: str) -> Any:
    """What an entry point names; None, and a warning, where its package cannot be imported: others work all the same."""
    try:
        return point.load()
    except Exception as error:  # whatever the package's code does
        package = point.dist.name if point.dist is not None else point.module
        warnings.warn(
            f"entry point {point.name!r} of {group}, from package {package}, cannot be loaded and is left out: "
            f"{type(error).__name__}: {error}",
            stacklevel=3,
        )
        return None


def with_plugins(group: str, kind: type[_Kind], own: Mapping[str, _Kind]) -> dict[str, _Kind]:
    """A registry with what packages add to it.

    Args:
        group: of entry points, each of which loads an object with a `name`.
        kind: what the objects must be.
        own: by name; no package may take one of these names.

    Raises:
        TypeError: an object of another kind.
        ValueError: a name that is taken.
    """
    known = dict(own)
    for point in entry_points(group=group):
        added = _loaded(point, group)
        if added is None:
            continue
        if not isinstance(added, kind):
            raise TypeError(
                f"entry point {point.name!r} of {group} must be a {kind.__name__}, got {type(added).__name__}"
            )
        name = str(added.name)  # type: ignore[attr-defined]
        if name in known:
            raise ValueError(f"entry point {point.name!r} of {group}: the name {name!r} is taken")
        known[name] = added
    return known
