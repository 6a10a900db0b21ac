"""Distances between Gaussian fits to features, with their intervals; everything in float64 on NumPy arrays.

The distance of two Gaussians is theirs in the 2-Wasserstein metric, squared (Dowson & Landau 1982,
doi:10.1016/0047-259X(82)90077-X); on Inception-v3 features it is FID (Heusel et al. 2017, arXiv:1706.08500).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import scipy.linalg
from scipy.linalg import blas, lapack
from torch import Tensor

from bench.intervals import Distance, interval
from bench.mixture import GaussianMixture
from bench.moments import Features, Moments, MomentsAccumulator, as_features, blocks

__all__ = [
    "GAUSSIAN_KL",
    "Distance",
    "FrechetReference",
    "Moments",
    "MomentsAccumulator",
    "frechet_distance",
    "frechet_infinity",
    "frechet_interval",
    "gaussian_frechet",
    "gaussian_kl",
    "gaussian_kl_interval",
    "metric_name",
]

GAUSSIAN_KL = "gaussian_kl"  # the name of `gaussian_kl` as a metric
_FID_SAMPLES = 50_000  # from which on FID needs no count in its name
_FEW_FEATURES = 256  # up to which the standard error is made of all samples, since one costs d^2
_ENOUGH = 8192  # samples that it is made of where features are more
_PAIRED = 2048  # samples whose pairs say how a divergence spreads that is bias alone


@dataclass(frozen=True, eq=False)
class FrechetReference:
    """Moments to which many others are compared, with a root of their covariance computed once.

    Args:
        moments: of the reference; taken as they are, without a sampling error of their own.

    Attributes:
        root: (d, d) float64, lower triangular, with `root root^T` the covariance.

    Raises:
        ValueError: a covariance with a negative eigenvalue beyond rounding (1e-6 of the largest).
    """

    moments: Moments
    root: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", _root(self.moments.covariance))


def frechet_distance(a: Moments, b: Moments | FrechetReference) -> float:
    """`|mu_a - mu_b|^2 + tr A + tr B - 2 tr (R^T A R)^(1/2)` with `R R^T = B`, in squared units of the features.

    `R^T A R` has the eigenvalues of `A B`, whatever the root, and being symmetric it has real ones >= 0; what rounding makes
    negative counts as 0, and so does a distance. Nearly all of the time goes into its eigenvalues.

    Args:
        a: moments of d features.
        b: moments of the same features, or a reference that keeps its root for the next call.

    Raises:
        ValueError: the numbers of features differ, or B is not positive semi-definite.
    """
    reference = b if isinstance(b, FrechetReference) else FrechetReference(b)
    product = _product(a, reference)
    values = scipy.linalg.eigh(product, eigvals_only=True, driver="evd", overwrite_a=True, check_finite=False)
    return _distance(a, reference.moments, values)


def frechet_interval(
    features: Features,
    reference: Moments | FrechetReference,
    level: float = 0.95,
    *,
    moments: Moments | None = None,
) -> Distance:
    """The Frechet distance of N samples from a reference, with the confidence interval of the delta method.

    A sample x changes the distance by its influence `2 (mu_a - mu_b).(x - mu_a) + (x - mu_a)^T G (x - mu_a) - tr G A`
    over N, where `G = I - R (R^T A R)^(-1/2) R^T` is the gradient in the covariance A; the standard error is the standard
    deviation of the influence over sqrt(N). It is the first-order form of leaving samples out one by one, with one
    eigenproblem in all. Of more than 8192 samples of more than 256 features it looks at 8192 drawn at random: a standard
    deviation from n samples of kurtosis k is known to sqrt((k - 1) / (4 n)) of itself, 0.8 % for a normal influence.

    The interval is about the mean of such estimates, and it says nothing of
    - their bias, which is upward, of order d / N: compare distances at equal N only (`frechet_infinity` removes it);
    - the sampling error of the reference.
    Where the distance is not large beside the bias (samples from the reference itself) the influence vanishes and the
    interval is too narrow. Where N is not well above d the square root is not smooth, and where it is below d the covariance
    is singular and directions without extent are left out of G: the interval errs on the wide side there, up to twofold.

    Args:
        features: (N, d), N >= 2, finite; read twice in blocks of rows, so that memory is a block and some (d, d).
        reference: moments of the same features.
        level: probability that the interval covers the mean of the estimates, in (0, 1).
        moments: of these features, where they are known already, which saves one of the readings.

    Raises:
        ValueError: as for `Moments.of` and `frechet_distance`, a level outside (0, 1), or moments of another count.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    features = as_features(features)
    if moments is not None and (moments.count, moments.dim) != tuple(features.shape):
        raise ValueError(f"moments must be of the {tuple(features.shape)} features, got {(moments.count, moments.dim)}")
    reference = reference if isinstance(reference, FrechetReference) else FrechetReference(reference)
    return _interval(features, moments or Moments.of(features), reference, level)


