"""Which rows are the best: seeds made one, ties by overlapping intervals, and how sure the first place is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from bench.intervals import Distance, combined
from samplers.errors import unknown

Row = dict[str, Any]
UNTRAINED, BEYOND, TUNED = "†", "‡", "§"  # marks beside a number, the last beside a row's name
COSTS = (
    *("seconds", "judging_seconds", "images_per_second", "peak_memory_mb", "energy_joules"),
    *("evaluations", "guided_evaluations", "sequential_calls"),
)
_EQUAL = (
    "model_hash",
    "metric",
    "num_samples",
    "dtype",
    "plan_hash",
    "hashes",
    "inputs",
    "guidance",
)  # or a mean means nothing
_SHARES = frozenset({"precision", "recall", "coverage", "label_agreement"})  # in [0, 1]
_AGREEMENT = "label_agreement"  # which is no metric, as every judge of labels gives it
_NODES = 4096  # of the quadrature
_UNTOLD = "unknown"  # status of a row whose figure has a reason instead of a value


@dataclass(frozen=True)
class Best:
    """The best of a budget.

    Attributes:
        label: of the row with the best value; "" where that cannot be told, as a cell is left to another shard, or a value or
            its interval is not known.
        tied: labels of the others whose interval overlaps that row's.
    """

    label: str
    tied: frozenset[str]


@dataclass(frozen=True)
class Choice:
    """The sampler to use within a budget, and how sure that is.

    Attributes:
        row: the best of `candidates`.
        candidates: of every sampler the row with the most calls within the budget, best first.
        chances: probability that each candidate is really the best, in their order; NaN where they are `hidden`.
        tied: those of the candidates whose interval overlaps that of `row`.
        cheaper: a row with fewer calls and a better value than `row`; None where there is none.
    """

    row: Row
    candidates: tuple[Row, ...]
    chances: tuple[float, ...]
    tied: tuple[Row, ...]
    cheaper: Row | None


def aggregated(rows: Sequence[Row]) -> list[Row]:
    """One row for each model, label and budget: several seeds become their mean.

    Value and interval of several seeds are those of `intervals.combined`, calls the most of any seed, costs means, and `seeds`
    counts those that were measured; `of_seeds` is there, and counts all, where some were not. A single row stays as it is. Where
    two models have a row of the same label at one budget, the labels name the model.

    Args:
        rows: of a run, one for each cell and seed.

    Raises:
        ValueError: rows of one label and budget that differ in more than the seed, or not in the seed.
    """
    return _told_apart([_one(group) for group in grouped(rows)])


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """The seeds behind each row of `aggregated`, in its order."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["role"], row.get("model"), row["label"], row["budget"]), []).append(row)
    return list(groups.values())


def measured(rows: Sequence[Row]) -> list[Row]:
    """The rows of samplers that have a value."""
    return [row for row in rows if row["role"] == "sampler" and row["status"] == "done"]


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """The metrics that rows have values of, the primary one first."""
    done = [row for row in rows if row["status"] == "done"]
    further = (name for row in done for name in row.get("metrics") or {} if _has(row, name))
    return list(dict.fromkeys([*(row["metric"] for row in done), *further]))


def of_metric(rows: Sequence[Row], name: str | None) -> list[Row]:
    """The rows with a metric's value and interval in place of the primary one's; rows without it are left out.

    One that has a reason instead of a value is not "done".

    Args:
        rows: of a run.
        name: of the metric; None for the primary one.

    Raises:
        ValueError: no row has this metric.
    """
    if name is None:
        return list(rows)
    if name not in (known := metrics_of(rows)):
        raise unknown("metric", name, known)
    found = []
    for row in rows:
        if row["status"] != "done" or row["metric"] == name:
            found.append(row)
        elif _has(row, name):
            found.append({**row, **row["metrics"][name], "metric": name})
        elif (row.get("metrics") or {}).get(name):
            found.append({**row, **row["metrics"][name], "metric": name, "status": _UNTOLD})
    return found


def _has(row: Row, name: str) -> bool:
    """Whether a row has a finite value of a further metric."""
    return ((row.get("metrics") or {}).get(name) or {}).get("value") is not None


def higher_is_better(metric: str) -> bool:
    """Whether a metric is a quality, such as precision, rather than a distance, as one that nobody registered is taken for."""
    from bench.judging import metrics

    return metric == _AGREEMENT or any(
        known.higher_is_better and metric in known.columns for known in metrics().values()
    )


def cost_of(row: Row) -> float:
    """The value of a row, with the sign that makes smaller better."""
    return -row["value"] if higher_is_better(row.get("metric", "")) else row["value"]


def interval(row: Row) -> tuple[float, float]:
    """The ends of a row's 95 % interval; its value twice where it has none."""
    low, high = row.get("low"), row.get("high")
    return (row["value"] if low is None else low, row["value"] if high is None else high)


