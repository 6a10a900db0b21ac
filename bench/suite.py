"""A suite: which samplers are measured on which model at which budgets, read from YAML and checked."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Field, PrivateAttr, Tag, field_validator, model_validator

from bench.guidance import GuidanceSpec
from bench.judge import JudgeSpec
from distill.documents import Strict, place, read_yaml, validated
from samplers import make_plan, schedules
from samplers.errors import unknown
from samplers.grid import FINALS, points_of
from samplers.registry import get_sampler, registered

SUITES = Path(__file__).parent / "suites"
_AMPLE = 20  # steps of which every sampler can make a plan
_SWEPT = ("sampler", "model", "grid", "final", "afs")  # fields of a row that may be lists


class SamplerSpec(Strict):
    """One row of the table: a registered sampler with its options.

    Attributes:
        sampler: registered name.
        label: how the table calls it; by default the sampler's name.
        model: another model than the suite's, with samples of the same shape, judged as the suite's.
        tuned: what the sampler was tuned on, where that is what judges it here; the table marks such a row.
        grid, final, afs: as in `make_plan`; None is the sampler's recommended grid and the grid's own end.
        options: the sampler's own.
        guidance: of this row; None is the suite's.
    """

    sampler: str
    label: str = ""
    model: str | None = None
    tuned: str = ""
    grid: str | None = None
    final: str | None = None
    afs: bool = False
    options: dict[str, Any] = Field(default_factory=dict)
    guidance: GuidanceSpec | None = None

    @field_validator("sampler")
    @classmethod
    def _registered(cls, value: str) -> str:
        return get_sampler(value).name

    @field_validator("label")
    @classmethod
    def _inside(cls, value: str) -> str:
        return _inside(value)

    @field_validator("grid")
    @classmethod
    def _known_grid(cls, value: str | None) -> str | None:
        if value is not None:
            points_of(value)
        return value

    @field_validator("final")
    @classmethod
    def _known_final(cls, value: str | None) -> str | None:
        if value is not None and value not in FINALS:
            raise unknown("final", value, FINALS)
        return value

    @model_validator(mode="before")
    @classmethod
    def _labelled(cls, values: Any) -> Any:
        values = {"sampler": values} if isinstance(values, str) else values
        return {"label": values.get("sampler", ""), **values} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _known_options(self) -> SamplerSpec:
        try:
            get_sampler(self.sampler).check_options(self.options)
        except TypeError as error:  # as a ValueError it is told with file, line and field
            raise ValueError(str(error)) from error
        if self.options and not get_sampler(self.sampler).adaptive:
            _check_values(self.sampler, self.options)
        return self


def _check_values(sampler: str, options: dict[str, Any]) -> None:
    """Raise ValueError for options that allow no plan, however many steps, on any of the usual schedules."""
    problems = []
    for schedule in (schedules.vp_linear(), schedules.edm()):
        try:
            make_plan(sampler, schedule, steps=_AMPLE, **options)
        except ValueError as error:
            problems.append(error)
        else:
            return
    raise problems[0]


class TeacherSpec(SamplerSpec):
    """The many-step run whose distance is the model's own."""

    nfe: int = Field(ge=1)


