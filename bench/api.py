"""A benchmark from Python: `bench.run(suite)` measures a suite and returns its table."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bench.command import checked_device
from bench.engine import Run
from bench.measure import Running
from bench.report import write_results
from bench.suite import Suite, load_suite
from bench.table import frame
from bench.workers import Workers
from bench.zoo import load_network, with_judge
from distill.config import default_dtype
from samplers.errors import unknown
from samplers.execute import COMPILE

if TYPE_CHECKING:
    import pandas as pd

_LISTS = ("nfe", "seeds", "metrics")  # fields of a suite of which one value may be given alone


def run(
    suite: str | Path | Suite,
    out: str | Path | None = None,
    *,
    samplers: str | Sequence[str] = (),
    device: str = "cpu",
    dtype: str = "auto",
    compile: str | None = None,
    share_first_call: bool = False,
    overlap: bool = False,
    quiet: bool = False,
    **changes: Any,
) -> pd.DataFrame:
    """Measure a suite, write its results folder, and return its table, a row for each cell.

    A cell that is in the folder already is not measured again, so that a run that was stopped goes on.

    Args:
        suite: a shipped suite's name, a YAML file, or a `bench.suite.Suite`.
        out: results folder; by default results/SUITE-SAMPLES. A suite of several models has a folder in it for each.
        samplers: labels of the suite or registered names, or one; by default all of the suite.
        device: of torch.
        dtype: "auto", "fp32", "bf16" or, on an accelerator, "fp16", the network's.
        compile: None, "loop" or "graph", as in `samplers.run_plan`.
        share_first_call: whether cells that start from the same noise at the same time share the first network call; it is
            counted all the same, and images a second are then too high.
        overlap: whether a CUDA device samples the next batch while one is judged; images a second are then a lower bound, and
            peak memory is that of both.
        quiet: whether nothing is printed.
        **changes: fields of the suite that are replaced, such as nfe=[5, 10] or num_samples=1000; of nfe, seeds and metrics one
            value stands for a list of it.

    Returns:
        A row for each cell and seed with the columns of table.csv, which `bench.columns.COLUMNS` describes one by one: what
        the row is (role, label, model, sampler, options, grid, final, budget, seed), status and reason, metric with value, low,
        high and standard_error, model_value (the model's own), each further metric with the same parts, calls (nfe,
        evaluations, sequential_calls), costs (seconds, images_per_second, peak_memory_mb) and hashes of what made it.

    Raises:
        ValueError, FileNotFoundError: an unknown suite, sampler, device or dtype, or a value out of range.
        distill.checkpoint.CheckpointError: a model that cannot be used.
    """
    suite = suite if isinstance(suite, Suite) else load_suite(str(suite))
    names = [samplers] if isinstance(samplers, str) else samplers
    changes |= {name: [changes[name]] for name in _LISTS if isinstance(changes.get(name), str | Integral)}
    workers, rows = Workers(), []
    how: dict[str, Any] = {"device": device, "dtype": dtype, "compile": compile, "overlap": overlap}
    how |= {"share_first_call": share_first_call, "console": Console(quiet=quiet), "workers": workers}
    try:
        for one, folder in each_model(suite.changed(names, **changes), out):
            prepared = prepare(one, folder, **how)
            found = prepared.rows()
            if workers.leads:
                write_results(one, prepared.model, folder, prepared.running.device, found, prepared.record)
            rows += found
    finally:
        workers.close()
    return frame(rows)


def each_model(suite: Suite, out: str | Path | None) -> Iterator[tuple[Suite, Path]]:
    """The suite with each of its models, and where its results go: `out`, by default results/SUITE-SAMPLES, or a folder in it."""
    folder = Path(out) if out is not None else Path("results") / f"{suite.name}-{suite.num_samples}"
    for name, one in suite.of_each_model().items():
        yield one, folder / name


def prepare(
    suite: Suite,
    out: Path,
    *,
    device: str,
    dtype: str,
    compile: str | None,
    share_first_call: bool,
    overlap: bool,
    console: Console,
    workers: Workers,
    shard: tuple[int, int] = (0, 1),
    minutes: float | None = None,
) -> Run:
    """A run that has not begun, its model loaded; arguments and errors as in `run`.

    Args:
        suite: of one model.
        out: results folder.
        device, dtype, compile, share_first_call, overlap: as in `run`.
        console: where progress is shown.
        workers: the processes of the run.
        shard: as in `bench.engine.Run`.
        minutes: after which no batch is begun; None is never.
    """
    if compile is not None and compile not in COMPILE:
        raise unknown("compile", compile, COMPILE)
    device = checked_device(workers.device(device))
    if compile == "graph" and not device.startswith("cuda"):
        raise ValueError(f"compile='graph' records a CUDA graph; device must be cuda, got {device!r}")
    if overlap and not device.startswith("cuda"):
        raise ValueError(
            f"overlap=True judges beside sampling, which a CUDA device can; device must be cuda, got {device!r}"
        )
    dtype = default_dtype(device) if dtype == "auto" else dtype
    with suite.naming("model"):
        network = load_network(suite.model, device, dtype, **suite.reading)
    with suite.naming("judge"):
        model = with_judge(network, suite.judge, suite.num_samples)
    deadline = math.inf if minutes is None else time.monotonic() + 60.0 * minutes
    running = Running(device, suite.batch_size, compile, share_first_call, workers, overlap, deadline)
    return Run(suite, model, out, running, console, shard)
