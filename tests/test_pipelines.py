"""Pipelines of diffusers as a benchmark's model, judged by an extractor and real images that a suite names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from click.testing import CliRunner

from bench import judge as bench_judge
from bench.cli import main
from bench.floor import HALVES, TEST
from bench.judge import JudgeSpec
from bench.pipelines import load_pipeline
from bench.zoo import load_model
from samplers import sample

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tiny_unet: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with random weights for three channels of 8 x 8 pixels, and images of that size."""
    folder = tmp_path_factory.mktemp("models")
    diffusers.DDPMPipeline(tiny_unet, diffusers.DDPMScheduler()).save_pretrained(folder / "ddpm")
    images = np.random.default_rng(0).integers(0, 256, (300, 3, 8, 8), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images)
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_judge, "CACHE", tmp_path / "cache")


def spec(folder: Path, **changes: Any) -> JudgeSpec:
    return JudgeSpec(**{"extractor": "pixels", "reference": str(folder / "images.npz"), **changes})


def test_a_pipeline_is_a_model(folder: Path) -> None:
    model = load_model(str(folder / "ddpm"), judge=spec(folder), num_samples=4)
    assert (model.shape, model.classes, model.dtype) == ((3, 8, 8), 0, "fp32")
    assert model.judge.metric == "fd_pixels"
    assert [(floor.what, floor.count) for floor in model.judge.floors(50)] == [(HALVES, 50)]
    with_test = load_model(str(folder / "ddpm"), judge=spec(folder, test=str(folder / "images.npz")), num_samples=4)
    assert [(floor.what, floor.count) for floor in with_test.judge.floors(1000)] == [(TEST, 300), (HALVES, 150)]
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder / "ddpm", local_files_only=True)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model.model.eps(x, 400.0), pipeline.unet(x, 400).sample, atol=1e-5)
    images = sample(model.model, "dpmpp-2m", nfe=3, shape=(4, 3, 8, 8))
    assert model.judge.features(images).shape == (4, 192)
    assert model.judge.samples is not None
    assert model.judge.samples().shape == (300, 192)


@pytest.mark.slow
def test_a_suite_runs_on_a_pipeline_with_its_own_judge(folder: Path, tmp_path: Path) -> None:
    suite = {
        "name": "mine",
        "model": str(folder / "ddpm"),
        "judge": {"extractor": "pixels", "reference": str(folder / "images.npz"), "test": str(folder / "images.npz")},
        "samplers": ["ddim"],
        "metrics": ["swd"],
        "nfe": [2],
        "num_samples": 24,
        "batch_size": 24,
        "teacher": {"sampler": "ddim", "nfe": 3},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(suite))
    result = CliRunner().invoke(main, ["bench", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert table["metric"].tolist() == ["fd_pixels"] * 2
    assert {"hashes_extractor", "hashes_reference"} <= set(table)


def test_what_cannot_be_a_model_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the shipped judge is for"):
        load_model(str(folder / "ddpm"))
    with pytest.raises(ValueError, match="unknown extractor 'pixles'; did you mean 'pixels'"):
        load_model(str(folder / "ddpm"), judge=spec(folder, extractor="pixles"))
    index = json.loads((folder / "ddpm" / "model_index.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model '.*broken' is no pipeline that can be loaded"):
        load_pipeline(str(broken), "cpu", "fp32")


def test_a_pickle_is_not_read(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pickled"
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder / "ddpm", local_files_only=True)
    pipeline.save_pretrained(copy, safe_serialization=False)
    assert list((copy / "unet").glob("*.bin"))
    with pytest.raises(ValueError, match="is no pipeline that can be loaded: .*safetensors only, as .bin is a pickle"):
        load_pipeline(str(copy), "cpu", "fp32")


def test_a_misspelt_key_of_the_scheduler_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "misspelt"
    shutil.copytree(folder / "ddpm", copy)
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "beta_strat": 0.00085}))
    with pytest.raises(
        ValueError, match="unknown key of the scheduler's config 'beta_strat'; did you mean 'beta_start'"
    ):
        load_pipeline(str(copy), "cpu", "fp32")
