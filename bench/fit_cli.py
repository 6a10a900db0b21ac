"""The command that fits an exact model to images: `fewstep fit`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from bench.command import plain_errors

if TYPE_CHECKING:
    from bench.data import ImageData
    from bench.spectral import SpectralMixture

_PATH = click.Path(path_type=Path)
_SHOWN = 100  # samples in the picture


@click.command()
@click.option("--data", type=_PATH, required=True, help="Parquet file, image folder, zip or npz.")
@click.option(
    "--test", type=_PATH, help="Images that the fit does not see, likewise; their log-likelihood tells overfitting."
)
@click.option("--out", type=_PATH, required=True, help="Folder of the mixture; an earlier one in it is replaced.")
@click.option("--components", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--rank", type=click.IntRange(min=1), default=48, show_default=True, help="Directions of each, with their variance."
)
@click.option(
    "--dimensions",
    type=click.IntRange(min=2),
    default=96,
    show_default=True,
    help="Cosine coefficients that the directions are in, those of largest variance.",
)
@click.option("--bands", type=click.IntRange(min=1), default=96, show_default=True, help="Of the other coefficients.")
@click.option("--iterations", type=click.IntRange(min=1), default=100, show_default=True, help="At most.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the start.")
@click.option("--note", default="", help="What a reader of the file has to know of the data.")
@plain_errors
def fit(data: Path, test: Path | None, out: Path, note: str, **settings: int) -> None:
    """Fit a mixture of Gaussians to images: a model whose epsilon is exact, for benchmarks without a network's error.

    OUT is a model for `fewstep bench --model`; a picture of samples is in OUT/samples.png.
    """
    from bench.data import load_images
    from bench.fitting import bits_per_number
    from bench.mixture_file import load_mixture, save_mixture

    _check_free(out)
    images = {"train": load_images(data)} | ({} if test is None else {"test": load_images(test)})
    _check_alike(images)
    mixture, iterations = _fitted(images["train"], settings)
    files = {"train": data, "test": test}
    info: dict[str, Any] = {"data": {split: _described(content, files[split]) for split, content in images.items()}}
    info |= {"fit": settings | {"iterations": iterations}, "note": note}
    with TemporaryDirectory() as folder:  # half precision moves it a little: what is reported is what others load
        save_mixture(folder, mixture, info, half=True)
        stored = load_mixture(folder).mixture
    info["log_likelihood"] = {split: _likelihood(stored, x) for split, x in images.items()}
    digest = save_mixture(out, mixture, info, half=True)
    for split, nats in info["log_likelihood"].items():
        bits = bits_per_number(nats, mixture.dim)
        click.echo(f"{split}: log-likelihood {nats:.2f} nats for each image, {bits:.4f} bits for each number")
    size = sum(file.stat().st_size for file in out.iterdir())
    click.echo(f"{stored}, {size / 1e6:.2f} MB, hash {digest}: {out}")
    _draw(stored, out / "samples.png")


def _fitted(images: ImageData, settings: dict[str, int]) -> tuple[SpectralMixture, int]:
    """The mixture, and the iterations it took, with a bar."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from bench.fitting import Step, fit_mixture

    columns = (TextColumn("fit"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[reached]}"))
    done = 0
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("fit", total=settings["iterations"], reached="transforming")

        def show(step: Step) -> None:
            nonlocal done
            done = step.iteration
            moved = f", {step.reseeded} components moved" if step.reseeded else ""
            bar.update(task, completed=done, reached=f"log-likelihood {step.log_likelihood:.2f}{moved}")

        mixture = fit_mixture(images.images, **settings, progress=show)
        bar.update(task, total=done)
    return mixture, done


def _likelihood(mixture: Any, images: ImageData) -> float:
    from bench.fitting import log_likelihood

    return round(log_likelihood(mixture, images.images), 3)


def _described(data: ImageData, file: Path | None) -> dict[str, Any]:
    """What identifies a data set: the hash of its pixels, whatever file they come in."""
    from distill.checkpoint import content_hash

    assert file is not None, "a data set that was loaded has a file"
    return {"images": len(data), "hash": content_hash({"images": data.images}), "file": file.name}


def _check_alike(images: dict[str, ImageData]) -> None:
    shapes = {split: data.images.shape[1:] for split, data in images.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"--data and --test must be of one shape, got {shapes['train']} and {shapes['test']}")


def _check_free(out: Path) -> None:
    """Refuse a folder with other things in it, which a mixture would replace."""
    if out.exists() and not (out / "mixture.safetensors").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"--out {out} exists and is no mixture; give a new folder, or that of a mixture to replace"
        )


def _draw(mixture: Any, path: Path) -> None:
    from bench.plots import save_samples

    save_samples(mixture.sample(_SHOWN).float(), path, images=True)
