"""Run a suite: every cell is sampled, judged and saved before the next begins."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from bench.cells import Cell, identity, resolve, settings
from bench.metrics import Distance, frechet_interval
from bench.plots import save_samples
from bench.provenance import peak_memory_mb
from bench.store import Store, key_of
from bench.students import run_student
from bench.suite import StudentSpec, Suite
from bench.zoo import BenchModel
from distill.student import filled
from samplers import SamplingError, sample
from samplers.execute import Progress as Step

Row = dict[str, Any]
_SHOWN = 80  # samples in a cell's picture


def run_suite(suite: Suite, model: BenchModel, out: Path, device: str, console: Console) -> list[Row]:
    """Measure every cell that is not yet in `out`, and return all rows.

    Args:
        suite: what to measure.
        model: loaded on `device`.
        out: results folder; `cells/` holds what is finished, `samples/` a picture of each cell.
        device: of the network, recorded in each row.
        console: where progress is shown.

    Returns:
        A row for each cell in table order; one that failed has `status` "failed" and a `reason`, and one of a student
        that was not trained for the budget "absent".

    Raises:
        ValueError: a student that cannot be loaded, or does not fit the model; nothing was measured.
    """
    store, cells = Store(out), resolve(suite, model, device)
    work = sum(cell.calls * suite.num_samples for cell in cells if not cell.problem)
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    rows = []
    with Progress(*columns, console=console, speed_estimate_period=120.0) as progress:
        task = progress.add_task(suite.name, total=work)
        for number, cell in enumerate(cells, 1):
            title = f"[{number}/{len(cells)}] {cell.spec.label} at {cell.nfe} calls"
            progress.update(task, description=title)
            made_by = identity(cell, suite, device)
            record = store.get(key_of(made_by))
            if record is None:
                record = {**made_by, **_outcome(cell, suite, device, out, lambda n: progress.advance(task, n))}
                if record["status"] == "done":
                    store.put(key_of(made_by), record)
            else:
                progress.advance(task, cell.calls * suite.num_samples)
            row = {"role": cell.role, "label": cell.spec.label, **record, **cell.remarks}
            rows.append(row)
            if not console.is_terminal:
                console.print(_line(title, row), highlight=False, soft_wrap=True)
    return rows


def _line(title: str, row: Row) -> str:
    if row["status"] != "done":
        return f"{title}: {row['status']}: {row['reason']}"
    return (
        f"{title}: {row['metric']} {row['value']:.4g} [{row['low']:.4g}, {row['high']:.4g}] in {row['seconds']:.1f} s"
    )


def _outcome(cell: Cell, suite: Suite, device: str, out: Path, advance: Any) -> Row:
    """Sample and judge one cell; a failure of the sampler is an outcome too."""
    if cell.problem:
        return cell.without
    model, began = cell.model, time.perf_counter()
    try:
        samples, calls = _sample_cell(cell, suite, device, advance)
    except (SamplingError, ValueError) as error:
        return {"status": "failed", "reason": str(error)}
    seconds = time.perf_counter() - began
    indices = torch.arange(suite.num_samples)
    features = model.judge.features(samples)
    distance = frechet_interval(features, model.judge.reference)
    save_samples(samples[:_SHOWN], out / "samples" / cell.file_name, images=model.images)
    return {
        "status": "done",
        "nfe": calls,
        **_distance_fields(distance),
        "label_agreement": _agreement(model, samples, indices),
        "seconds": round(seconds, 3),
        "images_per_second": round(suite.num_samples / seconds, 2),
        "peak_memory_mb": peak_memory_mb(device),
        "threads": torch.get_num_threads(),
        "measured_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _distance_fields(distance: Distance) -> Row:
    return {
        "value": distance.value,
        "low": distance.low,
        "high": distance.high,
        "standard_error": distance.standard_error,
    }


def _sample_cell(cell: Cell, suite: Suite, device: str, advance: Any) -> tuple[Tensor, int]:
    """All samples of a cell on the CPU, and the network calls of the longest batch."""
    batches, calls = [], 0
    for indices in _batches(suite.num_samples, suite.batch_size):
        done = 0

        def report(step: Step, size: int = len(indices)) -> None:
            nonlocal done
            advance((step.nfe - done) * size)
            done = step.nfe

        batches.append(_sample_batch(cell, suite.seed, indices.to(device), report).cpu())
        calls = max(calls, done)
    return torch.cat(batches), calls


def _sample_batch(cell: Cell, seed: int, indices: Tensor, report: Any) -> Tensor:
    spec, model = cell.spec, cell.model
    if isinstance(spec, StudentSpec):
        assert cell.plan is not None, "a student's cell without a plan has a problem, and is not sampled"
        return run_student(model, cell.plan, cell.inputs, seed=seed, indices=indices, callback=report)
    return sample(
        model.model,
        spec.sampler,
        shape=(len(indices), *model.shape),
        seed=seed,
        indices=indices,
        nfe=cell.nfe,
        callback=report,
        cond=model.cond(indices) | filled(cell.inputs, indices),
        **settings(spec),
    )


def _batches(total: int, size: int) -> Iterator[Tensor]:
    for start in range(0, total, size):
        yield torch.arange(start, min(start + size, total))


def _agreement(model: BenchModel, samples: Tensor, indices: Tensor) -> float | None:
    """Share of samples that the classifier gives the label they were conditioned on."""
    if not model.classes or model.judge.classify is None:
        return None
    return float(np.mean(model.judge.classify(samples) == (indices % model.classes).numpy()))
