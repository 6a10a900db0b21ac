"""A sampler's plan as a file for other programs, with its nodes as plain lists; and the noise schedules that go by a name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from samplers import make_plan, schedules
from samplers.errors import unknown
from samplers.grid import Points
from samplers.plan import Plan
from samplers.schedule import Flow, Schedule

_STEPS = 1000
_FLUX_MU = 1.15  # of FLUX.1-dev at 1024 x 1024, which is its largest


class Noise(NamedTuple):
    """A noise schedule, and for flows the shift of their nodes towards noise (1 is none)."""

    schedule: Schedule
    shift: float = 1.0


def _stable_diffusion() -> Schedule:
    """`scaled_linear`: betas whose roots are linear (Rombach et al. 2022, arXiv:2112.10752, their configuration)."""
    return schedules.from_betas(np.linspace(0.00085**0.5, 0.012**0.5, _STEPS) ** 2)


def _ddpm() -> Schedule:
    """Ho et al. 2020, arXiv:2006.11239, section 4."""
    return schedules.from_betas(np.linspace(1e-4, 0.02, _STEPS))


NAMED: dict[str, Callable[[], Noise]] = {
    "sd15": lambda: Noise(_stable_diffusion()),
    "sd21": lambda: Noise(_stable_diffusion()),
    "sdxl": lambda: Noise(_stable_diffusion()),
    "ddpm": lambda: Noise(_ddpm()),
    "vp-linear": lambda: Noise(schedules.vp_linear()),
    "cosine": lambda: Noise(schedules.cosine()),
    "edm": lambda: Noise(schedules.edm()),
    "flow": lambda: Noise(schedules.flow()),
    "sd3": lambda: Noise(schedules.flow(), 3.0),  # Esser et al. 2024, arXiv:2403.03206, section 5.3.2
    "flux-schnell": lambda: Noise(schedules.flow()),
    "flux-dev": lambda: Noise(schedules.flow(), math.exp(_FLUX_MU)),
}


def named_noise(name: str) -> Noise:
    """A noise schedule by name, or of a `scheduler_config.json` of diffusers by its path.

    Raises:
        ValueError: an unknown name, or a file that is no scheduler's configuration.
    """
    if name in NAMED:
        return NAMED[name]()
    if Path(name).suffix == ".json" or Path(name).is_file():
        return _of_config(Path(name))
    raise unknown("schedule", name, [*NAMED, "PATH/scheduler_config.json"])


def scheduler_of_config(config: dict[str, Any], name: str | None = None) -> Any:
    """A scheduler of diffusers from its configuration.

    Args:
        config: as in `scheduler_config.json`.
        name: of the class; None: `_class_name` of the configuration.

    Raises:
        ValueError: diffusers has no such scheduler.
    """
    import diffusers

    kind = str(config.get("_class_name", "")) if name is None else name
    names = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if kind not in names:
        raise unknown("scheduler of diffusers", kind, names)
    return getattr(diffusers, kind).from_config(config)


def _of_config(path: Path) -> Noise:
    from torch import nn

    from samplers.adapters.diffusers import eps_model_from_diffusers

    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or "_class_name" not in config:
        raise ValueError(f"{path} must be a scheduler_config.json of diffusers, an object with _class_name")
    scheduler = scheduler_of_config(config)
    schedule = eps_model_from_diffusers(nn.Identity(), scheduler).schedule
    return Noise(schedule, float(config.get("shift") or 1.0) if isinstance(schedule, Flow) else 1.0)


def shifted(shift: float) -> Points:
    """Nodes of a flow model, `t = s u / (1 + (s - 1) u)` with u from 1 down in equal steps; 0 is left to the last step.

    Esser et al. 2024, arXiv:2403.03206, equation 23.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be positive and finite, got {shift}")

    def points(schedule: Schedule, n: int) -> np.ndarray:
        u = np.linspace(1.0, 1.0 / n, n)
        return shift * u / (1 + (shift - 1) * u)

    return points


def plan_for(
    sampler: str,
    noise: Noise,
    *,
    steps: int | None = None,
    nfe: int | None = None,
    grid: str | None = None,
    final: str | None = None,
    **options: Any,
) -> Plan:
    """The plan of a sampler on a named noise schedule; a flow without a grid takes its model's shifted nodes, to clean data.

    Raises:
        ValueError, TypeError: as `make_plan`.
    """
    nodes: str | Points | None = grid
    if grid is None and isinstance(noise.schedule, Flow):
        nodes, final = shifted(noise.shift), "zero" if final is None else final
    return make_plan(sampler, noise.schedule, steps=steps, nfe=nfe, grid=nodes, final=final, **options)


def document(plan: Plan, schedule: Schedule) -> dict[str, Any]:
    """A plan's JSON document with two more fields, which `Plan.from_json` makes no plan of.

    `sigmas`, every node, the end included, as schedulers take them: sigma / alpha, or sigma itself where the model is a flow.
    `timesteps`, the nodes but for the end, in the schedule's own time: training steps of a discrete model.
    """
    times = np.array(plan.times)
    sigmas = times if isinstance(schedule, Flow) else np.abs(schedule.sigma_bar(times))
    lists = {"sigmas": sigmas.tolist(), "timesteps": list(plan.times[:-1])}
    return {**json.loads(plan.to_json()), **lists}
