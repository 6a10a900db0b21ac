import pickle

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from bench.cli import main
from bench.plots import save_samples
from samplers.registry import SAMPLERS


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_bench_prints_the_table_and_writes_the_results(tmp_path):
    result = run(
        "bench", "gmm", "--nfe", "3,6", "--num-samples", "50", "--samplers", "ddim,dpmpp-2m", "--out", tmp_path
    )
    assert result.exit_code == 0, result.output
    assert "NFE 3" in result.output
    assert " *" in result.output  # the best of each budget is marked
    for name in ("table.csv", "table.md", "frontier.png", "provenance.json", "samples/ddim-nfe3.png"):
        assert (tmp_path / name).exists()
    assert set(pd.read_csv(tmp_path / "table.csv")["label"]) == {"ddim", "dpmpp-2m", "heun"}


def test_the_default_folder_is_named_after_suite_and_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("bench", "gmm", "--nfe", "2", "--num-samples", "20", "--samplers", "ddim").exit_code == 0
    assert (tmp_path / "results" / "gmm-20" / "table.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "mnits"], "did you mean 'mnist'"),
        (["bench", "gmm", "--samplers", "dpmp-2m"], "did you mean 'dpmpp-2m'"),
        (["bench", "gmm", "--model", "mnis"], "did you mean 'mnist'"),
        (["bench", "gmm", "--nfe", "5,x"], "--nfe takes integers separated by commas, got '5,x'"),
        (["bench", "gmm", "--nfe", "0"], "nfe: must be at least 1"),
        (["bench", "gmm", "--device", "cudda"], "--device 'cudda' cannot be used here"),
        (["bench", "gmm", "--dtype", "fp8"], "fp8"),
        (["bench", "gmm", "--num-samples", "1"], "--num-samples"),
        (["train", "--data", "nowhere.parquet", "--out", "runs/x"], "'nowhere.parquet' does not exist"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "results").exists()


def test_an_unknown_grid_in_a_suite_is_named(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(
        "{name: s, model: gmm, nfe: [2], num_samples: 8, samplers: [{sampler: ddim, grid: karass}],"
        " teacher: {sampler: ddim, nfe: 4}}"
    )
    result = run("bench", path, "--out", tmp_path / "o")
    assert result.exit_code == 2
    assert "unknown grid 'karass'; did you mean 'karras'" in result.output


def test_a_pickled_model_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps({"weights": 1}))
    result = run("bench", "mnist", "--model", path, "--out", tmp_path / "o")
    assert result.exit_code == 2
    assert "pickle" in result.output


def test_samplers_are_listed():
    result = run("samplers")
    assert result.exit_code == 0
    for name, entry in SAMPLERS.items():
        assert f"{name}: order {entry.order}, " in result.output
        assert entry.reference in result.output
        assert all(f"{option}=" in result.output for option in entry.options)
    assert max(map(len, result.output.splitlines())) <= 80


def test_a_picture_shows_sample_k_at_row_k_div_10(tmp_path):
    images = torch.linspace(-1, 1, 23).view(23, 1, 1, 1).expand(23, 1, 4, 4)
    save_samples(images, tmp_path / "a.png", images=True)
    with Image.open(tmp_path / "a.png") as picture:
        picture.load()
    assert picture.size == (80, 24)
    for k in (0, 9, 13, 22):
        assert picture.getpixel((8 * (k % 10) + 3, 8 * (k // 10) + 5)) == round(float(images[k, 0, 0, 0] + 1) * 127.5)
