"""The cells of a suite: what each samples with which network, and everything that makes its number what it is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.store import code_fingerprint
from bench.students import inputs_of, load_students, training_cost
from bench.suite import SamplerSpec, Spec, StudentSpec, Suite
from bench.zoo import BenchModel
from distill.student import nearest
from samplers import Plan, make_plan
from samplers.registry import get_sampler

Row = dict[str, Any]
STUDENT = "student"


@dataclass(frozen=True)
class Cell:
    """One number of the table: a sampler, or a student, at a budget.

    Attributes:
        spec: the sampler and its options, or the student's folder.
        nfe: budget of network calls.
        role: "sampler", or "teacher" for the many-step run.
        model: the network, the suite's or a student's.
        plan: what it computes; None where the sampler is error-controlled or the budget does not allow a plan.
        problem: why there is no plan, else "".
        inputs: what the network takes beside state, time and label.
        trained: of a student, whether it was trained for this budget.
    """

    spec: Spec
    nfe: int
    role: str
    model: BenchModel
    plan: Plan | None
    problem: str = ""
    inputs: Mapping[str, float] = field(default_factory=dict)
    trained: bool | None = None

    @property
    def calls(self) -> int:
        """Network calls per sample, as far as they are known beforehand."""
        return self.nfe if self.plan is None else self.plan.nfe

    @property
    def file_name(self) -> str:
        """Of the cell's picture."""
        return f"{self.spec.label}-nfe{self.nfe}.png" if self.role == "sampler" else f"teacher-nfe{self.nfe}.png"

    @property
    def absent(self) -> bool:
        """Whether nothing went wrong, but no student was trained for this budget."""
        return isinstance(self.spec, StudentSpec) and not (self.trained or self.spec.untrained)

    @property
    def without(self) -> Row:
        """The outcome of a cell that has a problem."""
        return {"status": "absent" if self.absent else "failed", "reason": self.problem}

    @property
    def remarks(self) -> Row:
        """Columns of a student that its number does not depend on: where it is, and what its training took."""
        if not isinstance(self.spec, StudentSpec):
            return {}
        if self.absent:
            return {"model": self.spec.student, "trained": False}
        return {"model": self.model.name, "trained": self.trained, **training_cost(self.model.info)}


def resolve(suite: Suite, model: BenchModel, device: str) -> list[Cell]:
    """The cells of a suite, cheapest budget first, the teacher last, each with its plan or the reason it has none.

    Args:
        suite: what to measure.
        model: the suite's, on `device`.
        device: of the students' networks.

    Raises:
        ValueError: students that cannot be loaded, or do not fit the model, or a guidance weight that none takes.
    """
    students = {
        spec.label: load_students(spec, model, device) for spec in suite.samplers if isinstance(spec, StudentSpec)
    }
    networks = [model, *(student for found in students.values() for student in found.values())]
    if suite.guidance is not None and not any(_guided(network) for network in networks):
        raise ValueError(f"guidance={suite.guidance:g} is given, but no network of suite {suite.name!r} takes a weight")
    for network in networks:
        if _guided(network):
            inputs_of(network, 1, suite.guidance)
    cells = [
        _student_cell(suite, model, spec, nfe, students[spec.label])
        if isinstance(spec, StudentSpec)
        else _sampler_cell(suite, model, spec, nfe, "sampler")
        for nfe in suite.nfe
        for spec in suite.samplers
    ]
    teacher = SamplerSpec(**suite.teacher.model_dump(exclude={"nfe"}))
    return [*cells, _sampler_cell(suite, model, teacher, suite.teacher.nfe, "teacher")]


def _guided(model: BenchModel) -> bool:
    return "guidance" in model.scalars


def _sampler_cell(suite: Suite, model: BenchModel, spec: SamplerSpec, nfe: int, role: str) -> Cell:
    guidance = suite.guidance if _guided(model) else None
    try:  # the row says why, and the other cells are measured
        if get_sampler(spec.sampler).adaptive:
            return Cell(spec, nfe, role, model, None, inputs=inputs_of(model, nfe, guidance))
        plan = make_plan(spec.sampler, model.model.schedule, nfe=nfe, **settings(spec))
        return Cell(spec, nfe, role, model, plan, inputs=inputs_of(model, plan.nfe, guidance))
    except (ValueError, TypeError) as error:
        return Cell(spec, nfe, role, model, None, str(error))


def _student_cell(
    suite: Suite, model: BenchModel, spec: StudentSpec, nfe: int, students: Mapping[int, BenchModel]
) -> Cell:
    trained = nfe in students
    if not trained and not spec.untrained:
        known = ", ".join(map(str, students))
        return Cell(spec, nfe, "sampler", model, None, f"trained for {known} calls", trained=False)
    closest = nearest(students, nfe)
    student, plan = students[closest], students[closest].plans[closest]
    guidance = spec.guidance if spec.guidance is not None or not _guided(student) else suite.guidance
    try:
        if not trained:
            plan = make_plan(plan.sampler, student.model.schedule, nfe=nfe, grid="uniform")
        inputs = inputs_of(student, plan.nfe, guidance)
    except (ValueError, TypeError) as error:
        return Cell(spec, nfe, "sampler", student, None, str(error), trained=trained)
    return Cell(spec, nfe, "sampler", student, plan, inputs=inputs, trained=trained)


def settings(spec: SamplerSpec) -> dict[str, Any]:
    """The row's arguments of `make_plan`."""
    return {"grid": spec.grid, "final": spec.final, "afs": spec.afs, **spec.options}


def identity(cell: Cell, suite: Suite, device: str) -> Row:
    """Everything that makes the cell's number what it is; a change in any of it is another cell.

    A student is known by its weights and not by its folder or its row, so that it is measured once wherever it stands.
    """
    model = cell.model
    plan_hash = hashlib.sha256(cell.plan.to_json().encode()).hexdigest()[:16] if cell.plan else ""
    what = _student(cell) if isinstance(cell.spec, StudentSpec) else _sampler(cell.spec, model)
    return {
        **what,
        "model_hash": model.hash,
        "budget": cell.nfe,
        "plan_hash": plan_hash,
        "num_samples": suite.num_samples,
        "seed": suite.seed,
        "metric": model.judge.metric,
        "hashes": dict(model.judge.hashes),
        "dtype": model.dtype,
        "device": torch.device(device).type,
        "torch": torch.__version__,
        "code": code_fingerprint(),
        **({"inputs": dict(cell.inputs)} if cell.inputs else {}),
    }


def _sampler(spec: SamplerSpec, model: BenchModel) -> Row:
    return {
        "model": model.name,
        "sampler": spec.sampler,
        "options": dict(spec.options),
        "grid": spec.grid or get_sampler(spec.sampler).grid_on(model.model.schedule),
        "final": spec.final or "",
        "afs": spec.afs,
    }


def _student(cell: Cell) -> Row:
    name = cell.plan.sampler if cell.plan is not None and not cell.trained else STUDENT
    grid = "uniform" if name != STUDENT else ""
    return {"model": STUDENT, "sampler": name, "options": {}, "grid": grid, "final": "", "afs": False}
