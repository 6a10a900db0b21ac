"""Guidance by another network: a weaker model of any kind, and a classifier whose exact gradient gives the exact class."""

from __future__ import annotations

import pytest
import torch

from samplers import EpsModel, guidance, list_samplers, make_plan, metered, run_plan, sample, schedules
from samplers.adapters.variance import sample_learned_variance

VP, COSINE, EDM, FLOW = schedules.vp_linear(), schedules.cosine(), schedules.edm(), schedules.flow()
WIDE = schedules.edm(1e-4, 1e4)
PLANNED = [entry.name for entry in list_samplers() if entry.stochastic != "yes" and not entry.adaptive]
LABELS = torch.tensor([0, 1, 2, 1])
COND = {"class_labels": LABELS}
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Weaker:
    """A model whose x0 is worse: shrunk, of any prediction on any schedule."""

    def __init__(self, schedule, predicts):
        self.schedule, self.predicts = schedule, predicts

    def model(self, exact):
        base, schedule = exact(self.schedule), self.schedule

        def worse(x, t):
            column = t.double()[:, None]
            alpha, sigma = schedule.alpha(column), schedule.sigma(column)
            x0 = 0.8 * base.x0(x, t)
            eps = (x - alpha * x0) / sigma
            return {
                "eps": eps,
                "x0": x0,
                "v": alpha * eps - sigma * x0,
                "flow": schedule.dalpha(column) * x0 + schedule.dsigma(column) * eps,
            }[self.predicts]

        return EpsModel(worse, schedule, self.predicts)


WEAK = [
    Weaker(VP, "eps"),
    Weaker(VP, "x0"),
    Weaker(VP, "v"),
    Weaker(WIDE, "eps"),
    Weaker(WIDE, "x0"),
    Weaker(FLOW, "flow"),
]


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "flow", "score"])
@pytest.mark.parametrize("weaker", WEAK, ids=lambda w: f"{w.schedule.name}-{w.predicts}")
def test_a_weaker_model_of_any_kind(exact, predicts, weaker):
    weak, base = weaker.model(exact), exact(VP, predicts)
    guided = guidance.autoguidance(base, weak, 2.0)
    for t in (0.05, 0.4, 0.95):
        alpha, sigma = float(VP.alpha(t)), float(VP.sigma(t))
        x = alpha * X + sigma * X.flip(0)
        x0 = base.x0(x, t)
        expected = 0.8 * x0 + 2.0 * (x0 - 0.8 * x0)
        tolerance = {"rtol": 1e-8, "atol": 1e-8 * float(x.abs().max() / alpha)}
        torch.testing.assert_close(guided.x0(x, t), expected, **tolerance)
        torch.testing.assert_close(guided.x0(x, torch.full((4,), t, dtype=torch.float64)), expected, **tolerance)


@pytest.mark.parametrize("name", PLANNED)
def test_autoguidance_with_every_sampler(exact, name):
    base, weak = exact(VP), Weaker(VP, "eps").model(exact)
    hand = EpsModel(lambda x, t: 2.0 * base(x, t) - weak(x, t), VP)
    got = sample(guidance.autoguidance(base, weak, 2.0), name, x_T=X, steps=5)
    torch.testing.assert_close(got, sample(hand, name, x_T=X, steps=5), rtol=1e-10, atol=1e-10)


def test_an_edm_network_guided_by_one_of_another_scale(exact):
    base, weak = exact(EDM, "edm"), exact(WIDE, "v")
    got = sample(guidance.autoguidance(base, weak, 3.0), "heun", x_T=80 * X, steps=5)
    torch.testing.assert_close(got, sample(base, "heun", x_T=80 * X, steps=5), rtol=1e-8, atol=1e-8)  # the same model


def test_a_weaker_model_without_the_condition(classes):
    base = classes(VP)
    both = guidance.autoguidance(base, base, 2.5, null={"class_labels": 3})
    plain = guidance.classifier_free(base, 2.5, {"class_labels": 3})
    torch.testing.assert_close(both(X, 0.4, **COND), plain(X, 0.4, **COND), rtol=1e-12, atol=1e-12)


def test_the_range_of_the_weaker_schedule(exact):
    base = exact(EDM)
    with pytest.raises(ValueError, match=r"weaker is defined for sigma_bar .* to 1\d\d\.\d*, and is asked at 900"):
        run_plan(
            make_plan("ddim", WIDE, sigmas=[900.0, 1.0]), guidance.autoguidance(exact(WIDE), exact(COSINE), 2.0), X
        )
    inside = guidance.autoguidance(base, exact(schedules.edm(0.1, 10.0)), 2.0, interval=(0.2, 5.0))
    assert sample(inside, "ddim", x_T=X, steps=5).isfinite().all()
    with pytest.raises(ValueError, match="gives no x0 at t=1, where alpha=0"):
        sample(guidance.autoguidance(exact(FLOW, "flow"), exact(FLOW), 2.0), "ddim", x_T=X, steps=5)


def test_the_two_networks_are_counted_apart(exact):
    base, weak = exact(VP), Weaker(VP, "v").model(exact)
    plan = make_plan("heun", VP, steps=6)
    model = metered(guidance.autoguidance(base, weak, 2.0, interval=(0.1, 5.0)))
    run_plan(plan, model, X)
    inside = sum(0.1 < call.sigma / call.alpha <= 5.0 for call in plan.calls)
    assert 0 < inside < plan.nfe
    assert [meter.calls for meter in model.networks] == [plan.nfe, inside]
    assert [meter.evaluations for meter in model.networks] == [4 * plan.nfe, 4 * inside]
    assert (model.counts.calls, model.counts.depth) == (plan.nfe + inside, plan.nfe)


