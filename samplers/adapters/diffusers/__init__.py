"""Between diffusers and here: its networks as epsilon-models, and every sampler of the registry as a scheduler of its pipelines."""

from samplers.adapters.diffusers.models import DiffusersNet, eps_model_from_diffusers

__all__ = ["DiffusersNet", "eps_model_from_diffusers"]
