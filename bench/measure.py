"""Measure one cell: sample it batch by batch, keep what is known of every sample, and compute its figures from that."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.blocks import Blocks
from bench.cells import Cell, Row, settings
from bench.judge import Judge
from bench.judging import Arrays, Metric
from bench.metrics import Distance, frechet_interval
from bench.network import Network
from bench.provenance import energy_joules, peak_memory_mb
from bench.students import run_network
from bench.suite import SamplerSpec
from bench.workers import Workers
from distill.student import filled
from samplers import SamplingError, sample
from samplers.execute import Progress
from samplers.grid import make_grid
from samplers.guidance.guided import Guided
from samplers.meter import Counts
from samplers.noise import standard_normal
from samplers.program import START
from samplers.registry import get_sampler

Advance = Callable[[int], None]
SHOWN = 80  # samples in a cell's picture
FILMED, MOST_FRAMES = 8, 200  # samples whose way is shown, and states that are kept of it
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Running:
    """How cells are sampled, beside what the suite says; none of it changes a sample beyond rounding.

    Attributes:
        device: of the network.
        batch_size: samples for each network call.
        compile: None, "loop" or "graph", as in `samplers.run_plan`.
        share_first_call: whether cells that start from the same noise at the same time share the first call's answer.
        workers: the processes among which batches are divided.
    """

    device: str
    batch_size: int
    compile: str | None = None
    share_first_call: bool = False
    workers: Workers = field(default_factory=Workers)


def measure(
    cell: Cell, running: Running, blocks: Blocks, advance: Advance, solution: Arrays | None = None
) -> tuple[Row, Arrays]:
    """The outcome of a cell, and the arrays it was computed from.

    Args:
        cell: with a network.
        running: how it is sampled.
        blocks: what is known of its samples already; the rest is added.
        advance: called with a number of network calls that were made, times samples.
        solution: arrays of the many-step run from the same noise, where the cell `follows` it.

    Returns:
        A row with status "done" and the figures, and arrays that live as long as the blocks; both empty on every process
        but the leading one.

    Raises:
        SamplingError: the cell's samples cannot be had: the network gives NaN, the budget does not suffice, or one sample
            does not fit into memory. What is known of the others is kept.
        bench.workers.WorkerLostError: another process is gone.
    """
    arrays = sampled(cell, running, blocks, advance, solution)
    running.workers.gathered(None)  # the leading process removes the blocks when it is done with them
    if not running.workers.leads:
        return {}, {}
    try:
        return _row(cell, running, blocks, arrays), arrays
    except ValueError as error:  # of features that are not finite, say
        raise SamplingError(str(error)) from error


def sampled(
    cell: Cell,
    running: Running,
    blocks: Blocks,
    advance: Advance = lambda _: None,
    solution: Arrays | None = None,
) -> Arrays:
    """The arrays of a cell, after sampling what is missing; arguments and errors as in `measure`."""
    if running.workers.leads:
        blocks.check()
    if running.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(running.device)
    running.workers.gathered(None)  # nobody reads a block that is being removed
    missing = blocks.missing(cell.num_samples, running.batch_size)
    running.workers.gathered(None)  # all have looked before one of them writes
    problem = _guarded(lambda: _sample_missing(cell, running, missing, blocks, advance, solution))
    problems = [text for text in running.workers.gathered(problem) if text]
    if problems:
        raise SamplingError(problems[0])
    return {name: blocks.rows(name) for name in arrays_of(cell)}


def shown(cell: Cell, arrays: Arrays) -> Tensor:
    """The first samples (B, ...), for a picture."""
    return torch.from_numpy(arrays["shown"][: min(SHOWN, cell.num_samples)])


def film(arrays: Arrays) -> Tensor:
    """The states (B, frames, ...) of the first samples on their way, each over the size of its noise and data together."""
    return torch.from_numpy(arrays["film"][:FILMED])


def arrays_of(cell: Cell) -> list[str]:
    """Names of the arrays that a cell's figures are computed from."""
    names = {"features", "shown", "film"}
    names |= {"label"} if cell.model.classes and cell.model.judge.classify is not None else set()
    for metric in cell.further:
        names |= metric.needs
    return sorted(names | ({"samples"} if cell.is_solution else set()))


def _guarded(work: Callable[[], None]) -> str:
    """Why the work failed, where that is the sampler's outcome and not a bug; else ""."""
    try:
        work()
    except (SamplingError, ValueError) as error:
        return str(error)
    except (MemoryError, RuntimeError) as error:
        if not _no_memory(error):
            raise
        return f"out of memory with a batch of one sample: {str(error).splitlines()[0]}"
    return ""


def _no_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in _NO_MEMORY)


