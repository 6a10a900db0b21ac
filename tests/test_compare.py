"""`fewstep diff` and `fewstep merge`: what is significant, what else differs, what may be made one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scipy.stats import norm
from test_ranking import folder, row, run, said

from bench.compare import compare, diff_notes, holm
from bench.merge import merge
from bench.results import read_rows

SHIPPED = Path(__file__).parent.parent / "results/mnist"


def cell(path: Path, key: str, **record: Any) -> Path:
    (path / "cells").mkdir(parents=True, exist_ok=True)
    (path / f"cells/{key}.json").write_text(json.dumps(record))
    return path


# diff ----------------------------------------------------------------------------------------------------------------


def test_a_difference_its_error_and_its_p_value_have_closed_forms() -> None:
    found = compare([row("a", 4, 1.0, 0.3)], [row("a", 4, 2.5, 0.4)])
    (only,) = found.cells
    assert (only.value, only.standard_error, only.z) == (1.5, pytest.approx(0.5), pytest.approx(3.0))
    assert only.p == pytest.approx(2 * norm.sf(3.0))
    assert found.significant == [only]


def test_holms_correction_is_that_of_its_definition() -> None:
    # by hand: 4 x 0.01, 3 x 0.02 = 0.06, 2 x 0.03 = 0.06, then 0.04 but not below 0.06
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_chance_alone_is_not_significant_over_many_cells() -> None:
    # one of a hundred cells 2.5 errors off: significant alone, not among so many
    a = [row(f"s{k}", 4, 1.0, 0.1) for k in range(100)]
    b = [{**r, "value": r["value"] + (0.25 * 2**0.5 if k == 0 else 0.0)} for k, r in enumerate(a)]
    assert compare(a[:1], b[:1]).significant
    assert not compare(a, b).significant


def test_seeds_are_averaged_before_they_are_compared() -> None:
    a = [row("a", 4, 1.0, 0.3), row("a", 4, 1.4, 0.4, seed=1)]
    (only,) = compare(a, [row("a", 4, 1.2, 0.0)]).cells
    assert (only.value, only.standard_error) == (pytest.approx(0.0), pytest.approx(0.25))
    assert set(only.differs) == {"seed", "seeds"}


def test_exact_values_differ_or_not() -> None:
    a = [row("a", 4, 1.0, 0.0), row("b", 4, 1.0, 0.0)]
    b = [row("a", 4, 1.0, 0.0), row("b", 4, 1.1, 0.0)]
    assert [c.significant for c in compare(a, b).cells] == [False, True]


def test_without_errors_there_is_no_verdict() -> None:
    kd = {"kd": {"value": 1.0, "low": None, "high": None, "standard_error": None}}
    (only,) = compare([row("a", 4, 1.0, metrics=kd)], [row("a", 4, 9.0, metrics=kd)], "kd").cells
    assert (only.value, only.p, only.significant) == (0.0, None, False)


def test_what_else_differs_and_what_one_folder_lacks_is_told() -> None:
    a = [row("a", 4, 1.0), row("b", 4, 1.0), {**row("t", 50, 1.0), "role": "teacher"}]
    b = [row("a", 4, 1.0, code="c1", num_samples=200), {**row("b", 4, 1.0), "status": "failed"}, row("c", 4, 1.0)]
    found = compare(a, b)
    assert [c.differs for c in found.cells] == [("num_samples", "code")]
    lines = diff_notes(found, "A", "B")
    assert "num_samples differs in 1 of 1 cells: 100 -> 200." in lines
    assert "Distances of other counts, extractors or references do not compare: their bias differs." in lines
    assert "Measured in A only: b at 4; t at 50." in lines
    assert "Measured in B only: c at 4." in lines


def test_the_exit_code_tells_of_a_significant_difference_where_it_is_asked_to(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", [row("a", 4, 1.0)]), folder(tmp_path / "b", [row("a", 4, 3.0, model_hash="m1")])
    assert run("diff", a, b).exit_code == 0
    result = run("diff", a, b, "--fail")
    assert result.exit_code == 1
    assert "1 of 1 differences significant" in said(result)
    assert "model_hash differs in 1 of 1 cells: m0 -> m1." in said(result)
    assert run("diff", a, a, "--fail").exit_code == 0
    assert run("diff", SHIPPED, SHIPPED, "--fail").exit_code == 0


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", [row("a", 4, 1.0)])
    b = folder(tmp_path / "b", [row("a", 4, 1.0, metric="fd")])
    assert "unknown metric 'frechet'; " in said(run("diff", a, b))
    assert "unknown metric 'x'" in said(run("diff", a, a, "--metric", "x"))
    assert "there is no results folder" in said(run("diff", a, tmp_path / "c"))


# merge ---------------------------------------------------------------------------------------------------------------


def test_shards_become_one_table_with_all_cells_and_pictures(tmp_path: Path) -> None:
    missing = {"status": "missing", "reason": "left to another shard"}
    bare = {k: v for k, v in row("b", 4, 0.0).items() if k not in ("value", "low", "high")}
    teacher = {**row("t", 50, 0.5), "role": "teacher"}
    a = folder(tmp_path / "a", [row("a", 4, 1.0), {**bare, **missing}, row("a", 8, 0.7), teacher])
    b = folder(tmp_path / "b", [row("a", 4, 1.0, seconds=9.0), row("b", 4, 2.0), teacher])
    cell(a, "k1", value=1.0, seconds=1.0)
    cell(b, "k1", value=1.0, seconds=9.0)
    cell(b, "k2", value=2.0)
    for path in (a, b):
        (path / "samples").mkdir()
        Image.new("L", (2, 2), 7).save(path / "samples/a-nfe4.png")
    Image.new("L", (2, 2), 9).save(b / "samples/b-nfe4.png")
    rows = merge([a, b], tmp_path / "c")
    assert [(r["label"], r["budget"], r["status"]) for r in rows] == [
        ("a", 4, "done"),
        ("b", 4, "done"),
        ("a", 8, "done"),
        ("t", 50, "done"),
    ]
    assert read_rows(tmp_path / "c") == rows
    assert sorted(p.name for p in (tmp_path / "c/cells").iterdir()) == ["k1.json", "k2.json"]
    assert json.loads((tmp_path / "c/cells/k1.json").read_text())["seconds"] == 1.0
    assert sorted(p.name for p in (tmp_path / "c/samples").iterdir()) == ["a-nfe4.png", "b-nfe4.png"]
    files = {"table.csv", "table.md", "table.tex", "frontier.png", "frontier.svg", "provenance.json", "report.html"}
    assert files <= {p.name for p in (tmp_path / "c").iterdir()}
    assert "# gmm: frechet, 100 samples, fp32" in (tmp_path / "c/table.md").read_text()


def test_seeds_of_two_folders_become_a_mean_and_keep_both_pictures(tmp_path: Path) -> None:
    a, b = (folder(tmp_path / name, [row("a", 4, v, seed=s)]) for name, v, s in (("a", 1.0, 0), ("b", 2.0, 1)))
    for path in (a, b):
        (path / "samples").mkdir()
        Image.new("L", (2, 2), ord(path.name)).save(path / "samples/a-nfe4.png")
    merge([a, b], tmp_path / "c")
    assert "**1.50 ± 0.14**" in (tmp_path / "c/table.md").read_text()
    assert sorted(p.name for p in (tmp_path / "c/samples").iterdir()) == ["a-nfe4-b.png", "a-nfe4.png"]


def test_the_shipped_results_merged_with_a_part_of_them_are_the_same_table(tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(SHIPPED, part)
    lines = (SHIPPED / "table.csv").read_text().splitlines()
    (part / "table.csv").write_text("\n".join(lines[:9]) + "\n")
    result = run("merge", part, SHIPPED, "--out", tmp_path / "whole")
    assert result.exit_code == 0, result.output
    assert "31 measured rows of 31" in result.output
    assert read_rows(tmp_path / "whole") == read_rows(SHIPPED)
    assert (
        "Floor at 5000 samples, test data against the reference: 0.157 ± 0.033."
        in (tmp_path / "whole/table.md").read_text()
    )
    made = json.loads((tmp_path / "whole/provenance.json").read_text())
    assert [Path(one["folder"]).name for one in made["merged"]] == ["part", "mnist"]
    assert made["merged"][1]["suite"]["name"] == "mnist-full"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": 1.1}, "a at 4 is in .*a and in .*b with another value: 1.0 and 1.1"),
        ({"code": "c1"}, "with another code: c0 and c1"),
        ({"label": "b", "num_samples": 200}, "must agree in num_samples, got 100 and 200"),
        ({"label": "b", "metric": "fd"}, "must agree in metric"),
        ({"seed": 1, "plan_hash": "x"}, "a at 4: its rows are not seeds of one cell"),
    ],
)
def test_contradictions_are_refused_and_nothing_is_written(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    a, b = folder(tmp_path / "a", [row("a", 4, 1.0)]), folder(tmp_path / "b", [{**row("a", 4, 1.0), **change}])
    with pytest.raises(ValueError, match=message):
        merge([a, b], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_cell_of_two_contents_is_refused(tmp_path: Path) -> None:
    a, b = (folder(tmp_path / name, [row("a", 4, 1.0)]) for name in ("a", "b"))
    cell(a, "k", value=1.0, hashes={"x": "1"}, measured_at="now")
    cell(b, "k", value=1.0 + 1e-9, hashes={"x": "1"}, measured_at="later")  # rounding in another order
    merge([a, b], tmp_path / "fine")
    cell(b, "k", value=1.001, hashes={"x": "1"})
    with pytest.raises(ValueError, match=r"k.json are one cell, but value differs: 1.0 and 1.001"):
        merge([a, b], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_merge_takes_two_folders_and_a_new_one(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", [row("a", 4, 1.0)])
    assert "at least two folders, got 1" in said(run("merge", a, "--out", tmp_path / "c"))
    assert "is not empty; merge writes a new folder" in said(run("merge", a, a, "--out", a))
    assert "there is no results folder" in said(run("merge", a, tmp_path / "b", "--out", tmp_path / "c"))
    (tmp_path / "d").mkdir()
    (tmp_path / "d/table.csv").write_text("x")
    assert "is not the table of a run" in said(run("merge", a, tmp_path / "d", "--out", tmp_path / "c"))
