"""The cells of a suite: what each samples with which network, and everything that makes its number what it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import torch

from bench.guidance import Guidance, Unguided, guided, null_of, weight_of
from bench.judging import Metric, get_metric
from bench.network import Network
from bench.pipelines import is_pipeline
from bench.store import code_fingerprint, key_of, plugin_fingerprint
from bench.students import check_alike, inputs_of, load_students, training_cost
from bench.suite import SamplerSpec, Spec, StudentSpec, Suite
from bench.tuning import tuning_of
from bench.zoo import BenchModel, judged, load_network
from distill.student import nearest
from samplers import Plan, make_plan
from samplers.errors import BudgetError
from samplers.grid import points_of
from samplers.registry import get_sampler

Row = dict[str, Any]
STUDENT = "student"
_INTEGRATORS = ("torchdiffeq", "scipy")  # choose the steps of the samplers that have no plan


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
        num_samples, seed, metrics: the suite's, the seed being one of its seeds.
        batch_size: the suite's, where the samples depend on it, as those of an error-controlled sampler do; else 0.
        guidance: what its model is under, as `Guidance`; None for none, or for a weight that is an input.
        solution: what identifies the many-step run that the cell is compared with; "" where it is with none.
        too_few: whether the problem is that the sampler needs more calls than the budget has.
    """

    spec: Spec
    nfe: int
    role: str
    model: BenchModel
    plan: Plan | None
    problem: str = ""
    inputs: Mapping[str, float] = field(default_factory=dict)
    trained: bool | None = None
    num_samples: int = 0
    seed: int = 0
    metrics: tuple[str, ...] = ()
    batch_size: int = 0
    guidance: Guidance | None = None
    solution: str = ""
    too_few: bool = False

    @property
    def calls(self) -> int:
        """Network calls per sample, as far as they are known beforehand."""
        return self.nfe if self.plan is None else self.plan.nfe

    @property
    def evaluations(self) -> tuple[int, int] | None:
        """Of the network for each sample, and those of them under guidance, as the plan claims; None where nobody knows."""
        return self.guidance.evaluations(self.plan) if self.guidance and self.plan else None

    @property
    def stochastic(self) -> bool:
        """Whether it draws noise on the way; an error-controlled sampler does not."""
        return self.plan is not None and self.plan.stochastic

    @property
    def is_solution(self) -> bool:
        """Whether other cells are compared with its samples."""
        return self.role == "teacher" and any(get_metric(name).follows_the_path for name in self.metrics)

    @property
    def further(self) -> list[Metric]:
        """The metrics that it has beside the distance: those that follow the many-step solution only where it does."""
        follows = self.role == "sampler" and not self.stochastic
        chosen = [get_metric(name) for name in self.metrics]
        return [metric for metric in chosen if follows or not metric.follows_the_path]

    @property
    def follows(self) -> bool:
        """Whether its samples are compared with those of the many-step solution."""
        return any(metric.follows_the_path for metric in self.further)

    @property
    def file_name(self) -> str:
        """Of the cell's picture."""
        name = self.spec.label if self.role == "sampler" else "teacher"
        return f"{name}-nfe{self.nfe}{f'-seed{self.seed}' if self.seed else ''}.png"

    @property
    def off_the_path(self) -> Cell:
        """The same without the metrics that compare with the many-step run."""
        metrics = tuple(name for name in self.metrics if not get_metric(name).follows_the_path)
        return replace(self, metrics=metrics, solution="")

    @property
    def untrained(self) -> bool:
        """Whether no student was trained for this budget, and none is to be measured."""
        return isinstance(self.spec, StudentSpec) and not (self.trained or self.spec.untrained)

    @property
    def without(self) -> Row:
        """The outcome of a cell that has a problem; where that is the budget, nothing went wrong."""
        return {"status": "absent" if self.untrained or self.too_few else "failed", "reason": self.problem}

    @property
    def resolved(self) -> Row:
        """Columns that say in full what the identity says as it was given: every option, and the last step; not of students."""
        spec = self.spec
        if not isinstance(spec, SamplerSpec):
            return {}
        sampler = get_sampler(spec.sampler)
        grid = spec.grid or sampler.grid_on(self.model.model.schedule)
        return {"options": {**sampler.options, **spec.options}, "final": spec.final or points_of(grid).final}

    @property
    def tuning(self) -> Row:
        """Columns that say where it was tuned on what judges it."""
        return tuning_of(self.spec, self.model.name) if isinstance(self.spec, SamplerSpec) else {}

    @property
    def remarks(self) -> Row:
        """Columns of a student that its number does not depend on: where it is, and what its training took."""
        if not isinstance(self.spec, StudentSpec):
            return {}
        if self.untrained:
            return {"model": self.spec.student, "trained": False}
        return {"model": self.model.name, "trained": self.trained, **training_cost(self.model.info)}


