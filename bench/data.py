"""Image data sets: Parquet in the Hugging Face layout, an image folder, a zip of images (EDM layout), or an `.npz`."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_KINDS = "a .parquet file, a folder of images, a .zip of images, or an .npz"
# what Pillow raises on damaged files of the formats above, and zipfile and NumPy on damaged archives
_BAD_IMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_BAD_ARCHIVE = (OSError, ValueError, RuntimeError, EOFError, zlib.error, zipfile.BadZipFile)


class DataError(ValueError):
    """A data set that cannot be read; the message names the file and what is accepted."""


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set in memory.

    Attributes:
        images: (N, C, H, W) uint8, N at least 1, C = 1 (grey) or 3 (RGB), values 0 .. 255.
        labels: (N,) int64, or None where the source has none.

    Raises:
        DataError: arrays of another shape or type.
    """

    images: np.ndarray
    labels: np.ndarray | None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8 or self.images.shape[1] not in (1, 3):
            raise DataError(f"images must be (N, 1 or 3, H, W) uint8, got {self.images.shape} {self.images.dtype}")
        if not self.images.size:
            raise DataError(f"the data set holds no images: their array has shape {self.images.shape}")
        labels = self.labels
        if labels is not None and (labels.shape != (len(self),) or labels.dtype != np.int64):
            raise DataError(f"labels must be ({len(self)},) int64 like the images, got {labels.shape} {labels.dtype}")

    def __len__(self) -> int:
        return len(self.images)


def load_images(path: str | Path, limit: int | None = None) -> ImageData:
    """Read a data set, or the first `limit` images of it; a folder and a zip are read in the order of their names.

    Args:
        path: one of
            `.parquet` with a column `image` (encoded bytes, or a struct with `bytes`) and optionally `label`;
            a folder or `.zip` of images, labelled by the `dataset.json` at its root (EDM layout) or else by sub-folder
            (classes numbered in the order of their names; none where there are fewer than two); or
            `.npz` with `images` (or `arr_0`) as (N, H, W), (N, H, W, C) or (N, C, H, W) uint8 and optionally `labels`
            (or `arr_1`) as (N,) whole numbers.
        limit: at least 1, or None for all.

    Raises:
        FileNotFoundError: nothing at `path`.
        DataError: another kind of file, a damaged one, images of unequal sizes or none, labels missing or not whole.
        ValueError: `limit` below 1.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None for all images, got {limit}")
    if not path.exists():
        raise FileNotFoundError(f"data {str(path)!r} does not exist; give {_KINDS}")
    if path.is_dir():
        return _read_folder(path, limit)
    readers: dict[str, Callable[[Path, int | None], ImageData]] = {
        ".parquet": _read_parquet,
        ".zip": _read_zip,
        ".npz": _read_npz,
    }
    if path.suffix.lower() not in readers:
        raise DataError(f"data {str(path)!r} is not a kind this reads; give {_KINDS}")
    return readers[path.suffix.lower()](path, limit)


def decode(encoded: bytes, source: str) -> np.ndarray:
    """An encoded image as (C, H, W) uint8: one channel where it is stored as grey, three otherwise.

    Transparency is dropped and 16-bit grey is reduced to its high byte.

    Raises:
        DataError: not an image, a damaged one, or one with floating-point pixels; the message starts with `source`.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            pixels = _to_uint8(image)
    except _BAD_IMAGE as error:
        raise DataError(f"{source} is not a readable image: {error}") from error
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _to_uint8(image: Image.Image) -> np.ndarray:
    """Pixels (H, W) or (H, W, 3). Pillow's own conversion clips 16-bit grey at 255 instead of scaling it."""
    if image.mode in ("1", "L", "LA", "La"):
        return np.asarray(image.convert("L"))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; 8 or 16 bits a channel are accepted")
    if not image.mode.startswith("I"):
        return np.asarray(image.convert("RGB"))
    wide = np.asarray(image)
    if wide.min() < 0 or wide.max() > 0xFFFF:
        raise ValueError(f"its pixels lie in {wide.min()} .. {wide.max()}; 8 or 16 bits a channel are accepted")
    return (wide >> 8).astype(np.uint8)


def _stack(encoded: Iterable[tuple[str, bytes]], labels: np.ndarray | None, path: Path) -> ImageData:
    images: list[np.ndarray] = []
    for source, content in encoded:
        images.append(decode(content, source))
        if images[-1].shape != images[0].shape:
            raise DataError(
                f"{source} has shape {images[-1].shape}, the images before it {images[0].shape}; all must agree"
            )
    if not images:
        raise DataError(f"{path} holds no images")
    return ImageData(np.stack(images), labels)


