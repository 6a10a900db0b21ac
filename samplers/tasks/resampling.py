"""RePaint's resampling as a plan: down some steps, back up by adding noise, and down again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from samplers.draft import Draft
from samplers.grid import Grid
from samplers.job import Job, prepare
from samplers.model import EpsModel
from samplers.plan import Plan
from samplers.program import START, Evaluate
from samplers.tasks.img2img import from_strength


def resampled(make: Callable[[Grid], Plan], grid: Grid, resamplings: int, jump: int) -> Plan:
    """The plan of a sampler that goes over every `jump` steps of a grid several times.

    Lugmayr et al. 2022, RePaint, arXiv:2201.09865, section 4.2: at a node `jump` steps further down the state is noised back up
    by the forward process, and sampled down again, until these steps were taken `resamplings` times. Counted from the end of
    the grid; the first steps, where the state is noise, are taken once. Each way down starts the sampler anew, as the outputs
    from before the noise belong to another path: a multistep method needs `jump` of its order or more to gain by it.

    Args:
        make: the sampler, from nodes to a plan.
        grid: the nodes.
        resamplings: how often each `jump` steps are taken, at least 1.
        jump: steps of one way down, at least 1 and less than the grid has.

    Returns:
        One plan, whose `nfe` counts every call. A step's end is reported on the last way only.

    Raises:
        ValueError: a value out of range.
    """
    if grid.steps < 2:
        raise ValueError(f"resampling needs at least 2 steps, got {grid.steps}")
    for name, value, most in (("resamplings", resamplings, math.inf), ("jump", jump, grid.steps - 1)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            wanted = "at least 1" if most == math.inf else f"1 to {most}, less than the grid's {grid.steps} steps"
            raise ValueError(f"{name} must be a whole number, {wanted}, got {value!r}")
    ends = list(range(grid.steps, 0, -jump))[::-1]
    whole = Grid(grid.schedule, grid.t)
    parts = {
        (start, end): make(Grid(grid.schedule, grid.t[start : end + 1]))
        for start, end in zip([0, *ends], ends, strict=False)
    }
    p = Draft(whole, next(iter(parts.values())).prediction, first_step=False)
    x = p.x
    for (start, end), part in parts.items():
        ways = resamplings if start > 0 else 1
        for way in range(ways):
            if way > 0:
                ratio = p.alpha[start] / p.alpha[end]
                added = p.sigma[start] ** 2 - (ratio * p.sigma[end]) ** 2
                x = p.combine(None, (x, ratio), (p.noise(), math.sqrt(added)))
            x = _append(p, part, x, start if way == ways - 1 else None)
    return p.plan()


def prepare_resampled(
    model: EpsModel, sampler: str, resamplings: int, jump: int, how: Mapping[str, Any], strength: float = 1.0
) -> tuple[Job, Plan | None]:
    """A sampler made ready to run, and its resampled plan; None where `resamplings` is 1.

    Args:
        model, sampler, strength: as for `img2img`.
        resamplings, jump: as for `resampled`.
        how: other arguments of `samplers.sample`; `nfe` is the budget of the whole, resampling included.

    Raises:
        ValueError, TypeError: as `img2img` and `resampled`; resampling with an error-controlled sampler, with afs, or with a
            budget that is too small for it.
    """
    job = from_strength(prepare(model, sampler, **how), strength)
    if resamplings == 1:
        return job, None
    if job.entry.adaptive:
        raise ValueError(f"sampler {sampler!r} has no plan to resample: resamplings must be 1, got {resamplings!r}")
    if job.afs:
        raise ValueError(
            "afs=True begins with start noise, which resampling adds at other nodes too; give resamplings=1"
        )
    budget = how.get("nfe")
    if budget is None:
        return job, _of_job(job, resamplings, jump)
    # its grid was made for one way down: the longest that, with resampling, keeps to the budget is looked for
    plan, steps = None, min(budget, math.ceil((budget // max(resamplings, 1) + jump) / strength)) + 1
    while plan is None or plan.nfe > budget:
        steps -= 1
        job = from_strength(prepare(model, sampler, **{**how, "nfe": None, "steps": steps}), strength)
        if plan is not None and job.grid.steps <= jump:
            raise ValueError(
                f"nfe must be at least {plan.nfe} for resamplings={resamplings} and jump={jump}, got {budget}"
            )
        plan = _of_job(job, resamplings, jump)
    return job, plan


def _of_job(job: Job, resamplings: int, jump: int) -> Plan:
    def make(grid: Grid) -> Plan:
        return job.entry.plan(grid, **job.options)

    plan = resampled(make, job.grid, resamplings, jump)
    return replace(plan, sampler=f"{job.entry.name}+resampled")


def _append(p: Draft, part: Plan, x: str, first: int | None) -> str:
    """The instructions of `part` on state x; its nodes are counted from `first`, or not told where that is None."""
    names = {START: x}
    for step in part.instructions:
        if isinstance(step, Evaluate):
            names[step.dst] = p.evaluate_at(names[step.src], step.t, step.alpha, step.sigma, step.kind)
        else:
            for name, _ in step.terms:
                if name not in names:  # a noise that is used for the first time
                    names[name] = p.noise()
            node = None if first is None or step.node is None else first + step.node
            names[step.dst] = p.combine(node, *((names[name], coefficient) for name, coefficient in step.terms))
    return names[part.instructions[-1].dst]
