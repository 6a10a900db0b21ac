"""Plans: what is refused, JSON that keeps every bit, and the matrix by which two plans are compared."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import samplers
from samplers import Plan, PlanError, list_samplers, make_plan, schedules
from samplers.program import Combine, Evaluate

VP, EDM, FLOW = schedules.vp_linear(), schedules.edm(), schedules.flow()
ENTRIES = {s.name: s for s in list_samplers() if not s.adaptive}
every_sampler = pytest.mark.parametrize("name", ENTRIES)


def evaluate(dst="o0", src="x_T", t=1.0, alpha=0.6, sigma=0.8, kind="eps"):
    return Evaluate(dst, src, t, alpha, sigma, kind)


def build(*instructions, times=(1.0, 0.0)):
    return Plan(tuple(instructions), times, "eps", 1.0)


X1 = Combine("x1", (("x_T", 0.5), ("o0", 0.25)), 1)


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        ((evaluate(src="x9"), X1), r"instructions\[0\]: uses 'x9' before it exists"),
        ((X1, evaluate()), r"instructions\[0\]: uses 'o0' before it exists"),
        ((evaluate(), Combine("x1", (("x1", 1.0),))), r"instructions\[1\]: uses 'x1' before it exists"),
        ((evaluate(), evaluate(), X1), r"instructions\[1\]: defines 'o0' a second time"),
        ((evaluate(dst="x_T"), X1), r"instructions\[0\]: defines 'x_T' a second time"),
        ((evaluate(dst="z0"), X1), r"instructions\[0\]: defines 'z0' but names with z are for noises"),
        ((evaluate(dst=""), X1), r"instructions\[0\]: defines '' but"),
        ((evaluate(), Combine("x1", (("o0", math.nan),))), r"instructions\[1\]: not finite"),
        ((evaluate(), Combine("x1", (("o0", math.inf),))), r"instructions\[1\]: not finite"),
        ((evaluate(t=math.nan), X1), r"instructions\[0\]: not finite"),
        ((evaluate(t=-math.inf, alpha=math.inf), X1), r"instructions\[0\]: not finite"),
        ((), "instructions: the last one must be a combine"),
        ((evaluate(),), "instructions: the last one must be a combine"),
        ((Combine("x1", (("z1", 1.0),)),), r"instructions\[0\]: uses 'z1' before it exists"),
        ((Combine("x1", (("zebra", 1.0),)),), r"instructions\[0\]: uses 'zebra' before it exists"),
        ((Combine("x1", ()),), r"instructions\[0\]: must use at least one name, and each once, got \[\]"),
        ((Combine("x1", (("x_T", 1.0), ("x_T", 1.0))),), r"\[0\]: must use at least one name, and each once"),
        ((Combine("x1", (("x_T", 1.0),), 2),), r"instructions\[0\].node: must be 1 to 1, got 2"),
        ((Combine("x1", (("x_T", 1.0),), 0),), r"instructions\[0\].node: must be 1 to 1, got 0"),
        (
            (evaluate(), X1, Combine("x2", (("x1", 1.0),), 1)),
            r"instructions\[2\].node: must be above 1, the one before, got 1",
        ),
        ((evaluate(alpha=-0.6), X1), r"^instructions\[0\].alpha: must be at least 0, got -0.6"),
        ((evaluate(sigma=-0.8), X1), r"^instructions\[0\].sigma: must be at least 0, got -0.8"),
        ((evaluate(alpha=0.0, sigma=0.0), X1), r"^instructions\[0\].sigma: must be above 0 where alpha is 0, got 0.0"),
        ((evaluate(kind="epsilon"), X1), r"instructions\[0\].kind: must be one of \('eps', 'x0'\), got 'epsilon'"),
        (
            (Combine("x1", (("x_T", 1.0), ("z0", 1.0))), evaluate(src="z0"), Combine("x2", (("o0", 1.0),))),
            r"instructions\[1\].src: must be a state, got the noise 'z0'",
        ),
        (
            (evaluate(), evaluate(dst="o1", src="o0"), Combine("x1", (("o1", 1.0),))),
            r"instructions\[1\].src: must be a state, got the output 'o0' of another call",
        ),
    ],
)
def test_what_cannot_run_is_refused(instructions, message):
    with pytest.raises(PlanError, match=message):
        build(*instructions)


@pytest.mark.parametrize(
    ("prediction", "sigma_T", "message"),
    [
        ("epsilon", 1.0, r"prediction: must be one of \('eps', 'x0'\), got 'epsilon'"),
        ("eps", math.nan, "sigma_T: must be a finite number of at least 0, got nan"),
        ("eps", math.inf, "sigma_T: must be a finite number of at least 0, got inf"),
        ("x0", -1.0, "sigma_T: must be a finite number of at least 0, got -1.0"),
    ],
)
def test_a_head_that_means_nothing_is_refused(prediction, sigma_T, message):
    with pytest.raises(PlanError, match=message):
        Plan((evaluate(), X1), (1.0, 0.0), prediction, sigma_T)


def test_nodes_rise():
    second, first = Combine("x1", (("x_T", 1.0),), 2), Combine("x2", (("x1", 1.0),), 1)
    assert build(second, times=(2.0, 1.0, 0.0)).steps == 2
    with pytest.raises(PlanError, match=r"instructions\[1\].node: must be above 2, the one before, got 1"):
        build(second, first, times=(2.0, 1.0, 0.0))


@pytest.mark.parametrize("times", [(), (1.0,), (0.5, 1.0), (1.0, 1.0), (1.0, math.nan)])
def test_times_decrease(times):
    with pytest.raises(PlanError, match="times: must be at least 2 and decrease strictly"):
        build(evaluate(), X1, times=times)


def test_what_a_plan_says_of_itself():
    plan = build(evaluate(), Combine("x1", (("x_T", 0.5), ("z0", 0.1))), Combine("x2", (("x1", 1.0), ("z0", 2.0))))
    assert (plan.nfe, plan.steps, plan.noises, plan.stochastic) == (1, 1, 1, True)
    assert (build(evaluate(), X1).noises, build(evaluate(), X1).stochastic) == (0, False)


@every_sampler
def test_ten_steps_of_each(name):
    plan = make_plan(name, VP, steps=10)
    entry = ENTRIES[name]
    assert plan.steps == 10
    more = {"pndm": 9, "restart": 8}  # three Runge-Kutta steps of four calls; two restarts of two steps
    assert plan.nfe == 10 * entry.calls + more.get(name, 0)
    assert (plan.times[0], plan.times[-1]) == (1.0, pytest.approx(1e-3, rel=1e-9))
    assert plan.sampler == name
    assert plan.sigma_T == VP.sigma(1.0)
    assert plan.stochastic == (entry.stochastic == "yes" or entry.options.get(entry.stochastic, 0) > 0)
    assert [s.node for s in plan.instructions if isinstance(s, Combine) and s.node] == list(range(1, 11))


@every_sampler
@pytest.mark.parametrize("final", ["t_min", "zero", "denoise"])
def test_no_term_is_multiplied_by_zero(name, final):
    quiet = {option: 0.0 for option in ("eta", "tau", "s_noise") if option in ENTRIES[name].options}
    for given in ({}, quiet):
        plan = make_plan(name, VP, steps=5, final=final, **given)
        assert all(c != 0 for s in plan.instructions if isinstance(s, Combine) for _, c in s.terms)
    assert plan.stochastic == (ENTRIES[name].stochastic == "yes" and "s_noise" not in quiet)


def test_noises_are_numbered_by_use():
    plan = make_plan("ddpm", VP, steps=4, final="zero")
    names = [n for s in plan.instructions if isinstance(s, Combine) for n, _ in s.terms if n.startswith("z")]
    assert names == ["z0", "z1", "z2"]  # no noise on the step to sigma = 0


@every_sampler
@pytest.mark.parametrize("final", ["t_min", "zero"])
def test_json_keeps_every_bit(name, final):
    plan = make_plan(name, VP, steps=7, final=final)
    back = Plan.from_json(plan.to_json())
    assert back == plan
    assert back.sampler == name
    assert back.to_json() == plan.to_json()
    assert hash(back) == hash(plan)


def test_json_says_what_it_is():
    document = json.loads(build(evaluate(), X1).to_json())
    assert (document["format"], document["version"]) == ("fewstep-plan", 1)
    assert document["instructions"][1] == {
        "op": "combine",
        "dst": "x1",
        "terms": [["x_T", 0.5], ["o0", 0.25]],
        "node": 1,
    }


def edited(path, value, plan=None):
    """The JSON of a plan, by default a small one, with the field at `path` replaced, or removed where value is `...`."""
    document = json.loads((plan or build(evaluate(), X1)).to_json())
    item = document
    for key in path[:-1]:
        item = item[key]
    if value is ...:
        del item[path[-1]]
    else:
        item[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "other", r"^format: must be one of \('fewstep-plan',\), got 'other'"),
        (["format"], True, "^format: must be str, got True"),
        (["version"], 2, "^version: must be 1, got 2"),
        (["version"], True, "version: must be int, got True"),
        (["version"], ..., "version: missing"),
        (["sigmaT"], 1.0, r"^sigmaT: unknown field; accepted: format, version, .* instructions, sigmas, timesteps"),
        (["sigmas"], 3.0, "^sigmas: must be list, got 3.0"),
        (["timesteps"], [1.0, "0"], r"^timesteps\[1\]: must be a finite number, got '0'"),
        (["times"], {}, "times: must be list"),
        (["times", 1], "a", r"times\[1\]: must be a finite number, got 'a'"),
        (["times", 0], 10**400, r"times\[0\]: must be a finite number"),
        (["prediction"], "v", "prediction: must be one of .* got 'v'"),
        (["sigma_T"], True, "sigma_T: must be"),
        (["sigma_T"], None, "sigma_T: must be a finite number, got None"),
        (["sampler"], 5, "sampler: must be str, got 5"),
        (["instructions"], ..., "instructions: missing"),
        (["instructions", 0], [], r"instructions\[0\]: must be an object, got list"),
        (["instructions", 0, "op"], "goto", r"instructions\[0\].op: must be one of"),
        (["instructions", 0, "alpha"], math.nan, r"instructions\[0\].alpha: must be a finite number, got nan"),
        (["instructions", 0, "t"], math.inf, r"instructions\[0\].t: must be a finite number, got inf"),
        (["instructions", 0, "alpha"], -0.6, r"^instructions\[0\].alpha: must be at least 0, got -0.6"),
        (["instructions", 0, "sigma"], -1, r"^instructions\[0\].sigma: must be at least 0, got -1.0"),
        (["instructions", 0, "src"], 1, r"instructions\[0\].src: must be str"),
        (["instructions", 0, "kind"], "v", r"instructions\[0\].kind: must be one of"),
        (["instructions", 1, "dst"], ..., r"instructions\[1\].dst: missing"),
        (["instructions", 1, "terms"], [], r"instructions\[1\].terms: must not be empty"),
        (["instructions", 1, "terms", 0], ["x_T"], r"terms\[0\]: must be \[name, coefficient\]"),
        (["instructions", 1, "terms", 0], ["", 1.0], r"terms\[0\]: must be \[name, coefficient\]"),
        (["instructions", 1, "terms", 1], ["o0", "1"], r"instructions\[1\].terms\[1\]\[1\]: must be a finite number"),
        (["instructions", 1, "node"], 0.5, r"instructions\[1\].node: must be an integer or null"),
        (["instructions", 1, "node"], True, r"instructions\[1\].node: must be an integer or null"),
        (["instructions", 1, "node"], 9, r"instructions\[1\].node: must be 1 to 1, got 9"),
    ],
)
def test_malformed_files_name_the_field(path, value, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(edited(path, value))


@pytest.mark.parametrize(
    ("field", "path"),
    [
        ('"sigma_T": 1.0', "sigma_T"),
        ('"instructions": []', "instructions"),
        ('"alpha": 0.6', r"instructions\[0\].alpha"),
        ('"node": 1', r"instructions\[1\].node"),
    ],
)
def test_a_field_that_is_there_twice_is_named(field, path):
    name = field.split(":")[0]
    text = build(evaluate(), X1).to_json().replace(name, f"{field}, {name}")  # the last one, which json keeps, is right
    with pytest.raises(PlanError, match=f"^{path}: must be there once, and is there more often"):
        Plan.from_json(text)


def places(value, path=()):
    """The paths of a JSON value and of all values in it."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


