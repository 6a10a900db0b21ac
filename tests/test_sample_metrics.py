"""KID, Inception score, manifolds and sliced Wasserstein against double loops, closed forms and repeated draws."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from scipy.spatial.distance import cdist

from bench.sample_metrics import (
    _potential,
    inception_score,
    kid,
    manifold_metrics,
    polynomial_mmd,
    sliced_wasserstein,
    wasserstein_square,
)


def normal(count: int, dim: int, seed: int, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dim)) + mean


def loop_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The mean over pairs of different rows, pair by pair."""

    def kernel(a, b):
        return (float(a @ b) / len(a) + 1.0) ** 3

    within = [np.mean([kernel(a, b) for a, b in itertools.permutations(rows, 2)]) for rows in (x, y)]
    return sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_mmd_is_the_double_loop():
    x, y = normal(12, 5, 0), normal(9, 5, 1, 0.5)
    assert polynomial_mmd(x, y) == pytest.approx(loop_mmd(x, y), rel=1e-12)


@pytest.mark.parametrize("elements", [1 << 22, 5 * 7])
def test_kid_is_the_mean_over_subsets_that_share_no_samples(elements, monkeypatch):
    """Rows are numbered in their first feature, so that the subsets can be seen; then the loop over what was seen."""
    monkeypatch.setattr("bench.moments._ELEMENTS", elements)
    monkeypatch.setattr("bench.sample_metrics._GATHERED", elements)
    x, y, seen = normal(40, 5, 0), normal(33, 5, 1, 0.5), []

    def noted(a, b):
        seen.append((a, b))
        return polynomial_mmd(a, b)

    monkeypatch.setattr("bench.sample_metrics.polynomial_mmd", noted)
    found = kid(x, y, size=8)
    assert len(seen) == 4
    for k, rows in ((0, x), (1, y)):
        firsts = np.concatenate([pair[k][:, 0] for pair in seen])
        assert len(set(firsts)) == 32
        assert set(firsts) <= set(rows[:, 0])
    values = [loop_mmd(a, b) for a, b in seen]
    assert found.value == pytest.approx(np.mean(values), rel=1e-10)
    assert found.standard_error == pytest.approx(scipy.stats.sem(values), rel=1e-10)
    assert found.high - found.value == pytest.approx(scipy.stats.t.ppf(0.975, 3) * found.standard_error, rel=1e-10)
    assert found.count == 40


def test_kid_has_no_bias_and_its_interval_covers():
    """For standard normal rows against rows of mean m: E k = 1 + 3 v + ... is known from the moments of x.y / d.

    With z = x.y / d for independent x, y of means a, b: z has mean a.b / d, and the third moment of 1 + z follows.
    """
    dim, mean = 4, 0.5

    def expected_kernel(a: float, b: float) -> float:
        # x.y / d, a sum of d independent products p = x_i y_i
        m1 = a * b
        m2 = (1 + a * a) * (1 + b * b)
        m3 = (a**3 + 3 * a) * (b**3 + 3 * b)
        variance, skew = m2 - m1**2, m3 - 3 * m1 * m2 + 2 * m1**3  # central moments of p
        c2, c3 = variance / dim, skew / dim**2
        return (1 + m1) ** 3 + 3 * (1 + m1) * c2 + c3

    exact = expected_kernel(0, 0) + expected_kernel(mean, mean) - 2 * expected_kernel(0, mean)
    found = [kid(normal(200, dim, 2 * s), normal(200, dim, 2 * s + 1, mean), size=20) for s in range(300)]
    values = np.array([d.value for d in found])
    assert values.mean() == pytest.approx(exact, abs=4 * values.std() / math.sqrt(300))
    assert np.mean([d.low <= exact <= d.high for d in found]) == pytest.approx(0.95, abs=0.04)
    same = np.array([kid(normal(200, dim, 2 * s), normal(200, dim, 2 * s + 1), size=20).value for s in range(100)])
    assert abs(same.mean()) < 4 * same.std() / 10
    assert same.min() < 0 < same.max()


