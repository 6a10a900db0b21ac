"""Intervals against textbook formulas, and their coverage over repeated draws."""

import math

import numpy as np
import pytest
import scipy.stats

from bench.intervals import Distance, combined, interval, jackknife, mean_interval, share_interval
from bench.metrics import FrechetReference, Moments, frechet_distance, frechet_interval


def test_interval_of_a_normal_and_of_a_student_error():
    found = interval(3.0, 0.5, 10, 0.9)
    reach = scipy.stats.norm.ppf(0.95) * 0.5
    assert (found.low, found.high) == pytest.approx((3.0 - reach, 3.0 + reach), rel=1e-12)
    found = interval(3.0, 0.5, 10, 0.9, degrees=4)
    reach = scipy.stats.t.ppf(0.95, 4) * 0.5
    assert (found.low, found.high) == pytest.approx((3.0 - reach, 3.0 + reach), rel=1e-12)
    assert interval(0.1, 1.0, 10, floor=0.0).low == 0.0
    assert interval(9.9, 1.0, 10, ceiling=10.0).high == 10.0


def share(hits: int, count: int, level: float = 0.95) -> Distance:
    rate = hits / count
    return share_interval(rate, math.sqrt(rate * (1 - rate) / count), count, level)


@pytest.mark.parametrize("hits", [0, 1, 20, 39, 40])
def test_interval_of_a_share_is_wilsons(hits):
    found, known = share(hits, 40), scipy.stats.binomtest(hits, 40).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=1e-12)
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0
    assert found.high - found.low > 0.05
    assert found.standard_error > 0


@pytest.mark.parametrize("rate", [0.01, 0.5, 0.97])
def test_interval_of_a_share_covers_also_near_its_ends(rate):
    """The mean over shares, which a single one's probability jumps about; by the binomial distribution, without draws."""
    covered = []
    for count in range(40, 140, 3):
        found = [share(hits, count) for hits in range(count + 1)]
        inside = np.array([d.low <= rate <= d.high for d in found])
        covered.append(scipy.stats.binom.pmf(np.arange(count + 1), count, rate) @ inside)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.025)


def test_interval_of_a_share_is_as_wide_as_its_standard_error_says():
    """Of trials that come in fours: a quarter of them is independent. Far from the ends it is the normal one."""
    once, fours = share(30, 50), share_interval(0.6, math.sqrt(0.24 / 50), 200)
    assert (fours.low, fours.high) == pytest.approx((once.low, once.high), abs=2e-3)
    wide = share_interval(0.5, 0.01, 10**6)
    assert (wide.low, wide.high) == pytest.approx((0.5 - 0.0196, 0.5 + 0.0196), abs=2e-5)
    assert share_interval(1.0, 0.02, 1000).low < share(1000, 1000).low


def test_mean_of_shares_keeps_to_their_range():
    same = combined([share(40, 40)] * 4, share=True)
    assert (same.value, same.high) == (1.0, 1.0)
    assert 1.0 - same.low == pytest.approx((1.0 - share(40, 40).low) / 2)
    near = combined([share(39, 40), share(40, 40), share(38, 40)], share=True)
    assert 0.8 < near.low < near.value < near.high <= 1.0
    apart = combined([share(20, 40), share(40, 40), share(40, 40)], share=True)
    spread = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem([0.5, 1.0, 1.0])
    assert apart.low == pytest.approx(5 / 6 - spread)
    assert apart.high == 1.0


def test_mean_interval_is_the_textbook_one():
    values = np.random.default_rng(0).exponential(size=200)
    found = mean_interval(values.astype(np.float32))
    assert found.value == pytest.approx(values.mean(), rel=1e-6)
    assert found.standard_error == pytest.approx(scipy.stats.sem(values), rel=1e-5)
    assert found.count == 200
    assert mean_interval(np.array([True, False, True, True])).value == 0.75


@pytest.mark.parametrize("blocks", [2, 7, 50])
def test_jackknife_of_a_mean_over_equal_blocks_is_the_spread_of_their_means(blocks):
    """For a linear statistic and equal blocks: the standard deviation of the blocks' means over sqrt(B), exactly."""
    rows = np.random.default_rng(0).standard_normal((350, 1))
    found = jackknife(np.mean, rows, blocks)
    means = rows.reshape(blocks, -1).mean(1)
    assert found.value == rows.mean()
    assert found.standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(blocks), rel=1e-10)
    assert found.high - found.value == pytest.approx(
        scipy.stats.t.ppf(0.975, blocks - 1) * found.standard_error, rel=1e-10
    )