WRONG = (None, "x", "", "x_T", "z0", -1, 0, 1.5, True, False, [], [1.0], {}, math.nan, math.inf, 10**400)
WHOLE = make_plan("dpmpp-sde", VP, steps=2, grid="logsnr", final="zero")
PLACES = [place for place in places(json.loads(WHOLE.to_json())) if place]
SCHEMA = json.loads((Path(samplers.__file__).parent / "plan.schema.json").read_text())


def read(text):
    """The plan, or the refusal."""
    try:
        return Plan.from_json(text)
    except PlanError as error:
        return error


def names(error, path):
    """Whether a refusal names the field at `path`; of an instruction also one that comes to grief by it further on."""
    head, _, number = re.match(r"(\w+)(\[(\d+)\])?", str(error)).groups()
    return head == path[0] and (head != "instructions" or number is None or path[1:] == () or int(number) >= path[1])


@pytest.mark.parametrize("path", PLACES, ids=lambda path: ".".join(map(str, path)))
def test_whatever_stands_in_a_field_it_is_named_or_makes_a_plan(path):
    jsonschema = pytest.importorskip("jsonschema")
    for value in (*WRONG, ...) if isinstance(path[-1], str) else WRONG:
        text = edited(path, value, WHOLE)
        plan = read(text)
        if isinstance(plan, PlanError):
            assert names(plan, path), (value, plan)
            continue
        jsonschema.validate(json.loads(text), SCHEMA)
        assert Plan.from_json(plan.to_json()) == plan
        assert plan.program((False,) * plan.nfe).code
        assert plan.matrix().shape == (plan.nfe + 1, 1 + plan.nfe + plan.noises)