def frechet_infinity(
    features: Features,
    reference: Moments | FrechetReference,
    halvings: int = 3,
    seed: int = 0,
    level: float = 0.95,
) -> Distance:
    """The Frechet distance that infinitely many samples would have: FD fitted by a line in 1 / n, at 1 / n = 0.

    From Chong & Forsyth 2020, arXiv:1911.07023, with another choice of subsets: at each size n = N, N / 2, N / 4, ... the
    samples are dealt into N / n subsets and their distances averaged. So every size uses all samples, their sampling error
    is the same at every size, and it does not tilt the line. Sizes are weighted by n, as what is left varies like 1 / (n N).

    The squared standard error is that of `frechet_interval` plus that of the line's end at 0 by its residuals. The sampling
    error of the reference is in neither.

    Args:
        features: (N, d), finite, N > d 2^halvings; read `2^halvings + 1` times in blocks of rows.
        reference: moments of the same features.
        halvings: of N, at least 2; `2^(halvings + 1) - 1` distances are computed.
        seed: of the deal.
        level: probability that the interval covers, in (0, 1).

    Returns:
        The end of the line, which may be below 0: it has no bias of order 1 / N.

    Raises:
        ValueError: as for `frechet_interval`, too few halvings, or too few samples for them.
    """
    if halvings < 2:
        raise ValueError(f"halvings must be at least 2, for a line through 3 sizes, got {halvings}")
    features = as_features(features)
    least = (features.shape[1] << halvings) + 1
    if len(features) < least:
        raise ValueError(f"features must hold at least {least} samples for {halvings} halvings, got {len(features)}")
    reference = reference if isinstance(reference, FrechetReference) else FrechetReference(reference)
    hand = np.random.Generator(np.random.Philox(seed)).permutation(len(features)) % (1 << halvings)
    found: list[list[tuple[float, float]]] = [[] for _ in range(halvings + 1)]

    def subset(depth: int, first: int) -> MomentsAccumulator:
        """The moments of a subset from those of its halves; its distance is noted on the way."""
        moments = MomentsAccumulator(features.shape[1])
        if depth == halvings:
            for start, block in blocks(features):
                moments.update(block[hand[start : start + len(block)] == first])
        else:
            moments.merge(subset(depth + 1, 2 * first))
            moments.merge(subset(depth + 1, 2 * first + 1))
        found[depth].append((1.0 / moments.count, frechet_distance(moments.result(), reference)))
        return moments

    whole = _interval(features, subset(0, 0).result(), reference, level)
    end, error = _at_zero(np.array([np.mean(pairs, axis=0) for pairs in found]))
    return interval(end, math.hypot(whole.standard_error, error), len(features), level)


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


def gaussian_kl(a: Moments, b: Moments) -> float:
    """The Kullback-Leibler divergence of the Gaussian of `a` from that of `b`, in nats; as a metric `GAUSSIAN_KL`.

    `KL(a || b) = (tr B^-1 A + v^T B^-1 v - d + log det B - log det A) / 2` with `v = mu_a - mu_b`. Two Cholesky factors
    and a triangular solve: cheaper than the Frechet distance, without random numbers, and free of the features' units.

    Args:
        a: moments of d features.
        b: moments of the same features.

    Raises:
        ValueError: the numbers of features differ, or a covariance is singular (fewer samples than features, say).
    """
    if a.dim != b.dim:
        raise ValueError(f"a must have {b.dim} features like b, got {a.dim}")
    ours, theirs = _cholesky("a", a), _cholesky("b", b)
    joined = np.column_stack([ours, a.mean - b.mean])
    ratio = scipy.linalg.solve_triangular(theirs, joined, lower=True, overwrite_b=True, check_finite=False)
    volume = 2.0 * float(np.log(np.diagonal(theirs) / np.diagonal(ours)).sum())
    return max(0.0, 0.5 * (float(np.vdot(ratio, ratio)) - a.dim + volume))


