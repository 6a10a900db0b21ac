"""Run a suite: every cell is sampled, judged and saved before the next begins."""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from bench.metrics import Distance, frechet_interval
from bench.plots import save_samples
from bench.provenance import peak_memory_mb
from bench.store import Store, code_fingerprint, key_of
from bench.suite import SamplerSpec, Suite
from bench.zoo import BenchModel
from samplers import Plan, SamplingError, make_plan, sample
from samplers.execute import Progress as Step
from samplers.registry import get_sampler

Row = dict[str, Any]
_SHOWN = 80  # samples in a cell's picture


@dataclass(frozen=True)
class Cell:
    """One number of the table: a sampler at a budget.

    Attributes:
        spec: the sampler and its options.
        nfe: budget of network calls.
        role: "sampler", or "teacher" for the many-step run.
        plan: what it computes; None where the sampler is error-controlled or the budget does not allow a plan.
        problem: why there is no plan, else "".
    """

    spec: SamplerSpec
    nfe: int
    role: str
    plan: Plan | None
    problem: str = ""

    @property
    def calls(self) -> int:
        """Network calls per sample, as far as they are known beforehand."""
        return self.nfe if self.plan is None else self.plan.nfe

    @property
    def file_name(self) -> str:
        """Of the cell's picture."""
        return f"{self.spec.label}-nfe{self.nfe}.png" if self.role == "sampler" else f"teacher-nfe{self.nfe}.png"


def resolve(suite: Suite, model: BenchModel) -> list[Cell]:
    """The cells of a suite, cheapest budget first, the teacher last, each with its plan or the reason it has none."""
    wanted = [(spec, nfe, "sampler") for nfe in suite.nfe for spec in suite.samplers]
    teacher = SamplerSpec(**suite.teacher.model_dump(exclude={"nfe"}))
    return [_cell(model, *each) for each in [*wanted, (teacher, suite.teacher.nfe, "teacher")]]


def _cell(model: BenchModel, spec: SamplerSpec, nfe: int, role: str) -> Cell:
    if get_sampler(spec.sampler).adaptive:
        return Cell(spec, nfe, role, None)
    try:
        plan = make_plan(spec.sampler, model.model.schedule, nfe=nfe, **_settings(spec))
    except (ValueError, TypeError) as error:  # the row says why, and the other cells are measured
        return Cell(spec, nfe, role, None, str(error))
    return Cell(spec, nfe, role, plan)


def _settings(spec: SamplerSpec) -> dict[str, Any]:
    return {"grid": spec.grid, "final": spec.final, "afs": spec.afs, **spec.options}


def run_suite(suite: Suite, model: BenchModel, out: Path, device: str, console: Console) -> list[Row]:
    """Measure every cell that is not yet in `out`, and return all rows.

    Args:
        suite: what to measure.
        model: loaded on `device`.
        out: results folder; `cells/` holds what is finished, `samples/` a picture of each cell.
        device: of the network, recorded in each row.
        console: where progress is shown.

    Returns:
        A row for each cell in table order; one that failed has `status` "failed" and a `reason`.
    """
    store, cells = Store(out), resolve(suite, model)
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
            identity = _identity(cell, suite, model, device)
            record = store.get(key_of(identity))
            if record is None:
                record = {**identity, **_outcome(cell, suite, model, device, out, lambda n: progress.advance(task, n))}
                if record["status"] == "done":
                    store.put(key_of(identity), record)
            else:
                progress.advance(task, cell.calls * suite.num_samples)
            row = {"role": cell.role, "label": cell.spec.label, **record}
            rows.append(row)
            if not console.is_terminal:
                console.print(_line(title, row), highlight=False, soft_wrap=True)
    return rows


def _line(title: str, row: Row) -> str:
    if row["status"] == "failed":
        return f"{title}: failed: {row['reason']}"
    return (
        f"{title}: {row['metric']} {row['value']:.4g} [{row['low']:.4g}, {row['high']:.4g}] in {row['seconds']:.1f} s"
    )


def _identity(cell: Cell, suite: Suite, model: BenchModel, device: str) -> Row:
    """Everything that makes the cell's number what it is; a change in any of it is another cell."""
    plan_hash = hashlib.sha256(cell.plan.to_json().encode()).hexdigest()[:16] if cell.plan else ""
    return {
        "model": model.name,
        "model_hash": model.hash,
        "sampler": cell.spec.sampler,
        "options": dict(cell.spec.options),
        "grid": cell.spec.grid or get_sampler(cell.spec.sampler).grid_on(model.model.schedule),
        "final": cell.spec.final or "",
        "afs": cell.spec.afs,
        "budget": cell.nfe,
        "plan_hash": plan_hash,
        "num_samples": suite.num_samples,
        "seed": suite.seed,
        "metric": model.judge.metric,
        "hashes": dict(model.judge.hashes),
        "dtype": model.dtype,
        "device": torch.device(device).type,
        "torch": torch.__version__,
        "code": code_fingerprint(),
    }


def _outcome(cell: Cell, suite: Suite, model: BenchModel, device: str, out: Path, advance: Any) -> Row:
    """Sample and judge one cell; a failure of the sampler is an outcome too."""
    if cell.problem:
        return {"status": "failed", "reason": cell.problem}
    began = time.perf_counter()
    try:
        samples, calls = _sample_cell(cell, suite, model, device, advance)
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


def _sample_cell(cell: Cell, suite: Suite, model: BenchModel, device: str, advance: Any) -> tuple[Tensor, int]:
    """All samples of a cell on the CPU, and the network calls of the longest batch."""
    batches, calls = [], 0
    for indices in _batches(suite.num_samples, suite.batch_size):
        done = 0

        def report(step: Step, size: int = len(indices)) -> None:
            nonlocal done
            advance((step.nfe - done) * size)
            done = step.nfe

        batches.append(_sample_batch(cell, suite, model, indices.to(device), report))
        calls = max(calls, done)
    return torch.cat(batches), calls


def _sample_batch(cell: Cell, suite: Suite, model: BenchModel, indices: Tensor, report: Any) -> Tensor:
    spec = cell.spec
    x0 = sample(
        model.model,
        spec.sampler,
        shape=(len(indices), *model.shape),
        seed=suite.seed,
        indices=indices,
        nfe=cell.nfe,
        callback=report,
        cond=model.cond(indices),
        **_settings(spec),
    )
    return x0.cpu()


def _batches(total: int, size: int) -> Iterator[Tensor]:
    for start in range(0, total, size):
        yield torch.arange(start, min(start + size, total))


def _agreement(model: BenchModel, samples: Tensor, indices: Tensor) -> float | None:
    """Share of samples that the classifier gives the label they were conditioned on."""
    if not model.classes or model.judge.classify is None:
        return None
    return float(np.mean(model.judge.classify(samples) == (indices % model.classes).numpy()))
