"""Which rows were tuned on what judges them: the recommended grids were chosen by measurement, see results/grids."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from bench.suite import SamplerSpec
from samplers import make_plan, schedules
from samplers.registry import SAMPLERS

Row = dict[str, Any]
_BY = ("rmse", "psnr", "feature_error")  # forms of one error, from the many-step solution of the same noise
_DISTANCES = ("frechet", "fd_mnist_cnn", "fd_infinity")  # of the models that the sweep had
# these stay on the grids they were published on
_PUBLISHED = ("ddpm", "euler-ancestral", "dpm2-ancestral", "seeds", "restart", "consistency")
_MIXTURE, _DIGITS = "mixtures like this one", "this model, for the sampler or a relative of it"


def tuning_of(spec: SamplerSpec, model: str) -> Row:
    """The columns `tuned`, what a row was tuned on, and `tuned_metrics`, which of the metrics that concerns; none where nothing.

    What the suite says of a row holds for every metric. Without that, a row on its sampler's recommended grid, named or not, is
    one of those that `bench.grid_sweep` chose on the mixtures `gmm` and on the shipped model `mnist`: by the error, or of a
    sampler that uses noise by the distance.

    Args:
        spec: of the row.
        model: its name in the zoo.
    """
    if spec.tuned:
        return {"tuned": spec.tuned}
    where = _DIGITS if model == "mnist" else _MIXTURE if model == "gmm" or model.startswith("gmm-") else ""
    if not where or not _swept(spec.sampler) or spec.grid not in (None, SAMPLERS[spec.sampler].grid):
        return {}
    by, metrics = ("the distance", _DISTANCES) if uses_noise(spec.sampler) else ("rmse", _BY)
    return {"tuned": f"its recommended grid was chosen by {by} on {where}", "tuned_metrics": list(metrics)}


@lru_cache
def uses_noise(sampler: str) -> bool:
    """Whether the plan of a registered sampler uses noise by default.

    Raises:
        ValueError: an error-controlled sampler, which has no plan.
    """
    return make_plan(sampler, schedules.vp_linear(), steps=20).stochastic


def _swept(sampler: str) -> bool:
    """Whether the sweep chose its grid."""
    known = SAMPLERS.get(sampler)
    return known is not None and not known.adaptive and sampler not in _PUBLISHED
