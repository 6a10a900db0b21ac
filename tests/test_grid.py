"""Time grids: ends, spacing, the discrete conventions of diffusers, and the refusal of anything that is not a grid."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from samplers import grids, make_plan, schedules
from samplers.grid import GRIDS, Grid, from_sigmas, from_timesteps, make_grid

VP, FLOW, EDM = schedules.vp_linear(), schedules.flow(), schedules.edm()
DISCRETE = schedules.from_betas(np.linspace(1e-4, 0.02, 1000))
SD = schedules.from_betas(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)  # Stable Diffusion's, 1.5 and XL
SVD = schedules.edm(0.002, 700.0)
_KEPT = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
DEEPFLOYD = schedules.from_betas(np.minimum(1 - _KEPT[1:] / _KEPT[:-1], 0.999))  # diffusers' "squaredcos_cap_v2"
NEED_A_FINITE_START = {"logsnr", "exponential", "karras", "edm", "time-uniform", "time-quadratic"}
PUBLISHED_FOR = {"ays": SD, "ays-deepfloyd": DEEPFLOYD, "ays-sdxl": SD, "ays-svd": SVD}

on_every_schedule = pytest.mark.parametrize(
    "schedule", ["vp_linear", "cosine", "edm", "flow", "discrete", "zero_snr"], indirect=True
)


@on_every_schedule
@pytest.mark.parametrize("name", GRIDS)
def test_named_grids(schedule, name):
    if schedule.alpha(schedule.t_max) == 0 and name in NEED_A_FINITE_START:
        with pytest.raises(ValueError, match=r"grid .* needs a finite log-SNR at t_max, .*'uniform'"):
            make_grid(schedule, name, 5)
        return
    if name in PUBLISHED_FOR:
        with pytest.raises(
            ValueError, match=f"grid '{name}' is published for schedule .*; this one is '{schedule.name}'"
        ):
            make_grid(schedule, name, 5)
        schedule = PUBLISHED_FOR[name]
    for final, steps in itertools.product([None, *grids.FINALS], [1, 2, 10, 100]):
        grid = make_grid(schedule, name, steps, final)
        ends = final or GRIDS[name].final
        points = grid.t if ends == "t_min" else grid.t[:-1]
        assert grid.steps == steps + (ends == "denoise")
        assert (np.diff(grid.t) < 0).all()
        # two are as in diffusers, and one is published with a lower start
        if name not in ("leading", "ays-deepfloyd") and (name, len(points)) != ("linspace", 1):
            assert grid.t[0] == schedule.t_max
        if name != "trailing" and not (GRIDS[name].replaces and ends == "zero") and len(points) > 1:
            assert points[-1] == pytest.approx(schedule.t_min, rel=1e-9, abs=1e-9)
        assert points[-1] >= schedule.t_min
        if ends != "t_min":
            assert (grid.t[-1], grid.alpha[-1], grid.sigma[-1], grid.lam[-1]) == (schedule.t_zero, 1.0, 0.0, math.inf)


def equal_steps(values):
    steps = np.diff(values)
    return np.abs(steps - steps.mean()).max() < 1e-9 * np.abs(values).max()


@pytest.mark.parametrize("schedule", ["vp_linear", "cosine", "edm", "discrete"], indirect=True)
@pytest.mark.parametrize(
    ("name", "straight"),
    [
        ("uniform", lambda s, t: t),
        ("quadratic", lambda s, t: t**0.5),
        ("logsnr", lambda s, t: s.lam(t)),
        ("exponential", lambda s, t: np.log(s.sigma_bar(t))),
        ("karras", lambda s, t: s.sigma_bar(t) ** (1 / 7)),
        ("time-uniform", lambda s, t: vp_time(s, t)),
        ("time-quadratic", lambda s, t: vp_time(s, t) ** 0.5),
        ("linspace", None),
    ],
)
def test_spacing(schedule, name, straight):
    t = make_grid(schedule, name, 20, "t_min").t
    if straight is not None:
        assert equal_steps(straight(schedule, t))
    else:
        index = (t - schedule.t_min) / (schedule.t_max - schedule.t_min) * 999  # whole training steps
        np.testing.assert_allclose(index, np.linspace(999, 0, 21).round(), atol=1e-9)


def vp_time(schedule, t):
    """The time of sigma_bar on the VP schedule with linear beta that has the same ends, by fitting its two parameters."""
    decay = np.log1p(schedule.sigma_bar(np.array([schedule.t_max, schedule.t_min])) ** 2)  # beta_min u + beta_d u^2 / 2
    low, spread = np.linalg.solve([[1.0, 0.5], [1e-3, 0.5e-6]], decay)
    return [np.roots([0.5 * spread, low, -d]).real.max() for d in np.log1p(schedule.sigma_bar(t) ** 2)] * np.ones(
        len(t)
    )


@pytest.mark.parametrize("rho", [0.5, 1, 3.0])
def test_rho_changes_the_spacing(rho):
    assert equal_steps(make_grid(EDM, grids.power(rho), 10).t ** (1 / rho))
    assert equal_steps(make_grid(VP, grids.power(rho, of="t"), 10).t ** (1 / rho))
    np.testing.assert_allclose(  # on a VP schedule its own time is VP time
        make_grid(VP, grids.power(rho, of="vp_time"), 10).t, make_grid(VP, grids.power(rho, of="t"), 10).t, rtol=1e-9
    )


def test_known_grids_are_powers():
    for name, points in (
        ("karras", grids.power(7)),
        ("quadratic", grids.power(2, of="t")),
        ("time-uniform", grids.power(1, of="vp_time")),
        ("time-quadratic", grids.power(2, of="vp_time")),
    ):
        np.testing.assert_array_equal(make_grid(EDM, name, 6).t, make_grid(EDM, points, 6).t)
    np.testing.assert_allclose(make_grid(VP, "uniform", 6).t, make_grid(VP, grids.power(1, of="t"), 6).t)


def test_vp_time_on_edm_is_that_of_published_code():
    # beta_d and beta_min for sigma 0.002 .. 80 and epsilon_s = 1e-3 by the formulas of EDM (arXiv:2206.00364, appendix C.1.1)
    low, high = math.log(0.002**2 + 1), math.log(80.0**2 + 1)
    beta_d = 2 * (low / 1e-3 - high) / (1e-3 - 1)
    u = (1 + np.arange(8) / 7 * (1e-3**0.5 - 1)) ** 2
    sigma = np.sqrt(np.exp(0.5 * beta_d * u**2 + (high - 0.5 * beta_d) * u) - 1)
    np.testing.assert_allclose(make_grid(EDM, "time-quadratic", 7).t, sigma, rtol=1e-9)


def test_edm_and_sgm_end_at_clean_data():
    np.testing.assert_array_equal(make_grid(EDM, "edm", 5).t, [*make_grid(EDM, "karras", 4).t, 0.0])
    np.testing.assert_allclose(make_grid(DISCRETE, "sgm", 3).t, [999.0, 666.0, 333.0, -1.0])
    np.testing.assert_allclose(make_grid(DISCRETE, "sgm", 3, "t_min").t, [999.0, 666.0, 333.0, 0.0])
    np.testing.assert_allclose(make_grid(DISCRETE, "sgm", 3, "denoise").t, [999.0, 666.0, 333.0, 0.0, -1.0])


def test_beta_grid_has_beta_quantiles():
    from scipy.stats import beta

    t = (make_grid(VP, "beta", 10).t - VP.t_min) / (VP.t_max - VP.t_min)
    np.testing.assert_allclose(beta.cdf(t, 0.6, 0.6), np.linspace(1, 0, 11), atol=1e-9)


def theirs(name, spacing, n, **options):
    import diffusers

    scheduler = getattr(diffusers, name)(num_train_timesteps=1000, timestep_spacing=spacing, **options)
    scheduler.set_timesteps(n)
    return scheduler.timesteps.tolist()


@pytest.mark.parity
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_discrete_conventions_are_those_of_diffusers(spacing):
    longer = 0
    for n in range(1, 1001):
        expected = theirs("DDIMScheduler", spacing, n)
        if len(expected) > n:  # rounding of T / n lets them step past the end, to a time of -1
            assert expected[n:] == [-1]
            longer += 1
        assert make_grid(DISCRETE, spacing, n).t[:-1].tolist() == expected[:n]
        along = (make_grid(FLOW, spacing, n).t[:-1] - FLOW.t_min) / (FLOW.t_max - FLOW.t_min) * 999
        np.testing.assert_allclose(along, expected[:n], atol=1e-9)
    assert longer == (62 if spacing == "trailing" else 0)


@pytest.mark.parity
@pytest.mark.parametrize("n", [*range(1, 1001, 37), 61, 999, 1000])
def test_other_schedulers_of_diffusers(n):
    for spacing, points in (("leading", grids.leading), ("trailing", grids.trailing)):
        assert points(DISCRETE, n).tolist() == theirs("EulerDiscreteScheduler", spacing, n)[:n]
    # Euler's linspace is not rounded: uniform in t
    np.testing.assert_allclose(
        grids.uniform(DISCRETE, n)[: n - 1], theirs("EulerDiscreteScheduler", "linspace", n)[: n - 1]
    )
    name = "DPMSolverMultistepScheduler"
    assert grids.trailing(DISCRETE, n).tolist() == theirs(name, "trailing", n)[:n]
    if n < 1000:  # its leading and linspace are those of n + 1 without the last
        assert grids.leading(DISCRETE, n + 1)[:-1].tolist() == theirs(name, "leading", n)
        assert grids.linspace(DISCRETE, n + 1)[:-1].tolist() == theirs(name, "linspace", n)


@pytest.mark.parity
def test_leading_takes_an_offset():
    points = partial(grids.leading, offset=1)
    for n in (1, 3, 50, 333, 999):
        assert make_grid(DISCRETE, points, n, "zero").t[:-1].tolist() == theirs(
            "DDIMScheduler", "leading", n, steps_offset=1
        )
    assert theirs("DDIMScheduler", "leading", 1000, steps_offset=1)[0] == 1000  # a step that does not exist
    with pytest.raises(ValueError, match=r"time 1000 is outside \[0, 999\]"):
        make_grid(DISCRETE, points, 1000, "zero")


@pytest.mark.parity
@pytest.mark.parametrize(("name", "model"), [("ays", "StableDiffusion"), ("ays-sdxl", "StableDiffusionXL")])
def test_align_your_steps(name, model):
    from diffusers.schedulers import AysSchedules

    steps = AysSchedules[f"{model}Timesteps"]
    assert make_grid(SD, name, 10).t.tolist() == [*steps, -1.0]
    assert make_grid(SD, name, 10, "t_min").t.tolist() == [*steps, 0.0]
    # their sigmas have three digits, and the smallest of XL is off by 1.4 %
    np.testing.assert_allclose(SD.sigma_bar(make_grid(SD, name, 10).t), AysSchedules[f"{model}Sigmas"], rtol=0.015)


def loglinear(levels, n):
    return np.exp(np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(levels)), np.log(levels)))


@pytest.mark.parametrize("steps", [1, 7, 10, 25])
@pytest.mark.parametrize("name", PUBLISHED_FOR)
def test_align_your_steps_at_other_lengths(name, steps):
    schedule = PUBLISHED_FOR[name]
    expected = loglinear(schedule.sigma_bar(make_grid(schedule, name, 10, "t_min").t), steps + 1)
    for final, ends in (("t_min", expected), ("zero", [*expected[:-1], 0.0]), ("denoise", [*expected, 0.0])):
        np.testing.assert_allclose(
            schedule.sigma_bar(make_grid(schedule, name, steps, final).t), ends, rtol=1e-9, atol=1e-15
        )


@pytest.mark.parity
def test_align_your_steps_of_video():
    from diffusers.schedulers import AysSchedules

    assert make_grid(SVD, "ays-svd", 10).t.tolist() == AysSchedules["StableDiffusionVideoSigmas"]


def test_align_your_steps_of_deepfloyd():
    published = [160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006]
    rounding = [0.005, *[0.00051] * 10]
    levels = DEEPFLOYD.sigma_bar(make_grid(DEEPFLOYD, "ays-deepfloyd", 10, "t_min").t)
    assert (np.abs(levels - published) <= rounding).all()
    assert make_plan("ddim", DEEPFLOYD, steps=10, grid="ays-deepfloyd").times[-1] == DEEPFLOYD.t_zero


@pytest.mark.parametrize(
    ("name", "schedule", "message"),
    [
        ("ays-deepfloyd", SD, "grid 'ays-deepfloyd' is published for .* 20291.2 to 0.00642541; this .* from 14.6"),
        ("ays", DISCRETE, "schedule 'discrete' of 1000 training steps .* 14.6146 to 0.0291672; this .* from 157"),
        ("ays", schedules.from_betas(np.linspace(0.00085**0.5, 0.012**0.5, 500) ** 2), "of 1000 training steps"),
        ("ays-sdxl", EDM, "grid 'ays-sdxl' is published for schedule 'discrete'"),
        ("ays-svd", EDM, "grid 'ays-svd' is published for schedule 'edm' with sigma_bar from 700 to 0.002"),
        (
            "time-uniform",
            schedules.edm(1.0, 80.0),
            "grids in VP time need a schedule that reaches less noise: .* 0.693 at",
        ),
    ],
)
def test_schedules_a_grid_is_not_for(name, schedule, message):
    with pytest.raises(ValueError, match=message):
        make_grid(schedule, name, 5)


def test_node_values_are_the_schedules():
    grid = make_grid(VP, "quadratic", 4)
    for values, of in ((grid.alpha, VP.alpha), (grid.sigma, VP.sigma), (grid.lam, VP.lam)):
        np.testing.assert_array_equal(values, of(grid.t))


def test_a_function_is_a_grid():
    table = np.array([1.0, 0.5, 0.25])
    np.testing.assert_array_equal(make_grid(VP, lambda s, n: table, 2).t, table)
    np.testing.assert_array_equal(make_grid(FLOW, lambda s, n: [1, 0.5], 2, "zero").t, [1, 0.5, 0])
    assert table.tolist() == [1.0, 0.5, 0.25]


POINTS = {"t": [1.0, 0.6, 0.5, 0.01], "sigma_bar": [100.0, 4.0, 1.0, 0.02], "lam": [-4.0, -1.0, 0.0, 3.0]}


@pytest.mark.parametrize("of", POINTS)
def test_from_points(of):
    points, values = grids.from_points(POINTS[of], of=of), np.array(POINTS[of])
    seen = {"t": lambda t: t, "sigma_bar": VP.sigma_bar, "lam": VP.lam}[of]
    np.testing.assert_allclose(seen(make_grid(VP, points, 3).t), values, rtol=0 if of == "t" else 1e-9, atol=1e-12)
    np.testing.assert_allclose(seen(make_grid(VP, points, 3, "denoise").t[:-1]), values, rtol=1e-9, atol=1e-12)
    finer = seen(make_grid(VP, points, 6).t)  # a node half way between each two, in that variable
    np.testing.assert_allclose(finer[::2], values, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(finer[1::2], (values[1:] + values[:-1]) / 2, rtol=1e-9, atol=1e-12)
    for steps in (1, 2, 5, 100):
        ends = seen(make_grid(VP, points, steps).t[[0, -1]])
        np.testing.assert_allclose(ends, values[[0, -1]], rtol=1e-9, atol=1e-12)
    assert make_plan("dpmpp-2m", VP, nfe=7, grid=points).nfe == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 0.5], "sigma"), "unknown of 'sigma'; did you mean 'sigma_bar'"),
        (([1.0],), "values needs at least 2 values"),
        (([1.0, math.nan],), "values must be finite, got nan"),
        (([1.0, 0.5, 0.5],), r"values of t must decrease strictly: values\[1\]=0.5, values\[2\]=0.5"),
        (([1.0, 2.0], "sigma_bar"), r"values of sigma_bar must decrease strictly: values\[0\]=1, values\[1\]=2"),
        (([2.0, 1.0, 0.0], "sigma_bar"), "values of sigma_bar must be positive, got 0; a step to 0 is final='zero'"),
        (([1.0, 0.0], "lam"), r"values of lam must rise strictly: values\[0\]=1, values\[1\]=0"),
    ],
)
def test_bad_points(arguments, message):
    with pytest.raises(ValueError, match=message):
        grids.from_points(*arguments)


def test_points_outside_the_schedule():
    with pytest.raises(ValueError, match=r"time 80 is outside \[0.001, 1\]"):
        make_grid(VP, grids.from_points([80.0, 0.5]), 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), r"rho must be in \[0.1, 100\], got 0.0"),
        ((-1,), r"rho must be in \[0.1, 100\], got -1"),
        ((1e-4,), r"rho must be in \[0.1, 100\], got 0.0001"),
        ((1e9,), r"rho must be in \[0.1, 100\], got 1000000000.0"),
        ((math.nan,), r"rho must be in \[0.1, 100\], got nan"),
        ((True,), r"rho must be in \[0.1, 100\], got True"),
        ((2.0, "sigma"), "unknown of 'sigma'; did you mean 'sigma_bar'"),
    ],
)
def test_bad_powers(arguments, message):
    with pytest.raises(ValueError, match=message):
        grids.power(*arguments)


@on_every_schedule
@pytest.mark.parametrize("of", ["sigma_bar", "t", "vp_time"])
@pytest.mark.parametrize("rho", [0.1, 100.0])
def test_every_power_gives_a_grid(schedule, of, rho):
    if schedule.t_min == 0 and of == "t" and rho > 1:  # most nodes are 0 in all digits of lam
        with pytest.raises(ValueError, match="a grid must decrease strictly, in steps that float64 resolves"):
            make_grid(schedule, grids.power(rho, of), 200)
    elif schedule.alpha(schedule.t_max) > 0 or of == "t":
        t = make_grid(schedule, grids.power(rho, of), 200).t
        assert t[0] == schedule.t_max
        assert t[-1] == pytest.approx(schedule.t_min, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("power(5)", grids.power(5)),
        (" power( 2.5 , t ) ", grids.power(2.5, "t")),
        ("power(rho=2, of='vp_time')", grids.power(2, of="vp_time")),
        (repr(grids.power(3, of="t")), grids.power(3, of="t")),
    ],
)
def test_a_power_by_text(text, points):
    assert make_grid(VP, text, 7).t.tolist() == make_grid(VP, points, 7).t.tolist()
    assert make_plan("ddim", VP, nfe=4, grid=text) == make_plan("ddim", VP, nfe=4, grid=points)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("power(x)", r"rho of grid 'power\(x\)' must be a number, got 'x'"),
        ("power(0)", r"rho must be in \[0.1, 100\], got 0"),
        ("power(2, sigma)", "unknown of 'sigma'; did you mean 'sigma_bar'"),
        ("power()", r"unknown grid 'power\(\)'; did you mean 'power\(rho\)'"),
        ("power", r"unknown grid 'power'; did you mean 'power\(rho\)'"),
    ],
)
def test_bad_powers_by_text(text, message):
    with pytest.raises(ValueError, match=message):
        make_grid(VP, text, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("karas", 5), "unknown grid 'karas'; did you mean 'karras'"),
        (("uniform", 5, "t_mim"), "unknown final 't_mim'; did you mean 't_min'"),
        (("trailing", 1001), "at most 1000 points, one for each training step, got 1001"),
        ((lambda s, n: np.full(n, 0.5), 2), r"must decrease strictly: t\[0\]=0.5, t\[1\]=0.5"),
        ((lambda s, n: np.linspace(2.0, 0.5, n), 2), r"time 2 is outside \[0.001, 1\]"),
        ((lambda s, n: np.linspace(1.0, -0.5, n), 2), r"time -0.5 is outside \[0.001, 1\]"),
        ((lambda s, n: np.full(n, math.nan), 2), "must be finite: node 0 is nan"),
        ((lambda s, n: np.linspace(1.0, 0.1, 7), 2), r"must give 3 times, got shape \(7,\)"),
        ((lambda s, n: [], 2), r"grid <lambda> must give 3 times, got shape \(0,\)"),
        ((lambda s, n: "abc", 2), "grid <lambda> must give 3 times, got 'abc'"),
        (("uniform", 0, "zero"), "steps must be at least 1, got 0"),
        (("uniform", 10**12), "steps must be at most 1000000, got 1000000000000"),
    ],
)
def test_bad_grids(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_grid(VP, *arguments)


def test_a_grid_is_a_name_or_a_function():
    with pytest.raises(TypeError, match="grid must be a name or a function .* got int"):
        make_grid(VP, 5, 3)


NOT_NUMBERS = [
    (["a", "b"], "must be a sequence of numbers"),
    (None, "needs at least 2 values in one dimension, got shape"),
    (0.5, r"needs at least 2 values in one dimension, got shape \(\)"),
    ([0.5], r"needs at least 2 values in one dimension, got shape \(1,\)"),
    ([], "needs at least 2 values"),
    ([[0.5, 0.2]], r"got shape \(1, 2\)"),
    ([0.5, math.nan, 0.1], "must be finite, got nan"),
    ([math.inf, 0.1], "must be finite, got inf"),
]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *NOT_NUMBERS,
        ([0.2, 0.5], r"timesteps must decrease strictly: timesteps\[0\]=0.2, timesteps\[1\]=0.5"),
        ([0.9, 0.5, 0.5], r"timesteps must decrease strictly: timesteps\[1\]=0.5, timesteps\[2\]=0.5"),
        ([1.00001, 0.5], r"timesteps: time 1.00001 is outside \[0.001, 1\], the range of schedule 'vp_linear'"),
        ([0.5, 0.0009], "timesteps: time 0.0009 is outside"),
        ([0.5, 0.0], "timesteps: time 0 is outside"),
    ],
)
def test_bad_timesteps(values, message):
    with pytest.raises(ValueError, match=message):
        from_timesteps(VP, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *NOT_NUMBERS,
        ([1.0, 2.0], r"sigmas must decrease strictly: sigmas\[0\]=1, sigmas\[1\]=2"),
        ([1.0, 0.0, 0.0], r"sigmas must be positive \(only the last may be 0\)"),
        ([1.0, -0.5], "sigmas must be positive"),
        ([81.0, 1.0], r"sigmas: 81 is outside \[0.002, 80\], the sigma / alpha that schedule 'edm' has"),
        ([1.0, 0.001], "sigmas: 0.001 is outside"),
    ],
)
def test_bad_sigmas(values, message):
    with pytest.raises(ValueError, match=message):
        from_sigmas(EDM, values)


@pytest.mark.parametrize("name", ["timesteps", "sigmas"])
@pytest.mark.parametrize(("values", "message"), NOT_NUMBERS[3:4])
def test_messages_name_the_argument(name, values, message):
    with pytest.raises(ValueError, match=f"{name} {message}"):
        make_plan("ddim", VP, **{name: values})


@pytest.mark.parametrize("values", [[1.0, 0.5, 0.001], (1.0, 0.5, 0.001), np.array([1.0, 0.5, 0.001])])
def test_explicit_timesteps(values):
    assert from_timesteps(VP, values).t.tolist() == [1.0, 0.5, 0.001]


def test_explicit_nodes_as_tensors():
    assert from_timesteps(VP, torch.tensor([1.0, 0.5])).t.tolist() == [1.0, 0.5]
    sigmas = from_sigmas(EDM, torch.tensor([80.0, 2.0, 0.0], requires_grad=True))
    np.testing.assert_allclose(sigmas.t, [80.0, 2.0, 0.0], rtol=1e-15)


@pytest.mark.parametrize("schedule", ["vp_linear", "cosine", "edm", "discrete"], indirect=True)
def test_a_millionth_outside_is_rounding(schedule):
    span = np.array([schedule.t_max * (1 + 0.9e-6), schedule.t_min - 0.9e-6 * (schedule.t_min or 1.0)])
    assert from_timesteps(schedule, span).t.tolist() == [schedule.t_max, schedule.t_min]
    with pytest.raises(ValueError, match="outside"):
        from_timesteps(schedule, span + [schedule.t_max * 0.2e-6, 0])
    with pytest.raises(ValueError, match="outside"):
        from_timesteps(schedule, span - [0, 0.2e-6 * (schedule.t_min or 1.0)])


@pytest.mark.parametrize("schedule", ["vp_linear", "cosine", "edm", "flow", "discrete"], indirect=True)
@pytest.mark.parametrize("end", [0.05, 0.0])
def test_explicit_sigmas_are_sigma_bar(schedule, end):
    values = np.array([20.0, 3.0, 0.5, end])
    grid = from_sigmas(schedule, values)
    np.testing.assert_allclose(grid.sigma / grid.alpha, values, rtol=1e-9, atol=0)
    assert (grid.t[-1] == schedule.t_zero) == (end == 0)


@pytest.mark.parametrize("schedule", ["vp_linear", "cosine", "edm", "discrete"], indirect=True)
def test_a_hundred_thousandth_outside_is_rounding_of_sigma(schedule):
    low, high = schedule.sigma_bar(schedule.t_min), schedule.sigma_bar(schedule.t_max)
    for outside in (1e-9, 5e-6, 0.99e-5):
        grid = from_sigmas(schedule, [high * (1 + outside), low * (1 - outside)])
        np.testing.assert_allclose(grid.t, [schedule.t_max, schedule.t_min], rtol=1e-9, atol=1e-9)
    for bad in ([high * (1 + 1.1e-5), low], [high, low * (1 - 1.1e-5)]):
        with pytest.raises(ValueError, match="^sigmas: .* is outside .*, the sigma / alpha that schedule"):
            from_sigmas(schedule, bad)


def test_two_sigmas_are_one_step_to_clean_data():
    assert from_sigmas(EDM, [80.0, 0.0]).t == pytest.approx([80.0, 0.0], rel=1e-12)


def test_the_checked_class_itself():
    with pytest.raises(ValueError, match=r"at least 2 nodes in one dimension, got shape \(1,\)"):
        Grid(VP, np.array([0.5]))
    with pytest.raises(ValueError, match="must be finite: node 1 is nan"):
        Grid(VP, np.array([0.5, math.nan]))
