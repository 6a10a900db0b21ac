"""The commands that read results: `fewstep pick`, `diff`, `merge`, and `doctor` for a distance that two people disagree on."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bench.command import plain_errors, wide_console

_ROOT = Path(__file__).parent.parent
_PATH = click.Path(path_type=Path)
_METRIC = click.option("--metric", help="A metric of the table; by default its primary distance.")


@click.command()
@click.option("--budget", type=click.IntRange(min=1), required=True, help="Network calls that a sample may take.")
@click.option(
    "--results", type=_PATH, help="Results folder; by default the newest of results/MODEL and results/MODEL-SAMPLES."
)
@click.option("--model", help="Whose results to read, and on whose schedule the plan is made; by default mnist.")
@_METRIC
@click.option("--out", type=_PATH, help="JSON file for the sampler's plan; by default SAMPLER-CALLS.json, here.")
@plain_errors
def pick(budget: int, results: Path | None, model: str | None, metric: str | None, out: Path | None) -> None:
    """Say which sampler to use within a BUDGET of network calls, by measured results, and how sure that is."""
    from bench.ranking import choose
    from bench.results import read_rows

    source = results or _results_of(model or "mnist")
    rows = read_rows(source)
    if model is not None:
        rows = _of_model(rows, model, source)
    choice = choose(rows, budget, metric)
    _show_choice(choice, rows, budget)
    click.echo(f"by the results in {source}")
    try:
        plan, remark = _plan(choice.row, model or choice.row["model"])
    except ValueError as error:  # a CheckpointError is one too
        if out is not None:
            raise
        click.echo(f"no plan is written: {error}")
        return
    from bench.store import write_text

    name = re.sub(r"[^\w.+-]+", "-", f"{choice.row['label']}-{choice.row['nfe']}").strip("-.")
    file = out or Path(f"{name}.json")
    write_text(file, plan.to_json() + "\n")
    click.echo(f"plan: {file}{remark}")


@click.command()
@click.argument("a", type=_PATH)
@click.argument("b", type=_PATH)
@_METRIC
@click.option("--fail", is_flag=True, help="Exit code 1 where a difference is significant.")
@plain_errors
def diff(a: Path, b: Path, metric: str | None, fail: bool) -> None:
    """Compare the results folders A and B cell by cell: B less A, and whether that is more than chance."""
    from bench.compare import compare, diff_notes, diff_table
    from bench.results import read_rows

    found = compare(read_rows(a), read_rows(b), metric)
    console = wide_console()
    console.print(diff_table(found, str(a), str(b)))
    for line in diff_notes(found, str(a), str(b)):
        console.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)
    if fail and found.significant:
        raise SystemExit(1)


@click.command()
@click.argument("folders", type=_PATH, nargs=-1, required=True)
@click.option("--out", type=_PATH, required=True, help="New results folder.")
@plain_errors
def merge(folders: tuple[Path, ...], out: Path) -> None:
    """Make one results folder of several FOLDERS, such as the shards of a run; they stay as they are."""
    from bench.merge import merge as run

    rows = run(folders, out)
    done = sum(row["status"] == "done" for row in rows)
    click.echo(f"{done} measured rows of {len(rows)} -> {out}")


@click.command()
@click.argument("source", type=_PATH)
@click.option("--claim", required=True, help="The distance that somebody states, with its digits: 3.17.")
@click.option("--count", type=click.IntRange(min=2), help="Samples behind the claim, where that is known.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Of the claimant; by default usual ones are tried.")
@click.option("--judge", type=_PATH, help="Folder of a judge; by default the shipped one, of digits.")
@click.option("--extractor", help="Instead of --judge: inception:FILE, dinov2:FOLDER, or pixels; with --reference.")
@click.option("--reference", help="Real images for --extractor: a folder, zip, npz or Parquet file, or statistics.")
@click.option("--test", default="", help="Real images of another split, which may be behind the claim.")
@click.option(
    "--also", multiple=True, help="Judge that may be behind the claim: a folder, or an extractor; repeatable."
)
@click.option("--row", "label", help="Of a table: the sampler's row.")
@click.option("--budget", type=click.IntRange(min=1), help="Of a table: the column.")
@plain_errors
def doctor(
    source: Path,
    claim: str,
    count: int | None,
    batch_size: int | None,
    judge: Path | None,
    extractor: str | None,
    reference: str | None,
    test: str,
    also: tuple[str, ...],
    label: str | None,
    budget: int | None,
) -> None:
    """Look for the reason why SOURCE does not give the claimed distance.

    SOURCE is images (a folder, zip, npz or Parquet file), or a table.csv or results folder with --row and --budget.
    """
    from bench.doctor import Claim, examine, examine_row, load_examiner

    stated, given = Claim.of(claim, count), _judge_of(judge, extractor, reference, test)
    if source.suffix == ".csv" or (source / "table.csv").is_file():
        row, rows = _row_of(source, label, budget)
        click.echo(f"{row['label']} at {row['budget']}: {row['metric']} of {row['num_samples']} samples, a table's row")
        examiner = load_examiner(given)
        return _show_findings(list(examine_row(row, rows, stated, examiner)), stated, row["metric"])
    if label is not None or budget is not None:
        raise ValueError(f"--row and --budget are for a table.csv, or a results folder that has one; got {source}")
    from bench.data import load_images
    from bench.metrics import metric_name

    images = load_images(source).images
    examiner = load_examiner(given, images.shape[1:])
    others = [load_examiner(_other_judge(name, reference, test), images.shape[1:]) for name in also]
    click.echo(_seen(images, examiner.extractor.shape))
    findings = list(examine(images, stated, examiner, others, batch_size))
    _show_findings(findings, stated, metric_name(examiner.extractor.name, len(images)))


def _judge_of(folder: Path | None, extractor: str | None, reference: str | None, test: str) -> Any:
    """What `bench.doctor.load_examiner` takes."""
    from bench.judge import JudgeSpec

    if extractor is None and reference is None:
        if test:
            raise ValueError("--test is for --extractor and --reference; the folder of a judge has its own")
        return folder
    if folder is not None:
        raise ValueError("--judge is a whole judge: give it, or --extractor and --reference")
    if extractor is None or reference is None:
        missing = "--extractor" if extractor is None else "--reference"
        raise ValueError(f"a judge is an extractor and real images: give {missing} too")
    return JudgeSpec(extractor=extractor, reference=reference, test=test)


def _other_judge(name: str, reference: str | None, test: str) -> Any:
    """A judge's folder, or an extractor on the same real images."""
    from bench.judge import FEATURES

    if reference is None or (Path(name) / FEATURES).is_dir():
        return Path(name)
    return _judge_of(None, name, reference, test)