@pytest.mark.parametrize("text", [None, 5, {}, ["x"]])
def test_what_is_no_text(text):
    with pytest.raises(TypeError, match="text must be the JSON of a plan, got"):
        Plan.from_json(text)


@pytest.mark.parametrize("text", ["", "{", "plan", "[" * 200_000])
def test_not_json(text):
    with pytest.raises(PlanError, match="not JSON"):
        Plan.from_json(text)


def test_json_that_is_no_object():
    with pytest.raises(PlanError, match="plan: must be an object, got list"):
        Plan.from_json("[]")


def test_matrix_of_ddim_by_hand():
    # EDM: x1 = x - 2 eps0, x2 = x1 - eps1; and with eps = (x - x0) / sigma: x1 = x/2 + d0/2, x2 = x1/2 + d1/2
    plan = make_plan("ddim", EDM, timesteps=[4.0, 2.0, 1.0])
    np.testing.assert_allclose(plan.matrix(), [[1, 0, 0], [1, -2, 0], [1, -2, -1]], atol=1e-15)
    np.testing.assert_allclose(plan.matrix("x0"), [[1, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]], atol=1e-15)
    # flow from t = 1/2 to 1/4: x' = (alpha'/alpha) x + (sigma' - sigma alpha'/alpha) eps = 3/2 x - 1/2 eps
    plan = make_plan("ddim", FLOW, timesteps=[0.5, 0.25])
    np.testing.assert_allclose(plan.matrix("eps"), [[1, 0], [1.5, -0.5]], atol=1e-15)
    np.testing.assert_allclose(plan.matrix("x0"), [[1, 0], [0.5, 0.5]], atol=1e-15)


