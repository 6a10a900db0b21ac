"""`fewstep export`: the file, and schedulers of diffusers that take its lists."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import samplers
from bench.cli import main
from bench.export import NAMED, named_noise, plan_for
from samplers import make_plan, schedules
from samplers.plan import Plan


def run(*arguments):
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def exported(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_the_file_is_the_plan_with_its_lists(tmp_path):
    out = tmp_path / "new" / "plan.json"
    result = run("dpmpp-2m", "--nfe", 8, "--schedule", "sd15", "--out", out)
    assert result.exit_code == 0, result.output
    assert "dpmpp-2m: 8 steps, 8 network calls" in result.output
    document = json.loads(out.read_text())
    schedule = named_noise("sd15").schedule
    plan = make_plan("dpmpp-2m", schedule, nfe=8)
    assert Plan.from_json(out.read_text()) == plan
    assert document["sigmas"] == schedule.sigma_bar(np.array(plan.times)).tolist()
    assert document["timesteps"] == list(plan.times[:-1])
    assert len(document["sigmas"]) == 9


def test_the_file_fits_the_published_schema():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(samplers.__file__).parent / "plan.schema.json").read_text())
    jsonschema.validate(exported("dpmpp-sde", "--steps", 3, "--schedule", "edm", "--final", "zero"), schema)


def test_options_and_grid_reach_the_plan():
    document = exported("ddim", "--steps", 4, "--schedule", "ddpm", "--grid", "trailing", "--option", "eta=0.5")
    schedule = schedules.from_betas(np.linspace(1e-4, 0.02, 1000))
    assert Plan.from_json(json.dumps(document)) == make_plan("ddim", schedule, steps=4, grid="trailing", eta=0.5)
    assert document["sigmas"][-1] == 0.0
    assert document["timesteps"] == [999, 749, 499, 249]


@pytest.mark.parametrize("name", NAMED)
def test_every_named_schedule_has_a_plan(name):
    plan = plan_for("dpmpp-2m", named_noise(name), steps=4)
    assert plan.nfe == 4
    document = exported("dpmpp-2m", "--steps", 4, "--schedule", name)
    assert len(document["sigmas"]) == 5
    assert np.isfinite(document["sigmas"]).all()
    assert (np.diff(document["sigmas"]) < 0).all()


def test_stable_diffusion_has_its_published_range():
    schedule = named_noise("sdxl").schedule
    assert float(schedule.sigma_bar(999.0)) == pytest.approx(14.6146, rel=1e-5)
    assert float(schedule.sigma_bar(0.0)) == pytest.approx(0.029167, rel=1e-4)


@pytest.mark.parametrize("grid", ["karras", "ays", "trailing"])
def test_euler_of_diffusers_takes_the_sigmas(grid):
    diffusers = pytest.importorskip("diffusers")
    document = exported("euler", "--steps", 6, "--schedule", "sd15", "--grid", grid, "--final", "zero")
    made = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    made.set_timesteps(sigmas=document["sigmas"])
    np.testing.assert_allclose(made.sigmas, document["sigmas"], rtol=1e-6)
    # theirs is linear in log sigma between training steps, ours in log alpha; both are exact at training steps
    np.testing.assert_allclose(made.timesteps, document["timesteps"], atol=0.05 if grid == "karras" else 2e-3)


def test_dpm_solver_of_diffusers_takes_the_timesteps_of_a_grid_of_training_steps():
    diffusers = pytest.importorskip("diffusers")
    document = exported("dpmpp-2m", "--steps", 8, "--schedule", "sd15", "--grid", "trailing")
    made = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", final_sigmas_type="zero"
    )
    made.set_timesteps(timesteps=document["timesteps"])
    np.testing.assert_allclose(made.sigmas, document["sigmas"], rtol=1e-4)


@pytest.mark.parametrize(("name", "shift"), [("sd3", 3.0), ("flux-schnell", 1.0)])
def test_flow_matching_of_diffusers_takes_the_sigmas(name, shift):
    diffusers = pytest.importorskip("diffusers")
    document = exported("euler", "--steps", 5, "--schedule", name)
    made = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    made.set_timesteps(sigmas=document["sigmas"][:-1])  # it appends the 0
    np.testing.assert_allclose(made.sigmas, document["sigmas"], atol=1e-7)
    shifted = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)  # as the pipelines call it
    shifted.set_timesteps(sigmas=np.linspace(1.0, 1 / 5, 5))
    np.testing.assert_allclose(shifted.sigmas, document["sigmas"], atol=1e-7)
    x = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network, y = (lambda x, t: torch.sin(3 * x) * (1 + t)), x
    for t, sigma in zip(made.timesteps, made.sigmas.tolist(), strict=False):
        y = made.step(network(y, sigma), t, y).prev_sample
    ours = samplers.run_plan(
        Plan.from_json(json.dumps(document)),
        samplers.EpsModel(lambda x, t: network(x, t[:, None]), schedules.flow(), "flow"),
        x,
    )
    assert (ours - y).abs().max() < 2e-6


def test_a_scheduler_config_is_a_schedule(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    got = exported("dpmpp-2m", "--nfe", 8, "--schedule", path)["sigmas"]
    np.testing.assert_allclose(got, exported("dpmpp-2m", "--nfe", 8, "--schedule", "sd15")["sigmas"], rtol=1e-9)
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path)
    flow = exported("euler", "--nfe", 4, "--schedule", path)
    assert flow["sigmas"] == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    assert exported("euler", "--nfe", 4, "--schedule", path, "--shift", 1)["sigmas"] == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dpmpp-2m", "--schedule", "sd15"], "give exactly one of steps, nfe"),
        (["dpmp-2m", "--nfe", 8, "--schedule", "sd15"], "did you mean 'dpmpp-2m'"),
        (["dpmpp-2m", "--nfe", 8, "--schedule", "sd14"], "or 'sd15'"),
        (["dpmpp-2m", "--nfe", 8, "--schedule", "nowhere.json"], "nowhere.json"),
        (["dpmpp-2m", "--nfe", 8], "Missing option '--schedule'"),
        (["dpmpp-2m", "--nfe", 8, "--schedule", "sd15", "--option", "eta=1"], "unknown option of sampler 'dpmpp-2m'"),
        (["ddim", "--nfe", 8, "--schedule", "sd15", "--option", "eta"], "--option takes NAME=VALUE, got 'eta'"),
        (["ddim", "--nfe", 8, "--schedule", "sd15", "--option", "eta=much"], "eta of sampler 'ddim' must be"),
        (["ddim", "--nfe", 8, "--schedule", "sd15", "--shift", 3], "--shift is for flow models"),
        (["ddim", "--nfe", 8, "--schedule", "sd3", "--shift", -1], "shift must be positive"),
        (["ddim", "--nfe", 8, "--schedule", "sd3", "--grid", "karras"], "use a grid in t"),
        (["rk45", "--steps", 8, "--schedule", "sd15"], "has no plan"),
    ],
)
def test_a_mistake_is_one_message(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output


def test_a_file_that_is_no_configuration_is_named(tmp_path):
    path = tmp_path / "scheduler_config.json"
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "_class_name"),
        ('{"_class_name": "DDIMSchedular"}', "DDIMScheduler"),
        ('{"_class_name": "DDIMScheduler", "beta_strat": 0.1}', "did you mean 'beta_start'"),
    ):
        path.write_text(text)
        result = run("ddim", "--nfe", 4, "--schedule", path)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
