"""Runs of progressive distillation: what each phase leaves, resuming, who teaches whom, and teachers that cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_teacher import data, one_thread  # noqa: F401
from torch import Tensor, nn

from bench.shipped import ASSETS
from distill.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from distill.config import CONFIGS
from distill.method import Batch
from distill.methods import load_config, make_method
from distill.network import PatchUNet
from distill.progressive import Progressive, ProgressiveConfig
from distill.student import ddim_plan
from distill.trainer import Trainer
from samplers import EpsModel, schedules
from samplers.grid import make_grid

MEAN, STD = 0.6, 0.3
COSINE = schedules.cosine()


# runs ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network with weights that matter, saved as a teacher."""
    torch.manual_seed(0)
    network = PatchUNet(size=8, widths=[16, 16], classes=3)
    nn.init.normal_(network.unet.conv_out.weight, std=0.1)
    folder = tmp_path_factory.mktemp("teacher")
    save_checkpoint(folder, Checkpoint(network.eval(), COSINE, "v", {}))
    return folder


def settings(teacher: Path, **changes: Any) -> ProgressiveConfig:
    values = {"steps": (2, 1), "images": 48, "last_images": 64, "batch_size": 16, "dtype": "fp32"}
    often = {"ema_half_lives": (64,), "log_every": 2, "save_every": 4, "learning_rate": 3e-3}
    return ProgressiveConfig(teacher=str(teacher), **{**values, **often, **changes})


