"""`fewstep explain`: coefficients read off black boxes, and planted differences that must be called by their names."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bench.certify import k_diffusion
from bench.cli import main
from bench.explain import CAUSES, explain
from bench.explain_space import Side
from bench.explain_trace import in_kind, trace
from bench.export import document, named_noise
from samplers import make_plan
from samplers.adapters.k_diffusion import K_DIFFUSION

pytest.importorskip("diffusers")
NOISE = named_noise("sd15")
STEPS = 6
HERE = __name__


def host(model, x, sigmas, extra_args=None, callback=None, disable=None, *, eta=1.0, fault="", noise_sampler=None):
    """DPM-Solver++(2M) SDE in k-diffusion's form, with a fault to plant."""
    draw = noise_sampler or (lambda a, b: torch.randn_like(x))
    old, h_last, steps = None, None, len(sigmas) - 1
    for i in range(steps):
        now, after = sigmas[i], sigmas[i + 1]
        told = now * 1.01 if fault == "node" and i == 2 else now
        denoised = model(x, told.expand(1))
        if after == 0:
            x = x + (denoised - x) * (0.9 if fault == "final" else 1.0)
            continue
        h = (now / after).log()
        z = -(1 + eta) * h
        x = after / now * torch.exp(-eta * h) * x - torch.expm1(z) * denoised
        if old is not None and not (fault == "order" and i == 3):
            weight = 0.5 if fault != "weight" or i < 2 else 0.45
            x = x - weight * torch.expm1(z) * (h / h_last) * (denoised - old)
        if eta:
            scale = 1.02 if fault == "noise" and i == 1 else 1.0
            x = x + draw(now, after) * after * scale * torch.sqrt(-torch.expm1(-2 * eta * h))
        old, h_last = denoised, h
    return x


def euler_with_noise(model, x, sigmas, extra_args=None, callback=None, disable=None, *, swap=False, waste=False):
    """Euler ancestral on `torch.randn_like`; `swap` uses two noises in the other order, `waste` draws one too many."""
    drawn = [torch.randn_like(x) for _ in sigmas]
    drawn = drawn[:1] + drawn[2:] if waste else [drawn[1], drawn[0], *drawn[2:]] if swap else drawn
    for i in range(len(sigmas) - 1):
        now, after = sigmas[i], sigmas[i + 1]
        denoised = model(x, now.expand(1))
        up = after * (1 - (after / now) ** 2) ** 0.5
        x = denoised + (x - denoised) * ((after**2 - up**2) ** 0.5 / now)
        x = x + up * drawn[i] if after > 0 else x
    return x


def compare(ours, function, options=None, ours_options=None, **more):
    settings = {"grid": "edm", **more}
    return explain(Side(ours, ours_options or {}), Side(f"{HERE}:{function}", options or {}), NOISE, STEPS, **settings)


SDE = {"lower_order_final": False}


def test_a_function_without_a_fault_is_the_same():
    for found in (
        compare("dpmpp-2m-sde", "host", ours_options=SDE, tolerance=1e-5),
        compare("dpmpp-2m-sde", "host", {"eta": 0.3}, {**SDE, "eta": 0.3}, tolerance=1e-5),
        compare("dpmpp-2m", "host", {"eta": 0.0}, tolerance=1e-5),
        compare("euler-ancestral", "euler_with_noise", tolerance=1e-5),
    ):
        assert found.part is None
        assert found.difference < 1e-13


@pytest.mark.parametrize(
    ("fault", "cause", "step", "words"),
    [
        ("node", "node", 2, r"call 3 is at sigma 2\.23215454 in A and 2\.2544"),
        ("order", "order", 4, r"A uses 2 outputs \(3, 4\), B 1 output \(4\)"),
        ("final", "final step", STEPS, "the coefficient of"),
        ("noise", "noise", 2, "has deviation"),
        ("weight", "coefficients", 3, r"with 2 outputs \(2, 3\) in both, the coefficient of"),
    ],
)
def test_a_planted_fault_is_named(fault, cause, step, words):
    found = compare("dpmpp-2m-sde", "host", {"fault": fault}, SDE)
    assert (found.part.cause, found.part.step) == (cause, step), found.part
    assert found.part.cause in CAUSES
    assert re.search(words, found.part.text), found.part.text
    before = [difference for at, difference in found.steps if at < step]
    assert max(before) < 1e-12
    assert found.on_same_nodes is None


