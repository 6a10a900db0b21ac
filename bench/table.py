"""Rows to tables: CSV for machines, Markdown for papers and pages, a rich table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
from rich.table import Table

from bench.costs import costs, md_line, per_image, training
from bench.floor import Floor
from bench.ranking import (
    BEYOND,
    TUNED,
    UNTRAINED,
    Best,
    aggregated,
    best_of,
    beyond_model,
    higher_is_better,
    interval,
    measured,
    metrics_of,
    of_metric,
    own_model,
    tuned_here,
)
from bench.results import INTERVAL, MODEL_VALUE, REASON

Row = dict[str, Any]
OWN = "model itself"  # head of the last column
_WHOLE = ("nfe", "train_images", "evaluations", "guided_evaluations", "sequential_calls")


@dataclass(frozen=True)
class Layout:
    """What a table shows of one metric, whatever it is written in.

    Attributes:
        rows: aggregated ones, of that metric.
        labels: down.
        budgets: across.
        cells: the row at a label and a budget.
        best: of each budget.
        beyond: label and budget of those that are better than the model's own many-step run.
        own: the row of that run, by label.
    """

    rows: list[Row]
    labels: list[str]
    budgets: list[int]
    cells: Mapping[tuple[str, int], Row]
    best: Mapping[int, Best]
    beyond: set[tuple[str, int]]
    own: Mapping[str, Row]

    def own_text(self, label: str) -> str:
        """What the model of a label has by itself, for the last column; nothing where no many-step run is its own."""
        return value_text(self.own[label]) if label in self.own else ""

    def name(self, label: str) -> str:
        """The label, with its mark."""
        return label + (TUNED if any(tuned_here(row) for row in self.rows if row["label"] == label) else "")

    def texts(self, label: str, best: Callable[[str], str], tied: Callable[[str], str]) -> list[str]:
        """A line's cells, those of the best set written by the two functions."""
        return [self._text(label, n, best, tied) for n in self.budgets]

    def _text(self, label: str, budget: int, best: Callable[[str], str], tied: Callable[[str], str]) -> str:
        row = self.cells.get((label, budget))
        if row is None or row["status"] != "done":
            return "" if row is None else "failed" if row["status"] == "failed" else "-"
        text = value_text(row) + marks(row, (label, budget) in self.beyond) + part_of_seeds(row)
        mine = self.best[budget]
        return best(text) if label == mine.label else tied(text) if label in mine.tied else text


def layout(rows: Sequence[Row], metric: str | None = None) -> Layout:
    """The table of a metric, by default the primary one; errors as in `of_metric` and `aggregated`."""
    found = of_metric(aggregated(rows), metric)
    mine = [row for row in found if row["role"] == "sampler"]
    return Layout(
        found,
        list(dict.fromkeys(row["label"] for row in mine)),
        sorted({row["budget"] for row in mine}),
        {(row["label"], row["budget"]): row for row in mine},
        best_of(found),
        beyond_model(found),
        {row["label"]: many for row in measured(mine) if (many := own_model(row, found)) is not None},
    )


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """One line for each cell and seed with everything that is known of it; nested parts as columns of their own.

    A further metric is `<metric>`, `<metric>_low`, `<metric>_high` and `<metric>_standard_error`, and `<metric>_reason` where
    there is no value. `bench.columns` describes all columns.
    """
    table = pd.json_normalize([{**_flat(row), **_own_values(row, rows)} for row in rows], sep="_")
    whole = [name for name in _WHOLE if name in table and (table[name].dropna() % 1 == 0).all()]
    return table.astype(dict.fromkeys(whole, "Int64"))  # which stay whole where some rows have none


def _flat(row: Row) -> Row:
    flat = {name: value for name, value in row.items() if name != "metrics"}
    for name, parts in (row.get("metrics") or {}).items():
        flat |= {name: parts["value"], **{f"{name}_{part}": parts.get(part) for part in INTERVAL}}
        flat |= {f"{name}_{REASON}": parts[REASON]} if parts.get(REASON) else {}
    return {**flat, **per_image(row), "options": _literal(row["options"])}


def _literal(options: Row) -> str:
    """Options as Python writes them, and infinity in a form that can be read back."""
    return "{" + ", ".join(f"{k!r}: {'1e999' if v == math.inf else repr(v)}" for k, v in options.items()) + "}"


def _own_values(row: Row, rows: Sequence[Row]) -> Row:
    """What the row's model has by itself of each metric, at the converged solution."""
    mine = [other for other in rows if other.get("seed") == row.get("seed")]
    many = own_model(row, mine)
    if many is None:
        return {}
    metrics = many.get("metrics") or {}
    further = {f"{name}_{MODEL_VALUE}": parts["value"] for name, parts in metrics.items() if parts["value"] is not None}
    return {MODEL_VALUE: many["value"], **further}


