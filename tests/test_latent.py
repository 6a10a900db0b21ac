"""Latent models: the VAE's factors, decoding in parts, pipelines with labels and prompts, and a benchmark that judges pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny_pipelines as tiny
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

from bench import judge as bench_judge
from bench.cli import main
from bench.network import Network
from bench.pipelines import load_pipeline
from bench.suite import load_suite
from bench.zoo import load_network
from samplers import sample
from samplers.adapters.latent import LatentSpace

diffusers = pytest.importorskip("diffusers")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Z = randn(3, 4, 8, 8)


def vae(**options: Any) -> nn.Module:
    return tiny._vae(**options).requires_grad_(False)


def ldm(folder: Path) -> Path:
    """An unconditional latent pipeline with a VQ model, as `LDMPipeline` saves it."""
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    vq = diffusers.VQModel(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=3,
        num_vq_embeddings=16,
    )
    diffusers.LDMPipeline(vqvae=vq, unet=unet, scheduler=diffusers.DDIMScheduler(clip_sample=False)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(file, images=np.random.default_rng(0).integers(0, 256, (200, 3, 16, 16), dtype=np.uint8))
    return file


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_judge, "CACHE", tmp_path / "cache")


# the latent space ----------------------------------------------------------------------------------------------------


def test_scaling_and_shift_are_those_of_the_config() -> None:
    own = vae(scaling_factor=0.36, shift_factor=0.12)
    space = LatentSpace.of(own, channels=4)
    assert torch.allclose(space.decode(Z), own.decode(Z / 0.36 + 0.12).sample, atol=1e-5)
    x = space.decode(Z).clamp(-1, 1)
    assert torch.allclose(space.encode(x), (own.encode(x).latent_dist.mean - 0.12) * 0.36, atol=1e-5)
    assert space.pixel_shape((4, 8, 6)) == (3, 16, 12)


def test_a_mean_and_a_deviation_for_each_channel() -> None:
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    own = vae(scaling_factor=0.5, latents_mean=mean, latents_std=std)
    z = Z * torch.tensor(std).view(1, 4, 1, 1) / 0.5 + torch.tensor(mean).view(1, 4, 1, 1)
    space = LatentSpace.of(own)
    assert torch.allclose(space.decode(Z), own.decode(z).sample, atol=1e-6)
    x = space.decode(Z).clamp(-1, 1)
    raw = own.encode(x).latent_dist.mean - torch.tensor(mean).view(1, 4, 1, 1)
    assert torch.allclose(space.encode(x), raw * 0.5 / torch.tensor(std).view(1, 4, 1, 1), atol=1e-6)


def test_slices_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    own, seen = vae(), list[int]()
    decode = own.decode
    whole = own.decode(Z / own.config.scaling_factor).sample
    monkeypatch.setattr(own, "decode", lambda z: seen.append(len(z)) or decode(z))  # type: ignore[func-returns-value]
    spaces = {slices: LatentSpace.of(own, slices=slices) for slices in (1, 2)}
    for slices, sizes in ((1, [1, 1, 1]), (2, [2, 1])):
        seen.clear()
        assert torch.allclose(spaces[slices].decode(Z), whole, atol=1e-5)
        assert seen == sizes
    assert spaces[1].decode(Z[:0]).shape == (0, 3, 16, 16)
    large = randn(1, 4, 24, 24)
    whole = spaces[1].decode(large)
    tiled = LatentSpace.of(own, tiles=True).decode(large)
    assert tiled.shape == whole.shape == (1, 3, 48, 48)
    assert not torch.equal(tiled, whole)


def test_latents_that_do_not_fit() -> None:
    own = vae()
    with pytest.raises(ValueError, match="vae works on latents of 4 channels, the network on 16"):
        LatentSpace.of(own, channels=16)
    space = LatentSpace.of(own)
    with pytest.raises(ValueError, match=r"latents must be \(B, 4, height, width\) for this VAE, got \(2, 3, 8, 8\)"):
        space.decode(randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="latents are on meta, the vae on cpu; move one of them"):
        space.decode(Z.to("meta"))
    with pytest.raises(ValueError, match="pixels must have sides that 2 divides"):
        space.encode(randn(2, 3, 15, 16))
    with pytest.raises(ValueError, match="slices must be at least 1, got 0"):
        LatentSpace.of(own, slices=0)
    with pytest.raises(TypeError, match="vae must be a module with decode and a config"):
        LatentSpace.of(nn.Linear(2, 2))


# pipelines -----------------------------------------------------------------------------------------------------------


def test_an_unconditional_latent_pipeline_gives_its_own_images(tmp_path: Path) -> None:
    network = load_network(str(ldm(tmp_path)), "cpu", "fp32")
    assert (network.shape, network.pixel_shape, network.classes) == ((3, 8, 8), (3, 16, 16), 0)
    pipeline = diffusers.LDMPipeline.from_pretrained(tmp_path, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(generator=torch.Generator().manual_seed(5), num_inference_steps=4, output_type="np").images
    start = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    nodes = network.model.schedule.sigma_bar(np.array([750.0, 500.0, 250.0, 0.0]))
    # diffusers' DDIM ends at alphas_cumprod = 1 and takes its start as it is
    pipeline.scheduler.set_timesteps(4)
    x = sample(network.model, "ddim", x_T=start, sigmas=[*nodes.tolist(), 0.0])
    ours = (network.decode(x) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - theirs).max() < 1e-4


def test_labels_with_guidance_give_the_images_of_dit(tiny_folder: Any) -> None:
    folder = tiny_folder(tiny.dit)
    network = load_pipeline(str(folder), "cpu", "fp32", guidance=3.0)
    assert (network.shape, network.classes, network.null_label) == ((4, 8, 8), 1000, 1000)
    pipeline = diffusers.DiTPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    how = {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "np"}
    theirs = pipeline([3, 7], generator=torch.Generator().manual_seed(5), **how).images
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    nodes = network.model.schedule.sigma_bar(pipeline.scheduler.timesteps.double().numpy())
    x = sample(network.model, "ddim", x_T=start, sigmas=[*nodes.tolist(), 0.0], cond=network.condition(labels=[3, 7]))
    ours = (network.decode(x) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - theirs).max() < 1e-4
    with pytest.raises(ValueError, match=r"labels: model .* takes labels 0 \.\. 1000, got \[1001\]"):
        network.condition(labels=[1001])
    with pytest.raises(ValueError, match="prompts must be None: model .* takes no text"):
        network.condition(prompts=["a cat"])


@pytest.mark.parametrize("builder", ["stable_diffusion", "stable_diffusion_xl", "sd3", "flux", "pixart", "auraflow"])
def test_prompts_are_encoded_as_the_pipeline_does(tiny_folder: Any, builder: str) -> None:
    """What the pipeline's own call hands to its network."""
    folder = tiny_folder(getattr(tiny, builder))
    network = load_pipeline(str(folder), "cpu", "fp32", size=16, prompts=("a cat", "dog"))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    calls: list[dict[str, Any]] = []
    net = getattr(pipeline, name)
    net.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    how = {"guidance_scale": 3.5 if builder == "flux" else 1.0}
    if builder == "pixart":  # which else goes to the nearest of its own sizes, and to its libraries for captions
        how |= {"use_resolution_binning": False, "clean_caption": False}
    pipeline(["a cat", "dog"], num_inference_steps=1, height=16, width=16, output_type="latent", **how)
    theirs = {**calls[0], **(calls[0].get("added_cond_kwargs") or {})}
    ours = network.cond(torch.arange(2))
    assert ({"encoder_hidden_states"} < set(ours)) != (builder in ("stable_diffusion", "auraflow"))
    for key, value in ours.items():
        assert torch.allclose(value, theirs[key].to(value.dtype), atol=1e-5), key
    assert torch.equal(network.cond(torch.arange(3))["encoder_hidden_states"][2], ours["encoder_hidden_states"][0])
    null = network.null(3)
    assert null["encoder_hidden_states"].shape[0] == 3
    assert (builder == "stable_diffusion_xl") == (not null["encoder_hidden_states"].any())
    assert sample_of(network, 2).isfinite().all()


