"""Students: loading, sampling with their own plans, stochastic sampling, and the folder for diffusers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from distill.network import PatchUNet
from distill.student import Student, ddim_plan, load_student, stochastic_plan, to_diffusers
from samplers import EpsModel, make_plan, run_plan, schedules
from samplers.grid import make_grid
from samplers.noise import standard_normal
from samplers.schedule import Schedule

COSINE = schedules.cosine()


def network(**changes: Any) -> PatchUNet:
    torch.manual_seed(0)
    made = PatchUNet(**{"size": 8, "widths": [16, 16], "classes": 3, **changes})
    nn.init.normal_(made.unet.conv_out.weight, std=0.1)
    for name, value in made.named_parameters():
        if "scalars" in name:
            nn.init.normal_(value, std=0.3)
    return made.eval()


def plans(*counts: int) -> dict[int, Any]:
    return {n: ddim_plan(COSINE, make_grid(COSINE, "sgm", n).t) for n in counts}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    folder = tmp_path_factory.mktemp("student")
    info = {"student": {"method": "progressive", "steps": [1, 4]}}
    save_checkpoint(folder, Checkpoint(network(), COSINE, "v", info, plans(1, 4)))
    return load_student(folder)


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Student:
    folder = tmp_path_factory.mktemp("guided")
    info = {"student": {"method": "guided", "steps": [2], "guidance": [0.0, 4.0]}}
    save_checkpoint(folder, Checkpoint(network(scalars=["guidance"]), COSINE, "v", info, plans(2)))
    return load_student(folder)


# loading ---------------------------------------------------------------------------------------------------------------


def test_a_student_says_what_it_was_trained_for(student: Student, guided: Student) -> None:
    assert (student.classes, student.shape, student.scalars) == (3, (1, 8, 8), ())
    assert student.plans == plans(1, 4)
    assert student.info["student"]["steps"] == [1, 4]
    assert student.model.predicts == "v"
    assert guided.scalars == ("guidance",)


def test_a_model_without_plans_is_no_student(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Checkpoint(network(), COSINE, "v", {}))
    with pytest.raises(CheckpointError, match="no plans: it is no student but a model for any sampler"):
        load_student(tmp_path)


# sampling --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [1, 4])
def test_a_student_samples_with_its_plan(calls: int, student: Student) -> None:
    cond = {"class_labels": torch.tensor([0, 1, 2])}
    x_T = standard_normal(5, torch.tensor([7, 8, 9]), 0, (1, 8, 8)) * student.plans[calls].sigma_T
    expected = run_plan(student.plans[calls], student.model, x_T, cond=cond)
    drawn = student.sample(calls, shape=(3, 1, 8, 8), seed=5, indices=torch.tensor([7, 8, 9]), cond=cond)
    assert torch.equal(drawn, expected)
    assert torch.equal(student.sample(calls, x_T=x_T, cond=cond), expected)
    assert not torch.equal(student.sample(calls, x_T=x_T), expected)


def test_one_step_gives_the_networks_x0(student: Student) -> None:
    x_T = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = student.model.x0(x_T, student.plans[1].times[0]).detach()
    torch.testing.assert_close(student.sample(1, x_T=x_T), expected, rtol=1e-4, atol=1e-4)


def test_a_stochastic_student_makes_the_same_calls_with_noise(student: Student) -> None:
    first, again, other = (student.sample(4, shape=(2, 1, 8, 8), seed=seed, stochastic=True) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.allclose(first, student.sample(4, shape=(2, 1, 8, 8)), atol=1e-2)


@pytest.mark.parametrize("stochastic", [False, True])
def test_guidance_reaches_the_network(stochastic: bool, guided: Student) -> None:
    x_T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    plan = stochastic_plan(COSINE, guided.plans[2].times) if stochastic else guided.plans[2]
    for weight in (0.0, 1.5, 4):
        expected = run_plan(plan, guided.model, x_T, cond={"guidance": torch.full((2,), float(weight))})
        assert torch.equal(guided.sample(2, x_T=x_T, guidance=weight, stochastic=stochastic), expected)
    assert not torch.allclose(guided.sample(2, x_T=x_T, guidance=0.0), guided.sample(2, x_T=x_T, guidance=4.0))


@pytest.mark.parametrize("weight", [-0.1, 4.01, float("nan")])
def test_guidance_outside_the_trained_range_is_refused(weight: float, guided: Student) -> None:
    with pytest.raises(ValueError, match=r"guidance must be in the range trained for, 0 to 4, got"):
        guided.sample(2, shape=(1, 1, 8, 8), guidance=weight)


def test_without_a_weight_there_is_no_guidance(guided: Student) -> None:
    x_T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(guided.sample(2, x_T=x_T), guided.sample(2, x_T=x_T, guidance=0.0))


def test_a_student_of_several_step_counts_is_told_which(tmp_path: Path) -> None:
    info = {"student": {"scalars": {"2": {"steps": 1.0}, "4": {"steps": 2.0}}}}
    save_checkpoint(tmp_path, Checkpoint(network(scalars=["steps"]), COSINE, "v", info, {**plans(2), **plans(4)}))
    several, x_T = load_student(tmp_path), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for calls, value in ((2, 1.0), (4, 2.0)):
        told = {"steps": torch.full((2,), value)}
        assert torch.equal(
            several.sample(calls, x_T=x_T), run_plan(several.plans[calls], several.model, x_T, cond=told)
        )
    wrong = run_plan(several.plans[2], several.model, x_T, cond={"steps": torch.full((2,), 2.0)})
    assert not torch.equal(several.sample(2, x_T=x_T), wrong)


def test_guidance_of_a_student_that_takes_none_is_refused(student: Student) -> None:
    with pytest.raises(ValueError, match=r"guidance must be None for a network that does not take it, got 2"):
        student.sample(4, shape=(1, 1, 8, 8), guidance=2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calls": 3, "shape": (1, 1, 8, 8)}, r"calls must be one that the student was trained for, \[1, 4\], got 3"),
        ({"calls": 4}, "exactly one of x_T and shape, got none"),
        ({"calls": 4, "shape": (1, 1, 8, 8), "x_T": torch.zeros(1, 1, 8, 8)}, "got both"),
        ({"calls": 4, "shape": (1, 8, 8)}, r"shape must be \(B, 1, 8, 8\) with B > 0, got \(1, 8, 8\)"),
        ({"calls": 4, "shape": (0, 1, 8, 8)}, r"with B > 0, got \(0, 1, 8, 8\)"),
        ({"calls": 4, "x_T": torch.zeros(2, 1, 6, 6)}, r"x_T must be \(B, 1, 8, 8\) with B > 0, got \(2, 1, 6, 6\)"),
        ({"calls": 4, "shape": (1, 1, 8, 8), "seed": -1}, "seed must be"),
    ],
)
def test_what_a_student_cannot_sample_is_refused(arguments: dict[str, Any], message: str, student: Student) -> None:
    with pytest.raises(ValueError, match=message):
        student.sample(**arguments)


# plans -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "vp_linear", "edm", "flow", "zero_snr"], indirect=True)
@pytest.mark.parametrize("final", ["t_min", "zero"])
def test_the_plan_of_a_student_is_ddim(final: str, schedule: Schedule, exact: Callable[..., EpsModel]) -> None:
    plan = ddim_plan(schedule, make_grid(schedule, "uniform", 4, final).t)
    usual = make_plan("ddim", schedule, steps=4, grid="uniform", final=final)
    assert (plan.nfe, plan.noises, plan.sampler, plan.prediction) == (4, 0, "ddim", "x0")
    x_T = usual.sigma_T * torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = (run_plan(p, exact(schedule, "v"), x_T) for p in (plan, usual))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_one_step_in_half_precision_does_not_divide_by_alpha(student: Student) -> None:
    x_T = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    coarse = EpsModel(copy.deepcopy(student.model.net).bfloat16(), COSINE, "v")  # type: ignore[attr-defined]
    exact_x0 = student.sample(1, x_T=x_T)
    errors = [
        float((run_plan(plan, coarse, x_T.bfloat16()).float() - exact_x0).square().mean().sqrt())
        for plan in (student.plans[1], make_plan("ddim", COSINE, steps=1, grid="sgm"))
    ]
    assert errors[0] < 0.02 < 0.1 < errors[1]


# stochastic sampling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "vp_linear", "edm", "flow", "zero_snr"], indirect=True)
@pytest.mark.parametrize("final", ["t_min", "zero"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_stochastic_plan_goes_two_intervals_ahead_and_one_back(steps: int, final: str, schedule: Schedule) -> None:
    grid = make_grid(schedule, "uniform", steps, final)
    plan = stochastic_plan(schedule, grid.t)
    assert (plan.nfe, plan.noises, plan.steps) == (steps, steps - 1, steps)
    assert [call.t for call in plan.calls] == grid.t[:-1].tolist()
    rng = np.random.default_rng(0)
    x = x_T = torch.from_numpy(rng.normal(size=(3, 2)))
    z, clean = torch.from_numpy(rng.normal(size=(steps, 3, 2))), torch.tensor([0.4, -0.2], dtype=torch.float64)
    a, s = grid.alpha, grid.sigma
    for i in range(steps):
        x0 = 0.3 * x + clean
        k = min(i + 2, steps)
        ahead = a[k] * x0 + s[k] * (x - a[i] * x0) / s[i]
        transfer = a[i + 1] / a[k]
        added = s[i + 1] ** 2 - (transfer * s[k]) ** 2
        x = transfer * ahead + (np.sqrt(added) * z[i] if i < steps - 1 else 0.0)
    model = EpsModel(lambda x, t: 0.3 * x + clean, schedule, "x0")
    got = run_plan(plan, model, x_T, noise_source=lambda k, like: z[k])
    torch.testing.assert_close(got, x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "flow"], indirect=True)
def test_stochastic_samples_have_the_moments_of_the_data(
    schedule: Schedule, exact: Callable[..., EpsModel], mixture: Any
) -> None:
    plan, generator = stochastic_plan(schedule, make_grid(schedule, "sgm", 60).t), torch.Generator().manual_seed(0)
    start = torch.randn(8000, 2, dtype=torch.float64, generator=generator) * plan.sigma_T

    def noise(k: int, like: Tensor) -> Tensor:
        return torch.randn(like.shape, dtype=like.dtype, generator=generator)

    got = run_plan(plan, exact(schedule, "v"), start, noise_source=noise)
    truth = moments(mixture)
    for mine, wanted in zip((got.mean(0), got.T.cov()), truth, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0.06)


def moments(mixture: Any) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of the data."""
    weights, means = mixture.weights, mixture.means
    mean = (weights[:, None] * means).sum(0)
    inside = mixture.residual[:, None, None] * torch.eye(mixture.dim, dtype=torch.float64)
    if mixture.basis is not None:
        inside = inside + mixture.basis @ torch.diag_embed(mixture.variances) @ mixture.basis.mT
    apart = means - mean
    return mean, (weights[:, None, None] * (inside + apart[:, :, None] * apart[:, None, :])).sum(0)


def test_nodes_that_rise_are_refused() -> None:
    with pytest.raises(ValueError, match="decrease strictly"):
        stochastic_plan(COSINE, [0.1, 0.5])


# diffusers ---------------------------------------------------------------------------------------------------------------


def test_diffusers_loads_the_network(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    checkpoint = Checkpoint(network(patch=1), COSINE, "v", {}, plans(2))
    to_diffusers(checkpoint, tmp_path / "unet")
    assert {path.name for path in (tmp_path / "unet").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    loaded = UNet2DModel.from_pretrained(tmp_path / "unet")
    x, t, labels = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)
    with torch.no_grad():
        ours = checkpoint.network(x, t, labels)
        theirs = loaded(x, checkpoint.network.time_scale * t, labels).sample
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 2}, "must have patch=1 to be a diffusers UNet2DModel.*got patch=2"),
        ({"patch": 1, "scalars": ["guidance"]}, r"must have no scalars.*got scalars=\['guidance'\]"),
    ],
)
def test_a_network_that_diffusers_does_not_have_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        to_diffusers(Checkpoint(network(**changes), COSINE, "v", {}), tmp_path / "unet")
    assert not (tmp_path / "unet").exists()
