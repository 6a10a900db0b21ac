"""What the commands share: exit codes, errors in one line, a checked device, and how a stopped run says that it can go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import click

FAILED = 1  # some of what was asked could not be had
TIME_OVER = 75  # of `--minutes`: the same command goes on; EX_TEMPFAIL of sysexits.h
_INTERRUPTED = 130
_WIDE = 200  # columns


def plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Errors that are the caller's end in one line and exit code 2; anything else is a bug and keeps its traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (
            ValueError,
            TypeError,
            FileNotFoundError,
            FileExistsError,
            NotADirectoryError,
            PermissionError,
        ) as error:
            raise click.UsageError(str(error)) from error

    return run


@contextmanager
def resumable(message: str) -> Iterator[None]:
    """On Ctrl-C say how to go on, and exit with the shell's code for it."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\nstopped; {message}", err=True)
        raise SystemExit(_INTERRUPTED) from None


def checked_device(name: str) -> str:
    """The device, if torch can use it here.

    Raises:
        ValueError: it cannot.
    """
    import torch

    try:
        torch.empty(0, device=torch.device(name))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def wide_console() -> Any:
    """Of the terminal; into a file or a pipe as wide as the tables want to be."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)


def names_in(option: str, text: str) -> list[str]:
    """Names separated by commas.

    Raises:
        ValueError: there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"{option} takes names separated by commas, got {text!r}")
    return names


def integers_in(option: str, text: str) -> list[int]:
    """Integers separated by commas.

    Raises:
        ValueError: something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} takes integers separated by commas, got {text!r}") from error
