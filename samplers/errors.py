"""Errors that callers may want to tell apart, and the wording they share."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Iterable
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np

# Published amounts lie below 100. The noise of a plan may be this squared, as s_noise times what eta makes of it, times a sigma
# of some hundreds: float32 takes it, with room for the network to work in.
LARGEST_AMOUNT = 1e3


class SamplingError(RuntimeError):
    """Sampling failed while it ran; the message says where or why.

    The network gave NaN or Inf, or an error-controlled sampler cannot keep to its tolerance: its limit of network calls is
    spent, or its step size underflows.
    """


class ToleranceError(SamplingError):
    """An error-controlled sampler needs more network calls than it may make to keep to its tolerance."""


class BudgetError(ValueError):
    """The network calls that a sampler may make are fewer than its shortest plan has."""


def unknown(what: str, given: object, accepted: Iterable[str]) -> ValueError:
    """A `ValueError` for a name that does not exist, offering the closest names that do.

    Args:
        what: the argument's name.
        given: what the caller passed.
        accepted: the names that exist.
    """
    names = sorted(accepted)
    return ValueError(f"unknown {what} {given!r}; {did_you_mean(given, names)}accepted: {', '.join(names)}")


def did_you_mean(given: object, accepted: Iterable[str]) -> str:
    """The question whether one of the closest of the names that exist was meant; empty where none is close."""
    spelled = {_spelling(name): name for name in sorted(accepted, reverse=True)}
    close = [spelled[name] for name in difflib.get_close_matches(_spelling(given), spelled, n=3, cutoff=0.4)]
    return f"did you mean {' or '.join(map(repr, close))}? " if close else ""


def _spelling(name: object) -> str:
    """A name without what people write in different ways: "DPM++ 2M" is "dpmpp-2m"."""
    return str(name).casefold().replace("++", "pp").replace("_", "-").replace(" ", "-")


def check_numbers(**values: object) -> None:
    """Raise TypeError for a value that is not a number; True and False are none."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")


def float_table(name: str, values: Any) -> np.ndarray:
    """At least two numbers in one dimension, a sequence, an array or a tensor, as a float64 vector.

    Raises:
        TypeError: not numbers.
        ValueError: of another shape.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values  # NumPy has no bfloat16
    try:
        table = np.asarray(values)
    except ValueError:  # lists of several lengths
        table = np.asarray(None)
    if table.dtype.kind not in "fiu" and not (table.size and all(isinstance(v, Real | Decimal) for v in table.flat)):
        raise TypeError(f"{name} must be numbers, shape (T,), got {reprlib.repr(values)}")
    if table.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {table.shape}")
    if len(table) < 2:
        raise ValueError(f"{name} needs at least 2 entries, got {len(table)}")
    return table.astype(np.float64)


def check_amount(name: str, value: float, largest: float = LARGEST_AMOUNT) -> None:
    """Raise ValueError for an amount (of noise) that is negative, NaN, infinite or larger than single precision works with.

    Also TypeError for one that is not a number.
    """
    check_numbers(**{name: value})
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
    if value > largest:
        raise ValueError(f"{name} must be at most {largest:g}, got {value}")
