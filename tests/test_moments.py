"""Moments of blocks against NumPy's of the whole, whatever the blocks, their order and the mean."""

import numpy as np
import pytest

from bench.moments import Moments, MomentsAccumulator, blocks, take


def correlated(count: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, dim)) @ rng.standard_normal((dim, dim)) + rng.standard_normal(dim)


def of_parts(parts: list[np.ndarray]) -> Moments:
    found = MomentsAccumulator(parts[0].shape[1])
    for part in parts:
        found.update(part)
    return found.result()


def assert_moments(found: Moments, rows: np.ndarray, rtol: float = 1e-12) -> None:
    rows = rows.astype(np.float64)
    expected = np.cov(rows.T).reshape(found.dim, found.dim)
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert found.count == len(rows)
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=rtol, atol=rtol * np.sqrt(np.diag(expected)).max())
    assert (np.abs(found.covariance - expected) <= rtol * scale).all()
    np.testing.assert_array_equal(found.covariance, found.covariance.T)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.uint8])
@pytest.mark.parametrize("elements", [4, 64, 1 << 22])
def test_moments_of_samples(dtype, elements, monkeypatch):
    monkeypatch.setattr("bench.moments._ELEMENTS", elements)
    features = (np.random.default_rng(0).uniform(0, 200, (50, 4))).astype(dtype)
    moments = Moments.of(features)
    assert moments.mean.dtype == moments.covariance.dtype == np.float64
    assert_moments(moments, features)


@pytest.mark.parametrize("ends", [[], [1], [499], [0, 500], [1, 2, 3], [250], [7, 7, 300], list(range(1, 500))])
def test_any_split_has_the_moments_of_the_whole(ends):
    rows = correlated(500, 6)
    assert_moments(of_parts(np.split(rows, ends)), rows)


def test_sorted_blocks_are_no_harder():
    """Blocks whose means are far apart beside their spread."""
    rows = correlated(300, 3)
    rows = rows[np.argsort(rows[:, 0])]
    assert_moments(of_parts(np.split(rows, 30)), rows)


def test_a_large_mean_spoils_nothing():
    """Rows of few bits move by 1e6 without rounding, so that their covariance is the same to the last bits."""
    rows = np.round(correlated(400, 5) * 1024) / 1024
    moved = of_parts(np.split(rows + 1e6, [3, 100]))
    expected = of_parts([rows])
    scale = np.sqrt(np.outer(np.diag(expected.covariance), np.diag(expected.covariance)))
    assert (np.abs(moved.covariance - expected.covariance) <= 1e-12 * scale).all()
    np.testing.assert_allclose(moved.mean - 1e6, expected.mean, rtol=0, atol=1e-9)


def test_merged_in_any_order():
    rows = correlated(200, 4)
    parts = [rows[:1], rows[1:50], rows[50:50], rows[50:120], rows[120:]]
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        found = MomentsAccumulator(4)
        for k in order:
            part = MomentsAccumulator(4)
            part.update(parts[k])
            found.merge(part)
        assert_moments(found.result(), rows)


def test_merging_leaves_the_other_as_it_is():
    rows = correlated(60, 3)
    one, other = MomentsAccumulator(3), MomentsAccumulator(3)
    one.update(rows[:20])
    other.update(rows[20:])
    one.merge(other)
    one.update(rows)
    assert_moments(other.result(), rows[20:])
    assert_moments(one.result(), np.concatenate([rows, rows]))


def test_a_result_does_not_change_with_later_samples():
    found = MomentsAccumulator(3)
    found.update(correlated(30, 3))
    early = found.result()
    mean, covariance = early.mean.copy(), early.covariance.copy()
    found.update(correlated(30, 3, seed=1) + 5)
    np.testing.assert_array_equal(early.mean, mean)
    np.testing.assert_array_equal(early.covariance, covariance)


def test_blocks_are_all_rows_in_order(monkeypatch):
    monkeypatch.setattr("bench.moments._ELEMENTS", 4 * 7)
    rows = correlated(50, 4)
    found = list(blocks(rows))
    assert [start for start, _ in found] == list(range(0, 50, 7))
    np.testing.assert_array_equal(np.concatenate([block for _, block in found]), rows)
    assert max(len(block) for _, block in blocks(rows, most=3)) == 3


def test_taken_rows_keep_their_order(monkeypatch):
    monkeypatch.setattr("bench.moments._ELEMENTS", 4 * 7)
    rows = correlated(50, 4)
    wanted = np.random.default_rng(0).permutation(50)[:31]
    np.testing.assert_array_equal(take(rows, wanted), rows[wanted])


def accumulator(dim: int, rows: np.ndarray | None = None) -> MomentsAccumulator:
    found = MomentsAccumulator(dim)
    if rows is not None:
        found.update(rows)
    return found


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MomentsAccumulator(0), "dim must be at least 1, got 0"),
        (lambda: accumulator(3).result(), "at least 2 samples, got 0"),
        (lambda: accumulator(3, np.zeros((1, 3))).result(), "at least 2 samples, got 1"),
        (lambda: accumulator(3, np.zeros((5, 4))), "features must be 3, as this was made for, got 4"),
        (lambda: accumulator(3, np.zeros(3)), r"features must be \(N, d\).*got \(3,\)"),
        (lambda: accumulator(2, np.array([[0.0, 1.0], [np.inf, 0.0]])), "finite, got NaN or Inf in sample 1"),
        (lambda: accumulator(3).merge(accumulator(4)), "other must have 3 features like this one, got 4"),
        (lambda: take(np.full((3, 2), np.nan), np.array([0]), "reference"), "reference must be finite.*sample 0"),
    ],
)
def test_bad_input_names_what_is_accepted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
