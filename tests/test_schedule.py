"""Noise schedules as checked mathematics: identities, inverses, derivatives, types, and the refusal of bad input."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from samplers import schedule as schedules
from samplers.schedule import Schedule

BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # Stable Diffusion
ALL: dict[str, Schedule] = {
    "vp_linear": schedules.vp_linear(),
    "vp_linear(0.5, 5)": schedules.vp_linear(0.5, 5.0),
    "cosine": schedules.cosine(),
    "cosine(0.05)": schedules.cosine(0.05),
    "edm": schedules.edm(),
    "flow": schedules.flow(),
    "discrete": schedules.from_betas(BETAS),
    "discrete, zero terminal SNR": schedules.from_betas(np.append(BETAS, 1.0)),
    "discrete, 2 steps": schedules.from_alphas_cumprod([0.6, 0.0]),
}
VARIANCE_PRESERVING = [name for name in ALL if name not in ("edm", "flow")]
METHODS = ("alpha", "sigma", "lam", "sigma_bar", "dalpha", "dsigma")

every = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
variance_preserving = pytest.mark.parametrize(
    "schedule", [ALL[name] for name in VARIANCE_PRESERVING], ids=VARIANCE_PRESERVING
)


def inside(schedule: Schedule, n: int = 997) -> np.ndarray:
    """Times between t_min and t_max, the ends excluded."""
    return np.linspace(schedule.t_min, schedule.t_max, n + 2)[1:-1]


@variance_preserving
def test_variance_is_preserved(schedule: Schedule) -> None:
    t = np.linspace(schedule.t_zero, schedule.t_max, 1000)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, rtol=0, atol=1e-14)


@every
def test_ends_of_time(schedule: Schedule) -> None:
    assert schedule.t_zero < schedule.t_min < schedule.t_max or schedule.t_zero == schedule.t_min == 0
    assert schedule.alpha(schedule.t_zero) == 1.0
    assert schedule.sigma(schedule.t_zero) == 0.0
    assert math.copysign(1.0, schedule.sigma(schedule.t_zero)) == 1.0, "a sigma of -0 turns 1 / sigma into -inf"
    assert schedule.lam(schedule.t_zero) == math.inf
    assert schedule.sigma_bar(schedule.t_zero) == 0.0


@every
def test_lam_decreases_and_is_the_log_of_the_ratio(schedule: Schedule) -> None:
    t = inside(schedule)
    lam = schedule.lam(t)
    assert np.all(np.diff(lam) < 0)
    np.testing.assert_allclose(lam, np.log(schedule.alpha(t) / schedule.sigma(t)), rtol=0, atol=1e-11)
    np.testing.assert_allclose(schedule.sigma_bar(t), np.exp(-lam), rtol=1e-12)


@every
def test_t_of_lam_inverts_lam(schedule: Schedule) -> None:
    t = np.concatenate([inside(schedule), [schedule.t_min, schedule.t_max, schedule.t_zero]])
    np.testing.assert_allclose(schedule.t_of_lam(schedule.lam(t)), t, rtol=1e-9, atol=1e-9)
    wide = torch.from_numpy(t)
    torch.testing.assert_close(schedule.t_of_lam(schedule.lam(wide)), wide, rtol=1e-9, atol=1e-9)
    narrow = wide.float()
    torch.testing.assert_close(schedule.t_of_lam(schedule.lam(narrow)), narrow, rtol=1e-4, atol=1e-4)


@every
@pytest.mark.parametrize("quantity", ["alpha", "sigma"])
def test_derivatives_against_central_differences(schedule: Schedule, quantity: str) -> None:
    t = inside(schedule, 499)
    t = t[np.abs(t - np.round(t)) > 1e-3]  # a kink of a table lies at an integer
    h = 1e-5 * np.minimum(t, 10.0)
    value = getattr(schedule, quantity)
    difference = (value(t + h) - value(t - h)) / (2 * h)
    np.testing.assert_allclose(getattr(schedule, f"d{quantity}")(t), difference, rtol=1e-6, atol=1e-7)


@every
def test_derivatives_have_a_sign_and_end_in_infinity_where_sigma_is_a_square_root(schedule: Schedule) -> None:
    t = np.append(inside(schedule), schedule.t_max)
    assert np.all(schedule.dalpha(t) <= 0)
    assert np.all(schedule.dsigma(t) >= 0)
    slope = schedule.dsigma(schedule.t_zero)
    assert slope == (1.0 if schedule.name in ("edm", "flow") else math.inf)
    assert math.isfinite(schedule.dalpha(schedule.t_zero))


def test_derivatives_of_a_table_take_the_interval_below_a_node() -> None:
    schedule = schedules.from_alphas_cumprod([0.9, 0.5, 0.1, 0.0])
    node, h = np.array([0.0, 1.0, 2.0, 3.0]), 1e-6
    for value, slope in ((schedule.alpha, schedule.dalpha), (schedule.sigma, schedule.dsigma)):
        below, above = (value(node) - value(node - h)) / h, (value(node[:3] + h) - value(node[:3])) / h
        np.testing.assert_allclose(slope(node), below, rtol=2e-5, atol=1e-5)
        assert np.all(np.abs(slope(node[:3]) - above) > 1e-2), "the other side would pass as well"


@every
@pytest.mark.parametrize("method", METHODS)
def test_floats_numpy_and_torch_agree_and_answer_in_kind(schedule: Schedule, method: str) -> None:
    function = getattr(schedule, method)
    t = inside(schedule, 12).reshape(3, 4)
    array = function(t)
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float64
    assert array.shape == t.shape
    for i, value in zip(t.flat, array.flat, strict=True):
        scalar = function(float(i))
        assert isinstance(scalar, float)
        assert not isinstance(scalar, np.ndarray)
        assert scalar == pytest.approx(float(value), rel=1e-14)
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-3)):
        given = torch.from_numpy(t).to(dtype)
        answer = function(given)
        assert isinstance(answer, torch.Tensor)
        assert answer.dtype == dtype
        assert answer.shape == given.shape
        np.testing.assert_allclose(answer.numpy(), array, rtol=rtol, atol=1e-6 if dtype == torch.float32 else 0)
        assert function(given[0, 0]).shape == ()
        torch.testing.assert_close(function(given.T), answer.T, rtol=0, atol=0)


@every
def test_float32_numpy_and_integers_are_computed_in_float64(schedule: Schedule) -> None:
    assert schedule.alpha(np.array([schedule.t_max], dtype=np.float32)).dtype == np.float64
    assert schedule.alpha(torch.tensor([1])).dtype == torch.float64
    assert schedule.sigma(int(schedule.t_max)) == schedule.sigma(float(int(schedule.t_max)))


@every
def test_gradients_reach_the_time(schedule: Schedule) -> None:
    t = torch.tensor(inside(schedule, 7) + 1e-3, requires_grad=True)
    schedule.sigma(t).sum().backward()
    assert t.grad is not None
    torch.testing.assert_close(t.grad, schedule.dsigma(t.detach()), rtol=1e-9, atol=1e-12)


@every
@pytest.mark.parametrize("method", ["alpha", "sigma"])
def test_gradients_are_finite_at_both_ends(schedule: Schedule, method: str) -> None:
    """Learned times start there, also where a table ends at alpha = 0 and log alpha has no finite slope."""
    t = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64, requires_grad=True)
    (getattr(schedule, method)(t) + 0 * t).sum().backward()  # edm's alpha does not depend on t
    assert t.grad is not None
    assert t.grad.isfinite().all()
    slope = getattr(schedule, "d" + method)(schedule.t_max)
    assert float(t.grad[1]) == pytest.approx(slope, rel=1e-9, abs=1e-12)


def test_a_time_that_is_nan_gives_nan() -> None:
    schedule = ALL["discrete"]
    assert math.isnan(schedule.alpha(math.nan))
    assert np.isnan(schedule.sigma(np.array([1.0, math.nan]))).tolist() == [False, True]
    assert schedule.alpha(torch.tensor([math.nan, 1.0])).isnan().tolist() == [True, False]


def test_betas_give_the_square_root_of_the_cumulative_product_at_the_nodes() -> None:
    schedule = schedules.from_betas(torch.from_numpy(BETAS))
    alphas = np.cumprod(1 - BETAS)
    steps = np.arange(1000)
    assert (schedule.t_min, schedule.t_max, schedule.t_zero) == (0.0, 999.0, -1.0)
    for t in (steps, steps.astype(float)):
        np.testing.assert_allclose(schedule.alpha(t), np.sqrt(alphas), rtol=1e-12)
        np.testing.assert_allclose(schedule.sigma(t), np.sqrt(1 - alphas), rtol=1e-12)
    np.testing.assert_allclose(schedule.alpha(torch.from_numpy(steps)).numpy(), np.sqrt(alphas), rtol=1e-12)
    assert schedule == schedules.from_alphas_cumprod(alphas)
    assert schedules.from_alphas_cumprod([0.5, Fraction(1, 4)]) == schedules.from_alphas_cumprod([0.5, 0.25])


def test_log_alpha_is_linear_between_the_nodes() -> None:
    schedule = schedules.from_betas(BETAS)
    for t, w in ((-1.0, 0.25), (0.0, 0.5), (417.0, 0.125), (998.0, 0.9)):
        expected = (1 - w) * np.log(schedule.alpha(t)) + w * np.log(schedule.alpha(t + 1))
        assert np.log(schedule.alpha(t + w)) == pytest.approx(expected, abs=1e-14)


def test_zero_terminal_snr_is_exact_and_linear_in_alpha() -> None:
    schedule = schedules.from_alphas_cumprod([0.81, 0.25, 0.0])
    assert (schedule.alpha(2.0), schedule.sigma(2.0)) == (0.0, 1.0)
    assert (schedule.lam(2.0), schedule.sigma_bar(2.0)) == (-math.inf, math.inf)
    assert schedule.t_of_lam(-math.inf) == 2.0
    assert (schedule.dalpha(2.0), schedule.dsigma(2.0)) == (pytest.approx(-0.5, abs=1e-15), 0.0)
    w = np.linspace(0, 1, 11)
    np.testing.assert_allclose(schedule.alpha(1 + w), 0.5 * (1 - w), atol=1e-15)
    np.testing.assert_allclose(schedule.alpha(w), 0.9 * (0.5 / 0.9) ** w, rtol=1e-14)
    assert schedule.alpha(2.0 * (1 + 1e-6)) == 0.0, "an explicit last node may lie a rounding error outside"
    ends = torch.tensor([0.0, 1.5, 2.0])
    torch.testing.assert_close(schedule.alpha(ends), torch.tensor([0.9, 0.25, 0.0]))
    assert schedule.t_of_lam(torch.tensor(-math.inf)) == 2.0


def test_times_a_rounding_error_outside_a_table_continue_it() -> None:
    schedule = schedules.from_betas(BETAS)
    outside = schedule.alpha(999.0 * (1 + 1e-6))
    assert outside < schedule.alpha(999.0)
    assert outside == pytest.approx(schedule.alpha(999.0), rel=1e-4)


@every
def test_the_configuration_survives_json(schedule: Schedule) -> None:
    again = schedules.from_config(json.loads(json.dumps(schedule.config())))
    assert again == schedule
    assert type(again) is type(schedule)
    assert again.config() == schedule.config()
    t = inside(schedule, 50)
    np.testing.assert_array_equal(again.sigma(t), schedule.sigma(t))


def test_schedules_are_immutable_and_hashable() -> None:
    schedule = schedules.from_betas([0.1, 0.2])
    with pytest.raises(AttributeError):
        schedule.alphas_cumprod = (0.5, 0.4)  # type: ignore[misc]
    assert len({schedule, schedules.from_betas([0.1, 0.2]), schedules.from_betas([0.1, 0.3])}) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.from_betas([0.1, 1.2]), r"betas must lie in \(0, 1\]: entry 1 is 1.2"),
        (lambda: schedules.from_betas([0.1, math.nan]), "betas must lie in .* entry 1 is nan"),
        (lambda: schedules.from_betas([0.1, 0.0]), "betas must lie in .* entry 1 is 0.0"),
        (lambda: schedules.from_betas([0.1, 1.0, 0.1]), "alphas_cumprod must decrease strictly .* entry 2 is 0.0"),
        (lambda: schedules.from_betas(np.array([[0.1, 0.2]])), r"betas must be one-dimensional, got shape \(1, 2\)"),
        (lambda: schedules.from_betas([]), "betas needs at least 2 entries, got 0"),
        (lambda: schedules.from_alphas_cumprod([0.1]), "alphas_cumprod needs at least 2 entries, got 1"),
        (lambda: schedules.from_betas([0.1]), "betas needs at least 2 entries, got 1"),
        (lambda: schedules.from_alphas_cumprod([0.5, 0.6]), "alphas_cumprod must decrease strictly .* entry 1 is 0.6"),
        (lambda: schedules.from_alphas_cumprod([1.0, 0.6]), "alphas_cumprod must decrease strictly .* entry 0 is 1.0"),
        (lambda: schedules.from_alphas_cumprod([0.5, -0.1]), "alphas_cumprod .* entry 1 is -0.1"),
        (lambda: schedules.from_alphas_cumprod([0.5, math.nan]), "alphas_cumprod .* entry 1 is nan"),
        (lambda: schedules.vp_linear(1.0, 0.5), "0 < beta_min < beta_max.*beta_min=1.0, beta_max=0.5"),
        (lambda: schedules.vp_linear(0.1, math.inf), "0 < beta_min < beta_max.*beta_max=inf"),
        (lambda: schedules.edm(0.0, 80.0), "0 < sigma_min < sigma_max.*sigma_min=0.0"),
        (lambda: schedules.edm(1.0, math.nan), "0 < sigma_min < sigma_max.*sigma_max=nan"),
        (lambda: schedules.cosine(0.0), "0 < s < 1, got s=0.0"),
        (lambda: schedules.cosine(math.nan), "0 < s < 1, got s=nan"),
        (lambda: schedules.vp_linear(math.nan), "0 < beta_min < beta_max.*beta_min=nan"),
        (
            lambda: schedules.from_config({"name": "edm", "sigma_max": "8"}),
            "'edm': sigma_max must be a number, got '8'",
        ),
        (lambda: schedules.from_config({"name": "cosin"}), "schedule name must be one of .*'cosine'.* got 'cosin'"),
        (lambda: schedules.from_config({}), "schedule name must be one of .* got None"),
        (lambda: schedules.from_config({"name": "cosine", "beta_min": 1.0}), "schedule 'cosine': .*'beta_min'"),
        (lambda: schedules.from_config({"name": "discrete"}), "schedule 'discrete': .*'alphas_cumprod'"),
    ],
)
def test_bad_input_is_refused_with_its_name_and_value(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("value", ["a", None, True, [1.0], {}, 1j])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: schedules.vp_linear(value), "beta_min"),
        (lambda value: schedules.vp_linear(beta_max=value), "beta_max"),
        (lambda value: schedules.edm(value), "sigma_min"),
        (lambda value: schedules.edm(sigma_max=value), "sigma_max"),
        (lambda value: schedules.cosine(value), "s"),
    ],
)
def test_an_argument_that_is_no_number_is_named(make: object, name: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be a number, got {re.escape(repr(value))}$"):
        make(value)  # type: ignore[operator]


@pytest.mark.parametrize("value", ["abc", None, True, {}, ["a", "b"], [True, False], [None, 0.1], [[0.1], [0.1, 0.2]]])
@pytest.mark.parametrize("name", ["betas", "alphas_cumprod"])
def test_a_table_that_is_not_of_numbers_is_named(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be numbers, shape \(T,\), got {re.escape(repr(value))}$"):
        getattr(schedules, f"from_{name}")(value)


def test_a_table_may_be_of_any_kind_of_number() -> None:
    for table in ((0.5, 0.25), [np.float32(0.5), 0.25], torch.tensor([0.5, 0.25], dtype=torch.bfloat16)):
        assert schedules.from_alphas_cumprod(table) == schedules.from_alphas_cumprod(np.array([0.5, 0.25]))  # type: ignore[arg-type]
