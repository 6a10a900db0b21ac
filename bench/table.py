"""Rows to tables: CSV for machines, Markdown for papers and pages, a rich table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.table import Table

Row = dict[str, Any]


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """One line for each cell with everything that is known of it; options and hashes as columns of their own."""
    return pd.json_normalize([{**row, "options": str(row["options"])} for row in rows], sep="_")


def winners(rows: Sequence[Row]) -> dict[int, str]:
    """The label with the smallest distance at each budget."""
    best: dict[int, Row] = {}
    for row in _measured(rows):
        if row["budget"] not in best or row["value"] < best[row["budget"]]["value"]:
            best[row["budget"]] = row
    return {budget: row["label"] for budget, row in best.items()}


def markdown(rows: Sequence[Row], floor: float, title: str) -> str:
    """The table of distances, samplers down and budgets across, with the lines a reader needs to judge it."""
    labels, budgets, cells = _layout(rows)
    head = ["sampler", *(f"NFE {n}" for n in budgets)]
    lines = [f"# {title}", "", _md(head), _md(["---", *("---:" for _ in budgets)])]
    best = winners(rows)
    for label in labels:
        texts = [cells.get((label, n), "") for n in budgets]
        lines.append(
            _md([label, *(f"**{t}**" if best.get(n) == label else t for t, n in zip(texts, budgets, strict=True))])
        )
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(rows, floor)), ""])


def terminal(rows: Sequence[Row], floor: float, title: str) -> Table:
    """The same table for the terminal; the best of each column is marked."""
    labels, budgets, cells = _layout(rows)
    best = winners(rows)
    table = Table(title=title, caption="\n".join(notes(rows, floor)), caption_justify="left", min_width=60)
    table.add_column("sampler", no_wrap=True)
    for n in budgets:
        table.add_column(f"NFE {n}", justify="right", no_wrap=True)
    for label in labels:
        texts = [cells.get((label, n), "") for n in budgets]
        table.add_row(
            label,
            *(f"[bold green]*{t}[/]" if best.get(n) == label else t for t, n in zip(texts, budgets, strict=True)),
        )
    return table


def notes(rows: Sequence[Row], floor: float) -> list[str]:
    """What stands under the table: metric, sample count, interval, the model's own distance, the floor, failures."""
    first = rows[0]
    lines = [
        f"{first['metric']} of {first['num_samples']} samples against the reference statistics, "
        "± half the 95 % interval; smaller is better."
    ]
    for row in rows:
        if row["role"] == "teacher" and row["status"] == "done":
            lines.append(f"The model itself ({row['label']}, {row['nfe']} calls): {_value(row)}.")
    if floor > 0:
        lines.append(f"Floor, real test set against training statistics: {floor:.3g}.")
    fewer = sorted(
        {(row["label"], row["budget"], row["nfe"]) for row in _measured(rows) if row["nfe"] != row["budget"]}
    )
    if fewer:
        lines.append(
            "Calls used where a budget is not a multiple of a step: "
            + ", ".join(f"{a} {c} of {b}" for a, b, c in fewer)
            + "."
        )
    failed = [f"{row['label']} at {row['budget']}: {row['reason']}" for row in rows if row["status"] == "failed"]
    return [*lines, *(f"Failed: {text}" for text in failed)]


def _measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["role"] == "sampler" and row["status"] == "done"]


def _layout(rows: Sequence[Row]) -> tuple[list[str], list[int], dict[tuple[str, int], str]]:
    mine = [row for row in rows if row["role"] == "sampler"]
    labels, budgets = list(dict.fromkeys(row["label"] for row in mine)), sorted({row["budget"] for row in mine})
    return (
        labels,
        budgets,
        {(row["label"], row["budget"]): _value(row) if row["status"] == "done" else "failed" for row in mine},
    )


def _value(row: Row) -> str:
    """The distance and half its interval, to the digit where the interval has its second."""
    half = 0.5 * (row["high"] - row["low"])
    digits = max(0, 1 - math.floor(math.log10(half))) if half > 0 else 3
    return f"{row['value']:.{digits}f} ± {half:.{digits}f}"


def _md(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
