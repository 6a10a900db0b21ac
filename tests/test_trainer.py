"""Runs: what they leave, averages, accumulation, phases, and resuming bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_teacher import TINY, config, data, one_thread, trainer  # noqa: F401
from torch import Tensor, nn

from distill import config as configs
from distill.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from distill.method import Batch, Phase
from distill.teacher import Teacher, TeacherConfig
from distill.trainer import Trainer, phase_costs
from distill.weights import ema_decay
from samplers import schedule as schedules


class Stopped(BaseException):
    """Stands for a kill inside the process."""


def stop_before(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make every Trainer stop before it does the step (from 0)."""
    original = Trainer._train_step

    def stopping(self: Trainer, images: Tensor, labels: Tensor | None) -> Tensor:
        if self.step == step:
            raise Stopped
        return original(self, images, labels)

    monkeypatch.setattr(Trainer, "_train_step", stopping)


def curve(folder: Path) -> list[dict[str, Any]]:
    """The log without the times, which no two runs share."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name not in ("images_per_second", "seconds")} for row in rows
    ]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors"))


def assert_same_run(a: Path, b: Path) -> None:
    assert curve(a) == curve(b)
    assert files(a) == files(b)
    for name in files(a):
        first, second = load_file(a / name), load_file(b / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps in one go."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer(folder).run(*data(), quiet=True)
    return folder


@pytest.mark.slow
def test_a_run_in_pieces_of_no_time_is_the_uninterrupted_one(uninterrupted: Path, tmp_path: Path) -> None:
    steps = [0]
    while steps[-1] < 20:
        piece = trainer(tmp_path)
        piece.run(*data(), quiet=True, minutes=0.0)
        steps.append(piece.step)
    assert steps == [0, 5, 10, 15, 20], "a piece ends with a row of the log"
    assert curve(tmp_path) == curve(uninterrupted)
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, uninterrupted))
    assert all(torch.equal(first[name], second[name]) for name in first)


# a run ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "predicts"), [("fp32", "v"), ("bf16", "v"), ("fp32", "eps")])
def test_the_loss_falls(dtype: str, predicts: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, images=16 * 40, dtype=dtype, predicts=predicts, learning_rate=3e-3, save_every=40)
    checkpoint = run.run(*data(), quiet=True)
    losses = [row["loss"] for row in run.log]
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.dtype == torch.float32 for p in run.weights.network.parameters())
    assert (checkpoint.predicts, checkpoint.schedule) == (predicts, schedules.cosine())


def test_a_run_leaves_a_checkpoint_of_the_averaged_weights_its_settings_and_a_log(uninterrupted: Path) -> None:
    loaded = load_checkpoint(uninterrupted / "model")
    average = load_file(uninterrupted / "checkpoints/step-00000020/average-64.safetensors")
    assert all(torch.equal(value, average[name]) for name, value in loaded.network.state_dict().items())
    rows = [json.loads(line) for line in (uninterrupted / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert [row["images"] for row in rows] == [80, 160, 240, 320]
    (phase,) = Teacher(config()).phases
    assert [row["learning_rate"] for row in rows] == [phase.rate(step - 1, 16) for step in (5, 10, 15, 20)]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    assert (loaded.info["images"], loaded.info["loss"]) == (320, rows[-1]["loss"])
    assert loaded.info["phases"] == {"": {"images": 320, "minutes": round(rows[-1]["seconds"] / 60, 2)}}
    assert TeacherConfig(**loaded.info["training"]) == config()
    assert sorted(p.name for p in uninterrupted.iterdir()) == ["checkpoints", "config.yaml", "log.jsonl", "model"]


def test_a_row_of_the_log_is_the_mean_loss_since_the_last_row(tmp_path: Path) -> None:
    run = trainer(tmp_path / "a", images=16 * 5)
    losses = [float(run._train_step(*data())) for _ in range(5)]
    checkpoint = trainer(tmp_path / "b", images=16 * 5).run(*data(), quiet=True)
    assert checkpoint.info["loss"] == pytest.approx(np.mean(losses), rel=1e-6)


def test_the_last_step_is_logged_and_saved_though_it_is_no_multiple(tmp_path: Path) -> None:
    run = trainer(tmp_path, images=16 * 7 - 3)
    run.run(*data(), quiet=True)
    assert [row["step"] for row in run.log] == [5, 7]
    assert trainer(tmp_path, images=16 * 7 - 3).step == 7
    assert load_checkpoint(tmp_path / "model").info["images"] == 16 * 7


def test_training_without_labels_leaves_the_classes_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path, images=16 * 3)
    table = run.weights.network.unet.class_embedding.weight
    before = table.detach().clone()
    run.run(data()[0], None, quiet=True)
    assert torch.equal(table[:3], before[:3])
    assert not torch.equal(table[3], before[3])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (data()[0].float(), None, r"images must be \(N, 1, 8, 8\) uint8 .* got \(100, 1, 8, 8\) torch\.float32"),
        (data()[0][:, 0], None, r"images must be .* got \(100, 8, 8\)"),
        (data()[0].expand(-1, 3, -1, -1), None, r"images must be .* got \(100, 3, 8, 8\)"),
        (data()[0][:0], None, r"with N > 0, got \(0, 1, 8, 8\)"),
        (data()[0], data()[1][:-1], r"labels must be \(100,\) integers in 0 \.\. 2, got \(99,\)"),
        (data()[0], data()[1] + 1, r"labels must be \(100,\) integers in 0 \.\. 2, got 1 \.\. 3"),
        (data()[0], data()[1] - 1, r"labels must be .* got -1 \.\. 1"),
        (data()[0], data()[1].float(), r"labels must be .* got \(100,\) torch\.float32"),
        (data()[0], data()[1][:, None], r"labels must be .* got \(100, 1\)"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(
    images: Tensor, labels: Tensor | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).run(images, labels, quiet=True)
    assert not any(tmp_path.iterdir())


# averages and parts of a batch ---------------------------------------------------------------------------------------


def test_each_average_follows_its_formula(tmp_path: Path) -> None:
    half_lives, name = (20, 4, 1000), "unet.conv_in.weight"
    run = trainer(tmp_path, ema_half_lives=half_lives)
    first = run.weights.network.state_dict()[name].double().clone()
    averages = dict.fromkeys(half_lives, first)
    for step in range(1, 8):
        run._train_step(*data())
        for place, half_life in enumerate(half_lives):
            decay = 0.5 ** (16 / min(half_life, 0.05 * 16 * step))
            assert ema_decay(half_life, 16, step) == decay
            now = run.weights.network.state_dict()[name].double()
            averages[half_life] = decay * averages[half_life] + (1 - decay) * now
            found = run.weights.averaged(place).state_dict()[name].double()
            torch.testing.assert_close(found, averages[half_life], rtol=1e-5, atol=1e-6)
    assert ema_decay(20, 16, 1) == 0.5**20, "after one step the first weights are forgotten"
    assert ema_decay(20, 16, 1000) == 0.5**0.8, "the half-life is the configured one in the end"


def test_every_average_is_saved_and_the_first_is_the_model(tmp_path: Path) -> None:
    run = trainer(tmp_path, ema_half_lives=(64, 4, 500), images=16 * 7)
    run.run(*data(), quiet=True)
    assert sorted(path.name for path in (tmp_path / "averages").iterdir()) == ["4", "500"]
    for place, folder in enumerate(("model", "averages/4", "averages/500")):
        found, expected = load_checkpoint(tmp_path / folder).network, run.weights.averaged(place)
        assert all(torch.equal(v, found.state_dict()[name]) for name, v in expected.state_dict().items())
    assert not torch.equal(run.weights.averages[0][0], run.weights.averages[1][0])


def test_reading_an_average_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run._train_step(*data())
    before = {name: value.clone() for name, value in run.weights.network.state_dict().items()}
    average = run.weights.averaged()
    average.unet.conv_in.weight.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in run.weights.network.state_dict().items())
    assert not any(module.training for module in average.modules())
    assert run.weights.network.training
    assert run.weights.averaged().unet.conv_in.weight.any()


def test_a_step_in_parts_is_the_step_as_a_whole(tmp_path: Path) -> None:
    whole, parts = (trainer(tmp_path / str(count), accumulate=count) for count in (1, 4))
    for _ in range(3):
        losses = [float(run._train_step(*data())) for run in (whole, parts)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for a, b in zip(whole.weights.network.parameters(), parts.weights.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be a multiple of processes x accumulate = 1 x 3, got 16"):
        trainer(tmp_path, accumulate=3)


# phases --------------------------------------------------------------------------------------------------------------


class Phased(Teacher):
    """A method of two phases with losses of their own; remembers what it was given at the start of each."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__(config)
        self.phases = (Phase("a", 16 * 5, 1e-3, warmup=32), Phase("b", 16 * 3 - 1, 4e-3, cooldown=32))
        self.begun: list[tuple[int, Checkpoint | None]] = []

    def begin(self, phase: int, before: Checkpoint | None, device: torch.device) -> None:
        self.begun.append((phase, before))

    def loss(self, network: nn.Module, batch: Batch, phase: int) -> Tensor:
        return (1 + phase) * super().loss(network, batch, phase)


