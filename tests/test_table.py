"""Tables and plots of rows: marks, notes, costs, further metrics, LaTeX, and a table.csv read back as it was."""

from __future__ import annotations

import csv
import io
import itertools
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from test_ranking import row

from bench.floor import HALVES, TEST, Floor
from bench.latex import escaped, latex
from bench.plots import line_style, save_frontier
from bench.report import write_tables
from bench.results import read_rows
from bench.table import frame, markdown, notes, terminal, value_text

SHIPPED = Path(__file__).parent.parent / "results/mnist"
TEACHER = {**row("ddim", 50, 1.0), "role": "teacher"}
ROWS = [
    row("a", 4, 2.0),
    row("b", 4, 2.2),
    row("c", 4, 9.0),
    row("a", 8, 0.5),
    row("b", 8, 1.5),
    row("c", 8, 9.5),
    TEACHER,
]
FLOORS = (Floor(TEST, 100, 0.3, 0.2, 0.4, 0.05), Floor(HALVES, 50, 0.6, 0.5, 0.7, 0.05))
KD = {"value": 0.25, "low": 0.2, "high": 0.3, "standard_error": 0.025}


def cells(text: str, label: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} "))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_markdown_marks_the_best_its_ties_and_what_is_better_than_the_model() -> None:
    text = markdown(ROWS, FLOORS, "title")
    assert cells(text, "sampler") == ["NFE 4", "NFE 8", "model itself"]
    assert cells(text, "a") == ["**2.00 ± 0.20**", "**0.50 ± 0.20‡**", "1.00 ± 0.20"]
    assert cells(text, "b") == ["= 2.20 ± 0.20", "1.50 ± 0.20", "1.00 ± 0.20"]
    assert cells(text, "c") == ["9.00 ± 0.20", "9.50 ± 0.20", "1.00 ± 0.20"]
    for line in (
        "- Bold: the best of a column; =: its 95 % interval overlaps the best one's, a tie.",
        "- The model itself (ddim, 50 calls): 1.00 ± 0.20.",
        "- Floor at 100 samples, test data against the reference: 0.30 ± 0.10.",
        "- Floor at 50 samples, reference data against as much other reference data: 0.60 ± 0.10.",
        "- ‡ Below the model's own value: between such rows the model, not the sampler, is ranked.",
    ):
        assert line in text.splitlines()


def test_a_table_without_ties_or_marks_does_not_explain_them() -> None:
    text = markdown([row("a", 4, 2.0), row("b", 4, 5.0)], (), "t")
    assert [part for part in ("‡", "§", "†", "a tie", "Floor", "odel itself") if part in text] == []


def test_a_row_that_was_tuned_on_its_judge_says_so() -> None:
    text = markdown([row("a", 4, 2.0, tuned="tuned on the metric that judges it"), row("b", 4, 5.0)], (), "t")
    assert "| a§ | **2.00 ± 0.20** |" in text
    assert "- § a: tuned on the metric that judges it." in text


def test_seeds_are_averaged_in_the_table_and_apart_in_the_csv() -> None:
    rows = [row("a", 4, v, seed=i) for i, v in enumerate((1.0, 2.0))]
    rows.append({**row("b", 4, 0.0, seed=0), "status": "failed", "reason": "NaN"})
    text = markdown(rows, (), "t")
    assert cells(text, "a")[0] == "**1.50 ± 0.14**"
    assert "mean of 2 seeds" in text
    assert "- Failed: b at 4 with seed 0: NaN" in text
    assert list(frame(rows)["value"][:2]) == [1.0, 2.0]


def test_a_cell_of_another_shard_is_told_of() -> None:
    missing = {**row("b", 4, 0.0), "status": "missing", "reason": "left to another shard"}
    text = markdown([row("a", 4, 1.0), missing], (), "t")
    assert cells(text, "b") == ["-"]
    assert "- Not measured: b at 4; left to another shard." in text


