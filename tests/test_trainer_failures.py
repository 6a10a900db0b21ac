"""What goes wrong in a run: kills, losses and weights that are not finite, a full disk; and what the user is shown."""

from __future__ import annotations

import io
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from test_run_folder import full_after
from test_teacher import TINY, config, data, one_thread, trainer  # noqa: F401
from test_trainer import Phased, Stopped, assert_same_run, curve, phased_config, stop_before
from torch import Tensor

from distill.checkpoint import CheckpointError, load_checkpoint
from distill.run_folder import RunFolder, State
from distill.trainer import Trainer, TrainingError

SHORT: dict[str, Any] = {"images": 16 * 8, "log_every": 2, "save_every": 4}


def listen(run: Trainer) -> io.StringIO:
    """What a run shows from now on."""
    text = io.StringIO()
    run.console = Console(file=text, width=200)
    return text


# kills ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(4, 6, 7)], ids=str)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(
    stops: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer(tmp_path / "one", **SHORT).run(*data(), quiet=True)
    for step in stops:
        with monkeypatch.context() as patch:
            stop_before(patch, step)
            with pytest.raises(Stopped):
                trainer(tmp_path / "two", **SHORT).run(*data(), quiet=True)
    run = trainer(tmp_path / "two", **SHORT)
    assert run.step == stops[-1] // 4 * 4
    run.run(*data(), quiet=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_run_that_is_killed_for_good_resumes_to_the_uninterrupted_one(tmp_path: Path) -> None:
    images, labels = data()
    np.savez(tmp_path / "data.npz", images=images.numpy(), labels=labels.numpy())
    script = f"""
        import time
        import numpy as np
        import torch
        from distill.teacher import Teacher, TeacherConfig
        from distill.trainer import Trainer

        torch.set_num_threads(1)
        data = np.load({str(tmp_path / "data.npz")!r})
        step = Trainer._train_step

        def reporting(self, *batch):
            if self.step == 6:
                print("step 6", flush=True)
                time.sleep(600)
            return step(self, *batch)

        Trainer._train_step = reporting
        method = Teacher(TeacherConfig(**{TINY | SHORT!r}))
        Trainer(method, {str(tmp_path / "two")!r}).run(*(torch.from_numpy(data[n]) for n in ("images", "labels")), quiet=True)
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        trainer(tmp_path / "one", **SHORT).run(images, labels, quiet=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "step 6\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    run = trainer(tmp_path / "two", **SHORT)
    assert run.step == 4
    run.run(images, labels, quiet=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_a_kill_between_the_renames_of_a_checkpoint_is_recovered(tmp_path: Path) -> None:
    trainer(tmp_path, **SHORT).run(*data(), quiet=True)
    newest = tmp_path / "checkpoints/step-00000008"
    newest.rename(newest.with_name("step-00000008.old"))
    assert trainer(tmp_path, **SHORT).step == 8


def test_the_model_is_never_older_than_the_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A kill between the two writes at the end repeats the last steps, instead of leaving an old model for good."""
    original = RunFolder.save

    def killed(self: RunFolder, state: State) -> None:
        if state.step == 8:
            raise Stopped
        original(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", killed)
        with pytest.raises(Stopped):
            trainer(tmp_path, **SHORT).run(*data(), quiet=True)
    assert trainer(tmp_path, **SHORT).step == 4
    assert load_checkpoint(tmp_path / "model").info["images"] == 16 * 8


@pytest.mark.slow
def test_a_finished_run_returns_at_once_and_restores_its_models(tmp_path: Path) -> None:
    Trainer(Phased(phased_config()), tmp_path).run(*data(), quiet=True)
    kept = {name: (tmp_path / name / "model.safetensors") for name in ("model", "averages/200", "students/b")}
    before = {name: file.read_bytes() for name, file in kept.items()}
    for file in kept.values():
        file.unlink()
    method = Phased(phased_config())
    run = Trainer(method, tmp_path)
    checkpoint = run.run(*data(), quiet=True)
    assert (run.step, len(run.log), method.begun) == (8, 5, [])
    assert checkpoint.info["images"] == 128
    assert {name: file.read_bytes() for name, file in kept.items()} == before


@pytest.mark.slow
def test_a_resumed_run_does_not_write_through_to_the_files_it_was_read_from(tmp_path: Path) -> None:
    trainer(tmp_path, **SHORT).run(*data(), quiet=True)
    saved = tmp_path / "checkpoints/step-00000008"
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    run = trainer(tmp_path, **SHORT | {"images": 1000})
    for _ in range(2):
        run._train_step(*data())
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


@pytest.mark.slow
def test_a_run_may_be_made_longer_but_not_shorter(tmp_path: Path) -> None:
    short, long = (
        {**SHORT, "images": 16 * 4, "cooldown": 0},
        {**SHORT, "images": 16 * 6, "cooldown": 48, "accumulate": 1},
    )
    trainer(tmp_path / "a", **short).run(*data(), quiet=True)
    trainer(tmp_path / "a", **long).run(*data(), quiet=True)
    trainer(tmp_path / "b", **long).run(*data(), quiet=True)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    with pytest.raises(CheckpointError, match="has trained 6 steps; images must not make the run shorter, to 4"):
        trainer(tmp_path / "a", **short)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path / "one", **SHORT).run(*data(), quiet=True)
    trainer(tmp_path / "two", **SHORT).run(*data(), quiet=True)
    file = tmp_path / "two/checkpoints/step-00000008/network.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    run = trainer(tmp_path / "two", **SHORT)
    assert run.step == 4
    told = " ".join(capsys.readouterr().out.split())
    assert str(file) in told
    assert told.endswith(f"going on from {tmp_path / 'two/checkpoints/step-00000004'}")
    run.run(*data(), quiet=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("name", ["network", "optimizer", "average-64"])
def test_tensors_of_another_network_are_refused_with_their_name(name: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, **SHORT)
    run._train_step(*data())
    state = run.weights.state()
    key = min(state[name])
    del state[name][key]
    with pytest.raises(CheckpointError, match=rf"{name}\.safetensors is of another .* '{key}'"):
        run.weights.restore(state)


# NaN and Inf ---------------------------------------------------------------------------------------------------------


def spoil(run: Trainer, at: int, factor: float | torch.autograd.Function, times: int = 1000) -> None:
    """Multiply the loss of a step by `factor`, or apply it, the first few times that the step is done."""
    original, left = run.method.loss, [times]

    def loss(network: Any, batch: Any, phase: int) -> Tensor:
        value = original(network, batch, phase)
        if run.step != at or not left[0]:
            return value
        left[0] -= 1
        return factor.apply(value) if isinstance(factor, type) else value * factor  # type: ignore[union-attr]

    run.method.loss = loss  # type: ignore[method-assign]


class NoGradient(torch.autograd.Function):
    """The identity with a gradient of NaN: the loss is finite, and the weights are not."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.nan


@pytest.mark.parametrize(
    ("factor", "at", "told"),
    [
        (math.nan, 5, "the loss is NaN or Inf at step 6: back to step 4"),
        (math.inf, 6, "the loss is NaN or Inf at step 8: back to step 4"),
        (math.nan, 0, "the loss is NaN or Inf at step 2: back to step 0"),
        (NoGradient, 7, "a weight is NaN or Inf at step 8: back to step 4"),
    ],
    ids=["loss-nan", "loss-inf", "at-once", "weights"],
)
def test_a_run_goes_back_to_the_last_checkpoint_with_half_the_learning_rate(
    factor: Any, at: int, told: str, tmp_path: Path
) -> None:
    run = trainer(tmp_path, **SHORT)
    spoil(run, at, factor, times=1)
    text = listen(run)
    checkpoint = run.run(*data(), quiet=True)
    assert text.getvalue().strip() == f"{told} with 0.5 of the learning rate"
    assert (run.step, run.rollbacks, run.rate_factor) == (8, 1, 0.5)
    assert [row["step"] for row in run.log] == [2, 4, 6, 8]
    (phase,) = run.method.phases
    back = int(told.split()[-1])
    factors = [0.5 if row["step"] > back else 1.0 for row in run.log]
    assert [row["learning_rate"] for row in run.log] == [
        f * phase.rate(s - 1, 16) for f, s in zip(factors, (2, 4, 6, 8), strict=True)
    ]
    assert all(value.isfinite().all() for value in checkpoint.network.state_dict().values())


@pytest.mark.slow
def test_the_factor_and_the_count_survive_a_kill_right_after_and_a_resumption(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = trainer(tmp_path / "one", **SHORT)
    spoil(run, 5, math.nan, times=1)
    run.run(*data(), quiet=True)

    run = trainer(tmp_path / "two", **SHORT)
    spoil(run, 5, math.nan, times=1)
    original = Trainer._roll_back

    def killed(self: Trainer, what: str) -> None:
        original(self, what)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_roll_back", killed)
        with pytest.raises(Stopped):
            run.run(*data(), quiet=True)
    resumed = trainer(tmp_path / "two", **SHORT)
    assert (resumed.step, resumed.rate_factor, resumed.rollbacks) == (4, 0.5, 1)
    resumed.run(*data(), quiet=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    finished = trainer(tmp_path / "two", **SHORT)
    assert (finished.step, finished.rate_factor, finished.rollbacks) == (8, 0.5, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "what"), [(math.nan, "the loss"), (NoGradient, "a weight")])
@pytest.mark.parametrize("rollbacks", [0, 2])
def test_a_run_that_fails_too_often_stops_and_keeps_its_checkpoint(
    rollbacks: int, factor: Any, what: str, tmp_path: Path
) -> None:
    settings = {**SHORT, "rollbacks": rollbacks}
    run = trainer(tmp_path, **settings)
    spoil(run, 7, factor)
    text = listen(run)
    with pytest.raises(TrainingError, match=f"{what} is NaN or Inf at step 8, after {rollbacks} rollbacks; .*Lower"):
        run.run(*data(), quiet=True)
    factors = [f"with {0.5 ** (n + 1):g} of the learning rate" for n in range(rollbacks)]
    assert [line.split("step 4 ")[1] for line in text.getvalue().splitlines()] == factors
    assert all(value.isfinite().all() for value in load_checkpoint(tmp_path / "model").network.state_dict().values())
    again = trainer(tmp_path, **settings)
    assert (again.step, again.rollbacks) == (4, rollbacks)
    trainer(tmp_path, **{**settings, "rollbacks": 5}).run(*data(), quiet=True)  # the user may allow more


@pytest.mark.slow
def test_a_rollback_in_a_later_phase_begins_that_phase_again_with_half_the_rate(tmp_path: Path) -> None:
    method = Phased(phased_config())
    run = Trainer(method, tmp_path)
    spoil(run, 5, math.nan, times=1)
    run.run(*data(), quiet=True)
    assert [number for number, _ in method.begun] == [0, 1, 1]
    assert [row["learning_rate"] for row in curve(tmp_path)] == pytest.approx([1e-3, 1e-3, 1e-3, 2e-3, 1e-3])


@pytest.mark.slow
def test_a_phase_after_one_that_was_rolled_back_has_the_whole_rate(tmp_path: Path) -> None:
    run = Trainer(Phased(phased_config()), tmp_path)
    spoil(run, 1, math.nan, times=1)
    run.run(*data(), quiet=True)
    assert [row["learning_rate"] for row in curve(tmp_path)] == pytest.approx([5e-4, 5e-4, 5e-4, 4e-3, 2e-3])


# a full disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_disk_that_is_full_stops_the_run_and_nothing_is_lost(tmp_path: Path) -> None:
    run = trainer(tmp_path, **SHORT)
    original = run._train_step

    def step(images: Tensor, labels: Tensor | None) -> Tensor:
        if run.step == 6:
            full.__enter__()
        return original(images, labels)

    run._train_step = step  # type: ignore[method-assign]
    full = full_after(20_000)
    try:
        with pytest.raises(
            CheckpointError, match=f"{tmp_path / 'model'} cannot be written: .*; what was there .* whole"
        ):
            run.run(*data(), quiet=True)
    finally:
        full.__exit__(None, None, None)
    assert not list(tmp_path.rglob("*.new"))
    assert load_checkpoint(tmp_path / "model").info["images"] == 16 * 4
    trainer(tmp_path, **SHORT).run(*data(), quiet=True)
    trainer(tmp_path / "other", **SHORT).run(*data(), quiet=True)
    assert curve(tmp_path) == curve(tmp_path / "other")