def markdown(rows: Sequence[Row], floors: Sequence[Floor], title: str, note: str = "") -> str:
    """The tables of distances, samplers down and budgets across, with the lines a reader needs to judge them, and of costs.

    Args:
        rows: of a run.
        floors: of the distance, see `bench.floor`.
        title: of the page.
        note: what every table must say.
    """
    lines = [f"# {title}", "", *_distances(layout(rows)), ""]
    lines += [*(f"- {line}" for line in notes(rows, floors, note)), ""]
    for name in metrics_of(aggregated(rows))[1:]:
        shown = layout(rows, name)
        lines += [f"## {name}", "", *_distances(shown), "", *(f"- {line}" for line in _metric_notes(shown)), ""]
    return "\n".join([*lines, *_agreements(rows), *costs(rows), *training(rows)])


def _distances(shown: Layout) -> list[str]:
    last = [OWN] if shown.own else []
    head = ["sampler", *(f"NFE {n}" for n in shown.budgets), *last]
    lines = [md_line(head), md_line(["---", *("---:" for _ in head[1:])])]
    for label in shown.labels:
        texts = shown.texts(label, lambda text: f"**{text}**", lambda text: f"= {text}")
        lines.append(md_line([shown.name(label), *texts, *(shown.own_text(label) for _ in last)]))
    return lines


def terminal(rows: Sequence[Row], floors: Sequence[Floor], title: str, note: str = "") -> Table:
    """The first of these tables for the terminal; the best of each column is marked."""
    shown = layout(rows)
    caption = "\n".join(notes(rows, floors, note, best="*", tied="="))
    table = Table(title=title, caption=caption, caption_justify="left", min_width=60)
    table.add_column("sampler", no_wrap=True)
    for n in shown.budgets:
        table.add_column(f"NFE {n}", justify="right", no_wrap=True)
    for label in shown.labels:
        texts = shown.texts(label, lambda text: f"[bold green]*{text}[/]", lambda text: f"[green]={text}[/]")
        table.add_row(shown.name(label), *texts)
    return table


def _agreements(rows: Sequence[Row]) -> list[str]:
    """Lines of a table of how often samples show the label they were asked for, where guidance is there to raise that."""
    mine = [row for row in aggregated(rows) if row["status"] == "done" and row.get("label_agreement") is not None]
    if not any(row.get("guidance") for row in mine):
        return []
    shown, found = layout(rows), {(row["role"], row["label"], row["budget"]): row["label_agreement"] for row in mine}
    lines = ["## Label agreement", "", md_line(["sampler", *(f"NFE {n}" for n in shown.budgets)])]
    lines.append(md_line(["---", *("---:" for _ in shown.budgets)]))
    for label in shown.labels:
        shares = (found.get(("sampler", label, n)) for n in shown.budgets)
        lines.append(
            md_line([shown.name(label), *("" if share is None else f"{100 * share:.1f} %" for share in shares)])
        )
    own = [f"{100 * row['label_agreement']:.1f} %" for row in mine if row["role"] == "teacher"]
    model = f" The model itself: {own[0]}." if own else ""
    return [*lines, "", f"- Samples that the classifier gives the label they were asked for.{model}", ""]


def notes(
    rows: Sequence[Row], floors: Sequence[Floor], note: str = "", best: str = "Bold", tied: str = "="
) -> list[str]:
    """What stands under the table: the suite's note, metric, counts, marks, the model's own distance, floor, failures.

    Args:
        rows: of a run.
        floors: of the distance, see `bench.floor`.
        note: the suite's.
        best, tied: how the table marks the best of a column, and what its interval overlaps.
    """
    shown = layout(rows)
    first = shown.rows[0]
    seeds = max((row.get("of_seeds") or row.get("seeds", 1) for row in shown.rows), default=1)
    means = f", mean of {seeds} seeds" if seeds > 1 else ""
    lines = [f"{note[0].upper()}{note[1:]}."] if note else []
    lines += [
        f"{first['metric']} of {first['num_samples']} samples against the reference statistics{means}, "
        "± half the 95 % interval; smaller is better."
    ]
    if any(mine.tied for mine in shown.best.values()):
        lines.append(f"{best}: the best of a column; {tied}: its 95 % interval overlaps the best one's, a tie.")
    lines += _own(shown.rows)
    lines += [floor_text(floor) + "." for floor in floors]
    lines += [*_fewer(shown.rows), *_marked(shown), *_guidance(shown.rows), *_shared(rows)]
    return [*lines, *_unmeasured(rows), *_reasons(rows)]


def floor_text(floor: Floor) -> str:
    """A floor as a clause: at how many samples, of what, how large."""
    at = f" at {floor.count} samples" if floor.count else ""
    return f"Floor{at}, {floor.what}: {value_text(asdict(floor))}"


def _own(rows: Sequence[Row]) -> list[str]:
    return [
        f"The model itself ({row['label']}, {row['nfe']} calls): {value_text(row)}."
        for row in rows
        if row["role"] == "teacher" and row["status"] == "done"
    ]


def _metric_notes(shown: Layout) -> list[str]:
    higher = higher_is_better(shown.rows[0]["metric"])
    return [f"{'Larger' if higher else 'Smaller'} is better.", *_own(shown.rows), *_marked(shown)]