def _results_of(model: str) -> Path:
    """The newest of results/MODEL, and results/MODEL-SAMPLES as `fewstep bench` writes them, here; or what is shipped.

    Tables of the model itself go before those of another one that was measured with the suite of its name.
    """
    from bench.results import read_rows

    for place in (Path("results"), _ROOT / "results"):
        named = [path for path in place.glob("*") if re.fullmatch(re.escape(model) + r"(-\d+)?", path.name)]
        tables = [path / "table.csv" for path in named if (path / "table.csv").is_file()]
        own = [path for path in tables if any(row.get("model") == model for row in read_rows(path))]
        tables = own or tables
        if tables:
            return max(tables, key=lambda path: path.stat().st_mtime).parent
    raise FileNotFoundError(
        f"there are no results of {model!r} in {Path('results') / model}; give --results FOLDER, "
        f"or make some: fewstep bench --model {model}"
    )


def _of_model(rows: list[Any], model: str, source: Path) -> list[Any]:
    """The rows of one of several models in a table, and of students, which are models of their own for its samples.

    Where none is of that model all rows stay, and it is said whose they are.
    """
    if any(row.get("model") == model for row in rows):
        return [row for row in rows if row.get("model") == model or row.get("trained") is not None]
    there = ", ".join(sorted({str(row.get("model")) for row in rows}))
    click.echo(f"{source} has no results of {model}: these are of {there}")
    return rows


