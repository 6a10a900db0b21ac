"""The error of a sampler against the many-step solution from the same noise, from one number for each sample.

A distance between distributions does not see where each noise should have gone; this does. It compares deterministic
samplers only: with noise on the way there is no solution to reach.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bench.intervals import Distance, interval, mean_interval


def rmse(squared_errors: Any, level: float = 0.95) -> Distance:
    """Root of the mean squared error, in units of the samples.

    Args:
        squared_errors: (N,), for each sample the mean over its numbers of the squared difference from its solution.
        level: probability that the interval covers, in (0, 1); the standard error is the delta method's.

    Raises:
        ValueError: another shape, fewer than two samples, NaN, Inf or a negative number.
    """
    mean = _mean("squared_errors", squared_errors, level)
    root = math.sqrt(mean.value)
    error = 0.5 * mean.standard_error / root if root else 0.0
    return interval(root, error, mean.count, level, floor=0.0)


def psnr(squared_errors: Any, span: float = 2.0, level: float = 0.95) -> Distance:
    """Peak signal-to-noise ratio `10 log10(span^2 / mean squared error)` in decibels; higher is better.

    Of the mean over all samples, so that it orders samplers as `rmse` does; the mean of each sample's own ratio is larger.

    Args:
        squared_errors: (N,), see `rmse`.
        span: the range of the samples' numbers, largest less smallest; 2 for images in [-1, 1].
        level: probability that the interval covers, in (0, 1); the standard error is the delta method's.

    Returns:
        Infinity with no error where every sample is its solution to the last bit.

    Raises:
        ValueError: as for `rmse`, or a span that is not above 0.
    """
    if not 0 < span < math.inf:
        raise ValueError(f"span must be a number above 0, got {span}")
    mean = _mean("squared_errors", squared_errors, level)
    if mean.value == 0:
        return Distance(math.inf, math.inf, math.inf, 0.0, mean.count)
    decibels = 10.0 / math.log(10.0)
    value = decibels * math.log(span * span / mean.value)
    return interval(value, decibels * mean.standard_error / mean.value, mean.count, level)


def feature_error(distances: Any, level: float = 0.95) -> Distance:
    """The mean over samples of the Euclidean distance between the features of a sample and those of its solution.

    Args:
        distances: (N,), one for each sample.
        level: probability that the interval covers, in (0, 1).

    Raises:
        ValueError: another shape, fewer than two samples, NaN, Inf or a negative number.
    """
    return _mean("distances", distances, level)


def _mean(name: str, values: Any, level: float) -> Distance:
    mean = mean_interval(values, level, floor=0.0, name=name)
    array = np.asarray(values)
    if (array < 0).any():
        raise ValueError(f"{name} must be >= 0, got {array.min()} in sample {int(np.argmin(array))}")
    return mean
