"""What is known of each sample of a cell while it is measured, in blocks on disk: a kill loses the batch in flight."""

from __future__ import annotations

import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_SUFFIX = ".npz"
_TOTALS = "totals"
_KEPT = 1 << 25  # bytes of blocks that are also kept in memory
_DAMAGE = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError)


class Blocks:
    """Arrays with a row for each sample, kept in files that each hold the samples start .. stop - 1.

    Several processes may write blocks of one cell, as long as no two write the same sample. Samples may come in any order and
    in blocks of any size, so that a batch may be halved on the way. The first 32 MiB that an object of this class writes it also
    keeps in memory, so that what a small cell is judged by is not read back; the files are the same.

    Args:
        folder: of the cell; made when the first block is written.
        tell: is called with a sentence about a block that cannot be read, which is then measured again.

    Attributes:
        added: totals of the blocks that this object wrote.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self.tell = folder, tell
        self.added: dict[str, float] = {}
        self._kept: dict[Path, dict[str, np.ndarray]] = {}
        self._room = _KEPT

    def put(self, batch: range, rows: Mapping[str, np.ndarray], totals: Mapping[str, float] | None = None) -> None:
        """Save what is known of some samples; whole or not at all.

        Args:
            batch: the samples' numbers.
            rows: arrays with a row for each of them; one of which only the first samples are wanted may have fewer.
            totals: numbers that are summed over blocks, such as seconds.
        """
        path = self.folder / f"{batch.start:09d}-{batch.stop:09d}{_SUFFIX}"
        self.folder.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{os.getpid()}.new")
        arrays = {name: np.asarray(values) for name, values in rows.items()}
        if totals:  # as one array, since each takes as long to write as the samples of a small batch
            arrays[_TOTALS] = np.array(tuple(totals.values()), dtype=[(name, np.float64) for name in totals])
        with new.open("wb") as handle:
            np.savez(handle, **arrays)  # type: ignore[arg-type]
            handle.flush()
            os.fsync(handle.fileno())
        new.replace(path)
        for name, value in (totals or {}).items():
            self.added[name] = self.added.get(name, 0.0) + value
        size = sum(values.nbytes for values in arrays.values())
        if size <= self._room:
            self._room -= size
            self._kept[path] = {name: values.copy() for name, values in arrays.items()}

    def check(self) -> None:
        """Remove the blocks that cannot be read (zip files carry check sums) or hold what another one holds, telling of each."""
        end = 0
        for path in self._paths():
            start, stop = _ends(path)
            if start < end:
                self.tell(
                    f"{path} holds samples that another file holds too; those that it alone held are measured again"
                )
                path.unlink()
                continue
            end = stop
            try:
                with _opened(path) as file:
                    for name in file.files:
                        file[name]
            except _DAMAGE as error:
                self.tell(f"{path} cannot be read ({error}); its samples are measured again")
                path.unlink(missing_ok=True)

    def missing(self, total: int, size: int) -> list[range]:
        """The samples of 0 .. total - 1 that no block holds, in ranges of at most `size` that begin where batches would.

        The batches are the same whatever was measured before, so that a resumed cell calls the network with the batches of
        an uninterrupted one.
        """
        have = np.zeros(total, dtype=bool)
        for path in self._paths():
            start, stop = _ends(path)
            have[start:stop] = True
        ranges = []
        for start in range(0, total, size):
            stop = min(start + size, total)
            holes = np.flatnonzero(np.diff(np.concatenate([[True], have[start:stop], [True]]).astype(np.int8)))
            ranges += [range(start + int(a), start + int(b)) for a, b in zip(holes[::2], holes[1::2], strict=True)]
        return ranges

    def rows(self, name: str) -> Rows:
        """One array of all samples, read from the files as it is needed."""
        return Rows(self._paths(), name, self._read)

    def total(self, name: str) -> float:
        """The sum of a number over the blocks."""
        return float(np.sum([self._read(path, _TOTALS)[name] for path in self._paths()]))

    def remove(self) -> None:
        """Delete all blocks."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._kept.clear()

    def _read(self, path: Path, name: str) -> np.ndarray:
        """One array of a block."""
        if path in self._kept:
            return self._kept[path][name]
        with _opened(path) as file:
            array: np.ndarray = file[name]
            return array

    def _paths(self) -> list[Path]:
        names = os.listdir(self.folder) if self.folder.is_dir() else ()  # asked ten times a cell, and `glob` is slow
        return [self.folder / name for name in sorted(names) if name.endswith(_SUFFIX) and not name.startswith(".")]


class Rows:
    """An array (N, ...) in blocks on disk: has `shape`, `dtype`, `len` and slices, each read when it is asked for.

    Args:
        paths: of the blocks in order.
        name: of the array.
        read: an array of a block by path and name.

    Raises:
        ValueError: there are no blocks, or samples are missing between them.
    """

    def __init__(self, paths: list[Path], name: str, read: Callable[[Path, str], np.ndarray]) -> None:
        ends = [_ends(path) for path in paths]
        starts = [start for start, _ in ends]
        if not paths or starts != [0, *(stop for _, stop in ends[:-1])]:
            raise ValueError(f"blocks must hold all samples from 0 on, got {[path.name for path in paths]}")
        self.name, self._blocks, self._read = name, list(zip(ends, paths, strict=True)), read
        self._kept: tuple[Path, np.ndarray] | None = None
        first = self._block(paths[0])
        self.shape, self.dtype = (ends[-1][1], *first.shape[1:]), first.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, step = rows.indices(len(self))
        parts = [
            self._block(path)[max(start - a, 0) : stop - a] for (a, b), path in self._blocks if a < stop and b > start
        ]
        return np.concatenate(parts)[::step] if parts else np.empty((0, *self.shape[1:]), self.dtype)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def _block(self, path: Path) -> np.ndarray:
        if self._kept is None or self._kept[0] != path:
            self._kept = (path, self._read(path, self.name))
        return self._kept[1]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The arrays of a file, which is closed whatever is wrong with it."""
    with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
        yield file


def _ends(path: Path) -> tuple[int, int]:
    start, stop = path.name.removesuffix(_SUFFIX).split("-")
    return int(start), int(stop)