def test_the_numbers_of_a_planted_noise_are_right():
    found = compare("dpmpp-2m-sde", "host", {"fault": "noise", "eta": 0.5}, {**SDE, "eta": 0.5})
    ours, theirs = found.a.matrix[2, 1 + STEPS + 1], found.b.matrix[2, 1 + STEPS + 1]
    assert theirs == pytest.approx(1.02 * ours, rel=1e-12)
    assert f"{np.linalg.norm(found.b.matrix[2, 1 + STEPS :]):.6g}"[:7] in found.part.text


def test_noises_in_another_order():
    swapped = compare("euler-ancestral", "euler_with_noise", {"swap": True})
    assert (swapped.part.cause, swapped.part.step) == ("noise order", 1)
    assert "of noises 0 in A and 1 in B" in swapped.part.text
    wasted = compare("euler-ancestral", "euler_with_noise", {"waste": True})
    assert (wasted.part.cause, wasted.part.step) == ("noise order", 2)
    assert "noise 1 is draw 1 of A and draw 2 of B" in wasted.part.text


def test_what_a_method_works_in():
    found = explain(Side("dpmpp-2m"), Side("dpm-solver-2m"), NOISE, STEPS, grid="karras")
    assert found.part.cause == "prediction"
    assert "A works in x0, B in eps" in found.part.text
    first = explain(Side("ddim"), Side("dpmpp-2m"), NOISE, STEPS, grid="karras")
    assert (first.part.cause, first.part.step) == ("order", 2)
    assert "A uses 1 output (2), B 2 outputs (1, 2)" in first.part.text


def test_calls_and_the_end():
    assert explain(Side("euler"), Side("heun"), NOISE, STEPS, grid="karras").part.cause == "node"
    pair = [Side("diffusers:DPMSolverMultistepScheduler", {"final_sigmas_type": f}) for f in ("zero", "sigma_min")]
    ends = explain(*pair, NOISE, STEPS)
    assert (ends.part.cause, ends.part.step) == ("final step", STEPS)
    assert "A ends at sigma 0, B at 0.0291671" in ends.part.text


