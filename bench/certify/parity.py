"""Certificates of parity: the same states as the schedulers of diffusers, step by step, on the same nodes with the same noise.

Their code computes coefficients, and in places states, in float32. While it runs here, the names `np` and `torch` of its
modules stand for ones whose float32 is float64; nothing else of theirs is touched. What then differs by more than 1e-10
differs in the method. Each comparison is made once more with their code as it is, to say what their float32 costs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.certify.problem import network
from bench.certify.schedulers import Case
from bench.certify.settings import text
from samplers import EpsModel, Plan, make_plan, run_plan, schedules
from samplers.program import Combine, Evaluate
from samplers.registry import SAMPLERS

Row = dict[str, Any]
BETAS = np.linspace(1e-4, 0.02, 1000)
SCHEDULE = schedules.from_betas(BETAS)
THRESHOLD, THRESHOLD_SINGLE = 1e-10, 1e-5
_STATES, _MOST_NOISES = 4, 200
_SINGLE = "dtype: as shipped, float32 in their coefficients or state; none in float64"
_SINGLE_ERROR = 1e-4  # of their sigmas in float32, relative


class _Double:
    """A module whose float32 is float64."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


@contextmanager
def in_double(name: str, noises: Iterator[Tensor], double: bool = True) -> Iterator[type]:
    """A scheduler class of diffusers whose module computes in float64 and draws its noise from `noises`.

    Args:
        name: of the class.
        noises: the noises, in the order in which they are drawn.
        double: False leaves its float32 as it is.
    """
    import diffusers

    with _without_torchsde():
        made = getattr(diffusers, name)
        if name == "DPMSolverSDEScheduler":  # a dummy in `diffusers` where torchsde is missing
            made = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    module = importlib.import_module(made.__module__)
    changes: dict[str, Any] = {"np": _Double(np), "torch": _Double(torch)} if double else {}
    changes["randn_tensor"] = lambda shape, dtype=None, **_: next(noises).to(dtype)
    before = {key: vars(module)[key] for key in changes if key in vars(module)}
    vars(module).update({key: changes[key] for key in before})
    try:
        yield made
    finally:
        vars(module).update(before)


@contextmanager
def _without_torchsde() -> Iterator[None]:
    """Lets their SDE scheduler be imported without the library of its Brownian tree, in whose place `_brownian` stands."""
    missing = importlib.util.find_spec("torchsde") is None
    if missing:
        sys.modules["torchsde"] = types.ModuleType("torchsde")
    try:
        yield
    finally:
        if missing:
            del sys.modules["torchsde"]


