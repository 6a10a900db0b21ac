"""The feature extractor, its reference statistics, and the training that makes it; on synthetic images throughout."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from bench.build_assets import build_assets, main
from bench.classifier_training import ClassifierTraining, augment, train_classifier
from bench.data import DataError
from bench.features import (
    EXTRACTORS,
    STATISTICS,
    FeatureExtractor,
    ImageClassifier,
    content_hash,
    dequantise,
    load_extractor,
    load_statistics,
    moments_hash,
    quantise,
    save_extractor,
    save_statistics,
)
from bench.metrics import Moments, frechet_distance
from bench.reference import load_reference_samples
from bench.shipped import ASSETS
from distill.checkpoint import CheckpointError

TINY = ClassifierTraining(epochs=3, batch_size=32, learning_rate=0.02, width=4, hidden=8)


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return load_extractor("mnist_cnn")


def strokes(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(count, 1, 28, 28) uint8 images of a bar whose angle is the class, and the classes."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    rows, columns = np.mgrid[-13.5:14.5, -13.5:14.5]
    angle = (labels * np.pi / 10)[:, None, None] + generator.normal(0, 0.03, (count, 1, 1))
    distance = np.abs(rows * np.cos(angle) - columns * np.sin(angle))
    inside = (distance < 2) & (np.hypot(rows, columns) < 10)
    return (255 * inside).astype(np.uint8)[:, None], labels


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- the 8-bit border ----


def test_quantise_is_the_inverse_of_dequantise_on_every_level():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantise(dequantise(levels)), levels)
    assert torch.equal(quantise(levels), levels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_quantise_clips_and_takes_every_floating_dtype(dtype):
    values = torch.tensor([-7.0, -1.0, 0.25, 1.0, 3.0], dtype=dtype)
    assert quantise(values).tolist() == [0, 0, 159, 255, 255]


def test_quantise_takes_read_only_and_flipped_arrays():
    values = np.linspace(-1, 1, 256)
    values.setflags(write=False)
    assert quantise(values[::-1]).tolist() == list(range(255, -1, -1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_quantise_refuses_what_has_no_level(bad):
    with pytest.raises(ValueError, match="NaN or an infinity"):
        quantise(torch.tensor([0.0, bad]))


def test_quantise_refuses_other_integers():
    with pytest.raises(TypeError, match=r"floating in \[-1, 1\] or uint8, got torch.int64"):
        quantise(torch.zeros(3, dtype=torch.int64))


def test_a_saved_png_has_the_features_of_the_image_in_memory(extractor):
    images = noise(3) * 1.2
    saved = []
    for image in quantise(images)[:, 0].numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        saved.append(np.asarray(Image.open(file))[None])
    assert np.array_equal(extractor.features(np.stack(saved)), extractor.features(images))


def test_changes_below_a_level_change_no_feature(extractor):
    images = dequantise(quantise(noise(3)))
    assert np.array_equal(extractor.features(images + 0.4 / 127.5), extractor.features(images))


# ---- features ----


def test_features_do_not_depend_on_the_batch_size(extractor):
    images = torch.cat([noise(20), dequantise(torch.from_numpy(strokes(21)[0]))])
    at_once = extractor.features(images, batch_size=41)
    assert at_once.shape == (41, extractor.dims)
    assert at_once.dtype == np.float64
    for batch_size in (1, 7, 40):
        np.testing.assert_allclose(extractor.features(images, batch_size), at_once, rtol=0, atol=1e-5)


def test_autocast_of_the_caller_changes_nothing(extractor):
    images = noise(4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = extractor.features(images)
    assert np.array_equal(inside, extractor.features(images))


def test_a_bad_image_leaves_gradients_enabled(extractor):
    with pytest.raises(ValueError, match="NaN"):
        extractor.features(torch.full((1, 1, 28, 28), float("nan")))
    assert torch.is_grad_enabled()


def test_no_images_have_no_features(extractor):
    assert extractor.features(noise(0)).shape == (0, 64)
    assert extractor.classify(noise(0)).shape == (0,)


def test_classify_gives_the_classes_of_the_logits(extractor):
    images = noise(5)
    expected = extractor.network(dequantise(quantise(images))).argmax(1)
    assert extractor.classify(images, batch_size=2).tolist() == expected.tolist()


def test_probabilities_are_those_of_the_logits(extractor):
    images = noise(5)
    logits = extractor.network(dequantise(quantise(images))).double().numpy()
    expected = np.exp(logits - logits.max(1, keepdims=True))
    found = extractor.probabilities(images, batch_size=2)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected / expected.sum(1, keepdims=True), rtol=1e-4, atol=1e-12)
    assert found.argmax(1).tolist() == extractor.classify(images).tolist()
    assert extractor.probabilities(noise(0)).shape == (0, 10)


@pytest.mark.parametrize("shape", [(2, 28, 28), (2, 3, 28, 28), (2, 1, 32, 32)])
def test_images_of_another_shape_are_refused(extractor, shape):
    with pytest.raises(ValueError, match=r"images must be \(N, 1, 28, 28\), got"):
        extractor.features(torch.zeros(shape))


def test_a_batch_size_below_one_is_refused(extractor):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        extractor.features(noise(1), batch_size=0)


# ---- the shipped extractor ----


def test_the_shipped_extractor_is_what_it_says(extractor):
    assert extractor.name == "mnist_cnn"
    assert extractor.dims == 64
    assert extractor.info["test_accuracy"] >= 0.993
    assert 200_000 < sum(p.numel() for p in extractor.network.parameters()) < 300_000


def test_the_hash_is_of_the_weights_alone(extractor, tmp_path):
    assert load_extractor().hash == extractor.hash == content_hash(extractor.network.state_dict())
    save_extractor(tmp_path / "copy", "other_name", extractor.network, {})
    assert load_extractor(tmp_path / "copy").hash == extractor.hash
    with torch.no_grad():
        extractor_copy = load_extractor(tmp_path / "copy")
        extractor_copy.network.head.bias[0] += 1
    save_extractor(tmp_path / "changed", "mnist_cnn", extractor_copy.network, {})
    assert load_extractor(tmp_path / "changed").hash != extractor.hash


def test_content_hash_sees_names_shapes_dtypes_and_values():
    base = np.arange(6.0)
    variants = [
        {"a": base},
        {"b": base},
        {"a": base.reshape(2, 3)},
        {"a": base.astype(np.float32)},
        {"a": base + 1},
    ]
    assert len({content_hash(v) for v in variants}) == len(variants)
    assert content_hash({"a": base, "b": base + 1}) == content_hash({"b": base + 1, "a": base})
    assert content_hash({"a": base}) == content_hash({"a": base.astype(">f8")}) == content_hash({"a": base.copy()})


def test_the_package_data_is_small():
    folders = [*EXTRACTORS.values(), *STATISTICS.values()]
    assert sum(file.stat().st_size for folder in folders for file in folder.iterdir()) < 1_000_000


# ---- loads that fail ----


def test_an_unknown_name_lists_the_names_and_the_closest():
    with pytest.raises(
        ValueError, match=r"one of \['mnist_cnn'\] or a folder, got 'mnist-cnn'; did you mean 'mnist_cn"
    ):
        load_extractor("mnist-cnn")
    with pytest.raises(ValueError, match=r"one of \['mnist'\] or a folder, got 'qqq'$"):
        load_statistics("qqq")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the shipped extractor to damage."""
    return Path(shutil.copytree(EXTRACTORS["mnist_cnn"], tmp_path / "copy"))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_pickle_is_refused(tmp_path):
    file = tmp_path / "classifier.pt"
    torch.save(ImageClassifier(2, 2).state_dict(), file)
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_extractor(file)


