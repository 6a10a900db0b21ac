"""Measure one cell: sample it batch by batch, keep what is known of every sample, and compute its figures from that."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from bench.blocks import Blocks
from bench.cells import Cell, Row, settings
from bench.judge import Judge
from bench.judging import Arrays, Metric
from bench.metrics import Distance, frechet_interval
from bench.network import Network
from bench.overlap import Fetch, SamplingStream, pipelined
from bench.provenance import device_name, energy_joules, peak_memory_mb, reset_peak_memory
from bench.results import unknown_figure
from bench.students import run_network
from bench.suite import SamplerSpec
from bench.workers import Workers
from distill.student import filled
from samplers import SamplingError, sample
from samplers.execute import Callback, Progress
from samplers.grid import make_grid
from samplers.guidance.guided import Guided
from samplers.meter import Counts
from samplers.noise import standard_normal
from samplers.program import START
from samplers.registry import get_sampler

Advance = Callable[[int], None]
_Done = TypeVar("_Done")
SHOWN = 80  # samples in a cell's picture
FILMED, MOST_FRAMES = 8, 200  # samples whose way is shown, and states that are kept of it
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class OutOfTimeError(Exception):
    """The time that a run was given is over; finished batches are kept."""


@dataclass(frozen=True)
class Running:
    """How cells are sampled, beside what the suite says; none of it changes a sample beyond rounding.

    Attributes:
        device: of the network.
        batch_size: samples for each network call.
        compile: None, "loop" or "graph", as in `samplers.run_plan`.
        share_first_call: whether cells that start from the same noise at the same time share the first call's answer.
        workers: the processes among which batches are divided.
        overlap: whether a batch is judged after the next one was begun, which an accelerator then samples meanwhile.
        deadline: of `time.monotonic`, after which no batch is begun.
    """

    device: str
    batch_size: int
    compile: str | None = None
    share_first_call: bool = False
    workers: Workers = field(default_factory=Workers)
    overlap: bool = False
    deadline: float = math.inf


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
        SamplingError: the cell's samples cannot be had: the network gives NaN, the budget does not suffice (a `ToleranceError`),
            or one sample does not fit into memory. What is known of the others is kept.
        OutOfTimeError: the deadline came before the last batch.
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
    cell: Cell, running: Running, blocks: Blocks, advance: Advance = lambda _: None, solution: Arrays | None = None
) -> Arrays:
    """The arrays of a cell, after sampling what is missing; arguments and errors as in `measure`."""
    if running.workers.leads:
        blocks.check()
    reset_peak_memory(running.device)
    running.workers.gathered(None)  # nobody reads a block that is being removed
    missing = blocks.missing(cell.num_samples, running.batch_size)
    running.workers.gathered(None)  # all have looked before one of them writes
    problem = _guarded(lambda: _sample_missing(cell, running, missing, blocks, advance, solution))
    problems = [error for error in running.workers.gathered(problem) if error is not None]
    if problems:
        raise problems[0]
    if running.deadline < math.inf and running.workers.agreed(bool(blocks.missing(cell.num_samples, cell.num_samples))):
        raise OutOfTimeError("the run's time is over")
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


def _guarded(work: Callable[[], None]) -> SamplingError | None:
    """Why the work failed, where that is the sampler's outcome and not a bug; else None."""
    try:
        work()
    except SamplingError as error:
        return error.with_traceback(None)
    except ValueError as error:
        return SamplingError(str(error))
    except (MemoryError, RuntimeError) as error:
        if not _no_memory(error):
            raise
        return SamplingError(f"out of memory with a batch of one sample: {str(error).splitlines()[0]}")
    return None


def _no_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in _NO_MEMORY)


def _sample_missing(
    cell: Cell, running: Running, missing: list[range], blocks: Blocks, advance: Advance, solution: Arrays | None
) -> None:
    """Sample and judge what no block holds, each process its share."""
    queue = missing[running.workers.rank :: running.workers.size]
    advance((cell.num_samples - sum(map(len, queue))) * cell.calls)  # here already, or with the others
    with SamplingStream(running.device, beside=running.overlap) as stream:
        batches = _Batches(cell, running, blocks, advance, solution, stream, queue, running.batch_size)
        pipelined(queue, batches.begin, batches.finish, ahead=running.overlap)


@dataclass(frozen=True)
class _Begun:
    """A batch that is being sampled."""

    batch: range
    fetch: Fetch
    frames: list[Tensor]  # states of the first samples on their way
    counts: Counts
    reported: int  # calls that were told of
    joules: float  # NaN where the accelerator was judging too


