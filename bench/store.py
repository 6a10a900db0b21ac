"""Measured cells on disk: one JSON file each, written whole or not at all, so that a run goes on where it stopped."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from types import CodeType
from typing import Any

from bench.blocks import Blocks

_ROOT = Path(__file__).parent.parent
# The sources that can change a number. Solvers that make plans are covered by the hash of the plan; those that choose their
# steps as they go have none, so that the registry, which says how they are integrated, is among the sources.
_SOURCES = (
    *("samplers/execute.py", "samplers/program.py", "samplers/model.py", "samplers/noise.py", "samplers/compiled.py"),
    *("samplers/registry.py", "samplers/job.py", "samplers/sampling.py", "samplers/nodes.py", "samplers/transform.py"),
    *("samplers/adaptive.py", "samplers/adaptive_dpm.py", "samplers/solvers/exponential.py", "samplers/schedule.py"),
    *("samplers/solvers/first_order.py", "samplers/solvers/weights.py", "samplers/draft.py"),
    *("samplers/grid.py", "samplers/grid_points.py", "samplers/meter.py"),
    *("samplers/guidance/guided.py", "samplers/guidance/classifier_free.py", "samplers/guidance/conditions.py"),
    *("samplers/guidance/projected.py", "samplers/guidance/other_models.py", "samplers/guidance/threshold.py"),
    "samplers/guidance/wrapped.py",
    *("samplers/adapters/diffusers/models.py", "samplers/adapters/diffusers/networks.py"),
    *("samplers/adapters/diffusers/training.py", "samplers/adapters/diffusers/classes.py"),
    *("samplers/adapters/diffusers/keys.py", "samplers/adapters/latent.py", "samplers/adapters/weights.py"),
    *("samplers/adapters/variance.py", "samplers/adapters/edm.py"),
    *("distill/network.py", "distill/student.py", "distill/checkpoint.py"),
    *("bench/mixture.py", "bench/posterior.py", "bench/spectral.py", "bench/ideal.py", "bench/problems.py"),
    *("bench/mixture_file.py", "bench/network.py", "bench/pipelines.py", "bench/students.py", "bench/measure.py"),
    *("bench/features.py", "bench/extractors.py", "bench/reference.py", "bench/judge.py", "bench/moments.py"),
    *("bench/intervals.py", "bench/metrics.py", "bench/sample_metrics.py", "bench/solver_error.py", "bench/judging.py"),
    *("bench/zoo.py", "bench/meter.py", "bench/guidance.py", "bench/prompts.py", "bench/overlap.py", "bench/edm.py"),
    *("bench/blocks.py", "bench/data.py", "bench/workers.py", "bench/shipped.py"),
)
_OWN = ("bench", "samplers", "distill")  # packages
WORK = "work"  # what is not finished
_LOCK = ".lock"
_USED = 2**61  # added to a cell's byte, for the lock of those that read its samples


@lru_cache(maxsize=1)
def code_fingerprint() -> str:
    """First 16 hex digits of the SHA-256 of every source file that can change a measured number."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((_ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def plugin_fingerprint(function: Callable[..., Any]) -> str:
    """First 16 hex digits of the SHA-256 of the code behind a function that an installed package adds.

    Every Python file of its package counts, since any of them may change what the function returns; of a function that has no
    file, as one typed at a prompt, its own instructions.

    Args:
        function: or an object that is called like one.

    Returns:
        The digits; "" for a function of fewstep, which `code_fingerprint` covers.
    """
    while isinstance(function, partial):
        function = function.func
    package = getattr(function, "__module__", None) or type(function).__module__
    package = package.partition(".")[0]
    if package in _OWN:
        return ""
    return _package_fingerprint(package) or _code_fingerprint(getattr(function, "__code__", None))


