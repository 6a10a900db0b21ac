"""Figures of samples that need more than moments of their features: KID, Inception score, manifolds, sliced Wasserstein.

All of them read features in blocks of rows; what is random comes from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from bench.intervals import Distance, interval, mean_interval, share_interval
from bench.moments import Features, as_features, blocks, take

_KID_SIZE = 1000  # of a subset, as in the paper's experiments
_KID_SUBSETS = 100
_GATHERED = 1 << 23  # numbers of subsets that are gathered in one pass over the features: 64 MiB
_BLOCKS = 20  # of samples, of which each is left out in turn
_TILE = 2048  # rows and columns of a block of squared distances: 32 MiB


def kid(
    features: Features,
    reference: Features,
    size: int | None = None,
    subsets: int | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> Distance:
    """Kernel Inception distance: the squared MMD of the kernel `(x.y / d + 1)^3`, without bias, averaged over subsets.

    Binkowski et al. 2018, arXiv:1801.01401, with subsets that share no samples (as in the B-test of Zaremba et al. 2013,
    arXiv:1307.1954), so that their spread is an honest standard error, which includes the reference's sampling error.
    Without bias, values compare at any numbers of samples and any sizes.

    Args:
        features: (N, d), finite.
        reference: (M, d), finite, features of the reference samples.
        size: rows of a subset, at least 2; None: a tenth of the smaller set, at most 1000.
        subsets: at least 2 and at most `min(N, M) // size`; None: as many as there can be, at most 100.
        seed: of the draw of the subsets.
        level: probability that the interval covers, in (0, 1).

    Returns:
        The mean, below 0 where chance makes it so; the interval has `subsets - 1` degrees of freedom.

    Raises:
        ValueError: shapes that do not fit, NaN or Inf, a size or a number of subsets outside its range.
    """
    features, reference = _pair(features, reference)
    fewer = min(len(features), len(reference))
    size = max(2, min(_KID_SIZE, fewer // 10)) if size is None else size
    most = fewer // size if size >= 2 else 0
    if most < 2:
        raise ValueError(
            f"size must lie in 2 .. {fewer // 2}, half of the {fewer} samples of the smaller set, got {size}"
        )
    subsets = min(_KID_SUBSETS, most) if subsets is None else subsets
    if not 2 <= subsets <= most:
        raise ValueError(f"subsets must lie in 2 .. {most}, as they share no samples, got {subsets}")
    rng = np.random.Generator(np.random.Philox(seed))
    drawn = [rng.permutation(len(rows))[: subsets * size].reshape(subsets, size) for rows in (features, reference)]
    pairs = zip(_gathered(features, drawn[0], "features"), _gathered(reference, drawn[1], "reference"), strict=True)
    values = [polynomial_mmd(x, y) for x, y in pairs]
    error = float(np.std(values, ddof=1)) / math.sqrt(subsets)
    return interval(float(np.mean(values)), error, len(features), level, degrees=subsets - 1)


def polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The squared MMD of two samples for the kernel `(x.y / d + 1)^3`, without bias (Gretton et al. 2012, eq. 3).

    Args:
        x: (n, d) float64, n >= 2.
        y: (m, d) float64, m >= 2.
    """
    n, m, dim = len(x), len(y), x.shape[1]

    def others(rows: np.ndarray) -> float:
        kernel = (rows @ rows.T / dim + 1.0) ** 3
        return float(kernel.sum() - np.trace(kernel))

    across = float(((x @ y.T / dim + 1.0) ** 3).mean())
    return others(x) / (n * (n - 1)) + others(y) / (m * (m - 1)) - 2.0 * across


