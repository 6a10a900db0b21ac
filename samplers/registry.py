"""The table of samplers: every name, with what it is and the function that builds its plan."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from numbers import Integral, Real
from typing import Any

from samplers.errors import unknown
from samplers.grid import Grid
from samplers.plan import Plan
from samplers.schedule import Schedule
from samplers.solvers.exponential import multistep, singlestep
from samplers.solvers.first_order import ddim, ddpm, euler, euler_ancestral, heun


@dataclass(frozen=True)
class Sampler:
    """One entry of the registry.

    Attributes:
        name: as `sample` and `make_plan` take it.
        build: `(grid, **options) -> Plan`; None where the method is error-controlled and has no plan.
        family: samplers that share a paper or a formula.
        order: of convergence as the step shrinks; for a stochastic sampler, of its mean.
        stochastic: "no", "yes", or the option that makes it so.
        calls: network calls of a full step.
        grid: the recommended grid, used where none is given.
        reference: where it was published.
        mixed_orders: under `nfe=`, steps of lower order fill the budget.
        options: names and defaults of what it accepts.
    """

    name: str
    build: Callable[..., Plan] | None = field(repr=False)
    family: str
    order: int
    stochastic: str
    calls: int
    grid: str
    reference: str
    mixed_orders: bool = False
    adaptive_options: tuple[tuple[str, Any], ...] = field(default=(), repr=False)

    @cached_property
    def options(self) -> dict[str, Any]:
        """The sampler's own options and their defaults."""
        if self.build is None:
            return dict(self.adaptive_options)
        bound = self.build.keywords if isinstance(self.build, partial) else {}
        parameters = inspect.signature(self.build).parameters
        return {name: p.default for name, p in parameters.items() if name != "grid" and name not in bound}

    @property
    def adaptive(self) -> bool:
        """Whether it chooses its steps by an error estimate while sampling."""
        return self.build is None

    def grid_on(self, schedule: Schedule) -> str:
        """The recommended grid; "uniform" where the schedule starts at alpha = 0, whose log-SNR is infinite."""
        return self.grid if schedule.alpha(schedule.t_max) > 0 else "uniform"

    def plan(self, grid: Grid, **options: Any) -> Plan:
        """The plan on a grid, under this sampler's name."""
        if self.build is None:
            raise ValueError(f"sampler {self.name!r} chooses its steps while it samples and has no plan; call sample()")
        plan = self.build(grid, **options)
        object.__setattr__(plan, "sampler", self.name)  # ours alone until returned; a copy would validate it again
        return plan

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise ValueError for an option this sampler does not have, TypeError for one that should be a number and is not."""
        for name, value in options.items():
            if name not in self.options:
                raise unknown(f"option of sampler {self.name!r}:", name, self.options or ("none",))
            default = self.options[name]
            wanted = Real if isinstance(default, float) else Integral if isinstance(default, int) else object
            if not isinstance(value, wanted) or (isinstance(default, float) and isinstance(value, bool)):
                raise TypeError(f"{name} of sampler {self.name!r} must be like its default {default}, got {value!r}")


_DDPM, _DDIM = "Ho et al. 2020, arXiv:2006.11239", "Song et al. 2021, arXiv:2010.02502"
_EDM, _KDIFF = "Karras et al. 2022, arXiv:2206.00364", "Crowson 2022, k-diffusion"
_DPM, _DPMPP = "Lu et al. 2022, arXiv:2206.00927", "Lu et al. 2022, arXiv:2211.01095"
_DOPRI = "Dormand & Prince 1980, doi:10.1016/0771-050X(80)90013-3"


_FIRST = partial(singlestep, prediction="eps", order=1, solver_type="midpoint", r1=None, r2=None, orders=None)
_SECOND = partial(singlestep, prediction="eps", order=2, r2=None)
_THIRD = partial(singlestep, prediction="eps", order=3)


_TABLE = (
    Sampler("ddpm", ddpm, "ddpm", 1, "yes", 1, "uniform", _DDPM),
    Sampler("ddim", ddim, "ddim", 1, "eta", 1, "uniform", _DDIM),
    Sampler("euler", euler, "euler", 1, "no", 1, "uniform", _EDM),
    Sampler("euler-ancestral", euler_ancestral, "euler", 1, "eta", 1, "uniform", _KDIFF),
    Sampler("heun", heun, "heun", 2, "no", 2, "karras", _EDM),
    Sampler("dpm-solver-1", _FIRST, "dpm-solver", 1, "no", 1, "logsnr", _DPM),
    Sampler("dpm-solver-2s", _SECOND, "dpm-solver", 2, "no", 2, "logsnr", _DPM, mixed_orders=True),
    Sampler("dpm-solver-3s", _THIRD, "dpm-solver", 3, "no", 3, "logsnr", _DPM, mixed_orders=True),
    Sampler("dpm-solver-2m", partial(multistep, prediction="eps"), "dpm-solver", 2, "no", 1, "logsnr", _DPMPP),
    Sampler("dpmpp-2m", partial(multistep, prediction="x0"), "dpm-solver++", 2, "no", 1, "logsnr", _DPMPP),
    Sampler("rk45", None, "adaptive", 5, "no", 6, "uniform", _DOPRI, adaptive_options=(("rtol", 1e-5), ("atol", 1e-5))),
)
SAMPLERS: dict[str, Sampler] = {sampler.name: sampler for sampler in _TABLE}


def get_sampler(name: str) -> Sampler:
    """The registry's entry.

    Raises:
        ValueError: an unknown name; the message offers the closest ones.
    """
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    return SAMPLERS[name]


def list_samplers() -> list[Sampler]:
    """Every sampler, with family, order, stochasticity, calls per step, recommended grid and reference."""
    return list(SAMPLERS.values())