def test_matrix_has_a_column_for_each_noise():
    # EDM, ancestral from 2 to 1: sigma_up^2 = 1 - 1/4, sigma_down = 1/2
    plan = make_plan("euler-ancestral", EDM, timesteps=[2.0, 1.0])
    np.testing.assert_allclose(plan.matrix(), [[1, 0, 0], [1, -1.5, 0.75**0.5]], atol=1e-15)


@every_sampler
def test_matrix_is_lower_triangular_and_converts_both_ways(name):
    plan = make_plan(name, VP, steps=4)
    own, other = plan.matrix(plan.prediction), plan.matrix("eps" if plan.prediction == "x0" else "x0")
    np.testing.assert_array_equal(plan.matrix(), own)
    assert own.shape == (plan.nfe + 1, 1 + plan.nfe + plan.noises)
    for matrix in (own, other):
        assert not np.triu(matrix[:, 1 : 1 + plan.nfe]).any()
    np.testing.assert_allclose(states_of(plan, "eps"), states_of(plan, "x0"), rtol=1e-9)


def states_of(plan, kind):
    """Every state of a scalar run from x_T = 2 with a network that always answers x0 = 0.3, from the plan's matrix."""
    levels = [(s.alpha, s.sigma) for s in plan.instructions if isinstance(s, Evaluate)]
    noises, outputs, states = np.linspace(-1, 1, plan.noises), np.zeros(plan.nfe), []
    for j, row in enumerate(plan.matrix(kind)):
        states.append(row @ np.concatenate([[2.0], outputs, noises]))
        if j < plan.nfe:
            alpha, sigma = levels[j]
            outputs[j] = 0.3 if kind == "x0" else (states[j] - alpha * 0.3) / sigma
    return states


