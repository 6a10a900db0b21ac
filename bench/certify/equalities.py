"""Certificates of equality: samplers that are one, shown on the coefficients of their plans, and a detector of more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from bench.certify.order import SCHEDULES
from bench.certify.settings import Options, choices, text
from samplers import Plan, make_plan
from samplers.program import Evaluate
from samplers.registry import SAMPLERS, Sampler

Row = dict[str, Any]
STEPS = 8
DETECTED_AT = (8, 16)  # steps: most samplers lower the order of the last steps of fewer than 15, some never
FINALS = ("t_min", "zero")
GRIDS = ("logsnr", "quadratic", "uniform")


class Identity(NamedTuple):
    """Two settings that are one plan.

    Attributes:
        claim: in words.
        a, b: sampler and options.
        finals: the ways to end for which it holds.
        steps: of the plans.
    """

    claim: str
    a: tuple[str, Options]
    b: tuple[str, Options]
    finals: tuple[str, ...] = FINALS
    steps: int = STEPS


IDENTITIES: tuple[Identity, ...] = (
    Identity("DDIM is Euler in sigma/alpha", ("ddim", {}), ("euler", {})),
    Identity("DDIM is DPM-Solver-1", ("ddim", {}), ("dpm-solver-1", {})),
    Identity("DPM-Solver++(1) is DDIM", ("eab-1", {"predict": "x0"}), ("ddim", {})),
    Identity("DPM-Solver++(3S) with steps of order 1 is DDIM", ("dpmpp-3s", {"orders": [1] * STEPS}), ("ddim", {})),
    Identity(
        "DDIM with eta = 1 is DDPM with fixed_small", ("ddim", {"eta": 1.0}), ("ddpm", {"variance": "fixed_small"})
    ),
    Identity("DDIM with eta = 1 is Euler ancestral", ("ddim", {"eta": 1.0}), ("euler-ancestral", {})),
    Identity("EDM without churn is Heun", ("edm", {"s_churn": 0.0}), ("heun", {})),
    Identity("UniPC-1 without corrector is DDIM", ("unipc-1", {"corrector": False}), ("ddim", {})),
    Identity("iPNDM-1 is DDIM", ("ipndm-1", {}), ("ddim", {})),
    *(
        Identity(f"{name}-1 is DDIM", (f"{name}-1", options), ("ddim", {}))
        for name, options in (("lms", {}), ("ipndm-v", {}), ("deis", {"variant": "rhoab"}))
    ),
    *(
        Identity(f"LMS-{k} is variable-step iPNDM-{k}", (f"lms-{k}", {}), (f"ipndm-v-{k}", {}), ("t_min",))
        for k in (2, 3, 4)
    ),
    *(
        Identity(
            f"DEIS-{k} rhoAB is variable-step iPNDM-{k}",
            (f"deis-{k}", {"variant": "rhoab", "lower_order_final": False}),
            (f"ipndm-v-{k}", {}),
        )
        for k in (2, 3, 4)
    ),
    *(
        Identity(
            f"DEIS-{k} rhoAB is {name} as they are, from 15 steps on",
            (f"deis-{k}", {"variant": "rhoab"}),
            (f"{member}-{k}", {}),
            finals,
            16,
        )
        for name, member, finals in (("LMS", "lms", ("t_min",)), ("variable-step iPNDM", "ipndm-v", FINALS))
        for k in (2, 3, 4)
    ),
    *(
        Identity(
            f"SDE-DPM-Solver with eta = {eta:g}, one step, is SEEDS-1",
            ("dpmpp-2m-sde", sde),
            ("seeds", sde | {"order": 1}),
            steps=1,
        )
        for eta in (0.5, 1.0)
        for sde in ({"predict": "eps", "eta": eta},)
    ),
    Identity(
        "SDE-DPM-Solver-2M with eta = 0 is DPM-Solver-2M",
        ("dpmpp-2m-sde", {"predict": "eps", "eta": 0.0}),
        ("dpm-solver-2m", {}),
    ),
    Identity(
        "DPM-Solver-2S with its inner point at the end is Heun",
        ("dpm-solver-2s", {"r1": 1.0, "solver_type": "midpoint"}),
        ("heun", {}),
    ),
    *(
        Identity(
            f"{name} with the exact second weight is exponential Adams-Bashforth 2",
            (name, {"solver_type": "heun", "lower_order_final": False}),
            ("eab-2", {"predict": predict, "lower_order_final": False}),
        )
        for name, predict in (("dpmpp-2m", "x0"), ("dpm-solver-2m", "eps"))
    ),
)


def difference(a: Plan, b: Plan) -> float:
    """The largest difference of two plans' coefficients over the largest coefficient; inf where they call elsewhere."""
    if (a.nfe, a.noises) != (b.nfe, b.noises) or not np.allclose(_times(a), _times(b), rtol=1e-9, atol=1e-9):
        return math.inf
    kind = "x0" if any(isinstance(s, Evaluate) and s.alpha == 0 for p in (a, b) for s in p.instructions) else "eps"
    left, right = a.matrix(kind), b.matrix(kind)
    return float(np.abs(left - right).max() / max(np.abs(left).max(), np.abs(right).max()))


