"""Guidance: equal to guided epsilon written by hand, on every kind of network and schedule, with every sampler."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from samplers import EpsModel, guidance, list_samplers, make_plan, metered, run_plan, sample, schedules

VP, EDM, FLOW = schedules.vp_linear(), schedules.edm(), schedules.flow()
ALL = {s.name: s for s in list_samplers()}
PLANNED = [name for name, entry in ALL.items() if not entry.adaptive]
LABELS = torch.tensor([0, 1, 2, 1])
COND = {"class_labels": LABELS}
NULL = {"class_labels": 3}
KINDS = [(VP, "eps"), (VP, "x0"), (VP, "v"), (VP, "score"), (VP, "flow"), (FLOW, "flow"), (EDM, "edm"), (EDM, "eps")]
kinds = pytest.mark.parametrize(("schedule", "predicts"), KINDS, ids=[f"{s.name}-{p}" for s, p in KINDS])
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def dot(a, b):
    return (a * b).sum(1, keepdim=True)


def cfg(eps, null, weaker, level):
    return null + 2.5 * (eps - null)


def interval(eps, null, weaker, level):
    return null + 2.5 * (eps - null) if 0.2 < level.sigma / level.alpha <= 3.0 else eps


def falling(eps, null, weaker, level):
    return null + (1 + level.sigma / (level.sigma + level.alpha)) * (eps - null)


def projected(eps, null, weaker, level):
    """The paper's algorithm 1, on x0."""
    x0, x0_null = ((level.x - level.sigma * e) / level.alpha for e in (eps, null))
    d = x0 - x0_null
    d = d * (0.3 / d.norm(dim=1, keepdim=True)).clamp(max=1)
    unit = x0 / x0.norm(dim=1, keepdim=True)
    d = d - (1 - 0.2) * dot(d, unit) * unit
    return (level.x - level.alpha * (x0 + 1.5 * d)) / level.sigma


def perpendicular(eps, null, weaker, level):
    """The negative condition is class 1."""
    p, n = eps - null, weaker - null
    return null + 2.0 * (p - 0.7 * (n - torch.where(dot(p, p) > 0, dot(n, p) / dot(p, p), 0.0) * p))


class Level:
    def __init__(self, x, t, schedule):
        self.x, self.alpha, self.sigma = x, float(schedule.alpha(float(t[0]))), float(schedule.sigma(float(t[0])))


def rescaled(eps, null, weaker, level):
    """Lin et al. 2023, equations 15 and 16, on epsilon."""
    guided = null + 2.5 * (eps - null)
    return guided * (0.3 + 0.7 * eps.std(1, keepdim=True) / guided.std(1, keepdim=True))


WAYS = {
    "cfg": (lambda m: guidance.classifier_free(m, 2.5, NULL), cfg),
    "cfg-two-calls": (lambda m: guidance.classifier_free(m, 2.5, NULL, batched=False), cfg),
    "interval": (lambda m: guidance.classifier_free(m, 2.5, NULL, interval=(0.2, 3.0)), interval),
    "falling": (lambda m: guidance.classifier_free(m, lambda s: 1 + s / (s + 1), NULL), falling),
    "apg": (lambda m: guidance.apg(m, 2.5, NULL, eta=0.2, norm_threshold=0.3), projected),
    "apg-plain": (lambda m: guidance.apg(m, 2.5, NULL, eta=1.0), cfg),
    "perp-neg": (lambda m: guidance.perp_neg(m, 2.0, NULL, {"class_labels": 1}, negative_scale=0.7), perpendicular),
}
# on what the network predicts, which here is epsilon
RESCALED = {"rescale": (lambda m: guidance.classifier_free(m, 2.5, NULL, rescale=0.7), rescaled)}


def by_hand(classes, formula, schedule):
    """An epsilon-model guided by a formula."""
    base = classes(schedule)

    def eps(x, t, class_labels):
        labels = (class_labels, torch.full_like(class_labels, 3), torch.full_like(class_labels, 1))
        return formula(*(base.eps(x, t, class_labels=one) for one in labels), Level(x, t, schedule))

    return EpsModel(eps, schedule)


def labels_for(way):
    return {"class_labels": torch.tensor([0, 2, 2, 0])} if way == "perp-neg" else COND


