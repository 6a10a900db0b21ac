"""Inception-v3: torch-fidelity's network with random weights, a stand-in for it, and weights that must not be loaded."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import extractors
from bench.extractors import (
    INCEPTION_FILE,
    INCEPTION_VARIABLE,
    InceptionExtractor,
    load_any_extractor,
    load_inception,
)
from bench.metrics import metric_name
from distill.checkpoint import CheckpointError


def images(count: int, shape: tuple[int, int, int] = (3, 8, 10), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.fixture(scope="module")
def fidelity() -> Any:
    """torch-fidelity's module of the network, which itself needs no torchvision, though the package's other modules do."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchvision") is None:
            for name in ("", ".datasets", ".transforms", ".transforms.functional"):
                patch.setitem(sys.modules, f"torchvision{name}", types.ModuleType(f"torchvision{name}"))
            for name in ("CIFAR10", "CIFAR100", "STL10"):
                patch.setattr(sys.modules["torchvision.datasets"], name, object, raising=False)
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def weights(fidelity, tmp_path_factory) -> Path:
    """A file of random weights that keep the size of what goes through, with running averages that are not 0 and 1."""
    torch.manual_seed(0)
    empty = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:  # to build the network without a file
        patch.setattr(fidelity.torch, "load", lambda *_, **__: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = fidelity.FeatureExtractorInceptionV3("x", ["2048"], empty)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), file)
    return file


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def inception(weights) -> InceptionExtractor:
    return load_inception(weights, sha256=digest(weights))


def test_inception_has_2048_features_of_images_of_any_size(inception):
    features = inception.features(images(3))
    assert features.shape == (3, inception.dims) == (3, 2048)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    assert np.std(features, axis=0).max() > 0
    assert inception.features(images(1, (1, 40, 30))).shape == (1, 2048)
    assert inception.features(images(0)).shape == (0, 2048)


def resized_as_tensorflow(image: np.ndarray, size: int) -> np.ndarray:
    """(C, H, W) to (C, size, size): output i is at input i * in / size, with neither corners nor centres aligned."""
    channels, height, width = image.shape
    out = np.empty((channels, size, size))
    for i in range(size):
        y = i * height / size
        top, dy = int(y), y - int(y)
        below = min(top + 1, height - 1)
        for j in range(size):
            x = j * width / size
            left, dx = int(x), x - int(x)
            right = min(left + 1, width - 1)
            upper = (1 - dx) * image[:, top, left] + dx * image[:, top, right]
            lower = (1 - dx) * image[:, below, left] + dx * image[:, below, right]
            out[:, i, j] = (1 - dy) * upper + dy * lower
    return out


def test_inception_sees_images_resized_and_scaled_as_fid_does(inception, monkeypatch):
    seen = []
    first = torch.nn.Conv2d.forward

    def spy(module, x):
        if x.shape[1] == 3:
            seen.append(x.clone())
        return first(module, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", spy)
    given = images(1).astype(np.float64)
    inception.features(given / 127.5 - 1)
    expected = (resized_as_tensorflow(given[0], 299) - 128) / 128
    np.testing.assert_allclose(seen[0][0].numpy(), expected, atol=2e-5)


def test_the_features_are_those_of_the_package_alone(inception, fidelity, weights):
    network = fidelity.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(weights))
    given = images(2)
    features, logits = network(torch.from_numpy(given))
    np.testing.assert_allclose(inception.features(given), features.numpy(), rtol=1e-4, atol=1e-5)
    exact = np.exp(logits.double().numpy() - logits.double().numpy().max(1, keepdims=True))
    np.testing.assert_allclose(
        inception.probabilities(given), exact / exact.sum(1, keepdims=True), rtol=1e-3, atol=1e-6
    )


def test_grey_images_are_repeated_to_three_channels(inception):
    grey = images(2, (1, 8, 10))
    np.testing.assert_array_equal(inception.features(grey), inception.features(np.repeat(grey, 3, axis=1)))


