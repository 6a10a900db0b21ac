"""What installed packages add to a registry, as entry points of a group."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

_Kind = TypeVar("_Kind")


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
        added: Any = point.load()
        if not isinstance(added, kind):
            raise TypeError(
                f"entry point {point.name!r} of {group} must be a {kind.__name__}, got {type(added).__name__}"
            )
        name = str(added.name)  # type: ignore[attr-defined]
        if name in known:
            raise ValueError(f"entry point {point.name!r} of {group}: the name {name!r} is taken")
        known[name] = added
    return known
