"""The commands that train: `fewstep train` for a model, `fewstep distill` for its students."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bench.command import TIME_OVER, plain_errors, resumable

_ROOT = Path(__file__).parent.parent
_PATH = click.Path(path_type=Path)
_COURSE = ("warmup", "cooldown")  # of the learning rate
_OPTIONS = (
    click.option("--data", type=_PATH, help="Parquet file, image folder, zip or npz."),
    click.option("--out", type=_PATH, help="Run folder; resumes what is in it."),
    click.option(
        "--images",
        type=click.IntRange(min=1),
        help="Training images to see, in each phase; warmup and cooldown change in proportion.",
    ),
    click.option("--device", type=click.Choice(["cpu", "auto"]), default="cpu", show_default=True),
    click.option(
        "--evaluate-samples",
        type=click.IntRange(min=0),
        default=500,
        show_default=True,
        help="Samples that an evaluation judges; 0 for pictures only.",
    ),
    click.option(
        "--minutes",
        type=click.FloatRange(min=0),
        help=f"After which to save and stop, at the next row of the log, with exit code {TIME_OVER}; by default never.",
    ),
    click.option("--plan-only", is_flag=True, help="Show phases, steps and estimated minutes; train nothing."),
)


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.argument("config", default="mnist")
@click.option("--init", help="Checkpoint whose weights a new run begins with.")
@_run_options
@plain_errors
def train(config: str, init: str | None, **options: Any) -> None:
    """Train an epsilon-model as CONFIG says: a shipped run (by default mnist) or a YAML file.

    A run that was stopped goes on from its last checkpoint: type the same command again. OUT/model is a checkpoint for `fewstep
    bench --model`, and pictures of its samples are in OUT/samples.
    """
    _train(_settings(config, teaches=True, images=options.pop("images"), init=init), **options)


@click.command()
@click.argument("config")
@click.option("--teacher", help="Folder of the teacher's checkpoint; by default that of CONFIG.")
@_run_options
@plain_errors
def distill(config: str, teacher: str | None, **options: Any) -> None:
    """Train students of a teacher as CONFIG says: a shipped run such as mnist-progressive, or a YAML file.

    A run that was stopped goes on from its last checkpoint: type the same command again. OUT/students has a folder for each
    student, for `fewstep bench --model` or `--student` (what stage one of guidance leaves is for `--model`), and pictures of
    their samples are in OUT/samples.
    """
    _train(_settings(config, teaches=False, images=options.pop("images"), teacher=teacher), **options)


def _settings(name: str, teaches: bool, images: int | None, **values: str | None) -> Any:
    """The run that a command describes.

    Raises:
        ValueError: an unknown run, a field that is wrong, or a run of the other command.
    """
    from distill.methods import load_config

    given: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
    config = load_config(name, **given)
    if (config.method == "teacher") != teaches:
        right = "distill" if teaches else "train"
        raise ValueError(f"{name} is a run of method {config.method!r}; use `fewstep {right} {name}`")
    if images is not None:  # some methods count the images of some phases apart
        fields = config.document()
        counts = {field: images for field in fields if field == "images" or field.endswith("_images")}
        course = {field: fields[field] * images // fields["images"] for field in _COURSE if field in fields}
        config = load_config(name, **given, **counts, **course)
    teacher = getattr(config, "teacher", None)
    if teacher is not None and not Path(teacher).exists() and (_ROOT / teacher).exists():
        config = config.model_copy(update={"teacher": str(_ROOT / teacher)})  # shipped, and called from another folder
    return config


def _train(
    config: Any,
    data: Path | None,
    out: Path | None,
    device: str,
    evaluate_samples: int,
    minutes: float | None,
    plan_only: bool,
) -> None:
    """Plan or run it, whatever the method; on Ctrl-C say how to go on."""
    from distill.methods import make_method

    if plan_only:
        _show_plan(make_method(config), device)
        return
    if data is None or out is None:
        raise click.UsageError(f"Missing option '{'--data' if data is None else '--out'}'.")
    import torch

    from bench.data import load_images
    from bench.evaluate import evaluator
    from distill.trainer import Trainer, TrainingError

    trainer = Trainer(make_method(config), out, device)
    trainer.evaluate = evaluator(out, evaluate_samples, str(trainer.accelerator.device))
    source = load_images(data)
    labels = None if source.labels is None else torch.from_numpy(source.labels)
    with resumable(f"the same command goes on from the last checkpoint in {out}"):
        try:
            trainer.run(torch.from_numpy(source.images), labels, minutes=math.inf if minutes is None else minutes)
        except TrainingError as error:
            raise click.ClickException(str(error)) from error
    if not trainer.accelerator.is_main_process:
        return
    click.echo(json.dumps(trainer.log[-1]))
    if trainer.step < trainer.steps:
        click.echo(f"stopped at step {trainer.step} of {trainer.steps}; the same command goes on from there")
        raise SystemExit(TIME_OVER)


def _show_plan(method: Any, device: str) -> None:
    import torch
    from accelerate import Accelerator
    from rich.console import Console

    from bench.training_plan import plan_table, plan_training, seconds_per_step

    where = torch.device("cpu") if device == "cpu" else Accelerator().device
    rows = plan_training(method, seconds_per_step(method, where))
    measured = f"on {where}" + (f" with {torch.get_num_threads()} threads" if where.type == "cpu" else "")
    title = f"{method.config.method}, batches of {method.config.batch_size}, {method.config.dtype}"
    Console().print(plan_table(rows, title, measured))