def test_jackknife_of_a_frechet_distance_is_the_delta_method():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2000, 3)) * [1.0, 2.0, 0.5]
    reference = FrechetReference(Moments(np.ones(3), np.eye(3), 0))
    found = jackknife(lambda rows: frechet_distance(Moments.of(rows), reference), features, 200, floor=0.0)
    expected = frechet_interval(features, reference)
    assert found.value == pytest.approx(expected.value, rel=1e-12)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=0.15)


def test_jackknife_leaves_each_block_out_once():
    """What the statistic sees, as slices and as an array, is the rows without one block; sizes differ by one at most."""
    rows = np.arange(11.0)[:, None]
    seen = []

    def statistic(given):
        whole = np.asarray(given)[:, 0]
        parts = np.concatenate([given[a : a + 3] for a in range(0, len(given), 3)])[:, 0]
        np.testing.assert_array_equal(parts, whole)
        assert given.shape == (len(whole), 1)
        seen.append(sorted(set(range(11)) - set(whole.astype(int))))
        return float(whole.sum())

    jackknife(statistic, rows, 4)
    assert seen == [[0, 1], [2, 3, 4], [5, 6, 7], [8, 9, 10], []]


def test_jackknife_covers():
    """Of the logarithm of a mean, from 100 exponential numbers in 10 blocks."""
    rng = np.random.default_rng(0)
    found = [jackknife(lambda x: math.log(np.mean(x)), rng.exponential(size=100), 10) for _ in range(500)]
    assert np.mean([d.low <= 0.0 <= d.high for d in found]) == pytest.approx(0.95, abs=0.03)


def distance(value: float, error: float, low: float = 0.0) -> Distance:
    return Distance(value, low, value + 2 * error, error, 100)


def test_combined_follows_its_formula():
    one = combined([distance(2.0, 0.3), distance(4.0, 0.4)])
    assert one.value == 3.0
    assert one.count == 200
    assert one.standard_error == pytest.approx(0.25)  # sqrt(0.09 + 0.16) / 2; two values say nothing of their spread
    wide = combined([distance(2.0, 0.3), distance(4.0, 0.4), distance(6.0, 0.0)])
    assert wide.standard_error == pytest.approx(2.0 / math.sqrt(3))
    narrow = combined([distance(2.0, 0.3), distance(2.0, 0.4), distance(2.0, 0.0)])
    assert narrow.standard_error == pytest.approx(0.5 / 3)
    assert narrow.high - narrow.value == pytest.approx(1.959964 * 0.5 / 3, rel=1e-6)
    assert combined([distance(2.0, 0.3)]).standard_error == 0.3


@pytest.mark.parametrize("known", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_combined_covers_from_few_seeds_on(seeds, known):
    """Of values of standard deviation 1, of which each run knows none, a quarter of the variance, or all."""
    draws = np.random.default_rng(0).standard_normal((3000, seeds))
    found = [combined([distance(v, known, low=-math.inf) for v in values]) for values in draws]
    covered = np.mean([d.low <= 0.0 <= d.high for d in found])
    assert covered == pytest.approx(0.95, abs=0.01) if known == 0.0 else covered > 0.94


def test_combined_ends_at_zero_where_its_parts_do():
    assert combined([distance(0.1, 1.0), distance(0.2, 1.0)]).low == 0.0
    assert combined([distance(0.1, 1.0, low=-1.0), distance(0.2, 1.0)]).low < 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interval(1.0, 1.0, 9, level=1.0), r"level must lie in \(0, 1\), got 1.0"),
        (lambda: share_interval(1.2, 0.1, 9), r"value must lie in \[0, 1\], got 1.2"),
        (lambda: mean_interval(np.zeros((2, 2))), r"values must be \(N,\) real numbers, got \(2, 2\)"),
        (lambda: mean_interval([1.0]), "at least 2 samples, got 1"),
        (lambda: mean_interval([1.0, 2.0, math.nan]), "values must be finite, got NaN or Inf in sample 2"),
        (lambda: jackknife(np.mean, np.zeros((5, 1)), 6), r"blocks must lie in 2 .. 5, the number of rows, got 6"),
        (lambda: jackknife(np.mean, np.zeros((5, 1)), 1), r"blocks must lie in 2 .. 5, the number of rows, got 1"),
        (lambda: combined([]), "distances must hold at least one"),
    ],
)
def test_bad_input_names_what_is_accepted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
