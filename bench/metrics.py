"""Frechet distances between Gaussian fits, with their intervals; everything in float64 on NumPy arrays.

The distance of two Gaussians is theirs in the 2-Wasserstein metric, squared (Dowson & Landau 1982,
doi:10.1016/0047-259X(82)90077-X); on Inception-v3 features it is FID (Heusel et al. 2017, arXiv:1706.08500).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from torch import Tensor

from bench.mixture import GaussianMixture

_BLOCK = 4096  # rows that are held in float64 at a time


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
    def of(cls, features: np.ndarray) -> Moments:
        """The moments of N samples.

        Args:
            features: (N, d), N >= 2, finite.

        Raises:
            ValueError: another shape, fewer than two samples, NaN or Inf.
        """
        features = _checked(features)
        count, dim = features.shape
        mean = np.asarray(features.mean(axis=0, dtype=np.float64))
        scatter = np.zeros((dim, dim))
        for centred in _centred(features, mean):
            scatter += centred.T @ centred
        return cls(mean, scatter / (count - 1), count)

    @classmethod
    def of_mixture(cls, mixture: GaussianMixture) -> Moments:
        """The exact moments of a mixture's data, flattened to (D,); count 0."""
        return cls(mixture.mean().numpy(), mixture.covariance().numpy(), 0)

    @property
    def dim(self) -> int:
        """d, the number of features."""
        return len(self.mean)