def _brownian(plan: Plan, noises: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A Brownian path over sigma_bar, from the plan's own noises, as k-diffusion's tree would give its increments.

    Each noise of the plan is the path's increment from one network call's level to the next, divided by its deviation.
    """
    levels = [call.sigma / call.alpha for call in plan.calls]

    def increment(start: Tensor, stop: Tensor) -> Tensor:
        """Of deviation 1, over sigma from `start` down to `stop`."""
        slack = 1e-4
        inside = [
            k
            for k in range(plan.noises)
            if levels[k + 1] > (1 - slack) * float(stop) and levels[k] < (1 + slack) * float(start)
        ]
        moved = torch.stack([noises[k] * (levels[k] - levels[k + 1]) ** 0.5 for k in inside]).sum(0)
        return moved / float(start - stop) ** 0.5

    return increment


@functools.cache
def _model() -> EpsModel:
    return EpsModel(network(SCHEDULE), SCHEDULE)


@functools.cache
def _noises() -> list[Tensor]:
    """Start noise and step noises, the same for every comparison."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(_MOST_NOISES, _STATES, 2, generator=generator, dtype=torch.float64))


def compare(case: Case) -> Row:
    """The row of one comparison: differences, the first step that differs, the stated cause, and whether that all agrees."""
    row: Row = {"scheduler": case.scheduler, "theirs": text(case.theirs), "sampler": case.sampler}
    row |= {"ours": text(case.ours), "nodes": case.nodes, "steps": case.steps, "cause": case.cause}
    row |= {"threshold": THRESHOLD, "threshold_as_shipped": THRESHOLD_SINGLE}
    if case.sampler not in SAMPLERS:
        return row | {"status": "not run", "cause": f"sampler {case.sampler!r} is not registered"}
    try:
        differences = differences_of(case)
    except ImportError as error:
        return row | {"status": "not run", "cause": str(error).strip().splitlines()[0]}
    apart = [k for k, value in enumerate(differences, 1) if not value < THRESHOLD]  # NaN is apart
    row["difference"] = math.nan if any(map(math.isnan, differences)) else max(differences)
    row["first_step"] = f"{apart[0]} of {len(differences)}" if apart else ""
    single = differences_of(case, double=False)
    apart_single = [k for k, value in enumerate(single, 1) if not value < THRESHOLD_SINGLE]
    row["difference_as_shipped"] = math.nan if any(map(math.isnan, single)) else max(single)
    row["first_step_as_shipped"] = f"{apart_single[0]} of {len(single)}" if apart_single else ""
    if case.cause:  # a difference that is stated must be there, and begin where it is said to
        return row | {"status": "finding" if apart and apart[0] == case.first_step % (len(differences) + 1) else "fail"}
    if not apart and apart_single:  # in float64 it is gone, so nothing else is its cause
        return row | {"status": "finding", "cause": _SINGLE}
    return row | {"status": "fail" if apart else "pass"}


def differences_of(case: Case, double: bool = True) -> list[float]:
    """The largest difference of the states at the end of each step, in x coordinates.

    Args:
        case: what to compare.
        double: False leaves their float32 as it is.
    """
    start, *noises = _noises()
    with (
        in_double(case.scheduler, iter(noises), double) as made_of,
        warnings.catch_warnings(),
        np.errstate(all="ignore"),
    ):
        warnings.simplefilter("ignore")
        made = made_of(trained_betas=BETAS, **case.theirs)
        _set_nodes(made, case)
        scaled = bool((made.scale_model_input(start, made.timesteps[0]) != start).any())  # their state is x / alpha
        plan = _plan(case, made, double)
        if hasattr(made, "noise_sampler"):
            made.noise_sampler = _brownian(plan, noises)
        theirs = _follow(made, plan, start, case)
    ours: list[Tensor] = []
    run_plan(
        plan,
        _model(),
        start * float(SCHEDULE.alpha(plan.times[0])) if scaled else start,
        noise_source=lambda k, like: noises[k],
        callback=lambda told: ours.append(told.x.clone()),
        check=False,
    )
    scale = [float(SCHEDULE.alpha(t)) if scaled else 1.0 for t in plan.times[1:]]
    return [float((a - s * b).abs().max()) for a, s, b in zip(ours, scale, theirs, strict=True)]


def _set_nodes(made: Any, case: Case) -> None:
    """Their own nodes; "exact" gives the network the times that belong to their sigmas, which they round or interpolate."""
    exact = case.nodes == "exact"
    if exact and hasattr(made, "_sigma_to_t"):
        made._sigma_to_t = lambda sigma, _: SCHEDULE.t_of_lam(-np.log(np.maximum(np.asarray(sigma), 1e-10)))
    made.set_timesteps(case.steps)
    if hasattr(made, "order_list") and made.sigmas[-1] == made.sigmas[-2]:
        # their last step has length zero: a call that nothing comes of
        made.sigmas, made.timesteps = made.sigmas[:-1], made.timesteps[:-1]
        made.order_list = made.get_order_list(len(made.timesteps))
    second = hasattr(made, "_second_order_timesteps")  # their inner times, by `_sigma_to_t`, are among the times
    if exact and not second and len(made.sigmas) == len(made.timesteps) + 1:
        made.timesteps = torch.as_tensor(SCHEDULE.t_of_lam(-np.log(made.sigmas[:-1].double().numpy())))


def _plan(case: Case, made: Any, double: bool) -> Plan:
    """Our plan on the nodes at the ends of their steps, with the orders of their steps where those vary."""
    options = dict(case.ours)
    if hasattr(made, "sigmas"):
        sigmas = [float(s) for s in made.sigmas]  # two-call methods list them twice
    else:
        times = made.timesteps.numpy()
        if len(getattr(made, "prk_timesteps", ())):  # four calls for each Runge-Kutta step
            times = np.concatenate([made.prk_timesteps[::4], made.plms_timesteps])
        sigmas = SCHEDULE.sigma_bar(times.astype(np.float64)).tolist()
        end = math.sqrt(1.0 / float(getattr(made, "final_alpha_cumprod", 1.0)) - 1.0)
        sigmas.append(0.0 if math.isclose(end, sigmas[-1], rel_tol=_SINGLE_ERROR) else end)
    if hasattr(made, "order_list"):  # a group of calls of order 1, 2, .. is one step
        orders = [*made.order_list, 1]
        sigmas = [s for s, order in zip(sigmas, orders, strict=True) if order == 1]
        options["orders"] = [before for before, order in itertools.pairwise(orders) if order == 1]
    nodes = dict.fromkeys(sigmas if double else map(_from_single, sigmas))
    return make_plan(case.sampler, SCHEDULE, sigmas=list(nodes), **options)


def _from_single(sigma: float) -> float:
    """The entry of the schedule's table that a sigma in float32 stands for, or the sigma itself where it is none."""
    table = SCHEDULE.sigma_bar(np.arange(len(BETAS), dtype=np.float64))
    nearest = float(table[np.argmin(np.abs(table - sigma))])
    return nearest if abs(nearest - sigma) < _SINGLE_ERROR * sigma else sigma


def _follow(made: Any, plan: Plan, start: Tensor, case: Case) -> list[Tensor]:
    """Their loop; the states after as many network calls as the plan has made at the end of each step."""
    calls, ends = 0, []
    for step in plan.instructions:
        calls += isinstance(step, Evaluate)
        if isinstance(step, Combine) and step.node is not None:
            ends.append(calls)
    x, states = start, []
    for t in made.timesteps:
        state = made.scale_model_input(x, t)
        x = made.step(_model()(state, float(t)), t, x, **case.each).prev_sample
        states.append(x)
    if len(states) != calls + case.more_calls:
        raise ValueError(f"{type(made).__name__} makes {len(states)} network calls, {plan.sampler} {calls}")
    return [states[end - 1 + case.more_calls] for end in ends]
