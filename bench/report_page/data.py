"""What the report says: a run's rows as the points of charts, with the values, intervals and marks of its tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench.floor import Floor
from bench.intervals import share_interval
from bench.ranking import aggregated, grouped, higher_is_better, metrics_of, tuned_here
from bench.table import Layout, layout, value_text

Row = dict[str, Any]
_AGREEMENT = "label_agreement"


def report_data(
    rows: Sequence[Row], floors: Sequence[Floor], title: str, provenance: dict[str, Any], note: str = ""
) -> dict[str, Any]:
    """What the page shows, ready for JSON: `points` (one for each row of a table), `rows` as given, and the rest.

    A point holds of each metric the value with its interval, its text, its mark ("best", "tied" where its interval overlaps the
    best one's, else "") and whether it is better than the model's own, all of them as `bench.table.layout` has them.
    """
    given = [plain(row) for row in rows]
    prepared = [_prepared(row) for row in given]
    places = {id(row): k for k, row in enumerate(prepared)}
    whole = aggregated(prepared)
    points = [
        _point(row, seeds, [places[id(seed)] for seed in seeds])
        for row, seeds in zip(whole, grouped(prepared), strict=True)
    ]
    primary = given[0]["metric"]
    names = sorted(dict.fromkeys([primary, *metrics_of(whole)]), key=lambda name: name == _AGREEMENT)  # that one last
    level = floors[0].value if floors and floors[0].value > 0 else None
    metrics = [
        {
            **_metric(layout(whole, None if name == primary else name), name, points),
            **{"primary": name == primary, "floor": level if name == primary else None},
        }
        for name in names
    ]
    mine = [point for point in points if point["role"] == "sampler"]
    return {
        "title": title,
        "note": note,
        "metrics": metrics,
        "floors": [asdict(floor) for floor in floors],
        "samplers": [_sampler(label, mine) for label in dict.fromkeys(point["label"] for point in mine)],
        "budgets": sorted({point["budget"] for point in mine}),
        "points": points,
        "rows": given,
        "provenance": plain(provenance),
    }


def _prepared(row: Row) -> Row:
    """A row as `aggregated` takes it: what is not finite has failed, and the agreement of labels is a metric with an interval."""
    if row["status"] != "done":
        return row
    if row.get("value") is None:
        return {**row, "status": "failed", "reason": "its distance is not a finite number"}
    share, count = row.get(_AGREEMENT), row["num_samples"]
    if share is None:
        return row
    agreement = asdict(share_interval(share, math.sqrt(share * (1 - share) / count), count))
    return {**row, "metrics": {**(row.get("metrics") or {}), _AGREEMENT: agreement}}


def _sampler(label: str, points: Sequence[Row]) -> Row:
    mine = [point for point in points if point["label"] == label]
    return {
        "label": label,
        "student": any(point["student"] for point in mine),
        "measured": any(point["status"] == "done" for point in mine),
    }


def _point(row: Row, seeds: Sequence[Row], places: list[int]) -> Row:
    """An aggregated row without its metrics; `places` are those of its seeds among the rows."""
    done, speed = row["status"] == "done", row.get("images_per_second")
    reasons = [seed.get("reason") or seed["status"] for seed in seeds if seed["status"] != "done"]
    return {
        **{name: row.get(name) for name in ("role", "model", "label", "budget", "status")},
        "reason": "; ".join(dict.fromkeys(reasons)),
        "student": "trained" in row,
        "untrained": row.get("trained") is False,
        "nfe": row.get("nfe") if done else None,
        "ms": round(1000 / speed, 6) if speed else None,
        "seconds": row.get("seconds"),
        "peak_memory_mb": row.get("peak_memory_mb"),
        "metrics": {},
        "seeds": row.get("seeds", 1) if done else 0,
        "rows": places,
    }


def _metric(shown: Layout, name: str, points: Sequence[Row]) -> Row:
    """Name, direction and the models' own values of a metric; gives the points theirs."""
    found = {_place(row): _entry(row, shown) for row in shown.rows if row["status"] == "done"}
    for point in points:
        if _place(point) in found:
            point["metrics"][name] = found[_place(point)]
    own = [point for point in points if point["role"] == "teacher" and name in point["metrics"]]
    return {
        "name": name,
        "higher": higher_is_better(name),
        "models": [{**point["metrics"][name], **_own_names(point, len(own) > 1)} for point in own],
    }


def _own_names(point: Row, several: bool) -> Row:
    """What the model itself is called, and the run that stands for it."""
    run = f"{point['label']}, {point['nfe']:g} calls"
    return {"name": f"model {point['model']} ({run})" if several else "the model itself", "run": run}


def _place(row: Row) -> tuple[Any, ...]:
    return row["role"], row.get("model"), row["label"], row["budget"]


def _entry(row: Row, shown: Layout) -> Row:
    mark, beyond = "", False
    if row["role"] == "sampler":
        best = shown.best[row["budget"]]
        mark = "best" if row["label"] == best.label else "tied" if row["label"] in best.tied else ""
        beyond = (row["label"], row["budget"]) in shown.beyond
    parts = {name: row.get(name) for name in ("value", "low", "high", "standard_error")}
    return {**parts, "text": value_text(row), "mark": mark, "beyond": beyond, "tuned": tuned_here(row)}


def plain(value: Any) -> Any:
    """The same in the types of JSON: numbers of NumPy as Python's, what is not finite as None, anything else as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy's scalars and arrays
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
