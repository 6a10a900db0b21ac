"""The executor against a naive interpreter, and its promises: whose memory is written, what is drawn, what is reported."""

from __future__ import annotations

import math

import pytest
import torch

from samplers import EpsModel, LearnedPlan, SamplingError, list_samplers, make_plan, run_plan, sample, schedules
from samplers.noise import standard_normal
from samplers.program import Combine, Evaluate

VP = schedules.vp_linear()
FIXED = [s.name for s in list_samplers() if not s.adaptive]
every_sampler = pytest.mark.parametrize("name", FIXED)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def interpret(plan, model, x_T, noises=()):
    """What a plan means: every value kept, nothing reused."""
    values = {"x_T": x_T, **{f"z{k}": noise for k, noise in enumerate(noises)}}
    for step in plan.instructions:
        if isinstance(step, Evaluate):
            values[step.dst] = getattr(model, step.kind)(values[step.src].clone(), step.t)
        else:
            values[step.dst] = sum(coefficient * values[name] for name, coefficient in step.terms)
    return values[plan.instructions[-1].dst]


def refuse(k, like):
    raise AssertionError("a deterministic plan asked for noise")


@every_sampler
@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
@pytest.mark.parametrize("final", ["t_min", "zero"])
def test_any_plan_runs_as_it_reads(exact, name, predicts, final):
    model, plan, x_T = exact(VP, predicts), make_plan(name, VP, steps=6, final=final), normal(5, 2)
    noises = [normal(5, 2, seed=1 + k) for k in range(plan.noises)]
    expected = interpret(plan, model, x_T, noises)
    got = run_plan(plan, model, x_T, noise_source=lambda k, like: noises[k])
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_seeded_noise_is_the_noise_of_the_seed(exact):
    plan, x_T, indices = make_plan("ddpm", VP, steps=4), normal(3, 2), torch.tensor([5, 0, 9])
    expected = interpret(
        plan, exact(VP), x_T, [standard_normal(7, indices, k + 1, (2,), torch.float64) for k in range(plan.noises)]
    )
    got = run_plan(plan, exact(VP), x_T, seed=7, indices=indices)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@every_sampler
@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
def test_nobody_elses_memory_is_written(name, predicts):
    """x_T, a network's cached output and a noise source's tensors stay as they are, and the result is right."""
    plan, x_T, cached = make_plan(name, VP, steps=5), normal(4, 3), normal(4, 3, seed=1)
    noise = normal(4, 3, seed=2)
    kept = x_T.clone(), cached.clone(), noise.clone()
    model = EpsModel(lambda x, t: cached, VP, predicts)
    got = run_plan(plan, model, x_T, noise_source=lambda k, like: noise)
    assert all(torch.equal(a, b) for a, b in zip((x_T, cached, noise), kept, strict=True))
    torch.testing.assert_close(got, interpret(plan, model, x_T, [noise] * plan.noises), rtol=1e-11, atol=1e-11)
    assert not any(got.data_ptr() == other.data_ptr() for other in (x_T, cached, noise))


@every_sampler
@pytest.mark.parametrize(
    "net", [lambda x, t: x, lambda x, t: x.view(2, 6).view(4, 3), lambda x, t: x.flip(0).flip(0)[:]]
)
@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
def test_a_network_may_return_its_input(name, net, predicts):
    plan, x_T, model = make_plan(name, VP, steps=5), normal(4, 3), EpsModel(net, VP, predicts)
    noises = [normal(4, 3, seed=k) for k in range(plan.noises)]
    got = run_plan(plan, model, x_T, noise_source=lambda k, like: noises[k])
    copying = EpsModel(lambda x, t: net(x, t).clone(), VP, predicts)
    torch.testing.assert_close(got, interpret(plan, copying, x_T, noises), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "x_T", [normal(3, 4).T, normal(1, 3).expand(4, 3), normal(8, 3)[::2]], ids=["T", "expand", "stride"]
)
def test_start_states_of_any_layout(exact, x_T):
    model = EpsModel(lambda x, t: 0.3 * x, VP)
    plan, kept = make_plan("heun", VP, steps=3), x_T.clone()
    torch.testing.assert_close(run_plan(plan, model, x_T), run_plan(plan, model, kept), rtol=1e-14, atol=1e-14)
    assert torch.equal(x_T, kept)


def test_half_precision_stays_half_precision():
    out = run_plan(make_plan("dpmpp-2m", VP, steps=4), EpsModel(lambda x, t: 0.3 * x, VP), normal(2, 3).bfloat16())
    assert out.dtype == torch.bfloat16


