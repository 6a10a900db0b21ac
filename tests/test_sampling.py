"""`sample` and `make_plan`: the four ways to say which steps, start noise, and the refusal of everything else."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch

from samplers import EpsModel, Plan, SamplingError, list_samplers, make_plan, run_plan, sample, schedules
from samplers.grid import GRIDS
from samplers.noise import standard_normal

VP, EDM, FLOW = schedules.vp_linear(), schedules.edm(), schedules.flow()
ALL = [s.name for s in list_samplers()]
FIXED = [s.name for s in list_samplers() if not s.adaptive]
every_sampler = pytest.mark.parametrize("name", ALL)
X_T = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def entry(name):
    return next(s for s in list_samplers() if s.name == name)


@every_sampler
@pytest.mark.parametrize(
    "where",
    [
        {"steps": 4},
        {"nfe": 150},
        {"steps": np.int64(4), "grid": "karras"},
        {"steps": 4, "grid": "quadratic", "final": "zero"},
        {"steps": 4, "final": "denoise"},
        {"timesteps": [1.0, 0.5, 0.1]},
        {"timesteps": torch.tensor([1.0, 0.5])},
        {"sigmas": [100.0, 2.0, 0.1]},
        {"sigmas": np.array([100.0, 2.0, 0.0])},
        {"steps": 2, "grid": lambda schedule, n: np.linspace(1.0, 0.1, n)},
    ],
    ids=lambda where: ", ".join(where),
)
def test_every_sampler_takes_every_grid(exact, name, where):
    told = []
    x = sample(exact(VP), name, x_T=X_T, callback=told.append, **where)
    assert x.shape == X_T.shape
    assert x.dtype == torch.float64
    assert x.isfinite().all()
    assert [p.step for p in told] == list(range(1, told[-1].steps + 1))
    if "timesteps" in where:
        assert told[-1].t == where["timesteps"][-1]
    if "sigmas" in where:
        assert VP.sigma_bar(told[-1].t) == pytest.approx(where["sigmas"][-1], rel=1e-9)
    if "steps" in where:
        assert len(told) == where["steps"] + (where.get("final") == "denoise")
    if "nfe" in where:
        assert told[-1].nfe <= where["nfe"]


@pytest.mark.parametrize("name", FIXED)
def test_sample_runs_the_plan_it_names(exact, name):
    where = {"steps": 5, "grid": "quadratic"}
    plan = make_plan(name, VP, **where)
    got = sample(exact(VP), name, x_T=X_T, seed=3, indices=torch.tensor([4, 5, 6]), **where)
    assert torch.equal(got, run_plan(plan, exact(VP), X_T, seed=3, indices=torch.tensor([4, 5, 6])))


def test_explicit_grids_are_the_named_ones():
    plan = make_plan("heun", VP, steps=6)
    assert plan == make_plan("heun", VP, timesteps=plan.times)
    assert plan == make_plan("heun", VP, steps=6, grid="karras")
    assert make_plan("dpmpp-2m", VP, nfe=6) == make_plan("dpmpp-2m", VP, steps=6, grid="time-quadratic", final="t_min")
    edm = make_plan("heun", EDM, steps=6, grid="edm")
    assert edm.close(make_plan("heun", EDM, sigmas=edm.times))
    assert edm.nfe == 11  # Karras et al. 2022: 2 N - 1


def test_recommended_grid_is_used():
    for name in FIXED:
        assert make_plan(name, VP, steps=5) == make_plan(name, VP, steps=5, grid=entry(name).grid)
        assert make_plan(name, FLOW, steps=5) == make_plan(name, FLOW, steps=5, grid="uniform")  # alpha = 0 at t = 1


def test_a_recommended_grid_that_a_schedule_does_not_allow_gives_way():
    noisy = schedules.from_alphas_cumprod(np.linspace(0.9, 0.1, 10))  # it has no VP time: too much noise at its end
    assert make_plan("ddim", noisy, steps=3) == make_plan("ddim", noisy, steps=3, grid="logsnr")
    with pytest.raises(ValueError, match="grids in VP time need a schedule that reaches less noise"):
        make_plan("ddim", noisy, steps=3, grid="time-uniform")


def test_conditions_and_noise_source_are_handed_on():
    seen = []
    model = EpsModel(lambda x, t, label: seen.append(label) or 0.5 * x, VP)
    quiet = sample(model, "ddpm", x_T=X_T, steps=3, cond={"label": 7}, noise_source=lambda k, like: 0 * like)
    assert seen == [7, 7, 7]
    assert not torch.equal(quiet, sample(model, "ddpm", x_T=X_T, steps=3, cond={"label": 7}))


def test_check_is_handed_on():
    broken = EpsModel(lambda x, t: x * math.nan, VP)
    assert sample(broken, "ddim", x_T=X_T, steps=3, check=False).isnan().all()


# start noise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "rk45"])
@pytest.mark.parametrize(
    ("schedule", "sigma"), [("vp_linear", None), ("edm", 80.0), ("flow", 1.0)], indirect=["schedule"]
)
def test_shape_starts_from_sigma_times_noise(schedule, sigma, name):
    first = []
    model = EpsModel(lambda x, t: first.append(x.clone()) or 0 * x, schedule, "v")
    sample(model, name, shape=(3, 2, 2), seed=9, nfe=100, grid="uniform")
    z = standard_normal(9, torch.arange(3), 0, (2, 2))
    # rk45 works in the angle atan(sigma / alpha), whose last bit in float32 is 5e-6 of sigma = 80
    torch.testing.assert_close(first[0], z * (sigma or float(schedule.sigma(1.0))), rtol=1e-5, atol=0)
    assert first[0].dtype == torch.float32


def test_start_noise_is_that_of_the_grids_first_node():
    first = []
    model = EpsModel(lambda x, t: first.append(x.clone()) or 0 * x, EDM)
    sample(model, "ddim", shape=(2, 2), sigmas=[3.0, 1.0])
    torch.testing.assert_close(first[0], 3 * standard_normal(0, torch.arange(2), 0, (2,)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_shape_takes_the_networks_dtype(dtype):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, dtype=dtype))

        def forward(self, x, t):
            return self.weight * x

    assert sample(EpsModel(Net(), VP), "ddim", shape=(2, 2), steps=2).dtype == dtype


def test_numpys_integers_are_integers():
    model = EpsModel(lambda x, t: 0.5 * x, VP)
    x = sample(model, "ddpm", shape=(np.int64(3), 2), seed=np.int64(5), steps=3)
    assert torch.equal(x, sample(model, "ddpm", shape=(3, 2), seed=5, steps=3))


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_seeds_and_indices(exact, name):
    def run(**options):
        return sample(exact(VP), name, shape=(4, 2), steps=3, **options)

    assert torch.equal(run(), run(seed=0, indices=torch.arange(4)))
    assert torch.equal(run(indices=[3, 1, 2, 0]), run()[[3, 1, 2, 0]])
    assert not torch.isclose(run(), run(seed=1)).any()
    assert not torch.isclose(run(), run(indices=torch.arange(4, 8))).any()


# the table of samplers -------------------------------------------------------------------------------------------


def test_the_table_says_what_there_is():
    entries = list_samplers()
    assert len({s.name for s in entries}) == len(entries)
    for s in entries:
        assert s.order >= 1
        assert s.calls >= 1
        assert s.stochastic in ("no", "yes", "eta", "s_churn", "tau")
        assert s.grid in GRIDS
        assert s.reference
        assert s.family
        assert s.stochastic in ("no", "yes") or s.stochastic in s.options
    assert entry("ddim").options == {"eta": 0.0}
    assert entry("dpm-solver-2s").options == {"solver_type": "midpoint", "r1": None, "orders": None}
    assert entry("rk45").options == {"rtol": 1e-5, "atol": 1e-5}
    assert entry("rk45").adaptive
    assert not entry("ddim").adaptive


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("ddim", "eta", np.float32(0.7)),
        ("ddim", "eta", np.float64(0.7)),
        ("ddim", "eta", np.int64(1)),
        ("euler-ancestral", "eta", np.float32(0.7)),
        ("edm", "s_churn", np.float32(14.1)),
        ("dpm-solver-2s", "r1", np.float32(0.7)),
        ("dpmpp-2m", "lower_order_final", np.int64(2)),
    ],
)
def test_numpys_options_are_pythons(name, option, value):
    plan = make_plan(name, VP, steps=4, **{option: value})
    assert plan == make_plan(name, VP, steps=4, **{option: value.item()})
    assert Plan.from_json(plan.to_json()) == plan


NUMBERS = [
    (sampler.name, option)
    for sampler in list_samplers()
    for option, default in sampler.options.items()
    if isinstance(default, (int, float)) and option != "corrector"  # which is True or False
]


@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_options_that_are_numbers_refuse_what_is_none(exact, name, option):
    wrong = [None, "0.5", "", [1.0], {}, 1j, math.nan, -math.inf, True]
    for value in wrong[:-1] if option == "lower_order_final" else wrong:
        with pytest.raises((TypeError, ValueError), match=rf"\b{option}\b.* got .*{re.escape(repr(value))}"):
            sample(exact(VP), name, x_T=X_T, steps=4, **{option: value})


def test_an_adaptive_sampler_has_no_plan():
    with pytest.raises(
        ValueError, match=r"sampler 'rk45' chooses its steps while it samples and has no plan; call sample"
    ):
        make_plan("rk45", VP, steps=3)


# bad input -------------------------------------------------------------------------------------------------------

BAD_BOTH = [
    (("dpmp-2m",), {"steps": 5}, ValueError, "unknown sampler 'dpmp-2m'; did you mean 'dpmpp-2m'"),
    (("????",), {"steps": 5}, ValueError, r"unknown sampler '\?\?\?\?'; accepted: .*ddim, ddpm"),
    (("ddim",), {}, ValueError, "give exactly one of steps, nfe, timesteps and sigmas, got none"),
    (("ddim",), {"steps": 5, "nfe": 5}, ValueError, "give exactly one of .* got steps, nfe"),
    (("rk45",), {"steps": 5, "nfe": 5}, ValueError, "give exactly one of .* got steps, nfe"),
    (("ddim",), {"timesteps": [1, 0.5], "sigmas": [2, 1]}, ValueError, "give exactly one of .* got timesteps, sigmas"),
    (("ddim",), {"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    (("ddim",), {"steps": -3}, ValueError, "steps must be at least 1, got -3"),
    (("ddim",), {"nfe": 0}, ValueError, "nfe must be at least 1, got 0"),
    (("rk45",), {"nfe": 0}, ValueError, "nfe must be at least 1, got 0"),
    (("ddim",), {"steps": True}, TypeError, "steps must be an integer, got True"),
    (("ddim",), {"steps": 5.0}, TypeError, "steps must be an integer, got 5.0"),
    (("ddim",), {"nfe": "5"}, TypeError, "nfe must be an integer, got '5'"),
    (("restart",), {"nfe": 1}, ValueError, "nfe must be at least 10 for 'restart' here, got 1"),
    (("heun",), {"nfe": 1, "final": "denoise"}, ValueError, "nfe must be at least 2 for 'heun' here, got 1"),
    (("dpm-solver-2s",), {"nfe": 1, "final": "denoise"}, ValueError, "nfe must be at least 2 for 'dpm-solver-2s'"),
    (
        ("ddim",),
        {"timesteps": [1, 0.5], "grid": "karras"},
        ValueError,
        "grid goes with steps or nfe; explicit timesteps",
    ),
    (
        ("ddim",),
        {"sigmas": [2, 1], "final": "zero"},
        ValueError,
        "final goes with steps or nfe; explicit sigmas .*'zero'",
    ),
    (("ddim",), {"timesteps": [0.5]}, ValueError, "timesteps needs at least 2 values"),
    (("ddim",), {"sigmas": [1.0, 2.0]}, ValueError, "sigmas must decrease strictly"),
    (("ddim",), {"timesteps": [1.0, 0.5, 0.5]}, ValueError, r"timesteps must decrease strictly: timesteps\[1\]=0.5"),
    (("ddim",), {"steps": 3, "threshold": 0.9}, ValueError, r"threshold is no option .*guidance.threshold\(model\)"),
    (("ddim",), {"steps": 5, "grid": "karas"}, ValueError, "unknown grid 'karas'; did you mean 'karras'"),
    (("ddim",), {"steps": 5, "final": "end"}, ValueError, "unknown final 'end'"),
    (("ddim",), {"steps": 5, "grid": 7}, TypeError, "grid must be a name or a function"),
    (("ddim",), {"steps": 5, "etaa": 1.0}, ValueError, "unknown option of sampler 'ddim': 'etaa'; did you mean 'eta'"),
    (("heun",), {"steps": 5, "eta": 1.0}, ValueError, "unknown option of sampler 'heun': 'eta'; accepted: orders"),
    (("pndm",), {"steps": 5, "eta": 1.0}, ValueError, "unknown option of sampler 'pndm': 'eta'; accepted: none"),
    (("DPM++ 2M",), {"steps": 5}, ValueError, "unknown sampler 'DPM.. 2M'; did you mean 'dpmpp-2m'"),
    (("UniPC_3",), {"steps": 5}, ValueError, "unknown sampler 'UniPC_3'; did you mean 'unipc-3'"),
    (("deis-2",), {"steps": 5, "variant": "tAB"}, ValueError, "unknown variant 'tAB'; did you mean 'tab'"),
    (("rk45",), {"steps": 5, "tol": 1.0}, ValueError, "unknown option of sampler 'rk45': 'tol'; did you mean"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD_BOTH)
@pytest.mark.parametrize("call", ["sample", "make_plan"])
def test_bad_arguments(exact, call, arguments, options, error, message):
    if call == "sample":
        with pytest.raises(error, match=message):
            sample(exact(VP), *arguments, x_T=X_T, **options)
    else:
        with pytest.raises(error, match=message):
            make_plan(*arguments, VP, **options)


@pytest.mark.parametrize("sampler", ["ddim", "rk45"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "give exactly one of x_T and shape, got none"),
        ({"x_T": X_T, "shape": (3, 2)}, ValueError, "give exactly one of x_T and shape, got both"),
        ({"x_T": X_T.long()}, TypeError, "x_T must be a floating-point tensor .* got torch.int64"),
        ({"shape": ()}, ValueError, r"shape must be positive integers \(B, ...\), got \(\)"),
        ({"shape": 5}, ValueError, r"shape must be positive integers \(B, ...\), got 5"),
        ({"shape": (2, 0)}, ValueError, "shape must be positive integers"),
        ({"shape": (2.0, 2)}, ValueError, "shape must be positive integers"),
        ({"shape": (2, True)}, ValueError, "shape must be positive integers"),
        ({"shape": (2, 2), "seed": -1}, ValueError, "seed must be an integer in"),
        ({"shape": (2, 2), "seed": 1.5}, ValueError, "seed must be an integer in .* got 1.5"),
        ({"shape": (2, 2), "indices": [0]}, ValueError, "indices must be 2 non-negative integers"),
        ({"shape": (2, 2), "indices": [0, -1]}, ValueError, "indices must be 2 non-negative integers"),
    ],
)
def test_bad_starts(exact, sampler, options, error, message):
    with pytest.raises(error, match=message):
        sample(exact(VP), sampler, steps=2, **options)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "rk45"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"cond": [1]},
            TypeError,
            "cond must be a mapping from the network's keyword arguments to values or None, got list",
        ),
        ({"callback": "x"}, TypeError, "callback must be a function of a Progress or None, got 'x'"),
        ({"seed": "a"}, ValueError, "seed must be an integer in .* got 'a'"),
        ({"indices": [5, 6, 7, 8]}, ValueError, "indices must be 3 non-negative integers, one for each sample"),
    ],
)
def test_what_a_run_does_not_use_is_checked_before_its_first_call(sampler, options, error, message):
    def net(x, t):
        pytest.fail("the network was called")

    with pytest.raises(error, match=message):
        sample(EpsModel(net, VP, "v"), sampler, x_T=X_T, steps=2, **options)
    with pytest.raises(error, match=message):
        run_plan(make_plan("ddpm", VP, steps=2), EpsModel(net, VP), X_T, noise_source=lambda k, like: like, **options)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x", r"noise_source must be a function \(k, like\) -> noise or None, got 'x'"),
        (lambda k, like: None, "noise_source must return a tensor, got NoneType"),
    ],
)
def test_bad_noise_sources(source, message):
    with pytest.raises(TypeError, match=message):
        sample(EpsModel(lambda x, t: x, VP), "ddpm", x_T=X_T, steps=2, noise_source=source)


def test_a_failure_that_does_not_come_back_is_not_put_down_to_a_step():
    values = itertools.chain([math.nan], itertools.repeat(0.0))
    model = EpsModel(lambda x, t: 0.5 * x, VP)
    with pytest.raises(SamplingError, match="'ddpm' gave NaN or Inf, and a second run to find the step did not"):
        sample(model, "ddpm", x_T=X_T, steps=3, noise_source=lambda k, like: torch.full_like(like, next(values)))


def test_a_list_is_not_a_name(exact):
    for call in (lambda: sample(exact(VP), ["ddim"], x_T=X_T, steps=2), lambda: make_plan(["ddim"], VP, steps=2)):
        with pytest.raises(TypeError, match=r"sampler must be a name, see list_samplers\(\), got \['ddim'\]"):
            call()


def test_a_network_is_not_a_model():
    with pytest.raises(TypeError, match=r"model must be an EpsModel, got function; wrap it"):
        sample(lambda x, t: x, "ddim", shape=(1, 2), steps=1)


def test_a_name_is_not_a_schedule():
    with pytest.raises(TypeError, match="schedule must be a samplers.schedules schedule, got str"):
        make_plan("ddim", "vp_linear", steps=1)


def test_a_start_at_alpha_zero_refuses_grids_in_log_snr():
    with pytest.raises(
        ValueError, match="'logsnr' needs a finite log-SNR at t_max, and schedule 'flow' starts at alpha = 0"
    ):
        make_plan("dpmpp-2m", FLOW, steps=5, grid="logsnr")
