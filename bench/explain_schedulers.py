"""What a scheduler of diffusers computes: its own loop, run on coordinates. PlanScheduler is one of them."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.certify.parity import in_double
from bench.explain_space import Coordinates, Options, Side, Traced, level_of, path_of, recorded
from bench.export import Noise
from samplers.adapters.diffusers.classes import NETWORKS, of_class
from samplers.adapters.diffusers.training import Training, training_of
from samplers.schedule import EDM, Discrete, Flow, Schedule

_OURS = "PlanScheduler"


def of_scheduler(side: Side, noise: Noise, steps: int, kind: str, double: bool) -> Traced:
    """The coefficients of `diffusers:CLASS`; arguments and errors as in `bench.explain_trace.trace`."""
    schedule, name = noise.schedule, side.name.partition(":")[2]
    space = Coordinates(steps, schedule, kind)
    if name == _OURS:
        return _of_plan_scheduler(side, space, noise, steps, double)
    _check_scheduler(name)
    with (
        in_double(name, space.noises(), double) as made_of,
        warnings.catch_warnings(),
        np.errstate(all="ignore"),
    ):
        warnings.simplefilter("ignore")
        settings, each = _settings(made_of, noise, side.options)

        def run(path: Callable[[Any, Any], Tensor] | None) -> Traced:
            made = made_of(**settings)
            made.set_timesteps(steps)
            if path is not None:
                made.noise_sampler = path
            return _loop(made, space, each, side.name)

        if not hasattr(made_of(**settings), "noise_sampler"):
            return run(None)
        asked: list[tuple[float, float]] = []
        run(recorded(asked, space))
        space = Coordinates(steps, schedule, kind)
        return run(path_of(asked, space))


def _check_scheduler(name: str) -> None:
    from bench.export import scheduler_of_config

    if name in NETWORKS:
        raise ValueError(f"scheduler {name} cannot be compared: {NETWORKS[name]}")
    if name != "DPMSolverSDEScheduler":  # a stand-in that refuses to be made, where torchsde is missing
        scheduler_of_config({}, name)


def _settings(made_of: Any, noise: Noise, options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the scheduler is made with, and what each of its steps is given."""
    schedule = noise.schedule
    takes, step = (inspect.signature(f).parameters for f in (made_of.__init__, made_of.step))
    settings = {name: value for name, value in options.items() if name in takes}
    each = {name: value for name, value in options.items() if name not in takes}
    for name in each:
        if name not in step:
            raise ValueError(f"{made_of.__name__} has no setting {name!r}; it has {', '.join([*takes][1:])}")
    if {"sigma_data", "sigma_max"} <= set(takes):  # of networks that EDM preconditions
        if not isinstance(schedule, EDM):
            raise ValueError(
                f"{made_of.__name__} is for schedule 'edm', and cannot be put on schedule {schedule.name!r}"
            )
        return {"sigma_min": schedule.sigma_min, "sigma_max": schedule.sigma_max, **settings}, each
    flow = isinstance(schedule, Flow)
    if flow and "shift" not in takes and not settings.get("use_flow_sigmas"):
        raise ValueError(f"{made_of.__name__} matches no flows, which schedule {schedule.name!r} is for")
    if not flow and "trained_betas" not in takes:
        raise ValueError(f"{made_of.__name__} takes no betas, and so cannot be put on schedule {schedule.name!r}")
    for name in ("shift", "flow_shift"):  # where the nodes of its model lie, as for a sampler
        if flow and name in takes:
            settings.setdefault(name, noise.shift)
    if flow and "prediction_type" in takes:
        settings.setdefault("prediction_type", "flow_prediction")
    if not flow:
        settings.setdefault("trained_betas", _betas(schedule))
    for name in ("clip_sample", "thresholding"):  # which no linear loop has, and which is no part of a method
        if name in takes:
            settings.setdefault(name, False)
    return settings, each


