"""Reference moments: computed in blocks, kept on disk and found again, or read as FID's are published; each against NumPy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.data import DataError, ImageData
from bench.extractors import ImageExtractor, pixels
from bench.features import STATISTICS, Extractor, load_extractor, load_statistics, moments_hash, save_statistics
from bench.metrics import FrechetReference, Moments
from bench.reference import judge_parts, read_fid_statistics, reference_features, reference_of
from distill.checkpoint import CheckpointError

SHAPE = (1, 4, 5)


class Counting:
    """Pixels, and how many images went through."""

    def __init__(self) -> None:
        self.inner, self.images = pixels(SHAPE), 0
        self.name, self.hash, self.dims, self.shape = "a/b", self.inner.hash, self.inner.dims, SHAPE

    def features(self, images: np.ndarray, batch_size: int = 250) -> np.ndarray:
        self.images += len(images)
        return self.inner.features(images, batch_size)


def data(count: int = 40, seed: int = 0) -> ImageData:
    return ImageData(np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8), None)


def expected(images: ImageData) -> tuple[np.ndarray, np.ndarray]:
    rows = images.images.reshape(len(images), -1) / 127.5 - 1
    return rows.mean(0), np.cov(rows, rowvar=False)


# ---- of a data set ----


def test_images_give_their_moments_with_and_without_a_cache(tmp_path):
    mean, covariance = expected(data())
    for cache in (None, tmp_path / "cache"):
        moments = reference_of(Counting(), data(), cache)
        assert moments.count == 40
        np.testing.assert_allclose(moments.mean, mean, atol=1e-6)
        np.testing.assert_allclose(moments.covariance, covariance, atol=1e-6)


def test_more_images_than_a_block_holds(tmp_path):
    many = data(2_345)
    mean, covariance = expected(many)
    moments = reference_of(pixels(SHAPE), many, tmp_path)
    np.testing.assert_allclose(moments.covariance, covariance, atol=1e-6)
    features = reference_features(pixels(SHAPE), many, tmp_path)
    np.testing.assert_allclose(features.mean(0), mean, atol=1e-5)
    np.testing.assert_allclose(features, many.images.reshape(2_345, -1) / 127.5 - 1, atol=1e-6)


def test_the_second_call_computes_nothing(tmp_path):
    extractor = Counting()
    first = [reference_of(extractor, data(), tmp_path), reference_features(extractor, data(), tmp_path)]
    assert extractor.images == 80
    second = [reference_of(extractor, data(), tmp_path), reference_features(extractor, data(), tmp_path)]
    assert extractor.images == 80
    assert moments_hash(first[0]) == moments_hash(second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_other_images_another_extractor_or_split_are_computed_anew(tmp_path):
    extractor = Counting()
    reference_of(extractor, data(), tmp_path)
    other = reference_of(extractor, data(seed=1), tmp_path)
    np.testing.assert_allclose(other.mean, expected(data(seed=1))[0], atol=1e-6)
    reference_of(extractor, data(), tmp_path, split="test")
    extractor.hash = "0" * 16
    reference_of(extractor, data(), tmp_path)
    assert extractor.images == 160
    assert len(list(tmp_path.glob("[!.]*"))) == 4


def test_the_cache_is_a_folder_of_statistics(tmp_path):
    extractor = Counting()
    moments = reference_of(extractor, data(), tmp_path, split="test")
    (folder,) = tmp_path.iterdir()
    assert moments_hash(load_statistics(folder, "test", extractor)) == moments_hash(moments)
    assert moments_hash(reference_of(extractor, folder, split="test")) == moments_hash(moments)
    assert json.loads((folder / "config.json").read_text())["splits"]["test"]["data"]["images"] == 40


def test_a_path_to_images_is_read(tmp_path):
    np.savez(tmp_path / "images.npz", images=data().images)
    moments = reference_of(pixels(SHAPE), str(tmp_path / "images.npz"))
    np.testing.assert_allclose(moments.mean, expected(data())[0], atol=1e-6)
    assert reference_features(pixels(SHAPE), tmp_path / "images.npz", tmp_path).shape == (40, 20)
    with pytest.raises(FileNotFoundError, match="nothing"):
        reference_of(pixels(SHAPE), tmp_path / "nothing")
    (tmp_path / "damaged.npz").write_bytes(b"damaged")
    with pytest.raises(DataError, match="not a readable"):
        reference_of(pixels(SHAPE), tmp_path / "damaged.npz")


def test_shipped_statistics_have_their_name():
    extractor = load_extractor()
    shipped = moments_hash(load_statistics("mnist", "test"))
    assert moments_hash(reference_of(extractor, "mnist", split="test")) == shipped
    assert moments_hash(reference_of(extractor, STATISTICS["mnist"], split="test")) == shipped
    with pytest.raises(CheckpointError, match="a distance between the two means nothing"):
        reference_of(replace(extractor, hash="0" * 16), "mnist")


def test_damage_in_the_cache_is_named(tmp_path):
    extractor = pixels(SHAPE)
    reference_of(extractor, data(), tmp_path)
    reference_features(extractor, data(), tmp_path)
    moments, features = next(tmp_path.glob("*/moments.safetensors")), next(tmp_path.glob("*.npy"))
    for file in (moments, features):
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="moments.safetensors is truncated"):
        reference_of(extractor, data(), tmp_path)
    with pytest.raises(CheckpointError, match=r"\.npy cannot be read: .*; delete it, and it is computed again"):
        reference_features(extractor, data(), tmp_path)
    np.save(features, np.zeros((40, 20)))
    with pytest.raises(CheckpointError, match=r"must hold \(40, 20\) float32, got \(40, 20\) float64"):
        reference_features(extractor, data(), tmp_path)


def test_features_that_fail_leave_no_file(tmp_path):
    extractor = Counting()
    extractor.inner = pixels((1, 5, 4))
    with pytest.raises(ValueError, match="images must be"):
        reference_features(extractor, data(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_single_image_has_no_moments(tmp_path):
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        reference_of(pixels(SHAPE), data(1), tmp_path)
    assert not list(tmp_path.iterdir())


# ---- as FID's are published ----


def fid_file(folder: Path, **arrays: np.ndarray) -> Path:
    mean, covariance = expected(data())
    np.savez(folder / "fid.npz", **{"mu": mean, "sigma": covariance, **arrays})
    return folder / "fid.npz"


def test_published_statistics_are_read(tmp_path):
    moments = reference_of(pixels(SHAPE), fid_file(tmp_path))
    np.testing.assert_array_equal(moments.mean, expected(data())[0])
    np.testing.assert_allclose(moments.covariance, expected(data())[1], rtol=1e-14)
    assert moments.count == 0
    single = fid_file(
        tmp_path, sigma=(expected(data())[1] * (1 + 1e-7 * np.triu(np.ones((20, 20)), 1))).astype(np.float32)
    )
    np.testing.assert_allclose(read_fid_statistics(single, 20).covariance, expected(data())[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(19)}, r"must be \(20,\) and \(20, 20\) like the extractor's features, got \(19,\)"),
        ({"sigma": np.zeros(20)}, r"and \(20,\)"),
        ({"sigma": np.triu(np.ones((20, 20)))}, "differs from its transpose"),
        ({"sigma": np.full((20, 20), np.nan)}, "must be finite and symmetric"),
        ({"mu": np.full(20, np.inf)}, "mean must be finite"),
        ({"mu": np.array([None] * 20)}, "not a readable .npz"),
        ({"mu": np.array(["a"] * 20)}, "not a readable .npz"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_statistics_that_do_not_fit_are_refused(arrays, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        reference_of(pixels(SHAPE), fid_file(tmp_path, **arrays))


def test_a_pickle_in_place_of_published_statistics_is_refused(tmp_path):
    (tmp_path / "fid.npz").write_bytes(np.array([None], dtype=object).dumps())
    with pytest.raises(CheckpointError, match="not a readable .npz with mu and sigma"):
        read_fid_statistics(tmp_path / "fid.npz", 20)


# ---- the parts of a judge ----


def test_a_judge_is_made_of_its_parts():
    extractor: Extractor = load_extractor()
    train = load_statistics("mnist", "train")
    parts = judge_parts(extractor, train, samples=5_000)
    assert parts["metric"] == "fd_mnist_cnn"
    assert parts["about"]["extractor"]["hash"] == extractor.hash
    assert "8 bits" in parts["about"]["rounding"]
    assert parts["hashes"] == {"extractor": extractor.hash, "reference": moments_hash(train)}
    images = np.zeros((2, 1, 28, 28), np.uint8)
    assert parts["features"](images).shape == (2, 64)
    assert parts["classify"](images).shape == (2,)
    np.testing.assert_allclose(parts["probabilities"](images).sum(1), 1)
    assert isinstance(parts["reference"], FrechetReference)


def test_what_cannot_be_known_is_none():
    inception = ImageExtractor("inception", "0" * 16, 2, "any", lambda x: x)
    parts = judge_parts(inception, Moments(np.zeros(2), np.eye(2), 0), samples=5_000)
    assert (parts["metric"], parts["classify"], parts["probabilities"]) == ("fid5k", None, None)


def test_saved_statistics_of_any_extractor_come_back(tmp_path):
    extractor = pixels(SHAPE)
    moments = Moments.of(extractor.features(data().images))
    save_statistics(tmp_path / "statistics", extractor, {"train": moments}, {"train": {}})
    assert moments_hash(reference_of(extractor, tmp_path / "statistics")) == moments_hash(moments)