class StudentSpec(Strict):
    """One row of the table: a student, sampled as it was trained to be.

    Attributes:
        student: its folder, or a folder of such folders, of which each budget takes the one that was trained for it.
        label: how the table calls it; by default the folder's name, or of `runs/x/students` the run's, x.
        guidance: weight for a student that takes one; None is the suite's.
        untrained: whether budgets that it was not trained for are measured too, with the sampler of its plan.
    """

    student: str = Field(min_length=1)
    label: str = Field(min_length=1)
    guidance: float | None = None
    untrained: bool = False

    @field_validator("label")
    @classmethod
    def _inside(cls, value: str) -> str:
        return _inside(value)

    @model_validator(mode="before")
    @classmethod
    def _labelled(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        folder = Path(str(values.get("student")))
        return {"label": (folder.parent if folder.name == "students" else folder).name, **values}


class SweptSpec(Strict):
    """Several rows written as one, with lists in place of some of a sampler's values: a row for each combination.

    Attributes:
        rows: with the values of a combination in their labels.
    """

    rows: tuple[SamplerSpec, ...]

    @model_validator(mode="before")
    @classmethod
    def _every(cls, values: dict[str, Any]) -> dict[str, Any]:
        swept = {name: values[name] for name in _SWEPT if isinstance(values.get(name), list | tuple)}
        empty = next((name for name, several in swept.items() if not several), None)
        if empty is not None:
            raise ValueError(f"{empty} must be a value or a list of some, got []")
        first = values.get("label") or ("" if "sampler" in swept else values.get("sampler", ""))
        rows = []
        for several in itertools.product(*swept.values()):
            chosen = dict(zip(swept, several, strict=True))
            label = " ".join(filter(None, (str(first), *(_in_label(name, chosen[name]) for name in chosen))))
            rows.append({**values, **chosen, "label": label})
        return {"rows": rows}


def _in_label(name: str, value: Any) -> str:
    """A value of a list in the label of its row."""
    if name == "model":
        return _slug(str(value))
    return f"{name} {str(value).lower()}" if value is None or isinstance(value, bool) else str(value)


def _inside(label: str) -> str:
    """A label, which is part of the names of pictures."""
    if ".." in re.split(r"[/\\\\]", label) or label.startswith(("/", "\\")):
        raise ValueError(
            f"a label is part of file names in the results folder, and must not lead out of it, got {label!r}"
        )
    return label


def _slug(model: str) -> str:
    """A model's name as part of a file's."""
    return re.sub(r"[^\w.+-]+", "-", model).strip("-.")


def _kind(row: Any) -> str:
    if isinstance(row, StudentSpec) or (isinstance(row, dict) and "student" in row):
        return "(student)"
    swept = isinstance(row, dict) and any(isinstance(row.get(name), list | tuple) for name in _SWEPT)
    return "(several)" if swept else "(sampler)"


def _judge_kind(judge: Any) -> str:
    return "(folder)" if isinstance(judge, str) else "(extractor)"


Spec = SamplerSpec | StudentSpec
_Spelled = Annotated[
    Annotated[SamplerSpec, Tag("(sampler)")]
    | Annotated[StudentSpec, Tag("(student)")]
    | Annotated[SweptSpec, Tag("(several)")],
    Discriminator(_kind),
]
_JudgeSpec = Annotated[
    Annotated[str, Tag("(folder)")] | Annotated[JudgeSpec, Tag("(extractor)")], Discriminator(_judge_kind)
]
if TYPE_CHECKING:
    _AnySpec = Spec  # a `SweptSpec` is spelled out when a suite is made
else:
    _AnySpec = _Spelled


class Suite(Strict):
    """What a benchmark run measures.

    Attributes:
        name: of the suite.
        model: a name of the zoo, or a checkpoint folder; or a list of such, of which this is then the first.
        models: the list, see `of_each_model`; () for one model.
        samplers: the rows, samplers on the model and students beside it; one may be written for several, see `SweptSpec`.
        nfe: the columns, budgets of network calls.
        num_samples: per cell.
        batch_size: per network call; does not change the samples.
        seeds: of all noise, a cell for each; every cell of a seed starts from the same.
        metrics: beside the Frechet distance, by the names of `bench.judging.METRICS`.
        guidance: of every row, see `bench.guidance`; a number is the weight for the networks that take one, as guided students
            do, and nothing to others. None is none, and of those networks the weight 0, or the nearest.
        teacher: the many-step run.
        judge: for a model of images, a folder of a feature extractor and statistics (see `judge.folder_judge`), or an
            extractor and real images; None is the shipped one for digits.
        note: what every table and plot must say.
        prompts, scale, size, tiles: of a pipeline of diffusers, as `bench.pipelines.Reading` has them, `scale` being its
            `guidance`.
    """

    name: str
    model: str
    models: tuple[str, ...] = ()
    judge: _JudgeSpec | None = None
    note: str = ""
    samplers: tuple[_AnySpec, ...] = Field(min_length=1)
    nfe: tuple[int, ...] = Field(min_length=1)
    num_samples: int = Field(default=500, ge=2)
    batch_size: int = Field(default=250, ge=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    metrics: tuple[str, ...] = ()
    guidance: GuidanceSpec | None = None
    prompts: str | tuple[str, ...] = ()
    scale: float | None = None
    size: int | None = Field(default=None, ge=1)
    tiles: bool = False
    teacher: TeacherSpec
    _source: Path | None = PrivateAttr(default=None)
    _replaced: frozenset[str] = PrivateAttr(default=frozenset())

    @contextmanager
    def naming(self, field: str) -> Iterator[None]:
        """What cannot be used inside names the file and the line that asked for it, where a file did."""
        try:
            yield
        except (ValueError, FileNotFoundError) as error:
            if self._source is None or field in self._replaced:
                raise
            raise ValueError(f"{place(self._source, (field,))}: {field}: {error}") from error

    @property
    def reading(self) -> dict[str, Any]:
        """How a pipeline becomes a model: arguments of `bench.zoo.load_network`."""
        how = {name: getattr(self, name) for name in ("prompts", "size", "tiles")}
        return {**how, "guidance": self.scale}

    @model_validator(mode="before")
    @classmethod
    def _first_model(cls, values: Any) -> Any:
        several = values.get("model") if isinstance(values, dict) else None
        if not isinstance(several, list | tuple):
            return values
        if not several or len({_slug(str(name)) for name in several}) < len(several):
            raise ValueError(f"model must be a name or a list of different ones, got {list(several)}")
        return {**values, "model": several[0], "models": several}

    @field_validator("samplers")
    @classmethod
    def _spelled_out(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        rows = tuple(row for spec in value for row in (spec.rows if isinstance(spec, SweptSpec) else (spec,)))
        labels = [row.label for row in rows]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            numbers = " and ".join(str(i) for i, label in enumerate(labels, 1) if label == twice)
            raise ValueError(f"label {twice!r} stands for two rows, {numbers}; give one of them another label")
        return rows

    @field_validator("nfe")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1:
            raise ValueError(f"must be at least 1, got {min(value)}")
        return tuple(sorted(set(value)))

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value) or not all(0 <= seed < 2**64 for seed in value):
            raise ValueError(f"must be different and in [0, 2^64), got {list(value)}")
        return value

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        from bench.judging import get_metric

        return tuple(dict.fromkeys(get_metric(name).name for name in value))

    def of_each_model(self) -> dict[str, Suite]:
        """This suite with each of its models, by what their results folders are called within its own; one model has "".

        Each has a table of its own, with its own judge and many-step run: distances on different models do not compare.
        """
        if not self.models:
            return {"": self}
        return {_slug(name): self._of(name) for name in self.models}

    def _of(self, model: str) -> Suite:
        one = self.changed(model=model)
        one._replaced = self._replaced
        return one

    def changed(self, samplers: Sequence[str] = (), students: Sequence[StudentSpec] = (), **values: Any) -> Suite:
        """This suite with other values (None: unchanged), with the named rows only, and with students before them.

        Args:
            samplers: labels of this suite or of `students`, or registered names; empty: all rows.
            students: rows to add; they stay whatever `samplers` names.
            values: fields to replace.

        Raises:
            ValueError: an unknown sampler, a label that stands for two rows, or a value out of range.
        """
        mine: dict[str, Spec] = {spec.label: spec for spec in self.samplers}
        added = [spec.label for spec in students]
        for label in added:
            if label in mine or label in registered():
                raise ValueError(
                    f"label {label!r} of a student is also that of a sampler; give the student another one"
                )
        for name in samplers:
            if name not in mine and name not in added and name not in registered():
                raise unknown("sampler", name, {*registered(), *mine, *added})
        names = [name for name in dict.fromkeys(samplers) if name not in added]
        rows = [mine.get(name) or SamplerSpec(sampler=name) for name in names] if samplers else self.samplers
        update = {key: value for key, value in values.items() if value is not None}
        if "model" in update:
            update = {"models": (), **update}
        rows_now = [spec.model_dump() for spec in (*students, *rows)]
        changed = validated(Suite, {**self.model_dump(), "samplers": rows_now, **update}, f"suite {self.name!r}")
        changed._source = self._source
        changed._replaced = self._replaced | update.keys() | ({"samplers"} if students or samplers else set())
        return changed


def suite_names() -> list[str]:
    """The shipped suites."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load_suite(name_or_path: str) -> Suite:
    """A shipped suite by name, or one from a YAML file.

    Raises:
        ValueError: an unknown suite, or a file that is not YAML or does not describe a suite; names file, line and field.
    """
    path = Path(name_or_path) if name_or_path.endswith((".yaml", ".yml")) else SUITES / f"{name_or_path}.yaml"
    if name_or_path.endswith((".yaml", ".yml")) and not path.is_file():
        raise ValueError(f"there is no suite file {path}")
    if not path.exists():
        raise unknown("suite", name_or_path, (*suite_names(), "a .yaml file"))
    suite = validated(Suite, read_yaml(path), path)
    suite._source = path
    return suite