@pytest.mark.parametrize("name", ALL)
def test_every_sampler(classes, name):
    where = {"rtol": 1e-2, "atol": 1e-2} if ALL[name].adaptive else {"steps": 6}
    given = {"x_T": X, "cond": COND, **where}
    expected = sample(by_hand(classes, cfg, VP), name, **given)
    guided = guidance.classifier_free(classes(VP), 2.5, NULL)
    torch.testing.assert_close(sample(guided, name, **given), expected, rtol=1e-10, atol=1e-10)
    assert (expected - sample(classes(VP), name, **given)).abs().max() > 0.01


@pytest.mark.parametrize("way", [*WAYS, *RESCALED])
def test_every_way_with_every_sampler(way):
    (wrap, formula), cond, failed = (WAYS | RESCALED)[way], labels_for(way), {}
    guided, hand = wrap(linear(predicts="eps")), by_hand(lambda _: linear(predicts="eps"), formula, VP)
    for name, entry in ALL.items():
        where = {"rtol": 1e-2, "atol": 1e-2} if entry.adaptive else {"steps": 6}
        expected = sample(hand, name, x_T=X, cond=cond, **where)
        error = float((sample(guided, name, x_T=X, cond=cond, **where) - expected).abs().max() / expected.abs().max())
        if not error < (
            1e-4 if entry.adaptive else 1e-9
        ):  # step sizes follow rounding where 2 numbers have no deviation
            failed[name] = error
    assert not failed


@kinds
@pytest.mark.parametrize("way", WAYS)
def test_every_kind_of_network(classes, schedule, predicts, way):
    wrap, formula = WAYS[way]
    guided, hand, cond = wrap(classes(schedule, predicts)), by_hand(classes, formula, schedule), labels_for(way)
    for t in (schedule.t_min + part * (schedule.t_max - schedule.t_min) for part in (0.02, 0.3, 0.9)):
        x = float(schedule.alpha(t)) * X + float(schedule.sigma(t)) * X.flip(0)
        for kind in ("eps", "x0", "v"):
            expected = getattr(hand, kind)(x, t, **cond)
            # a projection loses digits where what it projects on nearly vanishes
            atol = (1e-7 if way == "perp-neg" else 1e-9) * float(expected.abs().max() + x.abs().max())
            tolerance = {"rtol": 1e-9, "atol": atol}
            torch.testing.assert_close(getattr(guided, kind)(x, t, **cond), expected, **tolerance)
            times = torch.full((4,), t, dtype=torch.float64)  # where nobody looks at the level
            torch.testing.assert_close(getattr(guided, kind)(x, times, **cond), expected, **tolerance)


def test_times_of_several_levels_in_one_batch(classes):
    guided = guidance.classifier_free(classes(VP), lambda s: 1.0 + s, NULL, interval=(0.2, 3.0))
    t = torch.tensor([0.01, 0.3, 0.5, 0.9], dtype=torch.float64)
    one_by_one = [guided(X[i : i + 1], float(t[i]), class_labels=LABELS[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(guided(X, t, **COND), torch.cat(one_by_one), rtol=1e-12, atol=1e-12)


def test_a_scale_for_each_sample(classes):
    scale = torch.tensor([1.0, 2.0, 0.5, 7.0], dtype=torch.float64)
    guided = guidance.classifier_free(classes(VP), scale, NULL)
    each = [
        guidance.classifier_free(classes(VP), float(scale[i]), NULL)(X[i : i + 1], 0.4, class_labels=LABELS[i : i + 1])
        for i in range(4)
    ]
    torch.testing.assert_close(guided(X, 0.4, **COND), torch.cat(each), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"scale must be a number or of shape \(3,\), got \(4,\)"):
        guided(X[:3], 0.4, class_labels=LABELS[:3])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["interval", "perp-neg"])
def test_compiled(way):
    guided, cond = WAYS[way][0](linear()), {"class_labels": torch.tensor([0, 2, 2, 0])}
    given = {"x_T": X, "cond": cond, "steps": 3}
    expected = sample(guided, "ddim", **given)
    torch.testing.assert_close(sample(guided, "ddim", compile="loop", **given), expected, rtol=1e-10, atol=1e-10)


def linear(dtype=torch.float64, predicts="v"):
    """A network of three classes and none that torch.compile sees through."""
    weights = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)

    def net(x, t, class_labels):
        return torch.einsum("bij,bj->bi", weights[class_labels], x) * t[:, None].to(x.dtype)

    return EpsModel(net, VP, predicts)


# CFG++ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [VP, FLOW, EDM], ids=lambda s: s.name)
@pytest.mark.parametrize("final", ["t_min", "zero"])
def test_cfg_plus_plus_is_the_papers_step(classes, schedule, final):
    predicts = "flow" if schedule is FLOW else "eps"
    plan, base = make_plan("ddim", schedule, steps=8, final=final), classes(schedule, predicts)
    model = guidance.cfg_plus_plus(base, 0.6, NULL, plan)
    x = x_T = plan.sigma_T * X
    for t, after in zip(plan.times, plan.times[1:], strict=False):
        alpha, sigma, alpha2, sigma2 = (float(f(u)) for u in (t, after) for f in (schedule.alpha, schedule.sigma))
        if alpha > 0:
            eps, null = (base.eps(x, t, class_labels=one) for one in (LABELS, torch.full_like(LABELS, 3)))
            x0 = (x - sigma * (null + 0.6 * (eps - null))) / alpha
        else:  # both from the flow network's x0
            x0, x0_null = (base.x0(x, t, class_labels=one) for one in (LABELS, torch.full_like(LABELS, 3)))
            x0, null = x0_null + 0.6 * (x0 - x0_null), x / sigma
        x = alpha2 * x0 + sigma2 * null
    got = run_plan(plan, model, x_T, cond=COND)
    torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-12 * float(x_T.abs().max()))
    if final == "t_min":  # explicit times end where the model does
        nodes = guidance.cfg_plus_plus(base, 0.6, NULL, plan.times)
        torch.testing.assert_close(run_plan(plan, nodes, x_T, cond=COND), got, rtol=0, atol=0)


