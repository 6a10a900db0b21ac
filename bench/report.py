"""Write what a run found: table.csv, table.md, frontier.png, provenance.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.plots import save_frontier
from bench.provenance import provenance
from bench.store import write_text
from bench.suite import Suite
from bench.table import frame, markdown
from bench.zoo import BenchModel


def write_results(suite: Suite, model: BenchModel, out: Path, device: str, rows: list[dict[str, Any]]) -> str:
    """Write the files of a finished run into `out`; returns the title they carry."""
    title = f"{model.name}: {model.judge.metric}, {suite.num_samples} samples, {model.dtype}"
    write_text(out / "table.csv", frame(rows).to_csv(index=False))
    write_text(out / "table.md", markdown(rows, model.judge.floor, title, suite.note))
    write_text(out / "provenance.json", json.dumps(provenance(suite, model, device, rows), indent=1) + "\n")
    caption = "\n".join(part for part in (title, suite.note) if part)
    save_frontier(rows, model.judge.floor, caption, out / "frontier.png")
    return title