def gaussian_kl_interval(features: Features, reference: Moments, level: float = 0.95) -> Distance:
    """`gaussian_kl` of N samples from a reference, with the confidence interval of the delta method to second order.

    With `y = B^(-1/2) (x - mu_a)` and `w = B^(-1/2) v`, a sample changes the divergence by
    `y.w + (|y|^2 - (x - mu_a)^T A^-1 (x - mu_a)) / 2` (less its mean) over N, which gives the first-order variance S. Where
    samples are like the reference, what is left is a sum of squares, half `|mean y|^2` and a quarter of `|mean y y^T - I|^2`,
    of variance `T = 2 / N^2` times the mean square, over pairs of samples, of `y.y' / 2 + ((y.y')^2 - |y|^2 - |y'|^2 + d) / 4`
    (made of at most 2048 samples). S is estimated at the samples, which makes it T too large on average: the squared standard
    error is S - T, and at least T.

    The interval is about the mean of such estimates: their bias is upward, near `d (d + 3) / (4 N)`; the sampling error of the
    reference is not in it.

    Args:
        features: (N, d), N > d, finite.
        reference: moments of the same features.
        level: probability that the interval covers, in (0, 1).

    Raises:
        ValueError: as for `Moments.of` and `gaussian_kl`, or a level outside (0, 1).
    """
    features = as_features(features)
    moments = Moments.of(features)
    value = gaussian_kl(moments, reference)
    ours, theirs = _cholesky("features", moments), _cholesky("reference", reference)
    shift = scipy.linalg.solve_triangular(theirs, moments.mean - reference.mean, lower=True)
    influence, few = [], np.empty((0, moments.dim))
    for _, block in blocks(features):
        centred = (block - moments.mean).T
        y, z = (scipy.linalg.solve_triangular(factor, centred, lower=True) for factor in (theirs, ours))
        influence.append(shift @ y + 0.5 * (np.square(y).sum(0) - np.square(z).sum(0)))
        few = np.concatenate([few, y.T[: _PAIRED - len(few)]])
    first = float(np.concatenate(influence).std(ddof=1)) / math.sqrt(len(features))
    second = _second_order(few) / len(features)
    error = math.sqrt(max(first**2 - second**2, second**2))
    return interval(value, error, len(features), level, floor=0.0)


def _second_order(y: np.ndarray) -> float:
    """N times the standard deviation of the divergence of N samples that are like the reference; y (n, d) of mean 0."""
    inner, squares = y @ y.T, np.square(y).sum(1)
    kernel = 0.5 * inner + 0.25 * (np.square(inner) - squares[:, None] - squares + y.shape[1])
    np.fill_diagonal(kernel, 0.0)
    return math.sqrt(2.0 * float(np.square(kernel).sum()) / (len(y) * (len(y) - 1)))


def metric_name(extractor: str, count: int) -> str:
    """The name that a Frechet distance may have: FID is the standard Inception-v3's, with the count where that is not 50 000.

    Args:
        extractor: of the features; "inception" is the standard Inception-v3.
        count: of the samples.

    Returns:
        "fid" for 50 000 samples; "fid5k", "fid2500" for other numbers; "fd_<extractor>" for any other extractor.

    Raises:
        ValueError: no extractor, or a count below 1.
    """
    if not extractor:
        raise ValueError("extractor must be a name, got ''")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if extractor != "inception":
        return f"fd_{extractor}"
    if count == _FID_SAMPLES:
        return "fid"
    return f"fid{count // 1000}k" if count % 1000 == 0 else f"fid{count}"


def _root(covariance: np.ndarray) -> np.ndarray:
    """A lower triangle with `root root^T` the covariance: Cholesky's, or where that is singular the same from eigenvectors."""
    try:
        return np.asfortranarray(np.linalg.cholesky(covariance))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
    if values[0] < -1e-6 * abs(values[-1]):
        raise ValueError(f"covariance must be positive semi-definite, got an eigenvalue {values[0]:g}")
    (triangle,) = scipy.linalg.qr((vectors * np.sqrt(values.clip(min=0.0))).T, mode="r", check_finite=False)
    return np.asfortranarray(triangle.T)