@pytest.mark.parametrize("name", PLANNED)
def test_cfg_plus_plus_with_every_sampler(classes, name):
    plan = make_plan(name, VP, steps=6)
    guided = guidance.cfg_plus_plus(classes(VP), 0.6, NULL, plan)
    assert run_plan(plan, guided, X, cond=COND).isfinite().all()
    steps = guided.scale
    for call in plan.calls:  # each lies in a step that began at no less noise
        level = call.sigma / call.alpha
        i = max([k for k, t in enumerate(plan.times[:-1]) if VP.sigma_bar(t) >= level * (1 - 1e-9)], default=0)
        h = float(VP.lam(plan.times[i + 1]) - VP.lam(plan.times[i]))
        assert steps(level) == pytest.approx(0.6 / -math.expm1(-h), rel=1e-9)


# momentum ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp-2m"])
def test_momentum_is_a_sum_over_the_calls_of_a_run(classes, name):
    memory = []

    def formula(eps, null, weaker, level):
        x0, x0_null = ((level.x - level.sigma * e) / level.alpha for e in (eps, null))
        memory.append(x0 - x0_null - 0.5 * memory[-1] if memory else x0 - x0_null)
        unit = x0 / x0.norm(dim=1, keepdim=True)
        d = memory[-1] - dot(memory[-1], unit) * unit
        return (level.x - level.alpha * (x0 + 1.5 * d)) / level.sigma

    given = {"x_T": X, "steps": 5, "cond": COND}
    model = guidance.apg(classes(VP), 2.5, NULL, momentum=-0.5)
    expected = sample(by_hand(classes, formula, VP), name, **given)
    torch.testing.assert_close(sample(model, name, **given), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sample(model, name, **given), expected, rtol=1e-9, atol=1e-9)  # no leak between runs
    alone = sample(model, name, x_T=X[1:2], steps=5, cond={"class_labels": LABELS[1:2]})
    torch.testing.assert_close(alone, expected[1:2], rtol=1e-9, atol=1e-9)  # nor between samples


def test_a_call_outside_a_run_has_no_memory(classes):
    model = guidance.clip(guidance.apg(classes(VP), 2.5, NULL, momentum=-0.5), 100.0)
    first = model(X, 0.4, **COND)
    sample(model, "ddim", x_T=X, steps=3, cond=COND)
    assert torch.equal(model(X, 0.4, **COND), first)
    one_step = {"x_T": X, "steps": 1, "cond": COND}
    assert torch.equal(sample(model, "ddim", **one_step), sample(model, "ddim", **one_step))


def test_momentum_compiled():
    model = guidance.apg(linear(), 2.5, NULL, momentum=-0.5)
    given = {"x_T": X, "cond": COND, "steps": 3}
    expected = sample(model, "ddim", **given)
    for _ in range(2):
        torch.testing.assert_close(sample(model, "ddim", compile="loop", **given), expected, rtol=1e-10, atol=1e-10)
    without = sample(guidance.apg(linear(), 2.5, NULL), "ddim", **given)
    assert (without - expected).abs().max() > 1e-4


