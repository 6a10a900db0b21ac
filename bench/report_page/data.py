"""What the report says: the rows of a run as points with intervals, the best set of each budget, what lies below the model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.floor import Floor
from bench.intervals import share_interval
from bench.ranking import mean_of, overlap, tuned_here

Row = dict[str, Any]
_AGREEMENT = "label_agreement"


@dataclass(frozen=True)
class Estimate:
    """A metric of a sampler at a budget, over its seeds.

    Attributes:
        value: mean over the seeds.
        low, high: ends of the 95 % interval; None where nothing says how far the value may be off.
        standard_error: of the mean.
        count: how many seeds.
    """

    value: float
    low: float | None = None
    high: float | None = None
    standard_error: float | None = None
    count: int = 1

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high; the value itself where they are not known."""
        return (
            self.value if self.low is None else self.low,
            self.value if self.high is None else self.high,
        )

    def __str__(self) -> str:
        """The value and half its interval, to the digit where the interval has its second."""
        half = 0.5 * (self.interval[1] - self.interval[0])
        if half <= 0:
            return f"{self.value:.4g}"
        digits = max(0, 1 - math.floor(math.log10(half)))
        return f"{self.value:.{digits}f} \N{PLUS-MINUS SIGN} {half:.{digits}f}"


def report_data(
    rows: Sequence[Row],
    floors: Sequence[Floor],
    title: str,
    provenance: dict[str, Any],
    note: str = "",
    higher_is_better: Collection[str] = (),
) -> dict[str, Any]:
    """What the page shows, ready for JSON: `points` (one for each role, label and budget), `rows` as given, and the rest.

    A point holds of each metric the `Estimate`, its text, its mark ("best" with the best value of its budget, "tied" where
    its interval overlaps the best one's, else "") and, of a distance, whether it lies below the model's own.
    """
    rows = [plain(row) for row in rows]
    points = [_point(rows, members) for members in _groups(rows)]
    metrics = _metrics(points, rows[0]["metric"], floors, {_AGREEMENT, *higher_is_better})
    for metric in metrics:
        _mark(points, metric)
    mine = [point for point in points if point["role"] == "sampler"]
    return {
        "title": title,
        "note": note,
        "metrics": metrics,
        "floors": [asdict(floor) for floor in floors],
        "samplers": [_sampler(label, mine) for label in dict.fromkeys(point["label"] for point in mine)],
        "budgets": sorted({point["budget"] for point in mine}),
        "points": points,
        "rows": rows,
        "provenance": plain(provenance),
    }


def combined(seeds: Sequence[Estimate], metric: str = "") -> Estimate:
    """The mean of a metric over independent seeds, see `bench.ranking.mean_of`; one seed stays as it is."""
    if len(seeds) == 1:
        return seeds[0]
    return Estimate(**mean_of([asdict(seed) for seed in seeds], metric), count=len(seeds))


def best_set(estimates: Sequence[Estimate], higher_is_better: bool = False) -> list[str]:
    """For each estimate "best", "tied" where its interval overlaps the best one's, or ""; no estimates, no marks."""
    if not estimates:
        return []
    sign, rows = -1.0 if higher_is_better else 1.0, [asdict(estimate) for estimate in estimates]
    best = min(range(len(rows)), key=lambda k: sign * rows[k]["value"])
    return ["best" if k == best else "tied" if overlap(row, rows[best]) else "" for k, row in enumerate(rows)]


def _sampler(label: str, points: Sequence[Row]) -> Row:
    mine = [point for point in points if point["label"] == label]
    return {
        "label": label,
        "student": any(point["student"] for point in mine),
        "measured": any(point["status"] == "done" for point in mine),
    }


