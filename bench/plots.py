"""Pictures: the frontier of distance against network calls, and the samples of a cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.features import quantise

Row = dict[str, Any]
# Okabe & Ito 2008: told apart by colour-blind readers; with a marker each also in grey print
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
_MARKERS = "osD^vP*X"
_STUDENT = {"linestyle": (0, (4, 2)), "markersize": 8, "markerfacecolor": "white", "markeredgewidth": 1.6, "zorder": 4}
_COLUMNS = 10
_ENLARGE = 2


def save_frontier(rows: Sequence[Row], floor: float, title: str, path: Path) -> None:
    """Distance against network calls on logarithmic axes, one line a sampler, with 95 % intervals.

    Students are dashed lines between large open markers; a cross is a number of calls that one was not trained for.

    Args:
        rows: of a run; failed ones are left out.
        floor: distance of real test data; drawn where it is positive.
        title: above the plot.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    done = [row for row in rows if row["status"] == "done"]
    figure, axes = plt.subplots(figsize=(7.0, 4.6), dpi=200)
    for k, label in enumerate(dict.fromkeys(row["label"] for row in done if row["role"] == "sampler")):
        mine = sorted((r for r in done if r["label"] == label and r["role"] == "sampler"), key=lambda r: r["nfe"])
        x, y = ([row[name] for row in mine] for name in ("nfe", "value"))
        reach = [[row["value"] - row["low"] for row in mine], [row["high"] - row["value"] for row in mine]]
        style: dict[str, Any] = {
            "color": _COLOURS[k % len(_COLOURS)],
            "marker": _MARKERS[k % len(_MARKERS)],
            "markersize": 5,
        }
        if "trained" in mine[0]:
            style |= _STUDENT
        axes.errorbar(x, y, yerr=reach, label=label, capsize=2.5, linewidth=1.4, elinewidth=1.0, **style)
        untrained = [(row["nfe"], row["value"]) for row in mine if row.get("trained") is False]
        if untrained:
            axes.plot(*zip(*untrained, strict=True), "x", color="black", markersize=6, markeredgewidth=1.2, zorder=5)
    for row in done:
        if row["role"] == "teacher":
            axes.axhline(
                row["value"],
                color="0.35",
                linestyle="--",
                linewidth=1.0,
                label=f"model ({row['label']}, {row['nfe']} calls)",
            )
    if floor > 0:
        axes.axhline(floor, color="0.6", linestyle=":", linewidth=1.2, label="real test set")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="network calls per sample (NFE)",
        ylabel=done[0]["metric"] if done else "",
        title=title,
    )
    ticks = sorted({row["budget"] for row in rows if row["role"] == "sampler"})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    axes.grid(True, which="minor", color="0.95", linewidth=0.4)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=3.5)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def save_samples(samples: Tensor, path: Path, images: bool) -> None:
    """A picture of samples: a grid of images, ten a row, or a scatter of the first two coordinates.

    Args:
        samples: (N, C, H, W) in [-1, 1], or (N, D).
        path: of the PNG.
        images: which of the two.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if images:
        Image.fromarray(_tiled(quantise(samples))).save(path)
    else:
        _save_scatter(samples.flatten(1), path)


def _tiled(images: Tensor) -> np.ndarray:
    """(N, C, H, W) uint8 as one picture (rows H, columns W[, 3])."""
    count, channels, height, width = images.shape
    rows = -(-count // _COLUMNS)
    padded = torch.zeros(rows * _COLUMNS, channels, height, width, dtype=torch.uint8)
    padded[:count] = images
    picture = padded.view(rows, _COLUMNS, channels, height, width).permute(0, 3, 1, 4, 2)
    picture = picture.reshape(rows * height, _COLUMNS * width, channels)
    picture = picture.repeat_interleave(_ENLARGE, 0).repeat_interleave(_ENLARGE, 1)
    return picture.squeeze(-1).numpy() if channels == 1 else picture.numpy()


def _save_scatter(points: Tensor, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(3.2, 3.2), dpi=150)
    axes.scatter(points[:, 0], points[:, min(1, points.shape[1] - 1)], s=6, color=_COLOURS[0], linewidths=0)
    axes.set_aspect("equal")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
