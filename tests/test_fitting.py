"""Fits against closed forms, SciPy's densities, and the mixture that made the data."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.fft import dctn
from scipy.linalg import block_diag

from bench.fitting import Step, fit_mixture
from bench.mixture import GaussianMixture
from bench.spectral import SpectralMixture


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def planted(shape: tuple[int, ...] = (3, 4, 4), dimensions: int = 6, rank: int = 2) -> SpectralMixture:
    """Three components far apart, each with directions, widths and bands of its own."""
    inside = GaussianMixture(
        torch.tensor([0.5, 0.3, 0.2]),
        2 * normal(3, dimensions, seed=2),
        torch.tensor([0.04, 0.1, 0.06]),
        torch.linalg.qr(normal(3, dimensions, rank, seed=1))[0],
        torch.tensor([[1.0, 0.5], [1.5, 0.3], [0.8, 0.6]]),
    )
    order = torch.randperm(math.prod(shape), generator=torch.Generator().manual_seed(4))
    outside = torch.tensor([[0.02, 0.002], [0.01, 0.004], [0.02, 0.001]])
    return SpectralMixture(inside, normal(*shape, seed=5), order, outside)


def photographs(count: int = 600) -> np.ndarray:
    """Smooth random fields of varying contrast as bytes, without the structure of a mixture."""
    spectrum = 1 / (1 + np.hypot(*np.meshgrid(np.fft.fftfreq(8) * 8, np.fft.fftfreq(8) * 8))) ** 1.5
    rng = np.random.default_rng(0)
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((count, 1, 8, 8))) * spectrum).real
    contrast = np.exp(rng.normal(0, 0.5, (count, 1, 1, 1))) * 200
    return np.clip(128 + noise * contrast, 0, 255).astype(np.uint8)


def log_likelihood(mixture: SpectralMixture, images: np.ndarray) -> float:
    wide = torch.from_numpy(images).double()
    return float(mixture.log_prob(wide / 127.5 - 1 if images.dtype == np.uint8 else wide).mean())


def test_one_component_has_the_closed_form():
    """Tipping & Bishop 1999, eqs. 7 and 8, in the six coefficients of largest variance; two bands beyond."""
    x = planted().sample(300, seed=1).numpy()
    mixture = fit_mixture(x, components=1, rank=3, dimensions=6, bands=2)
    coefficients = dctn(x - x.mean(0), axes=(1, 2, 3), norm="ortho").reshape(300, -1)
    order = np.argsort(-coefficients.var(0))
    ordered, matrix = coefficients[:, order], dctn(np.eye(48).reshape(-1, 3, 4, 4), axes=(1, 2, 3), norm="ortho")
    values, vectors = np.linalg.eigh(np.cov(ordered[:, :6].T, bias=True))
    values[:3] = values[:3].mean()
    bands = np.repeat([ordered[:, 6:27].var(), ordered[:, 27:].var()], 21)
    covariance = block_diag((vectors * values) @ vectors.T, np.diag(bands))
    matrix = matrix.reshape(48, 48)[:, order]
    expected = matrix @ covariance @ matrix.T
    np.testing.assert_allclose(mixture.mean().numpy(), x.reshape(300, -1).mean(0), atol=1e-12)
    np.testing.assert_allclose(mixture.covariance().numpy(), expected, atol=1e-12)
    density = stats.multivariate_normal(x.reshape(300, -1).mean(0), expected).logpdf(x.reshape(300, -1)).mean()
    assert log_likelihood(mixture, x) == pytest.approx(density, rel=1e-10)


def test_it_finds_the_mixture_that_made_the_data():
    truth = planted()
    x, unseen = truth.sample(4000, seed=1).numpy(), truth.sample(4000, seed=2).numpy()
    mixture = fit_mixture(x, components=3, rank=2, dimensions=6, bands=2)
    order = mixture.inside.weights.argsort(descending=True)
    torch.testing.assert_close(mixture.inside.weights[order], truth.inside.weights, rtol=0, atol=0.03)
    torch.testing.assert_close(mixture.inside.residual[order], truth.inside.residual, rtol=0.1, atol=0)
    torch.testing.assert_close(mixture.inside.variances[order], truth.inside.variances, rtol=0.2, atol=0.05)
    # the order inside the bands is lost, but not what they hold
    torch.testing.assert_close(mixture.outside[order].sum(1), truth.outside.sum(1), rtol=0.05, atol=0)
    assert log_likelihood(mixture, unseen) == pytest.approx(log_likelihood(truth, unseen), abs=0.25)
    # and one component cannot
    assert log_likelihood(fit_mixture(x, 1, 2, dimensions=6, bands=2), unseen) < log_likelihood(truth, unseen) - 5


@pytest.mark.parametrize(("components", "rank", "dimensions"), [(1, 2, 10), (4, 3, 10), (6, 9, 12), (5, 20, 64)])
def test_the_log_likelihood_never_falls(components, rank, dimensions):
    steps: list[Step] = []
    images = photographs()
    mixture = fit_mixture(images, components, rank, seed=3, iterations=40, dimensions=dimensions, progress=steps.append)
    assert [step.iteration for step in steps] == list(range(len(steps)))
    for before, after in itertools.pairwise(steps):
        assert before.reseeded or after.log_likelihood >= before.log_likelihood - 1e-9 * abs(before.log_likelihood)
    if components > 1:
        assert steps[-1].log_likelihood > steps[0].log_likelihood + 0.2
    # what is reported is the density of the mixture that is returned
    assert steps[-1].log_likelihood == pytest.approx(log_likelihood(mixture, images), rel=1e-9)


def test_it_ends_where_nothing_is_gained():
    steps: list[Step] = []
    fit_mixture(photographs(), 1, 2, iterations=40, progress=steps.append)
    assert len(steps) == 3


def test_a_component_with_too_few_images_is_put_elsewhere():
    """Three images far from all others attract a centre of k-means, which they cannot keep."""
    x = planted().sample(500, seed=1).numpy()
    x[:3] += 1000 * np.eye(3 * 4 * 4).reshape(-1, 3, 4, 4)[:3]
    steps: list[Step] = []
    mixture = fit_mixture(x, 4, 2, iterations=30, dimensions=6, progress=steps.append)
    assert steps[0].reseeded > 0
    assert mixture.inside.weights.min() > 0
    assert all(np.isfinite(step.log_likelihood) for step in steps)


def test_the_seed_decides():
    images = photographs(200)
    first, again, other = (fit_mixture(images, 3, 2, seed=seed, iterations=5) for seed in (1, 1, 2))
    assert torch.equal(first.inside.means, again.inside.means)
    assert torch.equal(first.outside, again.outside)
    assert not torch.equal(first.inside.weights, other.inside.weights)


def test_bytes_are_images_between_minus_one_and_one():
    images = photographs(200)
    wide = (images / 127.5 - 1).astype(np.float32)
    mixtures = [fit_mixture(data, 2, 2, iterations=5, dimensions=8) for data in (images, wide)]
    torch.testing.assert_close(mixtures[0].covariance(), mixtures[1].covariance(), rtol=1e-4, atol=1e-6)
    assert mixtures[0].shape == (1, 8, 8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_images_stay_as_they_are(dtype):
    images = photographs(200).astype(dtype)
    before = images.copy()
    fit_mixture(images, 2, 2, iterations=2)
    assert np.array_equal(images, before)


def test_images_without_variance_get_that_of_rounding():
    images = photographs(200)
    images[:, :, 4:] = 7
    mixture = fit_mixture(images, 2, 40, iterations=5, dimensions=50)
    assert mixture.inside.residual.min() > 1e-6
    assert torch.isfinite(mixture.eps(mixture.sample(4), 1.0, 0.0)).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x: fit_mixture(x, 0, 2), ValueError, "components must be at least 1, got 0"),
        (lambda x: fit_mixture(x, 1, 0), ValueError, "rank must be at least 1, got 0"),
        (lambda x: fit_mixture(x, 1, 2, iterations=0), ValueError, "iterations must be at least 1, got 0"),
        (
            lambda x: fit_mixture(x, 1, 64),
            ValueError,
            "rank must be below the dimensions that are not in bands, 64, got 64",
        ),
        (lambda x: fit_mixture(x, 11, 2), ValueError, "components must be at most 10 for 64 images and rank 2, got 11"),
        (lambda x: fit_mixture(x, 1, 2, seed=-1), ValueError, "seed must be"),
        (lambda x: fit_mixture(x.astype(np.int64), 1, 2), TypeError, "uint8 or floating, got int64"),
        (lambda x: fit_mixture(x * np.nan, 1, 2), ValueError, "finite"),
        (lambda x: fit_mixture(x[:0], 1, 2), ValueError, r"N >= 1, got \(0, 1, 8, 8\)"),
    ],
)
def test_bad_arguments_say_what_is_accepted(make, error, message):
    with pytest.raises(error, match=message):
        make(photographs(64))
