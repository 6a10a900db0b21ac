"""The command that makes pictures: `fewstep sample`."""

from __future__ import annotations

import ast
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.command import checked_device, integers_in, plain_errors

if TYPE_CHECKING:
    from torch import Tensor

    from bench.generate import Request
    from samplers.tasks import Result

_PATH = click.Path(path_type=Path)
_FILMED = 10  # samples in a film


@click.command()
@click.option(
    "--model", default="mnist", show_default=True, help="A model of the zoo, or a folder: see docs/models.md."
)
@click.option("--sampler", help="A registered name (fewstep samplers); by default dpmpp-2m, or a student's own plan.")
@click.option("--nfe", type=click.IntRange(min=1), help="Budget of network calls for each sample; by default 20.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps of the grid, instead of --nfe.")
@click.option("--grid", help="A grid's name; by default the sampler's own.")
@click.option("--num", type=click.IntRange(min=1), default=20, show_default=True, help="How many samples.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all noise.")
@click.option(
    "--out", type=_PATH, default="samples.png", show_default=True, help="A .png of all, a .npz, or a folder of PNGs."
)
@click.option(
    "--pixels/--latents",
    default=True,
    help="What of a latent model is written: images, or a .npz of what they are decoded from.",
)
@click.option("--trajectory", type=_PATH, help="The way to the first ten samples: a film strip .png, or a .gif.")
@click.option("--init-image", type=_PATH, help="Start from this image, noised.")
@click.option(
    "--strength", type=float, help="How much of the way is gone from --init-image, in (0, 1]; by default 0.6."
)
@click.option("--mask", type=_PATH, help="Paint where this image is white, and keep --init-image elsewhere.")
@click.option("--resamplings", type=int, help="With --mask: take every --jump steps so many times (RePaint).")
@click.option("--jump", type=int, help="With --resamplings: by default 1.")
@click.option("--class", "classes", help="Label, or several separated by commas, in turn; by default all in turn.")
@click.option("--prompt", "prompts", multiple=True, help="Of a model that takes text; repeatable, in turn.")
@click.option("--negative-prompt", "negative", default="", help="What --guidance leads away from.")
@click.option(
    "--guidance",
    type=float,
    help="Scale of classifier-free guidance: 1 is none. For a guided student, its weight and 1.",
)
@click.option(
    "--option", "options", multiple=True, metavar="NAME=VALUE", help="Of the sampler, as eta=0.5; repeatable."
)
@click.option("--device", default="cpu", show_default=True, help="Of torch: cpu, cuda, cuda:1.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="Of the network; fp16 on an accelerator.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=100, show_default=True, help="Does not change the samples."
)
@plain_errors
def sample(
    model: str,
    out: Path,
    pixels: bool,
    trajectory: Path | None,
    num: int,
    device: str,
    dtype: str,
    batch_size: int,
    **asked: Any,
) -> None:
    """Make samples of a model, and write them as pictures.

    With --init-image sampling starts from that image, with --mask it paints in it. Sample i of a seed is the same whatever
    --num and --batch-size are.
    """
    from bench.generate import pixels as decoded
    from bench.zoo import load_network
    from samplers import SamplingError

    _check_files(out, trajectory)
    if not pixels and out.suffix != ".npz":
        raise ValueError(f"--latents are numbers, not pictures: --out must end in .npz, got {str(out)!r}")
    network = load_network(model, checked_device(device), dtype)
    if not pixels and network.space is None:
        raise ValueError(f"--latents is for a latent model; samples of model {network.name} are what --pixels writes")
    if not network.images and not out.suffix:
        raise ValueError(f"--out {out}: samples of shape {network.shape} are no images; give a .png or a .npz")
    request = _request(network, **asked)
    if trajectory is not None and not network.images:
        raise ValueError(f"--trajectory shows images; samples of model {network.name} are of shape {network.shape}")
    begun = time.perf_counter()
    try:
        made, frames, evaluations = _run(request, num, batch_size, trajectory is not None)
    except SamplingError as error:
        raise click.ClickException(str(error)) from error
    samples = [decoded(request, result.x) if pixels else result.x.float().cpu() for result in made]
    seconds = time.perf_counter() - begun
    _write(samples, out, images=pixels and network.images)
    if trajectory is not None:
        _write_film(frames, trajectory)
    click.echo(
        _told(request, made, num, evaluations, seconds) + f" -> {out}" + (f", {trajectory}" if trajectory else "")
    )


