"""Distances with their confidence intervals: from a standard error, from rows left out, and over several seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.special import ndtri, stdtrit

from bench.moments import Features

REACH = float(ndtri(0.975))  # of a 95 % interval, in standard errors


@dataclass(frozen=True)
class Distance:
    """A measured distance, or another figure of samples, and its confidence interval.

    Attributes:
        value: >= 0 for a distance; an estimate without bias, such as KID, may fall below.
        low, high: the ends of the interval; of a distance, low is never below 0, and of a share both are in [0, 1].
        standard_error: of `value`.
        count: N, the samples behind it.
    """

    value: float
    low: float
    high: float
    standard_error: float
    count: int


def interval(
    value: float,
    standard_error: float,
    count: int,
    level: float = 0.95,
    *,
    floor: float = -math.inf,
    ceiling: float = math.inf,
    degrees: int | None = None,
) -> Distance:
    """`value` with the two-sided interval of a normal error.

    Args:
        value: the estimate.
        standard_error: of it.
        count: the samples behind it.
        level: probability that the interval covers what is estimated, in (0, 1).
        floor, ceiling: beyond which the figure cannot lie, where `low` and `high` are cut off.
        degrees: of freedom of the standard error, for Student's quantile; None: it is known well.

    Raises:
        ValueError: a level outside (0, 1).
    """
    tail = _tail(level)
    reach = float(ndtri(tail) if degrees is None else stdtrit(degrees, tail)) * standard_error
    low, high = max(floor, value - reach), min(ceiling, value + reach)
    return Distance(float(value), float(low), float(high), float(standard_error), count)


def share_interval(value: float, standard_error: float, count: int, level: float = 0.95) -> Distance:
    """A share with Wilson's score interval, which stays in [0, 1] and has a width where the share is 0 or 1 too.

    Wilson 1927, doi:10.1080/01621459.1927.10502953, for the number of independent trials that have this standard error, as for
    shares in surveys (Korn & Graubard 1998, Survey Methodology 24, 193-201): `q (1 - q) / standard_error^2` and at most `count`,
    where q is the middle of the interval of `count` trials, since a share of 0 or 1 says nothing of its spread.

    Args:
        value: the share, in [0, 1].
        standard_error: of it, as the trials show it.
        count: the trials.
        level: see `interval`.

    Returns:
        The share; its standard error is that at q where all trials had one outcome.

    Raises:
        ValueError: a share outside [0, 1], or a level outside (0, 1).
    """
    if not 0 <= value <= 1:
        raise ValueError(f"value must lie in [0, 1], got {value}")
    z = float(ndtri(_tail(level)))
    q = (value * count + 0.5 * z * z) / (count + z * z)
    trials = min(count, q * (1.0 - q) / standard_error**2) if standard_error else float(count)
    middle, weight = value + 0.5 * z * z / trials, 1.0 + z * z / trials
    reach = z * math.sqrt(value * (1.0 - value) / trials + 0.25 * z * z / trials**2)
    low, high = max(0.0, (middle - reach) / weight), min(1.0, (middle + reach) / weight)
    error = standard_error or math.sqrt(q * (1.0 - q) / (count + z * z))
    return Distance(float(value), min(value, low), max(value, high), float(error), count)


def _tail(level: float) -> float:
    """The probability below the upper end."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    return 0.5 + 0.5 * level


def mean_interval(values: Any, level: float = 0.95, *, floor: float = -math.inf, name: str = "values") -> Distance:
    """The mean of one number for each sample; its standard error is their standard deviation over sqrt(N).

    Args:
        values: (N,), N >= 2, finite.
        level: see `interval`.
        floor: see `interval`.
        name: of the argument, for errors.

    Raises:
        ValueError: another shape, fewer than two values, NaN or Inf, or a level outside (0, 1).
    """
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be (N,) real numbers, got {array.shape} {array.dtype}")
    if len(array) < 2:
        raise ValueError(f"{name} must hold at least 2 samples, got {len(array)}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or Inf in sample {int(np.argmin(np.isfinite(array)))}")
    error = float(array.std(ddof=1)) / math.sqrt(len(array))
    return interval(float(array.mean()), error, len(array), level, floor=floor)


