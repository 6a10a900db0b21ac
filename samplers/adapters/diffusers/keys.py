"""The keys of diffusers' scheduler configs: which are read, which describe the old solver alone, which cannot be honoured."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from samplers.adapters.diffusers.classes import EXCLUDED, class_of, keys_of, of_class
from samplers.adapters.diffusers.training import BETA_ENDS, TRAINING_STEPS, has_betas, has_schedule, is_flow
from samplers.errors import unknown
from samplers.grid import FINALS, points_of
from samplers.registry import Sampler, get_sampler

DEFAULT_SAMPLER = "dpmpp-2m"
CONFIG = "config"  # the grid that a scheduler's config describes
OWN = ("sampler", "grid", "final", "afs", "options")  # keys of PlanScheduler itself

# How the network was trained, what is done to its output, and where a flow's nodes are moved to.
TRAINING = frozenset(
    {"num_train_timesteps", "prediction_type", "beta_start", "beta_end", "beta_schedule", "trained_betas"}
    | {
        "rescale_betas_zero_snr",
        "snr_shift_scale",
        "sigma_min",
        "sigma_max",
        "sigma_data",
        "timestep_type",
        "time_input",
    }
    | {"use_flow_sigmas", "flow_shift", "shift", "shift_terminal", "use_dynamic_shifting", "time_shift_type"}
    | {
        "base_shift",
        "max_shift",
        "base_image_seq_len",
        "max_image_seq_len",
    }  # read by the pipelines, which make mu of them
    | {"clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value"}
    | {"variance_type"}  # "learned_range": what "ddpm" takes, others leave it out; otherwise of the old solver
)
# Where the old scheduler put its nodes: read under grid="config".
SPACING = frozenset(
    {
        "timestep_spacing",
        "steps_offset",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "use_lu_lambdas",
    }
    | {"set_alpha_to_one", "final_sigmas_type", "sigma_schedule", "rho", "original_inference_steps"}
)
# The old solver's own: nothing is lost with them, since the sampler takes its place. They stay in the config.
SOLVER = frozenset(
    {"solver_order", "solver_type", "algorithm_type", "lower_order_final", "euler_at_final", "predict_x0"}
    | {"disable_corrector", "solver_p", "predictor_order", "corrector_order", "tau_func", "skip_prk_steps"}
    | {"eta", "s_noise", "interpolation_type"}
)
# Neutral values, and what to do where another one is found.
REPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "lambda_min_clipped": ((None, -math.inf), "where sampling starts is the grid's; give timesteps= that start lower"),
    "stochastic_sampling": ((None, False), "sampler='consistency' draws new noise at every step"),
    "timestep_scaling": (
        (None,),
        "the boundary condition of consistency models is not applied; it hardly differs from x0",
    ),
    "scale_factors": ((None,), "the size of the latents stays what it is"),
    "upscale_mode": ((None, "bicubic"), "the size of the latents stays what it is"),
}
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "invert_sigmas": ((None, False), "its network counts time from data to noise"),
}
KEYS = TRAINING | SPACING | SOLVER | set(REPORTED) | set(REFUSED)


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config with every key that its class has, none of diffusers' private ones.

    `from_config` of diffusers' schedulers drops what was left at its default and takes its own default instead, which is
    another noise schedule where the two classes differ. Here a missing key has the default of the class that wrote the config.

    Raises:
        ValueError: of a class whose network no PlanScheduler can serve.
    """
    name = class_of(config)
    found = {key: value for key, value in config.items() if not key.startswith("_")}
    if name in EXCLUDED:
        raise ValueError(f"config of {name}: {EXCLUDED[name]}")
    if name not in (None, "PlanScheduler"):
        import diffusers

        made: Any = getattr(diffusers, name, None)
        parameters = inspect.signature(made.__init__).parameters if made is not None else {}
        found = {k: p.default for k, p in parameters.items() if p.default is not p.empty} | found
    return of_class(found, name)


