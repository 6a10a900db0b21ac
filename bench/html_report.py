"""The offline report: one HTML page of charts, tables and pictures that asks nothing of a network.

What the page says is computed in `bench.report_page.data`; its scripts only draw it. Everything that comes from a row is text
by the time it is in the page: escaped in the markup, and in the data block without a character that could end it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from bench.floor import Floor
from bench.measure import FILMED
from bench.ranking import BEYOND, TUNED, UNTRAINED
from bench.report_page.data import report_data
from bench.store import write_text
from bench.table import floor_text

Row = dict[str, Any]
_FILE = "report.html"
_SCRIPTS = ("dom.js", "scale.js", "marks.js", "chart.js", "panel.js", "table.js", "samples.js", "main.js")
_PICTURE_LIMIT = 64 * 2**20  # bytes of all pictures; a page much beyond opens slowly
_WAYS = 2  # of the samples whose way from noise is shown: frames of noise are what takes most room
_FACTS = ("metric", "num_samples", "model", "model_hash", "dtype", "device", "threads")


def write_html_report(
    rows: Sequence[Row],
    floors: Sequence[Floor],
    title: str,
    provenance: dict[str, Any],
    out: Path,
    note: str = "",
) -> Path:
    """Write `out/report.html`, one file that needs no other and no network.

    Pictures are taken from `out/samples`: `<label>-nfe<budget>.png` and, of the way there, `<label>-nfe<budget>-path.png`;
    of the model itself `teacher-nfe<budget>.png`, else those of the sampler that runs the same plan. In the page they are WebP
    without loss, not enlarged, since the browser does that, and show the ways of two samples. Where rows of two models would
    have a picture of one name, neither has it, since the file is the other's as well as its own.

    Args:
        rows: of a run; the seeds of a model's sampler at a budget become one point of the charts. Where all failed, the page
            says so, with their reasons.
        floors: of the primary distance; the first is drawn where it is positive.
        title: of the page.
        provenance: what made the run; shown as it is.
        out: folder of the run.
        note: what a reader should know of the whole run.

    Returns:
        The path of the page.

    Raises:
        ValueError: no rows, rows of two primary metrics, or as in `bench.ranking.aggregated`.
    """
    names = {row["metric"] for row in rows if "metric" in row}
    if len(names) != 1:
        raise ValueError(f"rows must be at least one, all of the same metric, got {len(rows)} of {sorted(names)}")
    data = report_data(rows, floors, title, provenance, note)
    data["left_out"] = _add_pictures(data["points"], rows, out / "samples")
    write_text(out / _FILE, _page(data))
    return out / _FILE


def _add_pictures(points: Sequence[Row], rows: Sequence[Row], samples: Path) -> int:
    """Give each point its pictures as data URIs, or None; returns how many did not fit into the page."""
    stored = {path.relative_to(samples).as_posix(): path for path in samples.rglob("*.png")}
    room, left_out = _PICTURE_LIMIT, 0
    for point, stems in zip(points, _stems(points, rows), strict=True):
        for name, ending in (("picture", ""), ("path", "-path")):
            found = (stored.get(f"{stem}-nfe{point['budget']}{ending}.png") for stem in stems)
            path = next(filter(None, found), None)
            filmed = min(FILMED, rows[point["rows"][0]].get("num_samples", FILMED))
            content = _encoded(path, filmed if name == "path" else None) if path else b""
            if len(content) > room:
                content, left_out = b"", left_out + 1
            room -= len(content)
            point[name] = "data:image/webp;base64," + base64.b64encode(content).decode() if content else None
    return left_out


def _stems(points: Sequence[Row], rows: Sequence[Row]) -> list[list[str]]:
    """How the names of each point's pictures may begin; not at all where another point's would be the same."""
    firsts = [rows[point["rows"][0]] for point in points]
    names = [("teacher" if first["role"] == "teacher" else first["label"], first["budget"]) for first in firsts]
    owners, plans, stems = Counter(names), dict[tuple[Any, Any], str](), list[list[str]]()
    for first, name in zip(firsts, names, strict=True):
        if first["role"] == "sampler" and owners[name] == 1:
            plans[first.get("model"), first.get("plan_hash")] = first["label"]
    for first, name in zip(firsts, names, strict=True):
        same = plans.get((first.get("model"), first.get("plan_hash"))) if first["role"] == "teacher" else None
        stems.append([name[0], *filter(None, [same])] if owners[name] == 1 else [])
    return stems


def _encoded(path: Path, ways: int | None = None) -> bytes:
    """A picture as WebP, every pixel once and exactly.

    Args:
        path: of the PNG.
        ways: how many samples' ways it shows, one below the other; None where it shows no ways.
    """
    with Image.open(path) as file:
        pixels = np.asarray(file if file.mode == "L" else file.convert("RGB"))
    if ways:
        pixels = pixels[: len(pixels) // ways * min(ways, _WAYS)]
    if np.array_equal(pixels[::2, ::2].repeat(2, 0).repeat(2, 1), pixels):
        pixels = pixels[::2, ::2]
    content = io.BytesIO()
    # a little effort: the most makes files 2 % smaller and takes ten times as long
    Image.fromarray(np.ascontiguousarray(pixels)).save(content, "WEBP", lossless=True, quality=25, method=2)
    return content.getvalue()


def _page(data: Mapping[str, Any]) -> str:
    source = files("bench") / "report_page"
    style, template = ((source / name).read_text(encoding="utf-8") for name in ("report.css", "template.html"))
    script = "\n".join((source / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    page = Template(template).substitute(
        title=html.escape(data["title"]),
        note=_note(data),
        facts=_facts(data),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        matrices="\n".join(_matrix(data, metric) for metric in data["metrics"]),
        plain_table=_plain_table(data),
        data=embedded_json(data),
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate in a label has no UTF-8


def embedded_json(data: Any) -> str:
    """JSON for a <script> block of HTML: ASCII, without the characters that could end the block, and never a NaN."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(source: str) -> str:
    """As a content security policy names the one style and the one script that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _note(data: Mapping[str, Any]) -> str:
    """What a reader should know before all else."""
    note = f'<p class="note">{html.escape(data["note"])}</p>' if data["note"] else ""
    if any(point["status"] == "done" for point in data["points"]):
        return note
    counts = Counter(point["status"] for point in data["points"])
    told = ", ".join(f"{count} {html.escape(status)}" for status, count in counts.items())
    return f'{note}<p class="notice">Nothing was measured: {told}. Each row below says why.</p>'


def _facts(data: Mapping[str, Any]) -> str:
    """What holds for all rows, the models' own distances and the floor, as a list of terms."""
    rows, primary = data["rows"], data["metrics"][0]
    shared = {name: {str(row[name]) for row in rows if row.get(name) not in (None, "")} for name in _FACTS}
    facts = {name.replace("_", " "): values.pop() for name, values in shared.items() if len(values) == 1}
    facts["seeds"] = ", ".join(sorted({str(row["seed"]) for row in rows if row.get("seed") is not None}))
    for model in primary["models"]:
        facts[model["name"]] = f"{model['text']} ({model['run']})" if len(primary["models"]) == 1 else model["text"]
    for floor in map(Floor.of_record, data["floors"]):
        name, _, value = floor_text(floor).rpartition(": ")
        facts[name[0].lower() + name[1:]] = value
    items = (f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items() if v)
    return "\n".join(items)


