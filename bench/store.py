"""Measured cells on disk: one JSON file each, written whole or not at all, so that a run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent
# the sources that can change a number; a solver's own code is covered by the hash of the plan it makes
_SOURCES = (
    *("samplers/execute.py", "samplers/program.py", "samplers/model.py", "samplers/noise.py", "samplers/adaptive.py"),
    *("bench/features.py", "bench/metrics.py", "bench/mixture.py", "bench/zoo.py", "bench/students.py"),
    "distill/network.py",
)


@lru_cache(maxsize=1)
def code_fingerprint() -> str:
    """First 16 hex digits of the SHA-256 of every source file that can change a measured number."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((_ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def key_of(identity: dict[str, Any]) -> str:
    """The file name of a cell: a hash of everything that makes it what it is."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """The finished cells of one results folder.

    Args:
        folder: the run's folder; cells are kept in `folder/cells`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "cells"

    def get(self, key: str) -> dict[str, Any] | None:
        """A finished cell, or None."""
        path = self.folder / f"{key}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def put(self, key: str, record: dict[str, Any]) -> None:
        """Save a finished cell; a kill at any moment leaves no half record."""
        write_text(self.folder / f"{key}.json", json.dumps(record, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file by new content in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    with new.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    new.replace(path)
