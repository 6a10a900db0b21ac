"""Time grids: ends, spacing, the discrete conventions of diffusers, and the refusal of anything that is not a grid."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from samplers import grids, make_plan, schedules
from samplers.grid import GRIDS, Grid, from_sigmas, from_timesteps, make_grid

VP, FLOW, EDM = schedules.vp_linear(), schedules.flow(), schedules.edm()
DISCRETE = schedules.from_betas(np.linspace(1e-4, 0.02, 1000))
NEED_A_FINITE_START = {"logsnr", "exponential", "karras", "edm"}

on_every_schedule = pytest.mark.parametrize(
    "schedule", ["vp_linear", "cosine", "edm", "flow", "discrete", "zero_snr"], indirect=True
)


@on_every_schedule
@pytest.mark.parametrize("name", GRIDS)
def test_named_grids(schedule, name):
    if schedule.alpha(schedule.t_max) == 0 and name in NEED_A_FINITE_START:
        with pytest.raises(ValueError, match=r"grid '.*' needs a finite log-SNR at t_max, .*'uniform'"):
            make_grid(schedule, name, 5)
        return
    for final, steps in itertools.product([None, *grids.FINALS], [1, 2, 10, 100]):
        grid = make_grid(schedule, name, steps, final)
        ends = final or GRIDS[name][1]
        points = grid.t if ends == "t_min" else grid.t[:-1]
        assert grid.steps == steps + (ends == "denoise")
        assert (np.diff(grid.t) < 0).all()
        if name != "leading" and (name, len(points)) != ("linspace", 1):  # these two are as in diffusers
            assert grid.t[0] == schedule.t_max
        if name not in ("sgm", "trailing") and len(points) > 1:
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


def test_rho_changes_the_spacing():
    points = make_grid(EDM, lambda s, n: grids.karras(s, n, rho=3.0), 10).t
    assert equal_steps(points ** (1 / 3))
    assert equal_steps(make_grid(VP, lambda s, n: grids.polynomial(s, n, rho=3.0), 10).t ** (1 / 3))


def test_edm_and_sgm_end_at_clean_data():
    np.testing.assert_array_equal(make_grid(EDM, "edm", 5).t, [*make_grid(EDM, "karras", 4).t, 0.0])
    np.testing.assert_allclose(make_grid(DISCRETE, "sgm", 3).t, [999.0, 666.0, 333.0, -1.0])


def test_beta_grid_has_beta_quantiles():
    from scipy.stats import beta

    t = (make_grid(VP, "beta", 10).t - VP.t_min) / (VP.t_max - VP.t_min)
    np.testing.assert_allclose(beta.cdf(t, 0.6, 0.6), np.linspace(1, 0, 11), atol=1e-9)


@pytest.mark.parity
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 5, 7, 10, 50, 999, 1000])
def test_discrete_conventions_are_those_of_diffusers(spacing, steps):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=1000, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert make_grid(DISCRETE, spacing, steps).t[:-1].tolist() == scheduler.timesteps.tolist()
    along = (make_grid(FLOW, spacing, steps).t[:-1] - FLOW.t_min) / (FLOW.t_max - FLOW.t_min) * 999
    np.testing.assert_allclose(along, scheduler.timesteps, atol=1e-9)


def test_leading_takes_an_offset():
    assert make_grid(DISCRETE, lambda s, n: grids.leading(s, n, offset=1), 3).t.tolist() == [751.0, 501.0, 251.0, 1.0]


def test_node_values_are_the_schedules():
    grid = make_grid(VP, "quadratic", 4)
    for values, of in ((grid.alpha, VP.alpha), (grid.sigma, VP.sigma), (grid.lam, VP.lam)):
        np.testing.assert_array_equal(values, of(grid.t))


def test_a_function_is_a_grid():
    table = np.array([1.0, 0.5, 0.25])
    np.testing.assert_array_equal(make_grid(VP, lambda s, n: table, 2).t, table)
    np.testing.assert_array_equal(make_grid(FLOW, lambda s, n: [1, 0.5], 2, "zero").t, [1, 0.5, 0])
    assert table.tolist() == [1.0, 0.5, 0.25]


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
        ((lambda s, n: [], 2), r"must give 3 times, got shape \(0,\)"),
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
        ([0.2, 0.5], r"must decrease strictly: t\[0\]=0.2, t\[1\]=0.5"),
        ([0.9, 0.5, 0.5], r"must decrease strictly: t\[1\]=0.5, t\[2\]=0.5"),
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
        ([81.0, 1.0], r"sigmas: time 81 is outside \[0.002, 80\]"),
        ([1.0, 0.001], "sigmas: time 0.001 is outside"),
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


def test_two_sigmas_are_one_step_to_clean_data():
    assert from_sigmas(EDM, [80.0, 0.0]).t == pytest.approx([80.0, 0.0], rel=1e-12)


def test_the_checked_class_itself():
    with pytest.raises(ValueError, match=r"at least 2 nodes in one dimension, got shape \(1,\)"):
        Grid(VP, np.array([0.5]))
    with pytest.raises(ValueError, match="must be finite: node 1 is nan"):
        Grid(VP, np.array([0.5, math.nan]))
