"""What the certificates' tables say: the page beside them and the terminal's counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.certify.tolerance import TOLERANCES
from samplers.registry import get_sampler

Row = dict[str, Any]
_KINDS = ("global", "local", "weak, mean given a start", "weak, variance", "strong")
_STOCHASTIC = _KINDS[2:]
_BY_SAMPLER = (
    *("sampler", "order", "slope over a run", "with lowered final orders", "slope of one step", "weak: mean"),
    *("weak: variance", "strong", "start-up rows", "worst parity"),
)
_STATUSES = ("pass", "start-up", "finding", "fail", "for the record", "not an order", "not run")
_EXPLAINED = (
    "- **order.csv**, deterministic: the exact Gaussian mixture in float64, with narrow components (with broad ones the leading "
    "term of the error is so small that the next one hides it until both reach rounding), errors against rk45 with tolerance "
    "1e-12. `global` is the slope over the last doubling of steps whose finer error is above 2e-11, which `steps_used` names; "
    "it passes within 0.2 of the stated order; where 640 to 1280 steps do not give it, up to 5120 are tried. With "
    "`lower_order_final=True` the last step is of first order and leaves an error of second order in its length, so 2 is stated "
    "for every method of order 2 and above. A larger slope there is a finding where what lowering adds, the difference of the "
    "runs with and without it, is of order 2 (`slope_of_lowering`, up to 20480 steps): the rest of the error still exceeds it. "
    "`local` is the slope of one step's error from exact history on uneven steps, stated as "
    "order + 1, free of start-up. `start-up`: the slope is not the stated one because the first steps are of lower order; with "
    "exact states at the first nodes (`slope_exact_start`) it is.",
    "- **order.csv**, stochastic: a one-dimensional Gaussian, where a plan's mean and variance are exact numbers. A slope passes "
    "within 0.2 of the stated order, on the first doubling from 160 to 320 steps on (a path's from 640 to 1280), up to 10240, "
    "that is there like the one before, or is the last one above rounding. `strong` is the "
    "root mean square distance to the reverse SDE of that eta or tau on the same Brownian path, or, where a sampler solves "
    "another SDE, to its own limit on the same noises; that this limit is the right one shows in mean and variance, which are "
    "held against exact ones there too. A sampler that takes eta or tau is measured at its default or 1 and at "
    "0.5: at 1 the mean of a Gaussian is exact in x0 whatever the order. `weak, mean given a start` is the error of the mean of "
    "runs from one state at the log-SNR -1. `not an order`: there is none, for the reason in the note, and the slope is for the "
    "record.",
    "- **parity.csv**: states after every step, on the same nodes with the same noise. `difference`: diffusers' code with "
    "float64 in place of its float32, below 1e-10; `difference_as_shipped`: its code as it is. `finding`: a "
    "stated cause, and the first step that differs is the stated one; or more than 1e-5 as shipped and none in float64, so that "
    "float32 is the cause, with `first_step_as_shipped`.",
    "- **k_diffusion.csv**: `sampler_function(name)` and k-diffusion's own function, in float64, with equal seeds or on one "
    "Brownian path: the largest difference of the states at the start of every step and of the samples, below 1e-11. Made where "
    "k-diffusion is installed (`pip install --no-deps k-diffusion`), whose version it names, and otherwise left as it is.",
    "- **tolerance.csv**: error-controlled samplers on the same mixture. The largest error over eight states is at most 30 times "
    "the tolerance, and falls at least by half where that falls tenfold.",
    "- **faults.csv**: the orders of plans with one coefficient of every step 1 % too large, on the steps of the certificates up "
    "to 2560: an output's, where one step or the mean is to fail, and every step's last noise, where variance and path are.",
    "- **equalities.csv**: the largest difference of coefficients in epsilon over the largest coefficient.",
)


def readme(tables: dict[str, list[Row]]) -> str:
    """The summary that stands beside the tables."""
    lines = ["# Certificates", "", "Made by `fewstep certify`; every number is in the CSV files beside this page.", ""]
    lines += [*_markdown(("certificate", *_STATUSES), _counts(tables)), ""]
    lines += [f"- {text}" for text in _worst(tables)]
    lines += ["", "## How to read them", "", *_EXPLAINED, ""]
    for title, rows in (
        ("Failures", _with(tables, "fail")),
        ("Every sampler: the range of slopes that pass, over its settings, schedules and grids", _by_sampler(tables)),
        ("Error-controlled samplers: network calls and largest error at rtol = atol", _controlled(tables["tolerance"])),
        (
            "Stochastic samplers: the orders that hold, with the slopes over schedules and grids",
            _noisy(tables["order"]),
        ),
        ("Order: what is not the registered order, and why", _notes(tables["order"])),
        ("Parity: what differs from diffusers, where first, and why", _findings(tables["parity"])),
        ("Names that are the same plan", _detected(tables["equalities"])),
        ("Planted faults: one coefficient of every step 1 % too large", _planted(tables["faults"])),
        ("Not run, or not an order", _with(tables, "not run", "not an order")),
    ):
        lines += [f"## {title}", "", *(rows or ["None."]), ""]
    return "\n".join(lines)


def terminal(tables: dict[str, list[Row]], elapsed: float) -> Table:
    """The counts, for the terminal."""
    # heads wrap at spaces, so that the table fits into 80 columns
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, title=f"certificates, {elapsed:.0f} s")
    table.caption, table.caption_justify = "\n".join(_worst(tables)), "left"
    table.add_column("certificate", no_wrap=True)
    for status in _STATUSES:
        table.add_column(status, justify="right", min_width=max(map(len, status.split())))
    for row in _counts(tables):
        table.add_row(*map(str, row))
    return table


def _counts(tables: dict[str, list[Row]]) -> list[tuple[Any, ...]]:
    return [
        (name, *(sum(row["status"] == status for row in rows) for status in _STATUSES)) for name, rows in tables.items()
    ]


def _worst(tables: dict[str, list[Row]]) -> list[str]:
    """The row of each certificate that passes by the least."""
    lines = []
    slopes = [r for r in tables["order"] if r["status"] == "pass" and r["kind"] in ("global", "local")]
    if slopes:
        row = max(slopes, key=lambda r: abs(r["deviation"]))
        lines.append(f"Worst slope that passes: {row['slope']:.2f} for {row['stated']} ({described(row)}).")
    passed = [r for r in tables["parity"] if r["status"] == "pass"]
    if passed:
        row = max(passed, key=lambda r: r["difference"])
        lines.append(f"Worst parity that passes: {row['difference']:.1e} ({described(row)}).")
    same_in_double = [r for r in tables["parity"] if r["status"] in ("pass", "finding") and not r["first_step"]]
    if same_in_double:
        row = max(same_in_double, key=lambda r: r["difference_as_shipped"])
        lines.append(
            f"Worst parity with diffusers' own float32: {row['difference_as_shipped']:.1e} ({described(row)})."
        )
    same = [r for r in tables["equalities"] if r["status"] == "pass"]
    if same:
        lines.append(f"Worst equality: {max(r['difference'] for r in same):.1e} of the largest coefficient.")
    return lines


def described(row: Row) -> str:
    """What a row is about, and where it fails, by what numbers."""
    names = ("scheduler", "theirs", "sampler", "setting", "ours", "kind", "claim", "schedule", "grid", "final", "steps")
    described = ", ".join(str(row[name]) for name in names if row.get(name) not in (None, ""))
    numbers = [
        f"{name} {row[name]:.3g}" for name in ("stated", "slope", "difference") if isinstance(row.get(name), float)
    ]
    return ", ".join([described, *numbers]) if row["status"] == "fail" else described


def _with(tables: dict[str, list[Row]], *statuses: str) -> list[str]:
    """One line for each kind of row with one of the statuses, with its reason."""
    found: Counter[str] = Counter()
    for rows in tables.values():
        for row in rows:
            if row["status"] in statuses:
                what = described(row) if "fail" in statuses else _subject(row)
                reason = row.get("note") or row.get("cause")
                found[f"{what}: {reason}" if reason else what] += 1
    return [f"- {text}" + (f" ({count} rows)" if count > 1 else "") for text, count in found.items()]


def _subject(row: Row) -> str:
    return " ".join(str(row[name]) for name in ("scheduler", "claim", "sampler", "setting", "kind") if row.get(name))


def _notes(rows: Sequence[Row]) -> list[str]:
    """One line for each sampler and reason: what its settings share, and the range of their slopes."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["note"] not in ("", "exact") and row["status"] in ("pass", "start-up", "finding"):
            found.setdefault((row["sampler"], row["note"]), []).append(row)
    return [f"- {name}{_shared(mine)}: {note}. Slopes: {_slopes(mine)}." for (name, note), mine in found.items()]


