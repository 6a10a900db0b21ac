"""The floor of a distance: what real data has itself at the number of samples that is judged, where no sampler is to blame."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.intervals import Distance, combined, interval
from bench.metrics import FrechetReference, frechet_distance, frechet_interval
from bench.moments import Features, Moments, take

TEST = "test data against the reference"
HALVES = "reference data against as much other reference data"
EXACT = "exact samples against the reference"
_DRAWS, _FEW_FEATURES = 8, 256  # draws cost an eigenproblem each, so that there is one where features are more


@dataclass(frozen=True)
class Floor:
    """The mean distance of draws of real data; most of it is bias, which falls with the size of a draw.

    Attributes:
        what: the two sides.
        count: samples of a draw; 0 where that is not known.
        value, low, high, standard_error: of the mean; all but the value None where they are not known.
    """

    what: str
    count: int
    value: float
    low: float | None = None
    high: float | None = None
    standard_error: float | None = None

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Floor:
        """A floor as `dataclasses.asdict` wrote it."""
        return cls(**{name: record.get(name) for name in cls.__dataclass_fields__})  # type: ignore[arg-type]


def most_rows(count: int, dims: int) -> int:
    """Rows that the draws of `count` samples of `dims` features look at, at most."""
    return count * (_DRAWS if dims <= _FEW_FEATURES else 2)


def floor_of_samples(rows: Features, reference: FrechetReference, count: int, what: str = TEST) -> Floor:
    """The distance of draws of samples from the reference; draws share no sample.

    Args:
        rows: features (M, d) of real data that the reference was not made of, M >= 2.
        reference: as it judges.
        count: samples of a draw; M where there are no more.
        what: the two sides.
    """
    count = min(count, len(rows))
    return _floor(what, count, [frechet_interval(draw, reference) for draw in _draws(rows, count)])


def floor_of_halves(rows: Features, count: int) -> Floor:
    """The distance between draws of reference samples, each pair of them disjoint: both sides have a sampling error.

    Args:
        rows: features (M, d) of reference samples, M >= 4.
        count: samples of either side; half of M where there are no more.
    """
    count = min(count, len(rows) // 2)
    draws = _draws(rows, count)
    return _floor(HALVES, count, [_between(a, b) for a, b in zip(draws, draws, strict=False)])


def floor_of_moments(test: Moments, reference: FrechetReference) -> Floor:
    """The distance of a whole set, of which nothing but the moments is at hand, so that nobody knows it of fewer samples."""
    return Floor(TEST, test.count, frechet_distance(test, reference))


def _draws(rows: Features, count: int) -> Iterator[np.ndarray]:
    order = np.random.Generator(np.random.Philox(0)).permutation(len(rows))  # data may be sorted by class
    for k in range(min(len(rows), most_rows(count, rows.shape[1])) // count):
        yield take(rows, order[k * count : (k + 1) * count])


def _between(a: np.ndarray, b: np.ndarray) -> Distance:
    """Two sides that are samples both: the squared standard errors, each with the other side as it is, add up."""
    found = [frechet_interval(x, Moments.of(y)) for x, y in ((a, b), (b, a))]
    error = math.hypot(*(side.standard_error for side in found))
    return interval(found[0].value, error, len(a), floor=0.0)


def _floor(what: str, count: int, draws: list[Distance]) -> Floor:
    mean = combined(draws)
    return Floor(what, count, mean.value, mean.low, mean.high, mean.standard_error)
