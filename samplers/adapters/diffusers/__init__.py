"""Between diffusers and here: its networks as epsilon-models, and every sampler with a plan as a scheduler of its pipelines."""

from typing import TYPE_CHECKING, Any

from samplers.adapters.diffusers.models import DiffusersNet, eps_model_from_diffusers

if TYPE_CHECKING:
    from samplers.adapters.diffusers.plan_scheduler import PlanScheduler, PlanSchedulerOutput

__all__ = ["DiffusersNet", "PlanScheduler", "PlanSchedulerOutput", "eps_model_from_diffusers"]


def __getattr__(name: str) -> Any:
    """The schedulers, whose base classes diffusers takes seconds to import."""
    if name in ("PlanScheduler", "PlanSchedulerOutput"):
        from samplers.adapters.diffusers import plan_scheduler

        return getattr(plan_scheduler, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
