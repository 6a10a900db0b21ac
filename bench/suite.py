"""A suite: which samplers are measured on which model at which budgets, read from YAML and checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from bench.guidance import GuidanceSpec
from bench.judge import JudgeSpec
from distill.documents import Strict, read_yaml, validated
from samplers.errors import unknown
from samplers.grid import FINALS, points_of
from samplers.registry import get_sampler, registered

SUITES = Path(__file__).parent / "suites"


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
        get_sampler(self.sampler).check_options(self.options)
        return self


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

    @model_validator(mode="before")
    @classmethod
    def _labelled(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        folder = Path(str(values.get("student")))
        return {"label": (folder.parent if folder.name == "students" else folder).name, **values}


def _kind(row: Any) -> str:
    return "student" if isinstance(row, StudentSpec) or (isinstance(row, dict) and "student" in row) else "sampler"


Spec = SamplerSpec | StudentSpec
_AnySpec = Annotated[
    Annotated[SamplerSpec, Tag("sampler")] | Annotated[StudentSpec, Tag("student")], Discriminator(_kind)
]


class Suite(Strict):
    """What a benchmark run measures.

    Attributes:
        name: of the suite.
        model: a name of the zoo, or a checkpoint folder.
        samplers: the rows, samplers on the model and students beside it.
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
    judge: str | JudgeSpec | None = None
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

    @property
    def reading(self) -> dict[str, Any]:
        """How a pipeline becomes a model: arguments of `bench.zoo.load_network`."""
        how = {name: getattr(self, name) for name in ("prompts", "size", "tiles")}
        return {**how, "guidance": self.scale}

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

    @model_validator(mode="after")
    def _distinct(self) -> Suite:
        labels = [spec.label for spec in self.samplers]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"label {twice[0]!r} stands for two rows; give one of them another label")
        return self

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
        rows_now = [spec.model_dump() for spec in (*students, *rows)]
        return validated(Suite, {**self.model_dump(), "samplers": rows_now, **update}, f"suite {self.name!r}")


def suite_names() -> list[str]:
    """The shipped suites."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load_suite(name_or_path: str) -> Suite:
    """A shipped suite by name, or one from a YAML file.

    Raises:
        ValueError: an unknown suite, or a file that is not YAML or does not describe a suite; names file, line and field.
    """
    path = Path(name_or_path) if name_or_path.endswith((".yaml", ".yml")) else SUITES / f"{name_or_path}.yaml"
    if not path.exists():
        raise unknown("suite", name_or_path, (*suite_names(), "a .yaml file"))
    return validated(Suite, read_yaml(path), path)
