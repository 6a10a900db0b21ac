"""The ideal denoiser in blocks of the data against the mixture without width that it equals."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.ideal import ideal_denoiser
from bench.mixture import GaussianMixture
from samplers.model import EpsModel
from samplers.schedule import edm, vp_linear

LEVELS = [(1.0, 0.05), (0.9, 0.4), (0.2, 0.98), (1.0, 80.0), (0.0, 1.0)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


DATA = 0.5 * normal(50, 3, 4, 4)


def states(alpha: float, sigma: float) -> Tensor:
    return alpha * DATA[:9] + sigma * normal(9, 3, 4, 4, seed=1)


@pytest.mark.parametrize("level", LEVELS)
def test_it_is_the_mixture_without_width(level):
    alpha, sigma = level
    x, mixture, ideal = states(alpha, sigma), GaussianMixture.isotropic(DATA, 0.0), ideal_denoiser(DATA, chunk=16)
    torch.testing.assert_close(ideal.x0(x, alpha, sigma), mixture.x0(x, alpha, sigma), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(ideal.eps(x, alpha, sigma), mixture.eps(x, alpha, sigma), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("level", LEVELS)
def test_the_blocks_leave_no_trace(level):
    alpha, sigma = level
    x = states(alpha, sigma)
    whole = ideal_denoiser(DATA, chunk=50).eps(x, alpha, sigma)
    for chunk in (1, 7, 49):
        torch.testing.assert_close(ideal_denoiser(DATA, chunk).eps(x, alpha, sigma), whole, rtol=1e-12, atol=1e-12)


def test_weights_that_underflow_until_the_last_block():
    """The nearest sample comes last: everything summed before it has to vanish, and nothing may become 0 / 0."""
    data = torch.cat([torch.full((20, 2), 100.0), torch.full((20, 2), -100.0), torch.tensor([[3.0, 4.0]])]).double()
    x = torch.tensor([[3.1, 4.0], [0.0, 0.0]]).double()
    x0 = ideal_denoiser(data, chunk=4).x0(x, 1.0, 0.1)
    torch.testing.assert_close(x0, torch.tensor([[3.0, 4.0], [3.0, 4.0]]).double(), rtol=0.0, atol=1e-12)


def test_levels_for_each_row():
    x, ideal = states(0.7, 0.7), ideal_denoiser(DATA, chunk=16)
    alpha, sigma = torch.linspace(0.1, 1.0, 9, dtype=torch.float64), torch.linspace(1.0, 0.1, 9, dtype=torch.float64)
    each = torch.cat([ideal.eps(x[i : i + 1], float(alpha[i]), float(sigma[i])) for i in range(9)])
    torch.testing.assert_close(ideal.eps(x, alpha, sigma), each, rtol=1e-11, atol=1e-11)


def test_bytes_are_images_between_minus_one_and_one():
    images = np.random.default_rng(0).integers(0, 256, (30, 1, 4, 4), dtype=np.uint8)
    wide = torch.from_numpy(images).double() / 127.5 - 1
    x = wide[:5] + 0.3 * normal(5, 1, 4, 4)
    both = ideal_denoiser(images, chunk=8), ideal_denoiser(wide, chunk=8)
    torch.testing.assert_close(both[0].eps(x, 1.0, 0.3), both[1].eps(x, 1.0, 0.3), rtol=1e-12, atol=1e-12)
    assert both[0].samples.dtype == torch.uint8
    torch.testing.assert_close(both[0].sample(9, seed=2), both[1].sample(9, seed=2), rtol=0.0, atol=0.0)


def test_single_precision_keeps_its_digits_at_both_ends():
    ideal = ideal_denoiser(DATA)
    for sigma in (0.002, 80.0):
        x = (DATA[:9] + sigma * normal(9, 3, 4, 4, seed=1)).float()
        exact = GaussianMixture.isotropic(DATA, 0.0).eps(x.double(), 1.0, sigma)
        eps = ideal.eps(x, 1.0, sigma)
        assert eps.dtype == torch.float32
        torch.testing.assert_close(eps.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", [vp_linear(), edm()], ids=lambda s: s.name)
def test_net_uses_the_schedule(schedule):
    ideal = ideal_denoiser(DATA)
    t = torch.linspace(schedule.t_min, schedule.t_max, 9, dtype=torch.float64)
    x = normal(9, 3, 4, 4)
    eps = EpsModel(ideal.net(schedule), schedule, predicts="eps")(x, t)
    torch.testing.assert_close(eps, ideal.eps(x, schedule.alpha(t), schedule.sigma(t)), rtol=1e-12, atol=1e-12)


def test_samples_are_data_and_a_function_of_seed_and_index():
    ideal = ideal_denoiser(DATA)
    x = ideal.sample(200, seed=1)
    assert (x[:, None] == DATA).flatten(2).all(2).any(1).all()
    assert len(x.flatten(1).unique(dim=0)) > 40
    assert torch.equal(ideal.sample(5, seed=1), x[:5])


def test_moments_of_features():
    ideal, linear = ideal_denoiser(DATA, chunk=8), normal(6, 48, seed=4)
    mean, covariance = ideal.moments_of(lambda x: x.flatten(1) @ linear.T)
    features = (DATA.flatten(1) @ linear.T).numpy()
    np.testing.assert_allclose(mean.numpy(), features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance.numpy(), np.cov(features.T, bias=True), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ideal_denoiser(torch.zeros(0, 2)), r"samples must be \(N, \*shape\).*got \(0, 2\)"),
        (lambda: ideal_denoiser(torch.zeros(3, 2, dtype=torch.int64)), "floating or uint8.*int64"),
        (lambda: ideal_denoiser(torch.full((3, 2), math.inf)), "samples must be finite"),
        (lambda: ideal_denoiser(DATA, 0), "chunk must be at least 1, got 0"),
        (lambda: ideal_denoiser(DATA).eps(torch.zeros(2, 3), 1.0, 1.0), r"x must be \(B, 3, 4, 4\)"),
        (lambda: ideal_denoiser(DATA).eps(torch.zeros(2, 3, 4, 4).long(), 1.0, 1.0), "floating dtype"),
        (lambda: ideal_denoiser(DATA).eps(DATA, 1.0, 0.0), "sigma must be positive"),
        (lambda: ideal_denoiser(DATA).sample(-1), "n must be at least 0, got -1"),
    ],
)
def test_bad_arguments_say_what_is_accepted(make, message):
    with pytest.raises(ValueError, match=message):
        make()