def sample_of(network: Network, count: int) -> Tensor:
    cond = network.cond(torch.arange(count))
    return network.decode(sample(network.model, "euler", shape=(count, *network.shape), steps=2, cond=cond))


def test_guidance_with_prompts_is_the_formula(tiny_folder: Any) -> None:
    folder = str(tiny_folder(tiny.stable_diffusion))
    plain = load_pipeline(folder, "cpu", "fp32", prompts=("a cat", "dog"))
    guided = load_pipeline(folder, "cpu", "fp32", prompts=("a cat", "dog"), guidance=4.0)
    cond, null = plain.cond(torch.arange(2)), plain.null(2)
    wanted = torch.lerp(plain.model(Z[:2], 300.0, **null), plain.model(Z[:2], 300.0, **cond), 4.0)
    assert torch.allclose(guided.model(Z[:2], 300.0, **cond), wanted, atol=1e-4)
    assert len({plain.hash, guided.hash, load_pipeline(folder, "cpu", "fp32").hash}) == 3
    guided.meter.begin()
    guided.model(Z[:2], 300.0, **cond)
    assert (guided.meter.calls, guided.meter.evaluations) == (1, 4)
    with pytest.raises(ValueError, match="guidance=4 guides towards prompts, of which none are given"):
        load_pipeline(folder, "cpu", "fp32", guidance=4.0)


