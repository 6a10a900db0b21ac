"""Pixels, DINOv2 with random weights through the real loading code, and the entry to all extractors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.extractors import (
    dino_input,
    load_any_extractor,
    load_dinov2,
    pixels,
)
from bench.features import EXTRACTORS, load_extractor
from distill.checkpoint import CheckpointError


def images(count: int, shape: tuple[int, int, int] = (3, 8, 10), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def scaled(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64) / 127.5 - 1


# ---- pixels ----


def test_small_images_are_their_own_features():
    extractor, given = pixels((1, 28, 28)), images(3, (1, 28, 28))
    assert (extractor.dims, extractor.shape, extractor.name) == (784, (1, 28, 28), "pixels")
    np.testing.assert_allclose(extractor.features(given), scaled(given).reshape(3, -1), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "limit", "side"), [((3, 32, 32), 1024, 2), ((1, 7, 5), 6, 3), ((3, 8, 10), 3, 10), ((1, 5, 7), 35, 1)]
)
def test_larger_images_are_averaged_over_squares(shape, limit, side):
    extractor, given = pixels(shape, limit), images(2, shape)
    channels, height, width = shape
    expected = [
        [
            scaled(image[c, top : top + side, left : left + side]).mean()
            for c in range(channels)
            for top in range(0, height, side)
            for left in range(0, width, side)
        ]
        for image in given
    ]
    assert extractor.dims == len(expected[0]) <= limit
    np.testing.assert_allclose(extractor.features(given), expected, atol=1e-6)


@pytest.mark.parametrize(("shape", "limit"), [((3, 32, 32), 3071), ((3, 256, 256), 1024), ((1, 28, 28), 100)])
def test_the_squares_are_no_larger_than_the_limit_asks_for(shape, limit):
    side = pixels(shape, limit).info["square"]
    assert side > 1
    assert shape[0] * -(-shape[1] // (side - 1)) * -(-shape[2] // (side - 1)) > limit


def test_pixels_are_identified_by_shape_and_square():
    made = [pixels((1, 8, 8)), pixels((1, 8, 8), 16), pixels((1, 4, 16)), pixels((3, 8, 8))]
    assert len({extractor.hash for extractor in made}) == len(made)
    assert pixels((1, 8, 8)).hash == made[0].hash


def test_floating_images_have_the_pixels_of_their_png():
    given = torch.rand(3, 1, 8, 8, dtype=torch.float64) * 2.4 - 1.2
    extractor = pixels((1, 8, 8))
    levels = np.clip(np.round((given.numpy() + 1) * 127.5), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(extractor.features(given), extractor.features(levels))
    np.testing.assert_array_equal(extractor.features(given, batch_size=2), extractor.features(given))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pixels((0, 8, 8)), r"shape must be \(C, H, W\), each at least 1, got \(0, 8, 8\)"),
        (lambda: pixels((8, 8)), r"shape must be \(C, H, W\)"),
        (lambda: pixels((3, 8, 8), 2), "limit must be at least the 3 channels, got 2"),
        (lambda: pixels((1, 8, 8)).features(images(2)), r"images must be \(N, 1, 8, 8\), got \(2, 3, 8, 10\)"),
        (lambda: pixels((3, 8, 10)).features(images(2), 0), "batch_size must be at least 1, got 0"),
        (lambda: pixels((1, 1, 1)).features(np.full((1, 1, 1, 1), np.nan)), "NaN"),
    ],
)
def test_what_does_not_fit_pixels_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- DINOv2 ----


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory) -> Path:
    """A tiny random network, saved as the package saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    folder = tmp_path_factory.mktemp("dino") / "tiny"
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(dino_folder, tmp_path) -> Path:
    """A copy to damage."""
    copy = tmp_path / "tiny"
    copy.mkdir()
    for file in dino_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_dino_features_are_the_class_token_of_the_package(dino_folder):
    transformers = pytest.importorskip("transformers")
    extractor, given = load_dinov2(dino_folder), images(3)
    network = transformers.Dinov2Model.from_pretrained(str(dino_folder), local_files_only=True).eval()
    with torch.no_grad():
        expected = network(pixel_values=dino_input(torch.from_numpy(given))).pooler_output
    features = extractor.features(given, batch_size=2)
    assert (extractor.name, extractor.dims, extractor.shape) == ("dinov2_16", 16, "any")
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(features[0] - features[1]).max() > 1e-3