def inception_score(probabilities: Features, splits: int = 10, seed: int = 0, level: float = 0.95) -> Distance:
    """`exp(mean KL(p(y|x) || p(y)))`, averaged over parts of the samples; 1 .. the number of classes, higher is better.

    Salimans et al. 2016, arXiv:1606.03498; samples are dealt into the parts at random, as their order may have a meaning.

    Args:
        probabilities: (N, classes), of the classes of each sample; rows sum to 1.
        splits: parts, at least 2, each of at least 2 samples.
        seed: of the deal.
        level: probability that the interval covers the mean over parts, in (0, 1); `splits - 1` degrees of freedom.

    Raises:
        ValueError: another shape, negative numbers, rows that do not sum to 1 (within 1e-3), too many or too few parts.
    """
    probabilities = as_features(probabilities, "probabilities")
    count, classes = probabilities.shape
    if not 2 <= splits <= count // 2:
        raise ValueError(f"splits must lie in 2 .. {count // 2}, half of the samples, got {splits}")
    part = np.random.Generator(np.random.Philox(seed)).permutation(count) % splits
    totals, negentropy = np.zeros((splits, classes)), np.zeros(splits)
    for start, block in blocks(probabilities, "probabilities"):
        p = block.astype(np.float64)
        wrong = (p < 0).any(axis=1) | (np.abs(p.sum(axis=1) - 1.0) > 1e-3)
        if wrong.any():
            row = start + int(np.argmax(wrong))
            raise ValueError(f"probabilities must be >= 0 and sum to 1, got others in sample {row}")
        mine = part[start : start + len(p)]
        np.add.at(negentropy, mine, _negentropy(p))
        for s in range(splits):
            totals[s] += p[mine == s].sum(axis=0)
    sizes = np.bincount(part, minlength=splits)
    scores = np.exp(negentropy / sizes - _negentropy(totals / sizes[:, None]))
    error = float(scores.std(ddof=1)) / math.sqrt(splits)
    return interval(float(scores.mean()), error, count, level, floor=1.0, ceiling=float(classes), degrees=splits - 1)


def manifold_metrics(
    features: Features,
    reference: Features,
    neighbours: int = 3,
    coverage_neighbours: int = 5,
    level: float = 0.95,
) -> dict[str, Distance]:
    """Precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991), density and coverage (Naeem et al. 2020, 2002.09797).

    A set's manifold is the union of balls about its members, each as large as the distance to the member's k-th neighbour.

    - precision: the part of the samples inside the reference's manifold; recall: of the reference inside the samples'.
    - density: in how many balls of the reference a sample lies on average, over k (may exceed 1).
    - coverage: the part of the reference's balls that hold a sample.

    Standard errors of precision and density are those of means over samples, with the reference as it is. Recall and coverage
    are means over the reference that depend on all samples at once: their squared standard errors are those of the mean over the
    reference plus the jackknife's over 20 blocks of samples (see `bench.intervals.jackknife`), which errs on the wide side where
    a figure is not smooth in the samples: measured on digits, up to 1.7 times. Precision, recall and coverage are shares, and so
    are the ends of their intervals (see `bench.intervals.share_interval`). Precision and recall depend on the numbers of samples:
    compare at equal ones. A density of 0 has neither an error nor an upper end, as no sample shows in how many balls one lies.
    The cost is `N M + N^2 + M^2` distances; memory is some blocks of them.

    Args:
        features: (N, d), finite.
        reference: (M, d), finite, features of the reference samples.
        neighbours: k of precision and recall, below N and M.
        coverage_neighbours: k of density and coverage, below M.
        level: probability that an interval covers, in (0, 1).

    Returns:
        {"precision", "recall", "density", "coverage"}.

    Raises:
        ValueError: shapes that do not fit, NaN or Inf, a k outside its range.
    """
    features, reference = _pair(features, reference)
    for name, k, most in (
        ("neighbours", neighbours, min(len(features), len(reference)) - 1),
        ("coverage_neighbours", coverage_neighbours, len(reference) - 1),
    ):
        if not 1 <= k <= most:
            raise ValueError(f"{name} must lie in 1 .. {most}, the other samples of a set, got {k}")
    centre = reference[: min(len(reference), _TILE)].mean(axis=0, dtype=np.float64)
    theirs, theirs_wide = _radii(reference, centre, (neighbours, coverage_neighbours)).T
    block = np.arange(len(features)) * min(_BLOCKS, len(features)) // len(features)
    ours = _radii_without(features, centre, neighbours, block)
    precise, inside = np.zeros(len(features), dtype=bool), np.zeros(len(features))
    recalled, covered = (np.zeros((len(reference), block[-1] + 2), dtype=bool) for _ in range(2))
    for rows, columns, squares in _squares(features, reference, centre):
        precise[rows] |= (squares <= theirs[columns]).any(axis=1)
        wide = squares <= theirs_wide[columns]
        inside[rows] += wide.sum(axis=1)
        covered[columns] |= _by_any_but(block[rows], wide, block[-1] + 1)
        recalled[columns] |= _recalled(block[rows], squares, ours[rows])
    return {
        "precision": _share(precise[:, None], level),
        "recall": _share(recalled, level),
        "density": _density(inside / coverage_neighbours, level),
        "coverage": _share(covered, level),
    }


