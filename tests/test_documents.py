"""YAML documents: an error names the file, the line and the field."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from distill.documents import Strict, read_yaml, validated


class Grid(Strict):
    steps: int
    name: str = "uniform"


class Cell(Strict):
    sampler: str
    grids: tuple[Grid, ...] = ()
    weight: float = 1.0


class Suite(Strict):
    seed: int
    cells: tuple[Cell, ...] = ()
    best: Cell | None = None


GOOD = """\
seed: 3
cells:
  - sampler: ddim
    grids:
      - {steps: 5}
      - steps: 10
        name: karras
  - sampler: heun
best:
  sampler: ddim
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "suite.yaml"


def read(file: Path, text: str) -> Suite:
    file.write_text(text)
    return validated(Suite, read_yaml(file), file)


def test_a_good_document_is_read(file: Path) -> None:
    suite = read(file, GOOD)
    assert (suite.seed, suite.cells[0].grids[1], suite.best) == (3, Grid(steps=10, name="karras"), Cell(sampler="ddim"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 3", "seed: x", "line 1: seed: Input should be a valid integer.*, got 'x'"),
        ("seed: 3\n", "", "suite.yaml: seed: Field required$"),
        ("sampler: heun", "sampler: 3", r"line 8: cells\.1\.sampler: .*valid string, got 3"),
        ("name: karras", "name: [a]", r"line 7: cells\.0\.grids\.1\.name: .*valid string, got \['a'\]"),
        ("{steps: 5}", "{steps: 5.5}", r"line 5: cells\.0\.grids\.0\.steps: .*integer.*, got 5\.5"),
        ("{steps: 5}", "{}", r"line 5: cells\.0\.grids\.0\.steps: Field required$"),
        ("name: karras", "nme: karras", r"line 7: cells\.0\.grids\.1\.nme: no such field"),
        ("  sampler: ddim\n", "  weight: .nan\n  sampler: ddim\n", r"line 10: best\.weight: .*finite number, got nan"),
        ("best:", "bets:", "line 9: bets: no such field; did you mean 'best'"),
        ("best:", "zzz:", "line 9: zzz: no such field$"),
        ("best:\n", "7: 1\nbest:\n", "line 9: 7: Keys should be strings"),
    ],
)
def test_an_error_names_the_file_the_line_and_the_field(old: str, new: str, message: str, file: Path) -> None:
    assert GOOD.count(old) >= 1
    head, tail = GOOD.rsplit(old, 1)
    with pytest.raises(ValueError, match=message) as caught:
        read(file, head + new + tail)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must map names to values, got a list"),
        ("", "must map names to values, got a NoneType"),
        ("just words", "must map names to values, got a str"),
        ("a: [", r"is not YAML: .*(line|end)"),
        ("a: b: c", "is not YAML: .*"),
        ("\x00", "is not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML: .*could not determine a constructor"),
    ],
)
def test_what_is_no_mapping_is_refused(text: str, message: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        read_yaml(file)
    assert str(file) in str(caught.value)


def test_a_file_of_bytes_or_none_at_all_is_named(file: Path) -> None:
    with pytest.raises(FileNotFoundError, match="suite.yaml"):
        read_yaml(file)
    file.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ValueError, match="suite.yaml is not YAML"):
        read_yaml(file)


@pytest.mark.parametrize("source", ["the command line", Path("absent.yaml")])
def test_a_document_from_elsewhere_has_no_line(source: Any) -> None:
    with pytest.raises(ValueError, match=f"^{source}: seed: .*got 'x'$"):
        validated(Suite, {"seed": "x"}, source)
    with pytest.raises(ValueError, match=f"^{source}: Suite: .* got 3$"):
        validated(Suite, 3, source)


def test_documents_are_frozen_and_finite() -> None:
    grid = Grid(steps=3)
    with pytest.raises(ValueError, match="frozen"):
        grid.steps = 4  # type: ignore[misc]
    with pytest.raises(ValueError, match="finite"):
        Cell(sampler="ddim", weight=math.inf)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 3", "seed: 3\nseed: 4", r"suite\.yaml, line 2: seed is given twice, in lines 1 and 2$"),
        ("{steps: 5}", "{steps: 5, steps: 6}", r"line 5: steps is given twice, in lines 5 and 5$"),
        (
            "  sampler: ddim\n",
            "  sampler: ddim\n  'sampler': heun\n",
            r"line 11: sampler is given twice, in lines 10 and 11$",
        ),
    ],
)
def test_a_key_that_is_given_twice_is_refused(old: str, new: str, message: str, file: Path) -> None:
    """YAML's loader takes the last one, so that a suite ran with another model than its first lines say."""
    head, tail = GOOD.rsplit(old, 1)
    with pytest.raises(ValueError, match=message):
        read(file, head + new + tail)


def test_a_merged_mapping_may_be_overridden(file: Path) -> None:
    file.write_text("seed: 3\nbest: &best {sampler: ddim, weight: 2.0}\ncells:\n  - {<<: *best, weight: 3.0}\n")
    suite = validated(Suite, read_yaml(file), file)
    assert suite.cells == (Cell(sampler="ddim", weight=3.0),)