def test_a_pickle_under_another_name_is_refused(folder):
    torch.save(ImageClassifier().state_dict(), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        load_extractor(folder)


def test_a_truncated_file_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        load_extractor(folder)


def test_a_weights_file_instead_of_its_folder_is_refused(folder):
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        load_extractor(folder / "model.safetensors")


def test_an_altered_weight_is_refused(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="it was altered"):
        load_extractor(folder)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_extractor(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 9}, "format must be 1, got 9"),
        ({"network": {"class": "LeNet"}}, "another architecture: class must be 'ImageClassifier', got 'LeNet'"),
        ({"network": {"class": "ImageClassifier", "hidden": 32}}, "another architecture"),
        ({"network": {"class": "ImageClassifier", "depth": 3}}, "depth"),
        ({"network": None}, "another architecture"),
        ({"hash": None}, "altered"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, changes, message):
    edit(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_extractor(folder)


def test_a_config_that_is_not_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_extractor(folder)


# ---- reference statistics ----


def test_the_shipped_statistics_are_those_of_normalised_features(extractor):
    train, test = load_statistics("mnist", "train"), load_statistics("mnist", "test", extractor)
    assert (train.count, test.count) == (60_000, 10_000)
    assert train.mean.dtype == train.covariance.dtype == np.float64
    # Batch normalisation gives variance near 1 to each unit, so none is dead; its running average is only near.
    assert np.abs(train.mean).max() < 0.5
    assert np.all((np.diag(train.covariance) > 0.3) & (np.diag(train.covariance) < 3))
    assert np.linalg.eigvalsh(train.covariance).min() > 1e-3
    assert 0 < frechet_distance(train, test) < 1


def test_strokes_are_far_from_digits(extractor):
    train, test = load_statistics("mnist", "train"), load_statistics("mnist", "test")
    other = Moments.of(extractor.features(strokes(200)[0]))
    assert frechet_distance(other, train) > 20 * frechet_distance(test, train)


def test_an_unknown_split_lists_the_splits():
    with pytest.raises(ValueError, match=r"one of \['test', 'train'\], got 'validation'"):
        load_statistics("mnist", "validation")


def test_statistics_of_another_extractor_are_refused(extractor):
    with pytest.raises(CheckpointError, match="a distance between the two means nothing"):
        load_statistics("mnist", "train", replace(extractor, hash="0" * 16))


def test_statistics_come_back_as_they_were_saved(extractor, tmp_path):
    moments = Moments.of(extractor.features(noise(80)))
    save_statistics(tmp_path / "stats", extractor, {"half": moments}, {"half": {"images": 80}})
    loaded = load_statistics(tmp_path / "stats", "half", extractor)
    assert moments_hash(loaded) == moments_hash(moments)
    assert np.array_equal(loaded.covariance, moments.covariance)


def test_altered_or_incomplete_statistics_are_refused(extractor, tmp_path):
    moments = Moments.of(extractor.features(noise(80)))
    save_statistics(tmp_path / "stats", extractor, {"half": moments}, {"half": {}})
    config = tmp_path / "stats" / "config.json"
    record = json.loads(config.read_text())["splits"]["half"]
    for splits, message in (
        ({"half": {**record, "count": 81}}, "does not have the hash"),
        ({"half": {"hash": record["hash"]}}, "KeyError: 'count'"),
        ({"whole": record}, "KeyError: 'whole.mean'"),
        (None, "TypeError"),
    ):
        edit(config, splits=splits)
        with pytest.raises(CheckpointError, match=message):
            load_statistics(tmp_path / "stats", "half" if message != "KeyError: 'whole.mean'" else "whole", extractor)


# ---- training ----


def test_training_reduces_the_loss_and_is_deterministic():
    images, labels = strokes(160)
    network, losses = train_classifier(images, labels, TINY, progress=False)
    again, same = train_classifier(images, labels, TINY, progress=False)
    assert len(losses) == 15
    assert np.mean(losses[-3:]) < 0.7 * losses[0]
    assert losses == same
    assert content_hash(network.state_dict()) == content_hash(again.state_dict())
    other, _ = train_classifier(images, labels, replace(TINY, seed=1), progress=False)
    assert content_hash(network.state_dict()) != content_hash(other.state_dict())


def test_training_leaves_the_global_generator_alone():
    images, labels = strokes(32)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_classifier(images, labels, replace(TINY, epochs=1), progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_a_trained_classifier_survives_saving_in_half_precision(tmp_path):
    images, labels = strokes(64)
    network, _ = train_classifier(images, labels, replace(TINY, epochs=1), progress=False)
    save_extractor(tmp_path / "tiny", "tiny", network, {"note": "a test"})
    loaded = load_extractor(tmp_path / "tiny")
    assert (loaded.name, loaded.dims, loaded.info) == ("tiny", 8, {"note": "a test"})
    with torch.no_grad():
        expected = network.features(dequantise(torch.from_numpy(images)))
    np.testing.assert_allclose(loaded.features(images), expected.numpy(), atol=1e-5)


def test_augmentation_without_extent_is_the_identity():
    still = replace(TINY, shift=0.0, rotation=0.0, scale=0.0)
    images = noise(3)
    torch.testing.assert_close(augment(images, still, torch.Generator().manual_seed(0)), images, atol=1e-4, rtol=0)


def test_augmentation_moves_a_digit_by_at_most_the_shift():
    images = torch.full((50, 1, 28, 28), -1.0)
    images[:, :, 13:15, 13:15] = 1.0
    moved = augment(images, replace(TINY, shift=3.0, rotation=0.0, scale=0.0), torch.Generator().manual_seed(0)) + 1
    mass = moved.sum((1, 2, 3))
    torch.testing.assert_close(mass, torch.full((50,), 8.0), atol=1e-3, rtol=0)
    centre = (moved.sum((1, 2)) * torch.arange(28)).sum(1) / mass - 13.5
    assert 2 < centre.abs().max() <= 3.001


def test_half_of_the_images_are_mirrored():
    still = replace(TINY, shift=0.0, rotation=0.0, scale=0.0, flip=True)
    images = noise(200)
    moved = augment(images, still, torch.Generator().manual_seed(0))
    same, mirrored = (((moved - other).abs().amax((1, 2, 3)) < 1e-4) for other in (images, images.flip(3)))
    assert (same ^ mirrored).all()
    assert 70 < mirrored.sum() < 130


def test_a_classifier_of_colour_images_is_trained_saved_and_loaded(tmp_path):
    grey, labels = strokes(96)
    images = np.zeros((96, 3, 32, 32), np.uint8)
    images[:, :, 2:30, 2:30] = grey * np.array([1.0, 0.5, 0.0])[:, None, None]
    network, losses = train_classifier(images, labels % 4, replace(TINY, levels=3, flip=True), progress=False)
    save_extractor(tmp_path, "colour", network, {})
    loaded = load_extractor(tmp_path)
    assert (loaded.shape, loaded.dims, loaded.network.classes) == ((3, 32, 32), 16, 4)
    np.testing.assert_allclose(loaded.features(images).mean(0), 0.0, atol=0.1)
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_sizes_that_do_not_halve_are_refused():
    with pytest.raises(ValueError, match=r"size must be a multiple of 2 \*\* levels = 8, got 28"):
        ImageClassifier(levels=3)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((64, 28, 28), np.uint8), np.zeros(64, int), "images must be"),
        (np.zeros((64, 1, 28, 28)), np.zeros(64, int), "images must be"),
        (np.zeros((64, 1, 28, 28), np.uint8), np.zeros(63, int), "labels must be"),
        (np.zeros((64, 1, 28, 28), np.uint8), np.zeros(64), "labels must be"),
        (np.zeros((64, 1, 28, 28), np.uint8), np.full(64, -1), "labels must be at least 0, got -1"),
        (np.zeros((8, 1, 28, 28), np.uint8), np.zeros(8, int), "must fill a batch of 32, got 8"),
    ],
)
def test_training_data_that_does_not_fit_is_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        train_classifier(images, labels, TINY, progress=False)


