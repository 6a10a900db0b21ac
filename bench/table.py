"""Rows to tables: CSV for machines, Markdown for papers and pages, a rich table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.table import Table

Row = dict[str, Any]
_UNTRAINED = "†"


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """One line for each cell with everything that is known of it; options and hashes as columns of their own."""
    table = pd.json_normalize([{**row, "options": str(row["options"])} for row in rows], sep="_")
    counts = [name for name in ("nfe", "train_images") if name in table]
    return table.astype(dict.fromkeys(counts, "Int64"))  # which stay whole where some rows have none


def winners(rows: Sequence[Row]) -> dict[int, str]:
    """The label with the smallest distance at each budget."""
    best: dict[int, Row] = {}
    for row in _measured(rows):
        if row["budget"] not in best or row["value"] < best[row["budget"]]["value"]:
            best[row["budget"]] = row
    return {budget: row["label"] for budget, row in best.items()}


def markdown(rows: Sequence[Row], floor: float, title: str, note: str = "") -> str:
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
    return "\n".join([*lines, "", *(f"- {line}" for line in notes(rows, floor, note)), "", *_training(rows)])


def terminal(rows: Sequence[Row], floor: float, title: str, note: str = "") -> Table:
    """The same table for the terminal; the best of each column is marked."""
    labels, budgets, cells = _layout(rows)
    best = winners(rows)
    table = Table(title=title, caption="\n".join(notes(rows, floor, note)), caption_justify="left", min_width=60)
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


def _training(rows: Sequence[Row]) -> list[str]:
    """Lines of a second table: what the training of each student took, over all phases up to it."""
    mine = [row for row in _measured(rows) if row.get("trained") and "train_images" in row]
    if not mine:
        return []
    head = ["student", "calls", "images", "minutes", "of which"]
    lines = ["## Training", "", _md(head), _md(["---", "---:", "---:", "---:", "---"])]
    for row in sorted(mine, key=lambda row: (row["label"], -row["nfe"])):
        cost = [row["nfe"], row["train_images"], f"{row['train_minutes']:g}", row["train_phases"]]
        lines.append(_md([row["label"], *map(str, cost)]))
    return [*lines, ""]


def notes(rows: Sequence[Row], floor: float, note: str = "") -> list[str]:
    """What stands under the table: the suite's note, metric, counts, interval, the model's own distance, floor, failures."""
    first = rows[0]
    lines = [f"{note[0].upper()}{note[1:]}."] if note else []
    lines += [
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
    if any(row.get("trained") is False for row in _measured(rows)):
        lines.append(
            f"{_UNTRAINED} The student was not trained for this number of calls; it takes the sampler of its plan."
        )
    lines += _guidance(rows) + _absent(rows)
    failed = [f"{row['label']} at {row['budget']}: {row['reason']}" for row in rows if row["status"] == "failed"]
    return [*lines, *(f"Failed: {text}" for text in failed)]


def _guidance(rows: Sequence[Row]) -> list[str]:
    weights = {
        row["label"]: row["inputs"]["guidance"] for row in _measured(rows) if "guidance" in row.get("inputs", {})
    }
    return (
        [f"Guidance weight: {', '.join(f'{label} {weight:g}' for label, weight in weights.items())}."]
        if weights
        else []
    )


def _absent(rows: Sequence[Row]) -> list[str]:
    absent: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if row["status"] == "absent":
            absent.setdefault((row["label"], row["reason"]), []).append(row["budget"])
    return [f"Not measured: {who} at {', '.join(map(str, at))}; {why}." for (who, why), at in absent.items()]


def _measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["role"] == "sampler" and row["status"] == "done"]


def _layout(rows: Sequence[Row]) -> tuple[list[str], list[int], dict[tuple[str, int], str]]:
    mine = [row for row in rows if row["role"] == "sampler"]
    labels, budgets = list(dict.fromkeys(row["label"] for row in mine)), sorted({row["budget"] for row in mine})
    return labels, budgets, {(row["label"], row["budget"]): _text(row) for row in mine}


def _text(row: Row) -> str:
    if row["status"] == "done":
        return _value(row) + (_UNTRAINED if row.get("trained") is False else "")
    return "-" if row["status"] == "absent" else "failed"


def _value(row: Row) -> str:
    """The distance and half its interval, to the digit where the interval has its second."""
    half = 0.5 * (row["high"] - row["low"])
    digits = max(0, 1 - math.floor(math.log10(half))) if half > 0 else 3
    return f"{row['value']:.{digits}f} ± {half:.{digits}f}"


def _md(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
