"""Simple and fast distillation: linear students that reach the closed form, whose states are handed on, and runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_teacher import one_thread  # noqa: F401
from torch import Tensor, nn

from distill import distillation, matching
from distill.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from distill.config import CONFIGS
from distill.documents import read_yaml, validated
from distill.matching import DISTANCES, Matching, MatchingConfig, ddim_step, matching_loss
from distill.method import column
from distill.network import PatchUNet
from distill.trainer import Trainer
from samplers import EpsModel, make_plan, run_plan, schedules
from samplers.schedule import Schedule

MEAN, STD = 0.6, 0.3
COSINE = schedules.cosine()


# a Gaussian, whose teacher and students are linear -----------------------------------------------------------------------


class Linear(nn.Module):
    """v = a x + b with a and b for each time and each step count: what any network is for data from a Gaussian."""

    scalars, shape, classes = (), (1,), 0

    def __init__(self, places: list[tuple[float, float]]) -> None:
        super().__init__()
        self.places = torch.tensor(
            places, dtype=torch.float64
        )  # of each place the time, and what `log2_steps` is there
        self.line = nn.Parameter(torch.zeros(2, len(places), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, log2_steps: Tensor | None = None) -> Tensor:
        place = torch.stack([t, torch.zeros_like(t) if log2_steps is None else log2_steps], 1)
        number = torch.cdist(place, self.places).argmin(1)
        assert torch.allclose(self.places[number], place)
        return column(self.line[0, number], x) * x + column(self.line[1, number], x)


class Gaussian(nn.Module):
    """v of x_t where x_0 ~ N(MEAN, STD^2): E[x_0 | x] is a regression line."""

    scalars, shape, classes = (), (1,), 0

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        alpha, sigma = column(COSINE.alpha(t), x), column(COSINE.sigma(t), x)
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        return (alpha * x - x0) / sigma


@pytest.fixture
def gaussian(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Matching]:
    """`gaussian(**settings)`: the method with the exact model of a Gaussian, and many steps of it, as its teacher."""
    monkeypatch.setattr(distillation, "load_checkpoint", lambda folder: Checkpoint(Gaussian(), COSINE, "v", {}))  # type: ignore[arg-type]
    fine = {"dtype": "fp32", "norm": "l2", "substeps": 4}
    return lambda **settings: Matching(MatchingConfig(teacher="gaussian", **{**fine, **settings}))


def batch_of(method: Matching, steps: int, size: int = 64) -> dict[str, Tensor]:
    """A batch in float64 of paths of so many steps."""
    seeds = (torch.Generator().manual_seed(seed) for seed in range(100))
    labels = torch.zeros(size, dtype=torch.long)
    batches = (method.draw(torch.zeros(size, 1, dtype=torch.float64), labels, seed, 0) for seed in seeds)
    batch = next(batch for batch in batches if batch["times"].shape[1] == steps + 1)
    return {**batch, "x": batch["x"].double()}


def trained(method: Matching) -> Linear:
    """A linear student at the least loss of the paths of all step counts, from Newton's method.

    The loss is quadratic in the two numbers of a step, and detached between steps: a round is right for one step more.
    """
    method.begin(0, None, torch.device("cpu"))
    counts = method.config.steps
    told = {n: dict(method._told(n)).get("log2_steps", 0.0) for n in counts}
    student = Linear([(t, told[n]) for n in counts for t in method.nodes(n)[:-1]])
    batches, line = [batch_of(method, n) for n in counts], student.line
    for _ in range(max(counts)):
        loss = torch.stack([method.loss(student, batch, 0) for batch in batches]).sum()
        (slope,) = torch.autograd.grad(loss, line, create_graph=True)
        curvature = torch.stack([torch.autograd.grad(s, line, retain_graph=True)[0].flatten() for s in slope.flatten()])
        line.data -= torch.linalg.solve(curvature, slope.detach().flatten()).view_as(line)
    return student


def sampled(method: Matching, student: Linear, x_T: Tensor) -> list[Tensor]:
    """What the student's plans give from x_T, told what its checkpoint says."""
    info = method.checkpoint(student, 0, {}).info["student"]  # type: ignore[arg-type]
    results = []
    for steps, plan in method.plans.items():
        told = {name: torch.full((len(x_T),), value) for name, value in info["scalars"][str(steps)].items()}
        cond = {"class_labels": torch.zeros(len(x_T)).long(), **told}
        results.append(run_plan(plan, EpsModel(student, COSINE, "v"), x_T, cond=cond))
    return results


