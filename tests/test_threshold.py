"""Clipping and dynamic thresholding of x0, for every kind of network and with every sampler."""

from __future__ import annotations

import math

import pytest
import torch

from samplers import EpsModel, SamplingError, guidance, list_samplers, sample, schedules
from samplers.guidance import clip, threshold

VP, EDM, FLOW = schedules.vp_linear(), schedules.edm(), schedules.flow()
ALL = {s.name: s for s in list_samplers()}
X = 3 * torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def identity(schedule=VP):
    """A model whose x0 is the state."""
    return EpsModel(lambda x, t: x, schedule, "x0")


@pytest.mark.parametrize("max_value", [0.5, 1.0, 2.0])
def test_clip(max_value):
    model = clip(identity(), max_value)
    torch.testing.assert_close(model.x0(X, 0.5), X.clamp(-max_value, max_value))
    eps = (X - VP.alpha(0.5) * X.clamp(-max_value, max_value)) / VP.sigma(0.5)
    torch.testing.assert_close(model(X, 0.5), eps)


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_threshold_is_imagens(ratio, scale):
    x = scale * X
    s = torch.quantile(x.abs().flatten(1), ratio, dim=1).clamp(min=1.0).view(-1, 1, 1, 1)
    got = threshold(identity(), ratio).x0(x, 0.5)
    torch.testing.assert_close(got, x.clamp(-s, s) / s, rtol=1e-14, atol=1e-14)
    assert got.abs().max() <= 1


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ratio", "limit"), [(0.995, 1.0), (0.995, 1.5), (0.9, 100.0), (1.0, 2.5)])
def test_threshold_is_that_of_diffusers(ratio, limit, dtype):
    from diffusers import DDPMScheduler

    made = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=limit)
    x = X.to(dtype)
    # a position between two values is weighed in float64 here
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    got = threshold(identity(), ratio, limit=limit).x0(x, 0.5)
    assert got.dtype == dtype
    torch.testing.assert_close(got, made._threshold_sample(x), rtol=tolerance, atol=tolerance)
    if limit == 1.0:
        torch.testing.assert_close(got, clip(identity()).x0(x, 0.5), rtol=tolerance, atol=tolerance)


def test_another_range_of_the_data():
    got = threshold(identity(), 0.9, 2.0).x0(X, 0.5)
    torch.testing.assert_close(got, 2 * threshold(identity(), 0.9).x0(X / 2, 0.5), rtol=1e-13, atol=0)


def test_samples_do_not_mix():
    model = threshold(identity(), 0.9)
    torch.testing.assert_close(model.x0(X, 0.5), torch.cat([model.x0(x[None], 0.5) for x in X]), rtol=0, atol=0)


def test_more_numbers_than_torchs_quantile_takes():
    x = torch.linspace(-2, 2, 2**24 + 1)[None]
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x, 0.9, dim=1)
    got = threshold(identity(), 0.999).x0(x, 0.5)[0]
    torch.testing.assert_close(got[3 * 2**22], torch.tensor(1 / (2 * 0.999)))


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 2), (0, 2)])
def test_any_shape(shape):
    assert threshold(identity()).x0(torch.full(shape, 5.0), 0.5).tolist() == torch.ones(shape).tolist()


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "score", "flow", "edm"])
@pytest.mark.parametrize("schedule", [VP, EDM], ids=["vp", "edm"])
def test_every_kind_of_network(exact, schedule, predicts):
    x, t = 30 * X[:3, 0, 0, :2], 0.3 * schedule.t_max
    base = exact(schedule, predicts)
    expected = base.x0(x, t).clamp(-0.3, 0.3)
    torch.testing.assert_close(clip(base, 0.3).x0(x, t), expected, rtol=1e-9, atol=1e-12)
    times = torch.full((3,), t, dtype=torch.float64)
    torch.testing.assert_close(clip(base, 0.3).x0(x, times), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_every_sampler(exact, name):
    x_T, where = X[:3, 0, 0, :2], {"nfe": 500} if ALL[name].adaptive else {"steps": 6, "final": "zero"}
    free = sample(exact(VP), name, x_T=x_T, **where)
    kept = sample(clip(exact(VP), 0.4), name, x_T=x_T, **where)
    same = sample(clip(exact(VP), 1e6), name, x_T=x_T, **where)
    torch.testing.assert_close(same, free, rtol=1e-6, atol=1e-6)
    assert free.abs().max() > 0.4
    if "steps" in where:  # the last step is x0 itself, but for lms
        assert kept.abs().max() < 0.401


def test_conditions_and_calls_are_the_models():
    seen = []
    model = EpsModel(lambda x, t, label: seen.append((label, float(t[0]))) or x, VP, time_input=lambda t: 1000 * t)
    sample(threshold(model), "ddim", x_T=X, steps=2, cond={"label": 3})
    assert [label for label, _ in seen] == [3, 3]
    assert seen[0][1] == 1000.0


def test_dtype_is_the_networks():
    net = torch.nn.Linear(2, 2, dtype=torch.float64)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net

        def forward(self, x, t):
            return self.inner(x)

    model = EpsModel(Net(), VP)
    assert clip(model).weights is net.weight
    assert sample(clip(model), "ddim", shape=(2, 2), steps=2).dtype == torch.float64
    assert clip(identity()).weights is None


@pytest.mark.parametrize("wrap", [clip, threshold])
def test_nan_is_not_hidden(wrap):
    broken = EpsModel(lambda x, t: torch.where(x > 0, math.nan, x), VP)
    with pytest.raises(SamplingError, match="NaN or Inf"):
        sample(wrap(broken), "dpmpp-2m", x_T=X, steps=3)


@pytest.mark.parametrize("wrap", [clip, threshold])
@pytest.mark.parametrize("predicts", ["eps", "score"])
def test_pure_noise_has_no_x0_for_an_eps_network(exact, wrap, predicts):
    x_T = X[:3, 0, 0, :2]
    with pytest.raises(ValueError, match=f"predicts='{predicts}' gives no x0 at t=1, where alpha=0"):
        sample(wrap(exact(FLOW, predicts)), "ddim", x_T=x_T, steps=3)
    with pytest.raises(ValueError, match=f"predicts='{predicts}' gives no x0 at t=1, where alpha=0"):
        wrap(exact(FLOW, predicts)).x0(x_T, torch.tensor([0.5, 1.0, 0.2], dtype=torch.float64))
    assert sample(wrap(exact(FLOW, predicts)), "ddim", x_T=x_T, timesteps=[0.9, 0.5]).isfinite().all()
    assert sample(wrap(exact(FLOW, "flow")), "ddim", x_T=x_T, steps=3).isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: clip(identity(), 0.0), ValueError, "max_value must be positive and finite, got 0"),
        (lambda: clip(identity(), math.nan), ValueError, "max_value must be positive and finite, got nan"),
        (lambda: clip(lambda x, t: x), TypeError, "model must be an EpsModel, got function; wrap it"),
        (lambda: threshold(identity(), 0.0), ValueError, r"ratio must lie in \(0, 1\], got 0"),
        (lambda: threshold(identity(), 1.1), ValueError, r"ratio must lie in \(0, 1\], got 1.1"),
        (lambda: threshold(identity(), 0.9, -1.0), ValueError, "max_value must be positive and finite, got -1"),
        (lambda: threshold(identity(), limit=0.5), ValueError, "limit must be at least max_value=1.0, got 0.5"),
        (lambda: threshold(None), TypeError, "model must be an EpsModel, got NoneType"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_package_is_public():
    assert guidance.clip is clip
    assert guidance.threshold is threshold
