"""Exact likelihood against the mixture's true density, in closed form at every level."""

from __future__ import annotations

import math

import pytest
import torch

from bench.mixture import GaussianMixture
from samplers import EpsModel, SamplingError, schedules, tasks

VP, EDM, FLOW = schedules.vp_linear(), schedules.edm(), schedules.flow()
SCHEDULES = {"vp": VP, "edm": EDM, "flow": FLOW, "cosine": schedules.cosine(), "discrete": None}
SCHEDULES["discrete"] = schedules.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
TIGHT = {"rtol": 1e-6, "atol": 1e-6}


def level(schedule, t):
    return float(schedule.alpha(t)), float(schedule.sigma(t))


@pytest.fixture(scope="module")
def centred():
    return GaussianMixture.random(dim=2, components=3, seed=0)


def states(mixture, schedule, n=12):
    alpha, sigma = level(schedule, schedule.t_min)
    noise = torch.randn(n, *mixture.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return alpha * mixture.sample(n) + sigma * noise


def v_model(mixture, schedule):
    def net(x, t):
        alpha, sigma = schedule.alpha(t.double()), schedule.sigma(t.double())
        a, s = (v.view(-1, *[1] * (x.ndim - 1)) for v in (alpha, sigma))
        return (a * mixture.eps(x, alpha, sigma) - s * mixture.x0(x, alpha, sigma)).to(x.dtype)

    return EpsModel(net, schedule, "v")


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_log_density_is_the_mixtures_to_a_thousandth_of_a_nat(centred, schedule):
    x = states(centred, schedule)
    true = centred.log_prob(x, *level(schedule, schedule.t_min))
    found = tasks.log_likelihood(v_model(centred, schedule), x, divergence="exact", **TIGHT)
    torch.testing.assert_close(found.log_p, true, rtol=0, atol=1e-3)
    assert found.log_p.dtype == torch.float64
    assert (found.error == 0).all()
    assert found.nfe > 20


@pytest.mark.parametrize(
    ("schedule", "dim", "probes"),
    [*((name, 2, 2) for name in SCHEDULES), ("vp", 3, 4), ("vp", 8, 8), ("flow", 8, 8)],
)
def test_hutchinsons_estimator_gives_it_to_a_thousandth_of_a_nat_with_all_orthogonal_probes(schedule, dim, probes):
    """As many as dimensions, or as the next power of two; every sample has its own order and signs of them."""
    mixture, schedule = GaussianMixture.random(dim=dim, components=3, seed=0), SCHEDULES[schedule]
    x = states(mixture, schedule)
    how = {"divergence": "estimate", "kind": "hadamard", **TIGHT}
    found = tasks.log_likelihood(v_model(mixture, schedule), x, probes=probes, **how)
    true = mixture.log_prob(x, *level(schedule, schedule.t_min))
    torch.testing.assert_close(found.log_p, true, rtol=0, atol=1e-3)
    assert (found.error == 0).all()
    fewer = tasks.log_likelihood(v_model(mixture, schedule), x, probes=probes - 1, **how)
    assert (fewer.log_p - true).abs().max() > 1e-2


def test_variance_of_the_probes():
    """As documented: of a normal, whose Jacobian is the same at every state."""
    root = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    normal = GaussianMixture.from_covariances([1.0], torch.zeros(1, 4), (root @ root.mT)[None])
    one = states(normal, VP, 1)
    x, model, count = one.expand(3000, 4), v_model(normal, VP), 3000
    true = float(tasks.log_likelihood(model, one, divergence="exact").log_p)
    variance, trusted = {}, {}
    for kind, probes in (("rademacher", 1), ("rademacher", 3), ("hadamard", 1), ("hadamard", 2), ("hadamard", 3)):
        found = tasks.log_likelihood(model, x, kind=kind, probes=probes, rtol=1e-3, atol=1e-3)
        off = found.log_p - true
        assert abs(float(off.mean())) < 4 * float(off.std()) / count**0.5 + 1e-2  # no bias
        variance[kind, probes], trusted[kind, probes] = float(off.var()), float(found.error.square().mean())
    single = variance["rademacher", 1]
    assert variance["rademacher", 3] == pytest.approx(single / 3, rel=0.1)
    for probes in (1, 2, 3):
        assert variance["hadamard", probes] == pytest.approx(single / probes * (4 - probes) / 3, rel=0.1)
    for key in trusted:
        if key[1] > 1:
            assert trusted[key] == pytest.approx(variance[key], rel=0.1)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_a_network_of_half_precision_costs_its_own_rounding_only(centred, dtype, error):
    x = states(centred, VP).to(dtype)
    true = centred.log_prob(x.double(), *level(VP, VP.t_min))
    found = tasks.log_likelihood(v_model(centred, VP), x, divergence="exact")
    torch.testing.assert_close(found.log_p, true, rtol=0, atol=error)
    assert found.x_T.dtype == dtype


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_true_prior_leaves_the_integrators_error_alone(mixture, schedule):
    """Data whose mean is not 0 has a trace of it left in the start noise, which N(0, sigma_T^2) does not know."""
    x, end = states(mixture, schedule), level(schedule, schedule.t_max)
    true = mixture.log_prob(x, *level(schedule, schedule.t_min))
    model = v_model(mixture, schedule)
    exact = tasks.log_likelihood(model, x, divergence="exact", prior=lambda v: mixture.log_prob(v, *end), **TIGHT)
    torch.testing.assert_close(exact.log_p, true, rtol=0, atol=5e-5)
    usual = tasks.log_likelihood(model, x, divergence="exact", **TIGHT)
    off = float((usual.log_p - true).abs().max())
    reach = end[0] / end[1] * float(mixture.mean().norm())  # what is left of the mean, in standard deviations
    assert off < 4 * reach + 1e-4
    assert off > 0.3 * reach


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("schedule", [VP, EDM, FLOW], ids=["vp", "edm", "flow"])
def test_hutchinsons_estimate_is_within_its_error(centred, schedule, kind):
    x = states(centred, schedule)
    found = tasks.log_likelihood(v_model(centred, schedule), x, probes=48, kind=kind)
    true = centred.log_prob(x, *level(schedule, schedule.t_min))
    assert (found.error > 0).all()
    assert ((found.log_p - true).abs() < 4 * found.error + 1e-3).all()
    assert float(((found.log_p - true) / found.error).square().mean()) < 2.5  # no more often off than by chance


def test_rademacher_is_exact_where_the_jacobian_is_diagonal():
    """Independent coordinates: e^T J e is the trace for every e of ones and minus ones; not for Gaussian ones."""
    normal = GaussianMixture.isotropic(torch.zeros(1, 3), 0.7)
    x = states(normal, VP)
    model = v_model(normal, VP)
    true = normal.log_prob(x, *level(VP, VP.t_min))
    one = tasks.log_likelihood(model, x, **TIGHT)
    torch.testing.assert_close(one.log_p, true, rtol=0, atol=1e-3)
    assert one.error.isnan().all()
    gaussian = tasks.log_likelihood(model, x, kind="gaussian", **TIGHT)
    assert (gaussian.log_p - true).abs().max() > 0.1


def test_images_and_bits(centred):
    mixture = GaussianMixture.isotropic(torch.zeros(1, 1, 2, 2), 0.5)
    x = states(mixture, VP, 3)
    found = tasks.log_likelihood(v_model(mixture, VP), x, divergence="exact", **TIGHT)
    assert found.x_T.shape == x.shape
    expected = -found.log_p / (4 * math.log(2)) + math.log2(127.5)
    torch.testing.assert_close(found.bits_per_dimension(), expected)
    # a density that is uniform on [-1, 1] codes 256 levels with 8 bits, up to the half level at each end
    uniform = tasks.bits_per_dimension(torch.tensor(4 * math.log(0.5)), 4)
    assert float(uniform) == pytest.approx(math.log2(255), abs=1e-6)


def test_the_noise_is_where_the_sampler_starts(exact, mixture):
    from samplers import sample

    x = states(mixture, EDM)
    found = tasks.log_likelihood(exact(EDM), x, **TIGHT)
    torch.testing.assert_close(sample(exact(EDM), "rk45", x_T=found.x_T, **TIGHT), x, rtol=1e-3, atol=1e-3)


def test_probes_belong_to_the_samples(exact, mixture):
    x = states(mixture, VP, 6)
    whole = tasks.log_likelihood(exact(VP), x, seed=3, probes=2, **TIGHT)
    part = tasks.log_likelihood(exact(VP), x[4:], seed=3, probes=2, indices=torch.tensor([4, 5]), **TIGHT)
    torch.testing.assert_close(whole.log_p[4:], part.log_p, rtol=0, atol=1e-3)
    other = tasks.log_likelihood(exact(VP), x, seed=4, probes=2, **TIGHT)
    assert (other.log_p - whole.log_p).abs().max() > 1e-2


def test_single_precision(centred):
    x = states(centred, VP)
    found = tasks.log_likelihood(v_model(centred, VP), x.float(), divergence="exact")
    assert found.x_T.dtype == torch.float32
    torch.testing.assert_close(found.log_p, centred.log_prob(x, *level(VP, VP.t_min)), rtol=0, atol=5e-3)


def test_a_network_and_its_gradients_are_left_alone():
    net = torch.nn.Linear(2, 2)
    model = EpsModel(lambda x, t: net(x), VP)
    tasks.log_likelihood(model, torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
    assert net.weight.grad is None


def test_dequantise():
    levels = torch.randint(0, 256, (50, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x = tasks.dequantise(levels, seed=1, dtype=torch.float64)
    assert torch.equal(((x + 1) * 127.5).round().to(torch.int64), levels.to(torch.int64))
    rest = (x + 1) * 127.5 - levels
    assert float(rest.var()) == pytest.approx(1 / 12, rel=0.05)
    assert float(rest.abs().max()) <= 0.5
    torch.testing.assert_close(x[7:8], tasks.dequantise(levels[7:8], 1, torch.tensor([7]), torch.float64))
    with pytest.raises(TypeError, match="levels must be uint8, got torch.float32"):
        tasks.dequantise(levels.float())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"divergence": "exakt"}, ValueError, "unknown divergence 'exakt'; did you mean 'exact'"),
        ({"kind": "rademaker"}, ValueError, "unknown kind 'rademaker'"),
        (
            {"kind": "hadamard", "probes": 3},
            ValueError,
            "probes must be at most 2 of kind 'hadamard' in 2 dimensions, .* got 3",
        ),
        ({"probes": 0}, ValueError, "probes must be a whole number, at least 1, got 0"),
        ({"rtol": 0.0}, ValueError, "rtol must be positive"),
        ({"t_max": 2.0}, ValueError, r"t_min and t_max must be in order within \[0.001, 1\]"),
        ({"t_min": 0.9, "t_max": 0.5}, ValueError, "t_min and t_max must be in order"),
        ({"seed": -1}, ValueError, "seed must be an integer"),
        ({"x": torch.zeros(0, 2)}, ValueError, r"x must be \(B, ...\) with B > 0"),
        ({"x": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "x must be a floating-point tensor"),
        ({"nfe": 10}, SamplingError, "needs more than nfe=10 network calls"),
    ],
)
def test_mistakes(exact, change, error, message):
    arguments = {"x": torch.zeros(3, 2, dtype=torch.float64)} | change
    with pytest.raises(error, match=message):
        tasks.log_likelihood(exact(VP), **arguments)


def test_epsilon_networks_on_schedules_that_end_in_noise(exact, mixture):
    x = states(mixture, FLOW)
    with pytest.raises(ValueError, match="gives no v at t=1"):
        tasks.log_likelihood(exact(FLOW), x)
    end = level(FLOW, 0.999)
    prior = lambda v: mixture.log_prob(v, *end)  # noqa: E731
    found = tasks.log_likelihood(exact(FLOW), x, t_max=0.999, divergence="exact", prior=prior, **TIGHT)
    torch.testing.assert_close(found.log_p, mixture.log_prob(x, *level(FLOW, FLOW.t_min)), rtol=0, atol=1e-3)


def test_nan_is_told():
    model = EpsModel(lambda x, t: x * math.nan, VP)
    with pytest.raises(SamplingError):
        tasks.log_likelihood(model, torch.zeros(2, 2))
