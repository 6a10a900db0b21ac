"""The pictures of a cell: of its first samples, and of the way to some of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bench.cells import Cell
from bench.judging import Arrays
from bench.measure import SHOWN, film, shown
from bench.plots import key_in, save_film, save_samples


def save_pictures(cell: Cell, arrays: Arrays, folder: Path, key: str) -> None:
    """Write what a cell shows under its label and budget, which another cell may have had before.

    Args:
        cell: that was sampled.
        arrays: of it, as `bench.measure.sampled` gives them.
        folder: of pictures.
        key: of the cell.
    """
    path = folder / cell.file_name
    save_samples(shown(cell, arrays), path, images=cell.model.images, key=key)
    if cell.model.images and arrays["film"].shape[1]:
        save_film(film(arrays), path.with_name(f"{path.stem}-path.png"), key)


def are_there(cell: Cell, folder: Path, key: str) -> bool:
    """Whether the picture under the label and budget of a cell is that of the cell of this key."""
    return key_in(folder / cell.file_name) == key


def of_first_samples(cell: Cell) -> Cell:
    """The cell of what a picture shows, compared with nothing."""
    return replace(cell, num_samples=min(SHOWN, cell.num_samples), metrics=(), solution="")