def phased_config(**changes: Any) -> TeacherConfig:
    return config(**{"log_every": 2, "save_every": 2, "ema_half_lives": (64, 200), "keep": 3, **changes})


@pytest.fixture(scope="module")
def phased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both phases in one go."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("phased")
    Trainer(Phased(phased_config()), folder).run(*data(), quiet=True)
    return folder


def test_a_phase_begins_with_the_averaged_weights_of_the_one_before(tmp_path: Path) -> None:
    method = Phased(phased_config())
    run = Trainer(method, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, 5)
        with pytest.raises(Stopped):
            run.run(*data(), quiet=True)
    assert method.begun == [(0, None)]
    left = load_checkpoint(tmp_path / "students/a").network.state_dict()
    assert not torch.equal(left["unet.conv_in.weight"], run.weights.network.unet.conv_in.weight)
    run._enter(1)
    (_, before) = method.begun[-1]
    assert before is not None
    for network in (before.network, run.weights.network, run.weights.averaged(0), run.weights.averaged(1)):
        assert all(torch.equal(value, left[name]) for name, value in network.state_dict().items())
    assert not run.weights.optimizer.state
    run._train_step(*data())
    assert {int(moment["step"]) for moment in run.weights.optimizer.state.values()} == {1}
    average, now = run.weights.averaged().unet.conv_in.weight, run.weights.network.unet.conv_in.weight
    decay = ema_decay(64, 16, 1)  # the ramp begins anew
    torch.testing.assert_close(average, decay * left["unet.conv_in.weight"] + (1 - decay) * now)