def test_training_options_are_checked():
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        ClassifierTraining(epochs=0)
    with pytest.raises(ValueError, match="batch_size must be at least 2"):
        ClassifierTraining(batch_size=1)


# ---- building the assets ----


@pytest.fixture
def splits(tmp_path) -> tuple[Path, Path]:
    files = tmp_path / "train.npz", tmp_path / "test.npz"
    for seed, file in enumerate(files):
        images, labels = strokes(80, seed)
        np.savez(file, images=images, labels=labels)
    return files


def test_assets_are_built_loaded_and_the_same_again(splits, tmp_path):
    reports = [build_assets(*splits, tmp_path / name, replace(TINY, epochs=1)) for name in ("one", "two")]
    assert reports[0] == reports[1]
    extractor = load_extractor(tmp_path / "one" / "mnist-features")
    assert extractor.hash == reports[0]["hash"]
    assert load_statistics(tmp_path / "one" / "mnist-stats", "test", extractor).count == 80
    rows = load_reference_samples(tmp_path / "one" / "mnist-reference", extractor)
    assert np.allclose(rows, extractor.features(strokes(80, 0)[0]), atol=2e-3, rtol=1e-3)
    with pytest.raises(CheckpointError, match="not of the extractor mnist_cnn"):
        load_reference_samples(tmp_path / "one" / "mnist-reference", load_extractor())
    for name in ("mnist-features/config.json", "mnist-stats/config.json", "mnist-stats/moments.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_assets_need_labels(splits, tmp_path):
    np.savez(splits[0], images=strokes(80)[0])
    with pytest.raises(DataError, match="has no labels"):
        build_assets(*splits, tmp_path / "out", TINY)


def test_the_command_reports_unreadable_data(splits, tmp_path):
    splits[0].write_bytes(b"")
    arguments = ["--train", str(splits[0]), "--test", str(splits[1]), "--out", str(tmp_path / "out"), "--threads", "1"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "not a readable .npz" in result.output


def test_the_shipped_statistics_name_the_shipped_extractor(extractor):
    config = json.loads((ASSETS / "mnist-stats" / "config.json").read_text())
    assert config["extractor"] == {"name": extractor.name, "hash": extractor.hash}
    assert config["splits"]["train"]["data"] == extractor.info["data"]["train"]
