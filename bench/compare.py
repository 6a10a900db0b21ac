"""Two results folders held against each other cell by cell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table
from scipy.special import ndtr

from bench.ranking import aggregated, metrics_of, of_metric
from bench.table import value_text
from samplers.errors import unknown

Row = dict[str, Any]
LEVEL = 0.05  # of a whole comparison
# what says how a number was made, in the words of the summary
_MADE_BY = (
    "model",
    "model_hash",
    "sampler",
    "options",
    "grid",
    "final",
    "afs",
    "plan_hash",
    "inputs",
    "num_samples",
    "seed",
)
_MADE_WITH = ("seeds", "hashes", "dtype", "device", "torch", "integrators", "code", "trained", "tuned")
_COMPARABLE = ("metric", "num_samples", "hashes")


@dataclass(frozen=True)
class Difference:
    """A cell that both folders have.

    Attributes:
        role, label, budget: of the cell.
        a, b: its rows, over all seeds.
        value: b's value less a's.
        standard_error: of `value`, from the two rows' as of independent runs; None where one is not known.
        z: `value / standard_error`; None likewise.
        p: two-sided probability of such a z by chance, with Holm's correction over the cells; None likewise.
        differs: the fields beside the numbers in which the rows differ.
    """

    role: str
    label: str
    budget: int
    a: Row
    b: Row
    value: float
    standard_error: float | None
    z: float | None
    p: float | None
    differs: tuple[str, ...]

    @property
    def significant(self) -> bool:
        """Whether chance gives such a difference in fewer than one comparison of twenty."""
        return self.p is not None and self.p < LEVEL


@dataclass(frozen=True)
class Comparison:
    """What two folders have in common, and what not.

    Attributes:
        metric: that is compared.
        cells: measured in both.
        only_a, only_b: rows that only one folder has a number of.
    """

    metric: str
    cells: tuple[Difference, ...]
    only_a: tuple[Row, ...]
    only_b: tuple[Row, ...]

    @property
    def significant(self) -> list[Difference]:
        """The cells whose difference is not chance."""
        return [cell for cell in self.cells if cell.significant]


def compare(a: Sequence[Row], b: Sequence[Row], metric: str | None = None) -> Comparison:
    """Compare the rows of two runs; rows belong together by role, label and budget.

    Args:
        a, b: rows of each run.
        metric: that both have; None for the primary one of `a`.

    Raises:
        ValueError: a metric that one of them lacks, or rows that `aggregated` refuses.
    """
    names = [metrics_of(a), metrics_of(b)]
    if not names[0] or not names[1]:
        raise ValueError("both runs must have measured rows; one has none")
    metric = metric or names[0][0]
    for known in names:
        if metric not in known:
            raise unknown("metric", metric, known)
    mine, theirs = (_placed(of_metric(aggregated(rows), metric)) for rows in (a, b))
    both = [place for place in mine if place in theirs]
    found = [_difference(place, mine[place], theirs[place]) for place in both]
    corrected = iter(holm([cell.p for cell in found if cell.p is not None]))
    cells = tuple(cell if cell.p is None else replace(cell, p=next(corrected)) for cell in found)
    only = [
        tuple(row for place, row in one.items() if place not in other)
        for one, other in ((mine, theirs), (theirs, mine))
    ]
    return Comparison(metric, cells, *only)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected so that any false rejection is as rare as each was (Holm 1979, Scand. J. Statist. 6, 65-70).

    The i-th smallest of n, from i = 0, is multiplied by n - i; none is below a smaller one's, or above 1.

    Args:
        p: of n tests, each in [0, 1].
    """
    given = np.asarray(p, dtype=np.float64)
    order = np.argsort(given, kind="stable")
    corrected = np.empty(len(given))
    corrected[order] = np.maximum.accumulate(given[order] * (len(given) - np.arange(len(given)))).clip(max=1.0)
    return corrected.tolist()


