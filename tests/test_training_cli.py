"""`fewstep train` and `fewstep distill`: from a data set to a table of the students, and what a mistake says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from bench.cli import main
from bench.evaluate import evaluator
from bench.training_cli import _settings
from bench.training_plan import plan_training
from distill.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from distill.method import Phase
from distill.methods import load_config, make_method
from distill.network import PatchUNet
from distill.trainer import Trainer, TrainingError
from samplers import make_plan, schedules

TINY = {"class": "PatchUNet", "widths": [16, 16], "patch": 2}
RUN = {"batch_size": 8, "log_every": 1, "save_every": 1, "dtype": "fp32"}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def said(result: Result) -> str:
    return " ".join(result.output.split())


def write(path: Path, **document: Any) -> Path:
    path.write_text(yaml.safe_dump(document))
    return path


def tiny_checkpoint(seed: int = 0, *calls: int, **arguments: Any) -> Checkpoint:
    torch.manual_seed(seed)
    network = PatchUNet(**{"widths": (16, 16), "patch": 2, **arguments}).eval()
    schedule = schedules.cosine()
    plans = {n: make_plan("ddim", schedule, nfe=n, grid="sgm") for n in calls}
    return Checkpoint(network, schedule, "v", {}, plans)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, rng = tmp_path_factory.mktemp("data") / "digits.npz", np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 256, (16, 28, 28), dtype=np.uint8), labels=rng.integers(0, 10, 16))
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    save_checkpoint(folder, tiny_checkpoint())
    return folder


@pytest.fixture(scope="module")
def halving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A progressive distillation to 2 and 1 steps."""
    path = tmp_path_factory.mktemp("config") / "halving.yaml"
    return write(path, method="progressive", teacher="nowhere", steps=[2, 1], images=24, last_images=32, **RUN)


# from data to a table ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_gives_a_model_to_bench_and_resumes(data: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "tiny.yaml", network=TINY, images=16, **RUN)
    first = run("train", config, "--data", data, "--out", tmp_path / "run", "--evaluate-samples", 0)
    assert first.exit_code == 0, first.output
    assert json.loads(first.output.strip().splitlines()[-1])["images"] == 16
    more = "--data", data, "--out", tmp_path / "run", "--images", 32, "--evaluate-samples", 0
    second = run("train", config, *more)
    assert second.exit_code == 0, second.output
    assert "step 2 of" not in second.output
    assert json.loads(second.output.strip().splitlines()[-1])["step"] == 4
    few = "--samplers", "ddim", "--nfe", 1, "--num-samples", 10, "--dtype", "fp32", "--out", tmp_path / "o"
    assert run("bench", "mnist", "--model", tmp_path / "run/model", *few).exit_code == 0


@pytest.mark.slow
def test_distill_gives_students_to_bench(data: Path, teacher: Path, halving: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run("distill", halving, "--teacher", teacher, "--data", data, "--out", out, "--evaluate-samples", 10)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (out / "students").iterdir()) == ["1-step", "2-steps"]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "fd_mnist_cnn@2" in row] == [3]
    assert [row["step"] for row in log if "fd_mnist_cnn@1" in row] == [7]
    assert {path.name for path in (out / "samples").iterdir()} == {
        "step-00000003-2-calls.png",
        "step-00000007-1-calls.png",
    }
    given = "--model", teacher, "--samplers", "ddim", "--nfe", "1,2", "--num-samples", 10, "--out", tmp_path / "o"
    result = run("bench", "mnist", *given, "--student", f"halving={out / 'students'}")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "o/table.md").read_text()
    assert re.search(r"\| halving \| 1 \| 56 \| [\d.e-]+ \| 2-steps: 24 images, .*; 1-step: 32 images", text)


def test_images_are_those_of_each_phase(teacher: Path, halving: Path) -> None:
    shown = said(run("distill", halving, "--teacher", teacher, "--images", 8, "--plan-only"))
    assert re.search(r"2-steps │ 8 │ 1 .* 1-step │ 8 │ 1 ", shown), shown


def test_the_course_of_the_rate_is_in_proportion_to_images(tmp_path: Path) -> None:
    config = write(tmp_path / "t.yaml", network=TINY, images=1000, warmup=100, cooldown=600, **RUN)
    short = _settings(str(config), teaches=True, images=100)
    assert (short.images, short.warmup, short.cooldown) == (100, 10, 60)


# the plan ------------------------------------------------------------------------------------------------------------


