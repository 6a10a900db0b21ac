"""The command line: `fewstep bench`, `samplers`, `certify` and `speed`; `train` and `distill` are in `bench.training_cli`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bench.command import checked_device, plain_errors, resumable
from bench.training_cli import distill, train


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fewstep")
def main() -> None:
    """How few network calls can a diffusion model get away with, and with which sampler?"""


@main.command()
@click.argument("suite", default="mnist")
@click.option("--samplers", help="Rows to measure: labels of the suite or registered names, separated by commas.")
@click.option("--nfe", help="Budgets of network calls, separated by commas.")
@click.option("--num-samples", type=click.IntRange(min=2), help="Samples for each cell.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Samples for each network call; does not change them.")
@click.option("--seed", type=click.IntRange(min=0), help="Of all noise.")
@click.option("--model", help="A model of the zoo, or a checkpoint folder; a student gets a row of its own.")
@click.option(
    "--student", "students", multiple=True, metavar="LABEL=PATH", help="Folder of a student, or of several; repeatable."
)
@click.option("--guidance", type=float, help="Weight for networks that take one, as guided students do.")
@click.option("--device", default="cpu", show_default=True, help="Of torch: cpu, cuda, cuda:1, mps.")
@click.option(
    "--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True, help="Of the network."
)
@click.option("--out", type=click.Path(path_type=Path), help="Results folder; by default results/SUITE-SAMPLES.")
@plain_errors
def bench(
    suite: str,
    samplers: str | None,
    nfe: str | None,
    num_samples: int | None,
    batch_size: int | None,
    seed: int | None,
    model: str | None,
    students: tuple[str, ...],
    guidance: float | None,
    device: str,
    dtype: str,
    out: Path | None,
) -> None:
    """Measure a SUITE of samplers (by default: mnist) and write table, plot and pictures.

    A run that was stopped goes on where it stopped: type the same command again.
    """
    from bench.suite import load_suite

    changes: dict[str, Any] = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed}
    changes |= {"model": model, "guidance": guidance, "nfe": None if nfe is None else _integers("--nfe", nfe)}
    chosen = [] if samplers is None else _names(samplers)
    loaded = load_suite(suite)
    rows = [*_own_row(model or loaded.model), *_students(students)]
    resolved = loaded.changed(chosen, rows, **changes)
    folder = out or Path("results") / f"{resolved.name}-{resolved.num_samples}"
    _measure(resolved, folder, device, dtype)


def _measure(suite: Any, folder: Path, device: str, dtype: str) -> None:
    """Run the suite, then write and print what came out; on Ctrl-C say how to go on."""
    import torch
    from rich.console import Console

    from bench.report import write_results
    from bench.run import run_suite
    from bench.table import terminal
    from bench.zoo import load_model
    from distill.config import default_dtype

    device = checked_device(device)
    dtype = default_dtype(device) if dtype == "auto" else dtype
    console = Console()
    model = load_model(suite.model, device, dtype, suite.judge)
    console.print(
        f"suite {suite.name}: {len(suite.samplers)} rows x {len(suite.nfe)} budgets x {suite.num_samples} samples, "
        f"model {model.name}, {model.dtype} on {device}, {torch.get_num_threads()} threads -> {folder}",
        soft_wrap=True,
        highlight=False,
    )
    with resumable(f"finished cells are kept in {folder}, and the same command goes on from there"):
        rows = run_suite(suite, model, folder, device, console)
    title = write_results(suite, model, folder, device, rows)
    console.print(terminal(rows, model.judge.floor, title, suite.note))
    console.print(f"table, plot and pictures: {folder}", highlight=False, soft_wrap=True)


@main.command()
@click.option("--samplers", help="Registered names, separated by commas; by default all.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder; by default results/certificates, -part for a part."
)
@click.option("--quick", is_flag=True, help="One schedule and one grid, short runs: a look, not a certificate.")
@plain_errors
def certify(samplers: str | None, out: Path | None, quick: bool) -> None:
    """Certify order, parity with diffusers and equalities of every sampler.

    Takes about three minutes for all of them; exit code 1 if a certificate fails.
    """
    from rich.console import Console

    from bench.certify.report import certify as run

    names = None if samplers is None else _names(samplers)
    folder = out or Path("results/certificates" + ("-part" if quick or names else ""))
    if not run(names or (), folder, quick, Console()):
        raise SystemExit(1)


@main.command(name="samplers")
def list_all() -> None:
    """List every sampler with its order, calls for each step, grid, options and reference."""
    from samplers import list_samplers

    for s in list_samplers():
        noise = {"yes": "stochastic", "no": "deterministic"}.get(s.stochastic, f"stochastic by {s.stochastic}")
        click.echo(f"{s.name}: order {s.order}, {s.calls} call{'s'[: s.calls > 1]} a step, {noise}, grid {s.grid}")
        if s.options:
            options = ", ".join(f"{name}={default!r}" for name, default in s.options.items())
            click.echo(textwrap.fill(options, 78, initial_indent="    ", subsequent_indent="    "))
        click.echo(f"    {s.reference}")


@main.command()
@click.option("--samplers", help="Only these methods, separated by commas.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Of timing for each method and shape.",
)
@click.option("--device", default="cpu", show_default=True, help="Of torch: cpu, cuda, cuda:1.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder; by default results/speed, -part for a part, -cuda."
)
@plain_errors
def speed(samplers: str | None, seconds: float, device: str, out: Path | None) -> None:
    """Measure the samplers' own cost against diffusers' schedulers and the memory floor."""
    from rich.console import Console
    from rich.progress import track

    from bench.speed import METHODS, SHAPES, end_to_end, measure
    from bench.speed_report import write_speed
    from samplers.errors import unknown

    known = [method.sampler for method in METHODS]
    chosen = known if samplers is None else _names(samplers)
    for name in chosen:
        if name not in known:
            raise unknown("method", name, known)
    device, console = checked_device(device), Console()
    part = ("-part" if samplers else "") + ("" if device == "cpu" else f"-{device.split(':')[0]}")
    folder = out or Path(f"results/speed{part}")
    methods = [method for method in METHODS if method.sampler in chosen]
    cells = measure(methods, SHAPES, device, seconds)
    rows = list(track(cells, "speed", total=len(SHAPES) * len(methods), console=console))
    write_speed(rows, (), folder, device)  # kept whatever becomes of the rest
    console.print(write_speed(rows, list(end_to_end(device=device, seconds=seconds)), folder, device), soft_wrap=True)
    console.print(f"table and plot: {folder}", highlight=False, soft_wrap=True)


main.add_command(train)
main.add_command(distill)


def _own_row(model: str) -> list[Any]:
    """The row of a model that is a student itself; none for any other."""
    from bench.cells import STUDENT
    from bench.students import is_student
    from bench.suite import StudentSpec

    return [StudentSpec(student=model, label=STUDENT, untrained=True)] if is_student(model) else []


def _students(texts: Sequence[str]) -> list[Any]:
    from bench.suite import StudentSpec

    specs = []
    for text in texts:
        label, separator, path = text.partition("=")
        if not (separator and label and path):
            raise ValueError(f"--student takes LABEL=PATH, got {text!r}")
        specs.append(StudentSpec(student=path, label=label))
    return specs


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--samplers takes names separated by commas, got {text!r}")
    return names


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} takes integers separated by commas, got {text!r}") from error
