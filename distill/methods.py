"""The registered methods, by the name that a YAML file gives as `method`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.config import CONFIGS, Training
from distill.documents import read_yaml, validated
from distill.guided import Guided
from distill.matching import Matching
from distill.method import Method
from distill.progressive import Progressive
from distill.teacher import Teacher
from samplers.errors import unknown

METHODS: dict[str, type[Method]] = {
    "teacher": Teacher,
    "progressive": Progressive,
    "guided": Guided,
    "matching": Matching,
}


def config_names() -> list[str]:
    """The shipped training runs."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load_config(name_or_path: str | Path, **overrides: Any) -> Training:
    """A shipped training run by name, or one from a YAML file, as the settings class of its method.

    Args:
        name_or_path: one of `config_names()`, or a file; what it leaves out has the default of the settings class.
        **overrides: values that replace those of the file.

    Raises:
        ValueError: an unknown name, a file that is not YAML, or a field that is unknown or out of range; the message names
            the file, the line and the field.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = CONFIGS / f"{name_or_path}.yaml"
    if not path.is_file():
        raise unknown("training run", str(name_or_path), (*config_names(), "a .yaml file"))
    document = read_yaml(path)
    method = document.get("method", "teacher")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"{path}: {unknown('method', method, METHODS)}")
    settings = METHODS[method].settings
    config = validated(settings, {**{k: v for k, v in overrides.items() if k not in document}, **document}, path)
    if not overrides:
        return config
    return validated(settings, {**document, **overrides}, f"{path} with {', '.join(sorted(overrides))} given")


def make_method(config: Training) -> Method:
    """The method that a training run is trained by."""
    return METHODS[config.method](config)
