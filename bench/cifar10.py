"""CIFAR-10 from its images to a table of samplers and students: `python -m bench.cifar10 --data FOLDER --out runs/cifar10`.

Four stages, of which the two that train go on from their last checkpoint; with `--minutes` a call trains about so long and then
stops with exit code 75, and the same command goes on from there until it says that all is done. The judge takes a minute or two
on an accelerator and is made in one go, and so is the table, whose finished cells are kept.

    judge     a classifier of the training images, and the statistics of its features
    teacher   distill/configs/cifar10.yaml
    students  distill/configs/cifar10-progressive.yaml
    table     bench/suites/cifar10.yaml
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from bench.build_assets import build_samples, build_statistics, describe
from bench.classifier_training import ClassifierTraining, train_classifier
from bench.command import TIME_OVER, checked_device, plain_errors, resumable
from bench.data import ImageData, load_images
from bench.engine import run_suite
from bench.evaluate import evaluator
from bench.features import load_extractor, save_extractor
from bench.judge import FEATURES, FOLDER_SAMPLES, FOLDER_TEST_SAMPLES, MOMENTS
from bench.report import write_results
from bench.suite import load_suite
from bench.table import terminal
from bench.zoo import load_model
from distill.checkpoint import load_checkpoint, read_json, save_checkpoint
from distill.config import default_dtype
from distill.methods import load_config, make_method
from distill.trainer import Trainer, TrainingError

CLASSIFIER = ClassifierTraining(
    epochs=30, learning_rate=3e-3, shift=4.0, rotation=0.0, scale=0.0, flip=True, width=64, hidden=128, levels=3
)
_SPLITS = ("train", "test")


@dataclass(frozen=True)
class Work:
    """One call of the script.

    Attributes:
        data: folder with `train.parquet` and `test.parquet`.
        out: folder of everything that is made.
        device: "cpu", or "auto" for the accelerator that is there.
        deadline: of `time.monotonic`, after which the training saves and stops.
        teacher, students: training runs, names or files.
        suite: a name or a file; its paths are those that this script makes under `out`.
        classifier: how the judge is trained.
    """

    data: Path
    out: Path
    device: str
    deadline: float
    teacher: str = "cifar10"
    students: str = "cifar10-progressive"
    suite: str = "cifar10"
    classifier: ClassifierTraining = CLASSIFIER

    @property
    def torch_device(self) -> str:
        """Of torch."""
        return "cuda" if self.device == "auto" and torch.cuda.is_available() else "cpu"

    def images(self, split: str) -> ImageData:
        """The images of "train" or "test"."""
        return load_images(self.data / f"{split}.parquet")


class Ended(Enum):
    """How a stage ended: with nothing to do, at its end, at the deadline, or with cells that failed."""

    IDLE, DONE, CUT, FAILED = range(4)


def make_judge(work: Work) -> Ended:
    """Train the classifier, and save it with the statistics of both splits.

    Raises:
        ValueError: the one that is there was trained in another way.
    """
    folder, training = work.out / "judge", asdict(work.classifier)
    if (folder / MOMENTS).exists():
        before = read_json(folder / FEATURES / "config.json")["info"]["training"]
        changed = [name for name in training if before.get(name) != training[name]]
        if changed:
            was = ", ".join(f"{name}={before.get(name)}, now {training[name]}" for name in changed)
            raise ValueError(f"the judge in {folder} was trained with {was}; give the old value, or another folder")
        return Ended.IDLE
    files = {split: work.data / f"{split}.parquet" for split in _SPLITS}
    data = {split: work.images(split) for split in _SPLITS}
    labels = data["train"].labels
    if labels is None:
        raise ValueError(f"{files['train']} has no labels; a classifier needs them")
    network, _ = train_classifier(data["train"].images, labels, work.classifier, device=work.torch_device)
    info = {"data": {split: describe(data[split], file) for split, file in files.items()}, "training": training}
    save_extractor(folder / FEATURES, "cifar_cnn", network, info)
    extractor = load_extractor(folder / FEATURES, work.torch_device)
    accuracy = float((extractor.classify(data["test"].images) == data["test"].labels).mean())
    save_extractor(folder / FEATURES, "cifar_cnn", network, {"test_accuracy": accuracy, **info})
    for split, samples in zip(_SPLITS, (FOLDER_SAMPLES, FOLDER_TEST_SAMPLES), strict=True):
        build_samples(split, files[split], data[split], folder / samples, extractor)
    build_statistics(files, data, folder / MOMENTS, extractor)
    return Ended.DONE


def train_teacher(work: Work) -> Ended:
    """Train the model to its end, or to the deadline."""
    return _train(work, load_config(work.teacher), work.out / "teacher")


def train_students(work: Work) -> Ended:
    """Distil the model to its end, or to the deadline."""
    config = load_config(work.students, teacher=str(work.out / "teacher" / "model"))
    return _train(work, config, work.out / "students")


def measure(work: Work) -> Ended:
    """Run the suite on what was trained."""
    suite = load_suite(work.suite)
    paths: dict[str, Any] = {"model": str(work.out / "teacher" / "model"), "judge": str(work.out / "judge")}
    rows = [
        row.model_copy(update={"student": str(work.out / "students" / "students")}) if hasattr(row, "student") else row
        for row in suite.samplers
    ]
    suite = suite.model_copy(update={**paths, "samplers": tuple(rows)})
    device, console = work.torch_device, Console()
    model = load_model(suite.model, device, default_dtype(device), suite.judge)
    found = run_suite(suite, model, work.out / "results", device, console)
    title = write_results(suite, model, work.out / "results", device, found)
    console.print(terminal(found, model.judge.floors(suite.num_samples), title, suite.note))
    return Ended.FAILED if any(row["status"] == "failed" for row in found) else Ended.DONE


STAGES: dict[str, Callable[[Work], Ended]] = {
    "judge": make_judge,
    "teacher": train_teacher,
    "students": train_students,
    "table": measure,
}


def _train(work: Work, config: Any, out: Path) -> Ended:
    trainer = Trainer(make_method(config), out, work.device)
    if trainer.step == trainer.steps:
        return Ended.IDLE
    trainer.evaluate = evaluator(out, 0, work.torch_device)
    data = work.images("train")
    labels = None if data.labels is None else torch.from_numpy(data.labels)
    trainer.run(torch.from_numpy(data.images), labels, minutes=(work.deadline - time.monotonic()) / 60)
    return Ended.DONE if trainer.step == trainer.steps else Ended.CUT


def export(work: Work, folder: Path) -> None:
    """Copy what was made without the training's state, in files of at most 15 MB.

    The models are rounded to half precision, so their hashes are not those of the measured ones in the results.
    """
    found = [work.out / "teacher" / "model", *sorted((work.out / "students" / "students").glob("*-step*"))]
    for model in (path for path in found if (path / "config.json").exists() and path.suffix not in (".new", ".old")):
        save_checkpoint(folder / model.relative_to(work.out), load_checkpoint(model), torch.float16)
    for name in ("judge", "results"):
        if (work.out / name).exists():
            shutil.rmtree(folder / name, ignore_errors=True)
            shutil.copytree(work.out / name, folder / name)
    for log in work.out.glob("*/log.jsonl"):
        shutil.copy(log, folder / f"{log.parent.name}-log.jsonl")


def run(work: Work) -> tuple[Ended, str]:
    """Do what is left, stage by stage, and at least a little; returns how that ended, and at which stage."""
    for read, name in ((load_config, work.teacher), (load_config, work.students), (load_suite, work.suite)):
        read(name)  # a typing error in the last is told first
    worked = False
    for name, stage in STAGES.items():
        if worked and time.monotonic() > work.deadline:
            return Ended.CUT, name
        click.echo(f"stage {name}")
        ended = stage(work)
        if ended in (Ended.CUT, Ended.FAILED):
            return ended, name
        worked |= ended is Ended.DONE
    return Ended.DONE, name


@click.command()
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="Folder with train.parquet and test.parquet."
)
@click.option("--out", default=Path("runs/cifar10"), show_default=True, type=click.Path(path_type=Path))
@click.option(
    "--minutes",
    type=click.FloatRange(min=0),
    help=f"After which to save and stop, with exit code {TIME_OVER}; by default never.",
)
@click.option("--device", type=click.Choice(["cpu", "auto"]), default="auto", show_default=True)
@click.option("--teacher", default="cifar10", show_default=True, help="Training run of the model.")
@click.option("--students", default="cifar10-progressive", show_default=True, help="Training run of the students.")
@click.option("--suite", default="cifar10", show_default=True, help="What is measured, on the paths made here.")
@click.option(
    "--epochs", default=CLASSIFIER.epochs, show_default=True, type=click.IntRange(min=1), help="Of the judge."
)
@click.option(
    "--export", "exported", type=click.Path(path_type=Path), help="Folder for a copy without the training state."
)
@plain_errors
def main(
    data: Path,
    out: Path,
    minutes: float | None,
    device: str,
    teacher: str,
    students: str,
    suite: str,
    epochs: int,
    exported: Path | None,
) -> None:
    """Train a judge, a model and its students on CIFAR-10, and measure them; goes on where it stopped."""
    checked_device("cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda")
    deadline = time.monotonic() + (float("inf") if minutes is None else 60 * minutes)
    classifier = ClassifierTraining(**{**vars(CLASSIFIER), "epochs": epochs})
    work = Work(data, out, device, deadline, teacher, students, suite, classifier)
    missing = [split for split in _SPLITS if not (data / f"{split}.parquet").is_file()]
    if missing:
        raise ValueError(
            f"--data must be a folder with train.parquet and test.parquet; {data} has no {missing[0]}.parquet"
        )
    with resumable("the same command goes on from the last checkpoint"):
        try:
            ended, stage = run(work)
        except TrainingError as error:
            raise click.ClickException(str(error)) from error
    if exported is not None:
        export(work, exported)
    if ended is Ended.FAILED:
        raise click.ClickException(
            f"cells failed, for the reasons in {out / 'results'}; the same command tries them again"
        )
    if ended is Ended.CUT:
        click.echo(f"stopped before the end of stage {stage}; the same command goes on")
        raise SystemExit(TIME_OVER)
    click.echo(f"all done: {out / 'results'}")


if __name__ == "__main__":
    main()