def identity_rows(identity: Identity) -> Iterator[Row]:
    """One row for each schedule, grid and ending."""
    missing = [name for name, _ in (identity.a, identity.b) if name not in SAMPLERS]
    head = {"kind": "identity", "claim": identity.claim, "members": " = ".join(map(_label, (identity.a, identity.b)))}
    if missing:
        yield head | {"status": "not run", "note": f"not registered: {', '.join(missing)}"}
        return
    for (schedule, where), grid, final in product(SCHEDULES.items(), GRIDS, identity.finals):
        a, b = (
            make_plan(name, where, steps=identity.steps, grid=grid, final=final, **options)
            for name, options in (identity.a, identity.b)
        )
        row = head | {
            "schedule": schedule,
            "grid": grid,
            "final": final,
            "steps": identity.steps,
            "difference": difference(a, b),
        }
        yield row | {"status": "pass" if a.close(b) else "fail", "note": ""}


def detect(
    entries: Iterable[Sampler], schedule: str, grid: str, final: str = "t_min", steps: int = STEPS
) -> Iterator[Row]:
    """Groups of registered names, under default or named settings, that give the same plan there.

    Settings of one name that coincide are not reported on their own, only in a group with another name.
    """
    groups: list[tuple[Plan, list[tuple[str, Options]]]] = []
    for entry in entries:
        if entry.adaptive:
            continue
        for options in _settings(entry):
            plan = make_plan(entry.name, SCHEDULES[schedule], steps=steps, grid=grid, final=final, **options)
            for first, members in groups:
                if plan.close(first):
                    members.append((entry.name, options))
                    break
            else:
                groups.append((plan, [(entry.name, options)]))
    for first, members in groups:
        if len({name for name, _ in members}) > 1:
            where = {"schedule": schedule, "grid": grid, "final": final, "steps": steps}
            row: Row = {"kind": "detected", "claim": "the same plan", "members": " = ".join(map(_label, members))}
            apart = max(difference(first, _plan(member, where)) for member in members)
            yield row | where | {"difference": apart, "status": "for the record", "note": ""}


def _settings(entry: Sampler) -> list[Options]:
    """The default, every named choice, and the stochastic option at 0 and 1; without repetitions."""
    switch = entry.stochastic if entry.stochastic in entry.options else None
    levels: list[Options] = [{}] if switch is None else [{switch: 0.0}, {switch: 1.0}]
    found = [{}, *({**level, **chosen} for level in levels for chosen in choices(entry))]
    full = [{**entry.options, **options} for options in found]
    return [options for i, options in enumerate(found) if full[i] not in full[:i]]


def _plan(member: tuple[str, Options], where: Row) -> Plan:
    name, options = member
    rest = {key: where[key] for key in ("steps", "grid", "final")}
    return make_plan(name, SCHEDULES[where["schedule"]], **rest, **options)


def _times(plan: Plan) -> list[float]:
    return [s.t for s in plan.instructions if isinstance(s, Evaluate)]


def _label(member: tuple[str, Options]) -> str:
    name, options = member
    return f"{name} ({text(options)})" if options else name
