"""A suite: which samplers are measured on which model at which budgets, read from YAML and checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from samplers.errors import unknown
from samplers.grid import FINALS, points_of
from samplers.registry import SAMPLERS, get_sampler

SUITES = Path(__file__).parent / "suites"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SamplerSpec(_Strict):
    """One row of the table: a registered sampler with its options.

    Attributes:
        sampler: registered name.
        label: how the table calls it; by default the sampler's name.
        grid, final, afs: as in `make_plan`; None is the sampler's recommended grid and the grid's own end.
        options: the sampler's own.
    """

    sampler: str
    label: str = ""
    grid: str | None = None
    final: str | None = None
    afs: bool = False
    options: dict[str, Any] = Field(default_factory=dict)

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


class Suite(_Strict):
    """What a benchmark run measures.

    Attributes:
        name: of the suite.
        model: a name of the zoo, or a checkpoint folder.
        samplers: the rows.
        nfe: the columns, budgets of network calls.
        num_samples: per cell.
        batch_size: per network call; does not change the samples.
        seed: of all noise; every cell starts from the same.
        teacher: the many-step run.
    """

    name: str
    model: str
    samplers: tuple[SamplerSpec, ...] = Field(min_length=1)
    nfe: tuple[int, ...] = Field(min_length=1)
    num_samples: int = Field(default=500, ge=2)
    batch_size: int = Field(default=250, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**64)
    teacher: TeacherSpec

    @field_validator("nfe")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1:
            raise ValueError(f"must be at least 1, got {min(value)}")
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _distinct(self) -> Suite:
        labels = [spec.label for spec in self.samplers]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"label {twice[0]!r} stands for two rows; give one of them another label")
        return self

    def changed(self, samplers: Sequence[str] = (), **values: Any) -> Suite:
        """This suite with other values (None: unchanged), and with the named rows only.

        Args:
            samplers: labels of this suite, or registered names; empty: all rows.
            values: fields to replace.

        Raises:
            ValueError: an unknown sampler, or a value out of range.
        """
        mine = {spec.label: spec for spec in self.samplers}
        for name in samplers:
            if name not in mine and name not in SAMPLERS:
                raise unknown("sampler", name, {*SAMPLERS, *mine})
        rows = tuple(mine.get(name) or SamplerSpec(sampler=name) for name in dict.fromkeys(samplers))
        update = {key: value for key, value in values.items() if value is not None}
        document = {**self.model_dump(), **update}
        if rows:
            document["samplers"] = [row.model_dump() for row in rows]
        return _validated(document, f"suite {self.name!r}")


def suite_names() -> list[str]:
    """The shipped suites."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load_suite(name_or_path: str) -> Suite:
    """A shipped suite by name, or one from a YAML file.

    Raises:
        ValueError: an unknown suite, or a file that is not YAML or does not describe a suite; names file and field.
    """
    path = Path(name_or_path) if name_or_path.endswith((".yaml", ".yml")) else SUITES / f"{name_or_path}.yaml"
    if not path.exists():
        raise unknown("suite", name_or_path, (*suite_names(), "a .yaml file"))
    try:
        document = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    return _validated(document, str(path))


def _validated(document: Any, source: str) -> Suite:
    try:
        return Suite.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "suite"
        raise ValueError(f"{source}: {where}: {first['msg'].removeprefix('Value error, ')}") from error
