"""Write what a run found: table.csv, table.md, table.tex, frontier.png, frontier.svg, report.html, provenance.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.html_report import write_html_report
from bench.latex import latex
from bench.plots import save_frontier
from bench.provenance import provenance
from bench.ranking import higher_is_better, metrics_of
from bench.store import write_text
from bench.suite import Suite
from bench.table import frame, markdown
from bench.zoo import BenchModel

Row = dict[str, Any]


def write_results(suite: Suite, model: BenchModel, out: Path, device: str, rows: list[Row]) -> str:
    """Write the files of a finished run into `out`; returns the title they carry."""
    title = f"{model.name}: {model.judge.metric}, {suite.num_samples} samples, {model.dtype}"
    made_with = {**provenance(suite, model, device, rows), "floor": model.judge.floor}
    write_text(out / "provenance.json", json.dumps(made_with, indent=1) + "\n")
    write_tables(rows, model.judge.floor, title, suite.note, out)
    qualities = [name for name in metrics_of(rows) if higher_is_better(name)]
    if metrics_of(rows):
        write_html_report(rows, model.judge.floor, title, made_with, out, suite.note, qualities)
    return title


def write_tables(rows: Sequence[Row], floor: float, title: str, note: str, out: Path) -> None:
    """Write tables and plot of rows into `out`, which needs no model.

    Args:
        rows: of one run, or of several that compare.
        floor: distance of real test data, or 0 where it is not known.
        title: of tables and plot.
        note: what every table and plot must say, or nothing.
        out: folder.
    """
    write_text(out / "table.csv", frame(rows).to_csv(index=False))
    write_text(out / "table.md", markdown(rows, floor, title, note))
    write_text(out / "table.tex", latex(rows, floor, title, note))
    caption = "\n".join(part for part in (title, note) if part)
    save_frontier(rows, floor, caption, out / "frontier.png", out / "frontier.svg")