def _whole_numbers(labels: Iterable[Any], path: Path) -> np.ndarray:
    """Labels as (N,) int64, refused where one is missing, not whole, or not a single number."""
    whole: list[int] = []
    for label in labels:
        if isinstance(label, float | np.floating) and float(label).is_integer():
            label = int(label)
        if not isinstance(label, int | np.integer):
            raise DataError(f"{path}: the label of every image must be one whole number, got {label!r}")
        whole.append(int(label))
    return np.asarray(whole, dtype=np.int64)


def _read_parquet(path: Path, limit: int | None) -> ImageData:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            table = file.read([name for name in ("image", "label") if name in names]).slice(0, limit)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error
    if "image" not in names:
        raise DataError(f"{path} has no column 'image' (columns: {names})")
    encoded: list[tuple[str, bytes]] = []
    for row, content in enumerate(table["image"].to_pylist()):
        source, content = f"{path} row {row}", content.get("bytes") if isinstance(content, dict) else content
        if not isinstance(content, bytes):
            kind = type(content).__name__
            raise DataError(f"{source}: 'image' must be encoded bytes, or a struct with 'bytes', got {kind}")
        encoded.append((source, content))
    return _stack(encoded, _whole_numbers(table["label"].to_pylist(), path) if "label" in names else None, path)


def _read_folder(path: Path, limit: int | None) -> ImageData:
    names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    index = path / "dataset.json"
    listed = index.read_bytes() if index.exists() else None
    return _read_names(path, names, lambda name: (path / name).read_bytes(), listed, limit)


def _read_zip(path: Path, limit: int | None) -> ImageData:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            index = archive.read("dataset.json") if "dataset.json" in names else None
            return _read_names(path, names, archive.read, index, limit)
    except DataError:
        raise
    except _BAD_ARCHIVE as error:
        raise DataError(f"{path} is not a readable zip: {error}") from error


def _read_names(
    path: Path, names: list[str], read: Callable[[str], bytes], index: bytes | None, limit: int | None
) -> ImageData:
    names = sorted(name for name in names if _is_image(name))
    if not names:
        raise DataError(f"{path} holds no images ({', '.join(sorted(_IMAGE_SUFFIXES))})")
    # classes are counted over all names, so that a limit does not change the label of an image
    labels = _labels_of_folders(names) if index is None else _labels_of_index(path, names[:limit], index)
    contents = ((f"{path}: {name}", read(name)) for name in names[:limit])
    return _stack(contents, None if labels is None else _whole_numbers(labels[:limit], path), path)


def _is_image(name: str) -> bool:
    """By its suffix; hidden files and the copies that macOS puts into archives are none."""
    file = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in file.parts)
    return file.suffix.lower() in _IMAGE_SUFFIXES and not hidden


def _labels_of_index(path: Path, names: list[str], index: bytes) -> list[Any] | None:
    """Labels from an EDM `dataset.json`; None where it lists none."""
    try:
        listed = json.loads(index).get("labels")
        by_name = None if listed is None else {str(name): label for name, label in listed}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: dataset.json must hold {{'labels': [[file, label], ...]}}: {error!r}") from error
    if by_name is None:
        return None
    missing = [name for name in names if name not in by_name]
    if missing:
        raise DataError(f"{path}: dataset.json has no label for {missing[0]!r}")
    return [by_name[name] for name in names]


def _labels_of_folders(names: list[str]) -> list[int] | None:
    """The number of each image's sub-folder, or None where some image has none, or all have the same."""
    folders = [PurePosixPath(name).parent.as_posix() for name in names]
    classes = {folder: number for number, folder in enumerate(sorted(set(folders)))}
    return None if "." in classes or len(classes) < 2 else [classes[folder] for folder in folders]


def _read_npz(path: Path, limit: int | None) -> ImageData:
    wanted = ("images", "arr_0", "labels", "arr_1")
    try:
        # only a zip reaches NumPy, which would take any other file for a pickle
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as arrays:
            content = {name: np.atleast_1d(arrays[name])[:limit] for name in arrays.files if name in wanted}
    except _BAD_ARCHIVE as error:
        raise DataError(f"{path} is not a readable .npz without pickled objects: {error}") from error
    images = content.get("images", content.get("arr_0"))
    if images is None:
        raise DataError(f"{path} has no array 'images' (or 'arr_0')")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    given = content.get("labels", content.get("arr_1"))
    labels = None if given is None else _whole_numbers(given, path)
    try:
        return ImageData(np.ascontiguousarray(images), labels)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
