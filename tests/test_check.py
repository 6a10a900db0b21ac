"""`fewstep check`: every usual mistake in declaring a model is planted, and the verdict must name it and what mends it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from click.testing import CliRunner
from conftest import _network
from torch import Tensor

from bench.check import Verdict, check_model
from bench.cli import main
from bench.hypotheses import latent_ranges
from bench.mixture import GaussianMixture
from bench.network import Network
from bench.zoo import load_network
from distill.checkpoint import read_json
from samplers import EpsModel, sample, schedules

COUNT = 32
SCHEDULES = {
    "vp_linear": schedules.vp_linear(),
    "discrete": schedules.from_betas(np.linspace(1e-4, 0.02, 1000)),
    "edm": schedules.edm(),
    "flow": schedules.flow(),
}
KARRAS_PLACE = "(t**(1/7) - 0.41156) / 1.45856"


def karras(place: Tensor) -> Tensor:
    """The sigma at a share of EDM's steps, from 0.002 at 0 to 80 at 1 (Karras et al. 2022, equation 5)."""
    return (0.002 ** (1 / 7) + place * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7


@pytest.fixture(scope="module")
def patterns() -> GaussianMixture:
    """Twelve patterns of 16 numbers in [-1, 1], most of them dark, and little noise: structure, as images have it."""
    means = torch.rand(12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3 * 2 - 1
    return GaussianMixture.isotropic(means, 0.05)


@pytest.fixture(scope="module")
def exact(patterns: GaussianMixture) -> Any:
    """`exact(schedule, predicts)`: the model of the patterns, whatever its network predicts."""
    return lambda schedule, predicts="eps": EpsModel(_network(patterns, schedule, predicts), schedule, predicts)


@pytest.fixture(scope="module")
def data(patterns: GaussianMixture) -> Tensor:
    return patterns.sample(COUNT, 1)


def of(verdict: Verdict, family: str) -> dict[str, float]:
    return {row.name: row.error for row in verdict.rows if row.family == family}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "score", "flow", "edm"])
def test_what_is_declared_right_is_right(exact: Any, data: Tensor, name: str, predicts: str) -> None:
    verdict = check_model(exact(SCHEDULES[name], predicts), data)
    assert verdict.right, verdict.text
    assert verdict.mends == ()
    assert verdict.declared_error < 0.6
    assert next(row for row in verdict.rows if row.declared).best


@pytest.mark.parametrize("truth", ["eps", "x0", "v", "score", "flow"])
@pytest.mark.parametrize("declared", ["eps", "x0", "v", "score", "flow"])
def test_a_wrong_prediction_is_named(exact: Any, data: Tensor, truth: str, declared: str) -> None:
    if declared == truth:
        return
    verdict = check_model(EpsModel(exact(SCHEDULES["vp_linear"], truth).net, SCHEDULES["vp_linear"], declared), data)
    assert not verdict.right
    assert verdict.mends == (f'predicts="{truth}"',)
    assert f"predicts {truth}, not {declared} as declared" in verdict.text