def overlap(a: Row, b: Row) -> bool:
    """Whether the intervals of two rows have a point in common."""
    (low, high), (lowest, highest) = interval(a), interval(b)
    return low <= highest and lowest <= high


def best_of(rows: Sequence[Row]) -> dict[int, Best]:
    """At each budget the best label, and those that its interval does not tell from it.

    Args:
        rows: aggregated ones, of one metric.
    """
    budgets: dict[int, list[Row]] = {}
    for row in rows:
        if row["role"] == "sampler":
            budgets.setdefault(row["budget"], []).append(row)
    return {budget: _best(mine) for budget, mine in sorted(budgets.items()) if measured(mine)}


def _best(rows: Sequence[Row]) -> Best:
    """The best at one budget; a mean of fewer seeds than were asked for is not compared."""
    whole = [row for row in measured(rows) if "of_seeds" not in row]
    if not whole or hidden(rows):
        return Best("", frozenset())
    first = min(whole, key=cost_of)
    return Best(first["label"], frozenset(row["label"] for row in whole if row is not first and overlap(row, first)))


def hidden(rows: Sequence[Row]) -> bool:
    """Whether one of the rows is left to another shard, or says that its value or its interval is not known."""
    return any(row["status"] in ("missing", _UNTOLD) for row in rows) or any(map(_without_interval, measured(rows)))


def _without_interval(row: Row) -> bool:
    return all(name in row and row[name] is None for name in ("low", "high", "standard_error"))


def own_model(row: Row, rows: Sequence[Row]) -> Row | None:
    """The many-step run of the row's model under the row's guidance, whose distance is the model's own error.

    A student has none of its own, and is compared with the only one that there is. Under guidance a model is another one, and so
    is a student at a weight of it.

    Args:
        row: of a sampler or a student.
        rows: of the run, or those of one seed.
    """
    many = [other for other in rows if other["role"] == "teacher" and other["status"] == "done"]
    same = [other for other in many if other.get("model_hash") == row.get("model_hash")]
    if not same and len({(other.get("model_hash"), other.get("guidance")) for other in many}) == 1:
        same = many
    return next((other for other in same if _guidance(other) == _guidance(row)), None)


def _guidance(row: Row) -> tuple[str | None, float]:
    """Kind and scale as text, and the weight that is an input of the network."""
    return row.get("guidance"), (row.get("inputs") or {}).get("guidance", 0.0)


def beyond_model(rows: Sequence[Row]) -> set[tuple[str, int]]:
    """Label and budget of the rows that are better than `own_model`."""
    found = ((row, own_model(row, rows)) for row in measured(rows))
    return {(row["label"], row["budget"]) for row, many in found if many is not None and cost_of(row) < cost_of(many)}


def tuned_here(row: Row) -> str:
    """On what a row's sampler was tuned, where that is what judges it in this table; else ""."""
    among = row.get("tuned_metrics")
    return row.get("tuned", "") if not among or row["metric"] in among else ""


