"""Runs of the teacher: training, resuming bit for bit, failures that keep the last checkpoint, and what is shown."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file
from test_teacher import TINY, config, data
from torch import Tensor

from distill import teacher
from distill.checkpoint import CheckpointError, load_checkpoint
from distill.config import TeacherConfig
from distill.teacher import Trainer, TrainingError, learning_rate
from samplers import schedule as schedules

SHARED_STATE = ("state/network", "state/ema", "state/optimizer", "model/model")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The order of a sum, and with it the last bit, depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def curve(folder: Path) -> list[dict[str, float]]:
    """The log without the speed, which no two runs share."""
    rows = json.loads((folder / "state" / "log.json").read_text())
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows]


def assert_same_run(a: Path, b: Path) -> None:
    assert curve(a) == curve(b)
    for name in SHARED_STATE:
        first, second = (load_file(folder / f"{name}.safetensors") for folder in (a, b))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 steps in one go."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted")
    Trainer(config(), folder).run(*data(), quiet=True)
    return folder


# a run ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "predicts"), [("fp32", "v"), ("bf16", "v"), ("fp32", "eps")])
def test_the_loss_falls(dtype: str, predicts: str, tmp_path: Path) -> None:
    settings = config(images=16 * 40, dtype=dtype, predicts=predicts, learning_rate=3e-3)
    trainer = Trainer(settings, tmp_path)
    checkpoint = trainer.run(*data(), quiet=True)
    losses = [row["loss"] for row in trainer.log]
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.dtype == torch.float32 for p in trainer.network.parameters())
    assert (checkpoint.predicts, checkpoint.schedule) == (predicts, schedules.cosine())


def test_a_run_leaves_a_checkpoint_of_the_averaged_weights_and_a_log(uninterrupted: Path) -> None:
    loaded = load_checkpoint(uninterrupted / "model")
    ema = load_file(uninterrupted / "state" / "ema.safetensors")
    assert all(torch.equal(value, ema[name]) for name, value in loaded.network.state_dict().items())
    rows = [json.loads(line) for line in (uninterrupted / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(5, 41, 5))
    assert [row["images"] for row in rows] == [16 * step for step in range(5, 41, 5)]
    assert [row["learning_rate"] for row in rows] == [learning_rate(config(), s - 1) for s in range(5, 41, 5)]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert loaded.info["images"] == 640
    assert loaded.info["loss"] == rows[-1]["loss"]
    assert TeacherConfig(**loaded.info["training"]) == config()
    assert sorted(p.name for p in uninterrupted.iterdir()) == ["log.jsonl", "model", "state"]


def test_a_row_of_the_log_is_the_mean_loss_since_the_last_row(tmp_path: Path) -> None:
    losses, trainer = [], Trainer(config(images=16 * 5), tmp_path)
    for _ in range(5):
        losses.append(float(trainer._train_step(*data())))
    assert Trainer(config(images=16 * 5), tmp_path).run(*data(), quiet=True).info["loss"] == pytest.approx(
        np.mean(losses), rel=1e-6
    )


def test_the_last_step_is_logged_and_saved_though_it_is_no_multiple(tmp_path: Path) -> None:
    trainer = Trainer(config(images=16 * 7 - 3), tmp_path)
    trainer.run(*data(), quiet=True)
    assert [row["step"] for row in trainer.log] == [5, 7]
    assert json.loads((tmp_path / "state" / "state.json").read_text())["step"] == 7
    assert load_checkpoint(tmp_path / "model").info["images"] == 16 * 7


def test_training_without_labels_leaves_the_classes_alone(tmp_path: Path) -> None:
    trainer = Trainer(config(images=16 * 3, weight_decay=0.0), tmp_path)
    table = trainer.network.unet.class_embedding.weight
    before = table.detach().clone()
    trainer.run(data()[0], None, quiet=True)
    assert torch.equal(table[:3], before[:3])
    assert not torch.equal(table[3], before[3])


# resuming ------------------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """Stands for a kill inside the process."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make every Trainer stop before it finishes the step."""
    original = Trainer._train_step

    def stopping(self: Trainer, images: Tensor, labels: Tensor | None) -> Tensor:
        if self.step == step:
            raise Stopped
        return original(self, images, labels)

    monkeypatch.setattr(Trainer, "_train_step", stopping)


@pytest.mark.parametrize("stops", [(3,), (20, 21, 39)], ids=str)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(
    stops: tuple[int, ...], uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for step in stops:
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Stopped):
                Trainer(config(), tmp_path).run(*data(), quiet=True)
    trainer = Trainer(config(), tmp_path)
    assert trainer.step == stops[-1] // 20 * 20
    trainer.run(*data(), quiet=True)
    assert_same_run(tmp_path, uninterrupted)


