"""From a plan to another plan."""

from __future__ import annotations

import math
from dataclasses import replace

from samplers.plan import Plan
from samplers.program import Combine, Evaluate


def analytical_first_step(plan: Plan) -> Plan:
    """The plan without its first network call: epsilon there is `x / sqrt(alpha^2 + sigma^2)` (AFS).

    At the noise level where sampling starts the data hardly shows, and the state divided by its standard deviation, for data
    of unit variance, is close to the network's epsilon ("analytical first step" of Dockhorn et al. 2022, GENIE,
    arXiv:2210.05475). Where the plan takes x0 the same is `x0 = (x - sigma eps) / alpha`. Everything else stays: the Evaluate
    becomes a Combine of the same name, which an exported plan shows, and the sampler's name gets "+afs".

    Raises:
        ValueError: the plan's first call is its only one, or lies at alpha = 0, where no epsilon exists.
    """
    if plan.nfe < 2:
        raise ValueError(
            "afs=True replaces the first network call, and this plan has no other: it needs a step or call more"
        )
    first, call = next((i, step) for i, step in enumerate(plan.instructions) if isinstance(step, Evaluate))
    if call.alpha == 0:
        raise ValueError(
            f"afs=True needs alpha > 0 at the first network call, and this grid starts at alpha = 0 (t={call.t:g}), where no "
            "epsilon exists; start lower, or sample with afs=False"
        )
    std = math.hypot(call.alpha, call.sigma)
    # (1 - sigma / std) / alpha without the cancellation
    factor = 1.0 / std if call.kind == "eps" else call.alpha / (std * (std + call.sigma))
    known = Combine(call.dst, ((call.src, factor),))
    instructions = (*plan.instructions[:first], known, *plan.instructions[first + 1 :])
    return replace(plan, instructions=instructions, sampler=f"{plan.sampler}+afs")