def test_networks_of_two_dtypes():
    class Net(torch.nn.Linear):
        def forward(self, x, t):
            return super().forward(x)

    base, weak = EpsModel(Net(2, 2), VP), EpsModel(Net(2, 2, dtype=torch.float64), VP)
    with pytest.raises(ValueError, match=r"weaker is torch.float64 on cpu, the model torch.float32 on cpu"):
        guidance.autoguidance(base, weak, 2.0)


def test_a_learned_variance_under_guidance():
    class Learned(torch.nn.Module):
        def halves(self, x, t, y):
            return 0.3 * x + y[:, None].to(x.dtype), (x * y[:, None]).tanh()

        def forward(self, x, t, y):
            return self.halves(x, t, y)[0]

    model = EpsModel(Learned(), VP)
    given = {"x_T": X, "steps": 4, "cond": {"y": LABELS}}
    by_hand = EpsModel(Learned(), VP)
    by_hand.net.halves = lambda x, t, y: (0.3 * x + 2.5 * y[:, None] - 1.5 * 7, (x * y[:, None]).tanh())
    expected = sample_learned_variance(by_hand, **given)
    guided = guidance.classifier_free(model, 2.5, {"y": 7})
    torch.testing.assert_close(sample_learned_variance(guided, **given), expected, rtol=1e-9, atol=1e-9)
    assert (expected - sample_learned_variance(model, **given)).abs().max() > 0.1


# a classifier ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def classify(classes, mixture):
    """`classify(schedule)`: the exact classifier of noisy states by Bayes' rule, as logits."""

    def on(schedule):
        def logits(x, t):
            alpha, sigma = schedule.alpha(t.double()), schedule.sigma(t.double())
            return torch.stack([one.log_prob(x, alpha, sigma) for one in classes.each], 1) + mixture.weights.log()

        return logits

    return on


@pytest.mark.parametrize(
    ("schedule", "predicts"), [(VP, "eps"), (VP, "v"), (VP, "x0"), (VP, "score"), (EDM, "edm"), (FLOW, "flow")]
)
def test_the_exact_classifier_gives_the_exact_class(exact, classes, classify, schedule, predicts):
    guided = guidance.classifier(exact(schedule, predicts), classify(schedule), 1.0)
    for t in (0.05 * schedule.t_max, 0.5 * schedule.t_max):
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        x = alpha * X + sigma * X.flip(0)
        expected = classes(schedule).eps(x, t, **COND)
        torch.testing.assert_close(guided.eps(x, t, **COND), expected, rtol=1e-8, atol=1e-8)
        times = torch.full((4,), t, dtype=torch.float64)
        torch.testing.assert_close(guided.eps(x, times, **COND), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", PLANNED)
def test_classifier_guidance_with_every_sampler(exact, classes, classify, name):
    guided = guidance.classifier(exact(VP), classify(VP), 1.0)
    got = sample(guided, name, x_T=X, steps=5, cond=COND)
    torch.testing.assert_close(got, sample(classes(VP), name, x_T=X, steps=5, cond=COND), rtol=1e-7, atol=1e-7)


def test_gradients_stay_inside(exact):
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    seen = []

    def log_prob(x, t):
        seen.append(torch.is_grad_enabled())
        return -(weight * x).square().sum(1)

    guided = guidance.classifier(exact(VP), log_prob, 0.5)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = guided.eps(X.clone(), 0.5)
        torch.testing.assert_close(out, exact(VP).eps(X, 0.5) + float(VP.sigma(0.5)) * X, rtol=1e-10, atol=1e-10)
        assert not out.requires_grad
    assert seen == [True, True]
    assert weight.grad is None


def test_the_labels_are_kept_from_the_network_unless_it_takes_them():
    seen = []

    def net(x, t, **cond):
        seen.append(sorted(cond))
        return x

    model = EpsModel(net, VP)
    given = {"x_T": X, "steps": 2, "cond": {"y": LABELS % 2, "text": "a"}}
    sample(guidance.classifier(model, lambda x, t: x, 2.0, labels="y", interval=(0.0, 1.0)), "ddim", **given)
    sample(guidance.classifier(model, lambda x, t: x, 2.0, labels="y", conditional=True), "ddim", **given)
    assert seen == [["text"]] * 2 + [["text", "y"]] * 2


@pytest.mark.parametrize(
    ("classify", "cond", "message"),
    [
        (lambda x, t: x, {}, r"cond\['class_labels'\] must be integers \(4,\), the classes to guide to, got NoneType"),
        (lambda x, t: x, {"class_labels": X}, r"cond\['class_labels'\] must be integers \(4,\).* got \(4, 2\)"),
        (
            lambda x, t: x[:, :, None],
            COND,
            r"classify must return logits \(4, classes\) or log p \(4,\), got \(4, 2, 1\)",
        ),
        (lambda x, t: None, COND, r"classify must return .* got NoneType"),
    ],
)
def test_bad_calls(exact, classify, cond, message):
    with pytest.raises(ValueError, match=message):
        guidance.classifier(exact(VP), classify, 1.0).eps(X, 0.5, **cond)


def test_pure_noise_cannot_be_classified(exact):
    guided = guidance.classifier(exact(FLOW, "flow"), lambda x, t: x, 1.0)
    with pytest.raises(ValueError, match=r"at t=1, where alpha=0; give an interval that ends below inf"):
        sample(guided, "ddim", x_T=X, steps=3, cond={"class_labels": LABELS % 2})
    ends = guidance.classifier(exact(FLOW, "flow"), lambda x, t: x, 1.0, interval=(0.0, 100.0))
    assert sample(ends, "ddim", x_T=X, steps=3, cond={"class_labels": LABELS % 2}).isfinite().all()
