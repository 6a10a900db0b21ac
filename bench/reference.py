"""What samples are compared with: the features of a data set and their moments, computed once and kept on disk."""

from __future__ import annotations

import fcntl
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap

from bench.data import ImageData, load_images
from bench.features import FORMAT, ROUNDING, STATISTICS, Extractor, load_statistics, moments_hash, save_statistics
from bench.metrics import FrechetReference, metric_name
from bench.moments import Moments, MomentsAccumulator
from distill.checkpoint import CheckpointError, content_hash, read_json, read_tensors, recover_folder, write_folder

_BLOCK = 1000  # images whose features are held at a time
_ASYMMETRY = 1e-5  # relative, of a covariance in float32


def reference_of(
    extractor: Extractor, data: ImageData | str | Path, cache: str | Path | None = None, split: str = "train"
) -> Moments:
    """The moments of an extractor's features over a data set.

    Args:
        extractor: whose features they are.
        data: images, or what says where the moments or the images are:
            a name of shipped statistics ("mnist") or a folder that `bench.features.save_statistics` wrote;
            an `.npz` with `mu` and `sigma`, as FID's reference statistics are published;
            or whatever `bench.data.load_images` reads.
        cache: folder in which moments of images are kept, by the hashes of extractor and images; None = compute each time.
        split: of shipped or saved statistics; for images it only names what is kept.

    Raises:
        FileNotFoundError, bench.data.DataError: no images, or images that cannot be read.
        ValueError: images that the extractor does not take, fewer than two, or an unknown split.
        distill.checkpoint.CheckpointError: statistics that are damaged, or of another extractor or number of features.
    """
    if not isinstance(data, ImageData):
        if _is_saved(data):
            return load_statistics(data, split, extractor)
        if _is_fid_statistics(Path(data)):
            return read_fid_statistics(data, extractor.dims)
        data = load_images(data)
    if cache is None:
        return _moments(extractor, data)
    digest = content_hash({"images": data.images})
    place = _place(Path(cache), extractor, digest, split)
    with _locked(place.parent):  # other processes wait, and find it
        folder = recover_folder(place)
        if not folder.exists():
            moments = _moments(extractor, data)
            save_statistics(folder, extractor, {split: moments}, {split: {"images": len(data), "hash": digest}})
    return load_statistics(folder, split, extractor)


def reference_features(
    extractor: Extractor, data: ImageData | str | Path, cache: str | Path, split: str = "train"
) -> np.ndarray:
    """The features (N, dims) float32 of a data set, in the order of its images, as a read-only view of a file in the cache.

    For metrics that compare with samples of the reference and not with its moments alone.

    Args:
        extractor, cache, split: as for `reference_of`.
        data: images, or whatever `bench.data.load_images` reads.

    Raises:
        FileNotFoundError, bench.data.DataError, ValueError: as for `reference_of`.
        distill.checkpoint.CheckpointError: the file in the cache is damaged.
    """
    data = data if isinstance(data, ImageData) else load_images(data)
    place = _place(Path(cache), extractor, content_hash({"images": data.images}), split)
    file = place.with_name(f"{place.name}.npy")
    shape = (len(data), extractor.dims)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f".{file.name}.{os.getpid()}.new")
        try:
            rows = open_memmap(new, mode="w+", dtype=np.float32, shape=shape)
            for number, block in enumerate(_features(extractor, data)):
                rows[number * _BLOCK : number * _BLOCK + len(block)] = block
            rows.flush()
            new.replace(file)
        finally:
            new.unlink(missing_ok=True)
    try:
        features = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; delete it, and it is computed again") from error
    if features.shape != shape or features.dtype != np.float32:
        raise CheckpointError(f"{file} must hold {shape} float32, got {features.shape} {features.dtype}; delete it")
    return features


def some_images(data: str | Path, count: int) -> ImageData | None:
    """At most `count` images of a data set, drawn at random, the same at each call; None where `data` says where moments are."""
    if _is_saved(data) or _is_fid_statistics(Path(data)):
        return None
    images = load_images(data).images
    drawn = np.random.Generator(np.random.Philox(0)).permutation(len(images))[:count]
    return ImageData(images[np.sort(drawn)], None)


