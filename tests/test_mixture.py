"""The exact model against automatic differentiation, SciPy, quadrature and its own samples."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from bench.mixture import GaussianMixture
from samplers.model import EpsModel
from samplers.schedule import cosine, edm, flow, vp_linear

LEVELS = [(1.0, 0.002), (0.9, 0.4), (1.0, 80.0), (0.2, 0.98), (0.0, 1.0)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def low_rank(dim: int = 6, rank: int = 2, components: int = 3, residual: float = 0.05) -> GaussianMixture:
    basis = torch.linalg.qr(normal(components, dim, rank, seed=1))[0]
    weights = torch.tensor([0.5, 0.3, 0.2])[:components]
    return GaussianMixture(
        weights / weights.sum(),
        normal(components, dim, seed=2),
        torch.full((components,), residual),
        basis,
        normal(components, rank, seed=3) ** 2,
    )


def large(rank: int = 4) -> GaussianMixture:
    """Image-shaped, beyond the dimension up to which sums are row by row."""
    flat = low_rank(dim=3 * 8 * 8, rank=rank)
    return GaussianMixture(flat.weights, flat.means.view(3, 3, 8, 8), flat.residual, flat.basis, flat.variances)


MIXTURES = {
    "isotropic": GaussianMixture.isotropic(2 * normal(4, 3), 0.3, [0.1, 0.2, 0.3, 0.4]),
    "isotropic-widths": GaussianMixture.isotropic(normal(3, 2, 2), [0.1, 0.5, 2.0]),
    "full": GaussianMixture.random(3, 4, seed=5),
    "low-rank": low_rank(),
    "large": large(),
}


def covariances(mixture: GaussianMixture) -> Tensor:
    """The covariance matrices from their definition."""
    eye = mixture.residual[:, None, None] * torch.eye(mixture.dim, dtype=torch.float64)
    if mixture.basis is None:
        return eye
    return eye + mixture.basis @ torch.diag_embed(mixture.variances) @ mixture.basis.mT


def states(mixture: GaussianMixture, alpha: float, sigma: float, n: int = 8) -> Tensor:
    return alpha * mixture.sample(n, seed=1) + sigma * normal(n, *mixture.shape, seed=9)


def rowwise(value: float, n: int) -> Tensor:
    return torch.full((n,), value, dtype=torch.float64)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", MIXTURES)
def test_eps_is_the_score_of_log_prob(name, level):
    mixture, (alpha, sigma) = MIXTURES[name], level
    x = states(mixture, alpha, sigma).requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_prob(x, alpha, sigma).sum(), x)
    eps = mixture.eps(x.detach(), alpha, sigma)
    assert eps.shape == x.shape
    assert eps.abs().max() > 1e-3
    torch.testing.assert_close(eps, -sigma * score, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", MIXTURES)
def test_log_prob_against_scipy(name, level):
    mixture, (alpha, sigma) = MIXTURES[name], level
    x = states(mixture, alpha, sigma, n=4)
    covariance = alpha**2 * covariances(mixture) + sigma**2 * torch.eye(mixture.dim, dtype=torch.float64)
    joint = [
        np.log(float(w)) + stats.multivariate_normal(alpha * mu.numpy(), c.numpy()).logpdf(x.flatten(1).numpy())
        for w, mu, c in zip(mixture.weights, mixture.means.flatten(1), covariance, strict=True)
    ]
    expected = np.logaddexp.reduce(joint, axis=0)
    np.testing.assert_allclose(mixture.log_prob(x, alpha, sigma).numpy(), expected, rtol=1e-9)


def test_log_prob_against_torch_distributions():
    mixture = MIXTURES["full"]
    components = torch.distributions.MultivariateNormal(mixture.means, covariances(mixture))
    reference = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(mixture.weights), components)
    x = mixture.sample(50)
    torch.testing.assert_close(mixture.log_prob(x), reference.log_prob(x), rtol=1e-10, atol=1e-10)


def test_posterior_means_against_quadrature():
    mixture, alpha, sigma = GaussianMixture.isotropic([[-1.0], [0.5]], [0.3, 0.2], [0.4, 0.6]), 0.7, 0.6
    data = torch.linspace(-4, 4, 20001, dtype=torch.float64)
    x = torch.tensor([[-1.2], [0.0], [0.1], [2.0]], dtype=torch.float64)
    weight = (mixture.log_prob(data[:, None]) - 0.5 * ((x - alpha * data) / sigma) ** 2).exp()
    weight /= weight.sum(1, keepdim=True)
    torch.testing.assert_close(mixture.x0(x, alpha, sigma), (weight @ data)[:, None], rtol=1e-10, atol=1e-10)
    noise = (weight * (x - alpha * data) / sigma).sum(1, keepdim=True)
    torch.testing.assert_close(mixture.eps(x, alpha, sigma), noise, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", MIXTURES)
def test_x0_and_eps_make_the_state(name, level):
    mixture, (alpha, sigma) = MIXTURES[name], level
    x = states(mixture, alpha, sigma)
    again = alpha * mixture.x0(x, alpha, sigma) + sigma * mixture.eps(x, alpha, sigma)
    torch.testing.assert_close(again, x, rtol=1e-11, atol=1e-11)
    if alpha:
        by_eps = (x - sigma * mixture.eps(x, alpha, sigma)) / alpha
        torch.testing.assert_close(mixture.x0(x, alpha, sigma), by_eps, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MIXTURES)
def test_alpha_zero(name):
    mixture = MIXTURES[name]
    x = normal(5, *mixture.shape)
    torch.testing.assert_close(mixture.eps(x, 0.0, 0.5), x / 0.5, rtol=1e-12, atol=1e-12)
    expected = mixture.mean().view(1, *mixture.shape).expand_as(x)
    torch.testing.assert_close(mixture.x0(x, 0.0, 0.5), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("sigma", [1e-3, 1e-8, 1e-12])
def test_tiny_sigma_keeps_its_digits(sigma, scale):
    """With one component `eps = sigma C^-1 (x - mu)`; what rounding leaves outside a square basis must not show."""
    covariance = scale * torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    mixture = GaussianMixture.from_covariances([1.0], [[2.0, -1.0]], covariance[None])
    x = normal(6, 2)
    total = covariance + sigma**2 * torch.eye(2, dtype=torch.float64)
    expected = sigma * torch.linalg.solve(total, (x - mixture.means).T).T
    torch.testing.assert_close(mixture.eps(x, 1.0, sigma), expected, rtol=1e-12, atol=0.0)


def test_components_without_width_are_the_ideal_denoiser():
    data = normal(20, 1, 4, 4)
    mixture = GaussianMixture.isotropic(data, 0.0)
    x = data + 0.5 * normal(20, 1, 4, 4, seed=4)
    weight = torch.softmax(-((x.flatten(1)[:, None] - data.flatten(1)) ** 2).sum(2) / (2 * 0.5**2), 1)
    torch.testing.assert_close(mixture.x0(x, 1.0, 0.5).flatten(1), weight @ data.flatten(1), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mixture.x0(data + 1e-9, 1.0, 1e-6), data, rtol=0, atol=1e-12)


def test_far_states_do_not_underflow():
    mixture = GaussianMixture.isotropic([[0.0], [1.0]], 0.1)
    far = torch.tensor([[1e4]], dtype=torch.float64)
    torch.testing.assert_close(mixture.eps(far, 1.0, 0.1), (far - 1) * 0.1 / 0.02, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("name", MIXTURES)
def test_other_dtypes(name, dtype, tolerance):
    mixture = MIXTURES[name]
    x = states(mixture, 0.8, 0.6).to(dtype)
    eps = mixture.eps(x, 0.8, 0.6)
    assert eps.dtype == dtype
    torch.testing.assert_close(eps.double(), mixture.eps(x.double(), 0.8, 0.6), rtol=tolerance, atol=tolerance)


BATCH_CASES = {
    **{f"full-{d}-{k}": GaussianMixture.random(d, k) for d, k in [(1, 1), (2, 5), (3, 9), (16, 17), (17, 4), (64, 3)]},
    "isotropic-large": GaussianMixture.isotropic(normal(5, 3, 9, 9), 0.4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BATCH_CASES)
def test_a_row_does_not_depend_on_its_batch(name, dtype):
    mixture = BATCH_CASES[name]
    x = states(mixture, 0.7, 0.7, n=256).to(dtype)
    t = torch.linspace(0.02, 0.99, 256)
    calls = [
        lambda i: mixture.net(vp_linear())(x[i], t[i]),
        lambda i: mixture.eps(x[i], 0.7, 0.7),
        lambda i: mixture.x0(x[i], 0.7, t[i]),
        lambda i: mixture.log_prob(x[i], t[i], 0.7),
    ]
    for call in calls:
        whole = call(slice(None))
        for start, size in [(0, 1), (100, 1), (255, 1), (3, 7), (249, 7)]:
            part = slice(start, start + size)
            assert torch.equal(call(part), whole[part])


def test_rows_are_chunked_without_a_trace(monkeypatch):
    mixture = MIXTURES["large"]
    x = states(mixture, 0.7, 0.7, n=11)
    t = torch.linspace(0.1, 0.9, 11, dtype=torch.float64)
    whole = mixture.eps(x, t, 1 - t), mixture.log_prob(x, t, 1 - t)
    monkeypatch.setattr("bench.mixture._CHUNK", 3 * mixture.means.numel())
    chunked = mixture.eps(x, t, 1 - t), mixture.log_prob(x, t, 1 - t)
    torch.testing.assert_close(chunked, whole, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", MIXTURES)
def test_levels_as_tensors(name):
    mixture = MIXTURES[name]
    x = states(mixture, 0.8, 0.6)
    alpha, sigma = torch.linspace(0.1, 1.0, 8, dtype=torch.float64), torch.linspace(1.0, 0.1, 8, dtype=torch.float64)
    each = torch.cat([mixture.eps(x[i : i + 1], float(alpha[i]), float(sigma[i])) for i in range(8)])
    torch.testing.assert_close(mixture.eps(x, alpha, sigma), each, rtol=1e-11, atol=1e-11)
    same = mixture.eps(x, rowwise(0.8, 8), torch.tensor(0.6))
    torch.testing.assert_close(same, mixture.eps(x, 0.8, 0.6), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", [vp_linear(), cosine(), edm(), flow()], ids=lambda s: s.name)
def test_net_uses_the_schedule(schedule):
    mixture = GaussianMixture.random()
    t = torch.linspace(schedule.t_min, schedule.t_max, 6, dtype=torch.float64)
    x = normal(6, 2)
    eps = mixture.net(schedule)(x, t)
    torch.testing.assert_close(eps, mixture.eps(x, schedule.alpha(t), schedule.sigma(t)), rtol=0, atol=0)
    assert mixture.net(schedule)(x.float(), t.float()).dtype == torch.float32
    model = EpsModel(mixture.net(schedule), schedule, predicts="eps")
    assert torch.equal(model(x, t), eps)


@pytest.mark.parametrize("name", MIXTURES)
def test_samples_have_the_exact_moments(name):
    mixture, n = MIXTURES[name], 20000
    x = mixture.sample(n, seed=3)
    assert x.shape == (n, *mixture.shape)
    flat, covariance = x.flatten(1), mixture.covariance()
    # standard scores: chance alone stays below 4.5, a wrong moment gives tens
    score = (flat.mean(0) - mixture.mean()) / (covariance.diagonal() / n).sqrt()
    assert score.abs().max() < 4.5
    products = (flat - mixture.mean())[:, :8, None] * (flat - mixture.mean())[:, None, :8]
    score = (products.mean(0) - covariance[:8, :8]) / (products.std(0) / n**0.5)
    assert score.abs().max() < 4.5


def test_covariance_from_its_definition():
    mixture = MIXTURES["low-rank"]
    centred = mixture.means - mixture.weights @ mixture.means
    within = (mixture.weights[:, None, None] * covariances(mixture)).sum(0)
    expected = within + centred.T @ torch.diag(mixture.weights) @ centred
    torch.testing.assert_close(mixture.covariance(), expected, rtol=1e-12, atol=1e-12)


def test_samples_follow_the_density():
    """Cells of a one-dimensional mixture: chi-square of counts against probabilities from `log_prob`."""
    mixture = GaussianMixture.isotropic([[-1.0], [0.5]], [0.3, 0.2], [0.3, 0.7])
    edges = np.linspace(-2.5, 1.5, 33)
    fine = torch.linspace(-2.5, 1.5, 32 * 200 + 1, dtype=torch.float64)
    density = mixture.log_prob(fine[:, None]).exp()
    probability = (0.5 * (density[1:] + density[:-1]) * (fine[1] - fine[0])).view(32, 200).sum(1).numpy()
    assert probability.sum() == pytest.approx(1.0, abs=1e-5)
    counts = np.histogram(mixture.sample(20000, seed=2).numpy(), edges)[0]
    used = probability > 5 / 20000
    statistic = ((counts - 20000 * probability)[used] ** 2 / (20000 * probability[used])).sum()
    assert stats.chi2(used.sum() - 1).sf(statistic) > 1e-3


def test_sample_is_a_function_of_seed_and_index():
    mixture = MIXTURES["low-rank"]
    assert torch.equal(mixture.sample(5, seed=1), mixture.sample(50, seed=1)[:5])
    assert not torch.equal(mixture.sample(5, seed=1), mixture.sample(5, seed=2))
    assert mixture.sample(0).shape == (0, 6)
    assert mixture.eps(mixture.sample(0), 1.0, 1.0).shape == (0, 6)


@pytest.mark.parametrize(("dim", "components"), [(1, 1), (2, 5), (2, 25), (20, 3)])
def test_random_is_centred_of_unit_scale_and_spread(dim, components):
    mixture = GaussianMixture.random(dim, components, seed=4)
    assert mixture.shape == (dim,)
    assert mixture.mean().abs().max() < 1e-12
    assert float(mixture.covariance().trace()) / dim == pytest.approx(1.0, rel=1e-12)
    if components > 1:
        distance = torch.pdist(mixture.means).min()
        assert distance > 0.3
    if dim > 1:
        assert mixture.variances.amax(1).div(mixture.variances.amin(1)).max() > 2
    assert torch.equal(mixture.means, GaussianMixture.random(dim, components, seed=4).means)
    assert not torch.equal(mixture.weights, GaussianMixture.random(dim, components, seed=5).weights) or components == 1


def test_from_covariances_keeps_them():
    root = normal(3, 4, 4)
    given = root @ root.mT
    mixture = GaussianMixture.from_covariances([0.2, 0.3, 0.5], normal(3, 2, 2), given)
    torch.testing.assert_close(covariances(mixture), given, rtol=1e-12, atol=1e-12)
    assert repr(mixture) == "GaussianMixture(components=3, shape=(2, 2), rank=4)"


def test_the_mixture_owns_its_numbers():
    means = normal(2, 3)
    mixture = GaussianMixture.isotropic(means, 1.0)
    before = mixture.mean()
    means += 1.0
    assert torch.equal(mixture.mean(), before)


def test_gradients_after_inference_mode():
    mixture = GaussianMixture.random(seed=8)
    with torch.inference_mode():
        mixture.eps(torch.zeros(1, 2), 1.0, 1.0)
    x = torch.zeros(1, 2, requires_grad=True)
    mixture.eps(x, 1.0, 1.0).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_non_contiguous_states():
    mixture = GaussianMixture.random(40, 7)
    x = normal(40, 100).T
    assert torch.equal(mixture.eps(x, 0.5, 0.5), mixture.eps(x.contiguous(), 0.5, 0.5))


ONE = ([[0.0, 0.0]],)
HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianMixture([0.5, 0.4], normal(2, 2), [1.0, 1.0]), r"weights must.*add up to 1.*a sum 0\.9"),
        (lambda: GaussianMixture([1.5, -0.5], normal(2, 2), [1.0, 1.0]), r"weights must be positive.*lowest -0\.5"),
        (lambda: GaussianMixture([], normal(0, 2), []), r"weights must be \(K,\)"),
        (lambda: GaussianMixture([1.0], [[math.nan, 0.0]], [1.0]), "means must be finite"),
        (lambda: GaussianMixture([1.0], [0.0], [1.0]), r"means must be \(1, \*shape\)"),
        (lambda: GaussianMixture([0.5, 0.5], *ONE, [1.0]), r"means must be \(2, \*shape\).*got \(1, 2\)"),
        (lambda: GaussianMixture([1.0], *ONE, [-1.0]), "residual must be at least 0, got -1"),
        (lambda: GaussianMixture([1.0], *ONE, [1.0, 1.0]), r"residual must be of shape \(1,\), got \(2,\)"),
        (lambda: GaussianMixture([1.0], *ONE, [1.0], [[[1.0], [0.0]]]), "basis and variances go together, got basis"),
        (lambda: GaussianMixture([1.0], *ONE, [1.0], None, [[1.0]]), "go together, got variances alone"),
        (lambda: GaussianMixture([1.0], *ONE, [1.0], [[[1.0], [1.0]]], [[1.0]]), "orthonormal columns.*differs"),
        (lambda: GaussianMixture([1.0], *ONE, [1.0], [[[1.0, 0.0, 0.0]]], [[1.0]]), "basis must be.*got"),
        (lambda: GaussianMixture([1.0], *ONE, [1.0], [[[HALF], [HALF]]], [[-1.0]]), "variances must be at least 0"),
        (lambda: GaussianMixture([1.0], *ONE, [1.0], [[[HALF], [HALF]]], [[1.0, 1.0]]), r"variances.*got \(1, 2\)"),
        (lambda: GaussianMixture.isotropic(*ONE, -0.1), r"std must be at least 0, got -0\.1"),
        (lambda: GaussianMixture.isotropic(*ONE, [0.1, 0.2]), r"std must be of shape \(1,\), got \(2,\)"),
        (lambda: GaussianMixture.from_covariances([1.0], *ONE, [[1.0, 0.0]]), r"covariances must be \(K, D, D\)"),
        (lambda: GaussianMixture.from_covariances([1.0], *ONE, [[[1.0, 0.5], [0.0, 1.0]]]), "must be symmetric"),
        (lambda: GaussianMixture.from_covariances([1.0], *ONE, [[[1.0, 2.0], [2.0, 1.0]]]), "semi-definite.*-1"),
        (lambda: GaussianMixture.random(dim=0), "dim must be at least 1, got 0"),
        (lambda: GaussianMixture.random(components=0), "components must be at least 1, got 0"),
        (lambda: GaussianMixture.random(seed=-1), "seed"),
        (lambda: GaussianMixture.random().sample(-1), "n must be at least 0, got -1"),
        (lambda: GaussianMixture.random().eps(torch.zeros(2, 3), 1.0, 1.0), r"x must be \(B, 2\).*got \(2, 3\)"),
        (lambda: GaussianMixture.random().eps(torch.zeros(2, 2).long(), 1.0, 1.0), "floating dtype.*int64"),
        (lambda: GaussianMixture.random().eps(torch.zeros(2, 2), -1.0, 1.0), "alpha must be finite and at least 0"),
        (lambda: GaussianMixture.random().eps(torch.zeros(2, 2), 1.0, math.nan), "sigma must be finite.*nan"),
        (lambda: GaussianMixture.random().eps(torch.zeros(2, 2), torch.ones(3), 1.0), r"alpha must be.*\(3,\)"),
        (lambda: GaussianMixture.random().log_prob(torch.zeros(2, 2), 0.0, 0.0), "sigma must be positive where"),
        (lambda: GaussianMixture.isotropic(*ONE, 0.0).log_prob(torch.zeros(2, 2)), "sigma must be positive where"),
        (lambda: low_rank(residual=0.0).eps(torch.zeros(2, 6), 1.0, 0.0), "sigma must be positive where"),
    ],
)
def test_bad_input_names_what_is_accepted(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sigma_zero_where_the_density_exists():
    mixture = GaussianMixture.random()
    x = mixture.sample(4)
    assert torch.equal(mixture.eps(x, 1.0, 0.0), torch.zeros_like(x))
    torch.testing.assert_close(mixture.x0(x, 1.0, 0.0), x, rtol=1e-12, atol=1e-12)