def test_matrix_refuses_what_it_cannot_express():
    with pytest.raises(ValueError, match="kind must be 'eps', 'x0' or None, got 'v'"):
        make_plan("ddim", VP, steps=2).matrix("v")
    with pytest.raises(ValueError, match="takes x0 at t=1, where it does not follow from the other kind"):
        make_plan("ddim", FLOW, steps=2).matrix("eps")
    assert np.isfinite(make_plan("ddim", FLOW, steps=2).matrix("x0")).all()


def test_close_compares_what_is_computed():
    plan = make_plan("ddim", VP, steps=5)
    scaled = [replace_coefficient(plan, 1 + error) for error in (1e-11, 1e-6)]
    assert plan.close(scaled[0])
    assert plan != scaled[0]
    assert not plan.close(scaled[1])
    assert plan.close(scaled[1], rtol=1e-5)
    assert not plan.close(make_plan("ddim", VP, steps=6))
    assert not plan.close(make_plan("ddim", VP, steps=5, eta=1.0))
    assert not plan.close(make_plan("ddim", VP, steps=5, grid="logsnr"))


def replace_coefficient(plan, factor):
    """The plan with the last coefficient of its last step multiplied by `factor`."""
    *rest, last = plan.instructions
    *terms, (name, coefficient) = last.terms
    return replace(plan, instructions=(*rest, last._replace(terms=(*terms, (name, coefficient * factor)))))


def test_close_where_one_starts_at_alpha_zero():
    nodes = [1.0, 0.5, 0.1]
    noise, vp = make_plan("ddim", FLOW, timesteps=nodes), make_plan("ddim", VP, timesteps=nodes)
    assert noise.close(make_plan("dpm-solver-1", FLOW, timesteps=nodes))
    assert not noise.close(vp)
    assert not vp.close(noise)


def test_equality_ignores_the_name():
    a, b = make_plan("ddim", VP, steps=5), make_plan("euler", VP, steps=5)
    assert a.sampler != b.sampler
    assert a == b
    assert a != make_plan("euler", VP, steps=6)