def save_reference_samples(
    folder: str | Path, extractor: Extractor, features: np.ndarray, data: dict[str, Any]
) -> None:
    """Save features (M, d) of reference samples in half precision, to ship; `data` identifies the images."""
    rows = torch.from_numpy(np.asarray(features, dtype=np.float16))
    config = {
        "format": FORMAT,
        "extractor": {"name": extractor.name, "hash": extractor.hash},
        "hash": content_hash({"features": rows}),
        "data": data,
    }
    write_folder(Path(folder), {"features": {"features": rows}}, {"config": config})


def load_reference_samples(folder: str | Path, extractor: Extractor) -> np.ndarray:
    """The features (M, d) float32 that `save_reference_samples` wrote.

    Raises:
        distill.checkpoint.CheckpointError: a damaged or altered file, or features of another extractor.
    """
    config, source = read_json(Path(folder) / "config.json"), Path(folder) / "features.safetensors"
    rows = read_tensors(source).get("features")
    made_with = config.get("extractor", {}) if isinstance(config, dict) else {}
    if made_with.get("hash") != extractor.hash:
        raise CheckpointError(
            f"{folder} holds features of {made_with}, not of the extractor {extractor.name} {extractor.hash}"
        )
    if rows is None or content_hash({"features": rows}) != config.get("hash"):
        raise CheckpointError(f"{source} does not have the hash {config.get('hash')!r} of its config: it was altered")
    return rows.float().numpy()


def read_fid_statistics(path: str | Path, dims: int) -> Moments:
    """Moments from the `.npz` that FID's reference statistics are published as; nothing is unpickled.

    The file does not say of how many images the moments are, so `count` is 0, nor of which network's features: that they are
    of the same one is up to the caller.

    Args:
        path: holds `mu` (d,) and `sigma` (d, d).
        dims: number of features d that the extractor has.

    Raises:
        CheckpointError: not such a file, or another number of features.
    """
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as arrays:
            mean, covariance = (np.asarray(arrays[name], dtype=np.float64) for name in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is not a readable .npz with mu and sigma: {error}") from error
    if mean.shape != (dims,) or covariance.shape != (dims, dims):
        raise CheckpointError(
            f"{path}: mu and sigma must be ({dims},) and ({dims}, {dims}) like the extractor's features, got {mean.shape} "
            f"and {covariance.shape}"
        )
    if not np.abs(covariance - covariance.T).max() <= _ASYMMETRY * np.abs(covariance).max():  # NaN is refused too
        raise CheckpointError(f"{path}: sigma must be finite and symmetric, got one that differs from its transpose")
    try:
        return Moments(mean, 0.5 * (covariance + covariance.T), 0)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def judge_parts(extractor: Extractor, train: Moments, samples: int) -> dict[str, Any]:
    """What a `bench.judge.Judge` is made of, by the names of its fields.

    Args:
        extractor: turns samples into features.
        train: the reference.
        samples: number that will be judged, which FID's name depends on; of no meaning for other extractors than Inception-v3.

    Raises:
        ValueError: the moments are of another number of features, or not of a covariance.
    """
    made_with = {"name": extractor.name, "hash": extractor.hash, **getattr(extractor, "info", {})}
    return {
        "metric": metric_name(extractor.name, max(samples, 1)),
        "features": extractor.features,
        "reference": FrechetReference(train),
        "hashes": {"extractor": extractor.hash, "reference": moments_hash(train)},
        "about": {"extractor": made_with, "rounding": ROUNDING},
        "classify": getattr(extractor, "classify", None),
        "probabilities": getattr(extractor, "probabilities", None),
    }


def _moments(extractor: Extractor, data: ImageData) -> Moments:
    found = MomentsAccumulator(extractor.dims)
    for block in _features(extractor, data):
        found.update(block)
    return found.result()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock lies beside the folder, which holds nothing but statistics."""
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _features(extractor: Extractor, data: ImageData) -> Iterator[np.ndarray]:
    for start in range(0, len(data), _BLOCK):
        yield extractor.features(data.images[start : start + _BLOCK])


def _place(cache: Path, extractor: Extractor, digest: str, split: str) -> Path:
    """Where the cache keeps what is known of a split; a name for people, then the hashes that decide."""
    named = re.sub(r"[^\w-]", "_", f"{extractor.name}-{split}")
    return cache / f"{named}-{extractor.hash}-{digest}"


def _is_saved(data: str | Path) -> bool:
    """Whether a name or a folder is one of statistics."""
    return data in STATISTICS or (Path(data) / "moments.safetensors").is_file()


def _is_fid_statistics(path: Path) -> bool:
    """Whether a file is an `.npz` with `mu` and `sigma`, and not one of images."""
    if path.suffix.lower() != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
