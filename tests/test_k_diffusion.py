"""Samplers as functions of k-diffusion: its own where it is installed, closed forms, and what its hosts rely on."""

from __future__ import annotations

import inspect
import math
import sys
import types
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from bench.certify import k_diffusion
from bench.certify.settings import text
from samplers import EpsModel, list_samplers, make_plan, sample, schedules
from samplers.adapters.k_diffusion import K_DIFFUSION, eps_model_from_denoiser, noise_spans, register, sampler_function

SIGMAS = torch.tensor([14.6, 9.0, 5.0, 2.5, 1.2, 0.6, 0.25, 0.1, 0.0], dtype=torch.float64)
X = 14.6 * torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def denoiser(mixture):
    """The exact denoiser of the mixture, in k-diffusion's form."""

    def model(x, sigma, shift=0.0):
        return mixture.x0(x, torch.ones_like(sigma), sigma) + shift

    return model


@pytest.mark.parity
@pytest.mark.parametrize("case", k_diffusion.cases(), ids=lambda c: f"{c.function}-{text(c.options)}-{c.last}")
def test_it_gives_what_k_diffusion_gives(case):
    """Equal seeds, equal pictures; by SDE samplers on one Brownian path, which they share."""
    if not k_diffusion.is_installed():
        pytest.skip("pip install --no-deps k-diffusion")
    told, after = ([], []), []
    for name, kept in zip(("theirs", "ours"), told, strict=True):
        function = sampler_function(case.function) if name == "ours" else getattr(k_diffusion.sampling(), case.function)
        kept.append({"samples": k_diffusion.run(function, case, kept.append)})
        after.append(torch.rand(1))
    if case.function not in (
        "sample_euler",
        "sample_heun",
        "sample_dpm_2",
    ):  # those draw noise even where they use none
        assert torch.equal(*after)
    for a, b in zip(*told, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert torch.allclose(torch.as_tensor(a[key]), torch.as_tensor(b[key]), atol=1e-11, rtol=0), key
    row = k_diffusion.compare(case)
    assert (row["status"], tuple(row)) == ("pass", k_diffusion.COLUMNS)


def test_its_sampling_is_imported_without_the_rest_of_the_package(tmp_path, monkeypatch):
    """Whose training needs what is not there; and nothing of the stand-ins is left."""
    package = tmp_path / "k_diffusion"
    package.mkdir()
    (package / "__init__.py").write_text("import this_needs_what_is_not_there")
    (package / "utils.py").write_text("from torchvision.transforms import functional as TF\ndouble = lambda x: 2 * x\n")
    (package / "sampling.py").write_text(
        "import torchsde\nfrom . import utils\ndef sample_euler(x): return utils.double(x)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    assert k_diffusion.is_installed()
    assert k_diffusion.sampling.__wrapped__().sample_euler(3) == 6
    names = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not names & {"k_diffusion", "torchsde", "torchvision"}


def test_a_difference_is_a_row_that_fails(monkeypatch):
    def faulty(*args, **options):
        return sampler_function("euler")(*args, **options) + 1e-9

    monkeypatch.setattr(k_diffusion, "sampling", lambda: types.SimpleNamespace(sample_euler=faulty))
    monkeypatch.setattr(k_diffusion.importlib.metadata, "version", lambda name: "1.2.3")
    row = k_diffusion.compare(k_diffusion.Case("sample_euler"))
    assert (row["status"], row["k_diffusion"]) == ("fail", "1.2.3")
    assert row["difference"] == pytest.approx(1e-9, rel=1e-4)


def test_figures_are_kept_where_k_diffusion_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(k_diffusion.importlib.util, "find_spec", lambda name: None)
    assert k_diffusion.cases({"euler", "edm"}) == []
    assert len(k_diffusion.cases()) >= 2 * len(K_DIFFUSION)
    with pytest.raises(ImportError, match="pip install --no-deps k-diffusion"):
        k_diffusion.sampling.__wrapped__()
    assert k_diffusion.kept(tmp_path / "none.csv") == []
    row = dict.fromkeys(k_diffusion.COLUMNS, "") | {
        "function": "sample_lms",
        "difference": 1e-15,
        "k_diffusion": "0.1.1",
    }
    pd.DataFrame([row]).to_csv(tmp_path / "k_diffusion.csv", index=False)
    assert k_diffusion.kept(tmp_path / "k_diffusion.csv") == [row]


def test_the_committed_figures_are_of_every_function():
    rows = k_diffusion.kept(Path(__file__).parents[1] / "results" / "certificates" / "k_diffusion.csv")
    assert [(r["function"], r["theirs"], r["last_sigma"]) for r in rows] == [
        (case.function, text(case.options), case.last) for case in k_diffusion.cases()
    ]
    assert {row["status"] for row in rows} == {"pass"}
    assert all(row["difference"] < row["threshold"] == k_diffusion.THRESHOLD for row in rows)


def test_euler_in_closed_form():
    """A denoiser of unit Gaussian data shrinks x by 1 / (1 + sigma^2), so Euler's method is a product."""
    got = sampler_function("euler")(lambda x, sigma: x / (1 + sigma[:, None] ** 2), X, SIGMAS, disable=True)
    factor = 1.0
    for now, after in pairwise(SIGMAS.tolist()):
        factor *= 1 + (after - now) * now / (1 + now**2)
    assert torch.allclose(got, factor * X, rtol=1e-13, atol=0)


def test_euler_ancestral_in_closed_form():
    """With a denoiser that says zero, x becomes (down / sigma) x + up z in every step, in the order in which noise is drawn."""
    torch.manual_seed(3)
    got = sampler_function("euler-ancestral")(lambda x, sigma: 0 * x, X, SIGMAS, disable=True)
    torch.manual_seed(3)
    x = X
    for now, after in pairwise(SIGMAS.tolist()):
        up = after * math.sqrt(1 - (after / now) ** 2)
        x = x * math.sqrt(after**2 - up**2) / now
        x = x + up * torch.randn_like(x) if after else x
    assert torch.allclose(got, x, rtol=0, atol=1e-13)


def test_two_steps_of_dpmpp_2m_in_closed_form(denoiser):
    sigmas = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    first = denoiser(X, sigmas[:1].expand(3))
    x = 0.5 * X + 0.5 * first
    x = 0.5 * x + 0.5 * (1.5 * denoiser(x, sigmas[1:2].expand(3)) - 0.5 * first)
    assert torch.allclose(sampler_function("sample_dpmpp_2m")(denoiser, X, sigmas, disable=True), x, atol=1e-13)


@pytest.mark.parametrize("name", [s.name for s in list_samplers()])
def test_every_sampler_is_the_one_of_sample(denoiser, name):
    """And the callback is told once a step, with x at its start and the denoised that the model gave there."""
    model = EpsModel(denoiser, schedules.edm(1e-7, 29.2), "x0")
    told, asked = [], []

    def recorded(x, sigma, **cond):
        asked.append((x.clone(), sigma.clone(), denoiser(x, sigma, **cond)))
        return asked[-1][2]

    torch.manual_seed(1)
    got = sampler_function(name)(recorded, X, SIGMAS, {"shift": 0.2}, told.append, True)
    noises = {"noise_source": lambda k, like: torch.randn_like(like)}
    torch.manual_seed(1)
    adaptive = next(s.adaptive for s in list_samplers() if s.name == name)
    expected = sample(model, name, x_T=X, sigmas=SIGMAS, cond={"shift": 0.2}, **({} if adaptive else noises))
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
    assert [d["i"] for d in told] == list(range(8))
    assert [d["sigma"] for d in told] == SIGMAS[:-1].tolist()
    assert torch.allclose(told[0]["x"], X, rtol=1e-12)
    for d in told:
        assert any(d["x"].equal(x) and d["denoised"] is out and d["sigma_hat"] == sigma[0] for x, sigma, out in asked)


@pytest.mark.parametrize("name", [s.name for s in list_samplers() if s.stochastic != "no" and not s.adaptive])
def test_noises_are_increments_of_one_path(name):
    """Stretches that a noise sampler is asked for do not overlap, but for rises, which are not asked for."""
    plan = make_plan(name, schedules.edm(1e-6, 30.0), sigmas=SIGMAS, **({"s_churn": 3.0} if name == "edm" else {}))
    spans = noise_spans(plan)
    assert len(spans) == plan.noises
    falling = [(a, b) for a, b in spans if b < a]
    assert all(a != b for a, b in spans)
    assert all(before[1] >= after[0] - 1e-12 for before, after in pairwise(falling))
    nodes = SIGMAS.tolist()
    assert all(any(low <= b + 1e-12 and a <= high + 1e-12 for high, low in pairwise(nodes)) for a, b in falling)


def test_restarts_and_churn_rise_from_where_the_state_is():
    sigmas = [80.0, 20.0, 5.0, 1.0, 0.25, 0.06, 0.01]
    spans = noise_spans(make_plan("restart", schedules.edm(), sigmas=sigmas, restarts=[(0.06, 0.3, 2, 2)]))
    assert spans == [pytest.approx((0.06, 0.3))] * 2
    churned = noise_spans(make_plan("edm", schedules.edm(0.002, 200.0), sigmas=sigmas, s_churn=0.6))
    assert churned == [pytest.approx((sigma, 1.1 * sigma)) for sigma in sigmas[:-1]]


def test_a_noise_sampler_gets_the_hosts_own_sigmas(denoiser):
    asked = []

    def noise(start, end):
        asked.append((start, end))
        return torch.zeros(3, 2)  # float32, as a tree on another device may give

    sampler_function("dpmpp-2m-sde")(denoiser, X, SIGMAS, disable=True, noise_sampler=noise)
    assert asked == list(pairwise(SIGMAS[:-1]))


class ModelSamplingFlux(nn.Module):
    sigma_min, sigma_max = torch.tensor(0.01), torch.tensor(1.0)


class CONST:
    pass


class Sampling(ModelSamplingFlux, CONST):
    pass


def comfy_flow(mixture):
    """A flow as ComfyUI hands it over: two wrappers around what says how it is sampled."""

    class Model:
        def __call__(self, x, sigma):
            return mixture.x0(x, 1 - sigma, sigma)

    model = Model()
    model.inner_model = types.SimpleNamespace(inner_model=types.SimpleNamespace(model_sampling=Sampling()))
    return model


FLOW = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.15, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("name", ["euler", "dpmpp-2m", "unipc-3", "heun", "euler-ancestral", "dpmpp-sde", "rk45"])
def test_flows_are_known_by_comfyui_s_mark(mixture, name):
    model, z = comfy_flow(mixture), X / 14.6
    torch.manual_seed(0)
    got = sampler_function(name)(model, z, FLOW, disable=True)
    torch.manual_seed(0)
    assert torch.equal(got, sampler_function(name, schedule="flow")(model.__call__, z, FLOW, disable=True))
    flow = EpsModel(model, schedules.flow(), "x0")
    if name == "euler":  # Euler in sigma on the velocity is Euler in sigma_bar, from alpha = 0 on
        x = z
        for now, after in pairwise(FLOW):
            x = x + (after - now) * (x - model(x, now.expand(3))) / now
        assert torch.allclose(got, x, atol=1e-13)
    if name == "rk45":
        ours = sampler_function(name)(model, z, FLOW[:-1], disable=True)
        assert torch.allclose(ours, sample(flow, "rk45", x_T=z, timesteps=FLOW[:-1]), atol=1e-12)


def test_a_wrong_schedule_is_named(denoiser, mixture):
    with pytest.raises(ValueError, match=r"sigmas of a flow lie in \[0, 1\], got 14.6; .*schedule='edm'"):
        sampler_function("euler")(comfy_flow(mixture), X, SIGMAS)
    with pytest.raises(ValueError, match="unknown schedule 'flows'; did you mean 'flow'"):
        sampler_function("euler", schedule="flows")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sampler_function("dpmp-2m"), "unknown sampler 'dpmp-2m'; did you mean 'dpmpp-2m'"),
        (lambda: sampler_function("sample_dpm_fast"), "did you mean 'sample_dpm_2'"),
        (lambda: sampler_function("dpmpp-2m", eta=1.0), "unknown option of sampler 'dpmpp-2m': 'eta'"),
        (
            lambda: sampler_function("euler")(None, X, SIGMAS, s_churn=1.0),
            "unknown option of sampler 'euler': 's_churn'",
        ),
        (lambda: sampler_function("euler")(None, X, SIGMAS.flip(0)), "sigmas must be positive"),
        (lambda: sampler_function("euler")(None, X, torch.ones(3)), "must decrease strictly"),
        (lambda: sampler_function("euler")(None, X, SIGMAS, noise_sampler=print), "takes no noise_sampler"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_options_at_the_call_come_before_those_of_the_function(denoiser):
    still = sampler_function("euler")(denoiser, X, SIGMAS, disable=True)
    noisy = sampler_function("euler-ancestral", eta=1.0)
    assert torch.allclose(noisy(denoiser, X, SIGMAS, disable=True, eta=0.0), still, atol=1e-12)
    assert not torch.allclose(noisy(denoiser, X, SIGMAS, disable=True), still, atol=1e-3)


def test_signatures_are_what_a1111_looks_at():
    parameters = inspect.signature(sampler_function("dpmpp-2m-sde", eta=0.5)).parameters
    assert list(parameters)[:6] == ["model", "x", "sigmas", "extra_args", "callback", "disable"]
    assert parameters["eta"].default == 0.5
    assert "noise_sampler" in parameters
    still = sampler_function("dpmpp-2m")
    assert not {"eta", "noise_sampler"} & set(inspect.signature(still).parameters)
    assert still.__name__ == "sample_dpmpp_2m"
    assert sampler_function("sample_lms").__name__ == "sample_lms"
    assert inspect.signature(sampler_function("sample_dpmpp_2s_ancestral")).parameters["eta"].default == 1.0


def test_samplers_register_beside_the_module_s_own(denoiser):
    module = types.ModuleType("sampling")
    assert register(module, ["dpmpp-2m", "unipc-3"]) == ["fewstep_dpmpp_2m", "fewstep_unipc_3"]
    expected = sampler_function("unipc-3")(denoiser, X, SIGMAS, disable=True)
    assert torch.equal(module.sample_fewstep_unipc_3(denoiser, X, SIGMAS, disable=True), expected)
    assert len(register(module)) == len(list_samplers())


def test_half_precision_and_short_lists(denoiser):
    seen = []

    def half(x, sigma):
        seen.append((x.dtype, sigma.dtype))
        return x / (1 + sigma.view(-1, 1) ** 2)

    out = sampler_function("dpmpp-2m")(half, X.half(), SIGMAS.float(), disable=True)
    assert out.dtype == torch.float16
    assert set(seen) == {(torch.float16, torch.float16)}
    assert sampler_function("dpmpp-2m")(half, X, SIGMAS[:1]) is X
    assert sampler_function("dpmpp-2m")(half, X, SIGMAS[:0]) is X


def test_the_bar_is_shown_where_it_is_asked_for(denoiser, capsys):
    sampler_function("euler")(denoiser, X, SIGMAS, disable=False)
    assert "8/8" in capsys.readouterr().err
    sampler_function("euler")(denoiser, X, SIGMAS, disable=True)
    assert capsys.readouterr().err == ""


class Discrete(nn.Module):
    """As k-diffusion's `CompVisDenoiser` describes itself."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture, self.sigma_min, self.sigma_max = mixture, torch.tensor(0.03), torch.tensor(14.6)

    def forward(self, x, sigma, shift=0.0):
        return self.mixture.x0(x, torch.ones_like(sigma), sigma) + shift


def test_a_denoiser_is_an_epsilon_model(mixture, denoiser):
    model = eps_model_from_denoiser(Discrete(mixture))
    assert (model.schedule.t_min, model.schedule.t_max) == pytest.approx((0.03, 14.6))
    assert torch.allclose(model.eps(X, 2.0, shift=0.1), (X - denoiser(X, torch.full((3,), 2.0), 0.1)) / 2.0)
    wrapped = types.SimpleNamespace(inner_model=Discrete(mixture))
    wrapped_call = type("Wrapped", (), {"__call__": lambda self, x, s: denoiser(x, s), "inner_model": wrapped})()
    assert eps_model_from_denoiser(wrapped_call).schedule == model.schedule
    ours = sample(eps_model_from_denoiser(denoiser, 0.1, 14.6), "dpmpp-2m", x_T=X, sigmas=SIGMAS)
    assert torch.allclose(ours, sampler_function("dpmpp-2m")(denoiser, X, SIGMAS, disable=True), atol=1e-12)
    flow = eps_model_from_denoiser(comfy_flow(mixture))
    assert flow.schedule == schedules.flow()
    assert torch.allclose(flow.x0(X, 0.5), mixture.x0(X, torch.full((3,), 0.5), torch.full((3,), 0.5)))


def test_a_denoiser_without_a_range_has_to_be_told(denoiser):
    with pytest.raises(ValueError, match="sigma_min must be given: function has none"):
        eps_model_from_denoiser(denoiser)
    with pytest.raises(ValueError, match="sigma_max goes with schedule 'edm'"):
        eps_model_from_denoiser(denoiser, sigma_max=1.0, schedule="flow")
    with pytest.raises(TypeError, match="denoiser must be callable"):
        eps_model_from_denoiser(3)


OWN_TIME = ("deis-2", "deis-3", "deis-4", "pndm")  # whose formula is in the schedule's own time, which is sigma here


@pytest.mark.parametrize("name", [s.name for s in list_samplers() if not s.adaptive and s.name not in OWN_TIME])
def test_it_is_the_same_sampler_as_on_the_model_s_own_schedule(mixture, denoiser, name):
    """Stable Diffusion in its variance-preserving coordinates, and as a denoiser: x / alpha is the same."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    schedule = schedules.from_betas(betas)
    model = EpsModel(mixture.net(schedule), schedule)
    x = X * float(schedule.alpha(schedule.t_of_lam(-math.log(14.6))))
    noise = {"noise_source": lambda k, like: torch.randn_like(like)}
    torch.manual_seed(4)
    expected = sample(model, name, x_T=x, sigmas=SIGMAS, **noise)
    torch.manual_seed(4)
    assert torch.allclose(sampler_function(name)(denoiser, X, SIGMAS, disable=True), expected, atol=1e-9)