@dataclass(frozen=True, eq=False)
class FrechetReference:
    """Moments to which many others are compared, with the square root of their covariance computed once.

    Args:
        moments: of the reference; taken as they are, without a sampling error of their own.

    Raises:
        ValueError: a covariance with a negative eigenvalue beyond rounding (1e-6 of the largest).
    """

    moments: Moments
    root: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        values, vectors = np.linalg.eigh(self.moments.covariance)
        if values[0] < -1e-6 * abs(values[-1]):
            raise ValueError(f"covariance must be positive semi-definite, got an eigenvalue {values[0]:g}")
        object.__setattr__(self, "root", (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T)


@dataclass(frozen=True)
class Distance:
    """A measured distance and its confidence interval.

    Attributes:
        value: the distance, >= 0.
        low, high: the ends of the interval; low is never below 0.
        standard_error: of `value`.
        count: N, the samples behind it.
    """

    value: float
    low: float
    high: float
    standard_error: float
    count: int


def frechet_distance(a: Moments, b: Moments | FrechetReference) -> float:
    """`|mu_a - mu_b|^2 + tr A + tr B - 2 tr (R A R)^(1/2)` with `R = B^(1/2)`, in squared units of the features.

    The symmetric form has real eigenvalues >= 0; what rounding makes negative counts as 0, and so does a distance.

    Args:
        a: moments of d features.
        b: moments of the same features, or a reference that keeps its root for the next call.

    Raises:
        ValueError: the numbers of features differ, or B is not positive semi-definite.
    """
    reference = b if isinstance(b, FrechetReference) else FrechetReference(b)
    values = np.linalg.eigvalsh(_product(a, reference))
    return _distance(a, reference.moments, values)


def frechet_interval(features: np.ndarray, reference: Moments | FrechetReference, level: float = 0.95) -> Distance:
    """The Frechet distance of N samples from a reference, with the confidence interval of the delta method.

    A sample x changes the distance by its influence `2 (mu_a - mu_b).(x - mu_a) + (x - mu_a)^T G (x - mu_a) - tr G A`
    over N, where `G = I - R (R A R)^(-1/2) R` is the gradient in the covariance A; the standard error is the standard
    deviation of the influence over sqrt(N). The interval is about the mean of such estimates, and it says nothing of
    - their bias, which is upward, of order d / N: compare distances at equal N only;
    - the sampling error of the reference.
    Where the distance is not large beside the bias (samples from the reference itself) the influence vanishes and the
    interval is too narrow; where N is not well above d the covariance is singular and it is a rough guide.

    Args:
        features: (N, d), N >= 2, finite.
        reference: moments of the same features.
        level: probability that the interval covers the mean of the estimates, in (0, 1).

    Raises:
        ValueError: as for `Moments.of` and `frechet_distance`, or a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    features = _checked(features)
    reference = reference if isinstance(reference, FrechetReference) else FrechetReference(reference)
    moments = Moments.of(features)
    values, factor = _gradient_factor(moments, reference)
    value = _distance(moments, reference.moments, values)
    influence = _influence(features, moments.mean, moments.mean - reference.moments.mean, factor)
    # its mean is 0 up to 1 / N, so that the constant tr G A need not be known
    error = float(np.std(influence, ddof=1)) / math.sqrt(moments.count)
    reach = NormalDist().inv_cdf(0.5 + 0.5 * level) * error
    return Distance(value, max(0.0, value - reach), value + reach, error, moments.count)


def gaussian_frechet(mixture: GaussianMixture, samples: Tensor | np.ndarray) -> float:
    """The Frechet distance of samples from the exact moments of a mixture: no network and no reference set.

    Args:
        mixture: of shape `shape`.
        samples: (N, *shape), N >= 2, finite.

    Raises:
        ValueError: another shape, fewer than two samples, NaN or Inf.
    """
    array = samples.detach().cpu().double().numpy() if isinstance(samples, Tensor) else np.asarray(samples)
    if array.ndim == 0 or array.shape[1:] != mixture.shape:
        raise ValueError(f"samples must be ({', '.join(map(str, ('N', *mixture.shape)))}), got {array.shape}")
    return frechet_distance(Moments.of(array.reshape(len(array), -1)), Moments.of_mixture(mixture))


def _checked(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] == 0 or features.dtype.kind not in "fiu":
        raise ValueError(f"features must be (N, d) real numbers, d >= 1, got {features.shape} {features.dtype}")
    if len(features) < 2:
        raise ValueError(f"features must hold at least 2 samples, got {len(features)}")
    bad = [i for i in range(0, len(features), _BLOCK) if not np.isfinite(features[i : i + _BLOCK]).all()]
    if bad:
        row = bad[0] + int(np.flatnonzero(~np.isfinite(features[bad[0] : bad[0] + _BLOCK]).all(axis=1))[0])
        raise ValueError(f"features must be finite, got NaN or Inf in sample {row}")
    return features


def _centred(features: np.ndarray, mean: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks of rows in float64 with the mean taken off, so that a large set is never copied whole."""
    for i in range(0, len(features), _BLOCK):
        yield features[i : i + _BLOCK].astype(np.float64) - mean


def _product(a: Moments, reference: FrechetReference) -> np.ndarray:
    """`R A R`, made symmetric to the last bit."""
    if a.dim != reference.moments.dim:
        raise ValueError(f"features must be {reference.moments.dim} like the reference's, got {a.dim}")
    product = reference.root @ a.covariance @ reference.root
    return 0.5 * (product + product.T)


def _distance(a: Moments, b: Moments, values: np.ndarray) -> float:
    """The distance, given the eigenvalues of `R A R`."""
    shift = a.mean - b.mean
    overlap = np.sqrt(values.clip(min=0.0)).sum()
    return max(0.0, float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * overlap))


def _gradient_factor(a: Moments, reference: FrechetReference) -> tuple[np.ndarray, np.ndarray]:
    """The eigenvalues of `R A R`, and F (d, m) with `I - F F^T` the gradient of the distance in A.

    From `d tr M^(1/2) = tr(M^(-1/2) dM) / 2`. Directions in which `R A R` vanishes are left out: samples of A have no
    extent there.
    """
    values, vectors = np.linalg.eigh(_product(a, reference))
    kept = values > a.dim * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return values, (reference.root @ vectors[:, kept]) * values[kept] ** -0.25


def _influence(features: np.ndarray, mean: np.ndarray, shift: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """The influence of each sample up to a constant, (N,)."""
    blocks = []
    for x in _centred(features, mean):
        y = x @ factor
        blocks.append(2.0 * (x @ shift) + np.einsum("nd,nd->n", x, x) - np.einsum("nm,nm->n", y, y))
    return np.concatenate(blocks)
