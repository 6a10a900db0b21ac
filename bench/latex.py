r"""The table of distances for a paper: LaTeX with the rules of booktabs.

Text comes out as it is written in the rows: what LaTeX would read as a command is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from bench.floor import Floor
from bench.ranking import BEYOND, TUNED, UNTRAINED, Best
from bench.table import OWN, Layout, halves, layout, marks, notes, part_of_seeds

Row = dict[str, Any]
_MATHEMATICAL = {UNTRAINED: r"\dagger", BEYOND: r"\ddagger", TUNED: r"\S"}
_ESCAPED = {
    **{character: f"\\{character}" for character in "{}$&#_%"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    **{mark: f"$^{symbol}$" for mark, symbol in _MATHEMATICAL.items()},
}
_SPECIAL = re.compile("|".join(map(re.escape, _ESCAPED)))


def latex(rows: Sequence[Row], floors: Sequence[Floor], title: str, note: str = "") -> str:
    r"""A `table` of the primary metric: the best in bold, ties underlined, half intervals as subscripts, notes below.

    Needs `\usepackage{booktabs}`.

    Args:
        rows, floors, title, note: as of `bench.table.markdown`; the title is the caption.
    """
    shown = layout(rows)
    last = [OWN] if shown.own else []
    head = " & ".join(["sampler", *(f"{n}" for n in shown.budgets), *last])
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escaped(title)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(shown.budgets) + len(last))}}}",
        r"\toprule",
        rf" & \multicolumn{{{len(shown.budgets)}}}{{c}}{{network calls}}{' &' * len(last)} \\",
        rf"{head} \\",
        r"\midrule",
        *(rf"{_line(shown, label)} \\" for label in shown.labels),
        r"\bottomrule",
        r"\end{tabular}",
        r"\par\smallskip",
        r"\begin{minipage}{0.95\linewidth}\footnotesize",
        *(rf"{escaped(line)}\par" for line in notes(rows, floors, note, best="Bold", tied="underlined")),
        r"\end{minipage}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """The text with everything that LaTeX gives a meaning, on one line."""
    return _SPECIAL.sub(lambda match: _ESCAPED[match[0]], " ".join(text.split()))


def _line(shown: Layout, label: str) -> str:
    own = [_own(shown, label)] if shown.own else []
    return " & ".join([escaped(shown.name(label)), *(_cell(shown, label, n) for n in shown.budgets), *own])


def _own(shown: Layout, label: str) -> str:
    if label not in shown.own:
        return ""
    return f"${_number(*halves(shown.own[label]))}$"


def _number(value: str, half: str) -> str:
    return value + (rf"_{{\pm {half}}}" if half else "")


def _cell(shown: Layout, label: str, budget: int) -> str:
    row = shown.cells.get((label, budget))
    if row is None:
        return ""
    if row["status"] != "done":
        return "failed" if row["status"] == "failed" else "--"
    value, half = halves(row)
    number = _number(_emphasised(value, label, shown.best[budget]), half)
    beside = "".join(_MATHEMATICAL[mark] for mark in marks(row, (label, budget) in shown.beyond))
    return f"${number}{f'^{{{beside}}}' if beside else ''}${part_of_seeds(row)}"


def _emphasised(value: str, label: str, best: Best) -> str:
    if label == best.label:
        return rf"\mathbf{{{value}}}"
    return rf"\underline{{{value}}}" if label in best.tied else value