def jackknife(
    statistic: Callable[[Any], float],
    features: Features,
    blocks: int = 20,
    level: float = 0.95,
    *,
    floor: float = -math.inf,
) -> Distance:
    """Any statistic of rows, with the interval of the block jackknife.

    With `s_b` the statistic without the b-th of B runs of neighbouring rows, the squared standard error is
    `(B - 1) / B * sum_b (s_b - mean s)^2` (Tukey 1958, doi:10.1214/aoms/1177706647; blocks: Kunsch 1989,
    doi:10.1214/aos/1176347265), with B - 1 degrees of freedom. The statistic must be smooth in the rows' distribution (a
    mean, a Frechet distance, not a minimum). Rows in an order that has a meaning, such as sorted by class, make the blocks
    differ and the interval too wide.

    Args:
        statistic: of rows; is given an array-like like `features`, which NumPy functions take as an array.
        features: (N, ...), N >= blocks.
        blocks: B, 2 .. N; their sizes differ by one row at most.
        level: see `interval`.
        floor: see `interval`.

    Raises:
        ValueError: a number of blocks outside 2 .. N, or a level outside (0, 1).
    """
    if not hasattr(features, "shape"):
        features = np.asarray(features)
    if not 2 <= blocks <= len(features):
        raise ValueError(f"blocks must lie in 2 .. {len(features)}, the number of rows, got {blocks}")
    ends = [len(features) * b // blocks for b in range(blocks + 1)]
    left_out = [float(statistic(_Without(features, a, b))) for a, b in pairwise(ends)]
    error = math.sqrt((blocks - 1) * float(np.var(left_out)))
    value = float(statistic(features))
    return interval(value, error, len(features), level, floor=floor, degrees=blocks - 1)


def combined(distances: Sequence[Distance], level: float = 0.95, *, share: bool = False) -> Distance:
    """The mean over K runs that differ in their seed alone.

    With `e_k` the runs' standard errors, that of the mean is `sqrt(sum_k e_k^2) / K`, which holds what each run knows of its own
    samples. From K = 3 on the standard deviation of the values over sqrt(K) also holds what runs have in common within but not
    between (a student's training, say); it is known from K values alone, and so has Student's quantile with K - 1 degrees of
    freedom. Of the two intervals each end is the wider one's, and the standard error is the larger: that errs on the wide side.

    The ends of a mean of shares are as far from it as those of the runs are from theirs, `sqrt(sum_k (high_k - value_k)^2) / K`
    above and likewise below (Zou & Donner 2008, doi:10.1002/sim.3095), which leaves [0, 1] never; where the values' spread says
    more, that is taken.

    Args:
        distances: one for each seed, at least one.
        level: of the interval, see `interval`; of shares also that of theirs.
        share: whether they are shares, as `share_interval` gives them.

    Returns:
        The mean; `count` is the sum of the counts; `low` is not below 0 unless one of the given ones is.

    Raises:
        ValueError: no distances, or a level outside (0, 1).
    """
    if not distances:
        raise ValueError("distances must hold at least one, got none")
    tail, values = _tail(level), np.array([distance.value for distance in distances])
    mean, count = float(values.mean()), sum(distance.count for distance in distances)
    inside = _length([distance.standard_error for distance in distances]) / len(values)
    between = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) >= 3 else 0.0
    spread = float(stdtrit(len(values) - 1, tail)) * between if between else 0.0
    below = above = float(ndtri(tail)) * inside
    if share:
        below = _length([distance.value - distance.low for distance in distances]) / len(values)
        above = _length([distance.high - distance.value for distance in distances]) / len(values)
    floor = 0.0 if share or min(distance.low for distance in distances) >= 0 else -math.inf
    low, high = max(floor, mean - max(below, spread)), min(1.0 if share else math.inf, mean + max(above, spread))
    return Distance(mean, low, high, max(inside, between), count)


def _length(parts: Sequence[float]) -> float:
    return math.sqrt(sum(part**2 for part in parts))


class _Without:
    """Rows but for those from `start` to `stop`, taken from the others as they are asked for."""

    def __init__(self, rows: Features, start: int, stop: int) -> None:
        self._rows, self._start, self._stop = rows, start, stop
        self.shape = (len(rows) - (stop - start), *rows.shape[1:])
        self.dtype = rows.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, last, step = rows.indices(len(self))
        gap = self._stop - self._start
        before = self._rows[first : min(last, self._start)]
        after = self._rows[max(first + gap, self._stop) : last + gap]
        return np.concatenate([before, after])[::step]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)
