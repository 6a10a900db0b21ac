"""Progressive distillation: the target by hand, linear students that reach the closed form, planted faults, and runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill import distillation, progressive
from distill.checkpoint import Checkpoint
from distill.documents import validated
from distill.method import Batch, column
from distill.progressive import Progressive, ProgressiveConfig, student_target
from distill.rows import Stretches
from distill.student import ddim_plan
from samplers import EpsModel, run_plan, schedules
from samplers.grid import Grid, make_grid
from samplers.registry import get_sampler
from samplers.schedule import Schedule

MEAN, STD = 0.6, 0.3
COSINE = schedules.cosine()


# the target ------------------------------------------------------------------------------------------------------------


def ddim(schedule: Schedule, x0: Callable[[Tensor, float], Tensor], x: Tensor, times: list[float]) -> Tensor:
    """DDIM written out: Song et al. 2021, equation 12 with eta = 0."""
    for t, t_next in itertools.pairwise(times):
        clean = x0(x, t)
        eps = (x - schedule.alpha(t) * clean) / schedule.sigma(t)
        x = schedule.alpha(t_next) * clean + schedule.sigma(t_next) * eps
    return x


@pytest.mark.parametrize("schedule", ["cosine", "vp_linear", "edm", "flow", "zero_snr"], indirect=True)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("part", [(0, 1, 2), (3, 4, 5), (6, 7, 8)])
def test_one_step_to_the_target_is_two_steps_of_the_teacher(
    part: tuple[int, int, int], dtype: torch.dtype, limit: float, schedule: Schedule, exact: Callable[..., EpsModel]
) -> None:
    times = [float(np.append(np.linspace(schedule.t_max, schedule.t_min, 9)[:-1], schedule.t_zero)[i]) for i in part]
    model = exact(schedule, "v")
    x_t = torch.randn(64, 2, dtype=dtype, generator=torch.Generator().manual_seed(0)) * float(schedule.sigma(times[0]))
    x_end = ddim(schedule, lambda x, t: model.x0(x, t), x_t, times)
    ends = [
        f(torch.full((64, 1), times[i], dtype=torch.float64)) for i in (0, 2) for f in (schedule.alpha, schedule.sigma)
    ]
    target = student_target(x_t, x_end, *ends)
    landed = ddim(schedule, lambda x, t: target, x_t, [times[0], times[2]])
    assert target.dtype == dtype
    assert (landed - x_end).abs().max() <= limit * x_t.abs().max()


# a Gaussian, whose teacher and students are linear -----------------------------------------------------------------------


class Linear(nn.Module):
    """v = a x + b with a and b for each time: what a network of any size is for data from a Gaussian."""

    shape, classes, scalars = (1,), 0, ()

    def __init__(self, times: np.ndarray) -> None:
        super().__init__()
        self.times = torch.tensor(times)
        self.scale, self.shift = (nn.Parameter(torch.zeros(len(times), dtype=torch.float64)) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        number = (t[:, None] - self.times).abs().argmin(1)
        assert torch.allclose(self.times[number], t)
        return column(self.scale[number], x) * x + column(self.shift[number], x)


class Gaussian(nn.Module):
    """v of x_t where x_0 ~ N(MEAN, STD^2): E[x_0 | x] is a regression line."""

    shape, classes, scalars = (1,), 0, ()

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        alpha, sigma = column(COSINE.alpha(t), x), column(COSINE.sigma(t), x)
        return (alpha * x - posterior_mean(x, alpha, sigma)) / sigma


def posterior_mean(x: Any, alpha: Any, sigma: Any) -> Any:
    return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)


@pytest.fixture
def gaussian(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Progressive]:
    """`gaussian(**settings)`: the method with the exact model of a Gaussian as its teacher."""
    monkeypatch.setattr(distillation, "load_checkpoint", lambda folder: Checkpoint(Gaussian(), COSINE, "v", {}))  # type: ignore[arg-type]
    return lambda **settings: Progressive(ProgressiveConfig(teacher="gaussian", dtype="fp32", **settings))


def batch_of(method: Progressive, phase: int, size: int = 256) -> Batch:
    generator = torch.Generator().manual_seed(phase)
    x0 = MEAN + STD * torch.randn(size, 1, dtype=torch.float64, generator=generator)
    batch = method.draw(x0, torch.zeros(size, dtype=torch.long), generator, phase)
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def trained(method: Progressive, phase: int, before: Checkpoint | None) -> tuple[Checkpoint, float]:
    """A linear student at the least loss of a phase, and that loss: it is a parabola, so one Newton step finds it."""
    method.begin(phase, before, torch.device("cpu"))
    student, batch = Linear(method.nodes(method.config.steps[phase])[:-1]), batch_of(method, phase)
    weights = list(student.parameters())
    slope = torch.cat(torch.autograd.grad(method.loss(student, batch, phase), weights, create_graph=True))
    curvature = torch.stack([torch.cat(torch.autograd.grad(one, weights, retain_graph=True)) for one in slope])
    least = nn.utils.parameters_to_vector(weights) - torch.linalg.solve(curvature, slope)
    nn.utils.vector_to_parameters(least.detach(), weights)
    return Checkpoint(student, COSINE, "v", {}), float(method.loss(student, batch, phase).detach())  # type: ignore[arg-type]


def composed(method: Progressive, steps: int) -> list[tuple[float, float]]:
    """The x0 of each step of the optimal student as (slope, offset) in x_t, from two affine DDIM steps done by hand."""
    nodes, optimal = method.nodes(2 * steps), []
    alpha, sigma = COSINE.alpha(nodes), COSINE.sigma(nodes)
    for i in range(0, 2 * steps, 2):
        slope, offset = 1.0, 0.0  # of the state in x_t
        for j in (i, i + 1):
            gain = alpha[j] * STD**2 / (alpha[j] ** 2 * STD**2 + sigma[j] ** 2)
            clean = gain * slope, MEAN + gain * (offset - alpha[j] * MEAN)
            ratio = sigma[j + 1] / sigma[j]
            slope = alpha[j + 1] * clean[0] + ratio * (slope - alpha[j] * clean[0])
            offset = alpha[j + 1] * clean[1] + ratio * (offset - alpha[j] * clean[1])
        ratio = sigma[i + 2] / sigma[i]
        whole = alpha[i + 2] - ratio * alpha[i]
        optimal.append(((slope - ratio) / whole, offset / whole))
    return optimal


def learned(method: Progressive, student: Checkpoint, steps: int) -> list[tuple[float, float]]:
    """The same of a linear student: x0 = alpha x - sigma v."""
    nodes = method.nodes(steps)[:-1]
    network: Any = student.network
    scale, shift = network.scale.detach().numpy(), network.shift.detach().numpy()
    return list(zip(COSINE.alpha(nodes) - COSINE.sigma(nodes) * scale, -COSINE.sigma(nodes) * shift, strict=True))


def misses_closed_form(method: Progressive) -> bool:
    student, _ = trained(method, 0, None)
    error = np.abs(np.array(learned(method, student, 4)) - np.array(composed(method, 4))).max()
    return bool(error > 1e-2)


@pytest.mark.parametrize("weight", ["truncated_snr", "snr_plus_one"])
def test_a_linear_student_reaches_the_closed_form(weight: str, gaussian: Callable[..., Progressive]) -> None:
    method = gaussian(steps=(4,), weight=weight)
    student, loss = trained(method, 0, None)
    assert loss < 1e-16
    np.testing.assert_allclose(learned(method, student, 4), composed(method, 4), rtol=0, atol=1e-6)


def test_a_student_of_a_linear_teacher_is_exact_in_one_step(gaussian: Callable[..., Progressive]) -> None:
    method = gaussian(steps=(4, 2, 1))
    student = None
    for phase in range(3):
        student, _ = trained(method, phase, student)
    plan = method.checkpoint(student.network, 2, {}).plans[1]
    x_T = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    got = run_plan(plan, EpsModel(student.network, COSINE, "v"), x_T)
    fine = get_sampler("ddim").plan(Grid(COSINE, method.nodes(8)))
    expected = run_plan(fine, EpsModel(Gaussian(), COSINE, "v"), x_T)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_an_accurate_first_teacher_gives_a_student_on_the_true_path(gaussian: Callable[..., Progressive]) -> None:
    x_T = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    alpha, sigma = COSINE.alpha(COSINE.t_max), COSINE.sigma(COSINE.t_max)
    true = MEAN + STD / np.sqrt(alpha**2 * STD**2 + sigma**2) * (x_T - alpha * MEAN)
    errors = {}
    for sampler in ("ddim", "dpm-solver-3s"):
        method = gaussian(steps=(2, 1), sampler=sampler, substeps=16, grid="time-quadratic", final="zero")
        first, _ = trained(method, 0, None)
        student, _ = trained(method, 1, first)
        got = run_plan(method.checkpoint(student.network, 1, {}).plans[1], EpsModel(student.network, COSINE, "v"), x_T)
        errors[sampler] = float((got - true).abs().max())
    assert errors["dpm-solver-3s"] < 2e-3 < 10 * errors["dpm-solver-3s"] < errors["ddim"]


# planted faults ----------------------------------------------------------------------------------------------------------


def wrong_sign(x_t: Tensor, x_end: Tensor, *ends: Tensor) -> Tensor:
    alpha, sigma, alpha_end, sigma_end = ends
    ratio = sigma_end / sigma
    return (x_end + ratio * x_t) / (alpha_end - ratio * alpha)


def middle_for_end(x_t: Tensor, x_end: Tensor, *ends: Tensor) -> Tensor:
    """t' where the equation has t''."""
    alpha, sigma, alpha_end, sigma_end = ends
    t, t_end = (COSINE.t_of_lam(torch.log(a / s)) for a, s in ((alpha, sigma), (alpha_end, sigma_end)))
    middle = 0.5 * (t + t_end.clamp(min=0))
    return student_target(x_t, x_end, alpha, sigma, COSINE.alpha(middle), COSINE.sigma(middle))


