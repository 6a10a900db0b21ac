"""What made a run: versions, machine, commit, time and memory."""

from __future__ import annotations

import importlib.util
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.store import code_fingerprint
from bench.suite import Suite
from bench.zoo import BenchModel

Row = dict[str, Any]
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux
_RESET = "5"  # of the peak, see proc(5)


def reset_peak_memory(device: str) -> None:
    """Let `peak_memory_mb` begin anew, where the system allows it."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        with suppress(OSError):  # a container may not let a process do it
            _CLEAR.write_text(_RESET)


def peak_memory_mb(device: str) -> float:
    """Peak memory since `reset_peak_memory`: of an accelerator's allocator, else resident memory of the process with all of it.

    A process keeps memory that it has given back to its own allocator, so that the peak of a cell depends on those before it.
    Where the peak cannot be reset, it is that since the process began.
    """
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    status = _STATUS.read_text() if _STATUS.exists() else ""
    peaks = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")]
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round((peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / unit, 1)


def energy_joules(device: str) -> float:
    """What the accelerator has used since its driver was loaded, where NVML counts it; else 0."""
    if torch.device(device).type != "cuda" or importlib.util.find_spec("pynvml") is None:
        return 0.0
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000.0
    except pynvml.NVMLError:  # older cards do not count it
        return 0.0


def provenance(suite: Suite, model: BenchModel, device: str, rows: Sequence[Row]) -> Row:
    """What a reader needs to repeat the run: the resolved suite, model (with its averaging) and judge (with the split of its
    reference, its extractor and its rounding), hashes, versions, machine, time and memory.
    """
    done = [row for row in rows if row["status"] == "done"]
    return {
        "suite": suite.model_dump(),
        "model_hash": model.hash,
        "model": {"name": model.name, **model.info},
        "judge": {"metric": model.judge.metric, **model.judge.about},
        "hashes": model.judge.hashes,
        "code": code_fingerprint(),
        "dtype": model.dtype,
        **machine(device),
        "sampling_seconds": round(sum(row["seconds"] for row in done), 1),
        "peak_memory_mb": max((row["peak_memory_mb"] for row in done), default=None),
        "failed": [
            {"label": row["label"], "budget": row["budget"], "reason": row["reason"]}
            for row in rows
            if row["status"] == "failed"
        ],
    }


def machine(device: str) -> Row:
    """Where and with what something was measured: commit, device, threads, platform, versions."""
    return {
        "commit": _commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("fewstep", "torch", "numpy", "scipy", "diffusers")},
    }


@lru_cache
def device_name(device: str) -> str:
    """Of the accelerator, or of the processor with its number of cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return f"{names[0]} ({len(names)} cores)" if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The source's commit, with a mark where its files differ from it, results aside; None outside a checkout."""
    here = Path(__file__).parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    # a run itself writes results anew
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    return commit and commit + ("+changes" if changed else "")
