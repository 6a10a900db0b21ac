"""Students as rows of a benchmark: which folder answers for which number of network calls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.network import Network, on_device
from bench.shipped import found, shipped_students
from bench.suite import StudentSpec
from bench.zoo import BenchModel, judged
from distill.checkpoint import load_checkpoint
from distill.student import filled, network_inputs
from samplers import Plan, run_plan
from samplers.execute import Callback
from samplers.noise import standard_normal

_CONFIG = "config.json"


def load_students(spec: StudentSpec, beside: BenchModel, device: str) -> dict[int, BenchModel]:
    """The students of a row, by the number of network calls, judged as the model beside them.

    Args:
        spec: a student's folder or a folder of such folders, or the name of shipped ones.
        beside: the suite's model, whose samples have the same shape and classes.
        device: of torch; the dtype is that of `beside`.

    Raises:
        ValueError: no such folder, no student in it, two for one number of calls, samples of another shape or classes, or
            a guidance weight that a student does not take.
        distill.checkpoint.CheckpointError: a checkpoint that cannot be used.
    """
    students: dict[int, BenchModel] = {}
    for folder in _folders(spec):
        checkpoint = load_checkpoint(folder)
        if not checkpoint.plans:  # such as what the first stage of guidance distillation leaves
            continue
        name = str(Path(spec.student) / folder.relative_to(found(spec.student)))
        student = judged(on_device(name, checkpoint, device, beside.dtype), beside.judge)
        check_alike(_row(spec), student, beside)
        for calls in student.plans:
            if calls in students:
                both = f"{students[calls].name} and {name}"
                raise ValueError(f"{_row(spec)}: {both} were both trained for {calls} calls; give one of them")
            inputs_of(student, calls, spec.guidance)
            students[calls] = student
    if not students:
        raise ValueError(f"{_row(spec)}: {spec.student} holds no student, which is a checkpoint with plans")
    return dict(sorted(students.items()))


def is_student(model: str) -> bool:
    """Whether a suite's model is a student, shipped or in a folder; False for another name of the zoo, and for nothing there.

    Raises:
        distill.checkpoint.CheckpointError: a checkpoint that cannot be used.
    """
    return (found(model) / _CONFIG).is_file() and bool(load_checkpoint(found(model)).plans)


def _folders(spec: StudentSpec) -> list[Path]:
    """The checkpoints at the folder or in it."""
    root = found(spec.student)
    if not root.is_dir():
        raise ValueError(
            f"{_row(spec)}: there is no folder {root}, and no shipped one of that name; give a student's folder, a folder "
            f"of such folders, or one of {', '.join(shipped_students())}"
        )
    if (root / "students").is_dir():
        raise ValueError(f"{_row(spec)}: {root} is the folder of a run; give {root / 'students'}")
    if (root / _CONFIG).is_file():
        return [root]
    inside = (path for path in sorted(root.iterdir()) if (path / _CONFIG).is_file())
    return [path for path in inside if path.suffix not in (".new", ".old")]  # what a killed writer leaves


def check_alike(row: str, student: BenchModel, beside: BenchModel) -> None:
    """Raise ValueError where a row's network gives other samples than the suite's."""
    if (student.shape, student.classes) != (beside.shape, beside.classes):
        raise ValueError(
            f"{row}: {student.name} gives samples of shape {student.shape} in {student.classes} classes, the model "
            f"{beside.name} {beside.shape} in {beside.classes}; a table compares equal ones"
        )


def _row(spec: StudentSpec) -> str:
    return f"student {spec.label!r}"


def inputs_of(model: Network, calls: int, guidance: float | None = None) -> dict[str, float]:
    """As `distill.student.network_inputs`; an error names the model."""
    try:
        return network_inputs(model.info, model.scalars, calls, guidance)
    except ValueError as error:
        raise ValueError(f"{model.name}: {error}") from error


def run_network(
    model: Network,
    plan: Plan,
    inputs: Mapping[str, float],
    *,
    seed: int,
    indices: Tensor,
    callback: Callback | None = None,
    compile: str | None = None,
    check: bool = True,
) -> Tensor:
    """Samples of a plan (B, ...) float32, from the noise and with the labels of their indices.

    Args:
        model: on the device of `indices`.
        plan: what to compute, for instance one of a student's own.
        inputs: as `inputs_of` gives them.
        seed: of all noise.
        indices: (B,) int64.
        callback, compile, check: as in `run_plan`.
    """
    x_T = standard_normal(seed, indices, 0, model.shape, device=indices.device).mul_(plan.sigma_T)
    how: dict[str, Any] = {
        "callback": callback,
        "compile": compile,
        "check": check,
        "cond": model.cond(indices) | filled(inputs, indices),
    }
    return run_plan(plan, model.metered, x_T, seed=seed, indices=indices, **how)


def training_cost(info: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of a student's training cost, summed over the phases up to it; none where its checkpoint does not say."""
    phases = info.get("phases")
    if not phases:
        return {}
    texts = (f"{name or 'train'}: {cost['images']} images, {cost['minutes']:g} min" for name, cost in phases.items())
    return {
        "train_images": sum(cost["images"] for cost in phases.values()),
        "train_minutes": round(sum(cost["minutes"] for cost in phases.values()), 2),
        "train_phases": "; ".join(texts),
    }