def test_a_run_that_is_killed_for_good_resumes_to_the_uninterrupted_one(uninterrupted: Path, tmp_path: Path) -> None:
    images, labels = data()
    np.savez(tmp_path / "data.npz", images=images.numpy(), labels=labels.numpy())
    script = f"""
        import time
        import numpy as np
        import torch
        from distill.teacher import TeacherConfig, Trainer

        torch.set_num_threads(1)
        data = np.load({str(tmp_path / "data.npz")!r})
        step = Trainer._train_step

        def reporting(self, *batch):
            if self.step == 23:
                print("step 23", flush=True)
                time.sleep(600)
            return step(self, *batch)

        Trainer._train_step = reporting
        trainer = Trainer(TeacherConfig(**{TINY!r}), {str(tmp_path / "run")!r})
        trainer.run(*(torch.from_numpy(data[name]) for name in ("images", "labels")), quiet=True)
    """
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "step 23\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "run" / "state" / "state.json").read_text())["step"] == 20
    trainer = Trainer(config(), tmp_path / "run")
    assert trainer.step == 20
    trainer.run(*data(), quiet=True)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_kill_between_the_renames_of_the_state_is_recovered(tmp_path: Path) -> None:
    Trainer(config(images=48), tmp_path).run(*data(), quiet=True)
    (tmp_path / "state").rename(tmp_path / "state.old")
    assert Trainer(config(images=48), tmp_path).step == 3


