"""The command that looks at a model before hours are spent on it: `fewstep check`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from bench.command import checked_device, plain_errors, wide_console

if TYPE_CHECKING:
    from torch import Tensor

    from bench.check import Cond, Verdict
    from bench.network import Network


@click.command()
@click.argument("model")
@click.option(
    "--data", help="Clean images that the model was trained on or near: a folder, zip, npz or Parquet file, or hf:NAME."
)
@click.option("--samples", type=click.IntRange(min=4), default=32, show_default=True, help="Images to try it on.")
@click.option("--prompts", help="Of a pipeline that takes text: a file with the images' captions, one a line.")
@click.option("--size", type=click.IntRange(min=1), help="Height and width in pixels, of a pipeline.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the noise.")
@click.option("--device", default="cpu", show_default=True, help="Of torch: cpu, cuda, cuda:1.")
@plain_errors
def check(
    model: str,
    data: str | None,
    samples: int,
    prompts: str | None,
    size: int | None,
    batch_size: int,
    seed: int,
    device: str,
) -> None:
    """Say whether MODEL is called as it was trained: prediction, time and its direction, scale of the input, range of the data.

    MODEL is a name of the zoo, a checkpoint folder, a diffusers pipeline's folder, or hf:ID. Every convention is tried on noised
    data, by the error of one denoising step. Exit code 1 if what the model declares does not fit.
    """
    from bench.check import check_model
    from bench.pipelines import is_pipeline
    from bench.zoo import load_network

    network = load_network(model, checked_device(device), "fp32", prompts=prompts or (), size=size)
    clean, cond = _data(network, data, samples)
    console = wide_console()
    how: dict[str, Any] = {"cond": cond, "ranges": _ranges(network), "batch_size": batch_size, "seed": seed}
    with console.status(f"{len(clean)} samples of {network.name}"):
        verdict = check_model(network.model, clean, **how)
    console.print(_table(verdict, f"{network.name} on {len(clean)} samples of {data or 'its own distribution'}"))
    console.print(verdict.text, markup=False, highlight=False, soft_wrap=True)
    for mend in verdict.mends:
        in_folder = _in_folder(mend) if is_pipeline(model) else ""
        console.print(f"to mend it: {mend}{in_folder}", markup=False, highlight=False, soft_wrap=True)
    if not verdict.right:
        raise SystemExit(1)


def _data(network: Network, path: str | None, samples: int) -> tuple[Tensor, Cond]:
    """Clean data in the model's own space, and their conditions.

    Raises:
        ValueError: none is given for a model that has none of its own, or images of another shape.
    """
    import torch

    from bench.data import load_images
    from bench.problems import load_problem

    problem = load_problem(network.name)
    if path is None and problem is not None:
        return problem.sample(samples, 1).float().to(network.device), network.cond
    if path is None:
        raise ValueError(
            f"--data must be given: images of shape {network.pixel_shape} that {network.name} was trained on"
        )
    found = load_images(path, samples)
    if found.images.shape[1:] != network.pixel_shape:
        raise ValueError(
            f"--data {path} has images of shape {found.images.shape[1:]}, model {network.name} takes {network.pixel_shape}"
        )
    pixels = torch.from_numpy(found.images).to(network.device).float() / 127.5 - 1.0
    if not network.classes or found.labels is None or int(found.labels.max()) >= network.classes:
        return network.encode(pixels), network.cond
    labels = torch.from_numpy(found.labels).to(network.device)
    return network.encode(pixels), lambda indices: {**network.cond(indices), "class_labels": labels[indices]}


def _in_folder(mend: str) -> str:
    """Where a pipeline's folder declares its prediction."""
    names = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
    told = [name for kind, name in names.items() if mend == f'predicts="{kind}"']
    return f'; in the folder: "prediction_type": "{told[0]}" in scheduler/scheduler_config.json' if told else ""


def _ranges(network: Network) -> list[Any]:
    """What latents may be beside the VAE's own, scaled as its config says."""
    from bench.hypotheses import latent_ranges

    space = network.space
    return [] if space is None else latent_ranges(space.scale.to(network.device), space.shift.to(network.device))


def _table(verdict: Verdict, title: str) -> Any:
    """Every convention with its error."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for name in ("question", "convention"):
        table.add_column(name, no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    before = ""
    for row in verdict.rows:
        if before and row.family != before:
            table.add_section()
        marks = " ".join(mark for mark, on in (("declared", row.declared), ("best", row.best)) if on)
        style = "" if not marks else "green" if row.best else "red"
        first = row.family if row.family != before else ""
        table.add_row(first, escape(row.name), f"{row.error:.3g}", marks, style=style)
        before = row.family
    return table