def test_inception_score_is_its_definition(monkeypatch):
    """One part at a time, from the rows that the seed deals into it."""
    monkeypatch.setattr("bench.moments._ELEMENTS", 6 * 7)
    p = np.random.default_rng(0).dirichlet(np.full(6, 0.3), 40)
    found = inception_score(p, splits=4, seed=3)
    part = np.random.Generator(np.random.Philox(3)).permutation(40) % 4
    scores = []
    for s in range(4):
        mine = p[part == s]
        scores.append(math.exp(np.mean([scipy.stats.entropy(row, mine.mean(0)) for row in mine])))
    assert found.value == pytest.approx(np.mean(scores), rel=1e-12)
    assert found.standard_error == pytest.approx(scipy.stats.sem(scores), rel=1e-10)


def test_inception_score_of_certain_and_of_uncertain_classes():
    """Sorted by class, which parts in the order of rows would not survive."""
    certain = np.repeat(np.eye(10), 100, axis=0)
    found = inception_score(certain, splits=2)
    assert 9.7 < found.value <= found.high <= 10.0
    flat = inception_score(np.full((100, 10), 0.1, dtype=np.float32))
    assert flat.value == pytest.approx(1.0, abs=1e-6)
    assert flat.low >= 1.0 - 1e-6


def loop_manifolds(x: np.ndarray, y: np.ndarray, k: int, wide: int) -> dict[str, np.ndarray]:
    def distance(a, b):
        return math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)))

    def radius(rows, i, k):
        return sorted(distance(rows[i], rows[j]) for j in range(len(rows)) if j != i)[k - 1]

    ours = [radius(x, i, k) for i in range(len(x))]
    theirs = [radius(y, j, k) for j in range(len(y))]
    theirs_wide = [radius(y, j, wide) for j in range(len(y))]
    apart = [[distance(a, b) for b in y] for a in x]
    some_x, some_y = range(len(x)), range(len(y))
    return {
        "precision": np.array([any(apart[i][j] <= theirs[j] for j in some_y) for i in some_x]),
        "recall": np.array([any(apart[i][j] <= ours[i] for i in some_x) for j in some_y]),
        "density": np.array([sum(apart[i][j] <= theirs_wide[j] for j in some_y) / wide for i in some_x]),
        "coverage": np.array([any(apart[i][j] <= theirs_wide[j] for i in some_x) for j in some_y]),
    }


def over_reference(x: np.ndarray, y: np.ndarray, k: int, wide: int) -> dict[str, float]:
    ours, theirs, apart = (np.sort(cdist(x, x), 1)[:, k], np.sort(cdist(y, y), 1)[:, wide], cdist(x, y))
    return {"recall": (apart <= ours[:, None]).any(0).mean(), "coverage": (apart <= theirs).any(0).mean()}


@pytest.mark.parametrize("tile", [2048, 7])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_manifolds_are_the_double_loop(tile, offset, monkeypatch):
    """Also in blocks that do not divide the numbers of rows, and with a mean that is large beside the distances."""
    monkeypatch.setattr("bench.sample_metrics._TILE", tile)
    x, y = 0.7 * normal(40, 3, 0, 0.6) + offset, normal(31, 3, 1) + offset
    found, expected = manifold_metrics(x, y, 3, 5), loop_manifolds(x, y, 3, 5)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert 0.1 < found[name].value < 1.5
        assert found[name].value == pytest.approx(values.mean(), abs=1e-12), name
        error = scipy.stats.sem(values.astype(float))
        if name in ("recall", "coverage"):
            left_out = [over_reference(np.delete(x, [2 * b, 2 * b + 1], axis=0), y, 3, 5)[name] for b in range(20)]
            error = math.sqrt(error**2 + 19 * np.var(left_out))
        elif name == "precision" and values.all():  # that of nearly two trials more of each outcome
            more = len(values) + scipy.stats.norm.ppf(0.975) ** 2
            miss = 0.5 * (1 - len(values) / more)
            error = math.sqrt(miss * (1 - miss) / more)
        assert found[name].standard_error == pytest.approx(error, rel=1e-10), name
        assert found[name].count == len(values)


def test_recall_and_coverage_say_how_far_other_samples_would_be() -> None:
    """The error of the mean over the reference alone is too small; with that of the samples it errs on the wide side."""
    y = normal(600, 8, 99)
    found = [manifold_metrics(1.1 * normal(80, 8, seed), y) for seed in range(40)]
    for name in ("recall", "coverage"):
        spread = np.std([one[name].value for one in found], ddof=1)
        stated = np.sqrt(np.mean([one[name].standard_error ** 2 for one in found]))
        alone = np.sqrt(np.mean([one[name].value * (1 - one[name].value) / 600 for one in found]))
        assert 0.9 * spread < stated < 2.2 * spread, (name, spread, stated)
        assert alone < 0.9 * spread, name