def _by_any_but(block: np.ndarray, inside: np.ndarray, count: int) -> np.ndarray:
    """For each column whether any row has it inside, and whether any row that is not of block b has, (M, 1 + count)."""
    firsts = np.flatnonzero(np.diff(block, prepend=-1))  # rows come block by block
    by_block = np.zeros((count, inside.shape[1]), dtype=np.int64)
    by_block[block[firsts]] = np.logical_or.reduceat(inside, firsts, axis=0)
    total = by_block.sum(axis=0)
    return np.vstack([total > 0, total - by_block > 0]).T


def _recalled(block: np.ndarray, squares: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """As `_by_any_but`, for the balls of rows; their radii (N, 1 + count) grow where neighbours of block b are left out."""
    found = _by_any_but(block, squares <= radii[:, :1], radii.shape[1] - 1)
    for b in range(radii.shape[1] - 1):
        grown = (radii[:, 1 + b] > radii[:, 0]) & (block != b)
        found[:, 1 + b] |= (squares[grown] <= radii[grown, 1 + b, None]).any(axis=0)
    return found


def _radii_without(features: Features, centre: np.ndarray, neighbours: int, block: np.ndarray) -> np.ndarray:
    """The squared distance of each row to its k-th other row, of all and without those of block b, (N, 1 + blocks)."""
    count = int(block[-1]) + 1
    nearest = np.full((len(features), count, neighbours), np.inf)  # of each block

    def consider(rows: slice, columns: slice, squares: np.ndarray) -> None:
        for b in np.unique(block[columns]):
            candidates = np.concatenate([nearest[rows, b], squares[:, block[columns] == b]], axis=1)
            nearest[rows, b] = np.partition(candidates, neighbours - 1, axis=1)[:, :neighbours]

    for rows, columns, squares in _squares(features, features, centre, upper=True):
        if rows == columns:
            np.fill_diagonal(squares, np.inf)
        else:
            consider(columns, rows, squares.T)
        consider(rows, columns, squares)
    radii = np.empty((len(features), 1 + count))
    for b in range(-1, count):
        others = nearest[:, np.arange(count) != b].reshape(len(features), -1)
        radii[:, 1 + b] = np.partition(others, neighbours - 1, axis=1)[:, neighbours - 1]
    return radii


def _share(inside: np.ndarray, level: float) -> Distance:
    """The share of rows that are inside, (M, 1 + B): of all samples, and without each of B blocks of them, which may be none."""
    whole, left_out = mean_interval(inside[:, 0], level), inside.shape[1] - 1
    spread = (left_out - 1) * float(np.var(inside[:, 1:].mean(axis=0))) if left_out else 0.0
    return share_interval(whole.value, math.sqrt(whole.standard_error**2 + spread), whole.count, level)


def _density(inside: np.ndarray, level: float) -> Distance:
    """The mean of the balls about each sample over k, (N,)."""
    if not inside.any():
        return Distance(0.0, 0.0, math.nan, math.nan, len(inside))
    return mean_interval(inside, level, floor=0.0)


def sliced_wasserstein(
    features: Features,
    reference: Features,
    projections: int = 128,
    seed: int = 0,
    level: float = 0.95,
) -> Distance:
    """The sliced 2-Wasserstein distance: the root mean square, over random directions, of that of the projected samples.

    Bonneel et al. 2015, doi:10.1007/s10851-014-0506-3; in one dimension the optimal transport joins equal quantiles, which
    is exact for equal and for different numbers of samples. In units of the features.

    The squared standard error is that of the samples plus that of the mean over directions. A sample changes the square of
    the distance by its Kantorovich potential, averaged over directions, over N (del Barrio & Loubes 2019,
    doi:10.1214/18-AOP1275). The interval is about the mean of such estimates: their bias is upward, so compare at equal
    numbers of samples; the sampling error of the reference is not in it. Where the distance is bias alone, it is too narrow.

    Args:
        features: (N, d), N >= 2, finite.
        reference: (M, d), M >= 2, finite, features of the reference samples.
        projections: P, directions, at least 2; memory is `(N + M) P` numbers.
        seed: of the directions, which are the same for all features that are compared at one seed.
        level: probability that the interval covers, in (0, 1).

    Raises:
        ValueError: shapes that do not fit, NaN or Inf, too few directions.
    """
    features, reference = _pair(features, reference)
    if projections < 2:
        raise ValueError(f"projections must be at least 2, got {projections}")
    directions = np.random.Generator(np.random.Philox(seed)).standard_normal((features.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    lines = zip(
        _projected(features, directions, "features"), _projected(reference, directions, "reference"), strict=True
    )
    squares, influence = np.empty(projections), np.zeros(len(features))
    for p, (ours, theirs) in enumerate(lines):
        order = np.argsort(ours)
        x, y = ours[order], np.sort(theirs)
        squares[p] = wasserstein_square(x, y)
        influence[order] += _potential(x, y) / projections
    value = math.sqrt(squares.mean())
    sampled = float(influence.std(ddof=1)) / math.sqrt(len(features))
    error = math.hypot(sampled, float(squares.std(ddof=1)) / math.sqrt(projections))
    return interval(value, 0.5 * error / value if value else 0.0, len(features), level, floor=0.0)


def wasserstein_square(x: np.ndarray, y: np.ndarray) -> float:
    """The squared 2-Wasserstein distance of samples on a line.

    Args:
        x: (n,), in rising order.
        y: (m,), in rising order.
    """
    n, m = len(x), len(y)
    if n == m:
        return float(np.square(x - y).mean())
    # both quantile functions are constant between levels k / (n m), k a multiple of m or of n
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    weights = np.diff(ends, prepend=0) / (n * m)
    return float(np.square(x[(ends - 1) // m] - y[(ends - 1) // n]) @ weights)


def _pair(features: Features, reference: Features) -> tuple[Features, Features]:
    features, reference = as_features(features), as_features(reference, "reference")
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"features must be {reference.shape[1]} like the reference's, got {features.shape[1]}")
    return features, reference


def _gathered(features: Features, drawn: np.ndarray, name: str) -> Iterator[np.ndarray]:
    """The subsets (size, d) with these rows (subsets, size); one pass over the features gathers several."""
    together = max(1, _GATHERED // (drawn.shape[1] * features.shape[1]))
    for first in range(0, len(drawn), together):
        rows = drawn[first : first + together]
        yield from take(features, rows.ravel(), name).reshape(*rows.shape, -1)


def _negentropy(p: np.ndarray) -> np.ndarray:
    """`sum p log p` of each row, with `0 log 0 = 0`."""
    return np.asarray((p * np.log(np.where(p > 0, p, 1.0))).sum(axis=1))


def _squares(
    a: Features, b: Features, centre: np.ndarray, *, upper: bool = False
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Squared distances of blocks of rows of `a` from blocks of `b`, both less `centre`, so that squares are not large.

    Of one set from itself, those on and above the diagonal (`upper`) are all that there are.
    """
    for i, rows in blocks(a, "features", _TILE):
        x = rows - centre
        for j, columns in blocks(b, "reference", _TILE):
            if upper and j < i:
                continue
            y = columns - centre
            squares = x @ y.T
            squares *= -2.0
            squares += np.einsum("nd,nd->n", x, x)[:, None]
            squares += np.einsum("nd,nd->n", y, y)
            yield slice(i, i + len(x)), slice(j, j + len(y)), squares.clip(min=0.0, out=squares)


def _radii(features: Features, centre: np.ndarray, neighbours: tuple[int, ...]) -> np.ndarray:
    """The squared distance of each row to its k-th other row, (N, number of k)."""
    most = max(neighbours)
    nearest = np.full((len(features), most), np.inf)

    def consider(rows: slice, squares: np.ndarray) -> None:
        candidates = np.concatenate([nearest[rows], squares], axis=1)
        nearest[rows] = np.partition(candidates, most - 1, axis=1)[:, :most]

    for rows, columns, squares in _squares(features, features, centre, upper=True):
        if rows == columns:
            np.fill_diagonal(squares, np.inf)
        else:
            consider(columns, squares.T)
        consider(rows, squares)
    return np.sort(nearest, axis=1)[:, np.array(neighbours) - 1]


def _projected(features: Features, directions: np.ndarray, name: str) -> np.ndarray:
    """The rows on each direction, (P, N)."""
    return np.concatenate([directions.T @ block.astype(np.float64).T for _, block in blocks(features, name)], axis=1)


def _potential(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The Kantorovich potential of `wasserstein_square` at each x up to a constant, (n,).

    Where the mass of x_i ends and that of x_(i+1) begins, at the quantile (i + 1) / n, both go to the same y, so that the
    potential rises by the difference of the two costs; where a y ends there too, half-way between it and the next.
    """
    n, m = len(x), len(y)
    level = np.arange(1, n) * m
    there = 0.5 * (y[(level - 1) // n] + y[level // n])
    rise = np.diff(x) * (x[1:] + x[:-1] - 2.0 * there)
    return np.concatenate([[0.0], np.cumsum(rise)])
