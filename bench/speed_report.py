"""Write what `fewstep speed` measured: table.csv, table.md, end_to_end.csv, speed.png, provenance.json.

The plot is of the methods that diffusers has.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench.provenance import machine
from bench.speed import STEPS, EndToEnd, Row, as_dict
from bench.store import write_text

_COLOURS = ("#0072B2", "#D55E00", "#009E73")


def write_speed(rows: Sequence[Row], whole: Sequence[EndToEnd], out: Path, device: str) -> str:
    """Write the files into `out`; returns the summary that the terminal shows."""
    summary = "\n".join([summarise(rows), *(_whole(row) for row in whole)])
    columns = [
        "sampler",
        "shape",
        "ours",
        "ours_spread",
        "theirs",
        "theirs_spread",
        "ratio",
        "seeded",
        "seeded_ratio",
        "floor",
        "over_floor",
        "registers",
    ]
    frame = pd.DataFrame([as_dict(row) for row in rows])
    title = f"# Cost of a sampler's own arithmetic, {machine(device)['device']}\n\n"
    notes = (
        f"Microseconds for each network call of a {STEPS}-step run on a null network, float32, medians with half the "
        "interquartile range. `theirs`: diffusers' scheduler of the same method, empty where it has none. `floor`: the bytes our "
        "plan must move over the bandwidth of a copy that cycles over as many buffers as the plan does. Every registered sampler "
        "that is deterministic with one call a step is held against it. Stochastic methods draw from torch's generator on both "
        "sides; `seeded` is ours with the default, the noise of a seed that each sample has for itself whatever its batch "
        "(`samplers.noise`), and `seeded_ratio` is theirs over that.\n\n"
    )
    write_text(out / "table.csv", frame.to_csv(index=False))
    write_text(out / "table.md", title + summary + "\n\n" + notes + _markdown(frame[columns]))
    if whole:
        ends = pd.DataFrame([as_dict(row) for row in whole])
        write_text(out / "end_to_end.csv", ends.to_csv(index=False))
    write_text(out / "provenance.json", json.dumps({"steps": STEPS, **machine(device)}, indent=1) + "\n")
    compared = [row for row in rows if row.scheduler]
    if compared:
        _plot(compared, out / "speed.png")
    return summary


def _whole(row: EndToEnd) -> str:
    how = f" as one {row.compile}" if row.compile else ""
    return f"- U-Net through {row.sampler}, batch {row.batch}{how}: {row.efficiency:.3f} of the bare network's images/s"


def summarise(rows: Sequence[Row]) -> str:
    """The figures that matter for each shape: geometric mean and least ratio to diffusers, and the worst over the floor."""
    lines = []
    for shape in dict.fromkeys(row.shape for row in rows):
        mine = [row for row in rows if row.shape == shape]
        parts = [_against_diffusers([row for row in mine if row.scheduler])]
        single = [row for row in mine if row.one_call]
        if single:
            worst = max(single, key=lambda row: row.over_floor)
            parts.append(
                f"over the memory floor, {len(single)} one-call methods: at most {worst.over_floor:.2f} ({worst.sampler})"
            )
        lines.append(f"- {shape}: " + "\n  ".join(filter(None, parts)))
    return "\n".join(lines)


def _against_diffusers(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    mean, least = statistics.geometric_mean(row.ratio for row in rows), min(rows, key=lambda row: row.ratio)
    line = f"diffusers / ours {mean:.1f} (mean of {len(rows)}), least {least.ratio:.2f} ({least.sampler})"
    unipc = [row.ratio for row in rows if row.sampler.startswith("unipc")]
    line += f", UniPC {min(unipc):.1f}" if unipc else ""
    own = [(row.seeded_ratio, row.sampler) for row in rows if not math.isnan(row.seeded_ratio)]
    if own:
        line += f"\n  with each sample's own noise, {len(own)} stochastic methods: "
        line += f"{statistics.geometric_mean(ratio for ratio, _ in own):.1f}, least {min(own)[0]:.2f} ({min(own)[1]})"
    return line


def _markdown(frame: pd.DataFrame) -> str:
    head = "| " + " | ".join(frame.columns) + " |\n|" + "---|" * len(frame.columns) + "\n"
    cells = (
        " | ".join("" if pd.isna(v) else f"{v:.2f}" if isinstance(v, float) else str(v) for v in row)
        for row in frame.itertuples(index=False)
    )
    return head + "".join(f"| {row} |\n" for row in cells)


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Ratio to diffusers for each method, one mark a shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import StrMethodFormatter

    names = list(dict.fromkeys(row.sampler for row in rows))
    figure, axes = plt.subplots(figsize=(7.0, 0.27 * len(names) + 1.4), dpi=200)
    for k, shape in enumerate(dict.fromkeys(row.shape for row in rows)):
        mine: dict[str, Any] = {row.sampler: row.ratio for row in rows if row.shape == shape}
        axes.plot(
            [mine[name] for name in names if name in mine],
            [i for i, name in enumerate(names) if name in mine],
            "osD^v"[k % 5],
            color=_COLOURS[k % len(_COLOURS)],
            label=shape,
            markersize=5,
        )
    axes.axvline(1.0, color="0.4", linewidth=1.0)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("time of diffusers' scheduler / ours, for each network call")
    axes.grid(True, axis="x", which="both", color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(title="state", fontsize=8, title_fontsize=8, frameon=False, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