def test_manifolds_of_the_reference_itself_and_of_samples_far_away():
    y = normal(50, 4, 0)
    same = manifold_metrics(y, y)
    assert [same[name].value for name in ("precision", "recall", "coverage")] == [1.0, 1.0, 1.0]
    far = manifold_metrics(y + 100.0, y)
    assert [d.value for d in far.values()] == [0.0] * 4
    for name in ("precision", "recall", "coverage"):
        assert (same[name].high, far[name].low) == (1.0, 0.0), name
        assert same[name].low < 0.95, name
        assert far[name].high > 0.05, name
    assert far["density"].low == 0.0
    assert np.isnan([far["density"].high, far["density"].standard_error]).all()  # not an interval of no width


def test_a_mode_that_is_missing_costs_recall_and_coverage_alone():
    y = np.concatenate([normal(100, 4, 0), normal(100, 4, 1, 20.0)])
    found = manifold_metrics(normal(200, 4, 2), y)
    assert found["precision"].value > 0.75
    assert found["recall"].value < 0.55
    assert found["coverage"].value == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("n", "m"), [(6, 6), (6, 4), (5, 12), (7, 3), (1, 9)])
def test_wasserstein_on_a_line_is_that_of_repeated_samples(n, m):
    """n and m samples, each repeated m and n times, are equally many and have the same distributions."""
    rng = np.random.default_rng(0)
    x, y = np.sort(rng.standard_normal(n)), np.sort(rng.standard_normal(m))
    expected = np.square(np.repeat(x, m) - np.repeat(y, n)).mean()
    assert wasserstein_square(x, y) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("repeats", [1, 3])
def test_sliced_wasserstein_of_shifted_samples(repeats):
    """Moved by v, every projection moves by its part of v, whatever the samples: the root of the mean of (t.v)^2."""
    x, v = normal(60, 5, 0), np.array([3.0, 0.0, 0.0, 4.0, 0.0])
    y = np.repeat(x + v, repeats, axis=0)
    directions = np.random.Generator(np.random.Philox(7)).standard_normal((5, 64))
    directions /= np.linalg.norm(directions, axis=0)
    found = sliced_wasserstein(x, y, projections=64, seed=7)
    assert found.value == pytest.approx(math.sqrt(np.mean((v @ directions) ** 2)), rel=1e-10)
    many = sliced_wasserstein(x, y, projections=4000, seed=7)
    assert many.value == pytest.approx(5.0 / math.sqrt(5), rel=0.03)  # the mean of (t.v)^2 is |v|^2 / d
    line = sliced_wasserstein(x[:, :1], np.repeat(x[:, :1] + 2.5, repeats, axis=0))
    assert line.value == pytest.approx(2.5, rel=1e-12)


@pytest.mark.slow
def test_sliced_wasserstein_of_scaled_normals():
    """Between N(0, I) and N(0, 4 I) every projection is 1 apart."""
    found = sliced_wasserstein(normal(20_000, 3, 0), 2 * normal(15_000, 3, 1))
    assert found.value == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("others", [120, 77])
def test_sliced_wasserstein_error_is_that_of_the_jackknife(others):
    """Leaving out one sample at a time; the part of the directions, which their spread gives, is taken off first."""
    x, y = normal(120, 3, 0), 1.5 * normal(others, 3, 1, 0.7)
    found = sliced_wasserstein(x, y, projections=16)
    left_out = [sliced_wasserstein(np.delete(x, i, axis=0), y, projections=16).value for i in range(120)]
    sampling = math.sqrt(found.standard_error**2 - directional(x, y, found.value, 16) ** 2)
    assert sampling == pytest.approx(np.std(left_out) * math.sqrt(119), rel=0.03)


