"""Any sampler on any schedule and grid with any options: a plan that runs finite on an exact mixture, or a plain refusal."""

from __future__ import annotations

import functools
import itertools
import math
import os
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from bench.mixture import GaussianMixture
from samplers import EpsModel, grids, list_samplers, make_plan, run_plan, schedules
from samplers.errors import LARGEST_AMOUNT
from samplers.grid import FINALS, GRIDS

ENTRIES = {s.name: s for s in list_samplers()}
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "12"))  # for each sampler
BETAS = np.linspace(1e-4, 0.02, 1000)
SCHEDULES = {
    "vp_linear": schedules.vp_linear(),
    "cosine": schedules.cosine(),
    "edm": schedules.edm(),
    "video": schedules.edm(0.002, 700.0),
    "flow": schedules.flow(),
    "discrete": schedules.from_betas(BETAS),
    "stable_diffusion": schedules.from_betas(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),
    "short": schedules.from_betas(np.linspace(0.01, 0.5, 20)),
    "zero_snr": schedules.from_alphas_cumprod(np.append(np.cumprod(1 - BETAS)[:-1], 0.0)),
}
MIXTURE = GaussianMixture.isotropic([[1.0, 0.2], [-0.5, 0.8], [0.1, -1.0]], [0.12, 0.1, 0.3])
Z = torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@functools.cache
def exact(name):
    """A network of v that knows the mixture, in NumPy: on two samples ten times faster than the mixture itself."""
    schedule = SCHEDULES[name]
    means, variances, log_weights = MIXTURE.means.numpy(), MIXTURE.residual.numpy(), MIXTURE.weights.log().numpy()

    def v(x, t):
        alpha, sigma = float(schedule.alpha(t[0].item())), float(schedule.sigma(t[0].item()))
        total = alpha**2 * variances + sigma**2
        away = x.numpy()[:, None] - alpha * means
        joint = log_weights - np.log(total) - 0.5 * (away**2).sum(2) / total
        likelihood = np.exp(joint - joint.max(1, keepdims=True))
        posterior = (likelihood / likelihood.sum(1, keepdims=True))[:, :, None]
        eps = (posterior * (sigma / total)[:, None] * away).sum(1)
        x0 = (posterior * (means + (alpha * variances / total)[:, None] * away)).sum(1)
        return torch.from_numpy(alpha * eps - sigma * x0)

    return EpsModel(v, schedule, "v")


def test_the_fast_network_is_the_mixtures():
    for name in ("vp_linear", "edm", "flow"):
        schedule = SCHEDULES[name]
        for t in (schedule.t_min, 0.4 * schedule.t_max, 0.99 * schedule.t_max):
            expected = MIXTURE.x0(Z, float(schedule.alpha(t)), float(schedule.sigma(t)))
            torch.testing.assert_close(exact(name).x0(Z, t), expected, rtol=1e-9, atol=1e-9)


# what may be drawn for an option: name -> values in its documented range; without a row the default's type says
OPTIONS = {
    "eta": st.floats(0, 1) | st.floats(0, 3),
    "s_noise": st.floats(0, 1.5),
    "s_churn": st.floats(0, 100),
    "s_tmin": st.floats(0, 5),
    "s_tmax": st.floats(0, 100) | st.just(math.inf),
    "lower_order_final": st.booleans() | st.integers(0, 60),
    "r1": st.floats(0.05, 1),
    "r2": st.floats(0.05, 1),
    "orders": st.lists(st.integers(1, 3), min_size=1, max_size=5),
    "order": st.integers(1, 4),
    "predictor_order": st.integers(1, 4),
    "corrector_order": st.integers(0, 4),
    "tau": st.floats(0, 2) | st.sampled_from([np.sqrt, np.mean, lambda sigma: 1 if sigma > 1 else 0, lambda: 1]),
    "tau_start": st.floats(1, 100),
    "tau_end": st.floats(0, 1),
    "restarts": st.tuples(st.floats(0.05, 1), st.floats(1, 5), st.integers(1, 3), st.integers(1, 4)).map(lambda r: [r]),
}
INVALID = [
    -1,
    -0.5,
    0,
    0.0,
    1.5,
    7,
    1000,
    10**400,
    math.nan,
    math.inf,
    -math.inf,
    True,
    None,
    "",
    "no such",
    [],
    [1, 2],
    [(1, 2)],
    {},
]


@functools.cache
def accepted(sampler, option):
    """The names a text option takes, as its own error lists them."""
    with pytest.raises(ValueError, match="accepted: ") as error:
        make_plan(sampler, SCHEDULES["vp_linear"], steps=3, **{option: "no such"})
    return str(error.value).rsplit("accepted: ", 1)[1].split(", ")


def values_of(sampler, option):
    default = ENTRIES[sampler].options[option]
    if option in OPTIONS:
        return st.none() | OPTIONS[option] if default is None else OPTIONS[option]
    if isinstance(default, str):
        return st.sampled_from(accepted(sampler, option))
    kinds = {bool: st.booleans(), int: st.integers(0, 10), float: st.floats(0, 2)}
    return kinds.get(type(default), st.just(default))


AMOUNTS = ("eta", "s_noise", "s_churn", "tau")