def _sample_missing(
    cell: Cell, running: Running, missing: list[range], blocks: Blocks, advance: Advance, solution: Arrays | None
) -> None:
    """Sample what no block holds, each process its share; a batch that does not fit into memory is halved, and those after it."""
    queue, limit = missing[running.workers.rank :: running.workers.size], running.batch_size
    advance((cell.num_samples - sum(map(len, queue))) * cell.calls)  # here already, or with the others
    while queue:
        batch = queue.pop(0)
        if len(batch) > limit:
            queue[:0] = [batch[:limit], batch[limit:]]
        elif not _fits(lambda batch=batch: _sample_batch(cell, running, batch, blocks, advance, solution), cell, batch):  # type: ignore[misc]
            limit = len(batch) // 2
            queue.insert(0, batch)
            cell.model.metered.compiled.clear()  # recorded loops hold memory of their own
            if running.device.startswith("cuda"):
                torch.cuda.empty_cache()


def _fits(work: Callable[[], None], cell: Cell, batch: range) -> bool:
    """Do the work; False where memory does not suffice and a smaller batch may do, which an error norm over it rules out."""
    try:
        work()
    except (MemoryError, RuntimeError) as error:
        if not _no_memory(error) or len(batch) == 1 or cell.plan is None:
            raise
        return False
    return True


def _sample_batch(
    cell: Cell,
    running: Running,
    batch: range,
    blocks: Blocks,
    advance: Advance,
    solution: Arrays | None,
) -> None:
    reported, began, energy = 0, time.perf_counter(), energy_joules(running.device)
    schedule, frames = cell.model.model.schedule, list[Tensor]()
    few = max(FILMED - batch.start, 0) if cell.model.space is None else 0  # latents are no picture

    def report(step: Progress) -> None:
        nonlocal reported
        advance((step.nfe - reported) * len(batch))
        reported = step.nfe
        every = math.ceil(step.steps / MOST_FRAMES)
        if few and (step.step % every == 0 or step.step == step.steps):
            frames.append(step.x[:few].float().cpu() / math.hypot(schedule.alpha(step.t), schedule.sigma(step.t)))

    indices = torch.arange(batch.start, batch.stop, device=running.device)
    samples, counts = _samples(cell, running, indices, report)
    sampled, joules = time.perf_counter(), energy_joules(running.device) - energy
    rows = _known(cell, _pixels(cell.model, samples), batch, solution)
    rows["film"] = torch.stack(frames, 1).numpy() if frames else np.empty((0, 0), np.float32)
    totals = {"seconds": sampled - began, "judging_seconds": time.perf_counter() - sampled}
    totals |= {"calls": counts.calls * len(batch), "evaluations": counts.evaluations}
    totals |= {"depth": counts.depth * len(batch), "joules": joules}
    blocks.put(batch, rows, totals)
    advance((cell.calls - reported) * len(batch))


def _samples(cell: Cell, running: Running, indices: Tensor, report: Any) -> tuple[Tensor, Counts]:
    """Samples on the CPU, and what was asked of networks for them.

    Raises:
        RuntimeError: the network was asked more or less often than the plan and the guidance say.
    """
    model = cell.model
    compiled = running.compile if cell.plan is not None else None
    model.metered.reset()
    model.meter.begin(_first_call(cell, indices) if shares(cell, running) else None)
    callback = None if compiled else report
    if cell.plan is not None:
        how: dict[str, Any] = {"callback": callback, "compile": compiled}
        x = run_network(model, cell.plan, cell.inputs, seed=cell.seed, indices=indices, **how)
    else:
        x = _error_controlled(cell, indices, callback)
    _check_counts(cell, model.metered.counts, len(indices))
    return x.cpu(), model.metered.counts


def _check_counts(cell: Cell, counts: Counts, batch: int) -> None:
    """Raise RuntimeError where a plan, or guidance, claims another number than was counted."""
    asked = counts.depth if isinstance(cell.model.model, Guided) else counts.calls
    if cell.plan is not None and asked != cell.plan.nfe:
        raise RuntimeError(
            f"{cell.spec.label}: the plan says {cell.plan.nfe} network calls, the network counted {asked}"
        )
    if cell.evaluations is not None and counts.evaluations != cell.evaluations[0] * batch:
        raise RuntimeError(
            f"{cell.spec.label}: guidance says {cell.evaluations[0]} evaluations of a sample, the network counted "
            f"{counts.evaluations / batch:g}"
        )


def _pixels(model: Network, samples: Tensor) -> Tensor:
    """What is judged and shown of samples, on the CPU as they are."""
    return samples if model.space is None else model.decode(samples.to(model.device)).cpu()


def _error_controlled(cell: Cell, indices: Tensor, callback: Any) -> Tensor:
    """Samples of a method without a plan, which takes the budget as a limit."""
    spec, model = cell.spec, cell.model
    assert isinstance(spec, SamplerSpec), "a student's cell without a plan has a problem, and is not sampled"
    schedule = model.model.schedule
    start = make_grid(schedule, spec.grid or get_sampler(spec.sampler).grid_on(schedule), 1, spec.final)
    noise = standard_normal(cell.seed, indices, 0, model.shape, device=indices.device)
    cond = model.cond(indices) | filled(cell.inputs, indices)
    given: dict[str, Any] = {"nfe": cell.nfe, "callback": callback, "cond": cond, **settings(spec)}
    return sample(model.metered, spec.sampler, x_T=noise.mul_(float(start.sigma[0])), **given)


