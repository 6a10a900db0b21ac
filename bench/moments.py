"""Mean and covariance of features that come in blocks of rows; everything in float64 on NumPy arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.linalg import blas

from bench.mixture import GaussianMixture

_ELEMENTS = 1 << 22  # numbers that are held in float64 at a time: 32 MiB


class Features(Protocol):
    """An array (N, d) of which rows are taken in slices: a NumPy array, or what reads them from files as they are needed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, d)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the arrays that slices are."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of features.

    Attributes:
        mean: (d,) float64.
        covariance: (d, d) float64, with N - 1 in the denominator.
        count: N, or 0 where the moments are exact.

    Raises:
        ValueError: other shapes, NaN or Inf, a covariance that is not symmetric, a negative count.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int

    def __post_init__(self) -> None:
        for name in ("mean", "covariance"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} must be finite, got NaN or Inf")
        if self.mean.ndim != 1 or len(self.mean) == 0:
            raise ValueError(f"mean must be (d,) with d >= 1, got {self.mean.shape}")
        if self.covariance.shape != (self.dim, self.dim):
            raise ValueError(f"covariance must be {(self.dim, self.dim)} like the mean, got {self.covariance.shape}")
        if np.abs(self.covariance - self.covariance.T).max() > 1e-8 * np.abs(self.covariance).max():
            raise ValueError("covariance must be symmetric, got one that differs from its transpose")
        if self.count < 0:
            raise ValueError(f"count must be at least 0, got {self.count}")

    @classmethod
    def of(cls, features: Features) -> Moments:
        """The moments of N samples.

        Args:
            features: (N, d), N >= 2, finite; read once, in blocks of rows.

        Raises:
            ValueError: another shape, fewer than two samples, NaN or Inf.
        """
        features = as_features(features)
        found = MomentsAccumulator(features.shape[1])
        found.update(features)
        return found.result()

    @classmethod
    def of_mixture(cls, mixture: GaussianMixture) -> Moments:
        """The exact moments of a mixture's data, flattened to (D,); count 0."""
        return cls(mixture.mean().numpy(), mixture.covariance().numpy(), 0)

    @property
    def dim(self) -> int:
        """d, the number of features."""
        return len(self.mean)


class MomentsAccumulator:
    """Moments of features that come a few at a time, in any order.

    A block is centred on its own mean, and two sets of n and m samples with means that differ by v join as
    `S + T + v v^T n m / (n + m)`, S and T their scatters (Chan, Golub & LeVeque 1983, doi:10.1080/00031305.1983.10483115).
    Means are kept from the first sample on, so that no large numbers are subtracted, however far they are from 0.

    Args:
        dim: d, the number of features.

    Raises:
        ValueError: a dim below 1.
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim, self.count = dim, 0
        self._origin = self._mean = np.zeros(dim)  # the mean of all samples is the sum of the two
        self._scatter = np.zeros((dim, dim), order="F")  # its upper triangle only

    def update(self, features: Features) -> None:
        """Add samples.

        Args:
            features: (n, d), n >= 0, finite.

        Raises:
            ValueError: another shape, NaN or Inf; samples before the block at fault have been added.
        """
        features = as_features(features, least=0)
        if features.shape[1] != self.dim:
            raise ValueError(f"features must be {self.dim}, as this was made for, got {features.shape[1]}")
        for _, block in blocks(features):
            self._add(block)

    def merge(self, other: MomentsAccumulator) -> None:
        """Add the samples that another has seen, which stays as it is.

        Raises:
            ValueError: the numbers of features differ.
        """
        if other.dim != self.dim:
            raise ValueError(f"other must have {self.dim} features like this one, got {other.dim}")
        total = self.count + other.count
        if other.count:
            if self.count == 0:
                self._origin = other._origin
            shift = (other._origin - self._origin) + (other._mean - self._mean)
            self._scatter += other._scatter
            self._scatter = blas.dsyr(self.count * (other.count / total), shift, a=self._scatter, overwrite_a=1)
            self._mean = self._mean + shift * (other.count / total)
            self.count = total

    def result(self) -> Moments:
        """The moments of all samples so far.

        Raises:
            ValueError: fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"features must hold at least 2 samples, got {self.count}")
        covariance = np.triu(self._scatter)
        covariance /= self.count - 1
        covariance += np.triu(covariance, 1).T
        return Moments(self._origin + self._mean, covariance, self.count)

    def _add(self, block: np.ndarray) -> None:
        if self.count == 0:
            self._origin = block[0].astype(np.float64)
        count, total = len(block), self.count + len(block)
        rows = np.empty((count + 1, self.dim))
        centred = np.subtract(block, self._origin, out=rows[:-1])
        mean = centred.mean(axis=0)
        centred -= mean
        shift = mean - self._mean
        # one row more makes the product of the rows what joins the block to those before it
        np.multiply(shift, math.sqrt(self.count * (count / total)), out=rows[-1])
        self._scatter = blas.dsyrk(1.0, rows.T, beta=1.0, c=self._scatter, overwrite_c=1)
        self._mean = self._mean + shift * (count / total)
        self.count = total


def as_features(features: Any, name: str = "features", least: int = 2) -> Features:
    """Features that have been looked at from outside: their numbers are checked block by block.

    Args:
        features: what `np.asarray` makes (N, d), or array-like with `shape`, `dtype`, `len` and slices, taken as it is.
        name: of the argument, for errors.
        least: samples that there must be.

    Raises:
        ValueError: another shape, no real numbers, or too few samples.
    """
    if not isinstance(getattr(features, "dtype", None), np.dtype):
        features = np.asarray(features)
    if len(features.shape) != 2 or features.shape[1] == 0 or features.dtype.kind not in "fiu":
        shape = tuple(features.shape)
        raise ValueError(f"{name} must be (N, d) real numbers, d >= 1, got {shape} {features.dtype}")
    if len(features) < least:
        raise ValueError(f"{name} must hold at least {least} samples, got {len(features)}")
    checked: Features = features
    return checked


def blocks(features: Features, name: str = "features", most: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of rows with the number of their first row, as large as memory should hold.

    Args:
        features: see `as_features`.
        name: of the argument, for errors.
        most: rows of a block.

    Raises:
        ValueError: NaN or Inf, with the number of the sample.
    """
    size = max(1, _ELEMENTS // features.shape[1])
    size = size if most is None else min(size, most)
    for start in range(0, len(features), size):
        block = features[start : start + size]
        finite = np.isfinite(block)
        if not finite.all():
            row = start + int(np.argmin(finite.all(axis=1)))
            raise ValueError(f"{name} must be finite, got NaN or Inf in sample {row}")
        yield start, block


def take(features: Features, rows: np.ndarray, name: str = "features") -> np.ndarray:
    """The rows of these numbers, in their order and in float64.

    Args:
        features: see `as_features`; read in blocks, of which only the rows are kept.
        rows: (n,) integers in 0 .. N - 1.
        name: of the argument, for errors.

    Raises:
        ValueError: NaN or Inf, with the number of the sample.
    """
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    taken = np.empty((len(rows), features.shape[1]))
    for start, block in blocks(features, name):
        a, b = np.searchsorted(ordered, [start, start + len(block)])
        taken[order[a:b]] = block[ordered[a:b] - start]
    return taken
