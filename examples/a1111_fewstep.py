"""fewstep's samplers in AUTOMATIC1111's stable-diffusion-webui.

Save this file as `extensions/fewstep/scripts/fewstep.py` and install fewstep into the web UI's Python. The samplers are then in
its list, as "fewstep dpmpp-2m" and so on, with the web UI's seeds, eta, live preview and schedules.
"""

from __future__ import annotations

from functools import wraps

import k_diffusion.sampling
from modules import sd_samplers
from modules.sd_samplers_common import SamplerData
from modules.sd_samplers_kdiffusion import KDiffusionSampler

from samplers import list_samplers
from samplers.adapters.k_diffusion import register


def seeded(function):
    """The sampler, with noise from where the web UI puts each picture's own: the `torch` of k-diffusion's module."""

    @wraps(function)
    def sample(model, x, sigmas, *args, noise_sampler=None, **kwargs):
        draw = noise_sampler or (lambda sigma, sigma_next: k_diffusion.sampling.torch.randn_like(x))
        return function(model, x, sigmas, *args, noise_sampler=draw, **kwargs)

    return sample


for sampler in list_samplers():
    (name,) = register(k_diffusion.sampling, [sampler.name])
    if sampler.stochastic != "no":
        setattr(k_diffusion.sampling, f"sample_{name}", seeded(getattr(k_diffusion.sampling, f"sample_{name}")))
    options = {"second_order": sampler.calls > 1, "brownian_noise": name.endswith("sde")}
    data = SamplerData(
        f"fewstep {sampler.name}", lambda model, f=f"sample_{name}": KDiffusionSampler(f, model), [name], options
    )
    if data.name not in sd_samplers.all_samplers_map:
        sd_samplers.all_samplers.append(data)
        sd_samplers.all_samplers_map[data.name] = data
sd_samplers.set_samplers()
