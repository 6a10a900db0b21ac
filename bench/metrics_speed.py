"""Time and memory of the Frechet distance and its interval, against torchmetrics on the same moments.

    python -m bench.metrics_speed --samples 50000 --dim 2048 --out results/metrics_speed

Features lie in a file and are read in blocks, as those of a benchmark do. Threads are those of the environment
(`OMP_NUM_THREADS`), the same for both sides; wall time on a machine with other work says less than processor time.
"""

from __future__ import annotations

import csv
import io
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import torch

from bench.command import plain_errors
from bench.metrics import FrechetReference, Moments, frechet_distance, frechet_interval
from bench.provenance import machine
from bench.store import write_text

_FACTORS = 64  # that features have in common
_ROWS = 1000  # written at a time
_AGREEMENT = 1e-6  # relative, between the two implementations

T = TypeVar("T")


@dataclass(frozen=True)
class Figure:
    """One piece of work.

    Attributes:
        work: what was done.
        seconds: of wall time, the least of the repeats.
        processor: seconds of all threads together, in the same repeat.
        memory_mb: peak of the process up to its end, above what it held when measuring began.
    """

    work: str
    seconds: float
    processor: float
    memory_mb: float


class FeatureFile:
    """Features (N, d) float32 in a file, of which slices are read when they are asked for.

    Args:
        path: of the raw numbers, row after row.
        shape: (N, d).
    """

    dtype = np.dtype(np.float32)

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self._path, self.shape = path, shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, step = rows.indices(len(self))
        dim = self.shape[1]
        count = max(0, stop - start)
        read = np.fromfile(self._path, self.dtype, count * dim, offset=start * dim * self.dtype.itemsize)
        return read.reshape(count, dim)[::step]


def write_features(path: Path, samples: int, dim: int, seed: int, shift: float = 0.0) -> FeatureFile:
    """Correlated features of a decaying spectrum and a mean of the order of their spread, written a thousand at a time.

    Args:
        path: of the file.
        samples: N.
        dim: d.
        seed: of the features.
        shift: added to half of the features, so that two files differ.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    common = np.random.Generator(np.random.Philox(0))
    mixing = common.standard_normal((_FACTORS, dim)) / 8.0
    scale = np.geomspace(1.0, 0.02, dim)
    mean = 1.0 + shift * (np.arange(dim) % 2)
    with path.open("wb") as file:
        for start in range(0, samples, _ROWS):
            count = min(_ROWS, samples - start)
            own = rng.standard_normal((count, dim)) * (1.0 + shift) + rng.standard_normal((count, _FACTORS)) @ mixing
            file.write((own * scale + mean).astype(np.float32).tobytes())
    return FeatureFile(path, (samples, dim))


def measure(samples: int, dim: int, repeats: int, folder: Path, *, compare: bool = True) -> dict[str, Any]:
    """Measure the pieces of a distance with its interval.

    Args:
        samples: N, of the features and of the reference.
        dim: d.
        repeats: of what is short: all but the two that read the features, and torchmetrics.
        folder: of the two files of features.
        compare: also with torchmetrics' `compute`, from the same moments.

    Returns:
        JSON-ready: the figures, the two values and, where compared, how many times longer torchmetrics took.

    Raises:
        ValueError: the two implementations disagree.
    """
    theirs = write_features(folder / "reference.bin", samples, dim, seed=1)
    ours = write_features(folder / "features.bin", samples, dim, seed=2, shift=0.1)
    begin, figures = _peak_mb(), []

    def timed(work: str, call: Callable[[], T], times: int = 1) -> T:
        found = []
        for _ in range(times):
            wall, processor = time.perf_counter(), time.process_time()
            result = call()
            found.append((time.perf_counter() - wall, time.process_time() - processor))
        figures.append(Figure(work, *min(found), _peak_mb() - begin))
        return result

    moments = timed("moments of the features, one pass", lambda: Moments.of(ours))
    moments_there = Moments.of(theirs)
    distance = timed("distance of two moments", lambda: frechet_distance(moments, moments_there), repeats)
    reference = timed("root of the reference, once", lambda: FrechetReference(moments_there), repeats)
    timed("distance from a reference", lambda: frechet_distance(moments, reference), repeats)
    found = timed(
        "distance with its interval, given the moments", lambda: frechet_interval(ours, reference, moments=moments)
    )
    report: dict[str, Any] = {"value": found.value, "standard_error": found.standard_error}
    if compare:
        metric = _torchmetrics(moments, moments_there)
        value = timed("torchmetrics' compute from the same two moments", lambda: float(metric.compute()))
        if abs(value - distance) > _AGREEMENT * abs(value):
            raise ValueError(f"the two implementations must agree within {_AGREEMENT:g}, got {distance} and {value}")
        seconds = {figure.work: figure.processor for figure in figures}
        ratio = seconds["torchmetrics' compute from the same two moments"] / seconds["distance of two moments"]
        report |= {"torchmetrics_value": value, "torchmetrics_over_ours_processor": ratio}
    return {"samples": samples, "dim": dim, "figures": [asdict(figure) for figure in figures], **report}


def _torchmetrics(a: Moments, b: Moments) -> Any:
    """Torchmetrics' FID in the state in which it would have seen features with these moments."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    extractor = torch.nn.Flatten()
    extractor.num_features = a.dim  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=extractor)
    for name, moments in (("real", b), ("fake", a)):
        metric.update(torch.zeros(2, a.dim, dtype=torch.float64), real=name == "real")
        squares = moments.covariance * (moments.count - 1) + moments.count * np.outer(moments.mean, moments.mean)
        setattr(metric, f"{name}_features_sum", torch.from_numpy(moments.mean * moments.count))
        setattr(metric, f"{name}_features_cov_sum", torch.from_numpy(squares))
        setattr(metric, f"{name}_features_num_samples", torch.tensor(moments.count))
    return metric