def _placed(rows: Sequence[Row]) -> dict[tuple[str, str, int], Row]:
    return {(row["role"], row["label"], row["budget"]): row for row in rows if row["status"] == "done"}


def _difference(place: tuple[str, str, int], a: Row, b: Row) -> Difference:
    """The difference in a cell; its p-value is not corrected."""
    value, (error_a, error_b) = b["value"] - a["value"], (a.get("standard_error"), b.get("standard_error"))
    differs = tuple(
        name for name in (*_MADE_BY, *_MADE_WITH) if a.get(name) != b.get(name) and not _same_plan(name, a, b)
    )
    if error_a is None or error_b is None:
        return Difference(*place, a, b, value, None, None, None, differs)
    error = math.hypot(error_a, error_b)
    z = value / error if error else math.copysign(math.inf, value) if value else 0.0
    return Difference(*place, a, b, value, error, z, 2.0 * float(ndtr(-abs(z))), differs)


def _same_plan(name: str, a: Row, b: Row) -> bool:
    """Whether a field is only said in another way, as tables that leave defaults out do: one plan has one of each."""
    return (
        name in ("options", "final")
        and a["sampler"] == b["sampler"]
        and bool(a.get("plan_hash"))
        and a["plan_hash"] == b.get("plan_hash")
    )


def diff_table(found: Comparison, a: str, b: str) -> Table:
    """The comparison for the terminal: cells that differ significantly are bold.

    Args:
        found: the comparison.
        a, b: names of the two folders.
    """
    table = Table(title=f"{found.metric}; A is {escape(a)}, B is {escape(b)}", title_justify="left", box=box.SIMPLE)
    for name in ("cell", "A", "B", "B - A", "error", "z", "p (Holm)"):
        table.add_column(name, justify="left" if name == "cell" else "right", overflow="fold")
    table.add_column("differ in", overflow="fold")
    for cell in found.cells:
        name = cell.label + (" (the model itself)" if cell.role == "teacher" else "")
        figures = [
            f"{cell.value:+.3g}",
            *("" if x is None else f"{x:.3g}" for x in (cell.standard_error, cell.z, cell.p)),
        ]
        texts = [f"{name} at {cell.budget}", value_text(cell.a), value_text(cell.b), *figures, ", ".join(cell.differs)]
        table.add_row(*map(escape, texts), style="bold" if cell.significant else "")
    return table


def diff_notes(found: Comparison, a: str, b: str) -> list[str]:
    """What stands under it: how many differ, what else is different, and the cells of one folder alone."""
    count, tested = len(found.significant), sum(cell.p is not None for cell in found.cells)
    lines = [f"{count} of {tested} differences significant at {LEVEL:g} (two-sided, Holm's correction over the cells)."]
    for name in dict.fromkeys(name for cell in found.cells for name in cell.differs):
        mine = [cell for cell in found.cells if name in cell.differs]
        pairs = list(dict.fromkeys(f"{shown(cell.a.get(name))} -> {shown(cell.b.get(name))}" for cell in mine))
        more = f" and {len(pairs) - 1} more" if len(pairs) > 1 else ""
        lines.append(f"{name} differs in {len(mine)} of {len(found.cells)} cells: {pairs[0]}{more}.")
    if any(set(cell.differs) & set(_COMPARABLE) for cell in found.cells):
        lines.append("Distances of other counts, extractors or references do not compare: their bias differs.")
    for name, rows in ((a, found.only_a), (b, found.only_b)):
        if rows:
            budgets: dict[str, list[str]] = {}
            for row in rows:
                budgets.setdefault(row["label"], []).append(str(row["budget"]))
            cells = "; ".join(f"{label} at {', '.join(at)}" for label, at in budgets.items())
            lines.append(f"Measured in {name} only: {cells}.")
    return lines


def shown(value: Any) -> str:
    """A field of a row in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items()) or "none"
    return "none" if value in (None, "") else str(value)