def test_what_cannot_be_a_latent_model_is_an_error(tiny_folder: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"takes more than the latents \(9 channels in, 4 out\)"):
        load_pipeline(str(tiny_folder(tiny.inpaint)), "cpu", "fp32")
    with pytest.raises(ValueError, match="UNetMotionModel, which makes videos"):
        load_pipeline(str(tiny_folder(tiny.animatediff)), "cpu", "fp32")
    with pytest.raises(ValueError, match="size must be a multiple of 4 pixels, got 18"):
        load_pipeline(str(tiny_folder(tiny.flux)), "cpu", "fp32", size=18)
    with pytest.raises(ValueError, match="no condition that stands for none"):
        load_pipeline(str(ldm(tmp_path)), "cpu", "fp32", guidance=2.0)
    with pytest.raises(FileNotFoundError, match=r"prompts 'no\.txt': there is no such file"):
        load_pipeline(str(tiny_folder(tiny.stable_diffusion)), "cpu", "fp32", prompts="no.txt")
    with pytest.raises(ValueError, match="prompts is for a pipeline of diffusers; model 'mnist' is none"):
        load_network("mnist", "cpu", "fp32", prompts=("a cat",))
    with pytest.raises(ValueError, match="on the hub, .*such as hf:owner/name"):
        load_network("owner/name", "cpu", "fp32")


# the suite -----------------------------------------------------------------------------------------------------------


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["bench", "latent", *map(str, arguments)])


@pytest.mark.slow
def test_the_latent_suite_judges_and_shows_pixels(tiny_folder: Any, images: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\ndog\n")
    suite = load_suite("latent").changed(["ddim"], prompts=str(tmp_path / "prompts.txt"))
    assert suite.reading["prompts"] == str(tmp_path / "prompts.txt")
    arguments = ["--model", tiny_folder(tiny.stable_diffusion), "--prompts", tmp_path / "prompts.txt", "--scale", 3]
    arguments += ["--extractor", "pixels", "--reference", images, "--num-samples", 24, "--batch-size", 10]
    arguments += ["--nfe", 2, "--samplers", "ddim,dpmpp-2m", "--out", tmp_path / "out"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert table["metric"].tolist() == ["fd_pixels"] * 3
    assert table["status"].tolist() == ["done"] * 3
    rows = table[table["role"] == "sampler"]
    assert (rows["evaluations"] == 4).all()  # two calls, each of a doubled batch
    assert (rows["nfe"] == 2).all()
    with Image.open(tmp_path / "out" / "samples" / "ddim-nfe2.png") as picture:
        assert picture.mode == "RGB"
    assert run(*arguments).exit_code == 0  # and measures nothing again
    assert pd.read_csv(tmp_path / "out" / "table.csv")["seconds"].tolist() == table["seconds"].tolist()


@pytest.mark.slow
def test_the_latent_suite_on_a_pixart_from_the_hub(
    tiny_folder: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a hub that is a folder: what is asked of it is the id, and that it may be downloaded."""
    load, asked = diffusers.DiffusionPipeline.from_pretrained, list[tuple[Any, dict[str, Any]]]()

    def from_pretrained(place: Any, **how: Any) -> Any:
        asked.append((place, dict(how)))
        return load(tiny_folder(tiny.pixart), **{**how, "local_files_only": True})

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    (tmp_path / "prompts.txt").write_text("a cat\ndog\n")
    arguments = ["--model", "hf:owner/pixart", "--prompts", tmp_path / "prompts.txt", "--scale", 3]
    arguments += ["--extractor", "pixels", "--reference", images, "--num-samples", 8, "--batch-size", 8]
    arguments += ["--nfe", 2, "--samplers", "dpmpp-2m", "--out", tmp_path / "out"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert asked
    for place, how in asked:
        assert place == "owner/pixart"
        assert how == {"local_files_only": False, "use_safetensors": True}
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert table["status"].tolist() == ["done"] * 2
    assert set(table["model"]) == {"hf:owner/pixart"}
    assert table.loc[table["role"] == "sampler", "evaluations"].tolist() == [4]


def test_a_judge_on_the_command_line_has_two_parts(images: Path) -> None:
    result = run("--model", "x", "--extractor", "pixels")
    assert result.exit_code == 2
    assert "give --reference too" in result.output
