"""Benchmarks of diffusion samplers: `bench.run(suite)` gives the table of a suite, `bench.Metric` is how one is added."""

from __future__ import annotations

from typing import Any

__all__ = ["Metric", "run"]


def __getattr__(name: str) -> Any:
    """Both are loaded when they are first used: the command line starts without torch."""
    if name == "run":
        from bench.api import run

        return run
    if name == "Metric":
        from bench.judging import Metric

        return Metric
    raise AttributeError(f"module 'bench' has no attribute {name!r}")