# half precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [*WAYS, "rescale", "auto", "classifier"])
def test_half_precision_stays_and_is_close(way):
    more = {
        "rescale": lambda m: guidance.classifier_free(m, 2.5, NULL, rescale=0.7),
        "auto": lambda m: guidance.autoguidance(m, EpsModel(lambda x, t, class_labels: x, VP, "v"), 2.0),
        "classifier": lambda m: guidance.classifier(m, lambda x, t: x, 1.5, conditional=True),
    }
    wrap = more.get(way) or WAYS[way][0]
    cond = {"class_labels": torch.tensor([0, 1, 1, 0])} if way == "classifier" else COND
    seen = []
    half = linear(torch.bfloat16)
    inner = half.net
    half.net = lambda x, t, **c: seen.append((x.dtype, t.dtype)) or inner(x, t, **c)
    got = wrap(half).eps(X.bfloat16(), 0.5, **cond)
    assert got.dtype == torch.bfloat16
    assert set(seen) == {(torch.bfloat16, torch.float32)}
    exact = wrap(linear()).eps(X, 0.5, **cond)
    assert (got.double() - exact).abs().max() < 0.05 * exact.abs().max()
    assert sample(wrap(half), "dpmpp-2m", x_T=X.bfloat16(), steps=3, cond=cond).dtype == torch.bfloat16


# waiting for the device --------------------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Refuses to read a tensor's number into Python, which on an accelerator waits for all that was asked of it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a number of a tensor was read")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "way", [*WAYS, "rescale", "momentum", "auto", "auto-schedule", "classifier", "threshold", "cfg++"]
)
def test_nothing_waits_for_the_device(way):
    plan = make_plan("dpmpp-2m", VP, steps=4)
    weak, other = (EpsModel(lambda x, t, class_labels: x, s, "x0") for s in (VP, schedules.edm(1e-3, 1e3)))
    more = {
        "rescale": lambda m: guidance.classifier_free(m, 2.5, NULL, rescale=0.7),
        "momentum": lambda m: guidance.apg(m, 2.5, NULL, norm_threshold=1.0, momentum=-0.5),
        "auto": lambda m: guidance.autoguidance(m, weak, 2.0),
        "auto-schedule": lambda m: guidance.autoguidance(m, other, 2.0, interval=(0.1, 5.0)),
        "classifier": lambda m: guidance.classifier(m, lambda x, t: x.repeat(1, 2), 1.5, conditional=True),
        "threshold": lambda m: guidance.threshold(guidance.clip(m, 3.0)),
        "cfg++": lambda m: guidance.cfg_plus_plus(m, 0.6, NULL, plan),
    }
    model = metered((more.get(way) or WAYS[way][0])(linear()))
    with NoWaiting():
        run_plan(plan, model, X, cond=COND, check=False)
    with pytest.raises(AssertionError, match="a number"), NoWaiting():  # it would be seen
        bool(X[0, 0] > 0)


# against diffusers -------------------------------------------------------------------------------------------------


@pytest.mark.parity
def test_rescale_is_that_of_diffusers(classes):
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    base = classes(VP, "v")
    raw = lambda labels: base.net(X, torch.full((4,), 0.5, dtype=torch.float64), labels)  # noqa: E731
    eps, null = raw(LABELS), raw(torch.full_like(LABELS, 3))
    expected = rescale_noise_cfg(null + 2.5 * (eps - null), eps, 0.7)
    guided = guidance.classifier_free(base, 2.5, NULL, rescale=0.7)
    alpha, sigma = float(VP.alpha(0.5)), float(VP.sigma(0.5))
    got = guided.output(X, torch.full((4,), 0.5, dtype=torch.float64), alpha, sigma, COND)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parity
@pytest.mark.parametrize(("eta", "threshold", "momentum"), [(0.0, 0.0, None), (0.5, 0.4, None), (1.0, 0.2, -0.6)])
def test_apg_is_that_of_diffusers(eta, threshold, momentum):
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    buffer, expected = MomentumBuffer(momentum) if momentum else None, []
    for cond, null in outputs:
        # their formulation that starts from the conditional prediction has the paper's scale - 1 as its scale
        expected.append(normalized_guidance(cond, null, 2.0, buffer, eta, threshold, True))
    made = iter(outputs)
    model = EpsModel(lambda x, t, class_labels: next(made).flatten(0, 1), VP, "x0")
    given = {"eta": eta, "norm_threshold": threshold or math.inf, "momentum": momentum or 0.0}
    run = guidance.apg(model, 3.0, {"class_labels": 3}, **given).begin()
    x, labels = torch.zeros(2, 3, 4, 4, dtype=torch.float64), {"class_labels": torch.zeros(2, dtype=torch.int64)}
    got = [run.output(x, torch.full((2,), 0.5), 0.8, 0.6, labels) for _ in range(3)]
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=1e-9, atol=1e-9)


