"""Results folders read back: the rows of a table.csv, or of the cells of a run that was stopped before its table."""

from __future__ import annotations

import ast
import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
INTERVAL = ("low", "high", "standard_error")  # the columns `<metric>_<part>` beside `<metric>`
REASON = "reason"  # the column `<metric>_reason` says why there is no value
MS_PER_IMAGE, MODEL_VALUE = "ms_per_image", "model_value"  # columns that are made of others
_NEEDED = ("role", "label", "budget", "status", "metric")
# an all-digit hash is no number
_TEXT = frozenset(
    (
        *(
            "role",
            "label",
            "model",
            "model_hash",
            "sampler",
            "grid",
            "final",
            "plan_hash",
            "tuned",
            "train_phases",
            "guidance",
            "integrators",
            "plugins",
        ),
        *("metric", "dtype", "device", "device_name", "torch", "code", "status", "reason", "measured_at"),
    )
)
_MEANT_EMPTY = ("grid", "final")
_NESTED = ("hashes", "inputs")
_LITERAL: dict[str, type] = {"options": dict, "further": list, "tuned_metrics": list}


def read_rows(path: Path) -> list[Row]:
    """The rows that a run wrote.

    Args:
        path: a results folder, of which `table.csv` is read, or else `cells/`; or a `table.csv` itself. Cells do not say
            which row of a suite they are: their label is sampler and options, and none is the many-step run.

    Raises:
        FileNotFoundError: nothing at `path`, or a folder without results.
        ValueError: a file that is not the table of a run.
    """
    if path.is_file():
        return _from_table(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no results folder {path}; give a folder that `fewstep bench` wrote")
    if (path / "table.csv").is_file():
        return _from_table(path / "table.csv")
    cells = cells_of(path)
    if not cells:
        raise FileNotFoundError(f"{path} holds no results: neither table.csv nor cells/*.json")
    rows = [{"role": "sampler", "label": _label(record), **record} for record in cells.values()]
    return sorted(rows, key=lambda row: (row["budget"], row["label"], row["seed"]))


def unknown_figure(reason: str) -> Row:
    """What a row has in place of a further metric that cannot be had."""
    return {"value": None, **dict.fromkeys(INTERVAL), REASON: reason}


def cells_of(folder: Path) -> dict[str, Row]:
    """The finished cells of a results folder, by key.

    Raises:
        ValueError: a cell that is not JSON; names the file.
    """
    found = {}
    for path in sorted((folder / "cells").glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not a cell of a run: {error}") from error
    return found


def _label(record: Mapping[str, Any]) -> str:
    options = ", ".join(f"{name}={value}" for name, value in record["options"].items())
    return f"{record['sampler']} ({options})" if options else record["sampler"]


def _from_table(path: Path) -> list[Row]:
    try:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file: {error}") from error
    columns = list(lines[0]) if lines else []
    missing = [name for name in _NEEDED if name not in columns]
    if missing:
        raise ValueError(f"{path} is not the table of a run: {f'no column {missing[0]!r}' if lines else 'no rows'}")
    metrics = [name for name in columns if all(f"{name}_{part}" in columns for part in INTERVAL)]
    rows = []
    for number, line in enumerate(lines, 2):
        try:
            rows.append(_row(line, metrics))
        except (ValueError, SyntaxError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return rows


def _row(line: Mapping[str, str], metrics: list[str]) -> Row:
    """A line with its types and its nested parts back; an empty field is left out."""
    parts = {f"{metric}_{part}" for metric in metrics for part in (*INTERVAL, REASON, MODEL_VALUE)}
    parts |= {MS_PER_IMAGE, MODEL_VALUE}
    row: Row = {}
    for name, text in line.items():
        if text is None or None in (name, text):
            raise ValueError("more or fewer fields than the header")
        nest = next((nest for nest in _NESTED if name.startswith(f"{nest}_")), None)
        if name in metrics and (why := line.get(f"{name}_{REASON}")):
            row.setdefault("metrics", {})[name] = unknown_figure(why)
        elif name in parts or (not text and name not in _MEANT_EMPTY):
            continue
        elif name in metrics:
            interval = {part: _number(line[f"{name}_{part}"]) for part in INTERVAL}
            row.setdefault("metrics", {})[name] = {"value": float(text), **interval}
        elif nest:
            row.setdefault(nest, {})[name.removeprefix(f"{nest}_")] = text if nest == "hashes" else _typed(name, text)
        else:
            row[name] = _typed(name, text)
    if row["status"] == "done" and not math.isfinite(row.get("value", math.nan)):
        raise ValueError("a row that is done must have a finite value")
    return row


def _typed(name: str, text: str) -> Any:
    if name in _TEXT:
        return text
    if name in _LITERAL:
        value = ast.literal_eval(text)
        if not isinstance(value, _LITERAL[name]):
            raise ValueError(f"{name} must be a {_LITERAL[name].__name__}, got {text!r}")
        return value
    if text in ("True", "False"):
        return text == "True"
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def _number(text: str) -> float | None:
    return float(text) if text else None