X_T = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]


def worst(method: Matching) -> float:
    """The largest distance of a trained student's samples from where the teacher's path ends."""
    student, errors = trained(method), []
    for (steps, stretches), got in zip(method._stretches.items(), sampled(method, student, X_T), strict=True):
        end = X_T
        for n in range(steps):
            end = run_plan(stretches.plans[n], EpsModel(Gaussian(), COSINE, "v"), end, cond={"class_labels": None})
        errors.append(float((got - end).abs().max()))
    return max(errors)


@pytest.mark.parametrize("path", ["student", "teacher"])
@pytest.mark.parametrize("steps", [(1,), (3,), (1, 2)], ids=str)
def test_a_linear_student_ends_where_the_teachers_path_does(
    steps: tuple[int, ...], path: str, gaussian: Callable[..., Matching]
) -> None:
    assert worst(gaussian(steps=steps, path=path)) < 1e-6


def test_one_step_after_an_accurate_teacher_is_the_closed_form(gaussian: Callable[..., Matching]) -> None:
    """A step to clean data is x0; along the ODE a state stays as many standard deviations from the mean."""
    alpha, sigma = float(COSINE.alpha(COSINE.t_max)), float(COSINE.sigma(COSINE.t_max))
    slope = STD / math.hypot(alpha * STD, sigma)
    errors = []
    for substeps in (4, 40):
        (got,) = sampled(method := gaussian(steps=(1,), substeps=substeps), trained(method), X_T)
        errors.append(float((got - MEAN - slope * (X_T - alpha * MEAN)).abs().max()))
    assert errors[1] < 3e-4 < 10 * errors[1] < errors[0]


# planted faults ----------------------------------------------------------------------------------------------------------


def wrong_sign(student: EpsModel, x: Tensor, t: Tensor, s: Tensor, cond: dict[str, Tensor]) -> Tensor:
    schedule = student.schedule
    keep = column(schedule.sigma(s) / schedule.sigma(t), x)
    jump = column(schedule.alpha(s), x) + column(schedule.alpha(t), x) * keep
    return keep * x + jump * student.x0(x, t, **cond)


