"""Linear inverse problems on Gaussians, where the posterior is known."""

from __future__ import annotations

import pytest
import torch

from samplers import EpsModel, list_samplers, make_plan, sample, schedules, tasks
from samplers.tasks import Blur, Downsample, Grey, Mask, Matrix
from samplers.tasks.inverse import METHODS

VP, EDM, FLOW = schedules.vp_linear(), schedules.edm(), schedules.flow()
SCHEDULES = {"vp": VP, "edm": EDM, "flow": FLOW}
ALL = {s.name: s for s in list_samplers()}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = randn(2, 3, 8, 8)
OPERATORS = {
    "mask": Mask(torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.5),
    "downsample": Downsample(4),
    "grey": Grey(),
    "blur": Blur.gaussian(0.6),
    "matrix": Matrix(randn(20, 192, seed=1), (3, 8, 8)),
}


def gaussian(schedule, mean=0.0, std=1.0):
    """Independent normal numbers: x0 is the posterior mean."""

    def x0(x, t):
        t = t.double().view(-1, *[1] * (x.ndim - 1))
        a, s = schedule.alpha(t), schedule.sigma(t)
        return mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)

    return EpsModel(x0, schedule, "x0")


def as_matrix(operator):
    eye = torch.eye(192, dtype=torch.float64).view(192, 3, 8, 8)
    return operator(eye).flatten(1).T


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_pseudo_inverse_is_that_of_the_matrix(name, ridge):
    operator = OPERATORS[name]
    a, y = as_matrix(operator), operator(X)
    if ridge:
        inverse = a.T @ torch.linalg.inv(a @ a.T + ridge * torch.eye(len(a), dtype=torch.float64))
    else:
        inverse = torch.linalg.pinv(a)
    torch.testing.assert_close(y.flatten(1), X.flatten(1) @ a.T)
    torch.testing.assert_close(operator.pinv(y, ridge), (y.flatten(1) @ inverse.T).view_as(X), rtol=1e-8, atol=1e-8)
    column = torch.tensor([ridge, ridge], dtype=torch.float64)
    torch.testing.assert_close(operator.pinv(y, column), operator.pinv(y, ridge))
    torch.testing.assert_close(operator(operator.pinv(y)), y, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", [n for n in OPERATORS if n != "mask"])
def test_gain_is_the_mean_eigenvalue(name):
    a = as_matrix(OPERATORS[name])
    assert OPERATORS[name].gain == pytest.approx(float((a * a).sum()) / len(a))


def test_blur_is_a_convolution():
    kernel = randn(3, 5)
    wrapped = torch.nn.functional.pad(X, (2, 2, 1, 1), mode="circular")
    weight = kernel.flip(0, 1).expand(3, 1, 3, 5)
    torch.testing.assert_close(Blur(kernel)(X), torch.nn.functional.conv2d(wrapped, weight, groups=3))
    odd = Blur(kernel)(X[..., :7])
    assert odd.shape == (2, 3, 8, 7)
    assert Blur.gaussian(1.0).kernel.shape == (7, 7)
    constant = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(Blur.gaussian(1.0)(constant), constant)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_ddnm_gives_the_measurement_with_every_sampler(name, schedule):
    where = {} if ALL[name].adaptive else {"steps": 5}
    for operator in (OPERATORS["downsample"], OPERATORS["blur"]):
        result = tasks.restore(gaussian(schedule), operator, operator(X), name, **where)
        assert float((operator(result.x) - operator(X)).abs().max()) < 1e-10
    seen = OPERATORS["downsample"]
    assert (tasks.restore(gaussian(schedule), seen, seen(X), name, **where).x - X).abs().max() > 0.1


@pytest.mark.parametrize("name", OPERATORS)
def test_ddnm_is_exact_on_independent_gaussians(name):
    """What the measurement does not see keeps the prior's distribution, what it sees is fixed: the posterior."""
    operator, model = OPERATORS[name], gaussian(VP)
    x_T = randn(2, 3, 8, 8, seed=5)
    free = sample(model, "dpmpp-3s", x_T=x_T, steps=40, grid="logsnr")
    got = tasks.restore(model, operator, operator(X), "dpmpp-3s", x_T=x_T, steps=40, grid="logsnr").x
    expected = free + operator.pinv(operator(X) - operator(free))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in OPERATORS if n != "mask"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_pigdm_samples_the_posterior_of_a_unit_gaussian(name, schedule, noise):
    """For N(mean, I) and any linear map the guided flow ends in the exact posterior: its mean, and from noise z the map of its
    covariance's symmetric root."""
    operator, mean = OPERATORS[name], 0.4
    model, y = gaussian(schedule, mean), operator(X)
    a = as_matrix(operator)
    precision = torch.eye(192, dtype=torch.float64) + a.T @ a / noise**2
    centre = torch.linalg.solve(
        precision, (torch.full((192,), mean, dtype=torch.float64) + (y.flatten(1) / noise**2) @ a).T
    ).T
    sigma_T = float(schedule.sigma(schedule.t_max))
    guided = tasks.pigdm(model, operator, y, noise)
    z = randn(2, 3, 8, 8, seed=3)
    both = [sample(guided, "rk45", x_T=sign * sigma_T * z, rtol=1e-5, atol=1e-5) for sign in (1, -1)]
    middle, half = (both[0] + both[1]) / 2, (both[0] - both[1]).flatten(1) / 2
    # p at t_min, and the start without what is left of the mean, differ from this by their alpha and sigma
    tolerance = 0.005 if schedule is FLOW else 0.02
    torch.testing.assert_close(middle.flatten(1), centre, rtol=tolerance, atol=tolerance)
    values, vectors = torch.linalg.eigh(precision)
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    torch.testing.assert_close(half, z.flatten(1) @ root, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    "operator", [Mask(torch.arange(4) < 2), Matrix(torch.eye(4)[:2], (4,))], ids=["mask", "matrix"]
)
def test_dps_is_pigdm_where_the_operators_rows_are_orthonormal(operator):
    model, y = gaussian(VP), operator(randn(3, 4))
    x = randn(3, 4, seed=2)
    for noise in (0.0, 0.5):
        guided, pinv = tasks.dps(model, operator, y, noise), tasks.pigdm(model, operator, y, noise)
        torch.testing.assert_close(guided.x0(x, 0.5), pinv.x0(x, 0.5))
        times = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        torch.testing.assert_close(
            guided.x0(x, times)[1:2],
            guided.x0(x[1:2], 0.5) if len(y) == 1 else tasks.dps(model, operator, y[1:2], noise).x0(x[1:2], 0.5),
        )


def test_dps_takes_measurements_that_are_not_linear():
    model = gaussian(VP)
    y = torch.full((4, 2), 0.8, dtype=torch.float64)
    guided = tasks.dps(model, torch.tanh, y, noise=0.05)
    x = sample(guided, "ddim", shape=None, x_T=randn(4, 2), steps=100, grid="logsnr")
    free = sample(model, "ddim", x_T=randn(4, 2), steps=100, grid="logsnr")
    assert (x.tanh() - y).square().mean() < 0.1 * (free.tanh() - y).square().mean()


@pytest.mark.slow
def test_on_a_mixture_the_gradient_helps_and_resampling_helps_more(mixture):
    """One of two coordinates is measured; how likely are the restored pairs, between true ones and random ones?"""
    model, truth = EpsModel(mixture.net(VP), VP), mixture.sample(400)
    operator = Mask(torch.tensor([True, False]))

    def score(x):
        return float(mixture.log_prob(x).mean())

    found = {m: tasks.restore(model, operator, operator(truth), "ddpm", method=m, steps=60, seed=2).x for m in METHODS}
    assert torch.equal(found["ddnm"][:, 0], truth[:, 0])
    for method in ("pigdm", "dps"):
        assert float((found[method][:, 0] - truth[:, 0]).square().mean().sqrt()) < 0.08
    random = torch.stack([truth[:, 0], truth.roll(1, 0)[:, 1]], 1)
    assert score(random) + 5 < score(found["ddnm"]) < score(found["pigdm"]) < score(truth)
    how = {"steps": 60, "resamplings": 10, "jump": 5}
    repainted = tasks.inpaint(model, operator(truth), torch.tensor([False, True]), "ddpm", **how).x
    assert score(repainted) == pytest.approx(score(truth), abs=0.3)
    travelled = tasks.restore(
        model, operator, operator(truth), "ddpm", **how
    ).x  # a mask is the projection of `inpaint`
    assert score(travelled) == pytest.approx(score(truth), abs=0.3)
    fresh = tasks.restore(model, operator, operator(truth), "consistency", steps=60).x
    assert score(fresh) == pytest.approx(score(truth), abs=0.3)


def test_ddnm_as_published_but_all_noise_fresh(mixture):
    """The step of its authors' code, `x' = alpha' x0 + sigma' (eta z + sqrt(1 - eta^2) eps)`, by hand at eta = 1."""
    model, truth = EpsModel(mixture.net(VP), VP), mixture.sample(8)
    operator, noises = Mask(torch.tensor([True, False])), [randn(8, 2, seed=k) for k in range(6)]
    plan = make_plan("consistency", VP, steps=6, final="zero")
    x = plan.sigma_T * randn(8, 2, seed=9)
    how = {"x_T": x, "noise_source": lambda k, like: noises[k]}
    found = tasks.restore(model, operator, operator(truth), "consistency", steps=6, final="zero", **how)
    for k, (t, end) in enumerate(zip(plan.times, plan.times[1:], strict=False)):
        x0 = model.x0(x, t)
        x0 = torch.stack([truth[:, 0], x0[:, 1]], 1)
        x = VP.alpha(end) * x0 + VP.sigma(end) * noises[k] if k < 5 else x0
    torch.testing.assert_close(found.x, x, rtol=1e-9, atol=1e-9)


def test_time_travel_counts_its_calls():
    operator = OPERATORS["downsample"]
    result = tasks.restore(gaussian(VP), operator, operator(X), "dpmpp-2m", nfe=40, resamplings=2, jump=2)
    assert 30 < result.nfe <= 40
    assert result.nfe == result.plan.nfe
    assert result.plan.sampler == "dpmpp-2m+resampled"
    torch.testing.assert_close(operator(result.x), operator(X))
    with pytest.raises(ValueError, match="jump must be a whole number, 1 to 4, less than the grid's 5 steps, got 5"):
        tasks.restore(gaussian(VP), operator, operator(X), "ddim", steps=5, resamplings=2, jump=5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_methods_run_with_every_sampler(method):
    operator, failed = OPERATORS["downsample"], {}
    for name, entry in ALL.items():
        where = {} if entry.adaptive else {"steps": 10}
        result = tasks.restore(gaussian(VP), operator, operator(X), name, method=method, noise=0.1, **where)
        free = sample(gaussian(VP), name, x_T=randn(2, 3, 8, 8, seed=9), **where)
        share = (operator(result.x) - operator(X)).square().mean() / (operator(free) - operator(X)).square().mean()
        # what the measurement does not see stays varied; "consistency" gives x0 of the last node, which is a mean
        unseen = result.x - operator.pinv(operator(result.x))
        if not share < 0.3 or not 0.2 < float(unseen.square().mean()) < 2:
            failed[name] = float(share), float(unseen.square().mean())
    assert not failed


def test_noise_is_not_fitted():
    """With noise of the prior's size the restored mean lies between prior and measurement."""
    operator = Mask(torch.ones(4))
    y = torch.full((1, 4), 2.0, dtype=torch.float64)
    x = tasks.restore(gaussian(VP), operator, y.expand(2000, 4), "rk45", method="pigdm", noise=1.0).x
    assert float(x.mean()) == pytest.approx(1.0, abs=0.05)
    assert float(x.std()) == pytest.approx(0.5**0.5, abs=0.03)


def test_super_resolution():
    small = Downsample(2)(X)
    result = tasks.super_resolution(gaussian(VP), small, "dpmpp-2m", factor=2, nfe=8)
    assert result.x.shape == X.shape
    assert result.nfe == 8
    torch.testing.assert_close(Downsample(2)(result.x), small)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "ddmn"}, ValueError, "unknown method 'ddmn'; did you mean 'ddnm'"),
        ({"noise": -1.0}, ValueError, "noise must be finite and at least 0, got -1"),
        ({"scale": 2.0}, ValueError, "scale is of methods 'pigdm' and 'dps'"),
        ({"method": "dps", "scale": -2.0}, ValueError, "scale must be finite and at least 0, got -2"),
        ({"operator": lambda x: x}, TypeError, "operator must be a samplers.tasks operator"),
        ({"y": torch.zeros(2, 3, 2)}, ValueError, r"y must be \(B, C, H, W\), got \(2, 3, 2\)"),
        ({"operator": Grey()}, ValueError, r"y must be \(B, 1, H, W\), got \(2, 3, 2, 2\)"),
        ({"operator": OPERATORS["matrix"], "y": torch.zeros(2, 3)}, ValueError, r"y must be \(B, 20\), got \(2, 3\)"),
        ({"x_T": torch.zeros(2, 3, 4, 4)}, ValueError, r"x_T must be \(2, 3, 8, 8\)"),
    ],
)
def test_mistakes(change, error, message):
    operator = OPERATORS["downsample"]
    arguments = {"operator": operator, "y": operator(X), "sampler": "ddim", "steps": 2} | change
    with pytest.raises(error, match=message):
        tasks.restore(gaussian(VP), **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Downsample(0), "factor must be a whole number, at least 1, got 0"),
        (lambda: Grey((0.0, 0.0)), "weights must be finite numbers, not all 0"),
        (lambda: Blur(torch.ones(2, 3)), r"kernel must be a tensor \(h, w\) with odd sides, got \(2, 3\)"),
        (lambda: Blur(torch.zeros(3, 3)), "kernel must be of finite"),
        (lambda: Blur.gaussian(-1.0), "std must be positive"),
        (
            lambda: Matrix(torch.zeros(2, 3), (2, 2)),
            r"matrix must be \(m, 4\) for samples of shape \(2, 2\), got \(2, 3\)",
        ),
        (lambda: Mask(torch.full((2,), 0.5)), "known must be a tensor of bool, or of 0 and 1"),
        (lambda: Downsample(3)(X), r"x must be \(B, C, H, W\) with sides divisible by 3, got \(2, 3, 8, 8\)"),
        (lambda: Blur(torch.ones(9, 9))(X), r"kernel \(9, 9\) must fit into the image"),
    ],
)
def test_operators_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        (Mask(torch.ones(8, 8, device="meta") > 0), "known"),
        (Blur(torch.ones(3, 3, device="meta")), "kernel"),
        (Matrix(torch.ones(20, 192, device="meta"), (3, 8, 8)), "matrix"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_operators_on_another_device(operator, name):
    y = X[:, 0, 0, :1].expand(2, 20) if name == "matrix" else X
    for call in (
        lambda: operator(X),
        lambda: operator.pinv(y),
        lambda: tasks.restore(gaussian(VP), operator, y, "ddim", steps=2),
        lambda: tasks.dps(gaussian(VP), operator, y).x0(X, 0.5),
    ):
        with pytest.raises(ValueError, match=f"^{name} is on meta, the samples on cpu; move one of them"):
            call()


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (Mask(torch.ones(7, 8) > 0), r"known must broadcast against the samples, \(2, 3, 8, 8\), got \(7, 8\)"),
        (Mask(torch.ones(5, 2, 3, 8, 8) > 0), r"known must broadcast against the samples, .* got \(5, 2, 3, 8, 8\)"),
        (Matrix(torch.ones(20, 12), (3, 2, 2)), r"x must be \(B, 3, 2, 2\), got \(2, 3, 8, 8\)"),
    ],
)
def test_operators_on_samples_of_another_size(operator, message):
    with pytest.raises(ValueError, match=message):
        operator(X)


def test_a_measurement_of_another_batch():
    model = tasks.ddnm(gaussian(VP), Downsample(4), torch.zeros(3, 3, 2, 2, dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"y must be of the shape that the operator gives, \(2, 3, 2, 2\), got \(3, 3, 2, 2\)"
    ):
        model.x0(X, 0.5)
    one = tasks.ddnm(gaussian(VP), Downsample(4), torch.zeros(1, 3, 2, 2, dtype=torch.float64))
    assert one.x0(X, 0.5).shape == X.shape