def shares(cell: Cell, running: Running) -> bool:
    """Whether the answer to a cell's first call is that of others: where the network is called with the start noise itself."""
    possible = running.share_first_call and running.compile is None and cell.plan is not None
    return possible and cell.plan.calls[0].src == START  # type: ignore[union-attr]


def _first_call(cell: Cell, indices: Tensor) -> tuple[Any, ...]:
    """What the first call of a batch depends on, beside the network."""
    assert cell.plan is not None, "a cell without a plan shares nothing"
    call, inputs = cell.plan.calls[0], tuple(sorted(cell.inputs.items()))
    guidance = "" if cell.guidance is None else cell.guidance.text
    return cell.seed, int(indices[0]), len(indices), call.t, cell.plan.sigma_T, inputs, guidance


def _known(cell: Cell, samples: Tensor, batch: range, solution: Arrays | None) -> dict[str, np.ndarray]:
    """The arrays of a batch, each with a row for each sample."""
    judge, wanted = cell.model.judge, set(arrays_of(cell))
    features = judge.features(samples)
    rows = {"features": features, "shown": samples[: max(SHOWN - batch.start, 0)].numpy()}
    if "samples" in wanted:
        rows["samples"] = samples.numpy()
    if "label" in wanted and judge.classify is not None:
        rows["label"] = np.asarray(judge.classify(samples))
    if "probabilities" in wanted:
        assert judge.probabilities is not None, "checked when the cells were resolved"
        rows["probabilities"] = judge.probabilities(samples)
    if wanted & {"square_error", "feature_error"}:
        assert solution is not None, "the many-step run comes first where a metric needs it"
        there = solution["samples"][batch.start : batch.stop]
        error = (samples.double().numpy() - there) ** 2
        rows["square_error"] = error.reshape(len(error), -1).mean(1)
        rows["feature_error"] = np.linalg.norm(features - solution["features"][batch.start : batch.stop], axis=1)
    return rows


def _row(cell: Cell, running: Running, blocks: Blocks, arrays: Arrays) -> Row:
    count, model, began = cell.num_samples, cell.model, time.perf_counter()
    distance = frechet_interval(arrays["features"], model.judge.reference)
    further = {name: found for metric in cell.further for name, found in _figures(metric, arrays, model.judge).items()}
    seconds, joules = blocks.total("seconds"), blocks.total("joules")
    judging = blocks.total("judging_seconds") + time.perf_counter() - began
    return {
        "status": "done",
        "nfe": math.ceil(blocks.total("calls") / count),
        "evaluations": round(blocks.total("evaluations") / count, 4),
        **_under_guidance(cell, blocks),
        **_fields(distance),
        **({"metrics": further} if further else {}),
        "label_agreement": _agreement(cell, arrays),
        "seconds": round(seconds, 3),
        "judging_seconds": round(judging, 3),
        "images_per_second": round(count / seconds, 2),
        **({"energy_joules": round(joules, 1)} if joules else {}),
        "peak_memory_mb": peak_memory_mb(running.device),
        "threads": torch.get_num_threads(),
        "processes": running.workers.size,
        "batch_size": running.batch_size,
        **({"compile": running.compile} if running.compile else {}),
        **({"shared_first_call": True} if shares(cell, running) else {}),
        "measured_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _under_guidance(cell: Cell, blocks: Blocks) -> Row:
    """Columns of a cell under guidance: the calls that wait for each other, and the evaluations at points that are guided."""
    if cell.guidance is None:
        return {}
    depth: Row = {"sequential_calls": math.ceil(blocks.total("depth") / cell.num_samples)}
    return depth if cell.evaluations is None else {**depth, "guided_evaluations": cell.evaluations[1]}


def _figures(metric: Metric, arrays: Arrays, judge: Judge) -> dict[str, Row]:
    """The figures of a metric by name; one that cannot be had of these samples has the reason instead of a value."""
    try:
        return {name: _fields(found) for name, found in metric.figures(arrays, judge).items()}
    except ValueError as error:
        return {metric.name: {"value": None, "low": None, "high": None, "standard_error": None, "reason": str(error)}}


def _fields(distance: Distance) -> dict[str, float | None]:
    """A figure for a record, in which there is neither NaN nor infinity."""
    fields = {"value": distance.value, "low": distance.low, "high": distance.high}
    fields["standard_error"] = distance.standard_error
    return {name: value if math.isfinite(value) else None for name, value in fields.items()}


def _agreement(cell: Cell, arrays: Arrays) -> float | None:
    """Share of samples that the classifier gives the label they were conditioned on."""
    if "label" not in arrays:
        return None
    return float(np.mean(np.asarray(arrays["label"]) == np.arange(cell.num_samples) % cell.model.classes))
