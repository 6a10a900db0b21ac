"""What comes with the package: models, judges and students, by the names that suites and the command line give them."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


def found(name: str | Path) -> Path:
    """The folder at a path; where nothing is there, the shipped one of that name, such as "mnist-progressive/4-steps".

    The path itself comes back where neither is there, for the caller to say what it wanted.
    """
    shipped = ASSETS / name
    return shipped if not Path(name).exists() and shipped.is_dir() else Path(name)


def shipped_models() -> list[str]:
    """Names of the shipped students, each one model."""
    return sorted(f"{path.parents[1].name}/{path.parent.name}" for path in ASSETS.glob("*/*/config.json"))


def shipped_students() -> list[str]:
    """Names of the shipped folders of students."""
    return sorted({name.partition("/")[0] for name in shipped_models()})
