"""The floor of a distance: what real data has at the number of samples that is judged, and the intervals of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.floor import EXACT, HALVES, TEST, Floor, floor_of_halves, floor_of_moments, floor_of_samples
from bench.judge import SAMPLES, TEST_SAMPLES, digit_judge
from bench.metrics import FrechetReference, Moments, frechet_distance
from bench.zoo import load_model

STANDARD = FrechetReference(Moments(np.zeros(4), np.eye(4), 0))


def normal(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 4))


def test_a_floor_is_the_mean_of_fresh_samples_at_that_count() -> None:
    """Against many independent sets of the same size, which share nothing with the rows of the floor."""
    for count in (50, 200):
        fresh = np.mean([frechet_distance(Moments.of(normal(count, 10 + k)), STANDARD) for k in range(300)])
        floor = floor_of_samples(normal(20 * count, 0), STANDARD, count)
        assert (floor.what, floor.count) == (TEST, count)
        assert floor.low < fresh < floor.high
        assert floor.value == pytest.approx(fresh, rel=0.35)


def test_halves_have_the_error_of_both_sides() -> None:
    count = 100
    apart = [
        frechet_distance(Moments.of(normal(count, 2 * k)), Moments.of(normal(count, 2 * k + 1))) for k in range(300)
    ]
    floor = floor_of_halves(normal(20 * count, 999), count)
    assert (floor.what, floor.count) == (HALVES, count)
    assert floor.low < np.mean(apart) < floor.high
    assert floor.value > 1.5 * floor_of_samples(normal(20 * count, 999), STANDARD, count).value


def test_a_floor_takes_what_there_is_and_says_how_much() -> None:
    rows = normal(30, 0)
    whole = floor_of_samples(rows, STANDARD, 1000)
    assert (whole.count, whole.value) == (30, pytest.approx(frechet_distance(Moments.of(rows), STANDARD), rel=1e-12))
    assert floor_of_halves(rows, 1000).count == 15
    moments = floor_of_moments(Moments.of(rows), STANDARD)
    assert (moments.count, moments.value, moments.high) == (30, pytest.approx(whole.value), None)


def test_rows_that_are_sorted_are_drawn_at_random() -> None:
    """Draws of neighbours would hold one class each, and be far from the whole."""
    rows = np.concatenate([normal(200, 0) - 5.0, normal(200, 1) + 5.0])
    reference = FrechetReference(Moments.of(rows))
    assert floor_of_samples(rows, reference, 100).value < 5.0
    assert frechet_distance(Moments.of(rows[:100]), reference) > 50.0


def test_a_floor_comes_back_from_its_record() -> None:
    floor = floor_of_samples(normal(30, 0), STANDARD, 10)
    assert Floor.of_record(dict(vars(floor))) == floor


def test_the_floor_of_digits_falls_with_the_samples_and_the_table_has_its_own() -> None:
    """All 10 000 test images gave one number, 0.129, that stood under tables of 500 samples too, where it is 0.73."""
    judge = digit_judge("cpu")
    test = {count: judge.floors(count)[0] for count in (500, 1000, 2000, 5000, 10_000)}
    assert [floor.count for floor in test.values()] == list(test)
    expected = {500: 0.73, 1000: 0.416, 2000: 0.263, 5000: 0.150, 10_000: 0.129}
    for count, floor in test.items():
        assert floor.value == pytest.approx(expected[count], rel=0.06)
        assert floor.low < floor.value < floor.high
    halves = judge.floors(500)[1]
    assert (halves.what, halves.count) == (HALVES, 500)
    assert halves.value > 1.5 * test[500].value
    assert judge.floors(20_000)[0].count == 10_000


def test_an_exact_model_has_the_floor_of_its_own_draws() -> None:
    floors = load_model("gmm").judge.floors(500)
    assert [(floor.what, floor.count) for floor in floors] == [(EXACT, 500)]
    assert 0 < floors[0].value < 0.03


@pytest.mark.parametrize("folder", [SAMPLES, TEST_SAMPLES])
def test_the_shipped_features_can_be_read_by_everybody(folder: Path) -> None:
    assert (folder / "features.safetensors").stat().st_mode & 0o044 == 0o044
