"""The command line: `fewstep certify`, `samplers` and `speed` here, the other commands in modules of their own."""

from __future__ import annotations

import textwrap
from pathlib import Path

import click

from bench.bench_cli import bench
from bench.check_cli import check
from bench.command import checked_device, names_in, plain_errors
from bench.explain_cli import explain
from bench.export_cli import export
from bench.fit_cli import fit
from bench.reading_cli import diff, doctor, merge, pick
from bench.sample_cli import sample
from bench.training_cli import distill, train


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fewstep")
def main() -> None:
    """How few network calls can a diffusion model get away with, and with which sampler?"""


@main.command()
@click.option("--samplers", help="Registered names, separated by commas; by default all.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder; by default results/certificates, -part for a part.",
)
@click.option("--quick", is_flag=True, help="One schedule and one grid, short runs: a look, not a certificate.")
@plain_errors
def certify(samplers: str | None, out: Path | None, quick: bool) -> None:
    """Certify order, parity with diffusers and equalities of every sampler.

    Takes about twenty minutes for all of them; exit code 1 if a certificate fails.
    """
    from rich.console import Console

    from bench.certify.report import certify as run

    names = None if samplers is None else names_in("--samplers", samplers)
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
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder; by default results/speed, -part for a part, -cuda.",
)
@plain_errors
def speed(samplers: str | None, seconds: float, device: str, out: Path | None) -> None:
    """Measure the samplers' own cost against diffusers' schedulers and the memory floor."""
    from rich.console import Console
    from rich.progress import track

    from bench.speed import SHAPES, end_to_end, measure, methods
    from bench.speed_report import write_speed
    from samplers.errors import unknown

    known = [method.sampler for method in methods()]
    chosen = known if samplers is None else names_in("--samplers", samplers)
    for name in chosen:
        if name not in known:
            raise unknown("method", name, known)
    device, console = checked_device(device), Console()
    part = ("-part" if samplers else "") + ("" if device == "cpu" else f"-{device.split(':')[0]}")
    folder = out or Path(f"results/speed{part}")
    timed = [method for method in methods() if method.sampler in chosen]
    cells = measure(timed, SHAPES, device, seconds)
    rows = list(track(cells, "speed", total=len(SHAPES) * len(timed), console=console))
    write_speed(rows, (), folder, device)  # kept whatever becomes of the rest
    console.print(write_speed(rows, list(end_to_end(device=device, seconds=seconds)), folder, device), soft_wrap=True)
    console.print(f"table and plot: {folder}", highlight=False, soft_wrap=True)


for command in (bench, sample, check, train, distill, fit, pick, diff, merge, doctor, export, explain):
    main.add_command(command)
