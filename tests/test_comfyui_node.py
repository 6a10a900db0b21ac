"""The node file for ComfyUI and the script for A1111, in small stand-ins that keep those hosts' contracts.

ComfyUI (comfy/samplers.py, comfy/k_diffusion/sampling.py, comfy/model_sampling.py): a SAMPLER is a `KSAMPLER(function,
extra_options)` whose `sample` scales the noise, wraps the model and calls the function by these very keywords.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
import types
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from samplers import EpsModel, grids, list_samplers, sample, schedules

EXAMPLES = Path(__file__).parent.parent / "examples"
NOISE = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SEED = 11
SD = schedules.from_betas(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


class CONST:
    def noise_scaling(self, sigma, noise, latent):
        return sigma * noise + (1.0 - sigma) * latent

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1.0 - sigma)


class EPS:
    def noise_scaling(self, sigma, noise, latent):
        return noise * sigma + latent

    def inverse_noise_scaling(self, sigma, latent):
        return latent


class Flux(CONST):
    def __init__(self, shift):
        u = torch.arange(1, 10001, dtype=torch.float64) / 10000
        self.sigmas = (shift * u / (1 + (shift - 1) * u)).float()


class Discrete(EPS):
    num_timesteps = 1000
    sigmas = torch.from_numpy(SD.sigma_bar(np.arange(1000.0))).float()


class Continuous(EPS):
    sigma_min, sigma_max = torch.tensor(0.002), torch.tensor(120.0)


class ModelPatcher:
    """A MODEL."""

    def __init__(self, mixture, sampling):
        self.mixture, self.model_sampling = mixture, sampling

    def get_model_object(self, name):
        return getattr(self, name)

    def denoised(self, x, sigma):
        alpha = 1 - sigma if isinstance(self.model_sampling, CONST) else torch.ones_like(sigma)
        return self.mixture.x0(x, alpha, sigma)


class Inpaint:
    """What a sampler function gets as its model: two wrappers around what says how it is sampled."""

    def __init__(self, model):
        self.inner_model = types.SimpleNamespace(inner_model=model)

    def __call__(self, x, sigma, denoise_mask, model_options, seed):
        assert sigma.shape == (len(x),)
        assert seed == SEED
        return self.inner_model.inner_model.denoised(x, sigma)


class KSAMPLER:
    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.function, self.extra_options = sampler_function, extra_options or {}

    def sample(self, model, sigmas, noise, latent, callback=None):
        """As in ComfyUI, but for the guider's part; `callback(step, x0, x, total_steps)`."""
        scaling, steps = model.model_sampling, len(sigmas) - 1
        told = None if callback is None else lambda d: callback(d["i"], d["denoised"], d["x"], steps)
        x = self.function(
            Inpaint(model),
            scaling.noise_scaling(sigmas[0], noise, latent),
            sigmas,
            extra_args={"denoise_mask": None, "model_options": {}, "seed": SEED},
            callback=told,
            disable=True,
            **self.extra_options,
        )
        return scaling.inverse_noise_scaling(sigmas[-1], x)


class BrownianTreeNoiseSampler:
    """A path over sigma by bridges between the levels that are asked for in falling order."""

    def __init__(self, x, sigma_min, sigma_max, seed=None, transform=lambda x: x, cpu=False):
        assert cpu
        self.generator, self.like = torch.Generator().manual_seed(seed), x
        self.level = float(sigma_max)

    def __call__(self, sigma, sigma_next):
        assert float(sigma) == pytest.approx(self.level)
        self.level = float(sigma_next)
        return torch.randn(self.like.shape, generator=self.generator, dtype=self.like.dtype)


