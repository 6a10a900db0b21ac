"""The command that measures: `fewstep bench`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from bench.command import FAILED, TIME_OVER, integers_in, names_in, plain_errors, resumable, wide_console


@click.command()
@click.argument("suite", default="mnist")
@click.option("--samplers", help="Rows to measure: labels of the suite or registered names, separated by commas.")
@click.option("--nfe", help="Budgets of network calls, separated by commas.")
@click.option("--num-samples", type=click.IntRange(min=2), help="Samples for each cell.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Samples for each network call; does not change them.")
@click.option("--seed", help="Of all noise; or several, separated by commas, with a cell for each.")
@click.option("--metrics", help="Beside the Frechet distance, separated by commas, such as kid,rmse.")
@click.option(
    "--model",
    help="A model of the zoo, a checkpoint folder (a student gets a row of its own), a diffusers pipeline's, or hf:ID.",
)
@click.option("--prompts", help="Of a pipeline that takes text: a file with one prompt a line; sample i takes line i.")
@click.option("--scale", type=float, help="Of classifier-free guidance of a pipeline; 1 is none.")
@click.option("--size", type=click.IntRange(min=1), help="Height and width in pixels, of a pipeline.")
@click.option("--tiles", is_flag=True, default=None, help="A pipeline's VAE decodes tile by tile, in less memory.")
@click.option("--extractor", help="Of a judge of images: inception:FILE, dinov2:FOLDER, or pixels; with --reference.")
@click.option("--reference", help="Real images for --extractor: a folder, zip, npz or Parquet file, or statistics.")
@click.option(
    "--student", "students", multiple=True, metavar="LABEL=PATH", help="Folder of a student, or of several; repeatable."
)
@click.option(
    "--guidance",
    help="Of all rows: a mapping as in a suite, '{kind: cfg, scale: 3}'; or the weight for networks that take one.",
)
@click.option("--device", default="cpu", show_default=True, help="Of torch: cpu, cuda, cuda:1.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Of the network; fp16 on an accelerator.",
)
@click.option(
    "--compile", type=click.Choice(["loop", "graph"]), help="The sampling loop: torch.compile, or a CUDA graph."
)
@click.option(
    "--share-first-call", is_flag=True, help="Cells that start from the same noise share the first call, which counts."
)
@click.option("--overlap", is_flag=True, help="On CUDA: sample the next batch while one is judged.")
@click.option("--shard", default="0/1", metavar="I/N", help="Measure every N-th cell, from I on; 0 <= I < N.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    help=f"After which no batch is begun, and the run stops with exit code {TIME_OVER}; the same command goes on.",
)
@click.option(
    "--dry-run", is_flag=True, help="Show the cells, their network calls and estimated minutes; measure nothing."
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Results folder; by default results/SUITE-SAMPLES."
)
@plain_errors
def bench(
    suite: str,
    samplers: str | None,
    nfe: str | None,
    num_samples: int | None,
    batch_size: int | None,
    seed: str | None,
    metrics: str | None,
    model: str | None,
    students: tuple[str, ...],
    guidance: str | None,
    shard: str,
    dry_run: bool,
    prompts: str | None,
    scale: float | None,
    size: int | None,
    tiles: bool | None,
    extractor: str | None,
    reference: str | None,
    **how: Any,
) -> None:
    """Measure a SUITE of samplers (by default: mnist) and write table, plot and pictures.

    A run that was stopped goes on where it stopped: type the same command again. Several processes may work on one results
    folder at once, each on cells of its own; under torchrun or accelerate launch they divide the samples of each cell.

    Exit code 0: all was measured that the budgets allow; 1: a cell failed, or the run did, and where it could the table was
    written all the same; 2: a mistake in the command; 75: --minutes are over; 130: Ctrl-C.
    """
    from bench.suite import load_suite

    changes: dict[str, Any] = {
        "num_samples": num_samples,
        "batch_size": batch_size,
        "model": model,
        "guidance": _guidance(guidance),
        **{"prompts": prompts, "scale": scale, "size": size, "tiles": tiles},
        "judge": _judge(extractor, reference),
    }
    changes["nfe"] = None if nfe is None else integers_in("--nfe", nfe)
    changes["seeds"] = None if seed is None else integers_in("--seed", seed)
    changes["metrics"] = None if metrics is None else names_in("--metrics", metrics)
    loaded = load_suite(suite)
    rows = [*_own_row(model or loaded.model), *_students(students)]
    chosen = [] if samplers is None else names_in("--samplers", samplers)
    code = _run(loaded.changed(chosen, rows, **changes), dry_run=dry_run, shard=_shard(shard), **how)
    if code:
        raise SystemExit(code)


def _run(suite: Any, *, dry_run: bool, out: Path | None, minutes: float | None, **how: Any) -> int:
    """Run the suite on each of its models, or show what that would be; returns the exit code."""
    import time

    from bench.api import each_model, prepare
    from bench.workers import WorkerLostError, Workers

    began, workers, code = time.monotonic(), Workers(), 0
    try:
        for one, folder in each_model(suite, out):
            left = None if minutes is None else minutes - (time.monotonic() - began) / 60.0
            run = prepare(one, folder, console=wide_console(), workers=workers, minutes=left, **how)
            if dry_run:
                _show(run)
            elif (ended := _measure(run)) == TIME_OVER:
                return ended
            else:
                code = max(code, ended)
    except WorkerLostError as error:
        raise click.ClickException(str(error)) from error
    finally:
        workers.close()
    return code


def _show(run: Any) -> None:
    from bench.dry_run import dry_run

    run.console.print(dry_run(run))


def _measure(run: Any) -> int:
    """Run the suite, then write and print what came out; on Ctrl-C say how to go on.

    Returns the exit code, which of several processes the leading one has alone: a launcher ends the others when one fails.
    """
    import torch

    from bench.measure import OutOfTimeError
    from bench.report import write_results
    from bench.table import terminal

    suite, model, folder, device, workers = run.suite, run.model, run.out, run.running.device, run.running.workers
    say = partial(run.console.print, soft_wrap=True, highlight=False) if workers.leads else lambda *_: None
    say(
        f"suite {suite.name}: {len(suite.samplers)} rows x {len(suite.nfe)} budgets x {len(suite.seeds)} seeds x "
        f"{suite.num_samples} samples, model {model.name}, {model.dtype} on {device}, {torch.get_num_threads()} threads"
        + (f", {workers.size} processes" if workers.size > 1 else "")
        + f" -> {folder}"
    )
    with resumable(f"finished batches are kept in {folder}, and the same command goes on from there"):
        try:
            rows = run.rows()
        except OutOfTimeError:
            say(
                f"stopped, as its time is over; finished batches are kept in {folder}, and the same command goes on from there"
            )
            return TIME_OVER if workers.leads else 0
        except OSError as error:  # a full disk, a folder that may not be written
            went_on = f"; what was finished before is kept in {folder}, and the same command goes on from there"
            raise click.ClickException(f"{error}{went_on if folder.exists() else ''}") from error
    if not workers.leads:
        return 0
    if run.overhead is not None:
        say(f"engine: {100 * run.overhead:.1f} % beside sampling and judging")
    title, missing = write_results(suite, model, folder, device, rows, run.record), _missing(rows)
    # another shard that ended meanwhile may have written its table before this one
    while missing and _missing(run.known()) < missing:
        rows = run.known()
        title, missing = write_results(suite, model, folder, device, rows, run.record), _missing(rows)
    if missing:
        say(
            f"{missing} of {len(rows)} cells are left to other shards; the command without --shard makes the table of all, "
            "and fewstep merge that of shards in several folders"
        )
    else:
        run.console.print(terminal(rows, model.judge.floors(suite.num_samples), title, suite.note))
        say(f"table, plot and pictures: {folder}")
    failed = sum(row["status"] == "failed" for row in rows)
    if failed:
        say(f"{failed} of {len(rows)} cells failed, for the reasons in the table; the same command tries them again")
    return FAILED if failed else 0


def _missing(rows: Sequence[Any]) -> int:
    """How many are left to other shards."""
    return sum(row["status"] == "missing" for row in rows)


def _judge(extractor: str | None, reference: str | None) -> dict[str, str] | None:
    """The judge that replaces the suite's."""
    if extractor is None and reference is None:
        return None
    if extractor is None or reference is None:
        missing = "--extractor" if extractor is None else "--reference"
        raise ValueError(f"a judge is an extractor and real images: give {missing} too")
    return {"extractor": extractor, "reference": reference}


def _guidance(text: str | None) -> Any:
    import yaml

    try:
        found = None if text is None else yaml.safe_load(text)
    except yaml.YAMLError:
        found = text
    if isinstance(found, str):
        raise ValueError(f"--guidance takes a number, or a mapping such as '{{kind: cfg, scale: 3}}', got {text!r}")
    return found


def _shard(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit()):
        raise ValueError(f"--shard takes I/N, such as 0/4, got {text!r}")
    return int(i), int(n)


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