def scaled(model: EpsModel, factor: Any, time: Any = lambda t: t) -> EpsModel:
    """A model declared as `model`, whose network takes its state times a factor and another time."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        inner = time(t)
        return model.net(x / factor(inner).view(-1, 1), inner)

    return EpsModel(net, model.schedule, model.predicts)


@pytest.mark.parametrize(
    ("name", "inverse", "mend"),
    [
        ("vp_linear", lambda t: t / 1000, "time_input=lambda t: 1000 * t"),
        ("vp_linear", lambda t: 1 - t, "time_input=lambda t: 1 - t"),
        ("flow", lambda t: 1 - t / 1000, "time_input=lambda t: 1000 * (1 - t)"),
        ("discrete", lambda t: 1000 * t, "time_input=lambda t: t / 1000"),
        ("discrete", lambda t: 999 - t, "time_input=lambda t: 999 - t"),
        ("edm", lambda t: torch.exp(4 * t), "time_input=lambda t: 0.25 * schedule.sigma_bar(t).log()"),
        ("edm", lambda t: torch.exp(-t / 2), "time_input=lambda t: 2 * schedule.lam(t)"),
        ("edm", lambda t: karras(t / 999), f"time_input=lambda t: 999 * {KARRAS_PLACE}"),
        ("edm", lambda t: karras(t), f"time_input=lambda t: {KARRAS_PLACE}"),
        ("edm", lambda t: karras(1 - t / 999), f"time_input=lambda t: 999 * (1 - {KARRAS_PLACE})"),
        ("edm", lambda t: karras(1 - t), f"time_input=lambda t: 1 - {KARRAS_PLACE}"),
        (
            "edm",
            lambda t: 0.002 * torch.exp(t / 999 * 10.5966),
            "time_input=lambda t: 999 * (t / 0.002).log() / 10.5966",
        ),
        ("edm", lambda t: 0.002 * torch.exp((1 - t) * 10.5966), "time_input=lambda t: 1 - (t / 0.002).log() / 10.5966"),
        (
            "edm",
            SCHEDULES["discrete"].sigma_bar,  # a network of DDPM, as the denoisers of k-diffusion take it
            "time_input=lambda t: schedules.from_betas(np.linspace(1e-4, 0.02, 1000)).t_of_lam(-t.log())",
        ),
    ],
)
def test_another_time_or_direction_is_named(exact: Any, data: Tensor, name: str, inverse: Any, mend: str) -> None:
    model = scaled(exact(SCHEDULES[name]), torch.ones_like, inverse)
    verdict = check_model(model, data)
    assert not verdict.right
    assert verdict.mends == (mend,)
    assert "the network takes time as" in verdict.text
    schedule = SCHEDULES[name]
    names = {"schedule": schedule, "schedules": schedules, "np": np}
    mended = EpsModel(model.net, schedule, time_input=eval(mend.removeprefix("time_input="), names))
    assert check_model(mended, data).right


def test_another_scale_of_the_input_is_named(exact: Any, data: Tensor) -> None:
    vp, edm = SCHEDULES["vp_linear"], SCHEDULES["edm"]
    verdict = check_model(scaled(exact(vp), lambda t: 1 / vp.alpha(t)), data)
    assert verdict.mends == ("net=lambda x, t, **cond: net(x / schedule.alpha(t).view(-1, 1, 1, 1), t, **cond)",)
    verdict = check_model(scaled(exact(edm), lambda t: (1 + t**2).rsqrt()), data)
    assert "takes its state as x/sqrt(alpha^2 + sigma^2)" in verdict.text


@pytest.mark.parametrize("ours", ["vp_linear", "flow"])
def test_an_edm_network_is_known_whatever_is_declared(exact: Any, data: Tensor, ours: str) -> None:
    schedule = SCHEDULES[ours]
    verdict = check_model(EpsModel(exact(schedule, "edm").net, schedule, "eps"), data)
    assert verdict.mends == ('predicts="edm"',)
    assert verdict.best_error < 0.6


def test_a_velocity_from_noise_to_data_is_known(exact: Any, data: Tensor) -> None:
    """As in the code of flow matching, where time runs from noise at 0 to data at 1 and the network predicts x0 - eps."""
    flow = SCHEDULES["flow"]
    net = exact(flow, "flow").net
    verdict = check_model(EpsModel(lambda x, t: -net(x, 1 - t), flow, "flow"), data)
    assert not verdict.right
    assert set(verdict.mends) == {
        'predicts="flow" and net=lambda x, t, **cond: -net(x, t, **cond)',
        "time_input=lambda t: 1 - t",
    }


def test_data_of_another_range_are_named(exact: Any, data: Tensor) -> None:
    model = exact(SCHEDULES["vp_linear"])
    half = check_model(model, 2 * data - 1)  # what it was trained on, thought to be [0, 1], brought to [-1, 1]
    assert half.mends == ("data as (x + 1) / 2, and samples back as 2 * samples - 1",)
    moved = check_model(model, (data + 20) / 2)
    assert not moved.right


def test_a_network_that_knows_nothing_is_no_ones_fault(data: Tensor) -> None:
    weights = torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    verdict = check_model(EpsModel(lambda x, t: (x @ weights).sin(), SCHEDULES["vp_linear"]), data)
    assert not verdict.right
    assert verdict.mends == ()
    assert "no convention makes this network denoise" in verdict.text


def test_a_network_with_a_table_of_times_is_checked_too(exact: Any, data: Tensor) -> None:
    schedule = SCHEDULES["discrete"]
    table, net = torch.arange(900.0, dtype=torch.float64), exact(schedule).net
    verdict = check_model(EpsModel(lambda x, t: net(x, table[t.long()]), schedule), data)
    assert verdict.right
    assert of(verdict, "time")["reversed: 999 - t"] == float("inf")


def test_what_these_data_do_not_tell_apart_is_said() -> None:
    """A pattern or its negative, and a network that looks at a sign: right at whatever time and scale it is given."""
    pattern = torch.linspace(0.5, 1.5, 256, dtype=torch.float64)
    data = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(16)[:, None] * pattern
    model = EpsModel(lambda x, t: (x @ pattern).sign()[:, None] * pattern, SCHEDULES["vp_linear"], "x0")
    verdict = check_model(model, data)
    assert verdict.right, verdict.text
    assert "do not tell it from" in verdict.text
    assert "time 'reversed: 1 - t'" in verdict.text
    assert "input 'x/alpha'" in verdict.text


def test_bad_arguments(exact: Any, data: Tensor) -> None:
    model = exact(SCHEDULES["vp_linear"])
    with pytest.raises(TypeError, match="model must be an EpsModel, got function"):
        check_model(lambda x, t: x, data)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="data must be a floating-point tensor"):
        check_model(model, data.long())
    with pytest.raises(ValueError, match="data must be at least 4 samples, got 3"):
        check_model(model, data[:3])
    with pytest.raises(ValueError, match="data must be finite and vary"):
        check_model(model, torch.zeros(8, 2))


# the shipped network and the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Tensor:
    network = load_network("mnist", "cpu", "fp32")
    return sample(network.model, "dpmpp-2m", steps=8, shape=(8, *network.shape), cond=network.cond(torch.arange(8)))


@pytest.fixture(scope="module")
def images(digits: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    pixels = ((digits.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    np.savez(folder / "digits.npz", images=pixels.numpy(), labels=np.arange(8))
    return folder / "digits.npz"


@pytest.mark.slow
def test_two_mistakes_at_once_on_the_shipped_network(digits: Tensor) -> None:
    network = load_network("mnist", "cpu", "fp32")
    wrong = EpsModel(network.model.net, network.model.schedule, "x0", lambda t: 1000 * t)
    verdict = check_model(wrong, digits, cond=network.cond)
    assert set(verdict.mends) == {f'predicts="{network.model.predicts}"', "time_input=None"}


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["check", *map(str, arguments)])


@pytest.mark.slow
def test_the_command_finds_the_shipped_network_right(images: Path) -> None:
    result = run("mnist", "--data", images, "--samples", 8)
    assert result.exit_code == 0, result.output
    assert "the interface is right" in result.output
    assert "declared best" in result.output


@pytest.mark.slow
def test_the_command_names_a_mistake_in_a_checkpoint(images: Path, tmp_path: Path) -> None:
    import json
    import shutil

    from bench.zoo import TEACHER

    folder = shutil.copytree(TEACHER, tmp_path / "model")
    config = read_json(folder / "config.json")
    assert config["predicts"] == "v"
    (folder / "config.json").write_text(json.dumps({**config, "predicts": "eps"}))
    result = run(folder, "--data", images, "--samples", 8)
    assert result.exit_code == 1, result.output
    assert "the network predicts v, not eps as declared" in result.output
    assert 'to mend it: predicts="v"' in result.output


def test_exact_problems_need_no_data() -> None:
    assert run("gmm").exit_code == 0


def test_a_latent_pipeline_is_checked_on_its_latents(tiny_folder: Any, tmp_path: Path) -> None:
    """Random weights know nothing: what counts is that images are encoded, and that it is said."""
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    result = run(tiny_folder(tiny.dit), "--data", tmp_path / "images.npz", "--samples", 4)
    assert result.exit_code == 1, result.output
    assert "no convention makes this network denoise" in result.output
    assert "latents without the VAE's scaling" in result.output


@pytest.fixture(scope="module")
def latents(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline, a file of images, their latents as the network takes them, and `exact(of)`: the model of other latents."""
    network = load_network(str(tiny_folder(tiny.dit)), "cpu", "fp32")
    path = tmp_path_factory.mktemp("patterns") / "images.npz"
    images = np.random.default_rng(0).integers(0, 256, (8, 3, 4, 4), dtype=np.uint8).repeat(4, 2).repeat(4, 3)
    np.savez(path, images=images)
    z = network.encode(torch.from_numpy(images).float() / 127.5 - 1)

    def exact(of: Tensor) -> Network:
        patterns = GaussianMixture.isotropic(of, 0.02 * float(of.std()))
        net = _network(patterns, network.model.schedule, "eps")
        model = EpsModel(lambda x, t, **cond: net(x, t), network.model.schedule)
        return replace(network, model=model)

    return network, path, z, exact


