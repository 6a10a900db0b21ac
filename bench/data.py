"""Image data sets: Parquet in the Hugging Face layout, an image folder, a zip of images (EDM layout), an `.npz`, or a name
for the library `datasets`.
"""

from __future__ import annotations

import importlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_KINDS = "a .parquet file, a folder of images, a .zip of images, an .npz, or hf:<name or folder>[:<split>]"
_NO_BOUND = {"limit": "all images", "resolution": "any"}
_HF = "hf:"
_HF_IMAGES, _HF_LABELS = ("image", "img"), ("label", "labels", "fine_label")
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


def load_images(
    path: str | Path,
    limit: int | None = None,
    *,
    use_labels: bool = True,
    xflip: bool = False,
    resolution: int | None = None,
) -> ImageData:
    """Read a data set, or the first `limit` images of it; a folder and a zip are read in the order of their names.

    The options after `limit` are those of the readers of EDM (Karras et al. 2022, arXiv:2206.00364), by their names there.

    Args:
        path: one of
            `.parquet` with a column `image` (encoded bytes, or a struct with `bytes`) and optionally `label`;
            a folder or `.zip` of images, labelled by the `dataset.json` at its root (EDM layout) or else by sub-folder
            (classes numbered in the order of their names; none where there are fewer than two);
            `.npz` with `images` (or `arr_0`) as (N, H, W), (N, H, W, C) or (N, C, H, W) uint8 and optionally `labels`
            (or `arr_1`) as (N,) whole numbers; or
            `hf:<name>` or `hf:<name>:<split>` (split `train` if none is said) for the library `datasets`, where the name is
            a folder that its `save_to_disk` wrote, or a data set as `datasets.load_dataset` takes it; with a column
            `image` or `img`, and optionally `label`, `labels` or `fine_label`.
        limit: at least 1, or None for all.
        use_labels: False = labels are neither read nor checked.
        xflip: append each image mirrored left to right, with its label: 2 N images, after the limit.
        resolution: height and width that the images must have; None = any.

    Raises:
        FileNotFoundError: nothing at `path`.
        DataError: another kind of file, a damaged one, images of unequal sizes or none or not of `resolution`, labels missing
            or not whole, or an unknown split.
        ValueError: `limit` or `resolution` below 1, or `datasets` is not installed.
    """
    for name, value in (("limit", limit), ("resolution", resolution)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, or None for {_NO_BOUND[name]}, got {value}")
    data = _read(path, limit, use_labels)
    if resolution is not None and data.images.shape[2:] != (resolution, resolution):
        height, width = data.images.shape[2:]
        raise DataError(
            f"{path}: images must be {resolution} x {resolution}, the resolution asked for, got {height} x {width}"
        )
    return _mirrored(data) if xflip else data


def _read(path: str | Path, limit: int | None, use_labels: bool) -> ImageData:
    if isinstance(path, str) and path.startswith(_HF):
        return _read_hf(path, limit, use_labels)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data {str(path)!r} does not exist; give {_KINDS}")
    if path.is_dir():
        return _read_folder(path, limit, use_labels)
    readers: dict[str, Callable[[Path, int | None, bool], ImageData]] = {
        ".parquet": _read_parquet,
        ".zip": _read_zip,
        ".npz": _read_npz,
    }
    if path.suffix.lower() not in readers:
        raise DataError(f"data {str(path)!r} is not a kind this reads; give {_KINDS}")
    return readers[path.suffix.lower()](path, limit, use_labels)


def _mirrored(data: ImageData) -> ImageData:
    """The images, and after them each mirrored left to right."""
    labels = None if data.labels is None else np.tile(data.labels, 2)
    return ImageData(np.concatenate([data.images, data.images[..., ::-1]]), labels)


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


def _stack(encoded: Iterable[tuple[str, bytes]], labels: np.ndarray | None, path: str | Path) -> ImageData:
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


def _whole_numbers(labels: Iterable[Any], path: str | Path) -> np.ndarray:
    """Labels as (N,) int64, refused where one is missing, not whole, or not a single number."""
    whole: list[int] = []
    for label in labels:
        if isinstance(label, float | np.floating) and float(label).is_integer():
            label = int(label)
        if not isinstance(label, int | np.integer):
            raise DataError(f"{path}: the label of every image must be one whole number, got {label!r}")
        whole.append(int(label))
    return np.asarray(whole, dtype=np.int64)


def _read_parquet(path: Path, limit: int | None, use_labels: bool) -> ImageData:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = ("image", "label") if use_labels else ("image",)
            table = file.read([name for name in wanted if name in names]).slice(0, limit)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error
    if "image" not in names:
        raise DataError(f"{path} has no column 'image' (columns: {names})")
    labels = _whole_numbers(table["label"].to_pylist(), path) if "label" in table.column_names else None
    return _stack(_encoded(table["image"].to_pylist(), path), labels, path)


def _encoded(column: Iterable[Any], path: str | Path) -> Iterator[tuple[str, bytes]]:
    """Where each image of a column is from, and its encoded bytes."""
    for row, value in enumerate(column):
        source, content = f"{path} row {row}", value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            kind = type(content).__name__
            raise DataError(f"{source}: 'image' must be encoded bytes, or a struct with 'bytes', got {kind}")
        yield source, content


def _read_folder(path: Path, limit: int | None, use_labels: bool) -> ImageData:
    names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    index = path / "dataset.json"
    listed = index.read_bytes() if index.exists() else None
    return _read_names(path, names, lambda name: (path / name).read_bytes(), listed, limit, use_labels)


def _read_zip(path: Path, limit: int | None, use_labels: bool) -> ImageData:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            index = archive.read("dataset.json") if "dataset.json" in names else None
            return _read_names(path, names, archive.read, index, limit, use_labels)
    except DataError:
        raise
    except _BAD_ARCHIVE as error:
        raise DataError(f"{path} is not a readable zip: {error}") from error


def _read_names(
    path: Path,
    names: list[str],
    read: Callable[[str], bytes],
    index: bytes | None,
    limit: int | None,
    use_labels: bool,
) -> ImageData:
    names = sorted(name for name in names if _is_image(name))
    if not names:
        raise DataError(f"{path} holds no images ({', '.join(sorted(_IMAGE_SUFFIXES))})")
    labels: list[Any] | None = None
    if use_labels:  # classes are counted over all names, so that a limit does not change the label of an image
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


def _read_npz(path: Path, limit: int | None, use_labels: bool) -> ImageData:
    wanted = ("images", "arr_0", *(("labels", "arr_1") if use_labels else ()))
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


def _read_hf(name: str, limit: int | None, use_labels: bool) -> ImageData:
    """A data set of the library `datasets`; its images are decoded here, as everywhere, and not by the library."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(f"data {name!r} needs the package datasets: pip install 'fewstep[hf]'") from error
    table = _hf_table(datasets, name)
    columns = table.column_names
    image = next((column for column in _HF_IMAGES if column in columns), None)
    if image is None:
        raise DataError(f"{name} has none of the columns {', '.join(_HF_IMAGES)} (columns: {columns})")
    table = table.select(range(min(len(table), len(table) if limit is None else limit)))
    label = next((column for column in _HF_LABELS if column in columns), None) if use_labels else None
    labels = None if label is None else _whole_numbers(table[label], name)
    try:
        encoded = table.select_columns(image).cast_column(image, datasets.Image(decode=False))[image]
    except (TypeError, ValueError, RuntimeError) as error:  # pyarrow's are ValueErrors
        raise DataError(f"{name}: column {image!r} holds no images: {error}") from error
    return _stack(_encoded((_with_bytes(value) for value in encoded), name), labels, name)


def _hf_table(datasets: Any, name: str) -> Any:
    """The `datasets.Dataset` that a name stands for."""
    source, _, split = name.removeprefix(_HF).partition(":")
    if not source:
        raise DataError(f"data {name!r} names no data set; give hf:<name or folder>[:<split>]")
    saved = any((Path(source) / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        loaded = datasets.load_from_disk(source) if saved else datasets.load_dataset(source, split=split or "train")
    except Exception as error:  # the library's, its file systems' and pyarrow's have no common base
        raise DataError(f"{name} cannot be loaded by datasets: {type(error).__name__}: {error}") from error
    if not saved:
        return loaded
    whole = not isinstance(loaded, dict)  # a saved data set is one split, or a dictionary of them
    splits = {split if loaded.split is None else str(loaded.split): loaded} if whole else dict(loaded)
    wanted = split or (next(iter(splits)) if whole else "train")
    if wanted not in splits:
        raise DataError(f"{name}: split must be one of {sorted(splits)}, got {wanted!r}")
    return splits[wanted]


def _with_bytes(value: Any) -> Any:
    """An image of `datasets`, read from its file where it is only named."""
    if isinstance(value, dict) and value.get("bytes") is None and value.get("path") and Path(value["path"]).is_file():
        return Path(value["path"]).read_bytes()
    return value
