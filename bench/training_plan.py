"""What a training run will do and about how long it takes: a table before it begins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from distill.batches import step_generator
from distill.method import Batch, Method

_WITH_GRADIENT = 3  # calls that one with gradient counts as: forward, and twice that backward
_TIMED = 3
_LONG_ENOUGH = 5.0  # seconds


@dataclass(frozen=True)
class PhasePlan:
    """A phase before it begins.

    Attributes:
        name: of the phase.
        images: to see, in whole batches.
        steps: of the optimiser.
        teacher_calls: network calls without gradient for each image.
        calls: network calls in all, one with gradient counted as three.
        minutes: estimated.
    """

    name: str
    images: int
    steps: int
    teacher_calls: float
    calls: float
    minutes: float


def plan_training(method: Method, seconds: float) -> list[PhasePlan]:
    """The phases of a method, if a step of the first takes so many seconds and the others as their network calls do."""
    size, rows = method.config.batch_size, []
    second = seconds / (size * (_WITH_GRADIENT + method.phases[0].calls))  # of a network call on an image
    for phase in method.phases:
        steps = phase.steps(size)
        calls = steps * size * (_WITH_GRADIENT + phase.calls)
        rows.append(PhasePlan(phase.name or "train", steps * size, steps, phase.calls, calls, second * calls / 60.0))
    return rows


def seconds_per_step(method: Method, device: torch.device) -> float:
    """Measured on a few steps of the first phase on random images; nothing is kept, and nothing is compiled."""
    config = method.config = method.config.on(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = method.network().to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6)
    method.begin(0, None, device)

    def step(number: int) -> None:
        generator = step_generator(config.seed, number)
        x0 = 2 * torch.rand(config.batch_size, *network.shape, generator=generator) - 1
        labels = torch.randint(max(network.classes, 1), (config.batch_size,), generator=generator)
        batch = method.draw(x0, labels, generator, 0)
        for part in _parts(batch, config.accumulate):
            method.loss(network, {name: rows.to(device) for name, rows in part.items()}, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step(0)  # first calls cost more
    began, done = time.perf_counter(), 0
    while done < _TIMED and (done == 0 or time.perf_counter() - began < _LONG_ENOUGH):
        done += 1
        step(done)
    return (time.perf_counter() - began) / done


def _parts(batch: Batch, count: int) -> list[Batch]:
    columns = {name: rows.chunk(count) for name, rows in batch.items()}
    return [{name: parts[k] for name, parts in columns.items()} for k in range(count)]


def plan_table(rows: Sequence[PhasePlan], title: str, measured: str) -> Table:
    """The plan for the terminal.

    Args:
        rows: of `plan_training`.
        title: above the table.
        measured: where the estimate was measured.
    """
    note = f"A call with gradient counts as three. Minutes: a few steps of the first phase, {measured}, in proportion to calls."
    table = Table(title=title, caption=note, caption_justify="left", show_footer=True)
    table.add_column("phase", footer="in all")
    total = (sum(row.images for row in rows), sum(row.steps for row in rows))
    table.add_column("images", justify="right", footer=f"{total[0]:,}")
    table.add_column("steps", justify="right", footer=f"{total[1]:,}")
    table.add_column("teacher calls\nan image", justify="right")
    table.add_column("network calls", justify="right", footer=f"{sum(row.calls for row in rows):,.0f}")
    table.add_column("minutes", justify="right", footer=_minutes(sum(row.minutes for row in rows)))
    for row in rows:
        counts = f"{row.images:,}", f"{row.steps:,}", f"{row.teacher_calls:g}", f"{row.calls:,.0f}"
        table.add_row(row.name, *counts, _minutes(row.minutes))
    return table


def _minutes(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"