@every_sampler
@pytest.mark.parametrize("final", ["t_min", "zero"])
def test_callback_is_told_of_every_step(exact, name, final):
    plan, x_T, told = make_plan(name, VP, steps=5, final=final), normal(3, 2), []
    result = run_plan(plan, exact(VP), x_T, seed=3, callback=lambda p: told.append(p._replace(x=p.x.clone())))
    calls, expected = 0, []
    for step in plan.instructions:
        calls += isinstance(step, Evaluate)
        if isinstance(step, Combine) and step.node is not None:
            expected.append((step.node, 5, plan.times[step.node], calls))
    assert [tuple(p[:4]) for p in told] == expected
    assert [p.step for p in told] == [1, 2, 3, 4, 5]
    assert told[-1].nfe == plan.nfe
    assert torch.equal(told[-1].x, result)
    for p in told[:-1]:  # the state at a node is the result of a run that stops there
        stop = next(i for i, s in enumerate(plan.instructions) if isinstance(s, Combine) and s.node == p.step)
        short = type(plan)(plan.instructions[: stop + 1], plan.times, plan.prediction, plan.sigma_T)
        torch.testing.assert_close(p.x, run_plan(short, exact(VP), x_T, seed=3), rtol=1e-14, atol=1e-14)


@every_sampler
def test_noise_is_asked_for_in_order_and_only_where_used(exact, name):
    plan, asked, x_T = make_plan(name, VP, steps=6), [], normal(3, 2)

    def source(k, like):
        asked.append((k, like.shape, like.dtype))
        return torch.zeros_like(like)

    run_plan(plan, exact(VP), x_T, noise_source=source)
    assert asked == [(k, x_T.shape, x_T.dtype) for k in range(plan.noises)]


@every_sampler
def test_no_randomness_but_the_seeds(exact, name):
    entry = next(s for s in list_samplers() if s.name == name)
    before = torch.get_rng_state()
    first = sample(exact(VP), name, shape=(3, 2), steps=4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, sample(exact(VP), name, shape=(3, 2), steps=4, seed=1))
    if entry.stochastic != "yes":
        options = {entry.stochastic: 0.0} if entry.stochastic in entry.options else {}
        x_T = normal(3, 2)
        quiet = sample(exact(VP), name, x_T=x_T, steps=4, seed=1, noise_source=refuse, **options)
        assert torch.equal(quiet, sample(exact(VP), name, x_T=x_T, steps=4, seed=2, **options))
    else:
        with pytest.raises(AssertionError, match="asked for noise"):
            sample(exact(VP), name, shape=(3, 2), steps=4, noise_source=refuse)


@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m", "ddpm", "euler-ancestral"])
def test_a_sample_does_not_depend_on_its_batch(exact, name):
    def run(indices):
        return sample(exact(VP), name, shape=(len(indices), 2), steps=5, seed=4, indices=torch.tensor(indices))

    all_of_them = run(range(256))
    assert torch.equal(run(range(7)), all_of_them[:7])
    assert torch.equal(run(range(100, 107)), all_of_them[100:107])
    for i in (0, 101, 255):
        assert torch.equal(run([i]), all_of_them[i : i + 1])