def test_dino_input_is_the_published_preprocessing():
    grey = images(1, (1, 30, 20))
    picture = Image.fromarray(grey[0, 0]).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    expected = (np.asarray(picture) / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(dino_input(torch.from_numpy(grey))[0], expected.transpose(2, 0, 1), atol=1e-5)


def test_dino_input_filters_against_aliases():
    """A pattern of single pixels, four times too fine for 224, becomes grey instead of moire."""
    stripes = torch.zeros(1, 1, 896, 896, dtype=torch.uint8)
    stripes[..., ::2] = 255
    inner = dino_input(stripes)[0, 0, 8:-8, 8:-8]
    assert abs(float(inner.mean()) - (0.5 - 0.485) / 0.229) < 0.05
    assert float(inner.std()) < 0.05


def test_the_hash_of_dino_is_of_the_weights(dino_folder, damaged):
    from safetensors.torch import load_file, save_file

    assert load_dinov2(dino_folder).hash == load_any_extractor(f"dinov2:{damaged}").hash
    tensors = load_file(damaged / "model.safetensors")
    tensors["layernorm.bias"] += 1
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    assert load_dinov2(damaged).hash != load_dinov2(dino_folder).hash


def test_dino_without_all_its_weights_is_refused(damaged):
    from safetensors.torch import load_file, save_file

    tensors = load_file(damaged / "model.safetensors")
    del tensors["layernorm.bias"]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weights of layernorm\.bias and 0 others are missing"):
        load_dinov2(damaged)


def test_dino_in_a_damaged_or_another_folder_is_refused(damaged, tmp_path):
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="cannot be read as DINOv2"):
        load_dinov2(damaged)
    (damaged / "model.safetensors").unlink()
    (damaged / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors; files of other kinds are pickles"):
        load_dinov2(damaged)
    (damaged / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(CheckpointError, match="model_type must be 'dinov2', got 'vit'"):
        load_dinov2(damaged)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_dinov2(tmp_path / "gone")


def test_dino_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"'dinov2' needs the package transformers: pip install 'fewstep\[dino\]'"):
        load_dinov2(tmp_path)


# ---- the entry to all ----


def test_the_shipped_extractor_pixels_and_a_folder_are_found():
    shipped = load_any_extractor("mnist_cnn", shape=(1, 28, 28))
    assert shipped.hash == load_any_extractor(EXTRACTORS["mnist_cnn"]).hash == load_extractor().hash
    assert load_any_extractor("pixels", shape=(3, 32, 32)).hash == pixels((3, 32, 32)).hash


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("inceptoin", None, "unknown extractor 'inceptoin'; did you mean 'inception'"),
        ("pixel", None, "did you mean 'pixels'"),
        ("dinov2", None, "did you mean .*dinov2:<folder>"),
        ("pixels", None, r"'pixels' needs the shape \(C, H, W\) of the images, got None"),
        ("mnist_cnn", (3, 32, 32), r"'mnist_cnn' takes images of shape \(1, 28, 28\), got \(3, 32, 32\)"),
        ("folder/that/is/not", None, "does not exist"),
    ],
)
def test_names_and_shapes_that_do_not_fit_are_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        load_any_extractor(name, shape=shape)


def test_images_of_other_channels_do_not_fit_an_extractor_of_any_size(dino_folder):
    with pytest.raises(ValueError, match=r"takes images of shape \(1 or 3, H, W\), got \(4, 8, 8\)"):
        load_any_extractor(f"dinov2:{dino_folder}", shape=(4, 8, 8))
    with pytest.raises(ValueError, match=r"images must be \(N, 1 or 3, H, W\), got \(2, 4, 8, 8\)"):
        load_dinov2(dino_folder).features(images(2, (4, 8, 8)))