def test_the_model_is_never_older_than_the_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A kill between the two writes at the end repeats the last steps, instead of leaving an old model for good."""
    settings = config(images=16 * 7, save_every=5)

    def killed(*args: Any, **kwargs: Any) -> None:
        if args[0].name == "state" and trainer.step == 7:
            raise Stopped
        original(*args, **kwargs)

    original, trainer = teacher.write_folder, Trainer(settings, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "write_folder", killed)
        with pytest.raises(Stopped):
            trainer.run(*data(), quiet=True)
    assert Trainer(settings, tmp_path).step == 5
    assert load_checkpoint(tmp_path / "model").info["images"] == 16 * 7


def test_a_finished_run_returns_at_once_and_restores_its_model(tmp_path: Path) -> None:
    settings = config(images=32)
    Trainer(settings, tmp_path).run(*data(), quiet=True)
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").unlink()
    trainer = Trainer(settings, tmp_path)
    checkpoint = trainer.run(*data(), quiet=True)
    assert (trainer.step, len(trainer.log)) == (2, 1)
    assert checkpoint.info["images"] == 32
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights


def test_a_resumed_run_does_not_write_through_to_the_files_it_was_read_from(
    tmp_path: Path,
) -> None:
    Trainer(config(images=48), tmp_path).run(*data(), quiet=True)
    before = {file.name: file.read_bytes() for file in (tmp_path / "state").iterdir()}
    trainer = Trainer(config(), tmp_path)
    for _ in range(3):
        trainer._train_step(*data())
    assert {file.name: file.read_bytes() for file in (tmp_path / "state").iterdir()} == before


def test_a_run_may_be_made_longer(tmp_path: Path) -> None:
    short, long = config(images=16 * 10, cooldown=0, save_every=10), config(images=16 * 15, cooldown=80, save_every=5)
    Trainer(short, tmp_path / "a").run(*data(), quiet=True)
    trainer = Trainer(long, tmp_path / "a")
    trainer.run(*data(), quiet=True)
    Trainer(long, tmp_path / "b").run(*data(), quiet=True)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    with pytest.raises(CheckpointError, match="has trained 15 steps, images=160 would be fewer"):
        Trainer(short, tmp_path / "a")


CHANGES: dict[str, Any] = {
    "network": {**TINY["network"], "widths": [16, 24]},
    "schedule": {"name": "vp_linear"},
    "predicts": "eps",
    "batch_size": 8,
    "learning_rate": 1e-4,
    "warmup": 0,
    "weight_decay": 0.1,
    "grad_clip": 2.0,
    "ema_half_life": 10,
    "drop_label": 0.2,
    "dtype": "bf16",
    "seed": 1,
    "log_every": 10,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_refused_with_its_name(name: str, uninterrupted: Path) -> None:
    with pytest.raises(CheckpointError, match=f"is another run: {name} was .*, now ") as caught:
        Trainer(config(**{name: CHANGES[name]}), uninterrupted)
    assert repr(CHANGES[name]) in str(caught.value)


def test_every_setting_may_change_or_is_tested_to_be_refused() -> None:
    names = {f.name for f in dataclasses.fields(TeacherConfig)}
    assert names == CHANGES.keys() | {"images", "cooldown", "save_every"}


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    [
        ("state.json", lambda text: b"{", r"state\.json is not JSON"),
        ("state.json", lambda text: b"[]", r"state is not the state of a training run"),
        ("state.json", lambda text: b'{"step": 3}', r"state is not the state of a training run: KeyError\('config'\)"),
        ("log.json", None, r"log\.json does not exist"),
        ("network.safetensors", lambda b: b[:-1], r"network\.safetensors is truncated"),
        ("ema.safetensors", lambda b: b[:-1], r"ema\.safetensors is truncated"),
        ("optimizer.safetensors", lambda b: b[:-1], r"optimizer\.safetensors is truncated"),
    ],
)
def test_a_damaged_state_is_refused(
    file: str, spoil: Callable[[bytes], bytes] | None, message: str, tmp_path: Path
) -> None:
    Trainer(config(images=16), tmp_path).run(*data(), quiet=True)
    path = tmp_path / "state" / file
    if spoil is None:
        path.unlink()
    else:
        path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        Trainer(config(images=16), tmp_path)


# what goes wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "at"), [(math.nan, 12), (math.inf, 14)])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    value: float, at: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = config(save_every=10)
    trainer, original = Trainer(settings, tmp_path), teacher.diffusion_loss

    def spoilt(*args: Any) -> Tensor:
        return original(*args) * (value if trainer.step == at else 1.0)

    monkeypatch.setattr(teacher, "diffusion_loss", spoilt)
    with pytest.raises(
        TrainingError, match=rf"the loss is {value} at step 15; the last checkpoint is intact in .*Lower"
    ):
        trainer.run(*data(), quiet=True)
    assert all(torch.isfinite(v).all() for v in load_checkpoint(tmp_path / "model").network.state_dict().values())
    assert Trainer(settings, tmp_path).step == 10
    assert [row["step"] for row in curve(tmp_path)] == [5, 10]


def test_weights_that_are_not_finite_after_the_last_finite_loss_are_not_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = config(images=16 * 10, save_every=5)
    trainer, original = Trainer(settings, tmp_path), teacher.diffusion_loss

    class Spoil(torch.autograd.Function):
        """The identity with a gradient of NaN."""

        @staticmethod
        def forward(ctx: Any, loss: Tensor) -> Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * math.nan

    def spoilt(*args: Any) -> Tensor:
        loss = original(*args)
        return Spoil.apply(loss) if trainer.step == 9 else loss

    monkeypatch.setattr(teacher, "diffusion_loss", spoilt)
    with pytest.raises(TrainingError, match="the weights are NaN or Inf at step 10; the last checkpoint is intact"):
        trainer.run(*data(), quiet=True)
    assert Trainer(settings, tmp_path).step == 5
    assert load_checkpoint(tmp_path / "model").info["images"] == 16 * 5


def test_a_run_that_fails_at_once_says_that_nothing_was_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        teacher, "diffusion_loss", lambda network, *_: sum(p.sum() for p in network.parameters()) * math.nan
    )
    with pytest.raises(TrainingError, match="at step 5; no checkpoint was written yet"):
        Trainer(config(), tmp_path).run(*data(), quiet=True)


# what is shown -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
@pytest.mark.parametrize("quiet", [True, False], ids=["quiet", "shown"])
def test_progress_is_a_bar_in_a_terminal_and_lines_elsewhere(
    terminal: bool, quiet: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100, legacy_windows=False)
    monkeypatch.setattr(teacher, "Progress", lambda *columns: Progress(*columns, console=console))
    trainer = Trainer(config(images=16 * 7), tmp_path)
    trainer.run(*data(), quiet=quiet)
    shown = text.getvalue()
    if quiet:
        assert shown == ""
    elif terminal:
        assert "7/7" in shown
        assert f"loss {trainer.log[-1]['loss']:.4f}" in shown
    else:
        lines = shown.splitlines()
        assert [line.split("  ")[0] for line in lines] == ["step 5 of 7", "step 7 of 7"]
        assert lines[1].split("  ")[1] == f"loss {trainer.log[-1]['loss']:.4f}"
        assert "\x1b" not in shown


def test_a_new_run_may_begin_with_the_weights_of_a_checkpoint(uninterrupted: Path, tmp_path: Path) -> None:
    trained = load_checkpoint(uninterrupted / "model").network.state_dict()
    begun = Trainer(config(), tmp_path / "new", init=uninterrupted / "model")
    for module in (begun.network, begun.ema):
        assert all(torch.equal(value, trained[name]) for name, value in module.state_dict().items())
    assert begun.step == 0
    resumed = Trainer(config(), uninterrupted, init=tmp_path / "nowhere")  # a run that goes on keeps its own weights
    assert resumed.step == 40
    other = config(network={**config().network, "widths": [32, 32]})
    with pytest.raises(CheckpointError, match="widths must begin with 16"):
        Trainer(other, tmp_path / "other", init=uninterrupted / "model")