def test_a_scheduler_s_nodes_times_and_dtype():
    """DPM-Solver++(2M) of diffusers: its nodes are others, and on its nodes float32 is all that differs."""
    theirs = Side("diffusers:DPMSolverMultistepScheduler")
    found = explain(Side("dpmpp-2m"), theirs, NOISE, STEPS)
    assert (found.part.cause, found.part.step) == ("node", 1)
    rest = found.on_same_nodes
    assert rest.part.cause == "dtype"
    assert "as shipped, with float32" in rest.part.text
    assert rest.difference < 1e-12
    same = explain(Side("dpmpp-2m"), theirs, NOISE, STEPS, same_nodes=True, tolerance=1e-4)
    assert same.part is None
    karras = Side("diffusers:DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 3})
    found = explain(Side("dpmpp-2m"), karras, NOISE, STEPS, same_nodes=True)
    assert (found.part.cause, found.part.step) == ("time", 1)
    assert (found.beyond.cause, found.beyond.step) == ("order", 3)


@pytest.mark.parametrize(
    ("sampler", "options", "scheduler", "settings"),
    [
        ("ddim", {"eta": 1.0}, "DDIMScheduler", {"eta": 1.0, "timestep_spacing": "trailing"}),
        ("ddpm", {}, "DDPMScheduler", {"timestep_spacing": "trailing"}),
        ("euler", {}, "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("euler", {}, "EulerDiscreteScheduler", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
        ("euler-ancestral", {}, "EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("heun", {}, "HeunDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("lms-2", {}, "LMSDiscreteScheduler", {"timestep_spacing": "trailing", "order": 2}),
        ("unipc-2", {}, "UniPCMultistepScheduler", {"prediction_type": "sample"}),
        ("eab-3", {"predict": "eps"}, "DEISMultistepScheduler", {"solver_order": 3}),
        ("dpmpp-sde", {}, "DPMSolverSDEScheduler", {"timestep_spacing": "trailing"}),
    ],
)
def test_schedulers_that_are_the_same_method(sampler, options, scheduler, settings):
    sides = Side(sampler, options), Side(f"diffusers:{scheduler}", settings)
    found = explain(*sides, NOISE, 5, same_nodes=True, tolerance=1e-6)
    assert found.part is None or found.part.cause == "dtype", found.part
    assert found.difference < 1e-9


def test_a_step_that_leads_beside_the_next_node():
    """DDIM of diffusers steps by T // N = 166 where its own nodes lie 167 apart."""
    sides = Side("ddim"), Side("diffusers:DDIMScheduler", {"timestep_spacing": "trailing"})
    part = explain(*sides, NOISE, STEPS, same_nodes=True).part
    assert (part.cause, part.step) == ("node", 1)
    alphas = [float(NOISE.schedule.alpha(t)) for t in (832.0, 833.0)]
    assert f"alpha={alphas[0]:.9g} in A and alpha={alphas[1]:.9g} in B" in part.text


def test_pndm_starts_as_ours_and_ends_otherwise():
    sides = Side("pndm"), Side("diffusers:PNDMScheduler", {"timestep_spacing": "leading", "set_alpha_to_one": True})
    part = explain(*sides, NOISE, 10, same_nodes=True).part
    assert (part.cause, part.step) == ("final step", 10)
    assert "A uses 1 output" in part.text


def test_flow_matching_is_euler():
    noise = named_noise("sd3")
    scheduler = Side("diffusers:FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
    assert explain(Side("euler"), scheduler, noise, STEPS, same_nodes=True, tolerance=1e-6).part is None
    assert explain(Side("dpmpp-2m"), scheduler, noise, STEPS, same_nodes=True).part.cause == "order"


@pytest.mark.parametrize(
    ("sampler", "options", "scheduler", "settings"),
    [
        ("euler", {}, "EDMEulerScheduler", {}),
        ("euler", {}, "EDMEulerScheduler", {"prediction_type": "v_prediction", "sigma_data": 1.0}),
        ("euler", {}, "EDMEulerScheduler", {"sigma_schedule": "exponential"}),
        ("dpmpp-2m", {"lower_order_final": True}, "EDMDPMSolverMultistepScheduler", {}),
        ("dpmpp-2m", {"solver_type": "heun"}, "EDMDPMSolverMultistepScheduler", {"solver_type": "heun"}),
        ("dpmpp-3m", {}, "EDMDPMSolverMultistepScheduler", {"solver_order": 3}),
        ("dpmpp-2m-sde", {}, "EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_schedulers_of_edm_are_the_same_method(sampler, options, scheduler, settings):
    """Their network is given c_in x and log(sigma) / 4, and preconditioned: none of which is part of the method."""
    sides = Side(sampler, options), Side(f"diffusers:{scheduler}", settings)
    found = explain(*sides, named_noise("edm"), STEPS, same_nodes=True, tolerance=1e-6)
    assert found.part is None or found.part.cause == "dtype", found.part
    assert found.difference < 1e-9
    assert found.a.sigmas[0] == pytest.approx(80.0)


def test_edm_s_last_step_of_second_order_is_named():
    """EDM's Heun makes a second call in each step, its Euler does not; and sigma_data of the network is no part of it."""
    found = explain(Side("edm"), Side("diffusers:EDMEulerScheduler"), named_noise("edm"), STEPS, same_nodes=True)
    assert (found.part.cause, found.part.step) == ("node", 1)
    other = explain(Side("dpmpp-2m"), Side("diffusers:EDMEulerScheduler"), named_noise("edm"), STEPS, same_nodes=True)
    assert (other.part.cause, other.part.step) == ("order", 2)
    assert "A uses 2 outputs (1, 2), B 1 output (2)" in other.part.text


@pytest.mark.parametrize("schedule", ["sd15", "sd3", "edm"])
@pytest.mark.parametrize(
    ("sampler", "options"),
    [("dpmpp-2m", {}), ("unipc-3", {}), ("heun", {}), ("ddim", {"eta": 0.5}), ("dpmpp-sde", {}), ("pndm", {})],
)
def test_our_scheduler_is_the_sampler(schedule, sampler, options):
    noise = named_noise(schedule)
    ours = Side("diffusers:PlanScheduler", {"sampler": sampler, **options})
    found = explain(Side(sampler, options), ours, noise, STEPS, same_nodes=True)
    assert found.difference < 1e-12
    assert found.part is None or found.part.cause == "dtype", found.part  # as shipped it tells times in float32
    assert found.a.noises == found.b.noises
    assert explain(Side(sampler, options), ours, noise, STEPS, same_nodes=True, tolerance=1e-6).part is None


def test_times_told_in_float32_are_in_the_numbers():
    ours = Side("diffusers:PlanScheduler", {"sampler": "ddim"})
    part = explain(Side("ddim"), ours, NOISE, STEPS, same_nodes=True).part
    assert part.cause == "dtype"
    told = float(re.search(r"times told to the network by up to (\S+) \(relative\)", part.text)[1])
    assert 1e-9 < told < 1e-6


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
        ("PlanScheduler", {"sampler": "dpmpp-2m"}),
    ],
)
def test_schedulers_have_the_shift_of_the_schedule(scheduler, settings):
    name, noise = f"diffusers:{scheduler}", named_noise("sd3")
    key = "flow_shift" if "use_flow_sigmas" in settings else "shift"
    by_default, shifted, bare = (
        trace(Side(name, {**settings, **more}), noise, STEPS).nodes for more in ({}, {key: 3.0}, {key: 1.0})
    )
    np.testing.assert_array_equal(by_default, shifted)
    assert np.abs(bare - shifted).max() > 0.1


def test_our_scheduler_beside_others_and_with_its_settings():
    ours = {"sampler": "dpmpp-2m", "grid": "config", "timestep_spacing": "trailing"}
    theirs = {"timestep_spacing": "trailing", "final_sigmas_type": "zero"}
    sides = Side("diffusers:PlanScheduler", ours), Side("diffusers:DPMSolverMultistepScheduler", theirs)
    found = explain(*sides, NOISE, 5, tolerance=1e-4)
    assert found.part is None
    assert found.difference < 1e-9
    planted = explain(Side("diffusers:PlanScheduler", {**ours, "solver_type": "heun"}), sides[1], NOISE, 5)
    assert planted.part.step == 2
    first = explain(Side("dpmpp-2m"), Side("diffusers:PlanScheduler", {"sampler": "ddim"}), NOISE, 5, same_nodes=True)
    assert (first.part.cause, first.part.step) == ("order", 2)
    afs = Side("diffusers:PlanScheduler", {"sampler": "dpmpp-2m", "grid": "karras", "afs": True})
    plan = make_plan("dpmpp-2m", NOISE.schedule, steps=STEPS, grid="karras", afs=True)
    np.testing.assert_allclose(trace(afs, NOISE, STEPS).matrix, plan.matrix("eps"), atol=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize("name", K_DIFFUSION)
def test_functions_of_k_diffusion_are_the_same_method(name):
    if not k_diffusion.is_installed():
        pytest.skip("pip install --no-deps k-diffusion")
    sampler, options = K_DIFFUSION[name]
    found = explain(Side(sampler, options), Side(f"k-diffusion:{name}"), NOISE, STEPS, grid="edm", tolerance=1e-4)
    assert found.part is None
    assert found.difference < 1e-9


def test_a_traced_loop_has_the_matrix_of_the_plan():
    plan = make_plan("dpmpp-2m-sde", NOISE.schedule, steps=STEPS, grid="edm", **SDE)
    nodes = np.array(plan.times)
    for kind in ("eps", "x0"):
        traced = trace(Side(f"{HERE}:host"), NOISE, STEPS, nodes=nodes, kind=kind)
        np.testing.assert_allclose(traced.matrix, plan.matrix(kind), atol=1e-12)
        other = "x0" if kind == "eps" else "eps"
        np.testing.assert_allclose(in_kind(traced, other, NOISE.schedule).matrix, plan.matrix(other), atol=1e-11)


def run(*arguments):
    return CliRunner().invoke(main, ["explain", *map(str, arguments)])


def test_the_command_says_where_and_exits_with_1():
    result = run("dpmpp-2m", "diffusers:DPMSolverMultistepScheduler", "--steps", 5, "--set-b", "use_karras_sigmas=true")
    assert result.exit_code == 1
    assert "they part at step 1 of 5: node. call 2 is at sigma" in result.output
    assert "With both on the same nodes:" in result.output
    assert "they part at step 1 of 5: time. A tells the network t=" in result.output
    assert "apart from that they are the same" in result.output


def test_the_command_exits_with_0_where_they_are_the_same(tmp_path):
    plan = make_plan("unipc-3", NOISE.schedule, nfe=5)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document(plan, NOISE.schedule)))
    result = run("unipc-3", path, "--steps", 5)
    assert result.exit_code == 0, result.output
    assert "the same: no coefficient differs by more than 0.0e+00" in result.output
    lenient = run("euler", f"{HERE}:euler_with_noise", "--schedule", "edm", "--grid", "edm", "--tolerance", 0.5)
    assert lenient.exit_code == 1
    assert "final step" in lenient.output or "noise" in lenient.output or "coefficients" in lenient.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dpmp-2m", "ddim"], "did you mean 'dpmpp-2m'"),
        (["ddim", "diffusers:DDIMSchedular"], "did you mean 'DDIMScheduler'"),
        (["ddim", "diffusers:DDIMScheduler", "--set-b", "eta2=1"], "DDIMScheduler has no setting 'eta2'"),
        (["ddim", "diffusers:DDIMScheduler", "--schedule", "sd3"], "DDIMScheduler matches no flows"),
        (["euler", "diffusers:FlowMatchEulerDiscreteScheduler"], "FlowMatchEulerDiscreteScheduler takes no betas"),
        (["ddim", "diffusers:DDIMScheduler", "--schedule", "cosine"], "table of betas"),
        (["ddim", "diffusers:PlanScheduler", "--schedule", "cosine"], "table of betas"),
        (["ddim", "diffusers:PlanScheduler", "--set-b", "sampler=rk45"], "chooses its steps"),
        (["ddim", "diffusers:PlanScheduler", "--set-b", "eta2=1"], "unknown option of sampler 'dpmpp-2m': 'eta2'"),
        (["euler", "diffusers:EDMEulerScheduler"], "EDMEulerScheduler is for schedule 'edm'"),
        (
            ["euler", "diffusers:SCMScheduler"],
            "scheduler SCMScheduler cannot be compared: its network predicts on a circle",
        ),
        (["ddim", "math:sampler"], "math has no function 'sampler'"),
        (["ddim", "nowhere.samplers:one"], "No module named 'nowhere'"),
        ([f"{HERE}:host", f"{HERE}:host"], "give a grid"),
        (["ddim", "nowhere.json"], "nowhere.json"),
        (["ddim", "ddpm", "--tolerance", 2], "tolerance must lie between 0 and 1"),
    ],
)
def test_a_mistake_is_one_message(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output


def test_a_function_may_lie_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_euler.py").write_text(
        "def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):\n"
        "    for a, b in zip(sigmas, sigmas[1:]):\n"
        "        x = x + (x - model(x, a.expand(len(x)))) / a * (b - a)\n"
        "    return x\n"
    )
    assert run("euler", "my_euler:sample", "--tolerance", 1e-4).exit_code == 0