def _cholesky(name: str, moments: Moments) -> np.ndarray:
    try:
        return np.linalg.cholesky(moments.covariance)
    except np.linalg.LinAlgError as error:
        raise ValueError(f"{name} must have a covariance of full rank, got a singular one") from error


def _product(a: Moments, reference: FrechetReference) -> np.ndarray:
    """`R^T A R` in the lower triangle, which is what the eigenvalue routines read; half the work of two products."""
    if a.dim != reference.moments.dim:
        raise ValueError(f"features must be {reference.moments.dim} like the reference's, got {a.dim}")
    product: np.ndarray
    product, _ = lapack.dsygst(a.covariance.T, reference.root, itype=2, lower=1)
    return product


def _distance(a: Moments, b: Moments, values: np.ndarray) -> float:
    """The distance, given the eigenvalues of `R^T A R`."""
    shift = a.mean - b.mean
    overlap = np.sqrt(values.clip(min=0.0)).sum()
    return max(0.0, float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * overlap))


def _interval(features: Features, moments: Moments, reference: FrechetReference, level: float) -> Distance:
    """The distance with its interval, given the moments of the features."""
    values, factor = _gradient_factor(moments, reference)
    value = _distance(moments, reference.moments, values)
    shift = moments.mean - reference.moments.mean
    influence = _influence(features, _looked_at(*features.shape), moments.mean, shift, factor)
    # its mean is 0 up to 1 / N, so that the constant tr G A need not be known
    error = float(np.std(influence, ddof=1)) / math.sqrt(moments.count)
    return interval(value, error, moments.count, level, floor=0.0)


def _gradient_factor(a: Moments, reference: FrechetReference) -> tuple[np.ndarray, np.ndarray]:
    """The eigenvalues of `R^T A R`, and F (d, m) with `I - F F^T` the gradient of the distance in A.

    From `d tr M^(1/2) = tr(M^(-1/2) dM) / 2`. Directions in which `R^T A R` vanishes are left out: samples of A have no
    extent there.
    """
    product = _product(a, reference)
    values, vectors = scipy.linalg.eigh(product, driver="evd", overwrite_a=True, check_finite=False)
    kept = values > a.dim * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return values, blas.dtrmm(1.0, reference.root, vectors[:, kept] * values[kept] ** -0.25, lower=1)


def _looked_at(count: int, dim: int) -> np.ndarray:
    """Which samples the standard error is made of, (N,) bool.

    They are drawn at random, since samples in order may have classes that repeat with the step between them.
    """
    looked_at = np.full(count, dim <= _FEW_FEATURES or count <= _ENOUGH)
    if not looked_at[0]:
        looked_at[np.random.Generator(np.random.Philox(0)).choice(count, _ENOUGH, replace=False, shuffle=False)] = True
    return looked_at


def _influence(
    features: Features, looked_at: np.ndarray, mean: np.ndarray, shift: np.ndarray, factor: np.ndarray
) -> np.ndarray:
    """The influence of each sample that is looked at up to a constant, (n,).

    `|F^T x|^2` is a sum of squares, so that its error is relative to itself and single precision bears it, which halves the
    cost; features that came in single precision have no more to lose.
    """
    if features.dtype.kind == "f" and features.dtype.itemsize <= 4:
        factor = factor.astype(np.float32)
    found = []
    for start, block in blocks(features):
        x = block[looked_at[start : start + len(block)]] - mean
        y = x.astype(factor.dtype, copy=False) @ factor
        squares = np.einsum("nd,nd->n", x, x) - np.einsum("nm,nm->n", y, y, dtype=np.float64)
        found.append(2.0 * (x @ shift) + squares)
    return np.concatenate(found)


def _at_zero(points: np.ndarray) -> tuple[float, float]:
    """Where a line through (x, y) with weights 1 / x meets x = 0, with its standard error from the residuals."""
    x, y = points.T
    design = np.column_stack([np.ones_like(x), x]) / np.sqrt(x)[:, None]
    target = y / np.sqrt(x)
    line = np.linalg.solve(design.T @ design, design.T @ target)
    variance = float(np.sum((target - design @ line) ** 2)) / (len(x) - 2)
    return float(line[0]), math.sqrt(variance * float(np.linalg.inv(design.T @ design)[0, 0]))