@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m", "unipc-2", "ddpm"])
@pytest.mark.parametrize("predicts", ["eps", "v", "edm"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 31, 31), (6, 31, 31)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_image_does_not_depend_on_its_batch(name, predicts, shape, dtype):
    model = EpsModel(lambda x, t: 0.5 * x.clamp(-1, 1), VP, predicts)

    def run(indices):
        x_T = standard_normal(3, torch.tensor(indices), 0, shape, dtype)
        return sample(model, name, x_T=x_T, indices=torch.tensor(indices), steps=4)

    together = run(range(8))
    for i in (0, 3, 7):
        assert torch.equal(run([i]), together[i : i + 1])


class OneBuffer:
    """A network that writes each output over the one before, as an engine with fixed buffers does."""

    def __init__(self, replayed=False):
        self.out, self.replayed = None, replayed

    def __call__(self, x, t):
        self.out = torch.empty_like(x) if self.out is None or self.out.shape != x.shape else self.out
        self.out.copy_(0.5 * x.clamp(-1, 1) * t.view(-1, 1))
        return self.out.detach() if self.replayed else self.out


@every_sampler
@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
@pytest.mark.parametrize("replayed", [False, True])
def test_a_network_may_write_each_output_over_the_one_before(name, predicts, replayed):
    plan, x_T = make_plan(name, VP, steps=6), normal(3, 4)
    noises = [normal(3, 4, seed=1 + k) for k in range(plan.noises)]
    net = OneBuffer(replayed)
    got = [run_plan(plan, EpsModel(net, VP, predicts), x_T, noise_source=lambda k, like: noises[k]) for _ in range(2)]
    fresh = EpsModel(lambda x, t: net(x, t).clone(), VP, predicts)
    expected = run_plan(plan, fresh, x_T, noise_source=lambda k, like: noises[k])
    assert all(torch.equal(one, expected) for one in got)


def test_a_plan_runs_on_the_schedule_it_was_made_on():
    discrete = schedules.from_betas(torch.linspace(1e-4, 0.02, 1000))
    for made_on, run_on in [
        (discrete, VP),
        (VP, discrete),
        (VP, schedules.cosine()),
        (schedules.flow(), schedules.edm()),
    ]:
        plan = make_plan("dpmpp-2m", made_on, steps=4)
        for _ in range(2):
            with pytest.raises(
                ValueError, match=rf"made on another schedule: its call at t=.* where '{run_on.name}' has"
            ):
                run_plan(plan, EpsModel(lambda x, t: x, run_on, "v"), normal(2, 3))
            run_plan(plan, EpsModel(lambda x, t: x, made_on, "v"), normal(2, 3))


def test_a_table_in_single_precision_is_the_same_schedule():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    double = schedules.from_alphas_cumprod((1 - betas).cumprod(0))
    single = schedules.from_alphas_cumprod((1 - betas.float()).cumprod(0))
    assert double != single
    run_plan(make_plan("dpmpp-2m", double, steps=20), EpsModel(lambda x, t: x, single), normal(2, 3))


def test_conditions_reach_every_call():
    seen = []

    def net(x, t, label, scale):
        seen.append((label, scale))
        return x

    run_plan(make_plan("heun", VP, steps=3), EpsModel(net, VP), normal(2, 2), cond={"label": "cat", "scale": 2.0})
    assert seen == [("cat", 2.0)] * 6


def nan_below(t_bad):
    """A network that gives NaN from the time `t_bad` down."""
    return lambda x, t: torch.where(t[:, None] > t_bad, x, math.nan)


class ThirdCallFails:
    """A network that gives NaN at its 3rd call, and never again."""

    calls = 0

    def __call__(self, x, t):
        self.calls += 1
        return x * (math.nan if self.calls == 3 else 0.5)


TIMES = [1.0, 0.75, 0.5, 0.25, 0.1]


@pytest.mark.parametrize("check", [True, "each"])
@pytest.mark.parametrize(
    ("name", "where"),
    [("ddim", r"step 3 of 4 of sampler 'ddim': the network's output at t=0.5"), ("heun", r"step 2 .* output at t=0.5")],
)
def test_nan_is_found_and_placed(name, where, check):
    plan = make_plan(name, VP, timesteps=TIMES)
    with pytest.raises(SamplingError, match=rf"NaN or Inf in {where}"):
        run_plan(plan, EpsModel(nan_below(0.5), VP), normal(2, 3), check=check)


@pytest.mark.parametrize("check", [True, "each"])
def test_nan_in_the_start_is_not_the_networks(check):
    x_T = normal(3, 2).index_fill(0, torch.tensor([1]), math.nan)
    with pytest.raises(ValueError, match="x_T must be finite, got NaN or Inf in sample 1"):
        run_plan(make_plan("ddim", VP, steps=3), EpsModel(lambda x, t: x, VP), x_T, check=check)


def test_nan_in_a_start_of_another_layout():
    x_T = normal(3, 2, 4, 4).index_fill(0, torch.tensor([1]), math.nan).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="x_T must be finite, got NaN or Inf in sample 1"):
        run_plan(make_plan("ddim", VP, steps=3), EpsModel(lambda x, t: x, VP), x_T)


def test_a_network_with_a_pool_of_its_own_may_write_beside_its_input():
    pool, plan = torch.cat([normal(2, 3), normal(2, 3)]), make_plan("ddim", VP, steps=3)
    out = run_plan(plan, EpsModel(lambda x, t: torch.mul(x, 0.5, out=pool[2:]), VP), pool[:2].clone())
    pooled = run_plan(plan, EpsModel(lambda x, t: torch.mul(x, 0.5, out=pool[2:]), VP), pool[:2])
    assert torch.equal(pooled, out)


def test_nan_found_at_once_or_at_the_end():
    plan, net = make_plan("ddim", VP, timesteps=TIMES), ThirdCallFails()
    with pytest.raises(SamplingError, match=r"step 3 of 4 of sampler 'ddim': the network's output at t=0.5"):
        run_plan(plan, EpsModel(net, VP), normal(2, 3), check="each")
    assert net.calls == 3
    net = ThirdCallFails()
    with pytest.raises(SamplingError, match="sampler 'ddim' gave NaN or Inf, and a second run .* did not"):
        run_plan(plan, EpsModel(net, VP), normal(2, 3))
    assert net.calls == 8


