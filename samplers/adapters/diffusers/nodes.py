"""Where the steps of a PlanScheduler begin and end: from a sampler's grid, from a scheduler's config, or as a pipeline says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from samplers.adapters.diffusers.keys import CONFIG
from samplers.adapters.diffusers.training import Training, is_continuous
from samplers.errors import unknown
from samplers.grid import FINALS, Grid, Nodes, make_grid
from samplers.grid_points import beta, leading, linspace, logsnr, power, trailing, vector
from samplers.registry import Sampler

SPACINGS = ("leading", "linspace", "trailing")
_SHIFTS = ("exponential", "linear")


def grid_of(
    training: Training,
    config: Mapping[str, Any],
    entry: Sampler,
    steps: int,
    mu: float | None = None,
    strength: float = 1.0,
) -> Grid:
    """The grid of a number of steps.

    Args:
        training: of the network.
        config: of the PlanScheduler; `grid` None is the sampler's recommended one, "config" what the other keys describe.
        entry: the sampler.
        steps: at least 1.
        mu: the shift that a pipeline made of the size of its image, see `shift_of`.
        strength: how much of the way is gone, see `part`; of the times of a distillation all `steps` lie in that part.
    """
    if config.get("grid") == CONFIG and _is_distilled(training, config):
        calls = distilled(training.steps, int(config["original_inference_steps"]), steps, strength)
        return Grid(training.schedule, _ended(training, calls, config.get("final") or final_of(config)))
    return part(_whole(training, config, entry, steps, mu), strength)


def part(grid: Grid, strength: float) -> Grid:
    """The last `strength` of a grid's steps, at least one, as image-to-image pipelines count them.

    Raises:
        ValueError: strength is not in (0, 1].
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], got {strength}")
    left_out = grid.steps - max(1, int(grid.steps * strength))
    return Grid(grid.schedule, grid.t[left_out:]) if left_out else grid


