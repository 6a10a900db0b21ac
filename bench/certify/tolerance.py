"""Certificates of the error-controlled samplers: the error falls with the tolerance and stays within a multiple of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from bench.certify.order import problem
from bench.certify.problem import solution_at
from samplers import sample
from samplers.registry import Sampler

Row = dict[str, Any]
TOLERANCES = (1e-3, 1e-4, 1e-5)
# An error is that of a whole run, a tolerance is for one step, and the mixture pulls neighbours apart.
_MULTIPLE = 30.0


def tolerance_rows(entry: Sampler, schedule: str) -> Iterator[Row]:
    """One row for each tolerance, rtol = atol.

    A row passes where the largest error over eight states is at most 30 times the tolerance, and at most half of the one
    at the tolerance before.
    """
    calls, before = 0, np.inf
    where = problem(schedule)

    def count(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return where.model.net(x, t)

    for tolerance in TOLERANCES:
        calls = 0
        model = type(where.model)(count, where.schedule)
        x = sample(model, entry.name, x_T=where.x_T, rtol=tolerance, atol=tolerance)
        error = float(np.abs(x.numpy() - _reference(schedule)).max())
        row: Row = {"sampler": entry.name, "schedule": schedule, "tolerance": tolerance, "calls": calls, "error": error}
        good = error <= _MULTIPLE * tolerance and error <= 0.5 * before
        yield row | {"status": "pass" if good else "fail", "note": ""}
        before = error


@functools.cache
def _reference(schedule: str) -> np.ndarray:
    """The solution by DOP853, as `Problem.solution` is one of the samplers that are certified here."""
    where = problem(schedule).schedule
    lam = where.lam(np.array([where.t_max, where.t_min]))
    return solution_at(where, lam, problem(schedule).x_T.numpy())[-1]
