"""Several results folders made one: their cells, pictures and rows, where nothing contradicts."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.compare import shown
from bench.floor import TEST, Floor
from bench.html_report import write_html_report
from bench.ranking import aggregated, check_comparable
from bench.report import write_tables
from bench.results import cells_of, read_rows
from bench.store import write_text

Row = dict[str, Any]
# what another measurement of the same cell may find different
_TIMINGS = {"seconds", "judging_seconds", "images_per_second", "peak_memory_mb", "energy_joules"}
_CIRCUMSTANCES = {"device_name", "threads", "processes", "measured_at", "shared_first_call", "overlapped"}
_ROUNDING = 1e-6  # relative; float sums in another order differ by less


def merge(folders: Sequence[Path], out: Path) -> list[Row]:
    """Write a results folder with the cells, pictures and rows of several; nothing is written where they contradict.

    Args:
        folders: at least two results folders.
        out: a folder that does not exist, or is empty.

    Returns:
        The rows, in the order of a table.

    Raises:
        FileExistsError: something is in `out`.
        FileNotFoundError: a folder without results.
        ValueError: fewer than two folders; a cell of two contents beyond timings; a row measured twice in different ways; or
            rows that do not compare in one table.
    """
    if len(folders) < 2:
        raise ValueError(f"merge takes at least two folders, got {len(folders)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty; merge writes a new folder")
    rows, cells = _merged_rows(folders), _merged_cells(folders)
    made = [_provenance(folder) for folder in folders]
    floors = _floors(made, rows)
    for key, path in cells.items():
        write_text(out / "cells" / f"{key}.json", path.read_text())
    _copy_pictures(folders, out / "samples")
    record: Row = {"merged": [{"folder": str(f), **one} for f, one in zip(folders, made, strict=True)]}
    record["floors"] = [asdict(floor) for floor in floors]
    write_text(out / "provenance.json", json.dumps(record, indent=1) + "\n")
    said = dict.fromkeys(one["suite"].get("note", "") for one in made if isinstance(one.get("suite"), dict))
    title, note = _title(rows), "; ".join(note for note in said if note)
    write_tables(rows, floors, title, note, out)
    write_html_report(rows, floors, title, record, out, note)
    return rows


def _merged_cells(folders: Sequence[Path]) -> dict[str, Path]:
    """The first file of each key."""
    found: dict[str, tuple[Path, Row]] = {}
    for folder in folders:
        for key, record in cells_of(folder).items():
            path = folder / "cells" / f"{key}.json"
            source, known = found.setdefault(key, (path, record))
            wrong = _contradictions(known, record)
            if wrong:
                values = f"{known.get(wrong[0])} and {record.get(wrong[0])}"
                raise ValueError(f"{source} and {path} are one cell, but {wrong[0]} differs: {values}")
    return {key: path for key, (path, _) in found.items()}


def _contradictions(a: Row, b: Row) -> list[str]:
    """The fields in which two measurements of a cell differ by more than time and rounding."""
    names = [name for name in dict.fromkeys((*a, *b)) if name not in _TIMINGS | _CIRCUMSTANCES]
    return [name for name in names if not _same(a.get(name), b.get(name))]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=_ROUNDING)
    return a == b


def _merged_rows(folders: Sequence[Path]) -> list[Row]:
    """The rows of all folders, each once; one that was measured stands for one that was not."""
    found: dict[tuple[Any, ...], tuple[Path, Row]] = {}
    for folder in folders:
        for row in read_rows(folder):
            place = tuple(row.get(name) for name in ("role", "model", "label", "budget", "seed"))
            source, known = found.setdefault(place, (folder, row))
            if known["status"] != "done":
                found[place] = (folder, row)
            elif row["status"] == "done":
                wrong = _contradictions(known, row)
                if wrong:
                    who = f"{row['label']} at {row['budget']}"
                    values = f"{shown(known.get(wrong[0]))} and {shown(row.get(wrong[0]))}"
                    raise ValueError(f"{who} is in {source} and in {folder} with another {wrong[0]}: {values}")
    rows = [row for _, row in found.values()]
    done = [row for row in rows if row["status"] == "done"]
    if not done:
        raise ValueError(f"none of {', '.join(map(str, folders))} has a measured row")
    check_comparable(done)
    have = {_cell(row) for row in done}
    rows = [row for row in rows if row["status"] == "done" or _cell(row) not in have]
    aggregated(rows)  # refuses before anything is written
    return sorted(rows, key=lambda row: (row["role"] == "teacher", row["budget"]))


def _cell(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("role", "label", "budget", "seed"))


def _copy_pictures(folders: Sequence[Path], out: Path) -> None:
    """Copy the pictures of samples; one of the name of another picture gets its folder's name too."""
    for folder in folders:
        for path in sorted((folder / "samples").glob("*.png")):
            target = out / path.name
            if target.exists() and target.read_bytes() != path.read_bytes():
                target = out / f"{path.stem}-{folder.resolve().name}.png"
            out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _provenance(folder: Path) -> Row:
    path = folder / "provenance.json"
    if not path.is_file():
        return {}
    try:
        made = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return made if isinstance(made, dict) else {}


def _floors(made: Sequence[Row], rows: Sequence[Row]) -> tuple[Floor, ...]:
    """The floors that a folder states; for earlier ones the shipped judge's, or that of all data, which they state."""
    from bench.judge import digit_judge

    stated = next((one["floors"] for one in made if one.get("floors")), None)
    if stated is not None:
        return tuple(map(Floor.of_record, stated))
    first = next((row for row in rows if "extractor" in row.get("hashes", {})), None)
    judge = digit_judge("cpu")
    if first is not None and all(
        judge.hashes[part] == first["hashes"].get(part) for part in ("extractor", "reference")
    ):
        return judge.floors(first["num_samples"])
    return tuple(Floor(TEST, 0, one["floor"]) for one in made if one.get("floor"))[:1]


def _title(rows: Sequence[Row]) -> str:
    done = [row for row in rows if row["status"] == "done"]
    own = [row for row in done if row["role"] == "teacher"] or [row for row in done if "trained" not in row] or done
    models = ", ".join(dict.fromkeys(row["model"] for row in own))
    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in done))
    return f"{models}: {done[0]['metric']}, {done[0]['num_samples']} samples, {dtypes}"