def default_noise_sampler(x, seed=None):
    generator = torch.Generator().manual_seed(seed + 1)
    return lambda sigma, sigma_next: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def stand_ins():
    names = ["comfy", "comfy.samplers", "comfy.k_diffusion", "comfy.k_diffusion.sampling"]
    modules = {name: types.ModuleType(name) for name in names}
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, modules[name])
    lists = modules["comfy.samplers"]
    lists.KSAMPLER, lists.KSAMPLER_NAMES = KSAMPLER, ["euler", "dpmpp_2m"]
    lists.SAMPLER_NAMES = [*lists.KSAMPLER_NAMES, "ddim", "uni_pc"]
    lists.KSampler = type("KSampler", (), {"SAMPLERS": lists.SAMPLER_NAMES})
    host = modules["comfy.k_diffusion.sampling"]
    host.BrownianTreeNoiseSampler, host.default_noise_sampler = BrownianTreeNoiseSampler, default_noise_sampler
    return modules


def load(path):
    spec = importlib.util.spec_from_file_location(f"example_{path.parent.name}_{path.stem.strip('_')}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def comfy():
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins().items():
            patch.setitem(sys.modules, name, module)
        yield sys.modules["comfy"], load(EXAMPLES / "comfyui_fewstep" / "__init__.py")


def node_of(nodes, name):
    """A node as ComfyUI makes and calls it: by class, by the name of its function, with keywords."""
    kind = nodes.NODE_CLASS_MAPPINGS[name]
    assert set(kind.INPUT_TYPES()) <= {"required", "optional", "hidden"}
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS[name]
    return lambda **inputs: getattr(kind(), kind.FUNCTION)(**inputs)


def test_nodes_return_what_they_declare(comfy, mixture):
    _, nodes = comfy
    assert nodes.SamplerFewstep.RETURN_TYPES == ("SAMPLER",)
    assert nodes.SigmasFewstep.RETURN_TYPES == ("SIGMAS",)
    (made,) = node_of(nodes, "SamplerFewstep")(sampler="unipc-3")
    assert isinstance(made, KSAMPLER)
    (sigmas,) = node_of(nodes, "SigmasFewstep")(
        model=ModelPatcher(mixture, Discrete()), grid="karras", sampler="unipc-3", steps=6
    )
    assert sigmas.shape == (7,)
    assert sigmas.dtype == torch.float32
    names = nodes.SamplerFewstep.INPUT_TYPES()["required"]["sampler"][0]
    assert names == [s.name for s in list_samplers()]


@pytest.mark.parametrize("name", ["dpmpp-2m", "unipc-3", "heun", "ipndm-3"])
def test_the_nodes_give_what_sample_gives(comfy, mixture, name):
    _, nodes = comfy
    model = ModelPatcher(mixture, Discrete())
    (sigmas,) = node_of(nodes, "SigmasFewstep")(model=model, grid="recommended", sampler=name, steps=6)
    (sampler,) = node_of(nodes, "SamplerFewstep")(sampler=name)
    told = []
    got = sampler.sample(model, sigmas, NOISE, 0 * NOISE, lambda *given: told.append(given))
    edm = EpsModel(lambda x, t: mixture.x0(x, torch.ones_like(t), t), schedules.edm(0.01, 100.0), "x0")
    expected = sample(edm, name, x_T=NOISE * float(sigmas[0]), sigmas=sigmas)
    assert torch.allclose(got, expected, atol=1e-10)
    assert [(step, total) for step, _, _, total in told] == [(i, 6) for i in range(6)]
    # and on Stable Diffusion's own schedule, in its variance-preserving coordinates
    sd = EpsModel(mixture.net(SD), SD)
    entry = next(s for s in list_samplers() if s.name == name)
    alpha = float(SD.alpha(999.0))
    steps = {"steps": 6, "grid": entry.grid_on(SD), "final": "zero"}
    ours = sample(sd, name, x_T=NOISE * float(sigmas[0]) * alpha, **steps)
    assert torch.allclose(got, ours, atol=1e-5)


@pytest.mark.parametrize("grid", ["karras", "ays", "trailing", "time-quadratic"])
def test_sigmas_of_a_discrete_model(comfy, mixture, grid):
    _, nodes = comfy
    model = ModelPatcher(mixture, Discrete())
    (sigmas,) = node_of(nodes, "SigmasFewstep")(model=model, grid=grid, sampler="ddim", steps=8)
    expected = SD.sigma_bar(grids.make_grid(SD, grid, 8, "zero").t)
    np.testing.assert_allclose(sigmas, expected, rtol=1e-4, atol=1e-12)
    half = {"sampler": "ddim", "steps": 4, "denoise": 0.5}
    assert torch.equal(node_of(nodes, "SigmasFewstep")(model=model, grid=grid, **half)[0], sigmas[-5:])


def test_sigmas_of_other_models(comfy, mixture):
    _, nodes = comfy
    make = node_of(nodes, "SigmasFewstep")
    (sigmas,) = make(model=ModelPatcher(mixture, Continuous()), grid="karras", sampler="ddim", steps=5)
    edges = np.array([120.0 ** (1 / 7), 0.002 ** (1 / 7)])
    np.testing.assert_allclose(sigmas[:-1], np.linspace(*edges, 5) ** 7, rtol=1e-5)
    (flow,) = make(model=ModelPatcher(mixture, Flux(3.0)), grid="sgm", sampler="ddim", steps=4)
    u = np.linspace(1.0, 1e-3, 5)[:-1]
    np.testing.assert_allclose(flow, [*3 * u / (1 + 2 * u), 0.0], atol=1e-6)


@pytest.mark.parametrize("name", ["euler", "dpmpp-2m", "heun"])
def test_a_flow_model(comfy, mixture, name):
    _, nodes = comfy
    model = ModelPatcher(mixture, Flux(3.0))
    (sigmas,) = node_of(nodes, "SigmasFewstep")(model=model, grid="sgm", sampler=name, steps=40)
    (sampler,) = node_of(nodes, "SamplerFewstep")(sampler=name)
    got = sampler.sample(model, sigmas, NOISE, 0 * NOISE)
    flow = EpsModel(lambda x, t: mixture.x0(x, 1 - t, t), schedules.flow(), "x0")
    exact = sample(flow, "rk45", x_T=NOISE, rtol=1e-8, atol=1e-8)
    assert (got - exact).abs().max() < (0.2 if name == "euler" else 0.05)


def test_noise_is_comfyui_s_own(comfy, mixture):
    """Ancestral samplers draw from a generator of the node's seed; DPM-Solver++ SDE from its Brownian tree."""
    _, nodes = comfy
    model, sigmas = ModelPatcher(mixture, Discrete()), torch.tensor([14.6, 5.0, 1.0, 0.2, 0.0], dtype=torch.float64)
    make = node_of(nodes, "SamplerFewstep")
    x, generator = NOISE * 14.6, torch.Generator().manual_seed(SEED + 1)
    for now, after in zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False):
        denoised = model.denoised(x, torch.full((3,), now, dtype=torch.float64))
        up = 0.5 * after * math.sqrt(1 - (after / now) ** 2)
        x = denoised + (x - denoised) * math.sqrt(after**2 - up**2) / now
        x = x + 1.1 * up * torch.randn(3, 2, generator=generator, dtype=torch.float64) if after else x
    (ancestral,) = make(sampler="euler-ancestral", eta=0.5, s_noise=1.1)
    torch.manual_seed(1)
    assert torch.allclose(ancestral.sample(model, sigmas, NOISE, 0 * NOISE), x, atol=1e-12)
    (sde,) = make(sampler="dpmpp-sde")
    first = sde.sample(model, sigmas, NOISE, 0 * NOISE)
    torch.manual_seed(2)
    assert torch.equal(sde.sample(model, sigmas, NOISE, 0 * NOISE), first)