def times_swapped(student: EpsModel, x: Tensor, t: Tensor, s: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """The network is told t, but the step is to clean data and not to s."""
    return student.x0(x, t, **cond)


@pytest.mark.parametrize("fault", [wrong_sign, times_swapped])
def test_a_fault_in_the_step_misses_the_teachers_end(
    fault: Callable[..., Tensor], gaussian: Callable[..., Matching], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "ddim_step", fault)
    assert worst(gaussian(steps=(3,))) > 1e-2


def test_a_wrong_sign_in_the_distance_misses_the_teachers_end(
    gaussian: Callable[..., Matching], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(matching.DISTANCES, "l2", lambda a, b: (a + b).square().mean())
    assert worst(gaussian(steps=(2,))) > 1e-2


# the loss ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "edm", "flow", "zero_snr"], indirect=True)
@pytest.mark.parametrize("predicts", ["v", "x0"])
def test_the_students_step_is_ddims(predicts: str, schedule: Schedule, exact: Callable[..., EpsModel]) -> None:
    model, x = exact(schedule, predicts), torch.randn(7, 2, dtype=torch.float64) * float(schedule.sigma(schedule.t_max))
    grid = "karras" if schedule.name == "edm" else "sgm"
    plan = make_plan("ddim", schedule, steps=3, grid=grid, final="zero")
    times, end = torch.tensor(plan.times, dtype=torch.float64).repeat(7, 1), x
    for n in range(3):
        end = ddim_step(model, end, times[:, n], times[:, n + 1], {})
    torch.testing.assert_close(end, run_plan(plan, model, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("path", ["student", "teacher"])
def test_the_loss_by_hand(path: str, norm: str) -> None:
    """From 1 the student doubles, the teacher adds 5 to where it begins."""
    x = torch.tensor([[1.0]])
    loss = matching_loss(lambda x, n: 2 * x, lambda x, n: x + 5, x, 3, DISTANCES[norm], path)
    ends, targets = (2, 4, 8), (6, 7, 9) if path == "student" else (6, 11, 16)
    power = 1 if norm == "l1" else 2
    assert float(loss) == pytest.approx(sum(abs(a - b) ** power for a, b in zip(ends, targets, strict=True)) / 3)


def test_the_state_handed_on_is_the_students_own_and_detached() -> None:
    weights = [torch.tensor(value, requires_grad=True) for value in (2.0, 3.0, 0.5)]
    seen: list[float] = []

    def teacher(x: Tensor, n: int) -> Tensor:
        seen.append(float(x))
        return 10 * x

    def student(x: Tensor, n: int) -> Tensor:
        assert not x.requires_grad
        return weights[n] * x

    x = torch.tensor([1.5])
    matching_loss(student, teacher, x, 3, DISTANCES["l1"], "student").backward()
    assert seen == [1.5, 3.0, 9.0]
    # |w x - 10 x| has the slope -x in w, whatever the later steps make of it
    assert [float(w.grad) for w in weights] == pytest.approx([-1.5 / 3, -3.0 / 3, -9.0 / 3])  # type: ignore[arg-type]


def test_the_teacher_is_frozen(teacher: Path) -> None:
    method = Matching(MatchingConfig(teacher=str(teacher), **RUN))
    method.begin(0, None, torch.device("cpu"))
    assert not any(p.requires_grad or m.training for m in method.teacher.network.modules() for p in m.parameters())


# step counts ---------------------------------------------------------------------------------------------------------------


def test_each_step_count_is_drawn_and_the_shape_tells_it(gaussian: Callable[..., Matching]) -> None:
    method, labels = gaussian(steps=(4, 1, 2), drop_label=0.5), torch.zeros(64, dtype=torch.long)
    method.teacher.network.classes = 7
    counts = []
    for seed in range(300):
        batch = method.draw(torch.zeros(64, 1), labels, torch.Generator().manual_seed(seed), 0)
        counts.append(batch["times"].shape[1] - 1)
        assert torch.equal(batch["times"][5], torch.tensor(method.nodes(counts[-1])))
        assert all(len(value) == 64 for value in batch.values())
    assert set(counts) == {1, 2, 4}
    assert np.bincount(counts)[[1, 2, 4]].min() > 70
    again = method.draw(torch.zeros(64, 1), labels, torch.Generator().manual_seed(299), 0)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert 0.2 < float((batch["labels"] == 7).float().mean()) < 0.8


def test_the_images_are_not_used_and_the_noise_has_the_plans_deviation(gaussian: Callable[..., Matching]) -> None:
    method, labels = gaussian(), torch.zeros(5000, dtype=torch.long)
    first, other = (
        method.draw(torch.full((5000, 1), value), labels, torch.Generator().manual_seed(0), 0) for value in (0.0, 9.0)
    )
    assert torch.equal(first["x"], other["x"])
    assert float(first["x"].std()) == pytest.approx(method.plans[2].sigma_T, rel=0.05)


def test_the_students_times_are_every_so_manyth_of_the_teachers(gaussian: Callable[..., Matching]) -> None:
    method = gaussian(steps=(2, 3), substeps=4, grid="time-quadratic")
    for n in (2, 3):
        taught = [plan.times for plan in method._stretches[n].plans]
        assert [times[0] for times in taught] == pytest.approx(method.nodes(n)[:-1].tolist())
        assert [times[-1] for times in taught] == pytest.approx(method.nodes(n)[1:].tolist())
        assert all(len(times) == 5 for times in taught)
        assert method.plans[n].times == tuple(method.nodes(n))
        assert method.plans[n].nfe == n
        assert (method.nodes(n)[0], method.nodes(n)[-1]) == (COSINE.t_max, COSINE.t_zero)


def test_the_phase_counts_all_network_calls(gaussian: Callable[..., Matching]) -> None:
    (phase,) = gaussian(steps=(4, 2), substeps=4, sampler="dpmpp-2m").phases
    assert phase.name == "2-4-steps"
    assert phase.calls == 3 * 4 + 3 * (
        3 - 1
    )  # in the mean 3 steps; 4 calls of the teacher a step; 3 with gradient, one counted
    assert gaussian(steps=(1,), substeps=3, sampler="heun").phases[0].name == "1-step"
    assert (
        gaussian(steps=(1,), substeps=3, sampler="heun").phases[0].calls == 5
    )  # the step to clean data takes one call


# bad settings ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": [0, 2]}, r"steps: must be different and at least 1, got \[0, 2\]"),
        ({"steps": [2, 2]}, r"steps: must be different and at least 1, got \[2, 2\]"),
        ({"steps": []}, "steps: .*at least 1 item"),
        ({"sampler": "dpmpp-2mm"}, "sampler: unknown sampler 'dpmpp-2mm'; did you mean .*'dpmpp-2m'"),
        ({"grid": "karas"}, "grid: unknown grid 'karas'; did you mean 'karras'"),
        ({"substeps": 0}, "substeps: .*greater than or equal to 1"),
        ({"norm": "l3"}, "norm: "),
        ({"norms": "l1"}, "norms: no such field; did you mean 'norm'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validated(MatchingConfig, {"teacher": "gaussian", **settings}, "test")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "ddpm"}, "sampler must be deterministic, 'ddpm'"),
        ({"sampler": "ddim", "options": {"eta": 1.0}}, "sampler must be deterministic, 'ddim'"),
        ({"sampler": "rk45"}, "has no plan"),
        ({"options": {"ordre": 2}}, "unknown option of sampler 'dpmpp-3s': 'ordre'"),
        ({"grid": "ays"}, "ays"),
    ],
)
def test_settings_that_do_not_fit_the_teacher_are_refused(
    settings: dict[str, Any], message: str, gaussian: Callable[..., Matching]
) -> None:
    with pytest.raises(ValueError, match=message):
        gaussian(**settings)


@pytest.mark.parametrize("schedule", ["flow", "zero_snr"], indirect=True)
def test_an_epsilon_teacher_without_x0_at_the_start_is_refused(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "load_checkpoint", lambda folder: Checkpoint(Gaussian(), schedule, "eps", {}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"predicts='eps' gives no x0 at t=\d+, where alpha=0"):
        Matching(MatchingConfig(teacher="eps", grid="uniform"))


# runs ------------------------------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "steps": (2, 3),
    "substeps": 2,
    "images": 8 * 12,
    "warmup": 16,
    "cooldown": 32,
    "learning_rate": 3e-3,
    "batch_size": 8,
    "ema_half_lives": (32,),
    "dtype": "fp32",
    "log_every": 4,
    "save_every": 4,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny network with fresh weights."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    network = PatchUNet(size=8, widths=(16, 16), classes=3)
    save_checkpoint(folder, Checkpoint(network.eval(), COSINE, "v", {}))
    return folder


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 1, 8, 8), generator=generator).byte()
    return images, torch.randint(0, 3, (20,), generator=generator)


def run(teacher: Path, folder: Path, **settings: Any) -> tuple[Trainer, Checkpoint]:
    trainer = Trainer(Matching(MatchingConfig(teacher=str(teacher), **{**RUN, **settings})), folder)
    return trainer, trainer.run(*data(), quiet=True)


@pytest.fixture(scope="module")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run(teacher, folder)
    return folder


def test_a_student_begins_as_its_teacher_at_every_step_count(teacher: Path) -> None:
    method, trained = Matching(MatchingConfig(teacher=str(teacher), **RUN)), load_checkpoint(teacher).network
    network, x, t = method.network(), torch.randn(4, 1, 8, 8), torch.rand(4)
    for steps in (2, 3):
        got = network(x, t, torch.arange(4), log2_steps=torch.full((4,), math.log2(steps)))
        torch.testing.assert_close(got, trained(x, t, torch.arange(4)))
    single = Matching(MatchingConfig(teacher=str(teacher), **{**RUN, "steps": (2,)})).network()
    assert single.arguments == trained.arguments


@pytest.mark.slow
def test_a_run_leaves_a_student_that_says_how_it_samples(finished: Path) -> None:
    student = load_checkpoint(finished / "students" / "2-3-steps")
    assert sorted(student.plans) == [2, 3]
    assert student.info["student"] == {
        "method": "matching",
        "steps": [2, 3],
        "scalars": {"2": {"log2_steps": 1.0}, "3": {"log2_steps": math.log2(3)}},
    }
    model, x = EpsModel(student.network, student.schedule, student.predicts), torch.randn(2, 1, 8, 8)
    for steps, plan in student.plans.items():
        told = {name: torch.full((2,), value) for name, value in student.info["student"]["scalars"][str(steps)].items()}
        assert run_plan(plan, model, x, cond=told).isfinite().all()


def test_a_student_of_several_step_counts_learns_to_tell_them_apart(finished: Path) -> None:
    network, x, t = load_checkpoint(finished / "model").network, torch.randn(4, 1, 8, 8), torch.rand(4)
    two, three = (network(x, t, log2_steps=torch.full((4,), math.log2(steps))) for steps in (2, 3))
    assert (two - three).abs().max() > 1e-4


@pytest.mark.slow
def test_the_loss_falls(teacher: Path, tmp_path: Path) -> None:
    trainer, _ = run(teacher, tmp_path, steps=(2,), dtype="bf16", norm="l2", path="student", save_every=12)
    losses = [row["loss"] for row in trainer.log]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(
    teacher: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Stopped(BaseException):
        """Stands for a kill."""

    original = Trainer._train_step

    def stopping(self: Trainer, *batch: Any) -> Tensor:
        if self.step == 6:
            raise Stopped
        return original(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stopping)
        with pytest.raises(Stopped):
            run(teacher, tmp_path)
    trainer = Trainer(Matching(MatchingConfig(teacher=str(teacher), **RUN)), tmp_path)
    assert trainer.step == 4
    trainer.run(*data(), quiet=True)
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (finished, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_loss_of_a_batch_is_the_mean_of_its_parts(teacher: Path) -> None:
    """So that a batch can be divided among processes."""
    method = Matching(MatchingConfig(teacher=str(teacher), **RUN))
    method.begin(0, None, torch.device("cpu"))
    network = method.network()
    batch = method.draw(torch.zeros(8, 1, 8, 8), torch.zeros(8).long(), torch.Generator().manual_seed(0), 0)
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(4), slice(4, 8))]
    whole, *halves = (float(method.loss(network, part, 0).detach()) for part in (batch, *parts))
    assert whole == pytest.approx(sum(halves) / 2, rel=1e-5)


def test_a_teacher_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Matching(MatchingConfig(teacher=str(tmp_path / "none")))
    network = PatchUNet(size=8, widths=(16, 16), classes=3, scalars=("guidance",))
    save_checkpoint(tmp_path, Checkpoint(network.eval(), COSINE, "v", {}))
    with pytest.raises(CheckpointError, match="takes guidance beside state, time and label"):
        Matching(MatchingConfig(teacher=str(tmp_path)))


def test_the_shipped_run_can_be_made() -> None:
    config = validated(MatchingConfig, read_yaml(CONFIGS / "mnist-sfd.yaml"), CONFIGS / "mnist-sfd.yaml")
    method = Matching(config.model_copy(update={"teacher": str(Path(__file__).parent.parent / config.teacher)}))
    assert sorted(method.plans) == [2, 4]
