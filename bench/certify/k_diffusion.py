"""Certificates of the samplers as functions of k-diffusion: the states of its own `sample_*`, on the same sigmas and noise.

Its functions compute in the dtype of their arguments, so nothing of theirs is changed. It is not a dependency; what is compared
needs its file `sampling.py` alone, so `pip install --no-deps k-diffusion` is enough.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from bench.certify.problem import MIXTURE
from bench.certify.settings import text
from samplers.adapters.k_diffusion import K_DIFFUSION, sampler_function

Row = dict[str, Any]
COLUMNS = (
    *("function", "theirs", "sampler", "ours", "last_sigma", "steps", "difference", "threshold"),
    *("status", "k_diffusion"),
)
SIGMAS = torch.tensor([14.6, 9.0, 5.0, 2.5, 1.2, 0.6, 0.25, 0.1, 0.0], dtype=torch.float64)
THRESHOLD = 1e-11
LASTS = ("zero", "positive")  # what the last sigma is
_STATES = 3
_PACKAGE = "k_diffusion"
_UNUSED = ("torchsde", "torchvision")  # that its files import, and the functions compared do not use


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        function, options: of k-diffusion, given to both.
        last: one of `LASTS`.
    """

    function: str
    options: dict[str, Any] = field(default_factory=dict)
    last: str = "zero"

    @property
    def sigmas(self) -> Tensor:
        """(N + 1,) float64."""
        return SIGMAS if self.last == "zero" else SIGMAS[:-1]

    @property
    def on_a_path(self) -> bool:
        """Whether it takes its noise from a Brownian path, and not from torch's generator."""
        return "sde" in self.function


_CHURN = {"s_churn": 3.0, "s_tmin": 0.2, "s_tmax": 20.0, "s_noise": 1.01}
_SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in K_DIFFUSION),
    ("sample_heun", _CHURN),
    ("sample_euler_ancestral", {"eta": 0.4, "s_noise": 1.1}),
    ("sample_dpm_2_ancestral", {"eta": 0.6}),
    ("sample_dpmpp_2s_ancestral", {"eta": 0.5}),
    ("sample_dpmpp_sde", {"eta": 0.7}),
    ("sample_dpmpp_2m_sde", {"eta": 0.5, "solver_type": "heun"}),
    ("sample_dpmpp_3m_sde", {"eta": 0.5}),
)


def cases(samplers: Container[str] | None = None) -> list[Case]:
    """Every comparison; or those with some samplers, which are none where k-diffusion is not installed."""
    if samplers is not None and not is_installed():
        return []
    mine = [(n, o) for n, o in _SETTINGS if samplers is None or K_DIFFUSION[n][0] in samplers]
    return [Case(name, options, last) for name, options in mine for last in LASTS]


def is_installed() -> bool:
    """Whether k-diffusion is there."""
    return importlib.util.find_spec(_PACKAGE) is not None


def kept(path: Path) -> list[Row]:
    """The rows of an earlier run, made where k-diffusion was installed; none where there was none."""
    found = pd.read_csv(path, keep_default_na=False).to_dict("records") if path.exists() else []
    return [{str(name): value for name, value in row.items()} for row in found]


@functools.cache
def sampling() -> Any:
    """Its module `sampling`, without the rest of the package, which imports all that its training needs.

    Raises:
        ImportError: k-diffusion is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None:
        raise ImportError("k-diffusion is not installed; pip install --no-deps k-diffusion")
    package = types.ModuleType(_PACKAGE)
    package.__path__ = list(spec.submodule_search_locations or ())
    with _stand_ins(package):
        return importlib.import_module(f"{_PACKAGE}.sampling")


@contextmanager
def _stand_ins(package: types.ModuleType) -> Iterator[None]:
    """The package's folder as the package, and empty modules for what is missing and not used, while it is imported."""
    before = set(sys.modules)
    if _PACKAGE not in before:
        sys.modules[_PACKAGE] = package
    added = [_PACKAGE] if _PACKAGE not in before else []
    for name in _UNUSED:
        if importlib.util.find_spec(name) is None:
            parts = [name, f"{name}.transforms", f"{name}.transforms.functional"]
            empty = {part: types.ModuleType(part) for part in parts}
            for inner in parts[1:]:
                setattr(empty[inner.rpartition(".")[0]], inner.rpartition(".")[2], empty[inner])
            sys.modules.update(empty)
            added += parts
    try:
        yield
    finally:
        for name in (*added, *(n for n in set(sys.modules) - before if n.startswith(f"{_PACKAGE}."))):
            sys.modules.pop(name, None)


