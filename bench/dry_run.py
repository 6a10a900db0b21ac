"""What a run will measure, and about how long it takes: a table before it begins."""

from __future__ import annotations

import time

import torch
from rich.table import Table

from bench.cells import Cell, identity, settings
from bench.engine import Run
from bench.measure import pixels
from bench.network import Network
from bench.store import Store
from bench.suite import SamplerSpec
from bench.zoo import BenchModel

_TIMED = 2


def dry_run(run: Run) -> Table:
    """The cells of a run with their network calls, whether they are in the folder already, and estimated minutes.

    The estimate is that of the network calls and of the features of the samples, from a few of each on one batch.
    """
    store, device, model = Store(run.out), run.running.device, run.model
    speed: dict[str, float] = {}
    title = (
        f"suite {run.suite.name}: model {model.name}, {model.dtype} on {device}, {run.suite.num_samples} samples a cell"
    )
    table = Table(title=f"{title}, {model.judge.metric}", show_footer=True)
    table.caption = "Minutes: of network calls and features, from a few of each on one batch."
    table.caption_justify = "left"
    for name in ("row", "grid"):
        table.add_column(name)
    for name in ("budget", "NFE", "seed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("minutes", justify="right")
    total, judging = 0.0, None
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
            judging = seconds_of_judging(model, run.running.batch_size) if judging is None else judging
            minutes = (speed[cell.model.hash] * _evaluations(cell) + judging) * cell.num_samples / 60.0
            total += minutes
            outcome = f"{minutes:.1f}" if minutes >= 0.05 else "< 0.1"
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


def seconds_of_judging(model: BenchModel, batch_size: int) -> float:
    """Seconds for the features of a sample of a batch, decoded where it is a latent, from the second of two times."""
    x, seconds = torch.zeros(batch_size, *model.shape), 0.0
    for _ in range(2):
        began = time.perf_counter()
        model.judge.features(pixels(model, x))
        seconds = time.perf_counter() - began
    return seconds / batch_size


def _columns(cell: Cell, made_by: dict[str, object]) -> list[str]:
    known = "" if cell.problem else f"{'<= ' if cell.plan is None else ''}{cell.calls}"
    known += "" if cell.evaluations is None else f" ({cell.evaluations[0]} evaluations)"
    who = cell.spec.label if cell.role == "sampler" else f"{cell.spec.label} (the model itself)"
    given = settings(cell.spec) if isinstance(cell.spec, SamplerSpec) else {}
    unset = {"grid": given.get("grid"), "final": None, "afs": False}  # the grid has a column of its own
    chosen = [f"{name}={value}" for name, value in given.items() if name not in unset or value != unset[name]]
    return [", ".join([who, *chosen]), str(made_by["grid"]), str(cell.nfe), known, str(cell.seed)]
