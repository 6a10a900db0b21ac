"""`fewstep certify`: make the certificates, write their tables, a summary and their provenance."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.certify import k_diffusion, order, parity
from bench.certify.equalities import DETECTED_AT, FINALS, IDENTITIES, detect, identity_rows
from bench.certify.equalities import GRIDS as EQUALITY_GRIDS
from bench.certify.faults import fault_row, stochastic_fault_rows
from bench.certify.gaussian import stochastic_orders
from bench.certify.schedulers import cases
from bench.certify.settings import deterministic, growing, stochastic
from bench.certify.summary import described, readme, terminal
from bench.certify.tolerance import tolerance_rows
from bench.provenance import machine
from bench.store import write_text
from samplers import list_samplers
from samplers.registry import Sampler, get_sampler

Row = dict[str, Any]
COLUMNS = {
    "order": (
        *("sampler", "setting", "kind", "schedule", "grid", "lower_order_final", "steps_used", "stated", "slope"),
        *("deviation", "slope_exact_start", "slope_of_lowering", "error", "status", "note"),
    ),
    "parity": (
        *("scheduler", "theirs", "sampler", "ours", "nodes", "steps", "difference", "threshold", "first_step"),
        *("difference_as_shipped", "threshold_as_shipped", "first_step_as_shipped", "status", "cause"),
    ),
    "k_diffusion": k_diffusion.COLUMNS,
    "equalities": ("kind", "claim", "members", "schedule", "grid", "final", "steps", "difference", "status", "note"),
    "tolerance": ("sampler", "schedule", "tolerance", "calls", "error", "status", "note"),
    "faults": (
        *("sampler", "setting", "kind", "coefficient", "schedule", "stated", "slope", "slope_with_fault"),
        *("status", "note"),
    ),
}
_QUICK_STEPS = (640, 320, 160, 80, 40)


class Job(NamedTuple):
    """A certificate to make: the table it belongs to, what it is about, and what makes its rows."""

    table: str
    label: str
    rows: Callable[[], Iterable[Row]]


def jobs(names: Sequence[str] = (), quick: bool = False) -> list[Job]:
    """Everything there is to certify.

    Args:
        names: registered samplers; all where none are given.
        quick: one schedule and one grid for the orders, short runs for parity.
    """
    chosen = [get_sampler(name) for name in names] or list_samplers()
    mine = {entry.name for entry in chosen}
    schedules = ("vp_linear",) if quick else tuple(order.SCHEDULES)
    grids = order.GRIDS[:1] if quick else order.GRIDS
    todo = [Job("order", e.name, partial(_orders, e, schedules, grids, quick)) for e in chosen if not e.adaptive]
    todo += [
        Job("tolerance", e.name, partial(tolerance_rows, e, where)) for e in chosen if e.adaptive for where in schedules
    ]
    todo += [
        Job("parity", f"{case.scheduler} {case.sampler}", partial(_one, parity.compare, case))
        for case in cases()
        if case.sampler in mine or not names
        if not quick or case.steps <= 10
    ]
    todo += [
        Job("k_diffusion", case.function, partial(_one, k_diffusion.compare, case)) for case in k_diffusion.cases(mine)
    ]
    todo += [
        Job("equalities", identity.claim, partial(identity_rows, identity))
        for identity in IDENTITIES
        if not names or mine & {identity.a[0], identity.b[0]}
    ]
    todo += [
        Job("equalities", "detector", partial(detect, chosen, schedule, grid, final, steps))
        for schedule, grid in product(schedules, EQUALITY_GRIDS[:1] if quick else EQUALITY_GRIDS)
        for final, steps in product(FINALS, DETECTED_AT)
    ]
    todo += [Job("faults", e.name, partial(_faults, e)) for e in chosen if not e.adaptive]
    return todo


def certify(names: Sequence[str], out: Path, quick: bool, console: Console) -> bool:
    """Make the certificates, write them into `out`, print the summary; whether none failed."""
    began = time.perf_counter()
    tables: dict[str, list[Row]] = {name: [] for name in COLUMNS}
    todo, seconds = jobs(names, quick), defaultdict[str, float](float)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("certificates", total=len(todo))
        for job in todo:
            progress.update(task, description=f"{job.table}: {job.label}")
            start = time.perf_counter()
            tables[job.table] += _made(job)
            seconds[f"{job.table}: {job.label}" if job.table == "order" else job.table] += time.perf_counter() - start
            progress.advance(task)
    elapsed = time.perf_counter() - began
    if not k_diffusion.is_installed():
        tables["k_diffusion"] = k_diffusion.kept(out / "k_diffusion.csv")
    for name, rows in tables.items():
        frame = pd.DataFrame(rows).reindex(columns=COLUMNS[name])
        write_text(out / f"{name}.csv", frame.to_csv(index=False, float_format="%.6g"))
    write_text(out / "README.md", readme(tables))
    made = {"samplers": list(names) or "all", "quick": quick, **machine("cpu"), "seconds": round(elapsed, 1)}
    made["seconds_by_certificate"] = {label: round(value, 2) for label, value in seconds.items()}
    write_text(out / "provenance.json", json.dumps(made, indent=1) + "\n")
    console.print(terminal(tables, elapsed))
    failed = [row for rows in tables.values() for row in rows if row["status"] == "fail"]
    for row in failed:
        console.print(f"failed: {described(row)}", style="red", highlight=False, soft_wrap=True)
    console.print(f"tables and summary: {out}", highlight=False, soft_wrap=True)
    return not failed


def _made(job: Job) -> list[Row]:
    """The rows of a certificate; one that cannot be made is a row that fails, with the reason."""
    rows = []
    try:
        for row in job.rows():
            rows.append(row)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        rows.append({"kind": "error", "sampler": job.label, "status": "fail", "note": reason, "cause": reason})
    return rows


def _orders(entry: Sampler, schedules: Sequence[str], grids: Sequence[str], quick: bool) -> Iterator[Row]:
    steps = _QUICK_STEPS if quick else order.STEPS
    for options, schedule in product(list(deterministic(entry)), schedules):
        yield order.local_order(entry, options, schedule)
        for grid in grids:
            yield from order.global_orders(entry, options, schedule, grid, steps)
    for options, schedule, grid in product([*stochastic(entry), *growing(entry)], schedules, grids):
        yield from stochastic_orders(entry, options, schedule, grid)


def _faults(entry: Sampler) -> Iterator[Row]:
    for options in islice(deterministic(entry), 1):
        yield fault_row(entry, options, "vp_linear")
    for options in [*stochastic(entry), *growing(entry)]:
        yield from stochastic_fault_rows(entry, options, "vp_linear", order.GRIDS[0])


def _one(make: Callable[[Any], Row], what: Any) -> Iterator[Row]:
    yield make(what)