def test_latents_that_the_vaes_factor_should_not_scale(latents: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network trained on the VAE's own latents, in a folder whose config says 0.18215."""
    network, path, z, exact = latents
    monkeypatch.setattr("bench.zoo.load_network", lambda *_, **__: exact(z / network.space.scale))
    result = run("exact", "--data", path, "--samples", 8)
    assert result.exit_code == 1, result.output
    assert (
        "trained on data of range latents without the VAE's scaling and shift, and not on data as given"
        in result.output
    )
    assert "to mend it: latents as the VAE gives them: set scaling_factor to 1 and shift_factor to 0" in result.output
    monkeypatch.setattr("bench.zoo.load_network", lambda *_, **__: exact(z))
    assert run("exact", "--data", path, "--samples", 8).exit_code == 0


def test_latents_that_lack_the_vaes_scaling(latents: Any) -> None:
    _, _, z, exact = latents
    scale, shift = torch.full((1, 1, 1), 0.18215), torch.full((1, 1, 1), 0.3)
    verdict = check_model(exact((z - shift) * scale).model, z, ranges=latent_ranges(scale, shift))
    assert verdict.mends == (
        "latents as (z - shift_factor) * scaling_factor of the VAE's z, and samples back before it decodes them",
    )
    assert "trained on data of range latents with the VAE's scaling and shift, and not on data as given" in verdict.text
    assert latent_ranges(torch.ones(1, 1, 1), torch.zeros(1, 1, 1)) == []


def test_what_the_command_needs(images: Path, tmp_path: Path, tiny_folder: Any) -> None:
    result = run("mnist")
    assert result.exit_code == 2
    assert "--data must be given: images of shape (1, 28, 28)" in result.output
    result = run(tiny_folder(tiny.dit), "--data", images)
    assert result.exit_code == 2
    assert "has images of shape (1, 28, 28), model" in " ".join(result.output.split())


def test_a_pipelines_mistake_is_mended_in_its_folder(tmp_path: Path) -> None:
    """A pipeline whose network gives x0 exactly, of data that are one image, declared to give epsilon."""
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    torch.nn.init.zeros_(unet.conv_out.weight)
    unet.conv_out.bias.data = torch.tensor([0.8, -0.8, 0.8])
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    levels = np.array([0.8, -0.8, 0.8]).reshape(1, 3, 1, 1) + np.random.default_rng(0).normal(0, 0.02, (8, 3, 8, 8))
    np.savez(tmp_path / "images.npz", images=((levels + 1) * 127.5).round().astype(np.uint8))
    result = run(tmp_path / "ddpm", "--data", tmp_path / "images.npz", "--samples", 8)
    assert result.exit_code == 1, result.output
    assert "predicts x0, not eps as declared" in result.output
    assert '"prediction_type": "sample" in scheduler/scheduler_config.json' in result.output
