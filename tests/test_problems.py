"""Problems by name, and their judges against samples and closed forms."""

import numpy as np
import pytest
import torch

from bench.metrics import Moments, frechet_distance
from bench.mixture import GaussianMixture
from bench.mixture_file import save_mixture
from bench.problems import CIFAR_MIXTURE, cifar_mixture_problem, load_problem, pixels
from bench.spectral import SpectralMixture
from samplers import EpsModel, sample, schedules


@pytest.fixture
def data(tmp_path):
    """A few smooth images in a file."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (40, 3, 4, 4)).repeat(4, 2).repeat(4, 3)
    images = np.clip(coarse + rng.integers(-20, 20, (40, 3, 16, 16)), 0, 255).astype(np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    return tmp_path / "images.npz"


@pytest.mark.parametrize(("name", "dim"), [("gmm", 2), ("gmm-1", 1), ("gmm-16", 16)])
def test_the_mixture_of_a_dimension(name, dim):
    problem, mixture = load_problem(name), GaussianMixture.random(dim=dim, components=5, seed=0)
    assert (problem.name, problem.shape, problem.metric) == (name, (dim,), "frechet")
    x = torch.randn(4, dim, generator=torch.Generator().manual_seed(0))
    t = torch.full((4,), 0.5)
    assert torch.equal(problem.net(schedules.vp_linear())(x, t), mixture.net(schedules.vp_linear())(x, t))
    np.testing.assert_allclose(problem.reference.covariance, mixture.covariance().numpy())
    assert problem.features(x).shape == (4, dim)


def test_hashes_tell_problems_apart(data):
    names = ["gmm", "gmm-3", "cifar10-gmm", f"ideal:{data}"]
    assert len({load_problem(name).hash for name in names}) == 4


@pytest.mark.parametrize("name", ["gmm-0", "gmm-", "gmm--1", "gmm-1.5", "gmm-two"])
def test_a_dimension_is_a_whole_number(name):
    with pytest.raises(ValueError, match="gmm-D with a dimension D of 1 or more"):
        load_problem(name)


@pytest.mark.parametrize("name", ["mnist", "gmmm", "ideal", "ideal:", "no/such/folder"])
def test_other_names_are_not_problems(name):
    assert load_problem(name) is None


def test_data_that_does_not_exist():
    with pytest.raises(FileNotFoundError, match=r"no/such\.npz"):
        load_problem("ideal:no/such.npz")


def test_pixels_are_a_thumbnail_and_the_middle():
    x = torch.arange(2 * 3 * 32 * 32, dtype=torch.float64).view(2, 3, 32, 32)
    features = pixels(x)
    assert features.shape == (2, 384)
    assert features[1, 9] == x[1, 0, 4:8, 4:8].mean()
    assert torch.equal(features[:, 192:].view(2, 3, 8, 8), x[:, :, 12:20, 12:20])
    assert torch.equal(pixels(x[:, :, :8, :8]), x[:, :, :8, :8].flatten(1))
    assert pixels(x[:, :1, :28, :28]).shape == (2, 128)


def image_mixture(components: int = 3) -> SpectralMixture:
    rng = torch.Generator().manual_seed(0)
    inside = GaussianMixture.isotropic(torch.randn(components, 5, generator=rng), 0.5)
    order = torch.randperm(3 * 12 * 12, generator=rng)
    return SpectralMixture(
        inside, torch.randn(3, 12, 12, generator=rng), order, torch.rand(components, 4, generator=rng)
    )


@pytest.mark.parametrize("kind", ["spectral", "plain"])
def test_the_reference_of_a_mixture_is_that_of_its_samples(kind, tmp_path):
    mixture = image_mixture()
    if kind == "plain":
        means = torch.randn(3, 1, 10, 10, generator=torch.Generator().manual_seed(1))
        mixture = GaussianMixture.isotropic(means, [0.3, 0.5, 0.7], [0.5, 0.3, 0.2])
    save_mixture(tmp_path / "m", mixture, {"made": "here"})
    problem, n = load_problem(str(tmp_path / "m")), 20000
    assert (problem.info, problem.metric, problem.reference.count) == ({"made": "here"}, "fd_pixels", 0)
    sampled, exact = Moments.of(problem.features(problem.sample(n, 1))), problem.reference
    score = (sampled.mean - exact.mean) / np.sqrt(np.diag(exact.covariance) / n)
    assert np.abs(score).max() < 4.5
    error = np.abs(sampled.covariance - exact.covariance) / np.sqrt(np.outer(*[np.diag(exact.covariance)] * 2) / n)
    assert error.max() < 7  # of 400^2 entries, each about a standard score


def test_the_reference_of_an_ideal_denoiser_is_that_of_its_data(data):
    problem = load_problem(f"ideal:{data}")
    images = torch.from_numpy(np.load(data)["images"]).double() / 127.5 - 1
    features = pixels(images).numpy()
    np.testing.assert_allclose(problem.reference.mean, features.mean(0), atol=1e-12)
    np.testing.assert_allclose(problem.reference.covariance, np.cov(features.T, bias=True), atol=1e-12)


def test_a_sampler_ends_in_the_data_of_an_ideal_denoiser(data):
    problem, schedule = load_problem(f"ideal:{data}"), schedules.edm()
    model = EpsModel(problem.net(schedule), schedule)
    x = sample(model, "heun", steps=20, shape=(6, *problem.shape), seed=0)
    images = torch.from_numpy(np.load(data)["images"]).float() / 127.5 - 1
    assert torch.cdist(x.flatten(1), images.flatten(1)).amin(1).max() < 0.1


def test_the_shipped_mixture():
    problem = cifar_mixture_problem()
    assert problem is cifar_mixture_problem()
    assert (problem.name, problem.shape) == ("cifar10-gmm", (3, 32, 32))
    assert sum(file.stat().st_size for file in CIFAR_MIXTURE.iterdir()) < 5_000_000
    assert "JPEG" in problem.info["note"]
    assert problem.info["data"]["train"]["images"] == 50000
    # no overfitting: within a nat in a hundred of what it has for the images it was fitted to
    likelihood = problem.info["log_likelihood"]
    assert likelihood["test"] > 0.98 * likelihood["train"]
    assert problem.sample(8, 0).abs().mean() < 1


def test_more_calls_come_nearer_to_the_shipped_mixture():
    """With exact epsilon the distance falls to that of exact samples."""
    problem, schedule, n = cifar_mixture_problem(), schedules.vp_linear(), 48
    model = EpsModel(problem.net(schedule), schedule)
    shape = (n, *problem.shape)
    few, more = (sample(model, "dpmpp-2m", nfe=nfe, shape=shape, seed=0) for nfe in (3, 12))
    distance = [frechet_distance(Moments.of(problem.features(x)), problem.reference) for x in (few, more)]
    chance = frechet_distance(Moments.of(problem.features(problem.sample(n, 1))), problem.reference)
    assert distance[1] < distance[0]
    assert distance[1] == pytest.approx(chance, rel=0.25)
