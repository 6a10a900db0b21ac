"""Pictures: the frontier of distance against network calls, and the samples of a cell."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from bench.features import quantise
from bench.floor import Floor
from bench.ranking import TUNED, aggregated, interval, tuned_here

Row = dict[str, Any]
# Okabe & Ito 2008: told apart by colour-blind readers; with a marker each also in grey print
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
_MARKERS = "osD^vP*X"
_LINES: tuple[Any, ...] = ("solid", (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
_STUDENT = {"linestyle": (0, (4, 2)), "markersize": 8, "markerfacecolor": "white", "markeredgewidth": 1.6, "zorder": 4}
_ENTRY = 0.2  # inches of height that a line of the legend takes
_COLUMNS = 10
_ENLARGE, _SMALL = 2, 64  # how much, and up to which side in pixels
_COMPRESSION = 4  # of PNG: on samples as small as 6, for less than half of the time
_KEY = "cell"  # of a PNG's text
_FRAME, _LAST_FRAME = 120, 1500  # milliseconds
_TITLE = 52  # letters a line that the axes are wide enough for
_BELOW = 3.0  # times that the axis goes below the smallest value at most: an interval may end near 0, or there
_SCATTER, _DOT = 480, 2  # pixels: side of the picture, radius of a point


def save_frontier(rows: Sequence[Row], floors: Sequence[Floor], title: str, *paths: Path) -> None:
    """Distance against network calls on logarithmic axes, one line a sampler, with 95 % intervals; seeds are averaged.

    Students are dashed lines between large open markers; a cross is a number of calls that one was not trained for. The same
    rows give the same bytes. A row under guidance stands at the evaluations of its network, which are more than its budget.

    Args:
        rows: of a run; failed ones are left out.
        floors: of the distance; the first is drawn where it is positive.
        title: above the plot.
        paths: of the files, each of which has its suffix's format, such as .png or .svg.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    done = [row for row in aggregated(rows) if row["status"] == "done"]
    labels = list(dict.fromkeys(row["label"] for row in done if row["role"] == "sampler"))
    # an SVG's names are random without a salt
    with matplotlib.rc_context({"svg.hashsalt": "fewstep"}):
        figure, axes = plt.subplots(figsize=(7.0, max(4.6, 1.4 + _ENTRY * (len(labels) + 2))), dpi=200)
        for k, label in enumerate(labels):
            _draw_line(axes, [row for row in done if row["label"] == label and row["role"] == "sampler"], k)
        _draw_levels(axes, done, floors)
        axes.set_yscale("log")
        _cut_below(axes, [*(row["value"] for row in done), *(floor.value for floor in floors[:1])])
        mine = [row for row in rows if row["role"] == "sampler"]
        _finish(
            axes, done, sorted({row["budget"] for row in mine} | {_asked(row) for row in mine if _guided(row)}), title
        )
        figure.tight_layout()
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def line_style(k: int) -> dict[str, Any]:
    """Colour, marker and stroke of the k-th line; the first 256 differ, and any eight in a row in colour and marker."""
    block = k // len(_COLOURS)
    return {
        "color": _COLOURS[k % len(_COLOURS)],
        "marker": _MARKERS[(k + block) % len(_MARKERS)],
        "linestyle": _LINES[(block + block // len(_MARKERS)) % len(_LINES)],
        "markersize": 5,
    }


def _draw_line(axes: Any, rows: Sequence[Row], k: int) -> None:
    mine = sorted(rows, key=_asked)
    ends = [interval(row) for row in mine]
    x, y = [_asked(row) for row in mine], [row["value"] for row in mine]
    reach = [
        [value - low for value, (low, _) in zip(y, ends, strict=True)],
        [high - value for value, (_, high) in zip(y, ends, strict=True)],
    ]
    style = line_style(k)
    if "trained" in mine[0]:
        style |= _STUDENT
    name = mine[0]["label"] + (TUNED if any(map(tuned_here, mine)) else "")
    axes.errorbar(x, y, yerr=reach, label=name, capsize=2.5, linewidth=1.4, elinewidth=1.0, **style)
    untrained = [(row["nfe"], row["value"]) for row in mine if row.get("trained") is False]
    if untrained:
        axes.plot(*zip(*untrained, strict=True), "x", color="black", markersize=6, markeredgewidth=1.2, zorder=5)


def _guided(row: Row) -> bool:
    return bool(row.get("guidance")) and row["status"] == "done"


def _asked(row: Row) -> float:
    """How often the network was evaluated for a sample; beside a call in turn, guidance may make a second one."""
    return row["evaluations"] if _guided(row) else row["nfe"]


def _draw_levels(axes: Any, done: Sequence[Row], floors: Sequence[Floor]) -> None:
    own = [row for row in done if row["role"] == "teacher"]
    for row in own:
        which = f"model {row['model']}" if len(own) > 1 else "model"
        name = f"{which} ({row['label']}, {row['nfe']} calls)"
        axes.axhline(row["value"], color="0.35", linestyle="--", linewidth=1.0, label=name)
    for floor in (one for one in floors[:1] if one.value > 0):
        name = f"floor at {floor.count} samples" if floor.count else "floor"
        axes.axhline(floor.value, color="0.6", linestyle=":", linewidth=1.2, label=name)


def _cut_below(axes: Any, values: Sequence[float]) -> None:
    """Let no interval's lower end stretch the logarithmic axis; it is cut at the edge."""
    edge = min((value for value in values if value > 0), default=0.0) / _BELOW
    bottom, _ = axes.get_ylim()
    if bottom < edge:
        axes.set_ylim(bottom=edge)


def _finish(axes: Any, done: Sequence[Row], ticks: Sequence[float], title: str) -> None:
    """Axes, ticks at the budgets, grid and legend."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    axes.set(
        xscale="log",
        xlabel=f"network {'evaluations' if any(map(_guided, done)) else 'calls'} per sample (NFE)",
        ylabel=done[0]["metric"] if done else "",
    )
    axes.set_title("\n".join(textwrap.fill(line, _TITLE) for line in title.splitlines()), fontsize=10)
    axes.set_xticks(ticks, [f"{n:g}" for n in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    axes.grid(True, which="minor", color="0.95", linewidth=0.4)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=3.5)


def save_samples(samples: Tensor, path: Path, images: bool, key: str = "") -> None:
    """A picture of samples: a grid of images, ten a row, or a scatter of the first two coordinates.

    Args:
        samples: (N, C, H, W) in [-1, 1], or (N, D).
        path: of the PNG.
        images: which of the two.
        key: what `key_in` tells of the file.
    """
    _save(Image.fromarray(_tiled(quantise(samples))) if images else _scatter(samples.flatten(1)), path, key)


def save_film(states: Tensor, path: Path, key: str = "") -> None:
    """A picture of the way to samples: a row for each, with at most ten of its states from left to right, the last among them.

    Args:
        states: (N, frames, C, H, W), of size about 1.
        path: of the PNG.
        key: what `key_in` tells of the file.
    """
    frames = states.shape[1]
    chosen = torch.linspace(0, frames - 1, min(frames, _COLUMNS)).round().long()
    _save(Image.fromarray(_tiled(quantise(states[:, chosen].flatten(0, 1)), len(chosen))), path, key)


def key_in(path: Path) -> str:
    """The key with which a picture was saved; nothing where there is no picture, or none of these."""
    try:
        with Image.open(path) as picture:
            return str(picture.info.get(_KEY, ""))
    except OSError:
        return ""


def _save(picture: Image.Image, path: Path, key: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngInfo()
    text.add_text(_KEY, key)
    picture.save(path, compress_level=_COMPRESSION, pnginfo=text)


def save_animation(states: Tensor, path: Path) -> None:
    """The way to samples as a GIF that repeats: a frame for each state, with all samples in it as `save_samples` shows them.

    Args:
        states: (N, frames, C, H, W), of size about 1.
        path: of the GIF.
    """
    frames = [Image.fromarray(_tiled(quantise(states[:, k]))) for k in range(states.shape[1])]
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = [_FRAME] * (len(frames) - 1) + [_LAST_FRAME]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=shown, loop=0)


def _tiled(images: Tensor, columns: int = _COLUMNS) -> np.ndarray:
    """(N, C, H, W) uint8 as one picture (rows H, columns W[, 3]); small images are enlarged."""
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    padded = torch.zeros(rows * columns, channels, height, width, dtype=torch.uint8)
    padded[:count] = images
    picture = padded.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    picture = picture.reshape(rows * height, columns * width, channels)
    if max(height, width) <= _SMALL:
        picture = picture.repeat_interleave(_ENLARGE, 0).repeat_interleave(_ENLARGE, 1)
    return picture.squeeze(-1).numpy() if channels == 1 else picture.numpy()


def _scatter(points: Tensor) -> Image.Image:
    """Points (N, D) by their first two coordinates, on equal axes that hold nearly all of them."""
    xy = np.stack([points[:, 0].numpy(), points[:, min(1, points.shape[1] - 1)].numpy()], 1).astype(np.float64)
    middle = np.median(xy, axis=0)
    reach = 1.1 * max(float(np.quantile(np.abs(xy - middle), 0.99)), 1e-9)
    pixels = ((xy - middle) / reach * (0.5 * _SCATTER) * (1, -1) + 0.5 * _SCATTER).clip(-_SCATTER, 2 * _SCATTER)
    near = np.arange(-_DOT, _DOT + 1)
    dot = np.stack(np.nonzero(near[:, None] ** 2 + near**2 <= _DOT**2), 1) - _DOT
    x, y = (pixels.round().astype(int)[:, None] + dot).reshape(-1, 2).T
    inside = (x >= 0) & (x < _SCATTER) & (y >= 0) & (y < _SCATTER)
    marked = np.zeros((_SCATTER, _SCATTER), dtype=np.uint8)
    marked[y[inside], x[inside]] = 1
    picture = Image.fromarray(marked).convert("P")
    picture.putpalette(ImageColor.getrgb("white") + ImageColor.getrgb(_COLOURS[0]))
    return picture