def _shared(rows: Sequence[Row]) -> str:
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    words = [word for word in settings[0].split() if all(word in setting.split() for setting in settings)]
    count = f"{len(settings)} settings" if len(settings) > 1 else ""
    inside = ", ".join(filter(None, (" ".join(words), count)))
    return "" if inside in ("", "default") else f" ({inside})"


def _slopes(rows: Sequence[Row]) -> str:
    parts = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        places = list(dict.fromkeys(f"{row['schedule']} {row.get('grid') or ''}".strip() for row in mine))
        where = ", ".join(places) if len(places) <= 2 else f"{len(places)} problems"
        parts.append(f"{kind} {_range(row['slope'] for row in mine)} on {where}")
    return ", ".join(parts)


def _range(values: Iterable[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, high = f"{min(finite):.2f}", f"{max(finite):.2f}"
    return low if low == high else f"{low} to {high}"


def _by_sampler(tables: dict[str, list[Row]]) -> list[str]:
    """What holds for each sampler over all its deterministic settings, or its stochastic ones where it has no others."""
    lines: list[Sequence[Any]] = []
    for name in dict.fromkeys(row["sampler"] for row in tables["order"]):
        rows = [row for row in tables["order"] if row["sampler"] == name]
        parity = [r["difference"] for r in tables["parity"] if r["sampler"] == name and r["status"] == "pass"]
        passed = [r for r in rows if r["status"] == "pass" and not r["lower_order_final"]]
        settled = {kind: [r["slope"] for r in passed if r["kind"] == kind] for kind in _KINDS}
        lowered = [r["slope"] for r in rows if r["kind"] == "global" and r["lower_order_final"]]
        start = sum(row["status"] == "start-up" for row in rows)
        ranges = [_range(settled[kind]) for kind in _KINDS]
        worst = f"{max(parity):.0e}" if parity else ""
        lines.append((name, get_sampler(name).order, *ranges[:1], _range(lowered), *ranges[1:], start or "", worst))
    return _markdown(_BY_SAMPLER, lines) if lines else []


def _noisy(rows: Sequence[Row]) -> list[str]:
    """A line for each stochastic setting: the stated orders of mean, variance and path, and the slopes that show them."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if row["kind"] in _STOCHASTIC and row["status"] != "not an order":
            found.setdefault((row["sampler"], row["setting"]), {}).setdefault(row["kind"], []).append(row)
    lines = [(*names, *(_held(mine[kind]) for kind in _STOCHASTIC)) for names, mine in found.items()]
    return _markdown(("sampler", "setting", "mean given a start", "variance", "path"), lines) if lines else []


def _held(rows: Sequence[Row]) -> str:
    """The stated order and the slopes that show it, as 2 (1.92 to 2.02), or that there is no error."""
    if all(row["note"] == "exact" for row in rows):
        return "exact"
    shown = _range(row["slope"] for row in rows if row["status"] == "pass")
    after = _range(row["slope_exact_start"] for row in rows if row["status"] == "start-up")
    ranges = "; ".join(filter(None, (shown, after and f"{after} after the start-up")))
    return f"{rows[0]['stated']} ({ranges or 'as below'})"


def _findings(rows: Sequence[Row]) -> list[str]:
    """One line for each scheduler and cause; the settings are in the CSV."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["status"] == "finding":
            found.setdefault((row["scheduler"], row["sampler"], row["cause"]), []).append(row)
    head = ("scheduler", "sampler", "rows", "first step", "largest difference", "cause")
    lines = []
    for (*names, cause), mine in found.items():
        suffix = "" if mine[0]["first_step"] else "_as_shipped"  # none in float64
        steps = ", ".join(dict.fromkeys(str(row["first_step" + suffix]) for row in mine))
        lines.append((*names, len(mine), steps, _number(max(r["difference" + suffix] for r in mine)), cause))
    return _markdown(head, lines) if lines else []


def _controlled(rows: Sequence[Row]) -> list[str]:
    """A line for each sampler and schedule, a column for each tolerance."""
    cells: dict[tuple[str, str], dict[float, str]] = {}
    for row in rows:
        here = cells.setdefault((row["sampler"], row["schedule"]), {})
        here[row["tolerance"]] = f"{row['calls']} calls, {row['error']:.0e}"
    lines = [(*names, *(here.get(tolerance, "") for tolerance in TOLERANCES)) for names, here in cells.items()]
    return _markdown(("sampler", "schedule", *(f"{tolerance:g}" for tolerance in TOLERANCES)), lines) if lines else []


def _detected(rows: Sequence[Row]) -> list[str]:
    """One line for each group of names, with the settings under which it is one plan."""
    detected = [row for row in rows if row["kind"] == "detected"]
    places = {f"{row['schedule']} {row['grid']}" for row in detected}
    endings = {f"{row['final']}, {row['steps']} steps" for row in detected}
    found: dict[str, dict[str, list[str]]] = {}
    for row in detected:
        here = found.setdefault(row["members"], {})
        here.setdefault(f"{row['final']}, {row['steps']} steps", []).append(f"{row['schedule']} {row['grid']}")
    return [f"- {members} [{_under(here, places, endings)}]" for members, here in found.items()]


def _under(here: dict[str, list[str]], places: set[str], endings: set[str]) -> str:
    """Endings that hold at the same places, together: "zero, 8 steps or zero, 16 steps: everywhere"."""
    together: dict[str, list[str]] = {}
    for ending, at in here.items():
        together.setdefault("everywhere" if {*at} == places else ", ".join(at), []).append(ending)
    if together.keys() == {"everywhere"} and here.keys() == endings:
        return "everywhere"
    return "; ".join(f"{'any ending' if {*e} == endings else ' or '.join(e)}: {at}" for at, e in together.items())


def _planted(rows: Sequence[Row]) -> list[str]:
    keys = ("sampler", "setting", "kind", "coefficient", "stated", "slope", "slope_with_fault", "note")
    head = ("sampler", "setting", "slope of", "coefficient", "stated", "sound", "with the fault", "certificate")
    return _markdown(head, [tuple(_number(r[key]) for key in keys) for r in rows]) if rows else []


def _number(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return f"{value:.2f}" if math.isfinite(value) and 0.01 <= abs(value) < 100 else f"{value:.1e}"


def _markdown(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
