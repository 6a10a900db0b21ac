"""fewstep's samplers and time grids in ComfyUI.

Copy this folder into `ComfyUI/custom_nodes/` and install fewstep into ComfyUI's Python (`pip install fewstep`). Then

- every sampler is in the lists of KSampler and KSamplerSelect, as `fewstep_dpmpp_2m`, `fewstep_unipc_3`, ...;
- "Sampler (fewstep)" is one with its options, for SamplerCustom and SamplerCustomAdvanced;
- "Sigmas (fewstep)" is a time grid on the model's own noise schedule, to go with it.

Noise is ComfyUI's own, from the seed of the sampler node: equal seeds give the pictures of ComfyUI's samplers where the two
are the same method.
"""

from __future__ import annotations

import json
from typing import Any

import comfy.k_diffusion.sampling as host
import comfy.samplers
import numpy as np
import torch

from samplers import grids, list_samplers, schedules
from samplers.adapters.k_diffusion import sampler_function

SAMPLERS = {sampler.name: sampler for sampler in list_samplers()}
OWN = -1.0  # what a number widget shows where the sampler's own default is meant
FIRST = "dpmpp-2m"


def with_comfy_noise(name: str, **options: Any) -> Any:
    """A sampler whose noise is drawn as ComfyUI draws it for its own: a Brownian tree for DPM-Solver++ SDE, else a generator."""
    function = sampler_function(name, **options)
    if SAMPLERS[name].stochastic == "no":
        return function

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None, **more):
        seed = (extra_args or {}).get("seed")
        if noise_sampler is None and name.startswith("dpmpp") and name.endswith("sde"):
            low, high = sigmas[sigmas > 0].min(), sigmas.max()
            noise_sampler = host.BrownianTreeNoiseSampler(x, low, high, seed=seed, cpu=True)
        elif noise_sampler is None:
            noise_sampler = host.default_noise_sampler(x, seed=seed)
        return function(model, x, sigmas, extra_args, callback, disable, noise_sampler=noise_sampler, **more)

    sample.__name__ = function.__name__
    return sample


def add_to_lists() -> None:
    """Every sampler into the lists of ComfyUI's own nodes, which find `sample_NAME` in its module of samplers."""
    for name in SAMPLERS:
        function = with_comfy_noise(name)
        shown = "fewstep_" + function.__name__.removeprefix("sample_")
        setattr(host, f"sample_{shown}", function)
        for known in (comfy.samplers.KSAMPLER_NAMES, comfy.samplers.SAMPLER_NAMES, comfy.samplers.KSampler.SAMPLERS):
            if shown not in known:
                known.append(shown)


class SamplerFewstep:
    """A sampler with its options, as ComfyUI's SAMPLER."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    CATEGORY = "sampling/custom_sampling/samplers"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The widgets: the name, the amount of noise and its scale (-1: the sampler's own), and further options."""
        own = {"default": OWN, "min": OWN, "max": 100.0, "step": 0.01, "round": False}
        options = {
            "default": "",
            "multiline": True,
            "tooltip": "one NAME=VALUE a line, such as lower_order_final=false",
        }
        return {
            "required": {"sampler": (list(SAMPLERS), {"default": FIRST})},
            "optional": {"eta": ("FLOAT", own), "s_noise": ("FLOAT", own), "options": ("STRING", options)},
        }

    def get_sampler(self, sampler: str, eta: float = OWN, s_noise: float = OWN, options: str = "") -> tuple[Any]:
        """The sampler; an option that it does not have is an error, not ignored."""
        given = {name: value for name, value in (("eta", eta), ("s_noise", s_noise)) if value >= 0}
        return (comfy.samplers.KSAMPLER(with_comfy_noise(sampler, **given, **parsed(options))),)


class SigmasFewstep:
    """A time grid on the model's noise schedule, as ComfyUI's SIGMAS."""

    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "get_sigmas"
    CATEGORY = "sampling/custom_sampling/schedulers"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The widgets: whose schedule, the grid's name or that which a sampler recommends, and the steps."""
        steps = {"default": 10, "min": 1, "max": 1000}
        denoise = {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "grid": (["recommended", *grids.GRIDS],),
                "sampler": (list(SAMPLERS), {"default": FIRST, "tooltip": "whose recommended grid"}),
                "steps": ("INT", steps),
                "denoise": ("FLOAT", denoise),
            }
        }

    def get_sigmas(self, model: Any, grid: str, sampler: str, steps: int, denoise: float = 1.0) -> tuple[torch.Tensor]:
        """Steps + 1 sigmas that end at 0; with denoise below 1, the last of a grid that is longer by as much."""
        sampling = model.get_model_object("model_sampling")
        schedule, table = noise_schedule(sampling)
        name = SAMPLERS[sampler].grid_on(schedule) if grid == "recommended" else grid
        t = grids.make_grid(schedule, name, int(steps / denoise), "zero").t[-(steps + 1) :]
        sigmas = np.interp(t, *table) if table is not None else np.abs(schedule.sigma_bar(t))
        return (torch.from_numpy(sigmas).float(),)


def noise_schedule(sampling: Any) -> tuple[Any, Any]:
    """The schedule of a `model_sampling`; and of a flow its table of (u, sigma), through which ComfyUI shifts the nodes."""
    if any(kind.__name__ == "CONST" for kind in type(sampling).__mro__):
        sigmas = np.append(0.0, sampling.sigmas.double().cpu().numpy())
        return schedules.flow(), (np.linspace(0.0, 1.0, len(sigmas)), sigmas)
    if hasattr(sampling, "num_timesteps"):
        return schedules.from_alphas_cumprod(1.0 / (1.0 + sampling.sigmas.double().cpu() ** 2)), None
    return schedules.edm(float(sampling.sigma_min), float(sampling.sigma_max)), None


def parsed(text: str) -> dict[str, Any]:
    """NAME=VALUE lines; a value is JSON, or else a word such as bh2."""
    found: dict[str, Any] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            raise ValueError(f"options: one NAME=VALUE a line, got {line!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


add_to_lists()
NODE_CLASS_MAPPINGS = {"SamplerFewstep": SamplerFewstep, "SigmasFewstep": SigmasFewstep}
NODE_DISPLAY_NAME_MAPPINGS = {"SamplerFewstep": "Sampler (fewstep)", "SigmasFewstep": "Sigmas (fewstep)"}