@pytest.mark.slow
def test_the_phases_have_their_own_learning_rates_and_leave_their_students(phased: Path) -> None:
    rows = curve(phased)
    assert [(row["step"], row["phase"]) for row in rows] == [(2, "a"), (4, "a"), (5, "a"), (6, "b"), (8, "b")]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 1e-3, 1e-3, 4e-3, 2e-3])
    assert sorted(path.name for path in (phased / "students").iterdir()) == ["a", "b"]
    a, b, model = (load_checkpoint(phased / name) for name in ("students/a", "students/b", "model"))
    assert (a.info["images"], b.info["images"]) == (80, 128)
    assert all(torch.equal(v, model.network.state_dict()[name]) for name, v in b.network.state_dict().items())
    assert b.info["phases"].keys() == {"a", "b"}
    assert [cost["images"] for cost in b.info["phases"].values()] == [80, 48]


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(0,), (5,), (3, 5, 7)], ids=str)
def test_a_run_resumed_in_any_phase_is_the_uninterrupted_one(
    stops: tuple[int, ...], phased: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for step in stops:
        with monkeypatch.context() as patch:
            stop_before(patch, step)
            with pytest.raises(Stopped):
                Trainer(Phased(phased_config()), tmp_path).run(*data(), quiet=True)
    method = Phased(phased_config())
    resumed = Trainer(method, tmp_path)
    assert resumed.step == {0: 0, 3: 2, 5: 5, 7: 6}[stops[-1]]
    resumed.run(*data(), quiet=True)
    assert [number for number, _ in method.begun] == ([0, 1] if stops[-1] < 5 else [1])
    assert_same_run(tmp_path, phased)


def test_the_phase_of_every_step(tmp_path: Path) -> None:
    run = Trainer(Phased(phased_config()), tmp_path)
    assert run.steps == 8
    assert [run.at(step) for step in (0, 4, 5, 7, 8)] == [(0, 0), (0, 4), (1, 0), (1, 2), (1, 3)]


def test_the_cost_of_a_phase_is_what_its_rows_add() -> None:
    rows = [("a", 10, 6.0), ("a", 20, 60.0), ("b", 25, 120.0), ("c", 30, 121.0), ("c", 60, 300.0)]
    log = [{"phase": phase, "images": images, "seconds": seconds} for phase, images, seconds in rows]
    assert phase_costs(log) == {
        "a": {"images": 20, "minutes": 1.0},
        "b": {"images": 5, "minutes": 1.0},
        "c": {"images": 35, "minutes": 3.0},
    }
    assert phase_costs([]) == {}


@pytest.mark.slow
def test_the_data_of_a_run_may_not_change(uninterrupted: Path, tmp_path: Path) -> None:
    images, labels = data()
    trainer(tmp_path).run(images, labels, quiet=True, minutes=0.0)
    for other in ((images.flip(0), labels), (images[:99], labels[:99]), (images, None)):
        run = trainer(tmp_path)
        with pytest.raises(
            CheckpointError, match="is another run: its data had the hash .*, now .*; give another folder"
        ):
            run.run(*other, quiet=True)
    trainer(tmp_path).run(images, labels, quiet=True)
    assert_same_run(uninterrupted, tmp_path)


def test_a_run_keeps_the_dtype_it_began_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer(tmp_path, dtype="bf16").run(*data(), quiet=True, minutes=0.0)
    monkeypatch.setattr(configs, "default_dtype", lambda device: "fp32")  # as on another processor
    assert trainer(tmp_path, dtype="auto").config.dtype == "bf16"
    assert trainer(tmp_path / "new", dtype="auto").config.dtype == "fp32"