def _groups(rows: Sequence[Row]) -> list[list[int]]:
    """Indices of the rows of each point, in the order of the first."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for k, row in enumerate(rows):
        groups.setdefault((row["role"], row["label"], row["budget"]), []).append(k)
    return list(groups.values())


def _point(rows: Sequence[Row], members: Sequence[int]) -> dict[str, Any]:
    first, mine = rows[members[0]], [rows[k] for k in members]
    done = [row for row in mine if row["status"] == "done" and row.get("value") is not None]
    reasons = [row.get("reason") or "its distance is not a finite number" for row in mine if row not in done]
    status = "done" if done else first["status"] if first["status"] != "done" else "failed"
    return {
        **{name: first[name] for name in ("role", "label", "budget")},
        "status": status,
        "reason": "; ".join(dict.fromkeys(reasons)),
        "student": "trained" in first,
        "untrained": first.get("trained") is False,
        "tuned": first.get("tuned") or "",
        "tuned_metrics": first.get("tuned_metrics") or [],
        "nfe": _mean(row.get("nfe") for row in done),
        "ms": _mean(1000 / row["images_per_second"] for row in done if row.get("images_per_second")),
        "seconds": _mean(row.get("seconds") for row in done),
        "peak_memory_mb": max((row["peak_memory_mb"] for row in done if row.get("peak_memory_mb")), default=None),
        "metrics": {name: _entry(seeds, first, name) for name, seeds in _seeds(done).items()},
        "seeds": len(done),
        "rows": list(members),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.fmean(known), 6) if known else None


def _seeds(done: Sequence[Row]) -> dict[str, list[Estimate]]:
    """Of each metric an estimate for each seed that has one; the primary one first, the agreement of labels last."""
    found: dict[str, list[Estimate]] = {}
    for row in done:
        entries = {row["metric"]: row, **(row.get("metrics") or {})}
        if row.get(_AGREEMENT) is not None:
            entries[_AGREEMENT] = _share(row[_AGREEMENT], row["num_samples"])
        for name, entry in entries.items():
            if entry.get("value") is not None:
                parts = (entry.get(part) for part in ("low", "high", "standard_error"))
                found.setdefault(name, []).append(Estimate(entry["value"], *parts))
    return found


def _share(value: float, count: int) -> Row:
    """A share of `count` samples with its 95 % interval."""
    return asdict(share_interval(value, math.sqrt(value * (1 - value) / count), count))


def _entry(seeds: Sequence[Estimate], row: Row, metric: str) -> dict[str, Any]:
    whole, tuned = combined(seeds, metric), tuned_here({**row, "metric": metric})
    return {**asdict(whole), "text": str(whole), "mark": "", "below_model": False, "tuned": tuned}


def _metrics(
    points: Sequence[Row], primary: str, floors: Sequence[Floor], higher: Collection[str]
) -> list[dict[str, Any]]:
    """Name, direction, floor and the model's own value of each metric, the primary one first."""
    names = [primary, *(name for point in points for name in point["metrics"])]
    names = sorted(dict.fromkeys(names), key=lambda name: name == _AGREEMENT)  # stable: the agreement last
    model = next((point for point in points if point["role"] == "teacher" and point["status"] == "done"), None)
    return [
        {
            "name": name,
            "primary": name == primary,
            "higher": name in higher and name != primary,
            "floor": floors[0].value if name == primary and floors and floors[0].value > 0 else None,
            "model": {**model["metrics"][name], "label": model["label"], "nfe": model["nfe"]}
            if model and name in model["metrics"]
            else None,
        }
        for name in names
    ]


def _mark(points: Sequence[Row], metric: Mapping[str, Any]) -> None:
    name, higher, model = metric["name"], metric["higher"], metric["model"]
    mine = [point for point in points if point["role"] == "sampler" and name in point["metrics"]]
    for budget in {point["budget"] for point in mine}:
        entries = [point["metrics"][name] for point in mine if point["budget"] == budget]
        estimates = [Estimate(entry["value"], entry["low"], entry["high"]) for entry in entries]
        for entry, mark in zip(entries, best_set(estimates, higher), strict=True):
            entry["mark"] = mark
            entry["below_model"] = bool(model) and not higher and entry["value"] < model["value"]


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
