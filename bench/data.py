"""Image data sets: Parquet in the Hugging Face layout, an image folder, a zip of images (EDM layout), or an `.npz`."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_KINDS = "a .parquet file, a folder of images, a .zip of images, or an .npz"


class DataError(ValueError):
    """A data set that cannot be read; the message names the file and what is accepted."""


@dataclass(frozen=True)
class ImageData:
    """A data set in memory.

    Attributes:
        images: (N, C, H, W) uint8, C = 1 or 3.
        labels: (N,) int64, or None where the source has none.
    """

    images: np.ndarray
    labels: np.ndarray | None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8 or self.images.shape[1] not in (1, 3):
            raise DataError(f"images must be (N, 1 or 3, H, W) uint8, got {self.images.shape} {self.images.dtype}")
        if self.labels is not None and self.labels.shape != (len(self.images),):
            raise DataError(f"labels must be ({len(self.images)},) like the images, got {self.labels.shape}")

    def __len__(self) -> int:
        return len(self.images)


def load_images(path: str | Path, limit: int | None = None) -> ImageData:
    """Read a data set, the first `limit` images of it if given.

    Args:
        path: `.parquet` with a column `image` (encoded bytes, or a struct with `bytes`) and optionally `label`; a folder
            or `.zip` of images, labelled by its `dataset.json` (EDM layout) or else by sub-folder; or an `.npz`
            holding `images` (or `arr_0`) as (N, H, W), (N, H, W, C) or (N, C, H, W) uint8 and optionally `labels` (or `arr_1`).

    Raises:
        FileNotFoundError: nothing at `path`.
        DataError: another kind of file, a damaged one, or images of unequal sizes.
    """
    path = Path(path)
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
    """An encoded image as (C, H, W) uint8: one channel where it is stored as grey, three otherwise."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            pixels = np.asarray(image.convert("L" if image.mode in ("L", "1", "I", "I;16") else "RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{source} is not a readable image: {error}") from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _stack(encoded: Iterable[tuple[str, bytes]], labels: list[int] | None) -> ImageData:
    images: list[np.ndarray] = []
    for source, content in encoded:
        images.append(decode(content, source))
        if images[-1].shape != images[0].shape:
            raise DataError(
                f"{source} has shape {images[-1].shape}, the images before it {images[0].shape}; all must agree"
            )
    if not images:
        raise DataError("the data set holds no images")
    return ImageData(np.stack(images), None if labels is None else np.asarray(labels, dtype=np.int64))


def _read_parquet(path: Path, limit: int | None) -> ImageData:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error
    if "image" not in table.column_names:
        raise DataError(f"{path} has no column 'image' (columns: {table.column_names})")
    table = table.slice(0, limit)
    column = table["image"].to_pylist()
    encoded = (content["bytes"] if isinstance(content, dict) else content for content in column)
    labels = table["label"].to_pylist() if "label" in table.column_names else None
    return _stack(((f"{path} row {i}", content) for i, content in enumerate(encoded)), labels)


def _read_folder(path: Path, limit: int | None) -> ImageData:
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES)
    index = path / "dataset.json"
    return _read_names(
        path, names, lambda name: (path / name).read_bytes(), index.read_bytes() if index.exists() else None, limit
    )


def _read_zip(path: Path, limit: int | None) -> ImageData:
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(n for n in archive.namelist() if Path(n).suffix.lower() in _IMAGE_SUFFIXES)
            index = archive.read("dataset.json") if "dataset.json" in archive.namelist() else None
            return _read_names(path, names, archive.read, index, limit)
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is not a readable zip: {error}") from error


def _read_names(
    path: Path, names: list[str], read: Callable[[str], bytes], index: bytes | None, limit: int | None
) -> ImageData:
    if not names:
        raise DataError(f"{path} holds no images ({', '.join(sorted(_IMAGE_SUFFIXES))})")
    names = names[:limit]
    labels = _labels_of(path, names, index)

    def contents() -> Iterator[tuple[str, bytes]]:
        for name in names:
            yield f"{path}: {name}", read(name)

    return _stack(contents(), labels)


def _labels_of(path: Path, names: list[str], index: bytes | None) -> list[int] | None:
    """Labels from an EDM `dataset.json`, else from the sub-folder of each image (classes in sorted order), else none."""
    if index is not None:
        try:
            listed = json.loads(index).get("labels")
            by_name = None if listed is None else {str(name): int(label) for name, label in listed}
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: dataset.json must hold {{'labels': [[file, label], ...]}}: {error}") from error
        if by_name is None:
            return None
        missing = [name for name in names if name not in by_name]
        if missing:
            raise DataError(f"{path}: dataset.json has no label for {missing[0]!r}")
        return [by_name[name] for name in names]
    folders = [Path(name).parent.as_posix() for name in names]
    if "." in folders or len(set(folders)) < 2:
        return None
    classes = sorted(set(folders))
    return [classes.index(folder) for folder in folders]


def _read_npz(path: Path, limit: int | None) -> ImageData:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            content = {
                key: arrays[key][:limit] for key in arrays.files if key in ("images", "arr_0", "labels", "arr_1")
            }
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a readable .npz without pickled objects: {error}") from error
    images = content.get("images", content.get("arr_0"))
    if images is None:
        raise DataError(f"{path} has no array 'images' (or 'arr_0')")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    labels = content.get("labels", content.get("arr_1"))
    return ImageData(np.ascontiguousarray(images), None if labels is None else labels.astype(np.int64))
