"""A benchmark from Python: `bench.run(suite)` measures a suite and returns its table."""

from __future__ import annotations

from collections.abc import Sequence
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
from bench.zoo import load_model
from distill.config import default_dtype
from samplers.errors import unknown
from samplers.execute import COMPILE

if TYPE_CHECKING:
    import pandas as pd


def run(
    suite: str | Path | Suite,
    out: str | Path | None = None,
    *,
    samplers: Sequence[str] = (),
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
        out: results folder; by default results/SUITE-SAMPLES.
        samplers: labels of the suite or registered names; by default all of the suite.
        device: of torch.
        dtype: "auto", "fp32", "bf16" or, on an accelerator, "fp16", the network's.
        compile: None, "loop" or "graph", as in `samplers.run_plan`.
        share_first_call: whether cells that start from the same noise at the same time share the first network call; it is
            counted all the same, and images a second are then too high.
        overlap: whether a CUDA device samples the next batch while one is judged; images a second are then a lower bound, and
            peak memory is that of both.
        quiet: whether nothing is printed.
        **changes: fields of the suite that are replaced, such as nfe=[5, 10] or num_samples=1000.

    Returns:
        The columns that table.csv has. For each cell: role ("sampler" or "teacher"), label, model, sampler, grid, budget, nfe
        (network calls made for a sample), seed, num_samples, status ("done", "failed", "absent") and reason, metric (name of
        the distance), value, low and high (95 % interval), standard_error, seconds of sampling, images_per_second,
        peak_memory_mb, and what made it: model_hash, plan_hash, hashes, code, dtype, device, torch.

    Raises:
        ValueError, FileNotFoundError: an unknown suite, sampler, device or dtype, or a value out of range.
        distill.checkpoint.CheckpointError: a model that cannot be used.
    """
    suite = suite if isinstance(suite, Suite) else load_suite(str(suite))
    prepared = prepare(
        suite.changed(samplers, **changes),
        out,
        device=device,
        dtype=dtype,
        compile=compile,
        share_first_call=share_first_call,
        overlap=overlap,
        console=Console(quiet=quiet),
    )
    try:
        rows = prepared.rows()
        if prepared.running.workers.leads:
            write_results(prepared.suite, prepared.model, prepared.out, prepared.running.device, rows)
    finally:
        prepared.running.workers.close()
    return frame(rows)


def prepare(
    suite: Suite,
    out: str | Path | None,
    *,
    device: str,
    dtype: str,
    compile: str | None,
    share_first_call: bool,
    overlap: bool,
    console: Console,
    shard: tuple[int, int] = (0, 1),
) -> Run:
    """A run that has not begun, its model loaded; arguments and errors as in `run`."""
    if compile is not None and compile not in COMPILE:
        raise unknown("compile", compile, COMPILE)
    workers = Workers()
    device = checked_device(workers.device(device))
    if compile == "graph" and not device.startswith("cuda"):
        raise ValueError(f"compile='graph' records a CUDA graph; device must be cuda, got {device!r}")
    if overlap and not device.startswith("cuda"):
        raise ValueError(
            f"overlap=True judges beside sampling, which a CUDA device can; device must be cuda, got {device!r}"
        )
    dtype = default_dtype(device) if dtype == "auto" else dtype
    model = load_model(suite.model, device, dtype, suite.judge, suite.num_samples, **suite.reading)
    folder = Path(out) if out is not None else Path("results") / f"{suite.name}-{suite.num_samples}"
    running = Running(device, suite.batch_size, compile, share_first_call, workers, overlap)
    return Run(suite, model, folder, running, console, shard)
