"""The epsilon-model: every parameterisation of one mixture is the same model, and bad networks are refused."""

from __future__ import annotations

import math

import pytest
import torch

from samplers import EpsModel, schedules
from samplers.model import PREDICTIONS

CONTINUOUS = ["vp_linear", "cosine", "edm", "flow"]
on_continuous = pytest.mark.parametrize("schedule", CONTINUOUS, indirect=True)
VP = schedules.vp_linear()


def states(mixture, schedule, t):
    """States (B, 2) at times t (B,) drawn from the forward process."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(t), 2, generator=generator, dtype=torch.float64)
    return schedule.alpha(t)[:, None] * mixture.sample(len(t)) + schedule.sigma(t)[:, None] * noise


def times(schedule):
    end = schedule.t_max if schedule.alpha(schedule.t_max) > 0 else 0.999
    return torch.linspace(schedule.t_min, end, 7, dtype=torch.float64)


@on_continuous
@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("batched", [False, True], ids=["float t", "(B,) t"])
def test_every_parameterisation_is_the_same_model(exact, mixture, schedule, predicts, kind, batched):
    t = times(schedule)
    x, alpha, sigma = states(mixture, schedule, t), schedule.alpha(t), schedule.sigma(t)
    eps, x0 = mixture.eps(x, alpha, sigma), mixture.x0(x, alpha, sigma)
    expected = {"eps": eps, "x0": x0, "v": alpha[:, None] * eps - sigma[:, None] * x0}[kind]
    predict = getattr(exact(schedule, predicts), kind)
    given = predict(x, t) if batched else torch.cat([predict(x[i : i + 1], float(t[i])) for i in range(len(t))])
    assert (given - expected).abs().max() < 1e-10 * max(1.0, float(expected.abs().max()))


def test_calling_the_model_gives_eps_and_passes_conditions():
    def net(x, t, scale, shift=0.0):
        return scale * x + shift

    model = EpsModel(net, VP)
    x = torch.ones(2, 3)
    assert torch.equal(model(x, 0.5, scale=2.0, shift=1.0), torch.full((2, 3), 3.0))
    assert torch.equal(model.eps(x, torch.tensor(0.5), scale=2.0), 2 * x)


@on_continuous
def test_edm_network_is_called_with_its_own_preconditioning(schedule):
    seen = []
    model = EpsModel(lambda x, t: seen.append((x, t)) or x, schedule, predicts="edm", sigma_data=0.7)
    t = times(schedule)
    x = torch.randn(len(t), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model(x, t)
    model(x[2:3], float(t[2]))
    sigma_bar = schedule.sigma_bar(t)
    c_in = (sigma_bar**2 + 0.7**2) ** -0.5
    torch.testing.assert_close(seen[0][0], c_in[:, None] * x / schedule.alpha(t)[:, None], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen[0][1], sigma_bar.log() / 4, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen[1][0], seen[0][0][2:3], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen[1][1], seen[0][1][2:3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("predicts", ["v", "flow", "x0"])
@pytest.mark.parametrize("t", [1.0, torch.ones(4, dtype=torch.float64)], ids=["float t", "(B,) t"])
def test_pure_noise_is_finite(exact, mixture, predicts, t):
    model = exact(schedules.flow(), predicts)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = mixture.mean().expand(4, 2)
    torch.testing.assert_close(model.eps(x, t), x, rtol=0, atol=1e-14)
    torch.testing.assert_close(model.x0(x, t), mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(model.v(x, t), -mean, rtol=0, atol=1e-14)


@pytest.mark.parametrize("predicts", ["eps", "v", "score", "flow"])
@pytest.mark.parametrize("sigma", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("batched", [False, True], ids=["float t", "(B,) t"])
def test_tiny_sigma_keeps_its_digits(exact, mixture, predicts, sigma, batched):
    # an x0-network is left out: eps = (x - alpha x0) / sigma cannot keep them
    schedule = schedules.flow()
    t = torch.full((5,), sigma, dtype=torch.float64)
    x = states(mixture, schedule, t)
    model, t_in = exact(schedule, predicts), t if batched else sigma
    for kind, truth in (("eps", mixture.eps), ("x0", mixture.x0)):
        expected = truth(x, 1 - sigma, sigma)
        torch.testing.assert_close(getattr(model, kind)(x, t_in), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("predicts", ["eps", "v", "flow", "score"])
def test_clean_data_is_its_own_x0(predicts):
    model = EpsModel(lambda x, t: torch.ones_like(x), schedules.flow(), predicts)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(model.x0(x, 0.0), x, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("predicts", "kind", "t"),
    [("eps", "x0", 1.0), ("eps", "v", 1.0), ("score", "x0", 1.0), ("x0", "eps", 0.0), ("x0", "v", 0.0)],
)
def test_what_does_not_follow_is_refused(predicts, kind, t):
    model = EpsModel(lambda x, t: x, schedules.flow(), predicts)
    with pytest.raises(ValueError, match=rf"predicts='{predicts}' gives no {kind} at t={t:g}, where alpha="):
        getattr(model, kind)(torch.ones(1, 2), t)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("t", [0.3, torch.tensor(0.3), torch.full((3,), 0.3)], ids=["float", "0-d", "(B,)"])
def test_time_and_result_dtypes(dtype, expected, t):
    seen = []
    model = EpsModel(lambda x, t: seen.append(t) or x, VP, "v")
    out = model(torch.ones(3, 1, 2, 2, dtype=dtype), t)
    assert seen[0].shape == (3,)
    assert seen[0].dtype == expected
    assert float(seen[0][0]) == pytest.approx(0.3, rel=1e-6)
    assert out.dtype == dtype
    assert out.shape == (3, 1, 2, 2)


@pytest.mark.parametrize("t", [0.25, torch.full((2,), 0.25)], ids=["float", "(B,)"])
def test_time_input_maps_the_time(t):
    seen = []
    EpsModel(lambda x, t: seen.append(t) or x, VP, time_input=lambda t: 1000 * t)(torch.ones(2, 2), t)
    assert seen[0].tolist() == [250.0, 250.0]


def test_weights_are_the_first_parameter():
    net = torch.nn.Linear(2, 2)
    assert EpsModel(net, VP).weights is net.weight
    assert EpsModel(lambda x, t: x, VP).weights is None
    assert EpsModel(torch.nn.Identity(), VP).weights is None


def test_gradients_reach_the_state():
    x = torch.ones(2, 2, requires_grad=True)
    EpsModel(lambda x, t: 3 * x, VP)(x, torch.full((2,), 0.5)).sum().backward()
    assert torch.equal(x.grad, torch.full((2, 2), 3.0))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, VP), TypeError, r"net must be callable as net\(x, t, \*\*cond\), got NoneType"),
        ((math.sin, "vp"), TypeError, "schedule must be .* got str"),
        ((math.sin, VP, "eps", 1000), TypeError, "time_input must be None or callable, got int"),
        ((math.sin, VP, "epsilon"), ValueError, "unknown predicts 'epsilon'; did you mean 'eps'"),
        ((math.sin, VP, "xx0"), ValueError, "unknown predicts 'xx0'; did you mean 'x0'.* accepted: edm, eps, flow"),
    ],
)
def test_bad_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        EpsModel(*arguments)


@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, math.inf])
def test_bad_standard_deviations_of_data(value):
    with pytest.raises(ValueError, match=f"sigma_data must be positive and finite, got {value}"):
        EpsModel(math.sin, VP, "edm", sigma_data=value)


@pytest.mark.parametrize("t", [0.5, torch.full((2,), 0.5)], ids=["float", "(B,)"])
@pytest.mark.parametrize(
    ("net", "error", "message"),
    [
        (lambda x, t: x.mul_(0.5), ValueError, "net must not write to the x it is given"),
        (lambda x, t: x[:, :1], ValueError, r"net must return the shape of x, \(2, 3\), got \(2, 1\)"),
        (lambda x, t: (x,), TypeError, r"net must return a tensor, got tuple; wrap it"),
    ],
)
def test_bad_output(net, error, message, t):
    with pytest.raises(error, match=message):
        EpsModel(net, VP)(torch.ones(2, 3), t)


@pytest.mark.parametrize("shape", [(3,), (2, 1), (1,)])
def test_bad_time_shape(shape):
    with pytest.raises(ValueError, match=r"t must be a float or of shape \(2,\), got"):
        EpsModel(lambda x, t: x, VP)(torch.ones(2, 3), torch.full(shape, 0.5))


@pytest.mark.parametrize(
    ("schedule", "t", "seen"),
    [
        ("vp_linear", math.nan, "alpha=nan"),
        ("discrete", math.nan, "alpha=nan"),
        ("vp_linear", -0.5, "alpha=0.2"),
        ("vp_linear", -1e-3, "sigma=nan"),
        ("discrete", -1.5, "sigma=nan"),
        ("cosine", 1.5, "alpha=-0.7"),
        ("flow", 1.25, "alpha=-0.25"),
        ("edm", math.inf, "sigma=inf"),
    ],
    indirect=["schedule"],
)
def test_a_time_at_which_there_is_no_noise_level(schedule, t, seen):
    model = EpsModel(lambda x, t: x, schedule, "v")
    for predict in (model, model.eps, model.x0, model.v):
        with pytest.raises(ValueError, match=rf"t must be a time of schedule '{schedule.name}', .* got {t}, .*{seen}"):
            predict(torch.ones(2, 3), t)


def test_times_beyond_the_end_where_churn_leads():
    assert torch.equal(
        EpsModel(lambda x, t: t[:, None] * x, schedules.edm())(torch.ones(2, 3), 112.0), torch.full((2, 3), 112.0)
    )


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="unknown kind 'epsilon'; did you mean 'eps'"):
        EpsModel(lambda x, t: x, VP).affine("epsilon", 0.5, 0.6, 0.8)


def test_an_edm_network_is_never_asked_at_pure_noise(exact):
    model = exact(schedules.flow(), "edm")
    with pytest.raises(ValueError, match=r"takes log\(sigma / alpha\), which is infinite at t=1"):
        model.affine("x0", 1.0, 0.0, 1.0)