def test_options_reach_the_sampler(comfy, mixture):
    _, nodes = comfy
    make, model = node_of(nodes, "SamplerFewstep"), ModelPatcher(mixture, Discrete())
    sigmas = torch.tensor([14.6, 5.0, 1.0, 0.2], dtype=torch.float64)
    results = [
        make(sampler="unipc-2", options=text)[0].sample(model, sigmas, NOISE, 0 * NOISE)
        for text in ("", "variant = bh1\n\n lower_order_final=false ", "variant=bh2")
    ]
    assert torch.equal(results[0], results[2])
    assert not torch.allclose(results[0], results[1], atol=1e-6)
    with pytest.raises(ValueError, match="unknown option of sampler 'dpmpp-2m': 'eta'"):
        make(sampler="dpmpp-2m", eta=1.0)
    with pytest.raises(ValueError, match="one NAME=VALUE a line, got 'variant'"):
        make(sampler="unipc-2", options="variant")


def test_every_sampler_is_in_the_lists_of_the_host(comfy, mixture):
    host, nodes = comfy
    shown = [name for name in host.samplers.KSampler.SAMPLERS if name.startswith("fewstep_")]
    assert len(shown) == len(list_samplers())
    assert set(shown) <= set(host.samplers.KSAMPLER_NAMES)
    nodes.add_to_lists()  # a reload adds none twice
    assert host.samplers.KSampler.SAMPLERS.count("fewstep_dpmpp_2m") == 1
    # as ComfyUI's `ksampler(name)` looks a sampler up
    function = getattr(host.k_diffusion.sampling, "sample_fewstep_dpmpp_2m")  # noqa: B009
    sigmas, model = torch.tensor([14.6, 5.0, 1.0, 0.0], dtype=torch.float64), ModelPatcher(mixture, Discrete())
    by_list = KSAMPLER(function).sample(model, sigmas, NOISE, 0 * NOISE)
    (by_node,) = node_of(nodes, "SamplerFewstep")(sampler="dpmpp-2m")
    assert torch.equal(by_list, by_node.sample(model, sigmas, NOISE, 0 * NOISE))


