"""The comparisons with diffusers, as data: which scheduler with which settings is which sampler, and what is known to differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

Options = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        scheduler, theirs: the class of diffusers, and its settings.
        sampler, ours: the registered name, and its options.
        steps: what `set_timesteps` is given.
        nodes: "theirs", or "exact": theirs, and the network gets the times that belong to their sigmas.
        each: options of each of their steps.
        more_calls: network calls that they make in the first step and we do not.
        first_step: the first step that differs, -1 the last one, where a cause is stated.
        cause: why it differs; empty where it must not.
    """

    scheduler: str
    theirs: Options
    sampler: str
    ours: Options = field(default_factory=dict)
    steps: int = 10
    nodes: str = "theirs"
    each: Options = field(default_factory=dict)
    more_calls: int = 0
    first_step: int = 1
    cause: str = ""


def cases() -> list[Case]:
    """Every comparison."""
    families = (_first_order, _kdiffusion, _multistep, _singlestep, _unipc, _linear_multistep, _stochastic)
    return [case for family in families for case in family()]


_STRIDE = "node: they take the previous time to be t - T/N, which is not the next node of this spacing"


def _first_order() -> Iterator[Case]:
    for spacing, steps in product(("leading", "trailing"), (1, 5, 50)):
        yield Case("DDIMScheduler", {"clip_sample": False, "timestep_spacing": spacing}, "ddim", steps=steps)
    for variance, steps in product(("fixed_small", "fixed_large"), (10, 100)):
        theirs: Options = {"clip_sample": False, "timestep_spacing": "leading", "variance_type": variance}
        yield Case("DDPMScheduler", theirs, "ddpm", {"variance": variance}, steps)
    yield Case("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "linspace"}, "ddim", cause=_STRIDE)


def _kdiffusion() -> Iterator[Case]:
    for spacing in ("leading", "trailing"):
        theirs: Options = {"timestep_spacing": spacing}
        yield Case("EulerDiscreteScheduler", theirs, "euler")
        yield Case("EulerAncestralDiscreteScheduler", theirs, "euler-ancestral")
        yield Case("HeunDiscreteScheduler", theirs, "heun")
        for k in (1, 2, 3, 4):
            yield Case("LMSDiscreteScheduler", theirs, f"lms-{k}", each={"order": k})
        yield Case("KDPM2DiscreteScheduler", theirs, "dpm2", nodes="exact")
        yield Case("KDPM2AncestralDiscreteScheduler", theirs, "dpm2-ancestral", nodes="exact")


def _multistep() -> Iterator[Case]:
    solver_types = ("midpoint", "heun")
    for steps, (final, spacing) in product((1, 2, 5, 14, 15, 50), (("zero", "linspace"), ("sigma_min", "linspace"))):
        theirs: Options = {"final_sigmas_type": final, "timestep_spacing": spacing}
        for kind in solver_types:
            both = {**theirs, "solver_type": kind, "solver_order": 2}
            yield Case("DPMSolverMultistepScheduler", both, "dpmpp-2m", {"solver_type": kind}, steps)
            if final == "sigma_min":
                eps = {**both, "algorithm_type": "dpmsolver"}
                yield Case("DPMSolverMultistepScheduler", eps, "dpm-solver-2m", {"solver_type": kind}, steps)
        yield Case("DPMSolverMultistepScheduler", {**theirs, "solver_order": 3}, "dpmpp-3m", {}, steps)
    for order in (1, 2, 3):
        theirs = {"solver_order": order, "timestep_spacing": "linspace"}
        yield Case("DEISMultistepScheduler", theirs, f"eab-{order}", {"predict": "eps"})


_INNER = (
    "order: with midpoint they build the second inner state of a third-order step with half of psi_1, which is the midpoint form "
    "of order 2; the paper's algorithm, and ours, has psi_2 there"
)


def _singlestep() -> Iterator[Case]:
    for order, steps in product((2, 3), (8, 9, 10)):
        for kind, (algorithm, name) in product(
            ("midpoint", "heun"), (("dpmsolver++", "dpmpp"), ("dpmsolver", "dpm-solver"))
        ):
            theirs: Options = {"solver_order": order, "solver_type": kind, "algorithm_type": algorithm}
            final = "zero" if name == "dpmpp" else "sigma_min"  # they refuse zero for epsilon
            theirs |= {"use_exponential_sigmas": True, "final_sigmas_type": final, "lower_order_final": True}
            cause = _INNER if (order, kind) == (3, "midpoint") else ""
            ours = {"solver_type": kind}
            yield Case("DPMSolverSinglestepScheduler", theirs, f"{name}-{order}s", ours, steps, "exact", cause=cause)


_LIMIT = "final step: infinity times 0 in their step to sigma = 0 gives NaN; here the limit, which is first order"


def _unipc() -> Iterator[Case]:
    for order, variant, predict in product((1, 2, 3), ("bh1", "bh2"), ("x0", "eps")):
        theirs: Options = {"solver_order": order, "solver_type": variant, "predict_x0": predict == "x0"}
        ours = {"variant": variant, "predict": predict, "lower_order_final": True}
        for final in ("sigma_min", "zero"):
            settings = {**theirs, "final_sigmas_type": final}
            lost = final == "zero" and (variant == "bh1" or predict == "eps")
            cause = _LIMIT if lost else ""
            yield Case("UniPCMultistepScheduler", settings, f"unipc-{order}", ours, first_step=-1, cause=cause)


_ADAMS = "final step: they keep Adams-Bashforth 4 in the step to sigma = 0, which is first order here"
_NOWHERE = (
    "final step: theirs has no length, as the level of training step 0 is their end and the last node of this spacing; ours goes "
    "to sigma = 0"
)
_PLMS = "start: they spend a second call on the first step and average (PLMS); iPNDM takes one call for each step"


def _linear_multistep() -> Iterator[Case]:
    for spacing, to_one in product(("leading", "trailing", "linspace"), (False, True)):
        theirs: Options = {"timestep_spacing": spacing, "set_alpha_to_one": to_one}
        if spacing == "linspace":
            yield Case("PNDMScheduler", theirs, "pndm", {}, 20, cause=_STRIDE)
        else:
            cause = _ADAMS if to_one else _NOWHERE if spacing == "leading" else ""
            yield Case("PNDMScheduler", theirs, "pndm", {}, 20, first_step=-1, cause=cause)
    for spacing in ("leading", "trailing", "linspace"):
        theirs = {"timestep_spacing": spacing, "skip_prk_steps": True}
        cause = f"{_STRIDE}; {_PLMS}" if spacing == "linspace" else _PLMS
        yield Case("PNDMScheduler", theirs, "ipndm-4", {}, 20, more_calls=1, cause=cause)


_SIGN = (
    "order: in the third-order step the weight of their second difference ends in -0.5 where its expansion, and k-diffusion, "
    "have +0.5, so that it does not vanish with the step"
)


def _stochastic() -> Iterator[Case]:
    for final in ("sigma_min", "zero"):
        for kind in ("midpoint", "heun"):
            theirs: Options = {"algorithm_type": "sde-dpmsolver++", "solver_type": kind, "final_sigmas_type": final}
            yield Case("DPMSolverMultistepScheduler", theirs, "dpmpp-2m-sde", {"solver_type": kind}, 10)
        theirs = {
            "algorithm_type": "sde-dpmsolver++",
            "solver_order": 3,
            "solver_type": "heun",
            "final_sigmas_type": final,
        }
        yield Case("DPMSolverMultistepScheduler", theirs, "dpmpp-3m-sde", {}, 10, first_step=3, cause=_SIGN)
    for steps, spacing in product((1, 2, 10, 20), ("linspace", "trailing")):  # in epsilon; they refuse zero
        theirs = {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "timestep_spacing": spacing}
        first: Options = {"order": 1, "predict": "eps"}
        yield Case("DPMSolverMultistepScheduler", {**theirs, "solver_order": 1}, "seeds", first, steps)
        for kind in ("midpoint", "heun"):
            ours: Options = {"predict": "eps", "solver_type": kind}
            both = {**theirs, "solver_type": kind, "solver_order": 2}
            yield Case("DPMSolverMultistepScheduler", both, "dpmpp-2m-sde", ours, steps)
    for spacing in ("leading", "trailing"):
        yield Case("DPMSolverSDEScheduler", {"timestep_spacing": spacing}, "dpmpp-sde", nodes="exact")
    for (predictor, corrector), tau in product(((1, 1), (2, 2), (3, 4)), (always, never)):
        theirs = {"predictor_order": predictor, "corrector_order": corrector, "tau_func": tau}
        ours = {
            "predictor_order": predictor,
            "corrector_order": corrector,
            "tau": float(tau(0)),
            "weights": "published",
        }
        ours |= {"tau_start": math.inf, "tau_end": 0.0, "lower_order_final": True}
        yield Case("SASolverScheduler", theirs, "sa-solver", ours)


def always(t: float) -> int:
    """SA-Solver's tau at a training step: noise everywhere."""
    return 1


def never(t: float) -> int:
    """SA-Solver's tau at a training step: no noise."""
    return 0
