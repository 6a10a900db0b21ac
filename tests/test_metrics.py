"""Frechet distances against SciPy and closed forms; their intervals against finite differences and repeated draws."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from bench.metrics import (
    FrechetReference,
    Moments,
    _gradient_factor,
    frechet_distance,
    frechet_interval,
    gaussian_frechet,
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


@pytest.mark.parametrize("dim", [1, 2, 10, 60])
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
    np.testing.assert_allclose(reference.root @ reference.root, b.covariance, rtol=1e-10, atol=1e-12)
    assert frechet_distance(a, reference) == frechet_distance(a, b)
    features = draws(a, 100, 0)
    assert frechet_interval(features, reference) == frechet_interval(features, b)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.uint8])
def test_moments_of_samples(dtype, monkeypatch):
    monkeypatch.setattr("bench.metrics._BLOCK", 16)
    features = (np.random.default_rng(0).uniform(0, 200, (50, 4))).astype(dtype)
    moments = Moments.of(features)
    assert moments.count == 50
    assert moments.mean.dtype == moments.covariance.dtype == np.float64
    np.testing.assert_allclose(moments.mean, features.astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance, np.cov(features.astype(np.float64).T), rtol=1e-11)


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


REFERENCE = random_moments(3, 2)


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