def resolve(suite: Suite, model: BenchModel, device: str) -> list[Cell]:
    """The cells of a suite, cheapest budget first, each with its plan or the reason it has none.

    The teacher is last, or first where the others are compared with its samples.

    Args:
        suite: what to measure.
        model: the suite's, on `device`.
        device: of the networks of students and of rows with a model of their own.

    Raises:
        ValueError: models or students that cannot be loaded, or do not fit the suite's model, or a guidance weight that
            none takes.
    """
    with suite.naming("samplers"):
        own = {
            spec.model: _beside(spec.model, model, device, suite.reading if is_pipeline(spec.model) else {})
            for spec in suite.samplers
            if isinstance(spec, SamplerSpec) and spec.model is not None
        }
        students = {
            spec.label: load_students(spec, model, device) for spec in suite.samplers if isinstance(spec, StudentSpec)
        }
    networks = [model, *own.values(), *(student for found in students.values() for student in found.values())]
    with suite.naming("guidance"):
        if isinstance(suite.guidance, float) and not any(map(_takes_weight, networks)):
            raise ValueError(
                f"guidance={suite.guidance:g} is given, but no network of suite {suite.name!r} takes a weight"
            )
        for network in networks:
            if _takes_weight(network):
                inputs_of(network, 1, weight_of(suite.guidance))
    teacher = SamplerSpec(**suite.teacher.model_dump(exclude={"nfe"}))
    for spec in (*suite.samplers, teacher):
        if isinstance(spec, SamplerSpec):
            _check_guidance(suite, spec, own[spec.model] if spec.model else model)
    weaker = lru_cache(lambda name: load_network(name, device, model.dtype))
    cells = [
        _student_cell(suite, model, spec, nfe, students[spec.label])
        if isinstance(spec, StudentSpec)
        else _sampler_cell(suite, own[spec.model] if spec.model else model, spec, nfe, "sampler", weaker)
        for nfe in suite.nfe
        for spec in suite.samplers
    ]
    many_steps = _sampler_cell(suite, model, teacher, suite.teacher.nfe, "teacher", weaker)
    with suite.naming("metrics"):
        _check_metrics(suite, model, many_steps)
    seeded = [[_seeded(cell, suite, seed, many_steps) for seed in suite.seeds] for cell in (*cells, many_steps)]
    if seeded[-1][0].is_solution:
        seeded = [seeded[-1], *seeded[:-1]]
    return [cell for group in seeded for cell in group]


def _seeded(cell: Cell, suite: Suite, seed: int, many_steps: Cell) -> Cell:
    """A cell with what the suite says of every cell."""
    batch_size = suite.batch_size if cell.plan is None and not cell.problem else 0
    metrics = suite.metrics
    if cell.guidance != many_steps.guidance:  # another distribution: what differs is not the solver's error
        metrics = tuple(name for name in metrics if not get_metric(name).follows_the_path)
    seeded = replace(cell, seed=seed, num_samples=suite.num_samples, metrics=metrics, batch_size=batch_size)
    if not seeded.follows:
        return seeded
    settings_of = {**_sampler(many_steps.spec, many_steps.model), "nfe": many_steps.nfe}  # type: ignore[arg-type]
    solution = {"model_hash": many_steps.model.hash, "plan_hash": _plan_hash(many_steps), **settings_of}
    solution |= _guidance(many_steps)
    return replace(seeded, solution=key_of(solution))


def _check_metrics(suite: Suite, model: BenchModel, many_steps: Cell) -> None:
    """Raise ValueError for a metric that the judge or the many-step run does not allow."""
    for metric in map(get_metric, suite.metrics):
        if "probabilities" in metric.needs and model.judge.probabilities is None:
            raise ValueError(
                f"metric {metric.name!r} needs class probabilities, which the judge {model.judge.metric} does not give"
            )
        if metric.follows_the_path and many_steps.stochastic:
            raise ValueError(
                f"metric {metric.name!r} compares with the many-step run, and teacher {many_steps.spec.label} is stochastic"
            )


def _beside(name: str, model: BenchModel, device: str, reading: Mapping[str, Any]) -> BenchModel:
    """A row's own model, judged as the suite's."""
    other = judged(load_network(name, device, model.dtype, **reading), model.judge)
    check_alike(f"model {name!r}", other, model)
    return other


def _takes_weight(model: BenchModel) -> bool:
    return "guidance" in model.scalars


def _wanted(suite: Suite, spec: SamplerSpec) -> float | Guidance | None:
    return suite.guidance if spec.guidance is None else spec.guidance


def _check_guidance(suite: Suite, spec: SamplerSpec, model: BenchModel) -> None:
    """Raise ValueError for guidance that the model of a row does not allow."""
    wanted = _wanted(suite, spec)
    try:
        if _takes_weight(model):
            inputs_of(model, 1, weight_of(wanted))
        elif isinstance(spec.guidance, float):
            raise ValueError(
                f"guidance must be a mapping, such as {{kind: cfg, scale: {1 + spec.guidance:g}}}, for a network that takes no "
                f"weight; got {spec.guidance:g}"
            )
        elif isinstance(wanted, Guidance) and wanted.needs_null:
            null_of(model)
    except ValueError as error:
        raise ValueError(f"row {spec.label!r}: {error}") from error


