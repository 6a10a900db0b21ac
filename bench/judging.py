"""The figures of a cell: which there are, what each needs to know of every sample, and how it is computed from that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bench.columns import COLUMNS, PARTS
from bench.intervals import Distance
from bench.metrics import GAUSSIAN_KL, frechet_infinity, gaussian_kl_interval
from bench.sample_metrics import inception_score, kid, manifold_metrics, sliced_wasserstein
from bench.solver_error import feature_error, psnr, rmse
from samplers.errors import unknown
from samplers.plugins import with_plugins

Arrays = Mapping[str, Any]  # name: array-like (N, ...), see `Metric.needs`
Figures = Distance | Mapping[str, Distance]
ENTRY_POINTS = "fewstep.metrics"
MANIFOLD = ("precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Metric:
    """A figure of the samples of a cell.

    Attributes:
        name: as a suite names it, and the column of the table.
        compute: `(arrays, judge) -> Distance`, or several by the names in `columns`; `arrays` has what the metric needs
            and `judge` is the model's `bench.judge.Judge`. NaN stands for an end or an error that is not known.
        needs: arrays with a row for each sample: "features" (N, d); "probabilities" (N, classes), of the judge's classifier;
            "square_error" (N,), of the sample against the many-step solution from the same noise, a mean over its numbers;
            "feature_error" (N,), the Euclidean distance between the features of the two.
        higher_is_better: of its value, or its values.
        columns: of the table, one for each figure, where `compute` gives several; () is `name`.

    Raises:
        ValueError: a column that every table has already, or that reads as a part of a figure.
    """

    name: str
    compute: Callable[[Arrays, Any], Figures]
    needs: frozenset[str] = frozenset({"features"})
    higher_is_better: bool = False
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns) or (self.name,))
        for column in self.columns:
            if column in COLUMNS or column.endswith(PARTS):
                raise ValueError(f"metric {self.name!r} cannot have the column {column!r}, which means something else")

    def figures(self, arrays: Arrays, judge: Any) -> dict[str, Distance]:
        """The figures of a cell by the names of their columns.

        Raises:
            ValueError: other figures than `columns` says.
        """
        found = self.compute(arrays, judge)
        figures = {self.name: found} if isinstance(found, Distance) else dict(found)
        if set(figures) != set(self.columns):
            raise ValueError(f"metric {self.name!r} has the columns {self.columns}, but gave {tuple(figures)}")
        return figures

    @property
    def follows_the_path(self) -> bool:
        """Whether samples are compared with the many-step solution, which a stochastic sampler does not follow."""
        return bool(self.needs & {"square_error", "feature_error"})


@lru_cache(maxsize=1)
def metrics() -> dict[str, Metric]:
    """All metrics by name: those of fewstep, and those that installed packages add as entry points "fewstep.metrics"."""
    known = with_plugins(ENTRY_POINTS, Metric, {metric.name: metric for metric in _own()})
    given: dict[str, str] = {}
    for metric in known.values():
        for column in metric.columns:
            if given.setdefault(column, metric.name) != metric.name:
                raise ValueError(f"metrics {given[column]!r} and {metric.name!r} both have the column {column!r}")
    return known


def get_metric(name: str) -> Metric:
    """A metric by name.

    Raises:
        ValueError: an unknown name; lists the closest.
    """
    if name not in metrics():
        raise unknown("metric", name, metrics())
    return metrics()[name]


def _of_features(figure: Callable[..., Figures]) -> Callable[[Arrays, Any], Figures]:
    """A figure of features alone, against those of reference samples."""

    def compute(arrays: Arrays, judge: Any) -> Figures:
        if judge.samples is None:
            raise ValueError(f"a metric compares with reference samples, of which the judge {judge.metric} has none")
        return figure(arrays["features"], judge.samples())

    return compute


def _infinity(arrays: Arrays, judge: Any) -> Distance:
    """With as many halvings as the samples allow, three at most."""
    features = arrays["features"]
    enough = len(features) > features.shape[1] << 3
    return frechet_infinity(features, judge.reference, halvings=3 if enough else 2)


def _own() -> tuple[Metric, ...]:
    square, feature = frozenset({"square_error"}), frozenset({"feature_error"})
    return (
        Metric("fd_infinity", _infinity),
        Metric("kid", _of_features(kid)),
        Metric("manifold", _of_features(manifold_metrics), higher_is_better=True, columns=MANIFOLD),
        Metric("swd", _of_features(sliced_wasserstein)),
        Metric(
            "inception_score",
            lambda arrays, judge: inception_score(arrays["probabilities"]),
            frozenset({"probabilities"}),
            higher_is_better=True,
        ),
        Metric(GAUSSIAN_KL, lambda arrays, judge: gaussian_kl_interval(arrays["features"], judge.reference.moments)),
        Metric("rmse", lambda arrays, judge: rmse(arrays["square_error"]), square),
        Metric("psnr", lambda arrays, judge: psnr(arrays["square_error"]), square, higher_is_better=True),
        Metric("feature_error", lambda arrays, judge: feature_error(arrays["feature_error"]), feature),
    )