def _peak_mb() -> float:
    """The most memory that this process has held; kilobytes on Linux, bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 * 1024 if sys.platform == "darwin" else 1024)


@click.command()
@click.option("--samples", default=50_000, show_default=True, type=click.IntRange(2))
@click.option("--dim", default=2048, show_default=True, type=click.IntRange(1))
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@click.option("--compare/--no-compare", default=True, show_default=True, help="With torchmetrics (a minute at 2048).")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the figures; by default none."
)
@plain_errors
def main(samples: int, dim: int, repeats: int, compare: bool, out: Path | None) -> None:
    """Time and memory of the Frechet distance and its interval."""
    with tempfile.TemporaryDirectory() as folder:
        report = measure(samples, dim, repeats, Path(folder), compare=compare)
    click.echo(f"{samples} x {dim}, {torch.get_num_threads()} threads")
    for figure in report["figures"]:
        click.echo("{work:50s} {seconds:7.2f} s, processor {processor:6.2f} s, {memory_mb:5.0f} MB".format(**figure))
    if compare:
        click.echo(f"torchmetrics / ours, processor time: {report['torchmetrics_over_ours_processor']:.1f}")
    if out:
        write_report(report, out)


def write_report(report: dict[str, Any], out: Path) -> None:
    """Write table.csv, table.md and provenance.json into a folder.

    Args:
        report: of `measure`.
        out: folder.
    """
    figures, about = report["figures"], {name: value for name, value in report.items() if name != "figures"}
    where = machine("cpu")
    table = io.StringIO()
    lines = csv.DictWriter(table, list(figures[0]), lineterminator="\n")
    lines.writeheader()
    lines.writerows(figures)
    write_text(out / "table.csv", table.getvalue())
    write_text(out / "provenance.json", json.dumps({**about, **where}, indent=1, allow_nan=False) + "\n")
    text = [
        f"# The Frechet distance of {report['samples']} x {report['dim']} features",
        "",
        "| work | wall (s) | processor (s) | memory (MB) |",
        "| --- | ---: | ---: | ---: |",
        *("| {work} | {seconds:.2f} | {processor:.2f} | {memory_mb:.0f} |".format(**figure) for figure in figures),
        "",
        f"- On {where['device']} with {where['threads']} threads; the least of the repeats. Memory is the peak of the process",
        "  up to the end of the work, above what it held when measuring began.",
    ]
    if "torchmetrics_over_ours_processor" in report:
        ours, theirs = report["value"], report["torchmetrics_value"]
        text.append(
            f"- torchmetrics' compute takes {report['torchmetrics_over_ours_processor']:.1f} times the processor time of ours "
            f"from the same two moments; the values differ by {abs(theirs - ours) / theirs:.1g} of themselves."
        )
    write_text(out / "table.md", "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