def test_potential_between_equal_and_moved_samples():
    """Between a sample and itself it is constant; moved by v, transport costs |v|^2 and the potential is -2 v x."""
    x = np.sort(normal(50, 1, 0)[:, 0])
    assert np.ptp(_potential(x, x)) == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(_potential(x, x + 3.0), -6.0 * (x - x[0]), atol=1e-12)
    np.testing.assert_allclose(_potential(x, np.repeat(x, 2) + 3.0), -6.0 * (x - x[0]), atol=1e-12)


def directional(x: np.ndarray, y: np.ndarray, value: float, projections: int) -> float:
    """The part of the standard error that is the directions'."""
    directions = np.random.Generator(np.random.Philox(0)).standard_normal((3, projections))
    directions /= np.linalg.norm(directions, axis=0)
    pairs = zip(np.sort((x @ directions).T), np.sort((y @ directions).T), strict=True)
    squares = np.array([wasserstein_square(a, b) for a, b in pairs])
    return 0.5 * float(squares.std(ddof=1)) / math.sqrt(projections) / value


@pytest.mark.slow
def test_sliced_wasserstein_interval_covers_the_mean_of_the_estimates():
    """The directions are the same in all of them, so that intervals are wider than the estimates vary, but not by much."""
    y = normal(400, 3, 999, 1.0)
    found = [sliced_wasserstein(normal(200, 3, seed), y, projections=32) for seed in range(150)]
    values = np.array([d.value for d in found])
    assert np.mean([d.low <= values.mean() <= d.high for d in found]) > 0.92
    parts = [d.standard_error**2 - directional(normal(200, 3, s), y, d.value, 32) ** 2 for s, d in enumerate(found)]
    assert math.sqrt(np.mean(parts)) == pytest.approx(values.std(), rel=0.15)


@pytest.mark.parametrize(
    "figure", [kid, inception_score, manifold_metrics, sliced_wasserstein], ids=lambda figure: figure.__name__
)
def test_figures_read_slices_and_repeat_themselves(figure, monkeypatch):
    """The same from an array and from what gives slices only, in blocks; the same for the same seed, another for another."""
    monkeypatch.setattr("bench.moments._ELEMENTS", 4 * 9)

    class Slices:
        def __init__(self, rows):
            self._rows, self.shape, self.dtype = rows, rows.shape, rows.dtype

        def __len__(self):
            return len(self._rows)

        def __getitem__(self, rows):
            assert isinstance(rows, slice)
            return self._rows[rows]

    rng = np.random.default_rng(0)
    arrays = [rng.dirichlet(np.ones(4), n).astype(np.float32) for n in (60, 50)]
    arrays = arrays[:1] if figure is inception_score else arrays
    found = figure(*arrays)
    assert figure(*map(Slices, arrays)) == found
    if figure is not manifold_metrics:
        assert figure(*arrays, seed=1) != found


X = np.zeros((30, 3))
HALVES = np.full((30, 2), 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kid(X, np.zeros((30, 4))), "features must be 4 like the reference's, got 3"),
        (lambda: kid(X, np.zeros(3)), r"reference must be \(N, d\) real numbers"),
        (lambda: kid(X, X, size=16), r"size must lie in 2 .. 15, half of the 30 samples.*got 16"),
        (lambda: kid(X, X, size=1), r"size must lie in 2 .. 15.*got 1"),
        (lambda: kid(X, X, size=10, subsets=4), r"subsets must lie in 2 .. 3, as they share no samples, got 4"),
        (lambda: kid(X, np.full((30, 3), np.nan)), "reference must be finite, got NaN or Inf in sample 0"),
        (lambda: inception_score(HALVES, splits=16), r"splits must lie in 2 .. 15, half of the samples, got 16"),
        (lambda: inception_score(2 * HALVES), "must be >= 0 and sum to 1, got others in sample 0"),
        (lambda: inception_score(np.tile([1.5, -0.5], (30, 1))), "must be >= 0 and sum to 1"),
        (lambda: manifold_metrics(X, X, neighbours=30), r"neighbours must lie in 1 .. 29.*got 30"),
        (lambda: manifold_metrics(X, X[:4]), r"coverage_neighbours must lie in 1 .. 3.*got 5"),
        (lambda: sliced_wasserstein(X, X, projections=1), "projections must be at least 2, got 1"),
        (lambda: sliced_wasserstein(X[:1], X), "features must hold at least 2 samples, got 1"),
    ],
)
def test_bad_input_names_what_is_accepted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
