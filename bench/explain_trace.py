"""What a sampler computes, read off by running it on coordinates.

Between two network calls every fixed-step sampler is linear. So its loop is run on a state whose entries are coordinates on
(x_T, outputs, noises): the k-th network output is the k-th unit vector, the k-th noise likewise, and what the loop then holds are
the coefficients of `Plan.matrix`, whoever wrote the loop.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.certify import k_diffusion
from bench.explain_schedulers import of_scheduler
from bench.explain_space import Coordinates, Side, Traced, level_of, path_of, recorded, sigmas_of
from bench.export import Noise, plan_for
from samplers.grid import Grid
from samplers.plan import Plan
from samplers.registry import get_sampler
from samplers.schedule import Flow, Schedule


def trace(
    side: Side,
    noise: Noise,
    steps: int,
    *,
    grid: str | None = None,
    nodes: np.ndarray | None = None,
    kind: str = "eps",
    double: bool = True,
) -> Traced:
    """The coefficients of a sampler, a scheduler of diffusers, or a function of k-diffusion's form.

    Args:
        side: what to trace.
        noise: the noise schedule.
        steps: of its loop.
        grid: name of a sampler's grid; None: its recommended one.
        nodes: times to run on instead, for a sampler; a function has to be given them.
        kind: what to express outputs in; "x0" where alpha is 0 at some call.
        double: False leaves float32 where it is used: in the tables of diffusers, or as the dtype of a function's x and sigmas.

    Raises:
        ValueError: an unknown name or option, or a schedule that the scheduler is not made for.
    """
    if side.form in ("sampler", "plan"):
        return _of_plan(_plan(side, noise, steps, grid, nodes), noise.schedule, kind, side.name)
    if side.form == "scheduler":
        return of_scheduler(side, noise, steps, kind, double)
    if nodes is None:
        raise ValueError(f"{side.name} has no nodes of its own: nodes must be given")
    return _of_function(side, noise.schedule, nodes, kind, double)


def _plan(side: Side, noise: Noise, steps: int, grid: str | None, nodes: np.ndarray | None) -> Plan:
    if side.form == "plan":
        if side.options:
            raise ValueError(f"{side.name} is a plan, which has no options, got {dict(side.options)}")
        return Plan.from_json(Path(side.name).read_text())
    if nodes is None:
        return plan_for(side.name, noise, steps=steps, grid=grid, **side.options)
    entry = get_sampler(side.name)
    entry.check_options(dict(side.options))
    return entry.plan(Grid(noise.schedule, nodes), **side.options)


def _of_plan(plan: Plan, schedule: Schedule, kind: str, label: str) -> Traced:
    times, nodes = np.array([call.t for call in plan.calls]), np.array(plan.times)
    levels, draws = np.append(times, nodes[-1]), tuple(range(plan.noises))
    return Traced(label, kind, nodes, levels, times, plan.matrix(kind), draws, sigmas_of(schedule, nodes))


class _Drawn:
    """The module torch, whose `randn_like` deals out unit vectors."""

    def __init__(self, space: Coordinates) -> None:
        self._space = space

    def __getattr__(self, name: str) -> Any:
        return (lambda x, **_: self._space.noise()) if name == "randn_like" else getattr(torch, name)


def _of_function(side: Side, schedule: Schedule, nodes: np.ndarray, kind: str, double: bool) -> Traced:
    function = _function(side.name)
    dtype = torch.float64 if double else torch.float32
    flow = isinstance(schedule, Flow)
    alphas = np.ones(len(nodes)) if flow else schedule.alpha(nodes)
    sigmas = torch.tensor(sigmas_of(schedule, nodes), dtype=dtype)
    asked: list[tuple[float, float]] = []

    def run(path_of: Callable[[Coordinates], Callable[[Any, Any], Tensor]]) -> Traced:
        space = Coordinates(len(nodes) - 1, schedule, kind, dtype)

        def model(y: Tensor, sigma: Tensor) -> Tensor:
            level = level_of(schedule, float(sigma[0]))
            alpha = 1.0 if flow else float(schedule.alpha(level))
            return space.evaluate(y * alpha, level, "x0")

        extra = {"noise_sampler": path_of(space)} if "noise_sampler" in inspect.signature(function).parameters else {}
        names = inspect.unwrap(function).__globals__
        before = names.get("torch")
        names["torch"] = _Drawn(space)
        try:
            y = function(model, space.unit(0) / alphas[0], sigmas, disable=True, **extra, **side.options)
        finally:
            names["torch"] = before
        return space.traced(side.name, y * float(alphas[-1]), float(nodes[-1]), nodes, None)

    run(lambda space: recorded(asked, space))
    return run(lambda space: path_of(asked, space))


def _function(name: str) -> Callable[..., Tensor]:
    module, _, attribute = name.partition(":")
    try:
        found = k_diffusion.sampling() if module == "k-diffusion" else importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{name}: {error}; it has to be installed here, or lie in this folder") from error
    if not callable(getattr(found, attribute, None)):
        raise ValueError(f"{name}: {found.__name__} has no function {attribute!r}")
    return getattr(found, attribute)


def in_kind(traced: Traced, kind: str, schedule: Schedule) -> Traced:
    """The same with outputs expressed as the other kind."""
    if kind == traced.kind:
        return traced
    alpha, sigma = schedule.alpha(traced.levels), np.abs(schedule.sigma(traced.levels))
    own, other = (alpha, sigma) if kind == "eps" else (sigma, alpha)  # unit = (state - other * new unit) / own
    rows: list[np.ndarray] = []
    for row in traced.matrix:
        new = row.copy()
        for j, state in enumerate(rows[: traced.calls]):
            new[1 + j] = 0.0
            new = new + row[1 + j] * state / own[j]
        for j in range(len(rows[: traced.calls])):
            new[1 + j] -= row[1 + j] * other[j] / own[j]
        rows.append(new)
    return replace(traced, kind=kind, matrix=np.stack(rows))