def largest(sampler):
    """The sampler's options for amounts of noise, one at a time and together, at the most that is accepted."""
    entry = ENTRIES[sampler]
    amounts = {name: LARGEST_AMOUNT for name in AMOUNTS if name in entry.options}
    for predict in ({"predict": "eps"}, {"predict": "x0"}) if "predict" in entry.options else ({},):
        if "eta" in amounts:
            amounts["eta"] = 10.0 if predict.get("predict") == "eps" else LARGEST_AMOUNT
        yield from ({name: value, **predict} for name, value in amounts.items())
        yield {**amounts, **predict}
    if sampler == "sa-solver":
        yield {"tau": lambda sigma_bar: np.full(len(sigma_bar), LARGEST_AMOUNT), "tau_start": math.inf, "tau_end": 0.0}
    if sampler == "restart":
        yield {**amounts, "restarts": [(0.5, 1e6, 1, 3)]}


@pytest.mark.parametrize("sampler", [name for name, entry in ENTRIES.items() if {*AMOUNTS} & {*entry.options}])
def test_the_largest_amounts_run_in_single_precision(sampler):
    ran = Counter()
    for options, name, steps in itertools.product(largest(sampler), SCHEDULES, (2, 20)):
        try:
            plan = make_plan(sampler, SCHEDULES[name], steps=steps, **options)
        except ValueError as error:
            if "does not fit into the grid" not in str(error):
                raise
            continue  # a restart that the schedule has no room for
        net = exact(name).net
        model = EpsModel(lambda x, t, net=net: net(x.double(), t.double()).float(), SCHEDULES[name], "v")
        x = run_plan(plan, model, (plan.sigma_T * Z).float())
        assert x.isfinite().all(), (options, name, steps)
        ran[name] += 1
    assert ran.keys() == SCHEDULES.keys()


RARE = st.integers(0, 19).map(lambda k: k == 13)  # hypothesis prefers the ends


def descending(schedule, spread):
    """Explicit nodes: mostly valid; at times repeated, rising, NaN or outside."""
    nodes = st.sets(st.integers(0, 200), min_size=2, max_size=12).map(
        lambda places: [spread(schedule, k / 200) for k in sorted(places, reverse=True)]
    )
    end = st.sampled_from([0.0, -1.0, math.nan, 1e9, None])
    spoilt = st.tuples(nodes, end).map(lambda pair: [*pair[0], pair[0][-1] if pair[1] is None else pair[1]])
    return RARE.flatmap(lambda rare: spoilt if rare else nodes)


def in_time(schedule, u):
    return schedule.t_min + u * (schedule.t_max - schedule.t_min)


def in_sigma_bar(schedule, u):
    high = min(float(schedule.sigma_bar(schedule.t_max)), 100.0)
    return 0.0 if u == 0 else float(schedule.sigma_bar(schedule.t_min)) ** (1 - u) * high**u


GRID = (
    st.sampled_from([None, *GRIDS])
    | st.sampled_from([None, *GRIDS])
    | st.builds(grids.power, st.floats(0.5, 10), st.sampled_from(["sigma_bar", "t", "vp_time"]))
    | st.just(grids.from_points([0.9, 0.5, 0.2, 0.1]))
)
NO_GRID = st.sampled_from(["no such", 7, lambda schedule, n: np.full(n, 0.5), lambda schedule, n: [math.nan] * n])


@st.composite
def cases(draw, sampler):
    """(schedule's name, arguments of make_plan, names of those whose type may be wrong)."""
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    schedule, wrong = SCHEDULES[name], []
    how = draw(st.sampled_from(["steps", "steps", "nfe", "nfe", "timesteps", "sigmas"]))
    nodes = {
        "steps": st.integers(1, 50),
        "nfe": st.integers(1, 60),
        "timesteps": descending(schedule, in_time),
        "sigmas": descending(schedule, in_sigma_bar),
    }
    arguments = {how: draw(nodes[how]), "afs": draw(st.sampled_from([False, False, True]))}
    if how in ("steps", "nfe"):
        arguments["final"] = draw(st.sampled_from([None, None, *FINALS])) if not draw(RARE) else "no such"
        arguments["grid"] = draw(NO_GRID if draw(RARE) else GRID)
        wrong += ["grid"] if arguments["grid"] == 7 else []
    for option in ENTRIES[sampler].options:
        if draw(RARE):
            arguments[option] = draw(st.sampled_from(INVALID))
            wrong.append(option)
        elif draw(st.booleans()):
            arguments[option] = draw(values_of(sampler, option))
    if draw(RARE):
        arguments["no_such_option"] = 1
    return name, arguments, wrong


@pytest.mark.parametrize("sampler", ENTRIES)
def test_a_plan_that_runs_or_a_refusal(sampler):
    outcomes = Counter()

    @seed(zlib.crc32(sampler.encode()))
    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)
    @given(cases(sampler))
    def run(case):
        name, arguments, wrong = case
        try:
            plan = make_plan(sampler, SCHEDULES[name], **arguments)
        except (ValueError, TypeError) as error:
            if isinstance(error, TypeError) and not any(name in str(error) for name in wrong):
                raise
            if not any(word in str(error) for word in (*arguments, "grid", "schedule", repr(sampler))):
                raise  # not a refusal: it names nothing that was given
            outcomes["refused"] += 1
            return
        assert plan.nfe <= arguments.get("nfe", math.inf)
        x = run_plan(plan, exact(name), plan.sigma_T * Z)
        assert x.isfinite().all()
        outcomes["ran"] += 1

    run()
    assert outcomes["refused"] == sum(outcomes.values()) if ENTRIES[sampler].adaptive else outcomes["ran"] > 0
