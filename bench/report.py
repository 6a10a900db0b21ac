"""Write what a run found: table.csv, table.md, table.tex, frontier.png, frontier.svg, report.html, provenance.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.floor import Floor
from bench.html_report import write_html_report
from bench.latex import latex
from bench.plots import save_frontier
from bench.provenance import provenance
from bench.store import write_text
from bench.suite import Suite
from bench.table import frame, markdown
from bench.zoo import BenchModel

Row = dict[str, Any]


def write_results(
    suite: Suite, model: BenchModel, out: Path, device: str, rows: list[Row], run: Row | None = None
) -> str:
    """Write the files of a finished run into `out`; returns the title they carry.

    Args:
        suite: that was measured.
        model: of it.
        out: results folder.
        device: of torch.
        rows: of the run.
        run: what the process did (`bench.engine.Run.record`); where it measured nothing, what is known of an earlier one stays.
    """
    title = f"{model.name}: {model.judge.metric}, {suite.num_samples} samples, {model.dtype}"
    floors = model.judge.floors(suite.num_samples)
    made_with = {**provenance(suite, model, device, rows), "floors": [asdict(floor) for floor in floors]}
    made_with["run"] = run or _earlier(out / "provenance.json")
    write_text(out / "provenance.json", json.dumps(made_with, indent=1) + "\n")
    write_tables(rows, floors, title, suite.note, out)
    write_html_report(rows, floors, title, made_with, out, suite.note)
    return title


def _earlier(path: Path) -> Row:
    """What the process that last measured something did, as far as its provenance can be read."""
    try:
        made = json.loads(path.read_text())
    except (OSError, ValueError):  # it is written anew
        return {}
    return dict(made.get("run") or {}) if isinstance(made, dict) else {}


def write_tables(rows: Sequence[Row], floors: Sequence[Floor], title: str, note: str, out: Path) -> None:
    """Write tables and plot of rows into `out`, which needs no model.

    Args:
        rows: of one run, or of several that compare.
        floors: of the distance, as far as they are known.
        title: of tables and plot.
        note: what every table and plot must say, or nothing.
        out: folder.
    """
    write_text(out / "table.csv", frame(rows).to_csv(index=False))
    write_text(out / "table.md", markdown(rows, floors, title, note))
    write_text(out / "table.tex", latex(rows, floors, title, note))
    caption = "\n".join(part for part in (title, note) if part)
    save_frontier(rows, floors, caption, out / "frontier.png", out / "frontier.svg")