@dataclass
class _Batches:
    """The two halves of the work on a batch; one that does not fit into memory goes back into the queue, to be halved.

    Attributes:
        cell, running, blocks, advance, solution: as for `measure`.
        stream: where batches are sampled.
        queue: batches to come.
        limit: samples of a batch that fit, as far as is known.
    """

    cell: Cell
    running: Running
    blocks: Blocks
    advance: Advance
    solution: Arrays | None
    stream: SamplingStream
    queue: list[range]
    limit: int

    def begin(self, batch: range) -> _Begun | None:
        """Begin to sample a batch; None where it was put back into the queue, or time is over and the queue is emptied."""
        if time.monotonic() > self.running.deadline:
            self.queue.clear()
            return None
        if len(batch) > self.limit:
            self.queue[:0] = [batch[: self.limit], batch[self.limit :]]
            return None
        return self._fitting(batch, lambda: self._begin(batch))

    def finish(self, begun: _Begun) -> None:
        """Judge a batch, and keep what is known of it."""
        self._fitting(begun.batch, lambda: self._finish(begun))

    def _fitting(self, batch: range, work: Callable[[], _Done]) -> _Done | None:
        """Do the work; None where memory does not suffice and a smaller batch may do, which an error norm over it rules out."""
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not _no_memory(error) or len(batch) == 1 or self.cell.plan is None:
                raise
        self.limit = min(self.limit, len(batch) // 2)
        self.queue.insert(0, batch)
        self.stream.wait()
        self.cell.model.metered.compiled.clear()  # recorded loops hold memory of their own
        if self.running.device.startswith("cuda"):
            torch.cuda.empty_cache()
        return None

    def _begin(self, batch: range) -> _Begun:
        reported, energy, frames = 0, energy_joules(self.running.device), list[Tensor]()
        schedule = self.cell.model.model.schedule
        few = max(FILMED - batch.start, 0) if self.cell.model.space is None else 0  # latents are no picture

        def report(step: Progress) -> None:
            nonlocal reported
            self.advance((step.nfe - reported) * len(batch))
            reported = step.nfe
            every = math.ceil(step.steps / MOST_FRAMES)
            if few and (step.step % every == 0 or step.step == step.steps):
                frames.append(step.x[:few].float().cpu() / math.hypot(schedule.alpha(step.t), schedule.sigma(step.t)))

        # the check for NaN waits for the network, and so comes with the samples
        fetch = self.stream.begin(lambda: _samples(self.cell, self.running, batch, report, check=False))
        joules = math.nan if self.running.overlap else energy_joules(self.running.device) - energy
        return _Begun(batch, fetch, frames, self.cell.model.metered.counts, reported, joules)

    def _finish(self, begun: _Begun) -> None:
        batch, (samples, seconds), began = begun.batch, begun.fetch(), time.perf_counter()
        if not bool(samples.isfinite().all()):  # sampled again, which names the step
            self.stream.begin(lambda: _samples(self.cell, self.running, batch, None, check=True))()
            raise SamplingError(f"{self.cell.spec.label} gave NaN or Inf, and a second run from the same noise did not")
        rows = _known(self.cell, pixels(self.cell.model, samples), batch, self.solution)
        rows["film"] = torch.stack(begun.frames, 1).numpy() if begun.frames else np.empty((0, 0), np.float32)
        totals = {"seconds": seconds, "judging_seconds": time.perf_counter() - began, "joules": begun.joules}
        totals |= {"calls": begun.counts.calls * len(batch), "evaluations": begun.counts.evaluations}
        totals |= {"depth": begun.counts.depth * len(batch)}
        self.blocks.put(batch, rows, totals)
        self.advance((self.cell.calls - begun.reported) * len(batch))


def _samples(cell: Cell, running: Running, batch: range, report: Callback | None, check: bool) -> Tensor:
    """Samples on the device, counted.

    Raises:
        RuntimeError: the network was asked more or less often than the plan and the guidance say.
    """
    model, indices = cell.model, torch.arange(batch.start, batch.stop, device=running.device)
    compiled = running.compile if cell.plan is not None else None
    model.metered.reset()
    model.meter.begin(_first_call(cell, indices) if shares(cell, running) else None)
    callback = None if compiled else report
    if cell.plan is not None:
        how: dict[str, Any] = {"callback": callback, "compile": compiled, "check": check}
        x = run_network(model, cell.plan, cell.inputs, seed=cell.seed, indices=indices, **how)
    else:
        x = _error_controlled(cell, indices, callback)
    _check_counts(cell, model.metered.counts, len(indices))
    return x


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


def pixels(model: Network, samples: Tensor) -> Tensor:
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
        "sequential_calls": math.ceil(blocks.total("depth") / count),
        **({} if cell.evaluations is None else {"guided_evaluations": cell.evaluations[1]}),
        **_fields(distance),
        **({"metrics": further} if further else {}),
        "label_agreement": _agreement(cell, arrays),
        "seconds": round(seconds, 3),
        "judging_seconds": round(judging, 3),
        "images_per_second": round(count / seconds, 2),
        **({"energy_joules": round(joules, 1)} if joules > 0 else {}),  # NaN where a batch was judged meanwhile
        "peak_memory_mb": peak_memory_mb(running.device),
        "device_name": device_name(running.device),
        "threads": torch.get_num_threads(),
        "processes": running.workers.size,
        "batch_size": running.batch_size,
        **({"compile": running.compile} if running.compile else {}),
        **({"shared_first_call": True} if shares(cell, running) else {}),
        **({"overlapped": True} if running.overlap else {}),
        "measured_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _figures(metric: Metric, arrays: Arrays, judge: Judge) -> dict[str, Row]:
    """The figures of a metric by name; one that cannot be had of these samples has the reason instead of a value."""
    try:
        figures = metric.figures(arrays, judge)
        return {
            name: _fields(found) if math.isfinite(found.value) else unknown_figure(f"it is {found.value}")
            for name, found in figures.items()
        }
    except ValueError as error:
        return {metric.name: unknown_figure(str(error))}


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