def test_plan_only_shows_phases_and_writes_nothing(
    teacher: Path, halving: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("distill", halving, "--teacher", teacher, "--plan-only", "--out", "run")
    assert result.exit_code == 0, result.output
    shown = said(result)
    assert re.search(r"2-steps │ 24 │ 3 │ 2 │ 120 │ [\d.]+ │", shown), shown
    assert re.search(r"1-step │ 32 │ 4 │ 2 │ 160 │ [\d.]+ │", shown), shown
    assert re.search(r"in all │ 56 │ 7 │ │ 280 │ [\d.]+ │", shown), shown
    assert not list(tmp_path.iterdir())


def test_minutes_are_in_proportion_to_calls(teacher: Path, halving: Path) -> None:
    method = make_method(load_config(halving, teacher=str(teacher)))
    method.phases = (Phase("a", 16, 1e-3, calls=2.0), Phase("b", 20, 1e-3, calls=7.0))
    first, second = plan_training(method, seconds=30.0)
    assert (first.steps, first.images, first.minutes) == (2, 16, 1.0)
    assert (second.steps, second.images, second.calls) == (3, 24, 240.0)
    assert second.minutes == pytest.approx(3 * 0.5 * 10 / 5)


def test_the_shipped_runs_can_be_planned_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bench.training_plan.seconds_per_step", lambda method, device: 1.0)
    result = run("distill", "mnist-progressive", "--plan-only")
    assert result.exit_code == 0, result.output
    assert "8-steps" in result.output


# mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "mnits", "--data", "DATA"], "unknown training run 'mnits'; did you mean 'mnist'"),
        (["train", "--data", "nowhere.npz"], "'nowhere.npz' does not exist"),
        (["train", "--data", "EMPTY"], "holds no images"),
        (["train"], "Missing option '--data'"),
        (["train", "HALVING", "--data", "DATA"], "is a run of method 'progressive'; use `fewstep distill"),
        (["distill", "mnist", "--data", "DATA"], "is a run of method 'teacher'; use `fewstep train mnist`"),
        (["distill", "HALVING", "--data", "DATA"], "nowhere"),
        (["distill", "HALVING", "--teacher", "TEACHER", "--data", "WIDE"], "images must be (N, 1, 28, 28) uint8"),
        (["distill", "HALVING", "--teacher", "TEACHER", "--data", "LABELS"], "integers in 0 .. 9, got 0 .. 12"),
        (["distill", "BAD", "--data", "DATA"], "bad.yaml, line 3: steps: step counts that are not halvings"),
        (["distill", "TYPO", "--data", "DATA"], "no such field; did you mean 'substeps'"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, data: Path, teacher: Path, halving: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "wide.npz", images=np.zeros((4, 32, 32), dtype=np.uint8))
    np.savez(tmp_path / "labels.npz", images=np.zeros((13, 28, 28), dtype=np.uint8), labels=np.arange(13))
    (tmp_path / "bad.yaml").write_text("method: progressive\nteacher: x\nsteps: [8, 3]\n")
    (tmp_path / "typo.yaml").write_text("method: progressive\nteacher: x\nsubstep: 2\n")
    places = {"DATA": data, "TEACHER": teacher, "HALVING": halving, "EMPTY": tmp_path / "empty"}
    places |= {"WIDE": tmp_path / "wide.npz", "LABELS": tmp_path / "labels.npz"}
    places |= {"BAD": tmp_path / "bad.yaml", "TYPO": tmp_path / "typo.yaml"}
    result = run(*(places.get(word, word) for word in arguments), "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert message in said(result)
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_and_one_that_is_stopped_say_so(
    data: Path, teacher: Path, halving: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = "distill", halving, "--teacher", teacher, "--data", data, "--out", tmp_path / "run"

    def fails(error: BaseException) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            raise error

        return run

    monkeypatch.setattr(Trainer, "run", fails(KeyboardInterrupt()))
    stopped = run(*given)
    assert stopped.exit_code == 130
    assert "the same command goes on from the last checkpoint" in stopped.output
    monkeypatch.setattr(Trainer, "run", fails(TrainingError("the loss is NaN or Inf at step 3")))
    diverged = run(*given)
    assert diverged.exit_code == 1
    assert "the loss is NaN or Inf at step 3" in diverged.output
    assert "Traceback" not in diverged.output


# evaluation ----------------------------------------------------------------------------------------------------------


def test_an_evaluation_is_a_figure_and_a_picture_for_each_number_of_calls(tmp_path: Path) -> None:
    evaluate, student = evaluator(tmp_path, 10, "cpu"), tiny_checkpoint(1, 2, 1)
    first = evaluate(student, 7)
    assert list(first) == ["fd_mnist_cnn@2", "fd_mnist_cnn@1"]
    assert all(value > 0 for value in first.values())
    assert evaluate(student, 14) == first
    assert evaluate(tiny_checkpoint(2, 2, 1), 21) != first
    again = [tmp_path / f"samples/step-{step:08d}-2-calls.png" for step in (7, 14, 21)]
    assert again[0].read_bytes() == again[1].read_bytes() != again[2].read_bytes()
    with Image.open(again[0]) as picture:
        assert picture.size == (10 * 28 * 2, 8 * 28 * 2)


def test_a_teacher_is_pictured_at_20_calls_and_other_shapes_are_not_judged(tmp_path: Path) -> None:
    assert evaluator(tmp_path, 10, "cpu")(tiny_checkpoint(0, size=16, channels=3), 1) == {}
    assert evaluator(tmp_path, 0, "cpu")(tiny_checkpoint(0, 1), 2) == {}
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {
        "step-00000001-20-calls.png",
        "step-00000002-1-calls.png",
    }


def test_an_evaluation_leaves_the_weights_alone(tmp_path: Path) -> None:
    student = tiny_checkpoint(1, 1)
    save_checkpoint(tmp_path / "before", student)
    evaluator(tmp_path, 4, "cpu")(student, 1)
    before = load_checkpoint(tmp_path / "before").network.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in student.network.state_dict().items())


@pytest.mark.slow
def test_a_run_given_no_time_stops_after_a_row_and_goes_on(data: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "run.yaml", method="teacher", network=TINY, images=24, **RUN)
    command = ("train", config, "--data", data, "--out", tmp_path / "out", "--evaluate-samples", 0, "--minutes", 0)
    pieces = [run(*command) for _ in range(3)]
    assert [piece.exit_code for piece in pieces] == [75, 75, 0]
    ends = [piece.output.splitlines()[-1] for piece in pieces]
    assert ends[:2] == [f"stopped at step {n} of 3; the same command goes on from there" for n in (1, 2)]
    assert json.loads(ends[2])["step"] == 3