def test_nan_unchecked_is_returned():
    assert (
        run_plan(make_plan("ddim", VP, steps=5), EpsModel(ThirdCallFails(), VP), normal(2, 3), check=False)
        .isnan()
        .all()
    )


def test_overflow_of_the_state_is_found():
    model = EpsModel(lambda x, t: torch.full_like(x, 6e4), VP)
    with pytest.raises(SamplingError, match=r"step \d of 4 of sampler 'ddim': the state at t="):
        run_plan(make_plan("ddim", VP, timesteps=TIMES), model, torch.full((2, 3), 6e4, dtype=torch.float16))


def test_a_checked_run_is_the_same_run(exact):
    plan, x_T = make_plan("ddpm", VP, steps=5), normal(3, 2)
    runs = [run_plan(plan, exact(VP), x_T, check=check) for check in (True, False, "each")]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


class Weighted(torch.nn.Module):
    """A network with weights of a given dtype and device."""

    def __init__(self, **options):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, **options))

    def forward(self, x, t):
        return x * self.weight


@pytest.mark.parametrize(
    ("net", "x_T", "error", "message"),
    [
        (Weighted(), normal(2, 3), ValueError, "x_T is torch.float64, the network torch.float32; convert"),
        (
            Weighted(dtype=torch.float16),
            normal(2, 3).float(),
            ValueError,
            "x_T is torch.float32, the network torch.float16",
        ),
        (Weighted(device="meta"), normal(2, 3).float(), ValueError, "x_T is on cpu, the network on meta; move"),
        (Weighted(), normal(2, 3).float().to("meta"), ValueError, "x_T is on meta, the network on cpu; move"),
        (torch.sin, torch.ones(2, 3, dtype=torch.int64), TypeError, "x_T must be a floating-point .* got torch.int64"),
        (torch.sin, [[1.0]], TypeError, "x_T must be a floating-point tensor .* got list"),
        (torch.sin, torch.tensor(1.0), TypeError, "x_T must be a floating-point tensor"),
        (lambda x, t: x[:, :2], normal(2, 3), ValueError, r"net must return the shape of x, \(2, 3\), got \(2, 2\)"),
    ],
)
def test_bad_start_states_and_networks(net, x_T, error, message):
    with pytest.raises(error, match=message):
        run_plan(make_plan("ddim", VP, steps=2), EpsModel(net, VP), x_T)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"check": "always"}, "check must be True, False or 'each', got 'always'"),
        ({"check": 1}, "check must be True, False or 'each', got 1"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\^64\)"),
        ({"indices": torch.arange(3)}, "indices must be 2 non-negative integers"),
        ({"indices": torch.tensor([0, -1])}, "indices must be 2 non-negative integers"),
        ({"indices": torch.tensor([0.0, 1.0])}, "indices must be 2 non-negative integers"),
        ({"noise_source": lambda k, like: like[:1]}, r"noise_source must return shape \(2, 3\), got \(1, 3\)"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        run_plan(make_plan("ddpm", VP, steps=2), EpsModel(lambda x, t: x, VP), normal(2, 3), **options)


def test_weights_that_fit_are_used_without_gradient():
    out = run_plan(make_plan("ddim", VP, steps=2), EpsModel(Weighted(), VP), normal(2, 3).float())
    assert not out.requires_grad


def test_an_empty_batch_is_an_empty_batch():
    out = run_plan(make_plan("ddpm", VP, steps=2), EpsModel(lambda x, t: x, VP), torch.ones(0, 3))
    assert out.shape == (0, 3)


def test_a_network_is_called_as_often_as_the_plan_says():
    calls = []
    plan = make_plan("dpm-solver-3s", VP, nfe=11)
    run_plan(plan, EpsModel(lambda x, t: calls.append(float(t[0])) or x, VP), normal(2, 3))
    assert len(calls) == plan.nfe == 11
    assert calls == [s.t for s in plan.instructions if isinstance(s, Evaluate)]


def test_what_is_no_plan_or_no_model_is_named():
    plan, model = make_plan("ddim", VP, steps=2), EpsModel(torch.sin, VP)
    with pytest.raises(TypeError, match=r"plan must be a Plan, as of make_plan\(.*\), got str"):
        run_plan("ddim", model, normal(2, 3))
    with pytest.raises(TypeError, match="plan must be a Plan.* got NoneType"):
        LearnedPlan(None, VP)
    with pytest.raises(TypeError, match="other must be a Plan.* got str"):
        plan.close("ddim")
    with pytest.raises(TypeError, match=r"model must be an EpsModel, got .*wrap it: EpsModel\(net, schedule\)"):
        run_plan(plan, torch.sin, normal(2, 3))