def _fewer(rows: Sequence[Row]) -> list[str]:
    fewer = sorted((row["label"], row["budget"], row["nfe"]) for row in measured(rows) if row["nfe"] != row["budget"])
    calls = ", ".join(f"{label} {nfe} of {budget}" for label, budget, nfe in fewer)
    return [f"Calls used where a budget is not a multiple of a step: {calls}."] if fewer else []


def _marked(shown: Layout) -> list[str]:
    """What the marks of this table mean, and why a column has none."""
    lines = []
    if any(not best.label for best in shown.best.values()):
        lines.append("A column has no best where a cell is left to others, or a value or its interval is not known.")
    if any(row.get("trained") is False for row in measured(shown.rows)):
        lines.append(
            f"{UNTRAINED} The student was not trained for this number of calls; it takes the sampler of its plan."
        )
    tuned: dict[str, list[str]] = {}
    for row in shown.rows:
        if why := tuned_here(row):
            tuned.setdefault(why, []).append(row["label"])
    for why, labels in tuned.items():
        lines.append(f"{TUNED} {', '.join(dict.fromkeys(labels))}: {why}.")
    return lines + _beyond(shown)


def _beyond(shown: Layout) -> list[str]:
    where = "Above" if higher_is_better(shown.rows[0]["metric"]) else "Below"
    text = f"{BEYOND} {where} the model's own value: between such rows the model, not the sampler, is ranked."
    return [text] if shown.beyond else []


def _guidance(rows: Sequence[Row]) -> list[str]:
    done, lines = measured(rows), list[str]()
    weights = {row["label"]: row["inputs"]["guidance"] for row in done if "guidance" in row.get("inputs", {})}
    if weights:
        lines.append(f"Guidance weight: {', '.join(f'{label} {weight:g}' for label, weight in weights.items())}.")
    kinds: dict[str, dict[str, list[str]]] = {}
    for row in sorted((row for row in done if row.get("guidance")), key=lambda row: row["budget"]):
        kinds.setdefault(row["label"], {}).setdefault(row["guidance"], []).append(f"{row['evaluations']:g}")
    if kinds:
        told = "; ".join(f"{label} {kind} {', '.join(n)}" for label, of in kinds.items() for kind, n in of.items())
        lines.append(
            "Under guidance the NFE of a column counts the points at which the sampler asks, one after the other; the network is "
            f"evaluated more often. Evaluations of a sample at the budgets: {told}."
        )
    return lines


def _shared(rows: Sequence[Row]) -> list[str]:
    """What the speed of rows is not, where they shared the first call."""
    text = (
        "Cells shared the answer to their first call: it counts among the calls of each, but its time is that of the first of "
        "them alone, so that images/s of the others are too high."
    )
    return [text] if any(row.get("shared_first_call") for row in rows) else []


def _unmeasured(rows: Sequence[Row]) -> list[str]:
    """Absent and missing cells of each label, with the reason at the largest budget, and every failure."""
    absent: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        if row["status"] not in ("done", "failed"):
            absent.setdefault((row["label"], row["status"]), {})[row["budget"]] = row["reason"]
    lines = [
        f"Not measured: {who} at {', '.join(map(str, sorted(why)))}; {why[max(why)]}."
        for (who, _), why in absent.items()
    ]
    failed = [row for row in rows if row["status"] == "failed"]
    several = len({row.get("seed") for row in rows}) > 1
    for row in failed:
        seed = f" with seed {row['seed']}" if several and "seed" in row else ""
        lines.append(f"Failed: {row['label']} at {row['budget']}{seed}: {row['reason']}")
    return lines


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Further metrics that could not be had of samples, each with its reason and with the rows where that is not all."""
    found: dict[tuple[str, str], list[Row]] = {}
    done = [row for row in rows if row["status"] == "done"]
    for row in done:
        for name, parts in (row.get("metrics") or {}).items():
            if parts.get("reason"):
                found.setdefault((name, parts["reason"]), []).append(row)
    lines = []
    for (name, why), mine in found.items():
        places = ", ".join(dict.fromkeys(f"{row['label']} at {row['budget']}" for row in mine))
        lines.append(f"{name} not known{'' if len(mine) == len(done) else f' of {places}'}: {why}.")
    return lines


def marks(row: Row, beyond: bool) -> str:
    """The marks beside a row's number."""
    return (UNTRAINED if row.get("trained") is False else "") + (BEYOND if beyond else "")


def part_of_seeds(row: Row) -> str:
    """How many seeds a mean has, where some failed."""
    return f" ({row['seeds']} of {row['of_seeds']} seeds)" if "of_seeds" in row else ""


def halves(row: Row) -> tuple[str, str]:
    """The value and half its interval, to the digit where the interval has its second; no half where there is none.

    The lower half may be cut off at 0, so that the longer one counts.
    """
    low, high = interval(row)
    half = max(high - row["value"], row["value"] - low)
    if half <= 0:
        return f"{row['value']:.3f}" if row.get("high") is not None else f"{row['value']:.4g}", ""
    digits = max(0, 1 - math.floor(math.log10(half)))
    return f"{row['value']:.{digits}f}", f"{half:.{digits}f}"


def value_text(row: Row) -> str:
    """The value ± half its interval."""
    value, half = halves(row)
    return f"{value} ± {half}" if half else value