def swapped_alphas(x_t: Tensor, x_end: Tensor, *ends: Tensor) -> Tensor:
    alpha, sigma, alpha_end, sigma_end = ends
    return student_target(x_t, x_end, alpha_end, sigma, alpha, sigma_end)


def data_instead_of_the_path(x_t: Tensor, x_end: Tensor, *ends: Tensor) -> Tensor:
    """The posterior mean, which is what the teacher was trained on."""
    return posterior_mean(x_t, ends[0], ends[1])


@pytest.mark.parametrize("fault", [wrong_sign, middle_for_end, swapped_alphas, data_instead_of_the_path])
def test_a_fault_in_the_target_misses_the_closed_form(
    fault: Callable[..., Tensor], gaussian: Callable[..., Progressive], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progressive, "student_target", fault)
    assert misses_closed_form(gaussian(steps=(4,)))


def test_without_a_fault_it_does_not_miss(gaussian: Callable[..., Progressive]) -> None:
    assert not misses_closed_form(gaussian(steps=(4,)))


def test_only_one_teacher_step_misses_the_closed_form(
    gaussian: Callable[..., Progressive], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = gaussian(steps=(4,))
    coarse = Stretches("ddim", COSINE, [[*method.nodes(4)[i : i + 2]] for i in range(4)])
    monkeypatch.setattr(Progressive, "stretches", lambda self, phase: coarse)
    assert misses_closed_form(method)


# the loss ------------------------------------------------------------------------------------------------------------------


class Curved(nn.Module):
    """A network that is not linear, whose labels matter."""

    shape, classes, scalars = (2,), 3, ()

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return torch.tanh(1.3 * x) * column(1 + t, x) + column(0.2 * class_labels.to(x.dtype), x)


@pytest.mark.parametrize("weight", ["truncated_snr", "snr_plus_one"])
@pytest.mark.parametrize("phase", [0, 1])
def test_the_loss_is_the_papers(phase: int, weight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "load_checkpoint", lambda folder: Checkpoint(Curved(), COSINE, "v", {}))  # type: ignore[arg-type]
    method = Progressive(ProgressiveConfig(teacher="curved", dtype="fp32", steps=(4, 2), substeps=3, weight=weight))
    before = Checkpoint(Curved(), COSINE, "v", {}) if phase else None  # type: ignore[arg-type]
    method.begin(phase, before, torch.device("cpu"))
    batch = method.draw(torch.randn(9, 2), torch.arange(9) % 3, torch.Generator().manual_seed(4), phase)
    batch |= {name: batch[name].double() for name in ("x0", "eps")}
    student, parts = lambda x, t, class_labels: 0.3 * x, 2 if phase else 3
    total = 0.0
    for row in range(9):
        place, label = int(batch["place"][row]), batch["labels"][row : row + 1]
        times = method.nodes(parts * method.config.steps[phase])[parts * place :][: parts + 1].tolist()
        a, s = float(COSINE.alpha(times[0])), float(COSINE.sigma(times[0]))
        x_t = a * batch["x0"][row : row + 1] + s * batch["eps"][row : row + 1]

        def x0(x: Tensor, t: float, label: Tensor = label) -> Tensor:
            return COSINE.alpha(t) * x - COSINE.sigma(t) * Curved()(x, torch.tensor([t]), label)

        x_end = ddim(COSINE, x0, x_t, times)
        r = float(COSINE.sigma(times[-1])) / s
        target = (x_end - r * x_t) / (float(COSINE.alpha(times[-1])) - r * a)
        if weight == "snr_plus_one":  # on this schedule the squared error of v
            difference = 0.3 * x_t - (a * x_t - target) / s
        else:
            difference = max(a / s, 1.0) * (a * x_t - s * 0.3 * x_t - target)
        total += float(difference.square().mean()) / 9
    assert float(method.loss(student, batch, phase)) == pytest.approx(total, rel=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["edm", "flow", "zero_snr", "discrete"], indirect=True)
@pytest.mark.parametrize("predicts", ["v", "x0"])
def test_the_exact_student_of_fine_steps_has_almost_no_loss_on_any_schedule(
    predicts: str, schedule: Schedule, exact: Callable[..., EpsModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    net: Any = nn.Module()
    net.forward, net.classes, net.scalars = lambda x, t, class_labels: exact(schedule, predicts).net(x, t), 0, ()
    monkeypatch.setattr(distillation, "load_checkpoint", lambda folder: Checkpoint(net, schedule, predicts, {}))
    grid = "karras" if schedule.name == "edm" else "sgm"
    losses = []
    for steps in (16, 128):
        method = Progressive(ProgressiveConfig(teacher="exact", dtype="fp32", steps=(steps,), grid=grid))
        method.begin(0, None, torch.device("cpu"))
        batch = method.draw(torch.randn(512, 2), torch.zeros(512).long(), torch.Generator().manual_seed(0), 0)
        batch |= {name: batch[name].double() for name in ("x0", "eps")}
        losses.append(float(method.loss(net, batch, 0)))
    assert 0 < losses[1] < 0.2 * losses[0]


def test_steps_are_drawn_evenly_and_labels_are_dropped(gaussian: Callable[..., Progressive]) -> None:
    method = gaussian(steps=(8, 4), drop_label=0.5)
    method.teacher.network.classes = 7
    labels = torch.zeros(4000, dtype=torch.long)
    batch = method.draw(torch.zeros(4000, 1), labels, torch.Generator().manual_seed(0), 0)
    assert torch.bincount(batch["place"]).tolist() == [500] * 8
    assert 0.45 < float((batch["labels"] == 7).float().mean()) < 0.55
    again = method.draw(torch.zeros(4000, 1), labels, torch.Generator().manual_seed(0), 0)
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_a_draw_that_rounds_up_to_one_is_the_last_step(
    gaussian: Callable[..., Progressive], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progressive, "stratified", lambda count, generator: torch.ones(count))
    batch = gaussian().draw(torch.zeros(3, 1), torch.zeros(3).long(), torch.Generator(), 0)
    assert batch["place"].tolist() == [7, 7, 7]


# nodes, phases and plans -----------------------------------------------------------------------------------------------------


def test_the_times_of_each_student_are_among_those_of_its_teacher(gaussian: Callable[..., Progressive]) -> None:
    method = gaussian(steps=(8, 4, 2, 1), substeps=3, sampler="dpmpp-2m")
    fine = np.linspace(COSINE.t_max, COSINE.t_min, 25)
    fine[-1] = 0.0
    np.testing.assert_allclose(method.nodes(24), fine, atol=1e-12)
    for number, steps in enumerate((8, 4, 2, 1)):
        assert len(method.nodes(steps)) == steps + 1
        times = [plan.times for plan in method.stretches(number).plans]
        taught = {t for plan in times for t in plan}
        assert taught == set(method.nodes(24 if number == 0 else 2 * steps))
        assert [plan[0] for plan in times] == method.nodes(steps)[:-1].tolist()
        assert [plan[-1] for plan in times] == method.nodes(steps)[1:].tolist()


def test_the_phases_are_named_after_their_students_and_anneal_to_zero(gaussian: Callable[..., Progressive]) -> None:
    method = gaussian(images=1280, last_images=2560, learning_rate=0.01, sampler="dpm-solver-3s", substeps=1)
    assert [phase.name for phase in method.phases] == ["8-steps", "4-steps", "2-steps", "1-step"]
    assert [phase.images for phase in method.phases] == [1280, 1280, 1280, 2560]
    assert [phase.calls for phase in method.phases] == [(7 * 3 + 1) / 8, 2, 2, 2]
    assert [method.phases[0].rate(step, 128) for step in range(10)] == pytest.approx(np.arange(10, 0, -1) / 1000)


def test_a_checkpoint_has_the_plan_of_its_steps(gaussian: Callable[..., Progressive]) -> None:
    method = gaussian(steps=(4, 2))
    for number, steps in enumerate((4, 2)):
        found = method.checkpoint(Gaussian(), number, {"images": 3})  # type: ignore[arg-type]
        assert found.info == {"images": 3, "student": {"method": "progressive", "steps": [steps]}}
        assert found.plans == {steps: ddim_plan(COSINE, make_grid(COSINE, "sgm", steps).t)}


# bad input -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(8, 3), (8, 4, 4), (4, 8), (3, 1), (), (0,), (8, 2)])
def test_step_counts_that_are_not_halvings_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"step counts that are not halvings.*got \["):
        ProgressiveConfig(teacher="t", steps=steps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "dim"}, "unknown sampler 'dim'; did you mean 'ddim'"),
        ({"grid": "sgn"}, "unknown grid 'sgn'; did you mean 'sgm'"),
        ({"weight": "snr"}, "weight"),
        ({"final": "denoise"}, "final"),
        ({"substeps": 0}, "substeps"),
        ({"step": (8, 4)}, "step: no such field; did you mean 'steps'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validated(ProgressiveConfig, {"teacher": "t", **settings}, "here")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "ddpm"}, "sampler must be deterministic"),
        ({"sampler": "rk45"}, "has no plan"),
        ({"options": {"order": 2}}, "option of sampler 'ddim'"),
        ({"grid": "ays"}, "ays"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_training(
    settings: dict[str, Any], message: str, gaussian: Callable[..., Progressive]
) -> None:
    with pytest.raises(ValueError, match=message):
        gaussian(**settings)
