"""What a run reports while it trains: a bar or lines, evaluations, TensorBoard; and a compiled network."""

from __future__ import annotations

import importlib.util
import io
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_teacher import config, data, one_thread, trainer  # noqa: F401
from test_trainer import Phased, phased_config
from torch import nn

from distill.checkpoint import Checkpoint
from distill.teacher import Teacher
from distill.trainer import Trainer

SHORT: dict[str, Any] = {"images": 16 * 7, "log_every": 2, "save_every": 4}


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
@pytest.mark.parametrize("quiet", [True, False], ids=["quiet", "shown"])
def test_progress_is_a_bar_in_a_terminal_and_lines_elsewhere(terminal: bool, quiet: bool, tmp_path: Path) -> None:
    run = Trainer(Phased(phased_config()), tmp_path)
    text = io.StringIO()
    run.console = Console(file=text, force_terminal=terminal, width=120, legacy_windows=False)
    run.run(*data(), quiet=quiet)
    shown, last = text.getvalue(), f"loss {run.log[-1]['loss']:.4f}"
    if quiet:
        assert shown == ""
    elif terminal:
        assert "8/8" in shown
        assert last in shown
    else:
        lines = shown.splitlines()
        starts = ["a: step 2 of 8", "a: step 4 of 8", "a: step 5 of 8", "b: step 6 of 8", "b: step 8 of 8"]
        assert [line.split("  ")[0] for line in lines] == starts
        assert lines[-1].split("  ")[1] == last
        assert "\x1b" not in shown


class Judge:
    """An evaluation that takes its time and remembers what it was given."""

    def __init__(self, figure: float = 2.0) -> None:
        self.seen: list[tuple[int, dict[str, torch.Tensor]]] = []
        self.figure = figure

    def __call__(self, checkpoint: Checkpoint, step: int) -> dict[str, float]:
        self.seen.append((step, checkpoint.network.state_dict()))
        time.sleep(0.5)
        return {"figure": self.figure + step}


@pytest.mark.slow
@pytest.mark.parametrize(("every", "steps"), [(0, [5, 8]), (4, [4, 5, 8])])
def test_the_averaged_weights_are_evaluated_now_and_then_and_at_the_end_of_each_phase(
    every: int, steps: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    judge = Judge()
    run = Trainer(Phased(phased_config(evaluate_every=every)), tmp_path, evaluate=judge)
    checkpoint = run.run(*data(), quiet=True)
    assert [step for step, _ in judge.seen] == steps
    assert {row["step"]: row["figure"] for row in run.log if "figure" in row} == {step: 2.0 + step for step in steps}
    final, current = judge.seen[-1][1], run.weights.network.state_dict()
    assert all(torch.equal(value, final[name]) for name, value in checkpoint.network.state_dict().items())
    assert not all(torch.equal(value, final[name]) for name, value in current.items())
    again = Trainer(Phased(phased_config(evaluate_every=every)), tmp_path, evaluate=judge)
    assert again.log == run.log


def test_the_time_of_an_evaluation_is_not_counted_as_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    run = trainer(tmp_path, **SHORT, evaluate_every=2)
    step = run._train_step

    def timed(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        now[0] += 0.25
        return step(images, labels)

    def evaluate(checkpoint: Checkpoint, step: int) -> dict[str, float]:
        now[0] += 1000.0
        return {"figure": 1.0}

    run._train_step, run.evaluate = timed, evaluate  # type: ignore[method-assign]
    run.run(*data(), quiet=True)
    assert now[0] == 7 * 0.25 + 4 * 1000.0
    assert [row["images_per_second"] for row in run.log] == [64.0] * 4
    assert [row["seconds"] for row in run.log] == [0.5, 1.0, 1.5, 1.75]


def test_a_figure_that_is_not_finite_does_not_stop_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    run = Trainer(Teacher(config(**SHORT)), tmp_path, evaluate=Judge(float("nan")))
    run.run(*data(), quiet=True)
    assert run.log[-1]["figure"] is None
    assert trainer(tmp_path, **SHORT).log == run.log


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_the_log_is_written_for_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Trainer(Phased(phased_config(tensorboard=True)), tmp_path, evaluate=lambda checkpoint, step: {"figure": 3.0})
    run.run(*data(), quiet=True)
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in run.log]
    assert [event.step for event in events.Scalars("figure")] == [5, 8]


def test_tensorboard_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else original(name))
    with pytest.raises(
        ValueError, match=r"tensorboard=true needs the package tensorboard: pip install 'fewstep\[train\]'"
    ):
        trainer(tmp_path, tensorboard=True)


@pytest.mark.slow
def test_a_compiled_network_trains_as_it_would_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tracing of torch.compile, without its C++ code, which takes minutes to build on a CPU."""
    original, compiled = nn.Module.compile, []

    def compile_eagerly(self: nn.Module, **options: Any) -> None:
        compiled.append(self)
        original(self, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    settings = {**SHORT, "images": 16 * 4, "save_every": 2}
    runs = [trainer(tmp_path / str(compiles), **settings, compile=compiles) for compiles in (False, True)]
    plain, fast = (run.run(*data(), quiet=True) for run in runs)
    assert compiled == [runs[1].weights.network]
    losses = [[row["loss"] for row in run.log] for run in runs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    for name, value in plain.network.state_dict().items():
        torch.testing.assert_close(fast.network.state_dict()[name], value, rtol=0, atol=1e-4)
    assert trainer(tmp_path / "True", **settings).step == 4  # the same names: the rest of the run need not be compiled


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown device 'cuda:1'.*accepted: auto, cpu"):
        Trainer(Teacher(config()), tmp_path, device="cuda:1")
