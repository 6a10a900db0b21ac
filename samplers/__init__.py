"""Samplers of diffusion models as data: schedules, the epsilon-model, plans, and the executor that runs them."""

from samplers import grid as grids
from samplers import guidance, tasks
from samplers import schedule as schedules
from samplers.errors import SamplingError
from samplers.execute import Progress, run_plan
from samplers.learned import LearnedPlan
from samplers.meter import metered
from samplers.model import EpsModel
from samplers.plan import Plan, PlanError
from samplers.registry import Sampler, list_samplers
from samplers.sampling import make_plan, sample

__all__ = [
    "EpsModel",
    "LearnedPlan",
    "Plan",
    "PlanError",
    "Progress",
    "Sampler",
    "SamplingError",
    "grids",
    "guidance",
    "list_samplers",
    "make_plan",
    "metered",
    "run_plan",
    "sample",
    "schedules",
    "tasks",
]
