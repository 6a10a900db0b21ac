"""The scheduler classes of diffusers: which one a config is of, what the class alone tells, and which cannot be served."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

_TOKENS = "it is for discrete tokens, which are not noised as alpha x0 + sigma eps"
_STAGES = "its network denoises between levels or stages that its config alone does not give"
# Whose network is no epsilon-model on a noise schedule that is known here.
NETWORKS: dict[str, str] = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "FlowMapEulerDiscreteScheduler": "its network is given two times, from where and to where",
    "HeliosScheduler": _STAGES,
    "HeliosDMDScheduler": _STAGES,
    "PiflowScheduler": _STAGES,
    "RFD4ProteinaScheduler": _STAGES,
    "MiniMaxH3Scheduler": "its network predicts a velocity towards the data, at times 1 - t",
    "CMStochasticIterativeScheduler": "its network is preconditioned as consistency models are, not as EDM's",
    "ConsistencyDecoderScheduler": "it decodes latents in one or two jumps",
    "SCMScheduler": "its network predicts on a circle (trigflow), which is not known here",
    "DDPMWuerstchenScheduler": "its network is given a ratio of a continuous schedule, which is not known here",
    "IPNDMScheduler": "its network is given an angle, which is not known here",
}
_BACK = "it runs from data to noise; a PlanScheduler runs from noise to data"
_SDE = "its pipeline's loop is another one (predictor and corrector), without step()"
# And those in whose place no PlanScheduler can be put, whatever their network.
EXCLUDED: dict[str, str] = NETWORKS | {
    "KarrasVeScheduler": _SDE,
    "ScoreSdeVeScheduler": _SDE,
    "ScoreSdeVpScheduler": _SDE,
    "DDIMInverseScheduler": _BACK,
    "DPMSolverMultistepInverseScheduler": _BACK,
}
# Whose keys are those of a class that is served: in memory it cannot be told from that one.
_TWINS = {"FlowMapEulerDiscreteScheduler": "FlowMatchHeunDiscreteScheduler"}
# What a class tells that is in no key: that it matches flows, or which time its network takes.
_UNWRITTEN: dict[str, dict[str, Any]] = {
    "LTXEulerAncestralRFScheduler": {"shift": 1.0},
    "CosineDPMSolverMultistepScheduler": {"time_input": "angle"},
}


def class_of(config: Mapping[str, Any]) -> str | None:
    """The name of the class that a config is of, where it matters which; None where that is not known.

    A saved config names its class. That of a scheduler in memory does not, but has exactly the keys of the class; where two
    classes have them, it is taken for the one that is served, and diffusers' logger says so. Mappings that were written by hand
    have no class.
    """
    from diffusers import schedulers
    from diffusers.configuration_utils import FrozenDict
    from diffusers.utils import logging

    in_memory = isinstance(config, FrozenDict) or "_use_default_values" in config
    if "_class_name" in config or not in_memory:
        return config.get("_class_name")
    mine = {key for key in config if not key.startswith("_")}
    for name in (*EXCLUDED, *_UNWRITTEN):
        if mine != keys_of(getattr(schedulers, name, None)):
            continue
        if name in _TWINS:
            logging.get_logger(f"diffusers.{__name__}").warning(
                f"config does not say of which class it is, and is taken for one of {_TWINS[name]}; {name} has the same keys, "
                f"and could not be served: {EXCLUDED[name]}"
            )
        return _TWINS.get(name, name)
    return None


def keys_of(made: Any) -> set[str]:
    """The keys of a scheduler class's config; none for no class."""
    parameters = inspect.signature(made.__init__).parameters.values() if made is not None else ()
    return {p.name for p in parameters if p.name != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def of_class(config: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """A config with what the scheduler's class alone tells."""
    return _UNWRITTEN.get(name or "", {}) | dict(config)
