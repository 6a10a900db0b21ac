"""`fewstep sample`: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from bench.cli import main
from bench.data import load_images
from bench.zoo import load_network
from distill.checkpoint import Checkpoint, save_checkpoint
from distill.network import PatchUNet
from distill.student import ddim_plan, load_student
from samplers import schedules


def run(*arguments):
    return CliRunner().invoke(main, ["sample", *map(str, arguments)])


def pixels(path):
    with Image.open(path) as picture:
        return np.array(picture)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with an untrained checkpoint of 8 x 8 digits in three classes, and a student of it for 2 and 3 calls."""
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = PatchUNet(size=8, patch=1, widths=[16, 16], layers=1, classes=3)
    schedule = schedules.cosine()
    save_checkpoint(folder / "tiny", Checkpoint(network, schedule, "v", {}))
    nodes = {n: np.linspace(schedule.t_max, schedule.t_min, n + 1) for n in (2, 3)}
    plans = {n: ddim_plan(schedule, t) for n, t in nodes.items()}
    save_checkpoint(folder / "student", Checkpoint(network, schedule, "v", {"student": {}}, plans))
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """An image and a mask whose lower half is white, of 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("given")
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(levels).save(folder / "image.png")
    Image.fromarray(np.where(np.arange(8)[:, None] < 4, 0, 255).astype(np.uint8).repeat(8, 1)).save(folder / "mask.png")
    return folder


def test_a_grid_of_images(tiny, tmp_path):
    result = run("--model", tiny / "tiny", "--num", 12, "--nfe", 3, "--out", tmp_path / "new" / "grid.png")
    assert result.exit_code == 0, result.output
    assert "12 samples of" in result.output
    assert "by dpmpp-2m: 3 steps, 3 network calls each, seed 0" in result.output
    assert pixels(tmp_path / "new" / "grid.png").shape == (32, 160)


def test_samples_do_not_depend_on_the_batch(tiny, tmp_path):
    for name, size, how in (("a", 100, ()), ("b", 2, ()), ("c", 100, ("--seed", 1))):
        run(
            "--model",
            tiny / "tiny",
            "--num",
            5,
            "--nfe",
            2,
            "--sampler",
            "ddpm",
            "--batch-size",
            size,
            *how,
            "--out",
            tmp_path / name,
        )
    a, b, c = (load_images(tmp_path / name).images for name in "abc")
    assert a.shape == (5, 1, 8, 8)
    assert np.abs(a.astype(int) - b).max() <= 1
    assert np.abs(a.astype(int) - c).max() > 10


def test_an_archive_for_other_tools(tiny, tmp_path):
    assert run("--model", tiny / "tiny", "--num", 3, "--nfe", 2, "--out", tmp_path / "x.npz").exit_code == 0
    assert load_images(tmp_path / "x.npz").images.shape == (3, 1, 8, 8)
    assert run("--model", "gmm-3", "--num", 7, "--nfe", 5, "--out", tmp_path / "y.npz").exit_code == 0
    assert np.load(tmp_path / "y.npz")["samples"].shape == (7, 3)
    assert run("--model", "gmm", "--num", 7, "--nfe", 5, "--out", tmp_path / "y.png").exit_code == 0
    assert pixels(tmp_path / "y.png").shape == (480, 480)  # of a palette


def test_the_library_makes_the_same(tmp_path):
    from samplers import sample

    run("--num", 2, "--sampler", "ddim", "--steps", 2, "--option", "eta=0.5", "--seed", 4, "--out", tmp_path / "out")
    network = load_network("mnist", "cpu", "fp32")
    cond = {"class_labels": torch.arange(2)}
    x = sample(network.model, "ddim", shape=(2, 1, 28, 28), steps=2, eta=0.5, seed=4, cond=cond)
    expected = ((x + 1) * 127.5).round().clamp(0, 255).numpy()
    assert np.abs(load_images(tmp_path / "out").images - expected).max() <= 1


def test_films(tiny, tmp_path):
    strip, film = tmp_path / "film.png", tmp_path / "film.gif"
    for path in (strip, film):
        made = run("--model", tiny / "tiny", "--num", 12, "--nfe", 4, "--out", tmp_path / "a.png", "--trajectory", path)
        assert made.exit_code == 0, made.output
        assert str(path) in made.output
    assert pixels(strip).shape == (10 * 16, 4 * 16)
    with Image.open(film) as moving:
        assert moving.n_frames == 4
        assert moving.size == (160, 16)
    last = pixels(strip)[:16, -16:]
    assert np.abs(last.astype(int) - pixels(tmp_path / "a.png")[:16, :16]).max() <= 3  # but for the scale at t_min


def test_classes_cycle(tiny, tmp_path):
    run("--model", tiny / "tiny", "--num", 4, "--nfe", 2, "--class", "1,2", "--out", tmp_path / "a")
    run("--model", tiny / "tiny", "--num", 4, "--nfe", 2, "--class", "2", "--out", tmp_path / "b")
    a, b = (load_images(tmp_path / name).images for name in "ab")
    assert np.abs(a[1::2].astype(int) - b[1::2]).max() <= 1
    assert (a[0] != b[0]).any()


def test_a_guided_student_is_given_the_scale_less_one(tiny, tmp_path):
    torch.manual_seed(3)
    network = PatchUNet(size=8, widths=[16, 16], classes=3, scalars=["guidance"]).eval()
    torch.nn.init.normal_(network.unet.conv_out.weight, std=0.1)
    schedule = schedules.cosine()
    plan = ddim_plan(schedule, (schedule.t_max, 0.5, schedule.t_zero))
    save_checkpoint(
        tmp_path / "s", Checkpoint(network, schedule, "v", {"student": {"guidance": [0.0, 4.0]}}, {2: plan})
    )
    own = "--model", tmp_path / "s", "--num", 3, "--nfe", 2
    assert run(*own, "--guidance", 3, "--out", tmp_path / "made").exit_code == 0
    cond = {"class_labels": torch.arange(3)}
    x = load_student(tmp_path / "s").sample(2, shape=(3, 1, 8, 8), cond=cond, guidance=2.0)
    expected = ((x + 1) * 127.5).round().clamp(0, 255).numpy()
    assert np.abs(load_images(tmp_path / "made").images - expected).max() <= 1
    outside = run(*own, "--guidance", 6, "--out", tmp_path / "no")
    assert outside.exit_code == 2
    assert "guidance must be in the range trained for, 0 to 4, got 5" in " ".join(outside.output.split())


def test_guidance_changes_the_samples(tiny, tmp_path):
    for name, scale, cost in (("a", 1, ""), ("b", 4, " (4 evaluations)")):
        made = run("--model", tiny / "tiny", "--num", 3, "--nfe", 2, "--guidance", scale, "--out", tmp_path / name)
        assert f"2 network calls each, guidance {scale}{cost}, seed" in made.output
    run("--model", tiny / "tiny", "--num", 3, "--nfe", 2, "--out", tmp_path / "plain")
    a, b, plain = (load_images(tmp_path / name).images.astype(int) for name in ("a", "b", "plain"))
    assert np.abs(a - plain).max() <= 1
    assert np.abs(b - plain).max() > 1


def test_image_to_image_reports_what_is_executed(tiny, given, tmp_path):
    image = ("--model", tiny / "tiny", "--num", 2, "--nfe", 10, "--init-image", given / "image.png")
    result = run(*image, "--strength", 0.3, "--out", tmp_path / "a")
    assert ": 3 steps from t=" in result.output
    assert "strength 0.3, 3 network calls each" in result.output
    assert "6 steps from" in run(*image, "--out", tmp_path / "b").output
    original = pixels(given / "image.png").astype(int)
    near, far = (np.abs(load_images(tmp_path / n).images[:, 0] - original).mean() for n in "ab")
    assert near < far


def test_inpainting_keeps_the_rest_to_the_level(tiny, given, tmp_path):
    how = ("--model", tiny / "tiny", "--num", 2, "--init-image", given / "image.png", "--mask", given / "mask.png")
    for name, more in (("a", ("--nfe", 4)), ("b", ("--nfe", 12, "--resamplings", 2, "--jump", 2))):
        result = run(*how, *more, "--sampler", "ddpm", "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        images, original = load_images(tmp_path / name).images[:, 0], pixels(given / "image.png")
        assert (images[:, :4] == original[:4]).all()
        assert (images[:, 4:] != original[4:]).mean() > 0.5
    assert "ddpm+resampled" in result.output


def test_students_sample_with_their_own_plans(tiny, tmp_path):
    made = run("--model", tiny / "student", "--num", 2, "--out", tmp_path / "a.png")
    assert "by ddim: 3 steps, 3 network calls each" in made.output
    assert "2 network calls each" in run("--model", tiny / "student", "--nfe", 2, "--out", tmp_path / "b.png").output
    wrong = run("--model", tiny / "student", "--nfe", 5, "--out", tmp_path / "c.png")
    assert "--nfe of [2, 3], got 5; or give --sampler" in " ".join(wrong.output.split())
    other = run("--model", tiny / "student", "--sampler", "heun", "--nfe", 4, "--out", tmp_path / "d.png")
    assert "by heun: 2 steps" in other.output


def test_error_controlled_samplers(tmp_path):
    made = run("--model", "gmm", "--sampler", "rk45", "--num", 3, "--option", "rtol=1e-3", "--out", tmp_path / "a.png")
    assert made.exit_code == 0, made.output
    short = run("--model", "gmm", "--sampler", "rk45", "--nfe", 9, "--out", tmp_path / "a.png")
    assert short.exit_code == 1
    assert "needs more than nfe=9 network calls" in short.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sampler", "dpmp-2m"), "did you mean 'dpmpp-2m'"),
        (("--sampler", "dpmpp-3s", "--nfe", "2", "--option", "final=denoise", "--option", "orders=[3]"), "orders"),
        (
            ("--sampler", "heun", "--nfe", "1", "--option", "final=denoise"),
            "nfe must be at least 2 for 'heun' here, got 1",
        ),
        (("--nfe", "3", "--steps", "3"), "exactly one of steps, nfe"),
        (("--class", "3"), "--class: model TINY has classes 0 .. 2, got 3"),
        (("--class", "one"), "--class takes integers separated by commas"),
        (("--prompt", "a cat"), "--prompt 'a cat': model TINY takes no text"),
        (("--negative-prompt", "a cat"), "--negative-prompt 'a cat': model TINY takes no text"),
        (("--strength", "0.5"), "--strength needs --init-image"),
        (("--mask", "MASK"), "--mask needs --init-image"),
        (("--init-image", "IMAGE", "--strength", "0"), "strength must lie in (0, 1], got 0.0"),
        (("--init-image", "IMAGE", "--strength", "1.5"), "strength must lie in (0, 1], got 1.5"),
        (("--init-image", "IMAGE", "--resamplings", "2"), "--resamplings needs --mask"),
        (("--init-image", "WIDE"), "--init-image must be 8 x 8 pixels in 1 channel for model TINY, got 9 x 8 pixels"),
        (("--init-image", "IMAGE", "--mask", "WIDE"), "--mask must be of the size of the image, 8 x 8 pixels"),
        (("--init-image", "gone.png"), "there is no file 'gone.png'"),
        (("--init-image", "FULL"), "is a folder; give an image file"),
        (("--init-image", "IMAGE", "--mask", "BLACK"), "--mask is white nowhere, so nothing would be painted"),
        (("--init-image", "IMAGE", "--mask", "ALPHA"), "--mask is white nowhere, so nothing would be painted"),
        (("--init-image", "TEXT"), "is not a readable image"),
        (("--option", "eta"), "--option takes NAME=VALUE"),
        (("--option", "etta=1"), "unknown option of sampler 'dpmpp-2m'"),
        (("--out", "a.jpg"), "--out must end in .png or .npz"),
        (("--out", "FULL"), "is no empty folder"),
        (("--latents",), "--latents are numbers, not pictures: --out must end in .npz"),
        (
            ("--latents", "--out", "NPZ"),
            "--latents is for a latent model; samples of model TINY are what --pixels writes",
        ),
        (("--trajectory", "a.mp4"), "--trajectory must end in .png or .gif"),
        (("--model", "gmm", "--trajectory", "a.gif"), "--trajectory shows images"),
        (("--model", "gmm", "--init-image", "IMAGE"), "--init-image needs a model of images"),
        (("--model", "gmm", "--guidance", "2"), "no condition that stands for none"),
        (("--model", "gmm", "--out", "OUT"), "are no images; give a .png or a .npz"),
        (("--dtype", "fp16"), "dtype 'fp16' needs an accelerator, got device 'cpu'"),
        (("--device", "cuda:99"), "--device 'cuda:99' cannot be used here"),
    ],
)
def test_mistakes_end_in_one_line(tiny, given, tmp_path, arguments, message):
    Image.new("L", (9, 8)).save(tmp_path / "wide.png")
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    drawn = Image.new("RGBA", (8, 8))
    drawn.putalpha(Image.open(given / "mask.png"))
    drawn.save(tmp_path / "alpha.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.png").touch()
    places = {"IMAGE": given / "image.png", "MASK": given / "mask.png", "WIDE": tmp_path / "wide.png"}
    places |= {
        "TEXT": tmp_path / "text.png",
        "FULL": tmp_path / "full",
        "OUT": tmp_path / "new",
        "NPZ": tmp_path / "new.npz",
        "BLACK": tmp_path / "black.png",
        "ALPHA": tmp_path / "alpha.png",
    }
    asked = [str(places.get(word, word)) for word in arguments]
    model = [] if "--model" in asked else ["--model", str(tiny / "tiny")]
    out = [] if "--out" in asked else ["--out", str(tmp_path / "a.png")]
    result = run(*model, *out, "--num", 2, *asked)
    assert result.exit_code == 2, result.output
    assert message.replace("TINY", str(tiny / "tiny")) in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "a.png").exists()


def test_a_folder_for_samples_that_are_no_images_is_refused_before_sampling(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.sample_cli._run", lambda *_: pytest.fail("it sampled"))
    result = run("--model", "gmm", "--out", tmp_path / "new")
    assert "are no images; give a .png or a .npz" in result.output


def test_an_image_in_colour_becomes_grey_for_a_grey_model(tiny, tmp_path):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    made = run("--model", tiny / "tiny", "--num", 1, "--init-image", tmp_path / "red.png", "--out", tmp_path / "a.png")
    assert made.exit_code == 0, made.output


def test_a_latent_pipeline_with_prompts(tiny_folder, tmp_path):
    import tiny_pipelines

    model = ("--model", tiny_folder(tiny_pipelines.stable_diffusion), "--num", 2, "--nfe", 2)
    made = run(*model, "--prompt", "a cat", "--guidance", 3, "--negative-prompt", "a dog", "--out", tmp_path / "a")
    assert made.exit_code == 0, made.output
    run(*model, "--prompt", "a cat", "--out", tmp_path / "b")
    a, b = (load_images(tmp_path / name).images for name in "ab")
    assert a.shape == (2, 3, 16, 16)
    assert (a != b).any()
    raw = run(*model, "--prompt", "a cat", "--latents", "--out", tmp_path / "b.npz")
    assert raw.exit_code == 0, raw.output
    latents = np.load(tmp_path / "b.npz")["samples"]
    assert (latents.shape, latents.dtype) == ((2, 4, 8, 8), np.float32)
    space = load_network(str(model[1]), "cpu", "fp32").space
    same = ((space.decode(torch.from_numpy(latents)) + 1) * 127.5).round().clamp(0, 255).numpy()
    assert np.abs(same - b).max() <= 1
    Image.fromarray(a[0].transpose(1, 2, 0)).save(tmp_path / "image.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 9:] = 255  # not a whole number of latents
    Image.fromarray(mask).save(tmp_path / "mask.png")
    within = ("--init-image", tmp_path / "image.png", "--mask", tmp_path / "mask.png", "--out", tmp_path / "c")
    assert run(*model, *within, "--trajectory", tmp_path / "c.gif").exit_code == 0
    assert (load_images(tmp_path / "c").images[..., :9] == a[0][..., :9]).all()
    from_image = run(*model, "--init-image", tmp_path / "image.png", "--strength", 0.5, "--out", tmp_path / "d.png")
    assert "1 step from t=" in from_image.output
