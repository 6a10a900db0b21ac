"""Plant faults in runs of a benchmark and show that nothing measured is lost: `python -m bench.endurance`.

Each fault disturbs a run of a small suite in a folder of its own: kills, a full disk, damaged files, lost workers. Then the same
command runs undisturbed. Its table must equal that of a run that was never disturbed, and cells that were finished and whole
must not be measured again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

import click
import pandas as pd

from bench.provenance import machine
from bench.store import write_text

_SUITE = ("gmm", "--num-samples", "600", "--batch-size", "50", "--nfe", "5,20,60", "--samplers", "ddpm,ddim,heun")
_COLUMNS = ["role", "label", "budget", "nfe", "value", "low", "high", "status"]
_PATIENCE = 600.0  # seconds for a run that takes a few


@dataclass(frozen=True)
class Fault:
    """A way to disturb a run.

    Attributes:
        name: what goes wrong.
        plant: disturbs a run in a folder, and says what was seen.
        spoils: finished cells that the fault itself damages, which have to be measured again.
    """

    name: str
    plant: Callable[[Path], str]
    spoils: int = 0


def outcome(fault: Fault, folder: Path, expected: pd.DataFrame) -> dict[str, Any]:
    """Plant a fault in an empty folder, run the command again, and compare."""
    seen = fault.plant(folder).replace(str(folder), "FOLDER")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*.json")}
    last = _run(folder)
    after = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*.json")}
    again = sum(after.get(path) != stamp for path, stamp in before.items())
    table = pd.read_csv(folder / "table.csv") if (folder / "table.csv").exists() else pd.DataFrame(columns=_COLUMNS)
    equal = table.reindex(columns=_COLUMNS).equals(expected)
    return {
        "fault": fault.name,
        "seen": seen,
        "finished_before": len(before),
        "measured_again": again,
        "exit_code": last.returncode,
        "table_equal": equal,
        "work_left": (folder / "work").exists(),
        "passes": equal and last.returncode == 0 and again == fault.spoils and not (folder / "work").exists(),
    }


# running the command ------------------------------------------------------------------------------------------------------


def _command(folder: Path, patch: str = "", processes: int = 1) -> list[str]:
    """The suite in a folder; `patch` is a line of Python that is run in the process first."""
    arguments = ["bench", *_SUITE, "--out", str(folder)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return [sys.executable, *launcher, "-m", "bench", *arguments]
    return [sys.executable, "-c", f"{patch}\nfrom bench.cli import main\nmain({arguments!r})"]


def _run(folder: Path, patch: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(folder, patch), capture_output=True, text=True, timeout=_PATIENCE, check=False)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no message"


@contextmanager
def _begun(folder: Path, blocks: int, processes: int = 1) -> Iterator[subprocess.Popen[str]]:
    """A run that has finished or begun so many cells and batches."""
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # a shell that starts a job in the background has it ignore SIGINT, and its children inherit that
    pipes["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(_command(folder, processes=processes), **pipes)
    deadline = time.monotonic() + _PATIENCE  # pathlib's glob fails where a folder goes away meanwhile
    while process.poll() is None and time.monotonic() < deadline:
        if len(glob(f"{folder}/work/*/*.npz")) + 12 * len(glob(f"{folder}/cells/*.json")) >= blocks:
            break
        time.sleep(0.002)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


# faults -------------------------------------------------------------------------------------------------------------------


def _stopped(number: int, moment: int) -> Callable[[Path], str]:
    def plant(folder: Path) -> str:
        with _begun(folder, 1 + random.Random(moment).randrange(100)) as process:
            process.send_signal(number)
            error = process.communicate(timeout=_PATIENCE)[1]
        return f"exit code {process.returncode}" + (f": {_last_line(error)}" if error.strip() else "")

    return plant


def _damaged(pattern: str, change: Callable[[bytes], bytes]) -> Callable[[Path], str]:
    """A run is killed, then the first file of a pattern is damaged."""

    def plant(folder: Path) -> str:
        with _begun(folder, 12 * 3 + 5):
            pass
        files = sorted(folder.glob(pattern))
        if not files:
            raise RuntimeError(f"no {pattern} was there to damage: the run was over too soon")
        files[0].write_bytes(change(files[0].read_bytes()))
        return f"{files[0].name} of {len(files)}"

    return plant


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _of_another_cell(content: bytes) -> bytes:
    return json.dumps({**json.loads(content), "seed": 99}).encode()


def _patched(line: str, sign: str) -> Callable[[Path], str]:
    """A run in a process in which something is broken, as `sign` in its output shows."""

    def plant(folder: Path) -> str:
        done = _run(folder, line)
        if sign not in done.stdout + done.stderr:
            raise RuntimeError(f"the fault was not planted: {_last_line(done.stderr or done.stdout)}")
        return f"exit code {done.returncode}: {_last_line(done.stderr or done.stdout)}"

    return plant


_NAN = """
import torch, bench.mixture as m
real = m.GaussianMixture.eps
m.GaussianMixture.eps = lambda self, x, alpha, sigma: real(self, x, alpha, sigma) * (float('nan') if float(alpha[0]) > 0.9 else 1)
"""
_MEMORY = """
import torch, bench.measure as m
real = m.run_network
def small(model, plan, inputs, *, indices, **how):
    if len(indices) > 20:
        print('halved')
        raise torch.OutOfMemoryError('CUDA out of memory')
    return real(model, plan, inputs, indices=indices, **how)