def _show_choice(choice: Any, rows: Sequence[Any], budget: int) -> None:
    from rich.markup import escape
    from rich.table import Table

    from bench.ranking import BEYOND, TUNED, aggregated, beyond_model, of_metric, tuned_here
    from bench.table import value_text

    row, name = choice.row, choice.row["metric"]
    table = Table(title=f"within {budget} calls", title_justify="left")
    table.add_column("sampler", no_wrap=True)
    for column in ("calls", name, "probability of being best"):
        table.add_column(column, justify="right", no_wrap=True)
    for other, chance in zip(choice.candidates, choice.chances, strict=True):
        mark = "=" if other in choice.tied else ""
        style = "bold green" if other is row else "green" if mark else ""
        cells = [other["label"], _calls(other), mark + value_text(other), _percent(chance)]
        table.add_row(*map(escape, cells), style=style)
    console = wide_console()
    console.print(table)
    beyond = beyond_model(of_metric(aggregated(rows), name))
    lines = [
        f"use: {row['label']} with {_calls(row)} calls, {name} {value_text(row)} of {row['num_samples']} samples",
        "how sure: not known, as a value or an interval of another is not"
        if math.isnan(choice.chances[0])
        else f"how sure: {_percent(choice.chances[0])} that it is really the best, by independent normal errors",
    ]
    if choice.tied:
        names = ", ".join(other["label"] for other in choice.tied)
        lines.append(f"tied (=), the 95 % intervals overlap: {names}")
    if choice.cheaper is not None:
        other = choice.cheaper
        lines.append(f"better with fewer calls: {other['label']} with {other['nfe']}, {value_text(other)}")
    if (row["label"], row["budget"]) in beyond:
        lines.append(f"{BEYOND} it is better than the model itself: here the model, not the sampler, is ranked")
    if tuned_here(row):
        lines.append(f"{TUNED} {row['tuned']}")
    lines.append(f"in Python: {_call(row)}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _calls(row: Any) -> str:
    """Calls of a row, and of one under guidance the evaluations that these are."""
    return f"{row['nfe']} ({row['evaluations']:g} evaluations)" if row.get("guidance") else str(row["nfe"])


def _percent(chance: float) -> str:
    if math.isnan(chance):
        return "not known"
    return "> 99.9 %" if chance > 0.999 else "< 0.1 %" if chance < 0.001 else f"{100 * chance:.1f} %"


def _arguments(row: Any) -> dict[str, Any]:
    """A row's arguments of `make_plan`, those at their default left out."""
    given = {"grid": row.get("grid"), "final": row.get("final"), "afs": row.get("afs")}
    return {"nfe": row["budget"], **{name: value for name, value in given.items() if value}, **row["options"]}


def _call(row: Any) -> str:
    from bench.cells import STUDENT

    if row["sampler"] == STUDENT:
        return f"distill.load_student({row['model']!r}).sample({row['nfe']}, ...)"
    given = ", ".join(f"{name}={value!r}" for name, value in _arguments(row).items())
    under = f" with the model under guidance {row['guidance']}" if row.get("guidance") else ""
    return f"samplers.sample(model, {row['sampler']!r}, {given}){under}"


def _plan(row: Any, model: str) -> tuple[Any, str]:
    """The plan of a row on a model's schedule, and a remark where it is not the one that was measured.

    Raises:
        ValueError: an error-controlled sampler, which has no plan, or a model that is not there.
    """
    import hashlib

    from bench.cells import STUDENT
    from bench.store import code_fingerprint
    from bench.zoo import load_network
    from samplers import make_plan
    from samplers.registry import get_sampler

    if row["sampler"] == STUDENT:
        return load_network(row["model"], "cpu", "fp32").plans[row["nfe"]], ""
    if get_sampler(row["sampler"]).adaptive:
        raise ValueError(f"{row['label']} chooses its steps while it runs and has no plan")
    network = load_network(model, "cpu", "fp32")
    plan = make_plan(row["sampler"], network.model.schedule, **_arguments(row))
    if hashlib.sha256(plan.to_json().encode()).hexdigest()[:16] == row.get("plan_hash"):
        return plan, ""
    if code_fingerprint() != row.get("code"):
        why = "made by another version of fewstep, whose numbers may differ in their last digits"
    elif network.hash != row.get("model_hash"):
        why = f"that of a model other than {model}"
    else:
        why = "made on another processor, whose numbers differ in their last digits"
    return plan, f" (not bit for bit the measured plan, which was {why})"


def _row_of(source: Path, label: str | None, budget: int | None) -> tuple[Any, list[Any]]:
    """The row of a table that a claim is about, and all of its rows."""
    from bench.ranking import aggregated, measured
    from bench.results import read_rows
    from samplers.errors import unknown

    rows = aggregated(read_rows(source))
    mine = measured(rows)
    if label is None or budget is None:
        raise ValueError("of a table the doctor needs --row and --budget")
    if label not in (labels := [row["label"] for row in mine]):
        raise unknown("row", label, set(labels))
    mine = [row for row in mine if row["label"] == label]
    if budget not in (budgets := [row["budget"] for row in mine]):
        raise ValueError(f"budget must be one of {', '.join(map(str, budgets))} for {label}, got {budget}")
    return next(row for row in mine if row["budget"] == budget), rows


def _seen(images: Any, shape: Any) -> str:
    count, channels, height, width = images.shape
    text = f"{count} images, {channels} x {height} x {width}, levels {images.min()} to {images.max()}"
    return (
        text
        if shape == "any" or (height, width) == shape[1:]
        else f"{text}; {shape[1]} x {shape[2]} for the judge, bicubic"
    )


def _show_findings(findings: Sequence[Any], claim: Any, metric: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    from bench.doctor import EXACT, NO, diagnosis

    table = Table(title=f"{metric}, and the claim {claim.value:g}", title_justify="left")
    for name in ("kind", "hypothesis"):
        table.add_column(name)
    for name in ("distance", "± 95 %", "- claim"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for found in findings:
        off = f"{found.distance - claim.value:+.4g}"
        cells = [found.family, found.name, f"{found.distance:.5g}", f"{found.half:.2g}", off, found.verdict]
        style = "bold green" if found.verdict == EXACT else "" if found.verdict == NO else "green"
        table.add_row(*map(escape, cells), style=style)
    console = wide_console()
    console.print(table)
    console.print(diagnosis(findings, claim), markup=False, highlight=False, soft_wrap=True)