# conditions --------------------------------------------------------------------------------------------------------


def seen_by_the_network(null, cond, batched=True, batch=4):
    seen = []

    def net(x, t, **cond):
        seen.append(cond)
        return x

    sample(
        guidance.classifier_free(EpsModel(net, VP), 2.0, null, batched=batched),
        "ddim",
        x_T=X[:batch],
        steps=1,
        cond=cond,
    )
    return seen


def test_nested_conditions_and_those_without_a_row_for_each():
    text, ids, control = torch.rand(4, 3), torch.rand(4, 2), [torch.rand(4, 1, 1), torch.rand(4, 5)]
    empty, table = torch.zeros(3), torch.rand(7, 2)
    cond = {
        "added": {"text": text, "ids": ids},
        "control": control,
        "table": table,
        "strength": 0.5,
        "mode": "a",
        "no": None,
    }
    [both] = seen_by_the_network({"added": {"text": empty}}, cond)
    assert torch.equal(both["added"]["text"], torch.cat([text, empty.expand(4, 3)]))
    assert torch.equal(both["added"]["ids"], torch.cat([ids, ids]))
    assert [torch.equal(a, torch.cat([b, b])) for a, b in zip(both["control"], control, strict=True)] == [True, True]
    assert both["table"] is table
    assert (both["strength"], both["mode"], both["no"]) == (0.5, "a", None)
    first, second = seen_by_the_network({"added": {"text": empty}}, cond, batched=False)
    assert first["added"]["text"] is text
    assert torch.equal(second["added"]["text"], empty.expand(4, 3))
    assert first["control"] is second["control"] is control
    with pytest.raises(ValueError, match=r"null\['added'\]\['words'\]|null\['words'\] replaces"):
        seen_by_the_network({"added": {"words": empty}}, cond)


@pytest.mark.parametrize(
    "null", [torch.ones(1, 2, 3), torch.ones(2, 3), torch.ones(4, 2, 3), torch.ones(2, 3).double(), 1]
)
@pytest.mark.parametrize("rows", [4, 1])
def test_the_shapes_of_a_null_condition(null, rows):
    [both] = seen_by_the_network({"e": null}, {"e": torch.zeros(rows, 2, 3)})
    assert both["e"].dtype == torch.float32
    assert both["e"].shape == (8, 2, 3)
    assert torch.equal(both["e"], torch.cat([torch.zeros(4, 2, 3), torch.ones(4, 2, 3)]))


def test_none_and_texts_are_for_two_calls():
    assert [one["y"] for one in seen_by_the_network({"y": None}, {"y": LABELS}, batched=False)][1] is None
    assert [one["y"] for one in seen_by_the_network({"y": "b"}, {"y": "a"}, batched=False)] == ["a", "b"]
    with pytest.raises(ValueError, match=r"null\['y'\]: str do not make one batch; .* batched=False"):
        seen_by_the_network({"y": "b"}, {"y": "a"})


# counting ----------------------------------------------------------------------------------------------------------


def test_the_interval_spares_calls(classes):
    model = metered(guidance.classifier_free(classes(VP), 2.5, NULL, interval=(0.2, 3.0)))
    plan = make_plan("ddim", VP, steps=10)
    inside = sum(0.2 < call.sigma / call.alpha <= 3.0 for call in plan.calls)
    assert 0 < inside < 10
    run_plan(plan, model, X, cond=COND)
    assert (model.counts.calls, model.counts.evaluations, model.counts.depth) == (10, 4 * (10 + inside), 10)


# errors ------------------------------------------------------------------------------------------------------------


def unconditional(x, t, class_labels=None):
    return x