def _loop(made: Any, space: Coordinates, each: Options, label: str) -> Traced:
    """A scheduler's own loop, as its pipelines run it."""
    schedule, training = space.schedule, _training(made)
    sigmas = [float(s) for s in made.sigmas] if hasattr(made, "sigmas") else None
    told = _told(made, training)
    start = space.unit(0)
    # their state is x / alpha where this is not 1; what EDM's network is given is no state
    scale = 1.0 if training.predicts == "edm" else float(_scaled(made, start, 0)[0, 0])
    x = start / scale
    for k, t in enumerate(made.timesteps):
        state, level = x, float(told[k]) if sigmas is None else level_of(schedule, sigmas[k])
        taken = _scaled(made, x, k)
        if training.predicts != "edm":
            state = taken
        if scale != 1.0:
            factor = float((state / x)[x != 0][0])
            level = level_of(schedule, math.sqrt(max(1.0 / factor**2 - 1.0, 0.0)))
        out = training.sign * space.evaluate(state, level, training.predicts, training.sigma_data)
        x = made.step(out, t, x, **each).prev_sample
    end = _end(made, schedule, sigmas)
    if scale != 1.0:
        x = x * float(schedule.alpha(end))
    first = told[: len(getattr(made, "prk_timesteps", ())) : 4]  # of PNDM's Runge-Kutta steps, each of four calls
    ends = [*first, *told[4 * len(first) :], end] if sigmas is None else [level_of(schedule, s) for s in sigmas]
    nodes = [
        *ends[:1],
        *(t for before, t in itertools.pairwise(ends) if t < before - 1e-9),
    ]  # a step may have no length
    return space.traced(label, x, end, np.array(nodes), told)


def _training(made: Any) -> Training:
    """What its network predicts, at which times."""
    name = type(made).__name__
    return training_of(of_class(made.config, name), name, getattr(made, "alphas_cumprod", None))


def _told(made: Any, training: Training) -> np.ndarray:
    """The times that the network is told, in the schedule's own time."""
    return training.schedule_time(torch.as_tensor(made.timesteps, dtype=torch.float64)).numpy()


def _of_plan_scheduler(side: Side, space: Coordinates, noise: Noise, steps: int, double: bool) -> Traced:
    """Our own scheduler, in its pipelines' loop; its times are float32 as they are told, and float64 in its plan."""
    from samplers.adapters.diffusers import PlanScheduler

    made = PlanScheduler.from_config(_config_on(noise), **side.options)
    made.set_timesteps(steps)
    plan, training = made.plan, _training(made)
    times = np.array([call.t for call in plan.calls])
    x = space.unit(0)
    for call, t in zip(plan.calls, made.timesteps, strict=True):
        state = made.scale_model_input(x, t)
        if training.predicts == "edm":  # it gives c_in x
            state = state * (call.sigma**2 + training.sigma_data**2) ** 0.5
        out = training.sign * space.evaluate(state, call.t, training.predicts, training.sigma_data)
        x = made.step(out, t, x, noise_source=lambda k, like: space.noise()).prev_sample
    nodes = np.array(plan.times)
    return space.traced(side.name, x, nodes[-1], nodes, times if double else _told(made, training))


def _config_on(noise: Noise) -> dict[str, Any]:
    """The config of a scheduler on a noise schedule.

    Raises:
        ValueError: a schedule that no scheduler's config describes.
    """
    schedule = noise.schedule
    if isinstance(schedule, Flow):
        return {"shift": noise.shift}
    if isinstance(schedule, EDM):
        return {"sigma_min": schedule.sigma_min, "sigma_max": schedule.sigma_max, "sigma_data": 0.5}
    return {"trained_betas": _betas(schedule).tolist()}


def _betas(schedule: Schedule) -> np.ndarray:
    if not isinstance(schedule, Discrete):
        raise ValueError(f"schedulers of diffusers have a table of betas, and schedule {schedule.name!r} has none")
    table = np.array([1.0, *schedule.alphas_cumprod])
    return 1.0 - table[1:] / table[:-1]


def _scaled(made: Any, x: Tensor, k: int) -> Tensor:
    return made.scale_model_input(x, made.timesteps[k]) if hasattr(made, "scale_model_input") else x


def _end(made: Any, schedule: Schedule, sigmas: list[float] | None) -> float:
    if sigmas is not None:
        return level_of(schedule, sigmas[-1])
    last = float(getattr(made, "final_alpha_cumprod", 1.0))
    return level_of(schedule, math.sqrt(max(1.0 / last - 1.0, 0.0)))
