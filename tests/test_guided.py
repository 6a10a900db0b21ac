"""Guidance distillation: the guided prediction by hand, the student that learns it, the stages of a run, and its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill import guided
from distill.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from distill.guided import Guided, GuidedConfig, guided_x0
from distill.method import Method
from distill.network import PatchUNet
from distill.student import load_student
from distill.trainer import Trainer
from samplers import schedules

COSINE = schedules.cosine()
SHAPE = (1, 8, 8)


class Linear(nn.Module):
    """v = (gain of the label) x, and with a guidance weight v = (gain + slope w) x."""

    def __init__(self, gain: list[float], slope: list[float] | None = None) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.slope = None if slope is None else nn.Parameter(torch.tensor(slope))
        self.shape, self.classes = SHAPE, len(gain) - 1

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor, guidance: Tensor | None = None) -> Tensor:
        gain = self.gain[class_labels]
        if self.slope is not None and guidance is not None:
            gain = gain + self.slope[class_labels] * guidance
        return gain.view(-1, 1, 1, 1) * x


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = PatchUNet(size=8, widths=[16, 16], classes=2)
    folder = tmp_path_factory.mktemp("guided") / "teacher"
    save_checkpoint(folder, Checkpoint(network.eval(), COSINE, "v", {}))
    return folder


def config(teacher: Path, **changes: Any) -> GuidedConfig:
    settings: dict[str, Any] = {
        "teacher": str(teacher),
        "steps": (2, 1),
        "images": 64,
        "last_images": 64,
        "stage_one_images": 64,
        "batch_size": 16,
        "dtype": "fp32",
        "log_every": 2,
        "save_every": 2,
        "ema_half_lives": (64,),
    }
    return GuidedConfig(**{**settings, **changes})


def linear_method(teacher: Path, gain: list[float], **changes: Any) -> Method:
    """Stage one with a linear teacher in the place of the network."""
    method = Guided(config(teacher, **changes))
    object.__setattr__(method.teacher, "network", Linear(gain))
    method.begin(0, None, torch.device("cpu"))
    return method


def batch(method: Method, step: int = 0, phase: int = 0, count: int = 64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x0 = torch.rand((count, *SHAPE), generator=generator) * 2 - 1
    return method.draw(x0, torch.arange(count) % 2, generator, phase)


def test_the_guided_prediction_is_its_definition() -> None:
    def predict(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return x * (1.0 + class_labels.view(-1, 1) + t.view(-1, 1))

    x, t, labels = torch.tensor([[1.0], [2.0]]), torch.tensor([0.1, 0.2]), torch.tensor([0, 1])
    got = guided_x0(predict, x, t, labels, 5, torch.tensor([[0.0], [3.0]]))
    torch.testing.assert_close(got, torch.tensor([[1.1], [4 * 2 * 2.2 - 3 * 2 * 6.2]]))


def trained(method: Method, student: Linear, steps: int = 1000) -> Linear:
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03)
    for step in range(steps):
        loss = method.loss(student, batch(method, step), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.995
    return student


@pytest.mark.slow
def test_a_linear_student_learns_the_guided_teacher(teacher: Path) -> None:
    """v is affine in x0, so guidance acts on the gains: gain_c + w (gain_c - gain_none)."""
    method = linear_method(teacher, [0.5, -0.2, 0.1])
    student = trained(method, Linear([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]))
    torch.testing.assert_close(student.gain[:2], torch.tensor([0.5, -0.2]), atol=2e-3, rtol=0)
    assert student.slope is not None
    torch.testing.assert_close(student.slope[:2], torch.tensor([0.4, -0.3]), atol=2e-3, rtol=0)
    assert method.loss(student, batch(method, 999), 0).item() < 1e-4


@pytest.mark.slow
def test_a_wrong_sign_of_the_guidance_is_noticed(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(predict: Any, x_t: Tensor, t: Tensor, labels: Tensor, null_class: int, w: Tensor) -> Tensor:
        return guided_x0(predict, x_t, t, labels, null_class, -w)

    monkeypatch.setattr(guided, "guided_x0", wrong)
    student = trained(linear_method(teacher, [0.5, -0.2, 0.1]), Linear([0.0] * 3, [0.0] * 3))
    assert student.slope is not None
    assert (student.slope[:2] - torch.tensor([0.4, -0.3])).abs().min() > 0.5


def test_without_guidance_the_student_begins_as_the_teacher(teacher: Path) -> None:
    method = Guided(config(teacher))
    network, before = method.network().eval(), method.teacher.network
    x, t, labels = torch.randn(4, *SHAPE), torch.rand(4), torch.tensor([0, 1, 2, 0])
    for w in (0.0, 3.0):
        torch.testing.assert_close(network(x, t, labels, guidance=torch.full((4,), w)), before(x, t, labels))
    method.begin(0, None, torch.device("cpu"))
    none = {**batch(method), "guidance": torch.zeros(64)}
    assert method.loss(network, none, 0).item() < 1e-10
    assert method.loss(network, batch(method), 0).item() > 1e-4


def test_the_weights_of_guidance_fill_their_range(teacher: Path) -> None:
    method = Guided(config(teacher, guidance=(1.0, 3.0)))
    for phase in (0, 1):
        w = batch(method, phase=phase, count=1000)["guidance"]
        assert (w.min() >= 1.0) & (w.min() < 1.01) & (w.max() > 2.99) & (w.max() <= 3.0)
        assert not (batch(method, phase=phase)["labels"] == 2).any(), "no label, nothing to guide"


@pytest.mark.slow
def test_both_stages_leave_students_that_take_the_weight(teacher: Path, tmp_path: Path) -> None:
    method = Guided(config(teacher))
    assert [phase.name for phase in method.phases] == ["guided", "2-steps", "1-step"]
    images = torch.randint(0, 256, (32, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Trainer(method, tmp_path).run(images, torch.arange(32) % 2, quiet=True)
    first = load_checkpoint(tmp_path / "students" / "guided")
    assert (first.plans, first.info["student"]["guidance"]) == ({}, [0.0, 4.0])
    for calls, name in ((2, "2-steps"), (1, "1-step")):
        student = load_student(tmp_path / "students" / name)
        assert (list(student.plans), student.info["student"]["guidance"]) == ([calls], [0.0, 4.0])
        labels = {"class_labels": torch.tensor([0, 1])}
        weak, strong = (student.sample(calls, shape=(2, *SHAPE), cond=labels, guidance=w) for w in (0.0, 4.0))
        assert not torch.equal(weak, strong)
        with pytest.raises(ValueError, match=r"guidance must be in the range .* 0 to 4, got 4\.5"):
            student.sample(calls, shape=(2, *SHAPE), cond=labels, guidance=4.5)


@pytest.mark.slow
def test_in_stage_two_the_student_before_teaches_under_the_same_weights(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, images = Guided(config(teacher)), torch.randint(0, 256, (32, *SHAPE), dtype=torch.uint8)
    Trainer(method, tmp_path).run(images, torch.arange(32) % 2, quiet=True)
    for phase, before in ((1, "guided"), (2, "2-steps")):
        student = load_checkpoint(tmp_path / "students" / before)
        with torch.no_grad():  # the weights of the input begin at zero, and have hardly moved
            for value in student.network.unet.class_embedding.scalars.parameters():
                value.normal_(generator=torch.Generator().manual_seed(phase))
        method.begin(phase, student, torch.device("cpu"))
        made = batch(method, phase=phase, count=8)
        steps = method.config.steps[phase - 1]
        nodes, total = method.nodes(2 * steps), 0.0
        for row in range(8):
            one = {name: value[row : row + 1] for name, value in made.items()}
            start = 2 * int(one["place"])
            x, cond = None, {"class_labels": one["labels"], "guidance": one["guidance"]}
            levels = [(float(COSINE.alpha(t)), float(COSINE.sigma(t))) for t in nodes[start : start + 3]]
            (a, s), (a_end, s_end) = levels[0], levels[-1]
            x_t = x = a * one["x0"] + s * one["eps"]
            with torch.no_grad():
                for t, (a_now, s_now), (a_next, s_next) in zip(nodes[start:], levels, levels[1:], strict=False):
                    v = student.network(x, torch.tensor([t], dtype=torch.float32), **cond)
                    x0, eps = a_now * x - s_now * v, s_now * x + a_now * v
                    x = a_next * x0 + s_next * eps
            target = (x - s_end / s * x_t) / (a_end - s_end / s * a)
            total += (1 + a**2 / s**2) * float((a * x_t - s * 0.3 * x_t - target).square().mean()) / 8
        got = method.loss(Linear([0.3] * 3), made, phase)
        assert got.item() == pytest.approx(total, rel=1e-3)


def test_data_without_labels_have_nothing_to_guide(teacher: Path, tmp_path: Path) -> None:
    images = torch.zeros((32, *SHAPE), dtype=torch.uint8)
    with pytest.raises(ValueError, match="labels must be given for the method 'guided', the data have none"):
        Trainer(Guided(config(teacher)), tmp_path).run(images, None, quiet=True)


def test_a_teacher_that_never_saw_the_null_class_is_refused(teacher: Path, tmp_path: Path) -> None:
    made = load_checkpoint(teacher)
    save_checkpoint(tmp_path, Checkpoint(made.network, COSINE, "v", {"training": {"drop_label": 0.0}}))
    with pytest.raises(CheckpointError, match="was trained with drop_label=0"):
        Guided(config(tmp_path))


@pytest.mark.parametrize("given", [(4.0, 0.0), (1.0, 1.0), (0.0, float("inf")), (0.0,)])
def test_a_range_that_is_none_is_refused(given: tuple[float, ...], teacher: Path) -> None:
    with pytest.raises(ValueError, match="guidance"):
        config(teacher, guidance=given)