def test_the_callers_autocast_and_precision_change_no_feature(inception):
    expected = inception.features(images(1))
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            np.testing.assert_array_equal(inception.features(images(1)), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


class StandIn(torch.nn.Module):
    """Takes its weights and its images as torch-fidelity's network does, and is small."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: Any) -> None:
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        assert isinstance(feature_extractor_weights_path, io.BytesIO), (
            "the file itself must never get here to be unpickled"
        )
        self.layer = torch.nn.Linear(3, 2048, bias=False)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert x.dtype == torch.uint8
        features = self.layer(x.float().mean((2, 3)))
        return features, features[:, :1008]


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """Weights of the stand-in, in whose place the network then is."""
    module = types.SimpleNamespace(FeatureExtractorInceptionV3=StandIn)
    monkeypatch.setattr(extractors, "_optional", lambda *_: module)
    file = tmp_path / "small.pth"
    torch.save({"layer.weight": torch.randn(2048, 3, generator=torch.Generator().manual_seed(0)) / 100}, file)
    return file


def test_the_networks_outputs_are_features_and_probabilities(small):
    extractor, given = load_inception(small, sha256=digest(small)), images(5)
    weight = torch.load(small, weights_only=True)["layer.weight"].numpy().astype(np.float64)
    expected = given.mean((2, 3)) @ weight.T
    np.testing.assert_allclose(extractor.features(given, batch_size=2), expected, rtol=1e-4, atol=1e-4)
    odds = np.exp(expected[:, :1008] - expected[:, :1008].max(1, keepdims=True))
    np.testing.assert_allclose(extractor.probabilities(given), odds / odds.sum(1, keepdims=True), rtol=1e-3)
    grey = given[:, :1]
    np.testing.assert_array_equal(extractor.features(grey), extractor.features(np.repeat(grey, 3, axis=1)))
    assert not hasattr(extractor, "classify")


def test_other_weights_than_the_standard_ones_are_not_called_inception(small, monkeypatch):
    other = load_inception(small, sha256=digest(small))
    assert other.name == f"inception_{digest(small)[:8]}"
    assert metric_name(other.name, 50_000) == f"fd_{other.name}"
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", digest(small)[:8])
    standard = load_inception(small, sha256=digest(small))
    assert (standard.name, standard.hash) == ("inception", other.hash)
    assert standard.info == {"weights": "small.pth", "sha256": digest(small)}


def test_the_hash_is_of_the_weights(small, tmp_path):
    file = tmp_path / "altered.pth"
    torch.save({"layer.weight": torch.load(small, weights_only=True)["layer.weight"] * 2}, file)
    assert load_inception(file, sha256=digest(file)).hash != load_inception(small, sha256=digest(small)).hash


def test_the_environment_variable_names_the_weights(small, monkeypatch):
    monkeypatch.setattr(load_inception, "__defaults__", (None, "cpu", digest(small)))
    monkeypatch.setenv(INCEPTION_VARIABLE, str(small))
    found = load_any_extractor("inception", shape=(1, 28, 28))
    assert found.name == f"inception_{digest(small)[:8]}"
    monkeypatch.delenv(INCEPTION_VARIABLE)
    assert load_any_extractor(f"inception:{small}").hash == found.hash


def test_weights_that_the_network_does_not_take_are_refused(small, tmp_path):
    file = tmp_path / "other.pth"
    torch.save({"layer.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(CheckpointError, match=r"other\.pth is of another network: RuntimeError"):
        load_inception(file, sha256=digest(file))


def test_weights_with_another_digest_are_refused(tmp_path):
    file = tmp_path / INCEPTION_FILE
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=rf"has SHA-256 {digest(file)[:16]}.*begins with 6726825d.*another file"):
        load_inception(file)


class Trap:
    """Unpickling it creates the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content, 2))], ids=["zip", "bare"]
)
def test_a_pickle_of_anything_but_tensors_is_refused_unread(save, tmp_path):
    file, trace = tmp_path / "weights.pth", tmp_path / "unpickled"
    save({"a": torch.zeros(1), "b": Trap(trace)}, file)
    with pytest.raises(CheckpointError, match="is not a file of tensors alone: UnpicklingError"):
        load_inception(file, sha256=digest(file))
    assert not trace.exists()
    torch.load(file, weights_only=False) if save is torch.save else pickle.loads(file.read_bytes())
    assert trace.exists(), "the trap does not work, so the test shows nothing"


@pytest.mark.parametrize("content", [b"", b"no pickle", [1, 2], torch.zeros(2), {"a": 1}], ids=str)
def test_files_that_hold_no_weights_are_refused(content, tmp_path):
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"weights\.pth (is not a file of tensors alone|must hold a dictionary)"):
        load_inception(file, sha256=digest(file))


def test_without_weights_the_error_says_which_and_from_where(monkeypatch, tmp_path):
    monkeypatch.delenv(INCEPTION_VARIABLE, raising=False)
    with pytest.raises(
        ValueError, match=rf"{INCEPTION_FILE}.*from https://.*'inception:<file>' or set FEWSTEP_INCEPTION"
    ):
        load_any_extractor("inception")
    with pytest.raises(CheckpointError, match=r"gone\.pth do not exist: get pt_inception.*https://"):
        load_any_extractor(f"inception:{tmp_path / 'gone.pth'}")
    monkeypatch.setenv(INCEPTION_VARIABLE, str(tmp_path / "gone.pth"))
    with pytest.raises(CheckpointError, match=r"gone\.pth \(from FEWSTEP_INCEPTION\) do not exist"):
        load_any_extractor("inception")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("torch_fidelity", r"needs the package torch-fidelity: pip install 'fewstep\[fid\]'"),
        ("torchvision", r"needs the package torch-fidelity, which needs torchvision: pip install 'fewstep\[fid\]'"),
    ],
)
def test_a_package_that_is_not_there_is_named(missing, message, monkeypatch, tmp_path):
    def refuse(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    file = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, file)
    monkeypatch.setattr(extractors.importlib, "import_module", refuse)
    with pytest.raises(ValueError, match=message):
        load_inception(file, sha256=digest(file))