m.run_network = small
"""
_CLOCK = """
import bench.measure as m, datetime as d, itertools
hours = itertools.cycle([0, -48, 5000])
class Clock(d.datetime):
    @classmethod
    def now(cls, tz=None):
        print('later')
        return d.datetime.now(tz) + d.timedelta(hours=next(hours))
m.datetime = type('module', (), {'datetime': Clock, 'timezone': d.timezone})
"""
_FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
"""
_UNREADABLE = """
import bench.api
from distill.checkpoint import CheckpointError
def broken(*args, **how):
    raise CheckpointError('model.safetensors is truncated')
bench.api.load_network = broken
"""


def _on_small_disk(folder: Path) -> str:
    """The results folder is a file system of 64 kB, where that may be mounted."""
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        return "not planted: no right to mount; " + _patched(_FULL, "File too large")(folder)
    try:
        done = _run(folder)
        kept = {path.name: path.read_bytes() for path in folder.glob("cells/*.json")}
    finally:
        subprocess.run(["umount", folder], check=True)
    for name, content in kept.items():
        (folder / "cells").mkdir(exist_ok=True)
        (folder / "cells" / name).write_bytes(content)
    return f"exit code {done.returncode}, {len(kept)} cells kept: {_last_line(done.stderr)}"


def _read_only(folder: Path) -> str:
    with _begun(folder, 30):
        pass
    bound = subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], capture_output=True).returncode == 0
    if not bound:
        folder.chmod(0o555)
    try:
        done = _run(folder)
    finally:
        if bound:
            subprocess.run(["umount", folder], check=True)
        folder.chmod(0o755)
    return f"exit code {done.returncode}: {_last_line(done.stderr)}"


def _worker_death(folder: Path) -> str:
    with _begun(folder, 20, processes=2) as launcher:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        launcher.communicate(timeout=_PATIENCE)
    return f"one of {len(children)} workers killed, launcher's exit code {launcher.returncode}"


def _concurrent(killed: int) -> Callable[[Path], str]:
    def plant(folder: Path) -> str:
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        others = [subprocess.Popen(_command(folder), **quiet) for _ in range(2)]
        with _begun(folder, 40):  # a third, which is killed
            pass
        for process in others[:killed]:
            process.kill()
        codes = [process.wait(timeout=_PATIENCE) for process in others]
        return f"three at once, exit codes {codes} and one killed"

    return plant