@lru_cache
def _package_fingerprint(package: str) -> str:
    """Of the files of a package, or of a module that is in none; "" where it has no file."""
    module = sys.modules.get(package)
    folders = [Path(folder) for folder in getattr(module, "__path__", ())]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    files = files or [Path(file) for file in [getattr(module, "__file__", None)] if file]
    if not files:
        return ""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _code_fingerprint(code: CodeType | None) -> str:
    def parts(one: CodeType) -> list[Any]:
        inside = [parts(part) if isinstance(part, CodeType) else repr(part) for part in one.co_consts]
        return [one.co_code.hex(), one.co_names, inside]

    return hashlib.sha256(json.dumps(parts(code) if code else None).encode()).hexdigest()[:16]


def _byte(identity: dict[str, Any]) -> int:
    """Of the lock file, in [0, 2^60)."""
    return int(key_of(identity)[:15], 16)


def key_of(identity: dict[str, Any]) -> str:
    """The file name of a cell: a hash of everything that makes it what it is."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """The cells of one results folder.

    Args:
        folder: the run's folder; finished cells are kept in `folder/cells`, what is known of others in `folder/work`.
        tell: is called with a sentence about a file that cannot be used.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self.work, self.tell = folder / "cells", folder / WORK, tell
        self._handle: int | None = None

    def get(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The finished cell of this identity, or None; one that is damaged or of another identity is told of and left out."""
        path = self._path(identity)
        try:
            record = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (ValueError, UnicodeDecodeError) as error:
            self.tell(f"{path} cannot be read ({error}); the cell is measured again")
            return None
        different = [
            name for name, value in identity.items() if not isinstance(record, dict) or record.get(name) != value
        ]
        if different:
            self.tell(f"{path} is not the cell that its name says: {different[0]} differs; the cell is measured again")
            return None
        return record

    def put(self, identity: dict[str, Any], outcome: dict[str, Any]) -> dict[str, Any]:
        """Save a finished cell and return its record; a kill at any moment leaves no half record."""
        record = {**identity, **outcome}
        write_text(self._path(identity), json.dumps(record, indent=1, allow_nan=False) + "\n")
        return record

    def blocks(self, identity: dict[str, Any]) -> Blocks:
        """What is known of the samples of a cell that is not finished."""
        return Blocks(self.work / key_of(identity), self.tell)

    @contextmanager
    def claim(self, identity: dict[str, Any], wait: bool = False) -> Iterator[bool]:
        """Whether the cell is this process's until the block ends; False where another one measures it now.

        The claim is the kernel's lock on a byte of one file, which a process that is killed gives up.

        Args:
            identity: of the cell.
            wait: for the other process, so that the cell always is this one's.
        """
        mine = self._locks(fcntl.LOCK_EX, _byte(identity), wait)
        try:
            yield mine
        finally:
            if mine:
                self._locks(fcntl.LOCK_UN, _byte(identity))

    def use(self, identity: dict[str, Any]) -> None:
        """Keep every process from removing what is known of a cell's samples, for as long as this one lives."""
        self._locks(fcntl.LOCK_SH, _byte(identity) + _USED, wait=True)

    def remove(self, identity: dict[str, Any]) -> None:
        """Remove what is known of a cell's samples, unless another process uses it."""
        if self._locks(fcntl.LOCK_EX, _byte(identity) + _USED):
            self.blocks(identity).remove()
            self._locks(fcntl.LOCK_UN, _byte(identity) + _USED)

    def tidy(self) -> None:
        """Remove the folder of unfinished work where nothing is left in it."""
        with suppress(OSError):  # it is not empty, or another process was quicker
            self.work.rmdir()

    def _locks(self, kind: int, byte: int, wait: bool = False) -> bool:
        """Whether the lock could be had. A process has one handle of the file, for closing any would give up all locks."""
        if self._handle is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            weakref.finalize(self, os.close, self._handle)
        try:
            fcntl.lockf(self._handle, kind if wait or kind == fcntl.LOCK_UN else kind | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _path(self, identity: dict[str, Any]) -> Path:
        return self.folder / f"{key_of(identity)}.json"


def write_text(path: Path, text: str) -> None:
    """Replace a file by new content in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    with new.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    new.replace(path)
