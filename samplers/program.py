"""The instructions a plan is made of, and their lowering to registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

START = "x_T"


class Evaluate(NamedTuple):
    """`dst = model output at state src and time t`, as epsilon or as x0.

    alpha and sigma are stored beside t, so that an exported plan runs without a schedule.
    """

    dst: str
    src: str
    t: float
    alpha: float
    sigma: float
    kind: str


class Combine(NamedTuple):
    """`dst = sum(coefficient * value)` over states, outputs and noises `z0, z1, ...`.

    `node` is the index of the grid node the new state stands at where this ends a step, None inside a step.
    """

    dst: str
    terms: tuple[tuple[str, float], ...]
    node: int | None = None


Instruction = Evaluate | Combine


class Call(NamedTuple):
    """An Evaluate with registers as integers."""

    dst: int
    src: int
    t: float
    alpha: float
    sigma: float
    kind: str
    dead: tuple[int, ...]


class Sum(NamedTuple):
    """A Combine with registers as integers; the first term is one that dies here, where there is one, so it can accumulate."""

    dst: int
    terms: tuple[tuple[int, float], ...]
    node: int | None
    dead: tuple[int, ...]
    draw: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Program:
    """Instructions lowered to integer registers with the places where each dies."""

    code: tuple[Call | Sum, ...]
    registers: int


def lower(instructions: tuple[Instruction, ...]) -> Program:
    """Assign registers, find the last use of every value, and put a dying state first in each sum."""
    last: dict[str, int] = {}
    for i, step in enumerate(instructions):
        for name in (step.src,) if isinstance(step, Evaluate) else (n for n, _ in step.terms):
            last[name] = i
    number: dict[str, int] = {START: 0}
    code: list[Call | Sum] = []
    for i, step in enumerate(instructions):
        if isinstance(step, Evaluate):
            number[step.dst] = len(number)
            dead: tuple[int, ...] = (number[step.src],) if last[step.src] == i else ()
            code.append(Call(number[step.dst], number[step.src], step.t, step.alpha, step.sigma, step.kind, dead))
            continue
        drawn = [name for name, _ in step.terms if name not in number]
        for name in drawn:
            number[name] = len(number)
        ordered = sorted(step.terms, key=lambda term: last[term[0]] != i or term[0][0] != "x" or term[0] == START)
        dead = tuple(number[name] for name, _ in step.terms if last[name] == i)
        number[step.dst] = len(number)
        terms = tuple((number[name], c) for name, c in ordered)
        code.append(Sum(number[step.dst], terms, step.node, dead, tuple((number[n], int(n[1:])) for n in drawn)))
    return Program(tuple(code), len(number))
