"""The metered model: calls, evaluations and depth, exact under every wrapper, in every way of running a plan."""

from __future__ import annotations

import pytest
import torch

from samplers import EpsModel, LearnedPlan, guidance, list_samplers, make_plan, metered, run_plan, sample, schedules
from samplers.meter import Counts, Meter

VP = schedules.vp_linear()
ALL = {entry.name: entry for entry in list_samplers()}
X = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
COND = {"class_labels": torch.tensor([0, 1, 2, 1, 0])}
NULL = {"class_labels": 3}


def net(x, t, class_labels):
    return x * t[:, None] + class_labels[:, None].to(x.dtype)


BASE = EpsModel(net, VP, "v")
# what each costs at a point: calls, evaluations of a sample
WAYS = {
    "plain": (lambda m: m, 1, 1),
    "one-call": (lambda m: guidance.classifier_free(m, 2.0, NULL), 1, 2),
    "two-calls": (lambda m: guidance.classifier_free(m, 2.0, NULL, batched=False), 2, 2),
    "scale-1": (lambda m: guidance.classifier_free(m, 1.0, NULL), 1, 1),
    "apg": (lambda m: guidance.apg(m, 2.0, NULL, momentum=-0.5), 1, 2),
    "perp-neg": (lambda m: guidance.perp_neg(m, 2.0, NULL, {"class_labels": 1}), 1, 3),
    "perp-neg-three-calls": (lambda m: guidance.perp_neg(m, 2.0, NULL, {"class_labels": 1}, batched=False), 3, 3),
    "weaker": (lambda m: guidance.autoguidance(m, EpsModel(lambda x, t, **cond: x, VP, "v"), 2.0), 2, 2),
    "nested": (
        lambda m: guidance.clip(guidance.autoguidance(guidance.classifier_free(m, 2.0, NULL), m, 2.0), 3.0),
        2,
        3,
    ),
    "classifier": (lambda m: guidance.classifier(m, lambda x, t: x.sum(1), 2.0, conditional=True), 1, 1),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp-2m", "dpm-solver-3s"])
def test_exact(way, name):
    wrap, calls, evaluations = WAYS[way]
    plan, model = make_plan(name, VP, nfe=10), metered(wrap(BASE))
    expected = run_plan(plan, wrap(BASE), X, cond=COND)
    assert torch.equal(run_plan(plan, model, X, cond=COND), expected)
    n = plan.nfe
    assert model.counts == Counts(n * calls, 5 * n * evaluations, n)
    run_plan(plan, model, X[:2], cond={"class_labels": COND["class_labels"][:2]})
    assert model.counts == Counts(2 * n * calls, 7 * n * evaluations, 2 * n)
    model.reset()
    assert model.counts == Counts()


@pytest.mark.parametrize("name", ALL)
def test_a_plan_claims_what_the_meter_counts(name):
    model = metered(guidance.classifier_free(BASE, 2.0, NULL))
    if ALL[name].adaptive:
        seen = []
        sample(model, name, x_T=X, rtol=1e-2, atol=1e-2, cond=COND, callback=lambda step: seen.append(step.nfe))
        assert model.counts == Counts(seen[-1], 10 * seen[-1], seen[-1])
    else:
        plan = make_plan(name, VP, nfe=10)
        run_plan(plan, model, X, cond=COND)
        assert model.counts == Counts(plan.nfe, 10 * plan.nfe, plan.nfe)


@pytest.mark.parametrize("way", ["one-call", "weaker"])
def test_compiled(way):
    wrap, calls, evaluations = WAYS[way]
    model, plan = metered(wrap(BASE)), make_plan("ddim", VP, steps=3)
    for times in (1, 2, 3):
        got = run_plan(plan, model, X, cond=COND, compile="loop")
        assert model.counts == Counts(3 * times * calls, 15 * times * evaluations, 3 * times)
    torch.testing.assert_close(got, run_plan(plan, wrap(BASE), X, cond=COND))
    assert [meter.calls for meter in model.networks] == [9] * len(model.networks)


def test_learned_plans_and_direct_calls():
    model = metered(guidance.classifier_free(BASE, 2.0, NULL, interval=(0.1, 0.2)))
    LearnedPlan(make_plan("ddim", VP, steps=3), VP)(model, X, cond=COND)
    assert model.counts == Counts(
        3, 30, 3
    )  # its times are parameters, at which nobody looks: guidance is computed and masked
    model.reset()
    model.x0(X, 0.9, **COND)
    model.v(X, 0.05, **COND)  # sigma_bar is 0.175
    assert model.counts == Counts(2, 5 + 10, 2)


@pytest.mark.slow
def test_the_model_itself_is_left_alone_and_each_counts_for_itself():
    model = metered(BASE)
    assert model.net is model.networks[0]
    assert BASE.net is net
    own = Meter(net)
    inner = EpsModel(own, VP, "v")
    sample(inner, "ddim", x_T=X, steps=3, cond=COND)
    outer, guided = metered(inner), metered(guidance.classifier_free(metered(inner), 2.0, NULL))
    sample(outer, "ddim", x_T=X, steps=2, cond=COND)
    sample(guided, "ddim", x_T=X, steps=1, cond=COND)
    assert (own.calls, own.evaluations) == (6, 35)
    assert (outer.counts, guided.counts) == (Counts(2, 10, 2), Counts(1, 10, 1))
    run_plan(make_plan("ddim", VP, steps=2), outer, X, cond=COND, compile="loop")
    assert outer.counts == Counts(4, 20, 4)
    assert own.calls == 6  # a compiled loop does not pass any meter


def test_weights_are_the_networks():
    class Net(torch.nn.Linear):
        def forward(self, x, t):
            return super().forward(x)

    inner = Net(2, 2)
    assert metered(EpsModel(inner, VP)).weights is inner.weight
    assert sample(metered(EpsModel(inner, VP)), "ddim", shape=(2, 2), steps=2).dtype == torch.float32