def _request(
    network: Any,
    *,
    sampler: str | None,
    nfe: int | None,
    steps: int | None,
    grid: str | None,
    seed: int,
    init_image: Path | None,
    strength: float | None,
    mask: Path | None,
    resamplings: int | None,
    jump: int | None,
    classes: str | None,
    prompts: Sequence[str],
    negative: str,
    guidance: float | None,
    options: Sequence[str],
) -> Request:
    """What the options ask for, checked."""
    from bench.generate import DEFAULT_NFE, Request, read_image, read_mask
    from samplers.registry import get_sampler

    adaptive = sampler is not None and get_sampler(sampler).adaptive
    where = {name: value for name, value in (("nfe", nfe), ("steps", steps), ("grid", grid)) if value is not None}
    own = bool(network.plans) and sampler is None
    if nfe is None and steps is None and not adaptive and not own:
        where["nfe"] = DEFAULT_NFE
    for name, value, needed, given in (
        ("--strength", strength, "--init-image", init_image),
        ("--mask", mask, "--init-image", init_image),
        ("--resamplings", resamplings, "--mask", mask),
        ("--jump", jump, "--resamplings", resamplings),
    ):
        if value is not None and given is None:
            raise ValueError(f"{name} needs {needed}")
    if init_image is not None and not network.images:
        raise ValueError(
            f"--init-image needs a model of images; samples of {network.name} are of shape {network.shape}"
        )
    usual = 1.0 if mask is not None else 0.6
    task = {"strength": usual if strength is None else strength, "resamplings": resamplings, "jump": jump}
    request = Request(
        *(network, sampler, where, _options(options), seed),
        labels=() if classes is None else integers_in("--class", classes),
        prompts=prompts,
        negative=negative,
        guidance=guidance,
        image=None if init_image is None else read_image(init_image, network.pixel_shape[0]),
        mask=None if mask is None else read_mask(mask),
        task={name: value for name, value in task.items() if value is not None},
    )
    request.check()
    return request


def _options(texts: Sequence[str]) -> dict[str, Any]:
    """`eta=0.5` as {"eta": 0.5}: a value that is no Python literal is a word."""
    options: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise ValueError(f"--option takes NAME=VALUE, such as eta=0.5, got {text!r}")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def _check_files(out: Path, trajectory: Path | None) -> None:
    """Refuse what cannot be written before anything is sampled."""
    if out.suffix not in ("", ".png", ".npz"):
        raise ValueError(f"--out must end in .png or .npz, or be a folder's name without an ending, got {str(out)!r}")
    if not out.suffix and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out {out} exists and is no empty folder: its files would be mixed with the new ones")
    if trajectory is not None and trajectory.suffix not in (".png", ".gif"):
        raise ValueError(f"--trajectory must end in .png or .gif, got {str(trajectory)!r}")


def _run(request: Request, num: int, batch_size: int, film: bool) -> tuple[list[Result], list[Tensor], float]:
    """The batches, with a bar, the states of the first samples on their way, and the network's evaluations for a sample."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from bench.generate import filmed, generate

    frames: list[Tensor] = []
    keep = filmed(frames, request, min(num, _FILMED)) if film else None
    made, evaluations = [], 0
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("sample", total=num)
        # a film is of samples of the first batch
        for part in torch.arange(num).split(max(batch_size, _FILMED) if film else batch_size):

            def tell(progress: Any, part: Tensor = part) -> None:
                done = int(part[0])
                bar.update(task, completed=done + len(part) * progress.step / progress.steps)
                if keep is not None and done == 0:
                    keep(progress)

            result, counts = generate(request, part.to(request.network.device), tell)
            made.append(result)
            evaluations += counts.evaluations
    return made, frames, evaluations / num


def _write(samples: Sequence[Tensor], out: Path, images: bool) -> None:
    import numpy as np
    import torch
    from PIL import Image

    from bench.features import quantise
    from bench.plots import save_samples

    every = torch.cat(list(samples))
    if out.suffix == ".png":
        save_samples(every, out, images)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz" and images:
        np.savez_compressed(out, images=quantise(every).permute(0, 2, 3, 1).numpy())
        return
    if out.suffix == ".npz":
        np.savez_compressed(out, samples=every.numpy())
        return
    out.mkdir(exist_ok=True)
    for i, image in enumerate(quantise(every).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(out / f"{i:05d}.png")


def _write_film(frames: Sequence[Tensor], path: Path) -> None:
    import torch

    from bench.plots import save_animation, save_film

    states = torch.stack(list(frames), 1)
    (save_film if path.suffix == ".png" else save_animation)(states, path)


def _told(request: Request, made: Sequence[Result], num: int, evaluations: float, seconds: float) -> str:
    """What was made, in a line."""
    result, network = made[0], request.network  # any batch: they have one grid
    by = result.plan.sampler if result.plan else request.sampler
    calls = max(one.nfe for one in made)
    steps = f"{result.steps} step{'s'[: result.steps > 1]}"
    if request.image is not None:
        steps += f" from t={result.times[0]:.4g} on, strength {request.task['strength']:g}"
    guided = f", guidance {request.guidance:g}" if request.guidance is not None else ""
    if evaluations > calls:
        guided += f" ({evaluations:g} evaluations)"
    return (
        f"{num} sample{'s'[: num > 1]} of {network.name} by {by}: {steps}, {calls} network call{'s'[: calls > 1]} each"
        f"{guided}, seed {request.seed}, {seconds:.1f} s"
    )