def chances_of_first(values: Sequence[float], errors: Sequence[float]) -> list[float]:
    """The probability that each of n quantities is the smallest, given independent normal estimates of them.

    `P_k = E[prod_{j != k} Phi((v_j - x) / s_j)]` over `x ~ N(v_k, s_k^2)`, on the midpoints of 4096 equal parts of that
    probability. Rows of a table share their start noise, which makes differences surer than independence does.

    Args:
        values: the estimates.
        errors: their standard errors, >= 0; 0 is exact, and two that are exact and equal share the place.

    Raises:
        ValueError: unequal lengths, none, or an error that is negative or not a number.
    """
    v, s = np.asarray(values, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    if v.ndim != 1 or v.shape != s.shape or not v.size:
        raise ValueError(f"values and errors must be equally many, at least one, got {v.shape} and {s.shape}")
    if not (s >= 0).all():
        raise ValueError(f"errors must be at least 0, got {s.tolist()}")
    normal = ndtri((np.arange(_NODES) + 0.5) / _NODES)
    chances = np.empty(len(v))
    for k in range(len(v)):
        others = np.arange(len(v)) != k
        ahead = v[others] - (v[k] + s[k] * normal)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.where(ahead == 0, 0.0, ahead / s[others])  # an exact one is ahead or behind: an infinite z
        chances[k] = ndtr(z).prod(axis=1).mean()
    return (chances / chances.sum()).tolist()


def choose(rows: Sequence[Row], budget: int, metric: str | None = None) -> Choice:
    """The best sampler among the rows that need no more calls than the budget.

    Each sampler enters with the row that makes the most calls within it, by the calls really made, and has all its seeds.

    Args:
        rows: of a run.
        budget: network calls, at least 1.
        metric: None for the primary one.

    Raises:
        ValueError: a budget below 1 or below every measured row, an unknown metric, or rows that do not compare.
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1, got {budget}")
    found = of_metric(aggregated(rows), metric)
    mine = [row for row in measured(found) if "of_seeds" not in row] or measured(found)
    if not mine:
        raise ValueError("no sampler has a measured row")
    check_comparable(mine)
    within = [row for row in mine if row["nfe"] <= budget]
    if not within:
        least = min(row["nfe"] for row in mine)
        raise ValueError(f"budget must be at least {least}, the fewest calls that were measured, got {budget}")
    most: dict[str, Row] = {}
    for row in sorted(within, key=lambda row: row["nfe"]):
        most[row["label"]] = row
    candidates = sorted(most.values(), key=cost_of)
    first, *others = candidates
    if hidden([row for row in found if row["role"] == "sampler" and row["budget"] <= budget]):
        chances = [math.nan] * len(candidates)
    else:
        errors = [row.get("standard_error") or 0.0 for row in candidates]
        chances = chances_of_first([cost_of(row) for row in candidates], errors)
    lowest = min(within, key=cost_of)
    cheaper = lowest if cost_of(lowest) < cost_of(first) else None
    tied = tuple(row for row in others if overlap(row, first))
    return Choice(first, tuple(candidates), tuple(chances), tied, cheaper)


def check_comparable(rows: Sequence[Row]) -> None:
    """Refuse rows whose distances do not compare: of another metric, count, extractor or reference.

    Raises:
        ValueError: names what differs.
    """
    for name in ("metric", "num_samples", "hashes"):
        found = list({str(row[name]): row[name] for row in rows if name in row}.values())
        if len(found) > 1:
            raise ValueError(
                f"rows of one table must agree in {name}, got {found[0]} and {found[1]}; they do not compare"
            )


def _one(group: Sequence[Row]) -> Row:
    """A group of seeds as one row."""
    done = [row for row in group if row["status"] == "done"]
    part: Row = {"seeds": len(done), "of_seeds": len(group)} if 0 < len(done) < len(group) else {}
    if len(done) < 2:
        return {**done[0], **part} if done else group[0]
    _check_seeds(done)
    first = {name: value for name, value in done[0].items() if name != "seed"}
    shared = [name for name in first.get("metrics") or {} if all(_has(row, name) for row in done)]
    means: Row = {name: statistics.fmean(row[name] for row in done) for name in _costs(done)}
    if "metrics" in first:
        means["metrics"] = {name: mean_of([row["metrics"][name] for row in done], name) for name in shared}
    return {**first, **means, **mean_of(done), "nfe": max(row["nfe"] for row in done), "seeds": len(done), **part}


def _costs(rows: Sequence[Row]) -> list[str]:
    names = (*COSTS, "label_agreement")
    return [name for name in names if all(row.get(name) is not None for row in rows)]


def mean_of(parts: Sequence[Mapping[str, Any]], metric: str = "") -> Row:
    """Value, low, high and standard error of the mean of a metric over seeds, see `intervals.combined`.

    Args:
        parts: with the same four, of which all but the value may be None. Where one has no standard error, what is known is
            the spread of the values, from three on.
        metric: its name; those that are shares keep to [0, 1].
    """
    values, errors = [part["value"] for part in parts], [part.get("standard_error") for part in parts]
    if any(error is None for error in errors):
        if len(parts) < 3:
            return {"value": statistics.fmean(values), "low": None, "high": None, "standard_error": None}
        errors = [0.0] * len(parts)
    estimates = [
        Distance(part["value"], *interval(dict(part)), float(error or 0.0), 1)
        for part, error in zip(parts, errors, strict=True)
    ]
    mean = combined(estimates, share=metric in _SHARES)
    return {name: getattr(mean, name) for name in ("value", "low", "high", "standard_error")}


def _check_seeds(rows: Sequence[Row]) -> None:
    """Refuse to average what are not seeds of one cell."""
    who = f"{rows[0]['label']} at {rows[0]['budget']}"
    for name in _EQUAL:
        found = list({str(row.get(name)): row.get(name) for row in rows}.values())
        if len(found) > 1:
            raise ValueError(
                f"{who}: its rows are not seeds of one cell, {name} is {found[0]} and {found[1]}; give one of them another label"
            )
    seeds = [row.get("seed") for row in rows]
    twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
    if twice is not None or None in seeds:
        raise ValueError(f"{who}: there are {seeds.count(twice)} rows with seed {twice}; a mean takes each seed once")


def _told_apart(rows: list[Row]) -> list[Row]:
    """Rows of one label and budget get their models into the label."""
    places = [(row["label"], row["budget"]) for row in rows if row["role"] == "sampler"]
    shared = {place[0] for place in places if places.count(place) > 1}
    return [
        {**row, "label": f"{row['label']} ({row.get('model')})"}
        if row["role"] == "sampler" and row["label"] in shared
        else row
        for row in rows
    ]
