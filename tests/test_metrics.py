"""Distances of Gaussian fits against SciPy and closed forms; intervals against finite differences and repeated draws."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from bench.intervals import jackknife
from bench.metrics import (
    FrechetReference,
    Moments,
    _gradient_factor,
    _influence,
    _looked_at,
    frechet_distance,
    frechet_infinity,
    frechet_interval,
    gaussian_frechet,
    gaussian_kl,
    gaussian_kl_interval,
    metric_name,
)
from bench.mixture import GaussianMixture


def random_moments(dim: int, seed: int, mean: float = 1.0) -> Moments:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((dim, 2 * dim))
    return Moments(mean * rng.standard_normal(dim), root @ root.T / (2 * dim), 100)


def draws(moments: Moments, count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, moments.dim)) @ np.linalg.cholesky(moments.covariance).T + moments.mean


def sqrtm_form(a: Moments, b: Moments) -> float:
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    shift = a.mean - b.mean
    return float(shift @ shift + np.trace(a.covariance + b.covariance - 2 * root.real))


@pytest.mark.parametrize("dim", [1, 2, 10, 60, 200])
def test_distance_is_the_sqrtm_form(dim):
    a, b = random_moments(dim, 1), random_moments(dim, 2)
    assert frechet_distance(a, b) == pytest.approx(sqrtm_form(a, b), rel=1e-8)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_distance_of_diagonal_gaussians():
    a = Moments(np.array([1.0, 2.0, 0.0]), np.diag([4.0, 1.0, 0.25]), 0)
    b = Moments(np.array([0.0, 2.0, 2.0]), np.diag([1.0, 9.0, 0.0]), 0)
    assert frechet_distance(a, b) == pytest.approx(5.0 + (2 - 1) ** 2 + (1 - 3) ** 2 + 0.5**2, rel=1e-12)


def test_distance_of_equal_moments_is_zero():
    a = random_moments(40, 3)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize("rank", [3, 20])
def test_distance_of_singular_covariances(rank):
    """In a common eigenbasis the roots are known; half of them vanish."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((40, 40)))[0][:, :rank]
    one, two = rng.uniform(0.5, 3, rank), rng.uniform(0.5, 3, rank)
    a = Moments(np.zeros(40), (basis * one) @ basis.T, 0)
    b = Moments(np.zeros(40), (basis * two) @ basis.T, 0)
    expected = ((one**0.5 - two**0.5) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-6)


def test_a_reference_is_its_moments():
    a, b = random_moments(12, 1), random_moments(12, 2)
    reference = FrechetReference(b)
    np.testing.assert_allclose(reference.root @ reference.root.T, b.covariance, rtol=1e-10, atol=1e-12)
    assert frechet_distance(a, reference) == frechet_distance(a, b)
    features = draws(a, 100, 0)
    assert frechet_interval(features, reference) == frechet_interval(features, b)


