"""Mixtures in cosine coefficients against the mixtures of the whole space that they equal, and against their own samples."""

import math

import numpy as np
import pytest
import torch
from scipy.fft import dct, dctn
from torch import Tensor

from bench.mixture import GaussianMixture
from bench.spectral import SpectralMixture, bands_of, cosines
from samplers.model import EpsModel
from samplers.schedule import edm, vp_linear

LEVELS = [(1.0, 0.002), (0.9, 0.4), (1.0, 80.0), (0.2, 0.98), (0.0, 1.0)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spectral(shape: tuple[int, ...] = (3, 2, 2), dimensions: int = 5, rank: int = 2, bands: int = 3) -> SpectralMixture:
    inside = GaussianMixture(
        torch.tensor([0.5, 0.3, 0.2]),
        normal(3, dimensions, seed=2),
        torch.tensor([0.04, 0.1, 0.02]),
        torch.linalg.qr(normal(3, dimensions, rank, seed=1))[0],
        normal(3, rank, seed=3) ** 2,
    )
    order = torch.randperm(math.prod(shape), generator=torch.Generator().manual_seed(4))
    return SpectralMixture(inside, normal(*shape, seed=5), order, 0.1 * normal(3, bands, seed=6) ** 2 + 0.002)


def cosine_matrix(mixture: SpectralMixture) -> Tensor:
    """The transform as one matrix (D, D), by SciPy, with its rows in the mixture's order."""
    basis = torch.eye(mixture.dim, dtype=torch.float64).view(-1, *mixture.shape)
    axes = tuple(range(1, basis.ndim))
    return torch.from_numpy(dctn(basis.numpy(), axes=axes, norm="ortho")).flatten(1).T[mixture.order]


def in_the_whole_space(mixture: SpectralMixture) -> GaussianMixture:
    """The same mixture with its covariance matrices written out."""
    inside, matrix, beyond = mixture.inside, cosine_matrix(mixture), mixture.dim - mixture.inside.dim
    sizes = [len(part) for part in torch.tensor_split(torch.arange(beyond), max(mixture.outside.shape[1], 1))]
    covariances = []
    for k in range(3):
        basis = inside.basis[k]
        first = inside.residual[k] * torch.eye(inside.dim) + basis @ torch.diag(inside.variances[k]) @ basis.T
        others = [variance for variance, size in zip(mixture.outside[k], sizes, strict=False) for _ in range(size)]
        block = torch.block_diag(first, torch.diag(torch.tensor(others, dtype=torch.float64)))
        covariances.append(matrix.T @ block[: mixture.dim, : mixture.dim] @ matrix)
    covariance = torch.stack(covariances)
    means = mixture.centre.flatten() + inside.means @ matrix[: inside.dim]
    symmetric = 0.5 * (covariance + covariance.mT)
    return GaussianMixture.from_covariances(inside.weights, means.view(-1, *mixture.shape), symmetric)


MIXTURES = {
    "thin": spectral(),
    "square": spectral((5,), 5, bands=0),
    "image": spectral((3, 8, 8), 70, 4, 16),
    "one-band": spectral((1, 4, 4), 3, 2, 1),
}


def states(mixture: SpectralMixture, alpha: float, sigma: float, n: int = 8) -> Tensor:
    return alpha * mixture.sample(n, seed=1) + sigma * normal(n, *mixture.shape, seed=9)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", MIXTURES)
def test_it_is_the_mixture_of_the_whole_space(name, level):
    mixture, (alpha, sigma) = MIXTURES[name], level
    whole, x = in_the_whole_space(mixture), states(mixture, alpha, sigma)
    for function in ("eps", "x0", "log_prob"):
        mine, its = (getattr(m, function)(x, alpha, sigma) for m in (mixture, whole))
        assert mine.shape == its.shape
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MIXTURES)
def test_moments_are_those_of_the_whole_space(name):
    mixture = MIXTURES[name]
    whole = in_the_whole_space(mixture)
    torch.testing.assert_close(mixture.mean(), whole.mean(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixture.covariance(), whole.covariance(), rtol=1e-11, atol=1e-11)
    linear = normal(4, mixture.dim, seed=8)
    mean, covariance = mixture.moments_of(linear)
    torch.testing.assert_close(mean, linear @ whole.mean(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(covariance, linear @ whole.covariance() @ linear.T, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", MIXTURES)
def test_samples_have_the_exact_moments(name):
    mixture, n = MIXTURES[name], 20000
    flat, covariance = mixture.sample(n, seed=3).flatten(1), mixture.covariance()
    # standard scores: chance alone stays below 4.5, a wrong moment gives tens
    score = (flat.mean(0) - mixture.mean()) / (covariance.diagonal() / n).sqrt()
    assert score.abs().max() < 4.5
    products = (flat - mixture.mean())[:, :8, None] * (flat - mixture.mean())[:, None, :8]
    score = (products.mean(0) - covariance[:8, :8]) / (products.std(0) / n**0.5)
    assert score.abs().max() < 4.5


def test_what_is_in_bands_belongs_to_the_component():
    """A component of its own in the first coefficient shows which sample came from where; its bands must go with it."""
    inside = GaussianMixture.isotropic([[-50.0], [50.0]], 0.1)
    outside = torch.tensor([[0.01, 1.0], [4.0, 0.2]])
    mixture = SpectralMixture(inside, torch.zeros(41), torch.arange(41), outside)
    coefficients = mixture.sample(400, seed=1) @ cosine_matrix(mixture).T
    for k, mine in enumerate((coefficients[:, 0] < 0, coefficients[:, 0] > 0)):
        for g, band in enumerate((slice(1, 21), slice(21, 41))):
            assert (coefficients[mine, band] ** 2).mean() == pytest.approx(float(outside[k, g]), rel=0.1)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 32])
def test_cosines_are_the_transform_of_scipy(size):
    matrix = cosines(size)
    np.testing.assert_allclose(matrix.numpy(), dct(np.eye(size), axis=0, norm="ortho"), atol=1e-14)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-14)


def test_bands_are_as_even_as_can_be():
    assert bands_of(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert bands_of(2, 2).tolist() == [0, 1]
    assert bands_of(0, 0).tolist() == []


def test_sample_is_a_function_of_seed_and_index():
    mixture = MIXTURES["thin"]
    # products of matrices may add in another order
    torch.testing.assert_close(mixture.sample(5, seed=1), mixture.sample(50, seed=1)[:5], rtol=1e-13, atol=1e-13)
    assert not torch.equal(mixture.sample(5, seed=1), mixture.sample(5, seed=2))
    assert mixture.eps(mixture.sample(0), 1.0, 1.0).shape == (0, 3, 2, 2)


def test_other_dtypes_and_chunks(monkeypatch):
    mixture = MIXTURES["image"]
    x = states(mixture, 0.8, 0.6, n=11)
    exact = mixture.eps(x, 0.8, 0.6)
    for dtype, tolerance in [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)]:
        eps = mixture.eps(x.to(dtype), 0.8, 0.6)
        assert eps.dtype == dtype
        torch.testing.assert_close(
            eps.double(), mixture.eps(x.to(dtype).double(), 0.8, 0.6), rtol=tolerance, atol=tolerance
        )
    monkeypatch.setattr("bench.spectral._CHUNK", 3 * 3 * 8 * 8 * 3)
    torch.testing.assert_close(mixture.eps(x, 0.8, 0.6), exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("schedule", [vp_linear(), edm()], ids=lambda s: s.name)
def test_net_uses_the_schedule(schedule):
    mixture = MIXTURES["thin"]
    t = torch.linspace(schedule.t_min, schedule.t_max, 6, dtype=torch.float64)
    x = normal(6, *mixture.shape)
    eps = EpsModel(mixture.net(schedule), schedule, predicts="eps")(x, t)
    each = [mixture.eps(x[i : i + 1], float(schedule.alpha(t[i])), float(schedule.sigma(t[i]))) for i in range(6)]
    torch.testing.assert_close(eps, torch.cat(each), rtol=1e-11, atol=1e-11)


def test_gradients_after_inference_mode():
    mixture = spectral()
    with torch.inference_mode():
        mixture.eps(torch.zeros(1, 3, 2, 2), 1.0, 1.0)
    x = torch.zeros(1, 3, 2, 2, requires_grad=True)
    mixture.log_prob(x, 1.0, 0.5).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(mixture.eps(x.detach(), 1.0, 0.5), -0.5 * x.grad, rtol=1e-4, atol=1e-4)


INSIDE = GaussianMixture.isotropic([[0.0, 0.0]], 1.0)
ORDER = torch.arange(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpectralMixture(INSIDE, torch.zeros(1), [0], [[1.0]]), r"d at most the 1 numbers.*got \(2,\)"),
        (
            lambda: SpectralMixture(INSIDE, torch.zeros(3), [0, 1, 1], [[1.0]]),
            r"order must be a permutation of 0 \.\. 2",
        ),
        (lambda: SpectralMixture(INSIDE, torch.zeros(3), ORDER, [[-1.0]]), "outside must be at least 0, got -1"),
        (lambda: SpectralMixture(INSIDE, torch.zeros(3), ORDER, [[1.0, 1.0]]), r"outside must be \(1, 1 to 1\), got"),
        (lambda: SpectralMixture(INSIDE, torch.zeros(2), [1, 0], [[1.0]]), r"outside must be \(1, 0 to 0\), got"),
        (lambda: SpectralMixture(INSIDE, torch.zeros(3) * math.nan, ORDER, [[1.0]]), "centre must be finite"),
        (lambda: spectral().eps(torch.zeros(1, 2), 1.0, 1.0), r"x must be \(B, 3, 2, 2\)"),
        (lambda: spectral().eps(torch.zeros(1, 3, 2, 2), 1.0, -1.0), "sigma must be finite and at least 0, got -1"),
        (
            lambda: SpectralMixture(INSIDE, torch.zeros(3), ORDER, [[0.0]]).eps(torch.zeros(1, 3), 1.0, 0.0),
            "sigma must be positive",
        ),
        (lambda: spectral().sample(-1), "n must be at least 0, got -1"),
    ],
)
def test_bad_arguments_say_what_is_accepted(make, message):
    with pytest.raises(ValueError, match=message):
        make()