def _left_over(folder: Path) -> str:
    with _begun(folder, 20):
        pass
    (folder / "cells" / ".0123456789abcdef.json.77.new").write_text('{"half')
    for cell in folder.glob("work/*"):
        (cell / ".000000000-000000050.npz.77.new").write_bytes(b"half")
    return "half-written files of a killed process"


FAULTS = (
    *(Fault(f"kill -9 at a random moment ({n})", _stopped(signal.SIGKILL, n)) for n in range(1, 6)),
    Fault("Ctrl-C", _stopped(signal.SIGINT, 11)),
    Fault("terminated by the system", _stopped(signal.SIGTERM, 12)),
    Fault("full disk: a small file system", _on_small_disk),
    Fault("full disk: writes refused beyond a size", _patched(_FULL, "File too large")),
    Fault("read-only folder", _read_only),
    Fault("truncated record of a cell", _damaged("cells/*.json", lambda content: content[: len(content) // 2]), 1),
    Fault("empty record of a cell", _damaged("cells/*.json", lambda _: b""), 1),
    Fault("record of another cell under a cell's name", _damaged("cells/*.json", _of_another_cell), 1),
    Fault("truncated batch", _damaged("work/*/*.npz", lambda content: content[: len(content) // 2])),
    Fault("flipped bit in a batch", _damaged("work/*/*.npz", _flipped)),
    Fault("half-written files", _left_over),
    Fault("model that cannot be read", _patched(_UNREADABLE, "model.safetensors is truncated")),
    Fault("network that gives NaN", _patched(_NAN, "NaN or Inf")),
    Fault("out of memory", _patched(_MEMORY, "halved")),
    Fault("clock that jumps back and ahead", _patched(_CLOCK, "later")),
    Fault("death of a worker under torchrun", _worker_death),
    Fault("concurrent runs, one killed", _concurrent(0)),
    Fault("concurrent runs, two killed", _concurrent(1)),
)


@click.command()
@click.option("--out", default=Path("results/endurance"), type=click.Path(path_type=Path), help="Folder of the report.")
@click.option("--only", default="", help="Faults whose name holds this.")
def main(out: Path, only: str) -> None:
    """Plant faults in runs of a benchmark, and write what became of each."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if _run(root / "whole").returncode:
            raise click.ClickException("the undisturbed run failed")
        expected = pd.read_csv(root / "whole" / "table.csv")[_COLUMNS]
        rows = []
        for number, fault in enumerate(fault for fault in FAULTS if only in fault.name):
            rows.append(outcome(fault, root / str(number), expected))
            verdict = "equal" if rows[-1]["passes"] else f"FAILS {rows[-1]}"
            click.echo(f"{fault.name}: {verdict}; {rows[-1]['seen']}")
    write_report(rows, out)
    if not all(row["passes"] for row in rows):
        raise SystemExit(1)


def write_report(rows: list[dict[str, Any]], out: Path) -> None:
    """Write faults.csv, README.md and provenance.json."""
    table = pd.DataFrame(rows)
    write_text(out / "faults.csv", table.to_csv(index=False))
    lines = [
        "| fault | seen | cells finished before | measured again | final table |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for row in rows:
        verdict = "equal" if row["passes"] else "**differs**"
        seen = row["seen"].replace("|", "\\|")
        lines.append(f"| {row['fault']} | {seen} | {row['finished_before']} | {row['measured_again']} | {verdict} |")
    passed = sum(row["passes"] for row in rows)
    head = f"# Planted faults\n\n`python -m bench.endurance`: {passed} of {len(rows)} end in the table of an undisturbed run, "
    head += "and no whole cell is measured twice.\n\n"
    write_text(out / "README.md", head + "\n".join(lines) + "\n")
    write_text(out / "provenance.json", json.dumps(machine("cpu"), indent=1) + "\n")


if __name__ == "__main__":
    main()