BASE = EpsModel(unconditional, VP)
FREE = guidance.classifier_free


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: FREE(BASE, 2.0, None),
            TypeError,
            r"null must be a dict .* such as \{'class_labels': 10\}.* got NoneType",
        ),
        (lambda: FREE(BASE, 2.0, {}), ValueError, "null must name at least one entry of cond"),
        (lambda: FREE(lambda x, t: x, 2.0, NULL), TypeError, "model must be an EpsModel, got function; wrap it"),
        (lambda: FREE(BASE, math.nan, NULL), ValueError, "scale must be finite, got nan"),
        (lambda: FREE(BASE, "2", NULL), TypeError, "scale must be a number, a tensor .* got '2'"),
        (lambda: FREE(BASE, torch.ones(2, 2), NULL), ValueError, r"scale must be a number or of shape \(B,\)"),
        (
            lambda: FREE(BASE, 2.0, NULL, interval=(3.0, 1.0)),
            ValueError,
            r"interval must be \(low, high\) in sigma_bar",
        ),
        (lambda: FREE(BASE, 2.0, NULL, interval=3.0), TypeError, "interval must be None or"),
        (lambda: FREE(BASE, 2.0, NULL, rescale=1.5), ValueError, r"rescale must be a number in \[0, 1\], got 1.5"),
        (lambda: FREE(BASE, 2.0, NULL, batched=2), TypeError, "batched must be True or False, got 2"),
        (lambda: guidance.apg(BASE, 2.0, NULL, norm_threshold=0.0), ValueError, "norm_threshold must be positive"),
        (lambda: guidance.apg(BASE, 2.0, NULL, eta=math.inf), ValueError, "eta must be finite, got inf"),
        (lambda: guidance.perp_neg(BASE, 2.0, NULL, {}), ValueError, "negative must name at least one entry"),
        (lambda: guidance.perp_neg(BASE, 2.0, NULL, NULL, negative_scale=-1.0), ValueError, "negative_scale must be"),
        (lambda: guidance.perp_neg(BASE, 2.0, NULL, NULL, negative_scale="1"), TypeError, "negative_scale .* got '1'"),
        (lambda: guidance.cfg_plus_plus(BASE, 0.0, NULL, [1.0, 0.5]), ValueError, "scale must be a positive number"),
        (lambda: guidance.cfg_plus_plus(BASE, 0.6, NULL, [0.5, 1.0]), ValueError, "^grid must be .* decrease"),
        (lambda: guidance.cfg_plus_plus(BASE, 0.6, NULL, "rk45"), TypeError, "^grid must be a plan, .* got 'rk45'"),
        (lambda: guidance.cfg_plus_plus(BASE, 0.6, NULL, None), TypeError, "^grid must be a plan, .* got None"),
        (lambda: guidance.autoguidance(BASE, None, 2.0), TypeError, "weaker must be an EpsModel, got NoneType"),
        (lambda: guidance.classifier(BASE, None, 2.0), TypeError, r"classify must be callable as classify\(x, t\)"),
        (lambda: metered(None), TypeError, "model must be an EpsModel, got NoneType"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("null", "cond", "error", "message"),
    [
        (
            NULL,
            {},
            ValueError,
            r"null\['class_labels'\] replaces a condition that the call does not have \(it has: none\)",
        ),
        (NULL, {"y": LABELS}, ValueError, r"it has: 'y'"),
        ({"class_labels": torch.zeros(3)}, COND, ValueError, r"null\['class_labels'\] must have the shape .* \(4,\)"),
        (
            {"class_labels": torch.zeros(4, device="meta")},
            COND,
            ValueError,
            r"null\['class_labels'\] is on meta, the states on cpu; move one of them",
        ),
        ({"class_labels": None}, COND, ValueError, r"Tensor and NoneType do not make one batch; .* batched=False"),
        ({"class_labels": object()}, COND, TypeError, r"null\['class_labels'\] must be a tensor, a number"),
        (
            {"class_labels": {"a": 1}},
            COND,
            TypeError,
            r"null\['class_labels'\] is a dict, and the condition .* a Tensor",
        ),
        (
            {"e": torch.zeros(2, 7)},
            {"e": torch.zeros(4, 5, 7)},
            ValueError,
            r"null\['e'\]: tensors \(4, 5, 7\) on cpu and .* pad",
        ),
    ],
)
def test_bad_null_at_a_call(null, cond, error, message):
    with pytest.raises(error, match=message):
        sample(FREE(BASE, 2.0, null, interval=None), "ddim", x_T=X, steps=2, cond=cond)


def test_a_missing_condition_is_told_of_before_the_interval_is_reached():
    with pytest.raises(ValueError, match="the call does not have"):
        FREE(BASE, 2.0, NULL, interval=(0.1, 0.2))(X, 0.9)


def test_scale_on_another_device():
    with pytest.raises(ValueError, match="scale is on meta, the states on cpu; move one of them"):
        FREE(BASE, torch.ones(4, device="meta"), NULL)(X, 0.5, **COND)
