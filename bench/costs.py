"""The tables beside those of figures: what each cell took, and what the training of each student took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from bench.ranking import aggregated, measured
from bench.results import MS_PER_IMAGE

Row = dict[str, Any]
_COSTS = {
    "nfe": "calls",
    "sequential_calls": "sequential depth",
    "evaluations": "evaluations",
    "guided_evaluations": "evaluations under guidance",
    "images_per_second": "images/s",
    MS_PER_IMAGE: "ms/image",
    "peak_memory_mb": "peak memory (MB)",
    "energy_joules": "energy (J)",
}
# what times and memory depend on beside the sampler, in words; a row without a field that is not always there has it not
_CONDITIONS = {"device_name": "device", "threads": "threads", "processes": "processes", "batch_size": "batch size"}
_OPTIONAL = {"compile": "compiled", "overlapped": "overlapped"}


def costs(rows: Sequence[Row]) -> list[str]:
    """Lines of a table of what each cell took; columns that no row has are left out."""
    mine = [{**row, **per_image(row)} for row in measured(aggregated(rows))]
    names = [name for name in _COSTS if any(row.get(name) is not None for row in mine)]
    if not names or names == ["nfe"]:
        return []
    head = ["sampler", "budget", *(_COSTS[name] for name in names)]
    lines = ["## Cost", "", md_line(head), md_line(["---", *("---:" for _ in head[1:])])]
    for row in mine:
        amounts = ("" if row.get(name) is None else _amount(row[name]) for name in names)
        lines.append(md_line([row["label"], str(row["budget"]), *amounts]))
    return [*lines, *_conditions(rows), ""]


def _conditions(rows: Sequence[Row]) -> list[str]:
    """What of the conditions differs among rows, each with its usual value and with the cells of the others."""
    parts = []
    for field, name in {**_CONDITIONS, **_OPTIONAL}.items():
        mine = [row for row in measured(rows) if field in _OPTIONAL or row.get(field) is not None]
        usual, *others = (
            value for value, _ in Counter(_condition(row, field) for row in mine).most_common() or [("", 0)]
        )
        odd = []
        for value in others:
            cells = (f"{row['label']} at {row['budget']}" for row in mine if _condition(row, field) == value)
            odd.append(f"{value} of {', '.join(dict.fromkeys(cells))}")
        parts += [f"{name} {usual}, but {' and '.join(odd)}"] if odd else []
    return ["", f"- Not measured alike, so that times and memory do not compare: {'; '.join(parts)}."] if parts else []


def _condition(row: Row, field: str) -> str:
    value = row.get(field)
    return "yes" if value is True else str(value or "no")


def _amount(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def training(rows: Sequence[Row]) -> list[str]:
    """Lines of a table of what the training of each student took, over all phases up to it."""
    mine = [row for row in measured(aggregated(rows)) if row.get("trained") and "train_images" in row]
    if not mine:
        return []
    head = ["student", "calls", "images", "minutes", "of which"]
    lines = ["## Training", "", md_line(head), md_line(["---", "---:", "---:", "---:", "---"])]
    for row in sorted(mine, key=lambda row: (row["label"], -row["nfe"])):
        cost = [row["nfe"], row["train_images"], f"{row['train_minutes']:g}", row["train_phases"]]
        lines.append(md_line([row["label"], *map(str, cost)]))
    return [*lines, ""]


def per_image(row: Row) -> Row:
    """The column of milliseconds an image, where the speed is known."""
    speed = row.get("images_per_second")
    return {MS_PER_IMAGE: round(1000.0 / speed, 4)} if speed else {}


def md_line(cells: Sequence[str]) -> str:
    """A line of a table in Markdown."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
