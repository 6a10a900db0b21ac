"""Schedules, and an exact network of every kind on them: what most tests start from."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.mixture import GaussianMixture
from samplers import EpsModel, plugins, schedules

_BETAS = np.linspace(1e-4, 0.02, 1000)
SCHEDULES = {
    "vp_linear": schedules.vp_linear(),
    "cosine": schedules.cosine(),
    "edm": schedules.edm(),
    "flow": schedules.flow(),
    "discrete": schedules.from_betas(_BETAS),
    "zero_snr": schedules.from_alphas_cumprod(np.append(np.cumprod(1 - _BETAS)[:-1], 0.0)),
}

# Coverage is of samplers/. These files test bench and distill, or repeat lines that the tests of samplers/ run: tracing them
# costs half as much time again and adds no line.
UNTRACED = re.compile(
    """test_(
    blocks|certify|checkpoint|cifar10|cli|compare|config|data|doctor|documents|endurance|engine|engine_work|
    extractors|features|fit_cli|fitting|fuzz_plans|grid_sweep|guidance_in_bench|guided|html_report|ideal|
    inception|intervals|judging|matching|metrics|metrics_speed|mixture|mixture_file|moments|problems|
    progressive|progressive_runs|ranking|reference|rows|run_folder|sample_metrics|shipped|solver_error|spectral|
    speed|store|students_in_bench|suite|table|teacher|trainer|trainer_failures|trainer_processes|
    trainer_reports|training_cli|widen|zoo
    )""",
    re.VERBOSE,
)


QUICK_CASES = 3  # of a test with more, which are a spread of its samplers, schedules and so on


def pytest_addoption(parser):
    parser.addoption(
        "--part",
        choices=["quick", "rest"],
        help=f"quick: no slow test, and at most {QUICK_CASES} cases of each; rest: what quick leaves out; by default all",
    )


def pytest_collection_modifyitems(config, items):
    for item in items:
        if UNTRACED.fullmatch(item.path.stem):
            item.add_marker("no_cover")
    part = config.getoption("part")
    if part is not None:
        quick = quick_part(items)
        left_out = [item for item in items if (item.nodeid in quick) != (part == "quick")]
        items[:] = [item for item in items if (item.nodeid in quick) == (part == "quick")]
        config.hook.pytest_deselected(items=left_out)


def quick_part(items):
    """Ids of the tests of `--part quick`: each case has the same chance, and the next run has the same ones."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("slow") is None:
            cases[item.nodeid.partition("[")[0]].append(item.nodeid)
    drawn = (sorted(ids, key=lambda one: zlib.crc32(one.encode()))[:QUICK_CASES] for ids in cases.values())
    return {one for ids in drawn for one in ids}


@pytest.fixture
def schedule(request):
    """A schedule by name: `@pytest.mark.parametrize("schedule", [...], indirect=True)`."""
    return SCHEDULES[request.param]


@pytest.fixture(scope="session")
def mixture():
    centred = GaussianMixture.random(dim=2, components=3, seed=0)
    return replace(centred, means=centred.means + torch.tensor([0.5, -0.3]))  # a mean of 0 would hide terms


@pytest.fixture(scope="session")
def exact(mixture):
    """`exact(schedule, predicts)`: the epsilon-model whose network knows the mixture, whatever it predicts."""

    def model(schedule, predicts="eps", **options):
        return EpsModel(_network(mixture, schedule, predicts), schedule, predicts, **options)

    return model


def _network(mixture, schedule, predicts):
    def from_time(x, t):
        t = t.double()
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        column = (-1, *[1] * (x.ndim - 1))
        a, s = alpha.view(column), sigma.view(column)
        known = {  # only what is asked for is computed: most of the tests' time is here
            "eps": lambda: mixture.eps(x, alpha, sigma),
            "x0": lambda: mixture.x0(x, alpha, sigma),
            "v": lambda: a * mixture.eps(x, alpha, sigma) - s * mixture.x0(x, alpha, sigma),
            "score": lambda: -mixture.eps(x, alpha, sigma) / s,
            "flow": lambda: (
                schedule.dalpha(t).view(column) * mixture.x0(x, alpha, sigma)
                + schedule.dsigma(t).view(column) * mixture.eps(x, alpha, sigma)
            ),
        }
        return known[predicts]().to(x.dtype)

    def raw_edm(x, c_noise, data=0.5):  # Karras et al. 2022, table 1, solved for F
        sigma = torch.exp(4 * c_noise.double())
        total = (sigma**2 + data**2)[:, None]
        x_hat = x * total**0.5
        denoised = mixture.x0(x_hat, torch.ones_like(sigma), sigma)
        return (denoised - data**2 / total * x_hat) * total**0.5 / (sigma[:, None] * data)

    return raw_edm if predicts == "edm" else from_time


@pytest.fixture(scope="session")
def classes(mixture):
    """`classes(schedule, predicts)`: a model of the mixture's three components as classes, with null class 3 for all of it.

    `classes.each` has the components.
    """
    parts = ("means", "residual", "basis", "variances")
    of_class = [GaussianMixture(torch.ones(1), *(getattr(mixture, part)[[k]] for part in parts)) for k in range(3)]

    def model(schedule, predicts="eps", **options):
        nets = [_network(one, schedule, predicts) for one in (*of_class, mixture)]

        def net(x, t, class_labels):
            every = torch.stack([one(x, t) for one in nets])
            return every[class_labels, torch.arange(len(x))]

        return EpsModel(net, schedule, predicts, **options)

    model.each = of_class
    return model


@pytest.fixture(scope="session")
def problem_on():
    """The problem of the certificates on "vp_linear", "cosine" or "edm", with its reference; made once."""
    from bench.certify.order import problem

    return problem


class _Point:
    """An entry point of an installed package."""

    name = "mine"

    def __init__(self, value):
        self.value = value

    def load(self):
        return self.value


@pytest.fixture
def add_plugin(monkeypatch):
    """`add_plugin(group, value, registry)`: a package that adds one value, to a registry that is kept."""
    kept = []

    def add(group, value, registry):
        monkeypatch.setattr(plugins, "entry_points", lambda group: [_Point(value)] if group == asked else [])
        asked = group
        registry.cache_clear()
        kept.append(registry)

    yield add
    for registry in kept:
        registry.cache_clear()


@pytest.fixture(scope="session")
def tiny_unet():
    """diffusers' `UNet2DModel` with random weights, for three channels of 8 x 8 pixels."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(16, 16),
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            layers_per_block=1,
        )
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """`tiny_folder(builder)`: the folder of a pipeline of `tiny_pipelines`, made once."""
    made = {}

    def folder(builder):
        if builder not in made:
            made[builder] = builder(tmp_path_factory.mktemp(builder.__name__))
        return made[builder]

    return folder


@pytest.fixture(scope="module")
def tiny_pipeline(tiny_folder):
    """`tiny_pipeline(builder, kind)`: that folder loaded as a pipeline of the kind in float64, once for each file of tests."""
    from pipeline_reference import load

    made = {}

    def pipeline(builder, kind):
        if (builder, kind) not in made:
            made[builder, kind] = load(tiny_folder(builder), kind)
        return made[builder, kind]

    return pipeline
