"""What is known of a cell's samples on disk: any order, any batch, damaged files, and slices without reading all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import blocks as bench_blocks
from bench.blocks import Blocks

FEATURES = np.random.default_rng(0).standard_normal((23, 3))


def put(blocks: Blocks, start: int, stop: int) -> None:
    rows = {"features": FEATURES[start:stop], "first": FEATURES[start : min(stop, 2)]}
    blocks.put(range(start, stop), rows, {"seconds": 0.5})


def test_blocks_in_any_order_give_the_rows_in_order(tmp_path: Path) -> None:
    blocks = Blocks(tmp_path / "cell")
    for start, stop in [(16, 23), (0, 4), (8, 16), (4, 8)]:
        put(blocks, start, stop)
    rows = blocks.rows("features")
    assert (rows.shape, len(rows), rows.dtype) == ((23, 3), 23, np.float64)
    assert np.array_equal(rows, FEATURES)
    for part in (slice(0, 1), slice(3, 17), slice(20, 99), slice(5, 5), slice(None, None, 4)):
        assert np.array_equal(rows[part], FEATURES[part])
    assert np.array_equal(blocks.rows("first")[:2], FEATURES[:2])
    assert blocks.total("seconds") == 2.0


@pytest.mark.parametrize("size", [1, 5, 8, 23, 100])
def test_what_is_missing_is_the_complement_in_the_batches_of_a_whole_run(tmp_path: Path, size: int) -> None:
    blocks = Blocks(tmp_path)
    assert [i for batch in blocks.missing(23, size) for i in batch] == list(range(23))
    put(blocks, 6, 8)
    put(blocks, 16, 23)
    missing = blocks.missing(23, size)
    assert [i for batch in missing for i in batch] == [*range(6), *range(8, 16)]
    assert all(len(batch) <= size and batch.start // size == (batch.stop - 1) // size for batch in missing)
    for batch in missing:
        put(blocks, batch.start, batch.stop)
    assert blocks.missing(23, size) == []
    assert np.array_equal(blocks.rows("features"), FEATURES)


def test_a_hole_is_an_error_and_not_shorter_rows(tmp_path: Path) -> None:
    blocks = Blocks(tmp_path)
    with pytest.raises(ValueError, match="must hold all samples from 0 on"):
        blocks.rows("features")
    put(blocks, 0, 4)
    put(blocks, 8, 12)
    with pytest.raises(ValueError, match="must hold all samples from 0 on"):
        blocks.rows("features")


@pytest.mark.parametrize("damage", ["truncated", "empty", "bit", "text"])
def test_a_damaged_block_is_told_of_and_measured_again(tmp_path: Path, damage: str) -> None:
    told: list[str] = []
    blocks = Blocks(tmp_path, told.append)
    put(blocks, 0, 8)
    put(blocks, 8, 23)
    path = sorted(tmp_path.glob("*.npz"))[0]
    content = bytearray(path.read_bytes())
    middle = content.find(FEATURES[3].tobytes())
    assert middle > 0
    content[middle] ^= 1
    path.write_bytes(
        {"truncated": content[: len(content) // 2], "empty": b"", "bit": content, "text": b"hello"}[damage]
    )
    blocks.check()
    assert len(told) == 1
    assert path.name in told[0]
    assert blocks.missing(23, 100) == [range(8)]


def test_overlapping_blocks_are_mended(tmp_path: Path) -> None:
    told: list[str] = []
    blocks = Blocks(tmp_path, told.append)
    put(blocks, 0, 10)
    put(blocks, 8, 16)
    put(blocks, 16, 23)
    blocks.check()
    assert len(told) == 1
    assert blocks.missing(23, 23) == [range(10, 16)]
    put(blocks, 10, 16)
    assert np.array_equal(blocks.rows("features"), FEATURES)


def test_what_a_killed_writer_leaves_is_no_block(tmp_path: Path) -> None:
    blocks = Blocks(tmp_path)
    put(blocks, 0, 8)
    (tmp_path / ".000000008-000000016.npz.77.new").write_bytes(b"half")
    blocks.check()
    assert blocks.missing(16, 8) == [range(8, 16)]
    blocks.remove()
    assert not tmp_path.exists()


def test_what_was_put_is_not_read_back_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are whole all the same: another process reads the same arrays from them, and so does one beyond the limit."""
    size = FEATURES[:8].nbytes + FEATURES[:2].nbytes + 8
    monkeypatch.setattr("bench.blocks._KEPT", size)
    blocks, read = Blocks(tmp_path / "cell"), []
    for start, stop in [(0, 8), (8, 16), (16, 23)]:
        put(blocks, start, stop)
    opened = bench_blocks._opened
    monkeypatch.setattr("bench.blocks._opened", lambda path: read.append(path.name) or opened(path))
    assert np.array_equal(blocks.rows("features")[:8], FEATURES[:8])
    assert read == []
    assert np.array_equal(blocks.rows("features"), FEATURES)
    assert len(read) == 2
    other = Blocks(tmp_path / "cell")
    assert np.array_equal(other.rows("features"), FEATURES)
    assert other.total("seconds") == blocks.total("seconds") == 1.5


def test_what_is_kept_is_as_it_was_put(tmp_path: Path) -> None:
    blocks, rows = Blocks(tmp_path / "cell"), np.ones((4, 2))
    blocks.put(range(4), {"features": rows})
    rows[:] = 7.0
    assert np.array_equal(blocks.rows("features"), np.ones((4, 2)))
    blocks.remove()
    assert blocks.missing(4, 4) == [range(4)]