def test_shared_calls_and_ruled_out_budgets_are_noted_once() -> None:
    few = [
        {**row("b", n, 0.0), "status": "absent", "reason": f"needs more than nfe={n} network calls"}
        for n in (4, 10, 20)
    ]
    text = markdown([row("a", 4, 1.0, shared_first_call=True), *few], (), "t")
    assert "- Not measured: b at 4, 10, 20; needs more than nfe=20 network calls." in text
    assert text.count("Cells shared the answer to their first call") == 1
    assert "shared the answer" not in markdown([row("a", 4, 1.0)], (), "t")


def test_costs_have_the_columns_that_rows_have() -> None:
    plain = markdown(ROWS, (), "t")
    assert "| sampler | budget | calls | images/s | ms/image | peak memory (MB) |" in plain
    assert "| a | 4 | 4 | 50 | 20 | 300 |" in plain
    more = {"evaluations": 8, "guided_evaluations": 8, "sequential_calls": 2, "energy_joules": 12345.0}
    rich = markdown([row("a", 4, 1.0, **more), row("b", 4, 2.0)], (), "t")
    assert "| sequential depth | evaluations | evaluations under guidance |" in rich
    assert "| energy (J) |" in rich
    assert "| a | 4 | 4 | 2 | 8 | 8 | 50 | 20 | 300 | 12345 |" in rich
    table = frame([row("a", 4, 1.0, **more), row("b", 4, 2.0)])
    assert table["ms_per_image"].tolist() == [20.0, 20.0]
    assert table["sequential_calls"].dtype == "Int64"


def test_costs_under_other_conditions_are_told_of() -> None:
    """Rows of a batch of 2000 and of 10 stood side by side without a word."""
    alike = [row("a", n, 2.0, batch_size=2000, device_name="gpu") for n in (4, 8)]
    assert "Not measured alike" not in markdown(alike, (), "t")
    other = row("b", 4, 5.0, batch_size=10, threads=4, compile="graph", device_name="gpu")
    assert (
        "- Not measured alike, so that times and memory do not compare: threads 1, but 4 of b at 4; batch size 2000, but 10 of b "
        "at 4; compiled no, but graph of b at 4."
    ) in markdown([*alike, other], (), "t").split("## Cost")[1].splitlines()
    seeds = [*alike, row("a", 4, 2.0, seed=1, overlapped=True, batch_size=2000)]
    assert "overlapped no, but yes of a at 4." in markdown(seeds, (), "t")


def test_a_further_metric_is_four_columns_and_a_table() -> None:
    unknown = {"value": 0.5, "low": None, "high": None, "standard_error": None}
    rows = [row("a", 4, 2.0, metrics={"kd": KD}), row("b", 4, 5.0, metrics={"kd": unknown}), row("c", 4, 1.0)]
    table = frame(rows)
    assert table.loc[0, ["kd", "kd_low", "kd_high", "kd_standard_error"]].tolist() == [0.25, 0.2, 0.3, 0.025]
    assert table.loc[1, ["kd_low", "kd_high"]].isna().all()
    part = markdown(rows, (), "t").split("## kd\n")[1]
    assert "| a | 0.250 ± 0.050 |" in part  # which nothing tells from b
    assert "- A column has no best where a cell is left to others, or a value or its interval is not known." in part
    assert "| b | 0.5 |" in part
    assert "Smaller is better" in part
    assert "| c |" not in part.split("##")[0]


def test_a_column_with_a_cell_of_another_shard_has_no_best() -> None:
    left = {**row("b", 4, 5.0), "status": "missing", "reason": "left to another shard"}
    part = markdown([row("a", 4, 2.0), left, row("a", 8, 1.0), row("b", 8, 3.0)], (), "t")
    assert "| a | 2.00 ± 0.20 | **1.00 ± 0.20** |" in part
    assert "A column has no best where a cell is left to others" in part
    assert "Not measured: b at 4; left to another shard." in part


def test_an_infinite_figure_leaves_the_column_without_a_best() -> None:
    none = {"value": None, "low": None, "high": None, "standard_error": None, "reason": "it is inf"}
    rows = [row("a", 4, 2.0, metrics={"psnr": none}), row("b", 4, 5.0, metrics={"psnr": KD})]
    part = markdown(rows, (), "t").split("## psnr\n")[1]
    assert "| a | - |" in part
    assert "| b | 0.250 ± 0.050 |" in part
    assert "psnr not known of a at 4: it is inf." in markdown(rows, (), "t")