@pytest.fixture
def a1111(monkeypatch):
    """`modules` of the web UI and k-diffusion, as far as the script touches them."""
    made = {n: types.ModuleType(n) for n in ("k_diffusion", "k_diffusion.sampling", "modules", "modules.sd_samplers")}
    made |= {n: types.ModuleType(n) for n in ("modules.sd_samplers_common", "modules.sd_samplers_kdiffusion")}
    made["k_diffusion"].sampling = made["k_diffusion.sampling"]
    made["modules"].sd_samplers = lists = made["modules.sd_samplers"]
    lists.all_samplers, lists.all_samplers_map, lists.shown = [], {}, []
    lists.set_samplers = lambda: lists.shown.extend(lists.all_samplers)
    data = namedtuple("SamplerData", ["name", "constructor", "aliases", "options"])
    made["modules.sd_samplers_common"].SamplerData = data
    # the web UI's class takes the function's name and looks at its signature
    find = lambda name, model: getattr(made["k_diffusion.sampling"], name)  # noqa: E731
    made["modules.sd_samplers_kdiffusion"].KDiffusionSampler = find
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    load(EXAMPLES / "a1111_fewstep.py")
    return made


def test_the_web_ui_finds_every_sampler_with_its_seeds(a1111, mixture):
    shown = {data.name: data for data in a1111["modules.sd_samplers"].shown}
    assert set(shown) == {f"fewstep {s.name}" for s in list_samplers()}
    function = shown["fewstep euler-ancestral"].constructor(None)
    assert {"eta", "sigmas", "noise_sampler"} <= set(inspect.signature(function).parameters)
    assert "eta" not in inspect.signature(shown["fewstep dpmpp-2m"].constructor(None)).parameters
    assert shown["fewstep dpmpp-2m-sde"].options["brownian_noise"]
    drawn = []
    a1111["k_diffusion.sampling"].torch = types.SimpleNamespace(randn_like=lambda x: drawn.append(1) or 0 * x)
    sigmas = torch.tensor([14.6, 5.0, 1.0, 0.0], dtype=torch.float64)
    denoiser = lambda x, sigma: mixture.x0(x, torch.ones_like(sigma), sigma)  # noqa: E731
    function(denoiser, NOISE * 14.6, sigmas=sigmas, extra_args={}, disable=True, callback=None, eta=1.0)
    assert len(drawn) == 2