@pytest.fixture(scope="module")
def uninterrupted(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    Trainer(make_method(settings(teacher)), folder).run(*data(), quiet=True)
    return folder


@pytest.mark.slow
def test_each_phase_leaves_a_student_with_its_plan(uninterrupted: Path, teacher: Path) -> None:
    assert sorted(path.name for path in (uninterrupted / "students").iterdir()) == ["1-step", "2-steps"]
    for name, steps, images in (("2-steps", 2, 48), ("1-step", 1, 112)):
        student = load_checkpoint(uninterrupted / "students" / name)
        assert student.plans == {steps: ddim_plan(COSINE, make_grid(COSINE, "sgm", steps).t)}
        assert student.info["student"] == {"method": "progressive", "steps": [steps]}
        assert student.info["images"] == images
        assert ProgressiveConfig(**student.info["training"]) == settings(teacher)
    last, model = (load_file(uninterrupted / f / "model.safetensors") for f in ("students/1-step", "model"))
    assert all(torch.equal(last[name], model[name]) for name in model)


class Stopped(BaseException):
    """Stands for a kill inside the process."""


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_stopped_in_a_phase_and_resumed_is_the_uninterrupted_one(
    stop: int, teacher: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Progressive.loss

    def stopping(self: Progressive, network: nn.Module, batch: Batch, phase: int) -> Tensor:
        if trainer.step == stop:
            raise Stopped
        return original(self, network, batch, phase)

    with monkeypatch.context() as patch:
        patch.setattr(Progressive, "loss", stopping)
        trainer = Trainer(make_method(settings(teacher)), tmp_path)
        with pytest.raises(Stopped):
            trainer.run(*data(), quiet=True)
    trainer = Trainer(make_method(settings(teacher)), tmp_path)
    assert trainer.step == {3: 3, 5: 4}[stop]
    trainer.run(*data(), quiet=True)
    for name in ("students/2-steps", "students/1-step", "model"):
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (tmp_path, uninterrupted))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_averaged_student_teaches_the_next_phase(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, seen = Progressive.begin, []

    def recording(self: Progressive, phase: int, before: Checkpoint | None, device: torch.device) -> None:
        begin(self, phase, before, device)
        if before is not None:
            seen.append(self._teaching.x0(x, t, class_labels=labels).detach())
            seen.append(x0_of(trainer.weights.averaged()))
            seen.append(x0_of(trainer.weights.network.eval()))
            trainer.weights.network.train()

    def x0_of(network: nn.Module) -> Tensor:
        return EpsModel(network, COSINE, "v").x0(x, t, class_labels=labels).detach()

    x, t, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5), torch.arange(4)
    monkeypatch.setattr(Progressive, "begin", recording)
    trainer = Trainer(make_method(settings(teacher, last_images=16)), tmp_path)
    trainer.run(*data(), quiet=True)
    taught, averaged, raw = seen
    saved = x0_of(load_checkpoint(tmp_path / "students/2-steps").network)
    apart = (taught - raw).abs().max()
    assert torch.equal(averaged, saved)
    assert (taught - averaged).abs().max() < 0.01 * apart  # another layout in memory, and another last digit


def test_a_student_starts_as_its_teacher(teacher: Path) -> None:
    method = Progressive(settings(teacher))
    state, found = load_checkpoint(teacher).network.state_dict(), method.network().state_dict()
    assert all(torch.equal(state[name], found[name]) for name in state)
    assert method.network() is not method.teacher.network


def test_the_teacher_is_in_evaluation_mode_and_learns_nothing(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Progressive(settings(teacher))
    student, modes, forward = method.network().train(), [], PatchUNet.forward

    def recording(self: PatchUNet, *args: Any, **cond: Any) -> Tensor:
        modes.append((self is student, self.training, torch.is_grad_enabled()))
        return forward(self, *args, **cond)

    monkeypatch.setattr(PatchUNet, "forward", recording)
    method.teacher.network.train()
    method.begin(0, None, torch.device("cpu"))
    before = {name: value.clone() for name, value in method.teacher.network.state_dict().items()}
    x0 = torch.rand(16, 1, 8, 8)
    batch = method.draw(x0, torch.zeros(16).long(), torch.Generator().manual_seed(0), 0)
    method.loss(student, batch, 0).backward()
    assert modes == [(False, False, False)] * 2 + [(True, True, True)]
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.network.state_dict().items())
    assert all(p.grad is not None for p in student.parameters())


def test_bf16_gives_the_loss_of_fp32_but_for_rounding(teacher: Path) -> None:
    losses = []
    for dtype in ("fp32", "bf16"):
        method = Progressive(settings(teacher, dtype=dtype))
        method.begin(0, None, torch.device("cpu"))
        x0 = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        batch = method.draw(x0, torch.zeros(64).long(), torch.Generator().manual_seed(0), 0)
        loss = method.loss(method.network(), batch, 0)
        assert loss.dtype == torch.float32
        losses.append(float(loss.detach()))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_teacher_of_epsilon_is_refused(teacher: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Checkpoint(load_checkpoint(teacher).network, COSINE, "eps", {}))
    with pytest.raises(CheckpointError, match="predicts 'eps': a student of few steps needs x0 where alpha is near 0"):
        Progressive(settings(tmp_path))


def test_a_teacher_of_other_weights_is_another_run_and_another_folder_is_not(teacher: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(teacher)
    save_checkpoint(tmp_path / "moved", checkpoint)
    run = tmp_path / "run"
    Trainer(Progressive(settings(teacher)), run).run(*data(), quiet=True, minutes=0.0)
    assert Trainer(Progressive(settings(tmp_path / "moved")), run).step > 0
    with torch.no_grad():
        next(checkpoint.network.parameters()).add_(1.0)
    save_checkpoint(tmp_path / "moved", checkpoint)
    with pytest.raises(CheckpointError, match="is another run: the weights of its teacher had the hash"):
        Trainer(Progressive(settings(tmp_path / "moved")), run)


def test_a_student_that_takes_more_is_no_teacher(tmp_path: Path) -> None:
    network = PatchUNet(size=8, widths=[16, 16], classes=3, scalars=["guidance"])
    save_checkpoint(tmp_path / "guided", Checkpoint(network, COSINE, "v", {}))
    with pytest.raises(CheckpointError, match="takes guidance beside state, time and label"):
        Progressive(settings(tmp_path / "guided"))


def test_a_student_teaches_the_steps_it_knows_and_no_others(uninterrupted: Path) -> None:
    student = uninterrupted / "students" / "2-steps"
    assert Progressive(settings(student, steps=(1,))).phases[0].calls == 2
    for strange in ({"steps": (2, 1)}, {"steps": (1,), "sampler": "dpm-solver-2s"}, {"steps": (1,), "grid": "logsnr"}):
        with pytest.raises(
            CheckpointError, match="is a student of 2 steps, and was trained at their times alone, not at t = "
        ):
            Progressive(settings(student, **strange))


def test_data_without_labels_are_refused_where_the_teacher_takes_them(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="labels must be given for the method 'progressive', the data have none"):
        Trainer(Progressive(settings(teacher)), tmp_path).run(data()[0], None, quiet=True)


def test_a_teacher_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Progressive(settings(tmp_path / "nowhere"))


def test_the_shipped_run_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent.parent)
    method = make_method(load_config("mnist-progressive"))
    assert [phase.name for phase in method.phases] == ["8-steps", "4-steps", "2-steps", "1-step"]
    info = load_checkpoint(ASSETS / "mnist-progressive/1-step").info
    assert {phase.name: phase.images for phase in method.phases} == {n: p["images"] for n, p in info["phases"].items()}
    settings = {name: value for name, value in method.config.document().items() if name not in ("dtype", "teacher")}
    assert settings == {name: value for name, value in info["training"].items() if name not in ("dtype", "teacher")}