def test_root_of_a_singular_covariance():
    """Where Cholesky's factor does not exist, another triangle with the same product."""
    covariance = np.array([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    root = FrechetReference(Moments(np.zeros(3), covariance, 0)).root
    np.testing.assert_allclose(root @ root.T, covariance, atol=1e-14)
    np.testing.assert_array_equal(root, np.tril(root))


def test_gradient_in_the_covariance_is_that_of_finite_differences():
    a, b = random_moments(5, 1), random_moments(5, 2)
    factor = _gradient_factor(a, FrechetReference(b))[1]
    gradient = np.eye(5) - factor @ factor.T
    direction = np.random.default_rng(0).standard_normal((5, 5))
    direction += direction.T
    step = 1e-5
    ahead, behind = (frechet_distance(Moments(a.mean, a.covariance + s * direction, 0), b) for s in (step, -step))
    assert (ahead - behind) / (2 * step) == pytest.approx(np.trace(gradient @ direction), rel=1e-7)


def test_standard_error_is_that_of_the_jackknife():
    """The infinitesimal jackknife is the delta method; leaving out one sample differs from it at order 1 / N."""
    features = draws(random_moments(3, 1), 400, 0)
    reference = FrechetReference(random_moments(3, 2))
    left_out = [frechet_distance(Moments.of(np.delete(features, i, axis=0)), reference) for i in range(400)]
    jackknife = np.std(left_out) * math.sqrt(399)
    assert frechet_interval(features, reference).standard_error == pytest.approx(jackknife, rel=0.02)


@pytest.mark.parametrize("fault", [None, "factor", "mean"])
def test_standard_error_of_blocks_is_that_of_their_jackknife(fault):
    """To first order, leaving out a block moves the distance by its mean influence; half a gradient or no mean is seen."""
    count, of_a_block = 6000, 20
    features = draws(random_moments(6, 1, 0.1), count, 0)
    reference = FrechetReference(random_moments(6, 2, 0.1))
    moments = Moments.of(features)
    factor, shift = _gradient_factor(moments, reference)[1], moments.mean - reference.moments.mean
    factor, shift = factor * (0.5**0.5 if fault == "factor" else 1.0), shift * (fault != "mean")
    influence = _influence(features, np.full(count, True), moments.mean, shift, factor)
    first_order = influence.reshape(of_a_block, -1).mean(1).std(ddof=1) / math.sqrt(of_a_block)
    exact = jackknife(lambda rows: frechet_distance(Moments.of(rows), reference), features, of_a_block)
    agrees = abs(first_order / exact.standard_error - 1) < 0.03
    assert agrees == (fault is None)


def test_a_part_of_many_samples_of_many_features_gives_the_standard_error(monkeypatch):
    """A sixth of the samples, in blocks: the value is of all, and the standard error within three of its own."""
    features, reference = draws(random_moments(3, 1), 12_000, 0), random_moments(3, 2)
    whole = frechet_interval(features, reference)
    monkeypatch.setattr("bench.moments._ELEMENTS", 3 * 1000)
    monkeypatch.setattr("bench.metrics._ENOUGH", 2000)
    assert frechet_interval(features, reference).standard_error == pytest.approx(whole.standard_error, rel=1e-12)
    monkeypatch.setattr("bench.metrics._FEW_FEATURES", 2)
    part = frechet_interval(features, reference)
    assert part.value == pytest.approx(whole.value, rel=1e-12)
    assert part.count == 12_000
    assert 0 < abs(part.standard_error / whole.standard_error - 1) < 3 * math.sqrt(0.5 * 2 / 2000)
    assert part == frechet_interval(features, reference)


def test_what_is_looked_at_is_all_up_to_the_limits_and_the_limit_beyond():
    assert _looked_at(8192, 2048).all()
    assert _looked_at(20_000, 256).all()
    part = _looked_at(20_000, 257)
    assert part.shape == (20_000,)
    assert part.sum() == 8192
    # of ten classes in turn, each has its share
    shares = np.bincount(np.flatnonzero(part) % 10) / 8192
    assert shares.min() > 0.085
    assert shares.max() < 0.115


def test_moments_that_are_known_save_a_reading():
    features, reference = draws(random_moments(3, 1), 300, 0), random_moments(3, 2)
    assert frechet_interval(features, reference, moments=Moments.of(features)) == frechet_interval(features, reference)
    with pytest.raises(ValueError, match=r"moments must be of the \(300, 3\) features, got \(299, 3\)"):
        frechet_interval(features, reference, moments=Moments.of(features[1:]))


def test_features_in_single_precision_have_the_interval_of_double(monkeypatch):
    """Products in single precision, in blocks, with a mean far from 0 and a direction that hardly varies."""
    single = draws(random_moments(12, 1), 700, 0).astype(np.float32)
    single[:, 0] = 5.0 + 1e-3 * single[:, 0]
    single += 100.0
    reference = FrechetReference(random_moments(12, 2))
    expected = frechet_interval(single.astype(np.float64), reference)
    monkeypatch.setattr("bench.moments._ELEMENTS", 12 * 64)
    found = frechet_interval(single, reference)
    assert found.value == pytest.approx(expected.value, rel=1e-11)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-5)


class InBlocks:
    """What reads its rows when they are asked for: a slice is all that it gives, and it notes the largest."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows, self.shape, self.dtype, self.largest = rows, rows.shape, rows.dtype, 0

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice) -> np.ndarray:
        assert isinstance(rows, slice)
        self.largest = max(self.largest, len(self._rows[rows]))
        return self._rows[rows]

    def __array__(self, *_, **__):
        raise AssertionError("read as a whole")


@pytest.mark.parametrize("distance", [frechet_interval, frechet_infinity])
def test_features_are_read_in_blocks_only(distance, monkeypatch):
    monkeypatch.setattr("bench.moments._ELEMENTS", 3 * 16)
    rows, reference = draws(random_moments(3, 1), 100, 0), random_moments(3, 2)
    features = InBlocks(rows)
    assert distance(features, reference) == distance(rows, reference)
    assert features.largest == 16


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_interval_covers_the_mean_of_the_estimates(mean):
    """Without a shift only the covariance part of the influence is at work, with one both are."""
    a, b = random_moments(3, 1, mean), FrechetReference(random_moments(3, 2, -mean))
    found = [frechet_interval(draws(a, 500, seed), b) for seed in range(600)]
    values = np.array([d.value for d in found])
    covered = np.mean([d.low <= values.mean() <= d.high for d in found])
    assert covered == pytest.approx(0.95, abs=0.03)
    assert np.mean([d.standard_error for d in found]) == pytest.approx(values.std(), rel=0.08)
    assert all(d.count == 500 for d in found)


def test_bias_is_upward_and_of_order_one_over_n():
    """The reason why distances compare at equal N only: the interval does not contain it."""
    a, b = random_moments(8, 1), FrechetReference(random_moments(8, 2))
    exact = frechet_distance(a, b)
    bias = [
        np.mean([frechet_distance(Moments.of(draws(a, n, seed)), b) for seed in range(300)]) - exact for n in (100, 400)
    ]
    assert bias[1] > 0
    assert bias[0] / bias[1] == pytest.approx(4.0, rel=0.35)


@pytest.mark.slow
def test_infinity_is_without_bias_and_its_interval_covers():
    """At 400 samples of 8 features the plain distance is off by more than its mean's error many times over."""
    a = random_moments(8, 1)
    reference = FrechetReference(random_moments(8, 2))
    exact = frechet_distance(a, reference)
    found = [frechet_infinity(draws(a, 400, seed), reference) for seed in range(300)]
    plain = np.array([frechet_interval(draws(a, 400, seed), reference).value for seed in range(300)])
    values = np.array([distance.value for distance in found])
    # the two share their samples, so that the difference of the means is the bias, nearly without noise
    bias_of_plain = (plain - values).mean()
    assert bias_of_plain > 3 * (plain - values).std() / math.sqrt(300)
    assert values.mean() == pytest.approx(exact, abs=2 * values.std() / math.sqrt(300))
    assert np.mean([d.standard_error for d in found]) == pytest.approx(values.std(), rel=0.1)
    assert np.mean([d.low <= exact <= d.high for d in found]) == pytest.approx(0.95, abs=0.03)


def test_infinity_of_samples_of_the_reference_is_about_zero():
    """Where the plain distance is bias alone, the line's end may fall below 0."""
    a = random_moments(16, 1)
    reference = FrechetReference(a)
    found = np.array([frechet_infinity(draws(a, 800, seed), reference, seed=seed).value for seed in range(40)])
    plain = frechet_interval(draws(a, 800, 0), reference).value
    assert abs(found.mean()) < 0.15 * plain
    assert found.min() < 0


def test_infinity_is_of_its_seed():
    features, reference = draws(random_moments(4, 1), 200, 0), random_moments(4, 2)
    first = frechet_infinity(features, reference, seed=1)
    assert first == frechet_infinity(features, reference, seed=1)
    assert first.value != frechet_infinity(features, reference, seed=2).value
    assert first.count == 200


def test_line_to_zero_of_exact_points():
    """Points on a line have no residuals; one off the line has the weighted fit that NumPy finds."""
    from bench.metrics import _at_zero

    x = np.array([0.1, 0.2, 0.4, 0.8])
    assert _at_zero(np.column_stack([x, 3.0 + 5.0 * x])) == pytest.approx((3.0, 0.0), abs=1e-12)
    y = 3.0 + 5.0 * x + np.array([0.0, 0.1, 0.0, -0.2])
    (_, end), covariance = np.polyfit(x, y, 1, w=x**-0.5, cov=True)
    assert _at_zero(np.column_stack([x, y])) == pytest.approx((end, covariance[1, 1] ** 0.5), rel=1e-10)


def test_interval_widens_with_its_level():
    features, b = draws(random_moments(3, 1), 300, 0), random_moments(3, 2)
    wide, usual, narrow = (frechet_interval(features, b, level) for level in (0.99, 0.95, 0.5))
    assert wide.low < usual.low < narrow.low < narrow.value < narrow.high < usual.high < wide.high
    assert usual.high - usual.value == pytest.approx(1.959964 * usual.standard_error, rel=1e-6)
    assert usual.value == pytest.approx(frechet_distance(Moments.of(features), b), rel=1e-12)


def test_interval_ends_at_zero():
    a = random_moments(3, 1)
    found = frechet_interval(draws(a, 20, 0), Moments(a.mean + 0.05, a.covariance, 0), level=0.9999)
    assert found.low == 0.0 < found.value < found.high


def test_interval_with_a_singular_covariance_is_finite():
    found = frechet_interval(draws(random_moments(30, 1), 10, 0), random_moments(30, 2))
    assert all(map(math.isfinite, (found.value, found.low, found.high, found.standard_error)))
    same = frechet_interval(np.ones((5, 3)), random_moments(3, 2))
    assert same.standard_error == 0.0


@pytest.mark.parametrize("count", [12, 24, 30])
def test_interval_of_fewer_samples_than_features_errs_on_the_wide_side(count):
    """Where the square root has no derivative; 6 features of 30 that hardly vary do no harm either."""
    spread = np.where(np.arange(30) < 24, np.geomspace(1.0, 0.1, 30), 1e-7)
    reference = FrechetReference(Moments(np.zeros(30), np.diag(spread**2), 0))
    rng = np.random.default_rng(0)
    found = [frechet_interval(rng.standard_normal((count, 30)) * spread * 1.2 + 0.1, reference) for _ in range(200)]
    ratio = np.mean([d.standard_error for d in found]) / np.std([d.value for d in found])
    assert 0.95 < ratio < 2.0


def test_mixture_moments_and_distance():
    mixture = GaussianMixture.random(dim=3)
    exact = Moments.of_mixture(mixture)
    assert exact.count == 0
    samples = mixture.sample(4000, seed=1)
    found = gaussian_frechet(mixture, samples)
    assert found == frechet_distance(Moments.of(samples.numpy()), exact)
    assert 0 <= found < 0.01
    assert gaussian_frechet(mixture, samples.float().numpy()) == pytest.approx(found, rel=1e-3)
    # moved by v, the distance from the exact moments grows by |v|^2 + 2 v.(error of the mean)
    moved = gaussian_frechet(mixture, samples + 2.0)
    error = float((samples.mean(0) - mixture.mean()).sum())
    assert moved == pytest.approx(found + 12.0 + 4.0 * error, rel=1e-9)


def test_mixture_of_images():
    mixture = GaussianMixture.isotropic(torch.zeros(1, 3, 2, 2), 1.0)
    samples = torch.from_numpy(np.random.default_rng(0).standard_normal((2000, 3, 2, 2)))
    assert gaussian_frechet(mixture, 2 * samples) == pytest.approx(12.0, rel=0.05)


def test_kl_of_diagonal_gaussians_and_of_equal_ones():
    a = Moments(np.array([1.0, 2.0]), np.diag([4.0, 1.0]), 0)
    b = Moments(np.array([0.0, 2.0]), np.diag([1.0, 9.0]), 0)
    one = 0.5 * (4.0 + 1.0 - 1.0 - math.log(4.0))
    two = 0.5 * (1.0 / 9.0 - 1.0 + math.log(9.0))
    assert gaussian_kl(a, b) == pytest.approx(one + two, rel=1e-12)
    c = random_moments(20, 3)
    assert gaussian_kl(c, c) == pytest.approx(0.0, abs=1e-12)


def test_kl_is_the_mean_of_the_log_ratio():
    from scipy.stats import multivariate_normal

    a, b = random_moments(4, 1), random_moments(4, 2)
    x = draws(a, 200_000, 0)
    ratio = multivariate_normal(a.mean, a.covariance).logpdf(x) - multivariate_normal(b.mean, b.covariance).logpdf(x)
    assert gaussian_kl(a, b) == pytest.approx(ratio.mean(), abs=4 * ratio.std() / math.sqrt(len(x)))


@pytest.mark.parametrize("scale", [1.0, 1.05, 1.3])
def test_the_interval_of_kl_is_that_of_repeated_draws(scale):
    """Where samples are like the reference, so that all is bias and the first order vanishes, and where they are not."""
    mixture = GaussianMixture.random(2)
    reference = Moments.of_mixture(mixture)
    found = [gaussian_kl_interval(scale * mixture.sample(300, k).numpy(), reference) for k in range(200)]
    values = np.array([one.value for one in found])
    stated = math.sqrt(np.mean([one.standard_error**2 for one in found]))
    assert stated == pytest.approx(values.std(ddof=1), rel=0.4)
    assert np.mean([one.low <= values.mean() <= one.high for one in found]) > 0.9
    samples = scale * mixture.sample(300, 0).numpy()
    assert found[0].value == gaussian_kl(Moments.of(samples), reference)


def test_kl_does_not_know_units():
    a, b = random_moments(5, 1), random_moments(5, 2)
    scale = np.array([1.0, 10.0, 0.1, 3.0, 1e3])
    scaled = [Moments(m.mean * scale, m.covariance * np.outer(scale, scale), 0) for m in (a, b)]
    assert gaussian_kl(*scaled) == pytest.approx(gaussian_kl(a, b), rel=1e-9)


@pytest.mark.parametrize(
    ("extractor", "count", "name"),
    [
        ("inception", 50_000, "fid"),
        ("inception", 60_000, "fid60k"),
        ("inception", 49_999, "fid49999"),
        ("inception", 10_000, "fid10k"),
        ("inception", 5000, "fid5k"),
        ("inception", 2500, "fid2500"),
        ("inception", 500, "fid500"),
        ("mnist_cnn", 50_000, "fd_mnist_cnn"),
        ("dinov2", 5000, "fd_dinov2"),
    ],
)
def test_name_of_a_distance(extractor, count, name):
    assert metric_name(extractor, count) == name


REFERENCE = random_moments(3, 2)
SINGULAR = Moments(np.zeros(3), np.diag([1.0, 1.0, 0.0]), 2)


def with_entry(value: float) -> np.ndarray:
    features = np.zeros((5000, 3), dtype=np.float32)
    features[4321, 1] = value
    return features


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Moments.of(np.zeros((1, 3))), "at least 2 samples, got 1"),
        (lambda: Moments.of(np.zeros(3)), r"features must be \(N, d\).*got \(3,\)"),
        (lambda: Moments.of(np.zeros((3, 2), dtype=complex)), "real numbers.*complex"),
        (lambda: Moments.of(with_entry(math.nan)), "finite, got NaN or Inf in sample 4321"),
        (lambda: frechet_interval(with_entry(math.inf), REFERENCE), "finite, got NaN or Inf in sample 4321"),
        (lambda: frechet_interval(np.zeros((1, 3)), REFERENCE), "at least 2 samples, got 1"),
        (lambda: frechet_interval(np.zeros((9, 4)), REFERENCE), "features must be 3 like the reference's, got 4"),
        (lambda: frechet_distance(random_moments(4, 1), REFERENCE), "features must be 3 like the reference's, got 4"),
        (lambda: frechet_interval(np.eye(3), REFERENCE, level=95), r"level must lie in \(0, 1\), got 95"),
        (lambda: frechet_infinity(np.zeros((9, 3)), REFERENCE), "at least 25 samples for 3 halvings, got 9"),
        (lambda: frechet_infinity(np.zeros((99, 3)), REFERENCE, halvings=1), "halvings must be at least 2.*got 1"),
        (lambda: gaussian_kl(random_moments(4, 1), REFERENCE), "a must have 3 features like b, got 4"),
        (lambda: gaussian_kl(SINGULAR, REFERENCE), "a must have a covariance of full rank"),
        (lambda: gaussian_kl(REFERENCE, SINGULAR), "b must have a covariance of full rank"),
        (lambda: metric_name("", 5), "extractor must be a name"),
        (lambda: metric_name("inception", 0), "count must be at least 1, got 0"),
        (lambda: Moments(np.zeros(2), np.eye(3), 0), r"covariance must be \(2, 2\) like the mean, got \(3, 3\)"),
        (lambda: Moments(np.zeros((2, 2)), np.eye(2), 0), r"mean must be \(d,\)"),
        (lambda: Moments(np.array([0.0, math.nan]), np.eye(2), 0), "mean must be finite"),
        (lambda: Moments(np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), 0), "covariance must be symmetric"),
        (lambda: Moments(np.zeros(2), np.eye(2), -1), "count must be at least 0, got -1"),
        (lambda: FrechetReference(Moments(np.zeros(2), np.diag([1.0, -1.0]), 0)), "semi-definite.*eigenvalue -1"),
        (
            lambda: gaussian_frechet(GaussianMixture.random(), torch.zeros(9, 3)),
            r"samples must be \(N, 2\), got \(9, 3",
        ),
        (lambda: gaussian_frechet(GaussianMixture.random(), torch.zeros(1, 2)), "at least 2 samples, got 1"),
    ],
)
def test_bad_input_names_what_is_accepted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
