"""Networks of EDM in the zoo, made by the code of their repository, a small stand-in for which is on the path here."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from bench.cli import main
from bench.network import Network
from bench.zoo import load_network
from distill.checkpoint import CheckpointError
from samplers import sample
from samplers.adapters.edm import eps_model_from_edm

NETWORKS = """
import torch
class EDMPrecond(torch.nn.Module):  # Karras et al. 2022, table 1, around a convolution
    def __init__(self, img_resolution, img_channels, label_dim=0, sigma_data=0.5):
        super().__init__()
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.label_dim, self.sigma_data = label_dim, sigma_data
        self.sigma_min, self.sigma_max = 0, float("inf")
        self.model = torch.nn.Conv2d(img_channels, img_channels, 3, padding=1)
        self.labels = torch.nn.Linear(max(label_dim, 1), img_channels)
    def forward(self, x, sigma, class_labels=None, force_fp32=False):
        sigma = sigma.reshape(-1, 1, 1, 1)
        total = sigma**2 + self.sigma_data**2
        F = self.model(x / total.sqrt())
        if class_labels is not None:
            F = F + self.labels(class_labels)[:, :, None, None]
        return self.sigma_data**2 / total * x + sigma * self.sigma_data / total.sqrt() * F
"""


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: Any) -> Any:
    """The repository's module of networks, on the path."""
    (tmp_path / "clone/training").mkdir(parents=True)
    (tmp_path / "clone/training/networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path / "clone")
    yield importlib.import_module("training.networks")
    for name in ("training", "training.networks"):
        sys.modules.pop(name, None)


def folder_of(path: Path, network: Any, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file(network.state_dict(), path / "edm.safetensors")
    arguments = {"img_resolution": 8, "img_channels": 3, "label_dim": network.label_dim}
    document = {"class": "training.networks.EDMPrecond", "arguments": arguments, **config}
    (path / "config.json").write_text(json.dumps(document))
    return path


def loaded(path: Path, **how: Any) -> Network:
    return load_network(f"edm:{path}", "cpu", **{"dtype": "fp32", **how})


def test_a_network_of_edm_samples_as_its_adapter_does(clone: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = clone.EDMPrecond(8, 3, label_dim=4).requires_grad_(False)
    model = loaded(folder_of(tmp_path / "net", network))
    assert (model.shape, model.classes, model.name) == ((3, 8, 8), 4, f"edm:{tmp_path / 'net'}")
    given = {"nfe": 4, "shape": (4, 3, 8, 8), "cond": model.cond(torch.arange(4))}
    expected = sample(eps_model_from_edm(network), "edm", **given)
    assert torch.equal(sample(model.model, "edm", **given), expected)
    assert model.meter.calls == 4
    half = loaded(tmp_path / "net", dtype="bf16")
    off = (sample(half.model, "edm", **given) - expected).abs().max()
    assert 0 < off < 0.05 * expected.abs().max()
    other = clone.EDMPrecond(8, 3, label_dim=4)
    assert loaded(folder_of(tmp_path / "other", other)).hash != model.hash


def test_the_benchmark_takes_a_folder_of_edm(clone: Any, tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "real.npz", images=np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8))
    folder = folder_of(tmp_path / "net", clone.EDMPrecond(8, 3))
    given = [
        "bench",
        "mnist",
        "--model",
        f"edm:{folder}",
        "--extractor",
        "pixels",
        "--reference",
        tmp_path / "real.npz",
    ]
    given += ["--nfe", 3, "--num-samples", 6, "--samplers", "ddim,edm", "--out", tmp_path / "out"]
    result = CliRunner().invoke(main, [str(part) for part in given])
    assert result.exit_code == 0, result.output
    assert "edm at 3 calls: fd_pixels" in result.output


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"class": "os.system"}, CheckpointError, "class must be of training.networks or .*, got 'os.system'"),
        (
            {"class": "training.networks.Nothing"},
            CheckpointError,
            "must be a network of training.networks, got 'Nothing'",
        ),
        (
            {"class": "training.networks_edm2.Precond"},
            ValueError,
            "put a clone of NVlabs/edm, or NVlabs/edm2, on PYTHONPATH",
        ),
        ({"arguments": {"img_resolution": 8, "img_channels": 1}}, CheckpointError, "cannot be made of config.json"),
        ({"arguments": {"side": 8}}, CheckpointError, "cannot be made of config.json and edm.safetensors: .*side"),
        ({"arguments": [8]}, CheckpointError, "the class and what it is made with, got"),
        ({"more": 1}, CheckpointError, "the class and what it is made with, got"),
    ],
)
def test_a_folder_that_is_none_is_refused(
    clone: Any, tmp_path: Path, config: dict[str, Any], error: type[Exception], message: str
) -> None:
    folder = folder_of(tmp_path / "net", clone.EDMPrecond(8, 3), **config)
    with pytest.raises(error, match=message):
        loaded(folder)


def test_a_folder_without_weights_is_refused(clone: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "net", clone.EDMPrecond(8, 3))
    (folder / "edm.safetensors").unlink()
    published = tmp_path / "published"
    published.mkdir()
    (published / "edm.pkl").touch()
    with pytest.raises(
        CheckpointError, match=r"edm\.pkl is a pickle, .* see docs/models\.md, EDM and EDM2, for how to"
    ):
        loaded(published)
    with pytest.raises(CheckpointError, match="must hold the weights as one .safetensors file, got 0"):
        loaded(folder)
    with pytest.raises(ValueError, match="python -m bench.cifar10 --data FOLDER .* or give hf:google/ddpm-cifar10-32"):
        load_network("runs/cifar10/teacher/model", "cpu", "fp32")
