"""Make the students of a run the shipped ones of a name: `python -m bench.ship_students --run RUN --name mnist-progressive`."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from bench.command import plain_errors
from bench.shipped import ASSETS
from distill.checkpoint import load_checkpoint, save_checkpoint

LARGEST = 6_000_000  # bytes of a shipped checkpoint


def ship_students(run: Path, out: Path) -> dict[str, int]:
    """Write the students of a finished run in half precision, each to a folder in `out` of its name.

    Returns:
        For each, the bytes of its weights.

    Raises:
        ValueError: a run without students, or one too large to ship; then nothing is written.
        CheckpointError: a student that cannot be read.
    """
    folders = sorted(path.parent for path in (run / "students").glob("*/config.json"))
    students = {path.name: load_checkpoint(path) for path in folders if path.suffix not in (".new", ".old")}
    students = {name: student for name, student in students.items() if student.plans}
    if not students:
        raise ValueError(
            f"run: {run} has no students in {run / 'students'}; give the folder of a finished `fewstep distill`"
        )
    sizes = {}
    for name, student in students.items():
        sizes[name] = sum(2 * weight.numel() for weight in student.network.state_dict().values())
        if sizes[name] > LARGEST:
            raise ValueError(f"student {name} takes {sizes[name]} bytes in half precision; at most {LARGEST} may ship")
    for name, student in students.items():
        save_checkpoint(out / name, student, torch.float16)
    return sizes


@click.command()
@click.option("--run", required=True, type=click.Path(exists=True, path_type=Path), help="Folder of `fewstep distill`.")
@click.option("--name", required=True, help="By which suites know them, such as mnist-progressive.")
@plain_errors
def main(run: Path, name: str) -> None:
    """Make the students of a run the shipped ones of a name."""
    for student, size in ship_students(run, ASSETS / name).items():
        click.echo(f"{name}/{student}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