def _matrix(data: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """Samplers down and budgets across, as a paper prints it; without scripts the tables of all metrics are shown."""
    name, budgets = metric["name"], data["budgets"]
    cells = {(p["label"], p["budget"]): p for p in data["points"] if p["role"] == "sampler"}
    head = "".join(f'<th scope="col">NFE {n}</th>' for n in budgets)
    lines = [
        f'<tr><th scope="row">{html.escape(label)}</th>{"".join(_cell(cells.get((label, n)), name) for n in budgets)}</tr>'
        for label in (sampler["label"] for sampler in data["samplers"])
    ]
    way = "larger" if metric["higher"] else "smaller"
    return (
        f'<table class="matrix" data-metric="{html.escape(name)}"><caption>{html.escape(name)}, {way} is better</caption>'
        f'<thead><tr><th scope="col">sampler</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    )


def _cell(point: Mapping[str, Any] | None, metric: str) -> str:
    if point is None:
        return "<td></td>"
    if metric not in point["metrics"]:
        text = "failed" if point["status"] == "failed" else "\N{EN DASH}"
        return f'<td class="{html.escape(point["status"])} none" title="{html.escape(point["reason"])}">{text}</td>'
    entry = point["metrics"][metric]
    value, _, half = entry["text"].partition(" \N{PLUS-MINUS SIGN} ")
    half = f" <small>\N{PLUS-MINUS SIGN}\N{NO-BREAK SPACE}{half}</small>" if half else ""
    marked = ((UNTRAINED, point["untrained"]), (TUNED, entry["tuned"]), (BEYOND, entry["beyond"]))
    signs = "".join(sign for sign, holds in marked if holds)
    kind = " ".join(filter(None, [entry["mark"], "beyond" if entry["beyond"] else ""]))
    tie = "= " if entry["mark"] == "tied" else ""
    return f'<td class="{kind}">{tie}<span>{value}</span>{half}<sup>{signs}</sup></td>'


def _plain_table(data: Mapping[str, Any]) -> str:
    """Every row as given, for readers without scripts."""
    names = ("label", "role", "budget", "nfe", "seed", "value", "low", "high", "images_per_second", "status", "reason")
    head = "".join(f'<th scope="col">{name.replace("_", " ")}</th>' for name in names)
    lines = (
        "<tr>" + "".join(f"<td>{html.escape(_short(row.get(name)))}</td>" for name in names) + "</tr>"
        for row in data["rows"]
    )
    return f'<table class="plain"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
