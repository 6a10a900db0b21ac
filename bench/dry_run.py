"""What a run will measure, and about how long it takes: a table before it begins."""

from __future__ import annotations

import time

import torch
from rich.table import Table

from bench.cells import Cell, identity
from bench.engine import Run
from bench.network import Network
from bench.store import Store

_TIMED = 2


def dry_run(run: Run) -> Table:
    """The cells of a run with their network calls, whether they are in the folder already, and estimated minutes.

    The estimate is that of the network calls alone, from a few of them on one batch.
    """
    store, device = Store(run.out), run.running.device
    speed: dict[str, float] = {}
    table = Table(title=f"suite {run.suite.name}, {run.suite.num_samples} samples a cell", show_footer=True)
    for name in ("row", "grid"):
        table.add_column(name)
    for name in ("budget", "NFE", "seed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("minutes", justify="right")
    total = 0.0
    for number, cell in enumerate(run.cells):
        made_by = identity(cell, device)
        if cell.problem:
            outcome = cell.without["reason"]
        elif store.get(made_by) is not None:
            outcome = "done"
        elif number % run.shard[1] != run.shard[0]:
            outcome = "another shard"
        else:
            if cell.model.hash not in speed:
                speed[cell.model.hash] = seconds_per_evaluation(cell.model, run.running.batch_size, device)
            minutes = speed[cell.model.hash] * _evaluations(cell) * cell.num_samples / 60.0
            total += minutes
            outcome = f"{minutes:.1f}"
        table.add_row(*_columns(cell, made_by), outcome)
    table.columns[0].footer, table.columns[-1].footer = f"{len(run.cells)} cells", f"{total:.1f}"
    return table


def _evaluations(cell: Cell) -> int:
    """Of the network for a sample, as far as they are known."""
    return cell.calls if cell.evaluations is None else cell.evaluations[0]


def seconds_per_evaluation(model: Network, batch_size: int, device: str) -> float:
    """Seconds that a network takes for a sample of a batch, from a few calls after a first one."""
    indices = torch.arange(batch_size, device=device)
    x, schedule = torch.zeros(batch_size, *model.shape, device=device), model.model.schedule
    cond = model.cond(indices) | {name: torch.zeros(batch_size, device=device) for name in model.scalars}
    began = 0.0
    with torch.no_grad():
        for call in range(1 + _TIMED):
            model.metered(x, float(schedule.t_max if schedule.alpha(schedule.t_max) > 0 else schedule.t_min), **cond)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if call == 0:
                model.metered.reset()
                began = time.perf_counter()
    return (time.perf_counter() - began) / model.metered.counts.evaluations


def _columns(cell: Cell, made_by: dict[str, object]) -> list[str]:
    known = "" if cell.problem else f"{'<= ' if cell.plan is None else ''}{cell.calls}"
    known += "" if cell.evaluations is None else f" ({cell.evaluations[0]} evaluations)"
    who = cell.spec.label if cell.role == "sampler" else f"{cell.spec.label} (the model itself)"
    return [who, str(made_by["grid"]), str(cell.nfe), known, str(cell.seed)]