def test_a_mean_of_fewer_seeds_says_so_and_is_not_the_best() -> None:
    failed = {**row("b", 4, 0.0), "status": "failed", "reason": "NaN"}
    rows = [row("a", 4, 2.0, seed=k) for k in range(3)]
    rows += [row("b", 4, 1.0, seed=0), {**failed, "seed": 1}, {**failed, "seed": 2}]
    part = markdown(rows, (), "t")
    assert re.search(r"\| a \| \*\*2\.00 ± 0\.\d+\*\* \|", part)
    assert "| b | 1.00 ± 0.20 (1 of 3 seeds) |" in part
    assert "mean of 3 seeds" in part
    assert "(1 of 3 seeds)" in latex(rows, (), "t")


def test_the_terminal_marks_the_same_cells() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(terminal(ROWS, FLOORS, "title"))
    text = console.export_text()
    assert "*2.00 ± 0.20" in text
    assert "=2.20 ± 0.20" in text
    assert "*: the best of a column; =: its 95 % interval" in " ".join(text.split())


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.05, 0.0, 0.148, "0.050 ± 0.098"),
        (1.0, None, None, "1"),
        (0.0, 0.0, 0.0, "0.000"),
        (123.4, 100.0, 146.8, "123 ± 23"),
    ],
)
def test_half_an_interval_is_its_longer_side(value: float, low: Any, high: Any, text: str) -> None:
    assert value_text(row("a", 4, value, low=low, high=high)) == text


# read back -----------------------------------------------------------------------------------------------------------


def test_the_shipped_table_is_read_and_written_without_loss(tmp_path: Path) -> None:
    rows = read_rows(SHIPPED)
    (tmp_path / "table.csv").write_text(frame(rows).to_csv(index=False))
    paths = tmp_path / "table.csv", SHIPPED / "table.csv"
    again, before = (list(csv.DictReader(path.read_text().splitlines())) for path in paths)
    assert [{name: line[name] for name in before[0]} for line in again] == before
    assert read_rows(tmp_path) == rows


def test_types_and_nested_parts_come_back(tmp_path: Path) -> None:
    rows = [
        row(
            "a",
            4,
            2.0,
            options={"eta": 0.5, "variable": "t"},
            model_hash="0012",
            inputs={"guidance": 3.0},
            metrics={"kd": KD},
        ),
        row("b", 4, 3.0, further=["kd"], trained=True, train_images=10),
        {**{k: v for k, v in row("c", 4, 1.0).items() if k not in ("value", "low", "high", "nfe")}, "status": "failed"},
    ]
    (tmp_path / "table.csv").write_text(frame(rows).to_csv(index=False))
    assert read_rows(tmp_path) == rows


