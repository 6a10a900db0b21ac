import json
import shutil

import numpy as np
import pytest
import torch

from bench.metrics import frechet_distance
from bench.network import in_dtype, torch_dtype
from bench.ship_teacher import Verdict
from bench.shipped import ASSETS, shipped_students
from bench.zoo import TEACHER, load_model
from distill.checkpoint import CheckpointError
from distill.config import default_dtype
from distill.teacher import TeacherConfig
from samplers import sample


@pytest.fixture(scope="module")
def mnist():
    return load_model("mnist", dtype="fp32")


def digits(model, indices, **options):
    shape = (len(indices), *model.shape)
    return sample(model.model, "dpmpp-2m", shape=shape, indices=indices, cond=model.cond(indices), **options)


@pytest.mark.slow
def test_the_shipped_model_draws_the_digits_it_is_asked_for(mnist):
    indices = torch.arange(100)
    samples = digits(mnist, indices, nfe=6)
    assert samples.shape == (100, 1, 28, 28)
    agreement = np.mean(mnist.judge.classify(samples) == np.arange(100) % 10)
    assert agreement >= 0.9
    shuffled = digits(mnist, indices, nfe=6, seed=1)
    assert not torch.equal(samples, shuffled)


@pytest.mark.parametrize("size", [1, 7, 20])
def test_a_digit_is_the_same_in_any_batch(mnist, size):
    # the longest step of the recommended grid at 4 calls multiplies the network's own rounding to 1.01e-5
    few = {"nfe": 4, "grid": "logsnr"}
    whole = digits(mnist, torch.arange(20), **few)
    parts = torch.cat([digits(mnist, indices, **few) for indices in torch.arange(20).split(size)])
    assert (whole - parts).abs().max() < 1e-5


@pytest.mark.slow
def test_bf16_changes_the_digits_little(mnist):
    half = load_model("mnist", dtype="bf16")
    indices = torch.arange(20)
    difference = (digits(half, indices, nfe=6) - digits(mnist, indices, nfe=6)).abs()
    assert 0 < difference.mean() < 0.02


def test_a_network_in_half_precision_is_given_states_of_its_own_dtype_and_they_stay_in_float32():
    seen = []
    net = in_dtype(lambda x, t: seen.append((x.dtype, t.dtype)) or 0.5 * x, torch.float16)
    out = net(torch.full((2, 3), 1.0001), torch.ones(2))
    assert seen == [(torch.float16, torch.float32)]
    assert out.dtype == torch.float32
    assert out.tolist() == [[0.5] * 3] * 2


@pytest.mark.parametrize("name", ["mnist", str(TEACHER)])
def test_fp16_is_refused_on_a_processor(name):
    with pytest.raises(
        ValueError, match="dtype 'fp16' needs an accelerator, got device 'cpu'; accepted there: 'fp32', 'b"
    ):
        load_model(name, dtype="fp16")


def test_fp16_is_for_accelerators_and_not_for_training():
    assert torch_dtype("fp16", "cuda:1") == torch.float16
    assert torch_dtype("bf16", "cpu") == torch.bfloat16
    with pytest.raises(ValueError, match="unknown dtype 'half'; accepted: bf16, fp16, fp32"):
        torch_dtype("half", "cuda")
    with pytest.raises(ValueError, match="dtype"):
        TeacherConfig(dtype="fp16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_fp16_changes_the_digits_less_than_bf16():
    indices = torch.arange(20, device="cuda")
    made = {name: digits(load_model("mnist", "cuda", name), indices, nfe=6) for name in ("fp32", "fp16", "bf16")}
    differences = [float((made[name] - made["fp32"]).abs().mean()) for name in ("fp16", "bf16")]
    assert 0 < differences[0] < differences[1] < 0.02


def test_distances_have_their_names(mnist):
    assert mnist.judge.metric == "fd_mnist_cnn"
    assert frechet_distance(mnist.judge.reference.moments, mnist.judge.reference) < 1e-8
    assert load_model("gmm").judge.metric == "frechet"


def test_the_shipped_files_are_small():
    sizes = {path: path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()}
    students = {path for path in sizes if path.relative_to(ASSETS).parts[0] in shipped_students()}
    assert sum(size for path, size in sizes.items() if path not in students) < 6e6  # what the main job needs
    assert max(sizes.values()) < 6e6


def test_unknown_names_and_dtypes():
    with pytest.raises(ValueError, match="unknown model 'minst'; did you mean 'mnist'"):
        load_model("minst")
    with pytest.raises(
        ValueError, match="no such folder; did you mean 'mnist-progressive/1-step' or .*steps'\\? give mnist"
    ):
        load_model("mnist-progresive/1-step")
    with pytest.raises(ValueError, match="no such folder; give mnist, .*, such as hf:some/body"):
        load_model("some/body")
    with pytest.raises(ValueError, match="unknown dtype 'bf61'; did you mean 'bf16'"):
        load_model("mnist", dtype="bf61")
    assert default_dtype("cpu") in ("fp32", "bf16")


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(TEACHER, tmp_path / "model")


def test_a_folder_is_the_same_model_under_its_path(mnist, copy):
    other = load_model(str(copy))
    assert other.hash == mnist.hash
    assert other.name == str(copy)


def test_damaged_folders_are_refused(copy):
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(str(copy))
    (copy / "model.safetensors").write_bytes(weights)
    config = json.loads((copy / "config.json").read_text())
    config["network"]["widths"] = [64, 96]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="another architecture"):
        load_model(str(copy))


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        (Verdict(1.0, 5.0, 0.4, 0.96), "label agreement 0.960 is below 0.97"),
        (Verdict(1.3, 6.0, 0.4, 0.99), "above 3 x 0.400 of real images"),
        (Verdict(1.0, 3.9, 0.4, 0.99), "above a quarter of 3.900"),
        (Verdict(1.0, 5.0, 0.4, 0.99), None),
    ],
)
def test_the_bar_for_shipping(verdict, message):
    assert len(verdict.problems) == (message is not None)
    assert message is None or message in verdict.problems[0]