def distilled(total: int, original: int, steps: int, strength: float = 1.0) -> np.ndarray:
    """The training steps at which a latent consistency model was distilled, as many as are asked for, evenly over their list.

    Luo et al. 2023, arXiv:2310.04378, section 4.3, as diffusers' LCMScheduler counts them.

    Args:
        total: training steps.
        original: steps of the distillation.
        steps: how many of them to take.
        strength: leaves out the first of the list.

    Raises:
        ValueError: more steps than there are, or more of the distillation than of the training.
    """
    if not 1 <= original <= total:
        raise ValueError(f"original_inference_steps must be 1 to {total}, got {original}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], got {strength}")
    known = np.arange(int(original * strength), 0, -1) * (total // original) - 1.0
    if steps > len(known):
        raise ValueError(
            f"num_inference_steps must be at most {len(known)}, the steps of the distillation, got {steps}"
        )
    return known[np.linspace(0, len(known), steps, endpoint=False).astype(int)]


def _is_distilled(training: Training, config: Mapping[str, Any]) -> bool:
    return training.takes == "step" and bool(config.get("original_inference_steps"))


def _whole(training: Training, config: Mapping[str, Any], entry: Sampler, steps: int, mu: float | None) -> Grid:
    schedule, name, final = training.schedule, config.get("grid"), config.get("final")
    if name == CONFIG:
        calls = _moved(training, config, _spaced(training, config, steps), mu)
        return Grid(schedule, _ended(training, calls, final or final_of(config)))
    nodes = make_grid(schedule, name or entry.grid_on(schedule), steps, final).t
    return Grid(schedule, np.append(_moved(training, config, nodes[:-1], mu), nodes[-1]))


def grid_at(training: Training, config: Mapping[str, Any], timesteps: Nodes) -> Grid:
    """The grid whose steps begin at given times of the network; it ends at clean data unless `final` says "t_min"."""
    given = torch.from_numpy(np.atleast_1d(np.asarray(_array(timesteps, "timesteps"))))
    t = training.schedule_time(given).numpy()
    return _inside(training, _ended(training, t, config.get("final") or "zero"), "timesteps")


def grid_through(training: Training, config: Mapping[str, Any], sigmas: Nodes, mu: float | None = None) -> Grid:
    """The grid through given noise levels.

    On a flow they are its times, without the 0 at the end and before the shift, as pipelines give them to diffusers' flow
    schedulers; on other schedules `sigma_bar`, end included.
    """
    values = _array(sigmas, "sigmas")
    if training.takes == "flow":
        calls = values[:-1] if values[-1] == 0 else values
        return _inside(training, np.append(_moved(training, config, calls, mu), training.schedule.t_zero), "sigmas")
    vector(values, "sigmas")
    if not (values[:-1] > 0).all() or values[-1] < 0:
        raise ValueError(f"sigmas must be positive (only the last may be 0), got {values.tolist()}")
    schedule = training.schedule
    low, high = (float(schedule.sigma_bar(t)) for t in (schedule.t_min, schedule.t_max))
    if values[-2] < low * (1 - 1e-6) or values[0] > high * (1 + 1e-6):
        raise ValueError(f"sigmas must lie in [{low:g}, {high:g}], but for the last, got {values.tolist()}")
    t = schedule.t_of_lam(-np.log(values[values > 0]))
    return _inside(training, t if values[-1] > 0 else np.append(t, training.schedule.t_zero), "sigmas")


def shift_of(config: Mapping[str, Any], mu: float | None) -> float:
    """The s by which a flow's times are shifted, `s t / (1 + (s - 1) t)` (Esser et al. 2024, arXiv:2403.03206, equation 23).

    Raises:
        ValueError: `use_dynamic_shifting` without mu, or a kind of shift that does not exist.
    """
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", config.get("flow_shift", 1.0)))
    kind = config.get("time_shift_type", "exponential")
    if kind not in _SHIFTS:
        raise unknown("time_shift_type of the scheduler", str(kind), _SHIFTS)
    if mu is None:
        raise ValueError("mu must be given: the scheduler's config has use_dynamic_shifting=True")
    return math.exp(mu) if kind == "exponential" else float(mu)


def _moved(training: Training, config: Mapping[str, Any], t: np.ndarray, mu: float | None) -> np.ndarray:
    """Times of a flow shifted, and stretched to end at `shift_terminal`; others as they are."""
    if training.takes != "flow":
        return t
    s = shift_of(config, mu)
    if not 0 < s < math.inf:
        raise ValueError(f"shift of the scheduler must be positive and finite, got {s}")
    t = s * t / (1.0 + (s - 1.0) * t)
    terminal = config.get("shift_terminal")
    if terminal and t[-1] < 1:
        t = 1.0 - (1.0 - t) * ((1.0 - terminal) / (1.0 - t[-1]))
    if config.get("grid") != CONFIG or len(t) < 2:
        return t
    if config.get("use_karras_sigmas"):
        return np.linspace(t[0] ** (1 / 7), t[-1] ** (1 / 7), len(t)) ** 7
    if config.get("use_exponential_sigmas"):
        return np.exp(np.linspace(math.log(t[0]), math.log(t[-1]), len(t)))
    return t


def _spaced(training: Training, config: Mapping[str, Any], n: int) -> np.ndarray:
    """The n times at which the config's own scheduler would call the network."""
    schedule = training.schedule
    if training.takes == "flow":
        return np.linspace(1.0, 1.0 / training.steps, n)
    if training.predicts == "edm":
        rising = config.get("sigma_schedule") == "exponential" or config.get("use_exponential_sigmas")
        rho = 7.0 if is_continuous(config) else float(config.get("rho") or 7.0)
        return logsnr(schedule, n) if rising else power(rho)(schedule, n)
    if config.get("use_karras_sigmas"):
        return power(7.0)(schedule, n)
    if config.get("use_exponential_sigmas") or config.get("use_lu_lambdas"):
        return logsnr(schedule, n)
    if config.get("use_beta_sigmas"):
        return beta(schedule, n)
    spacing = config.get("timestep_spacing", "leading")
    if spacing not in SPACINGS:
        raise unknown("timestep_spacing of the scheduler", str(spacing), SPACINGS)
    if spacing == "leading":
        return leading(schedule, n, int(config.get("steps_offset") or 0))
    return (linspace if spacing == "linspace" else trailing)(schedule, n)


def final_of(config: Mapping[str, Any]) -> str:
    """Where the config's own scheduler ends: clean data, or the least noise that the network was trained on."""
    to_least = config.get("set_alpha_to_one") is False or config.get("final_sigmas_type") == "sigma_min"
    return "t_min" if to_least else "zero"


def _ended(training: Training, calls: np.ndarray, final: str) -> np.ndarray:
    """The times of calls and the end; where they reach t_min already, it is the end itself, as a step from it to it is none."""
    if final not in FINALS:
        raise unknown("final", final, FINALS)
    schedule = training.schedule
    ends = {"t_min": [schedule.t_min], "zero": [schedule.t_zero], "denoise": [schedule.t_min, schedule.t_zero]}[final]
    return np.concatenate([calls, ends[1:] if calls[-1] <= ends[0] and schedule.t_min == ends[0] else ends])


def _inside(training: Training, t: np.ndarray, what: str) -> Grid:
    """The grid, if it lies in the range that the network knows; a flow may go below t_min."""
    schedule = training.schedule
    low = schedule.t_zero if training.takes == "flow" else schedule.t_min
    calls = t[:-1]
    outside = calls[(calls < low - 1e-6 * abs(low)) | (calls > schedule.t_max * (1 + 1e-6))]
    if len(outside):
        limits = training.network_time(torch.tensor([max(low, schedule.t_min), schedule.t_max], dtype=torch.float64))
        shown = float(training.network_time(torch.tensor(outside[0])))
        raise ValueError(f"{what}: network time {shown:g} is outside [{limits[0]:g}, {limits[1]:g}]")
    return Grid(schedule, np.append(np.clip(calls, low, schedule.t_max), t[-1]))


def _array(values: Any, argument: str) -> np.ndarray:
    """One or more finite numbers as a float64 vector; the error names the argument."""
    try:
        array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument} must be a sequence of numbers, got {values!r}") from error
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"{argument} must be finite numbers in one dimension, got {values!r}")
    return array
