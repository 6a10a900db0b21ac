"""The command that fits a mixture: what it writes, says and refuses."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from bench.fit_cli import fit
from bench.fitting import log_likelihood
from bench.mixture_file import load_mixture


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 120), ("test", 30)):
        coarse = rng.integers(0, 256, (count, 1, 2, 2)).repeat(4, 2).repeat(4, 3)
        np.savez(
            tmp_path / f"{split}.npz",
            images=np.clip(coarse + rng.integers(0, 30, (count, 1, 8, 8)), 0, 255).astype("u1"),
        )
    np.savez(tmp_path / "other.npz", images=np.zeros((30, 1, 4, 4), dtype=np.uint8))
    return tmp_path


def run(*arguments: object):
    return CliRunner().invoke(fit, [str(argument) for argument in arguments])


def small(folder) -> list[object]:
    settings = ["--components", 3, "--rank", 2, "--dimensions", 6, "--bands", 4, "--iterations", 5, "--seed", 1]
    return ["--data", folder / "train.npz", "--out", folder / "out", *settings]


def test_it_writes_a_mixture_with_what_it_knows_of_it(images):
    result = run(*small(images), "--test", images / "test.npz", "--note", "made up")
    assert result.exit_code == 0, result.output
    file = load_mixture(images / "out")
    assert file.mixture.shape == (1, 8, 8)
    assert len(file.mixture.inside.weights) == 3
    assert file.info["note"] == "made up"
    assert file.info["fit"] | {"iterations": 0} == {
        **{"components": 3, "rank": 2, "dimensions": 6, "bands": 4},
        **{"seed": 1, "iterations": 0},
    }
    assert {split: data["images"] for split, data in file.info["data"].items()} == {"train": 120, "test": 30}
    for split in ("train", "test"):
        nats = log_likelihood(file.mixture, np.load(images / f"{split}.npz")["images"])
        assert file.info["log_likelihood"][split] == pytest.approx(nats, abs=1e-3)
        assert f"{split}: log-likelihood {nats:.2f} nats" in result.output
    assert file.hash in result.output
    with Image.open(images / "out" / "samples.png") as picture:
        assert picture.size == (160, 160)


def test_the_same_command_gives_the_same_mixture(images):
    hashes = []
    for _ in range(2):
        assert run(*small(images)).exit_code == 0
        hashes.append(json.loads((images / "out" / "config.json").read_text())["hash"])
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--test", "other.npz"], "--data and --test must be of one shape"),
        (["--components", 100], "components must be at most 20 for 120 images and rank 2, got 100"),
        (["--rank", 6], "rank must be below the dimensions that are not in bands, 6, got 6"),
        (["--data", "none.npz"], "does not exist"),
        (["--out", "."], "exists and is no mixture"),
    ],
)
def test_what_it_refuses_in_one_line(images, monkeypatch, arguments, message):
    monkeypatch.chdir(images)
    result = run(*small(images), *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert (images / "train.npz").exists()