class BrownianPath:
    """A Brownian path over sigma, drawn at every level that it is asked for; its increments have deviation 1.

    Args:
        levels: all of them.
        like: a state.
    """

    def __init__(self, levels: list[float], like: Tensor) -> None:
        known = sorted(set(levels))
        generator = torch.Generator().manual_seed(5)
        self.at: dict[float, Tensor] = {}
        w, before = torch.zeros_like(like), known[0]
        for level in known:
            w = w + math.sqrt(level - before) * torch.randn(like.shape, generator=generator, dtype=like.dtype)
            self.at[level], before = w, level

    def __call__(self, start: Any, end: Any) -> Tensor:
        """The increment from one sigma down to another."""
        a, b = (min(self.at, key=lambda level: abs(level - float(value))) for value in (start, end))
        if abs(a - float(start)) > 1e-9 or abs(b - float(end)) > 1e-9:
            raise ValueError(f"the path is not drawn at {float(start):g} and {float(end):g}")
        return (self.at[a] - self.at[b]) / math.sqrt(a - b)


def path_for(sigmas: Tensor, like: Tensor) -> BrownianPath:
    """A path at the sigmas and half way between their logarithms, where two-call methods stop."""
    positive = sigmas[sigmas > 0].tolist()
    return BrownianPath([*positive, *(math.sqrt(a * b) for a, b in pairwise(positive)), 0.0], like)


def start() -> Tensor:
    """The state (3, 2) at the first sigma."""
    z = torch.randn(_STATES, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return float(SIGMAS[0]) * z


def denoiser(x: Tensor, sigma: Tensor, shift: float = 0.0) -> Tensor:
    """The exact denoiser of the mixture, in k-diffusion's form."""
    return MIXTURE.x0(x, torch.ones_like(sigma), sigma) + shift


def run(function: Callable[..., Tensor], case: Case, callback: Callable[[dict[str, Any]], Any] | None = None) -> Tensor:
    """The samples of one of the two functions: equal seeds, or one Brownian path."""
    x = start()
    noise = {"noise_sampler": path_for(case.sigmas, x)} if case.on_a_path else {}
    torch.manual_seed(0)
    return function(denoiser, x, case.sigmas, {"shift": 0.1}, callback, True, **case.options, **noise)


def compare(case: Case) -> Row:
    """The row of one comparison: the largest difference of the states at the start of every step and of the samples."""
    sampler, preset = K_DIFFUSION[case.function]
    row: Row = {"function": case.function, "theirs": text(case.options), "sampler": sampler}
    row |= {"ours": text({**preset, **case.options}), "last_sigma": case.last, "steps": len(case.sigmas) - 1}
    states: tuple[list[Tensor], list[Tensor]] = [], []
    theirs, ours = (
        run(function, case, lambda told, kept=kept: kept.append(told["x"].clone()))  # type: ignore[misc]
        for function, kept in zip(
            (getattr(sampling(), case.function), sampler_function(case.function)), states, strict=True
        )
    )
    pairs = zip((*states[0], theirs), (*states[1], ours), strict=True)
    row |= {"difference": float(torch.stack([a - b for a, b in pairs]).abs().max()), "threshold": THRESHOLD}
    row["status"] = "pass" if row["difference"] < THRESHOLD else "fail"  # NaN fails
    return row | {"k_diffusion": importlib.metadata.version("k-diffusion")}