def settled(config: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config with changes: what is PlanScheduler's own (`OWN`), and the keys of diffusers' schedulers.

    Args:
        config: of any scheduler.
        changes: own keys, options of the sampler, or keys of a scheduler's config. Options of another sampler than the
            config's are not taken over. Keys that say where nodes lie mean `grid="config"`.

    Raises:
        ValueError: a name that is none of these, or a class of scheduler that cannot be replaced.
    """
    found, changes = completed(config), dict(changes)
    if not has_schedule({**found, **changes}):
        raise ValueError(
            "config must say what the noise schedule is: beta_schedule or trained_betas, shift (a flow), or sigma_data and "
            f"sigma_max (EDM), got {', '.join(sorted(found)) or 'none of them'}"
        )
    own = {key: found.pop(key) for key in OWN if key in found}
    own = {key: value for key, value in own.items() if key not in config.get("_use_default_values", ())}
    same = changes.get("sampler", own.get("sampler")) == own.get("sampler")
    options = {**((own.get("options") or {}) if same else {}), **(changes.pop("options", None) or {})}
    own.update({key: changes.pop(key) for key in OWN if key in changes})
    entry = get_sampler(own.get("sampler", DEFAULT_SAMPLER))
    for key, value in changes.items():
        if key in entry.options:
            options[key] = value
        elif key in KEYS - SOLVER:
            found[key] = value
        else:
            raise unknown(f"option of sampler {entry.name!r}:", key, {*entry.options, *OWN, *(KEYS - SOLVER)})
    spacing = sorted(key for key in changes if key in SPACING and key not in entry.options)
    if spacing:
        if own.get("grid") not in (None, CONFIG):
            raise ValueError(f"{spacing[0]} goes with grid={CONFIG!r}, got grid={own['grid']!r}")
        own["grid"] = CONFIG
    if options or "options" in own:  # what was left at its default stays so, as diffusers' own keep track of it
        own["options"] = options
    return own, found


def check_keys(config: Mapping[str, Any], sampler: str) -> list[str]:
    """What cannot be honoured under a sampler, a sentence for each key.

    Raises:
        ValueError: a key that no scheduler has, or one that must not be ignored.
    """
    check_known(config)
    for key, (neutral, why) in REFUSED.items():
        if config.get(key) not in neutral:
            raise ValueError(f"{key}={config[key]!r} of the scheduler's config is not supported: {why}")
    found = {key: what for key, (neutral, what) in REPORTED.items() if config.get(key) not in neutral}
    if sampler == "ddpm" and config.get("variance_type") == "learned":
        found["variance_type"] = (
            "of learned variances only 'learned_range' is known; the noise is that of 'fixed_small'"
        )
    return [f"{key}={config[key]!r} of the scheduler's config is not used: {what}" for key, what in found.items()]


def check_known(config: Mapping[str, Any], made: type | None = None) -> None:
    """Raise ValueError for a key that no scheduler has: what it stands for would fall to its default.

    Private keys are passed over, and None, which old versions of diffusers wrote for keys that are gone.

    Args:
        config: of a scheduler.
        made: its class, whose own keys are known too.
    """
    known = KEYS | set(OWN) | keys_of(made) | {"tensor_format"}  # the last is of diffusers before 0.4
    for key, value in config.items():
        if not key.startswith("_") and key not in known and value is not None:
            raise unknown("key of the scheduler's config", key, known)


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the keys that pipelines read of any scheduler of its kind; a config of no kind is a DDPM's."""
    found = dict(config)
    if not has_schedule(found):
        found.setdefault("beta_schedule", "linear")
    found.setdefault("num_train_timesteps", TRAINING_STEPS)
    if has_betas(found) and not is_flow(found):
        found.setdefault("prediction_type", "epsilon")
    if found.get("beta_schedule") is not None:  # other classes have other defaults
        found = BETA_ENDS | found
    return found


def chosen_spacing(config: Mapping[str, Any]) -> str:
    """The key by which a config chooses where nodes lie, as no class does by default; "" where it does not."""
    flags = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
    chosen = [f"{flag}=True" for flag in flags if config.get(flag)]
    if config.get("timestep_spacing") == "trailing":
        chosen.append("timestep_spacing='trailing'")
    if config.get("original_inference_steps"):  # a student's: it knows no other times
        chosen.append(f"original_inference_steps={config['original_inference_steps']}")
    return " and ".join(chosen)


def with_plan(sampler: str) -> Sampler:
    """The registry's entry, if the sampler has a plan; else a ValueError."""
    entry = get_sampler(sampler)
    if entry.build is None:
        raise ValueError(
            f"sampler {sampler!r} chooses its steps by an error estimate while it calls the network, so it has no plan and "
            "cannot be a scheduler; call samplers.sample() with it"
        )
    return entry


def check_own(grid: Any, final: Any, afs: Any) -> None:
    """Raise ValueError or TypeError for a value of PlanScheduler's own keys that there is not."""
    if grid is not None and not isinstance(grid, str):
        raise TypeError(f"grid must be a name, which a config can hold, got {type(grid).__name__}")
    if grid not in (None, CONFIG):
        points_of(grid)
    if final not in (None, *FINALS):
        raise unknown("final", final, FINALS)
    if not isinstance(afs, bool):
        raise TypeError(f"afs must be True or False, got {afs!r}")