def test_a_run_without_a_table_is_read_from_its_cells(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells/k.json").write_text((next(iter(sorted((SHIPPED / "cells").glob("*.json"))))).read_text())
    (found,) = read_rows(tmp_path)
    assert (found["role"], found["label"], found["status"]) == ("sampler", "heun", "done")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("a,b\n1,2\n", "no column 'role'"),
        ("role,label,budget,status,metric,options\nsampler,a,4,done,fd,__import__('os')\n", "line 2: malformed node"),
        ("role,label,budget,status,metric,options\nsampler,a,4,done,fd,[1]\n", "line 2: options must be a dict"),
        (
            "role,label,budget,status,metric,value\nsampler,a,4,done,fd,nan\n",
            "line 2: a row that is done must have a finite",
        ),
        ("role,label,budget,status,metric,value\nsampler,a,4\n", "line 2: more or fewer fields"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_rows(tmp_path)


# LaTeX ---------------------------------------------------------------------------------------------------------------


def structure(text: str) -> tuple[list[str], list[int]]:
    """The environments in their order, and the columns of each line of the tabular."""
    body = text.split("\\midrule\n")[1].split("\\bottomrule")[0]
    return re.findall(r"\\(begin|end)\{(\w+)\}", text), [
        len(re.findall(r"(?<!\\)&", line)) for line in body.splitlines()
    ]


def test_latex_has_bold_underlined_subscripts_and_sound_structure() -> None:
    text = latex([*ROWS, row("d_1 & co", 4, 20.0)], FLOORS, "50 % of #1", "a note_with $ signs")
    assert text.startswith("% needs \\usepackage{booktabs}\n")
    assert (
        "a & $\\mathbf{2.00}_{\\pm 0.20}$ & $\\mathbf{0.50}_{\\pm 0.20}^{\\ddagger}$ & $1.00_{\\pm 0.20}$ \\\\" in text
    )
    assert "b & $\\underline{2.20}_{\\pm 0.20}$ & $1.50_{\\pm 0.20}$ & $1.00_{\\pm 0.20}$ \\\\" in text
    assert "d\\_1 \\& co & $20.00_{\\pm 0.20}$ &  & $1.00_{\\pm 0.20}$ \\\\" in text
    assert "\\caption{50 \\% of \\#1}" in text
    assert "A note\\_with \\$ signs." in text
    environments, columns = structure(text)
    assert columns == [3] * 4
    assert [name for _, name in environments] == ["table", "tabular", "tabular", "minipage", "minipage", "table"]
    unescaped = re.sub(r"\\[\\{}$&#_%]", "", text)
    assert unescaped.count("{") == unescaped.count("}")
    assert unescaped.count("$") % 2 == 0
    assert text.isascii()


def test_everything_that_latex_would_read_is_escaped() -> None:
    assert escaped("a\\b{c}$~^<|>\n#_%&") == (
        "a\\textbackslash{}b\\{c\\}\\$\\textasciitilde{}\\textasciicircum{}\\textless{}\\textbar{}\\textgreater{} \\#\\_\\%\\&"
    )


# plots ---------------------------------------------------------------------------------------------------------------


def test_both_pictures_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tables(ROWS, FLOORS, "title", "", tmp_path / name)
    for file in ("frontier.png", "frontier.svg", "table.tex", "table.csv", "table.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    svg = (tmp_path / "a/frontier.svg").read_text()
    assert "<svg" in svg
    assert "date" not in svg
    with Image.open(tmp_path / "a/frontier.png") as picture:
        assert picture.size[0] > 1000


def test_no_two_lines_look_alike() -> None:
    styles = [line_style(k) for k in range(256)]
    assert all(a != b for a, b in itertools.combinations(styles, 2))
    seen = {(style["color"], style["marker"]) for style in styles[:64]}
    assert len(seen) == 64  # in a small picture the dashes of a line may not show


@pytest.mark.slow
def test_many_rows_make_the_picture_taller_not_the_legend_cut(tmp_path: Path) -> None:
    save_frontier([row(f"s{k}", 4, 1.0 + k) for k in range(40)], (), "t", tmp_path / "many.png")
    save_frontier([row("s", 4, 1.0)], (), "t", tmp_path / "one.png")
    with Image.open(tmp_path / "many.png") as many, Image.open(tmp_path / "one.png") as one:
        assert many.size[1] > 1.7 * one.size[1]


@pytest.mark.parametrize("low", [3.5e-6, 0.0])
def test_an_interval_that_ends_near_zero_does_not_stretch_the_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low: float
) -> None:
    """One end of 3.5e-6 pressed every point into the upper half."""
    ends: list[tuple[float, float]] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: ends.append(figure.axes[0].get_ylim()))
    rows = [row("a", 4, 9.0), row("a", 8, 0.6), {**row("b", 8, 0.3), "low": low}]
    save_frontier(rows, (), "t", tmp_path / "f.png")
    save_frontier(rows, (Floor(TEST, 100, 0.01, 0.0, 0.02, 0.005),), "t", tmp_path / "f.png")
    (bottom, top), (under, _) = ends
    assert 0.05 < bottom < 0.3 < 9.0 < top
    assert under < 0.01  # the floor stays in sight


def test_notes_tell_the_calls_that_were_really_made() -> None:
    assert any("heun 4 of 5" in line for line in notes([row("heun", 5, 1.0, nfe=4)], ()))


def test_the_csv_of_a_run_is_one_line_a_cell(tmp_path: Path) -> None:
    write_tables(ROWS, (), "title", "", tmp_path)
    assert len(pd.read_csv(tmp_path / "table.csv")) == len(ROWS)
