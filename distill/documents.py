"""YAML documents that are checked against pydantic models; an error names the file, the line and the field."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

_Location = tuple[int | str, ...]


class Strict(BaseModel):
    """A frozen document without unknown fields, NaN or Inf."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _RepeatedKeyError(ValueError):
    """A key that a mapping has twice, with its line."""


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, of which the last of two equal keys would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[Any, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line, name = key.start_mark.line + 1, self.construct_object(key)
                if name in first:
                    raise _RepeatedKeyError(
                        f"line {line}: {key.value} is given twice, in lines {first[name]} and {line}"
                    )
                first[name] = line
        return super().construct_mapping(node, deep)


_Kind = TypeVar("_Kind", bound=Strict)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: not YAML, a key that is given twice, or not a mapping; the message names the file, and the line.
    """
    try:
        with open(path, encoding="utf-8") as stream:  # of which YAML's own errors name the file
            document = yaml.load(stream, _UniqueKeys)
    except _RepeatedKeyError as error:
        raise ValueError(f"{path}, {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} must map names to values, got a {type(document).__name__}")
    return document


def validated(kind: type[_Kind], document: Any, source: str | Path) -> _Kind:
    """The document as a `kind`.

    Args:
        kind: what it must be.
        document: as `read_yaml` gives it, perhaps with other values in it.
        source: the file it came from, whose line the error names; or a description of where it came from.

    Raises:
        ValueError: it is not one; tells where, the first thing that is wrong, and close names for an unknown one.
    """
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = min(error.errors(), key=lambda one: one["type"] == "missing")  # a misspelt field is missing too
    location = _spelled(document, first["loc"])
    where = ".".join(map(str, location)) or kind.__name__
    raise ValueError(f"{place(source, location)}: {where}: {_message(kind, first, location)}")


def place(source: str | Path, location: _Location) -> str:
    """The source, and of a file the line where the innermost part of `location` that it holds begins."""
    line = _line(source, location) if isinstance(source, Path) else None
    return str(source) if line is None else f"{source}, line {line}"


def _spelled(document: Any, location: _Location) -> _Location:
    """A location of pydantic's as the document spells it: without the alternatives of a union, which are none of its fields.

    A name that the document lacks is the last part, of a field that is missing; alternatives are named in parentheses.
    """
    parts = [part for part in location if not (isinstance(part, str) and part.startswith("("))]
    kept: list[int | str] = []
    for number, part in enumerate(parts, 1):
        is_item = isinstance(document, list | tuple) and isinstance(part, int) and part < len(document)
        if is_item or (isinstance(document, dict) and part in document):
            document = document[part]
        elif isinstance(part, int) or number < len(parts):
            continue
        kept.append(part)
    return tuple(kept)


def _message(kind: type[Strict], error: Any, location: _Location) -> str:
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(location[-1]), _fields_at(kind, location[:-1]), n=3, cutoff=0.4)
        return "no such field" + (f"; did you mean {' or '.join(map(repr, close))}?" if close else "")
    given = "" if error["type"] in ("value_error", "missing") else f", got {error['input']!r}"
    text = str(error["msg"]).removeprefix("Value error, ")
    return ("must be a list" if error["type"] == "tuple_type" else text) + given


def _fields_at(kind: type[Strict], location: _Location) -> list[str]:
    """Field names of the model there, or of each that may be there."""
    kinds = [kind]
    for name in (part for part in location if isinstance(part, str)):
        kinds = [inner for one in kinds if name in one.model_fields for inner in _models_in(one.model_fields[name])]
    return [name for one in kinds for name in one.model_fields]


def _models_in(annotation: Any) -> list[type[Strict]]:
    """The models that a field's annotation, or any part of it, names."""
    if isinstance(annotation, FieldInfo):
        return _models_in(annotation.annotation)
    parts = get_args(annotation)
    if not parts and isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    return [kind for part in parts for kind in _models_in(part)]


def _line(source: Path, location: _Location) -> int | None:
    """The line in a YAML file at which the innermost part of `location` that the file holds begins."""
    node = yaml.compose(source.read_text()) if source.is_file() else None
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = [(node.value[part], node.value[part])]
        else:
            break
        if not found:
            break
        line, node = found[0][0].start_mark.line + 1, found[0][1]
    return line