def _sampler_cell(
    suite: Suite, model: BenchModel, spec: SamplerSpec, nfe: int, role: str, weaker: Callable[[str], Network]
) -> Cell:
    wanted, weight = _wanted(suite, spec), None
    if _takes_weight(model):
        wanted, weight = None, weight_of(wanted)
    of = wanted if isinstance(wanted, Guidance) and not isinstance(wanted, Unguided) else None
    try:  # the row says why, and the other cells are measured
        adaptive, plan = get_sampler(spec.sampler).adaptive, None
        if not adaptive:
            plan = make_plan(spec.sampler, model.model.schedule, nfe=nfe, **settings(spec))
        inputs = inputs_of(model, nfe if plan is None else plan.nfe, weight)
        model = model if of is None else guided(model, of, plan, weaker)
        return Cell(spec, nfe, role, model, plan, inputs=inputs, guidance=of)
    except (ValueError, TypeError) as error:
        return Cell(spec, nfe, role, model, None, str(error), too_few=isinstance(error, BudgetError))


def _student_cell(
    suite: Suite, model: BenchModel, spec: StudentSpec, nfe: int, students: Mapping[int, BenchModel]
) -> Cell:
    trained = nfe in students
    if not trained and not spec.untrained:
        known = ", ".join(map(str, students))
        return Cell(spec, nfe, "sampler", model, None, f"trained for {known} calls", trained=False)
    closest = nearest(students, nfe)
    student, plan = students[closest], students[closest].plans[closest]
    takes = _takes_weight(student)
    guidance = spec.guidance if spec.guidance is not None or not takes else weight_of(suite.guidance)
    try:
        if not trained:
            plan = make_plan(plan.sampler, student.model.schedule, nfe=nfe, grid="uniform")
        inputs = inputs_of(student, plan.nfe, guidance)
    except (ValueError, TypeError) as error:
        few = isinstance(error, BudgetError)
        return Cell(spec, nfe, "sampler", student, None, str(error), trained=trained, too_few=few)
    return Cell(spec, nfe, "sampler", student, plan, inputs=inputs, trained=trained)


def settings(spec: SamplerSpec) -> dict[str, Any]:
    """The row's arguments of `make_plan`."""
    return {"grid": spec.grid, "final": spec.final, "afs": spec.afs, **spec.options}


def identity(cell: Cell, device: str) -> Row:
    """Everything that makes the cell's number what it is, as JSON gives it back; a change in any of it is another cell.

    A student is known by its weights and not by its folder or its row, so that it is measured once wherever it stands.
    """
    model = cell.model
    what = _student(cell) if isinstance(cell.spec, StudentSpec) else _sampler(cell.spec, model)
    made_by = {
        **what,
        "model_hash": model.hash,
        "budget": cell.nfe,
        "plan_hash": _plan_hash(cell),
        "num_samples": cell.num_samples,
        "seed": cell.seed,
        "metric": model.judge.metric,
        "hashes": dict(model.judge.hashes),
        "dtype": model.dtype,
        "device": torch.device(device).type,
        "torch": torch.__version__,
        "code": code_fingerprint(),
        **({"inputs": dict(cell.inputs)} if cell.inputs else {}),
        **_guidance(cell),
        **({"further": sorted(metric.name for metric in cell.further)} if cell.further else {}),
        **_plugins(cell),
        **({"solution": cell.solution} if cell.solution else {}),
        **({"batch_size": cell.batch_size} if cell.batch_size else {}),
        **(
            {"integrators": ", ".join(f"{name} {version(name)}" for name in _INTEGRATORS)}
            if cell.plan is None and not cell.problem
            else {}
        ),
    }
    return json.loads(json.dumps(made_by))  # tuples are lists there


def _plugins(cell: Cell) -> Row:
    """The code of what installed packages add; a sampler's that makes a plan is in the hash of that plan."""
    added: dict[str, Any] = {metric.name: metric.compute for metric in cell.further}
    if cell.plan is None and not cell.problem:
        added[cell.spec.sampler] = get_sampler(cell.spec.sampler).integrate  # type: ignore[union-attr]
    found = {name: plugin_fingerprint(function) for name, function in sorted(added.items())}
    text = ", ".join(f"{name} {code}" for name, code in found.items() if code)
    return {"plugins": text} if text else {}


def _guidance(cell: Cell) -> Row:
    return {} if cell.guidance is None else {"guidance": cell.guidance.text}


def _plan_hash(cell: Cell) -> str:
    return hashlib.sha256(cell.plan.to_json().encode()).hexdigest()[:16] if cell.plan else ""


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
