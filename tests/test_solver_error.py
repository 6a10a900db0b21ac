"""Solver errors against their definitions and over repeated draws."""

import math

import numpy as np
import pytest

from bench.solver_error import feature_error, psnr, rmse


def test_rmse_and_psnr_are_their_definitions():
    rng = np.random.default_rng(0)
    images, solution = rng.uniform(-1, 1, (2, 50, 3, 4, 4))
    squares = ((images - solution) ** 2).reshape(50, -1).mean(1)
    found, decibels = rmse(squares), psnr(squares)
    assert found.value == pytest.approx(math.sqrt(((images - solution) ** 2).mean()), rel=1e-12)
    assert decibels.value == pytest.approx(20 * math.log10(2.0 / found.value), rel=1e-12)
    assert psnr(squares, span=1.0).value == pytest.approx(decibels.value - 20 * math.log10(2.0), rel=1e-12)
    assert found.count == decibels.count == 50


def test_intervals_cover():
    """Squared errors of an exponential law with mean 1: RMSE 1, and 10 log10 4 decibels for images of range 2."""
    rng = np.random.default_rng(0)
    draws = [rng.exponential(size=300) for _ in range(1000)]
    for figure, exact in ((rmse, 1.0), (psnr, 10 * math.log10(4.0)), (feature_error, 1.0)):
        found = [figure(values) for values in draws]
        assert np.mean([d.low <= exact <= d.high for d in found]) == pytest.approx(0.95, abs=0.025)
        values = np.array([d.value for d in found])
        assert np.mean([d.standard_error for d in found]) == pytest.approx(values.std(), rel=0.08)


def test_feature_error_is_a_mean():
    values = np.array([1.0, 2.0, 6.0])
    found = feature_error(values)
    assert found.value == 3.0
    assert found.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(3))


def test_samples_that_are_their_solutions():
    assert rmse(np.zeros(4)).high == 0.0
    assert psnr(np.zeros(4)).value == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rmse([1.0, -0.5]), "squared_errors must be >= 0, got -0.5 in sample 1"),
        (lambda: rmse(np.ones((2, 2))), r"squared_errors must be \(N,\)"),
        (lambda: psnr([1.0, math.inf]), "squared_errors must be finite.*sample 1"),
        (lambda: psnr([1.0, 1.0], span=0.0), "span must be a number above 0, got 0.0"),
        (lambda: feature_error([1.0]), "distances must hold at least 2 samples, got 1"),
    ],
)
def test_bad_input_names_what_is_accepted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
