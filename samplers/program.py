"""The instructions a plan is made of, and their lowering to buffers."""

from __future__ import annotations

from collections.abc import Sequence
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
    """An Evaluate on places.

    `number` counts the calls, `ends` are borrowed places that die here, and `kept` tells whether the value is the network's own
    output and is used after the next call.
    """

    dst: int
    src: int
    number: int
    ends: tuple[int, ...]
    kept: bool


class Sum(NamedTuple):
    """A Combine on places.

    `order` gives the position of each term in the Combine, `draws` the noises (place, number) that are first used here. Where a
    buffer of a state or an output dies here it is the first term and the result takes its place.
    """

    dst: int
    terms: tuple[tuple[int, float], ...]
    order: tuple[int, ...]
    node: int | None
    draws: tuple[tuple[int, int], ...]
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """A plan with a place for each value: buffers of the executor's own from 0 on, borrowed tensors from -1 down.

    Borrowed are x_T (place -1), a caller's noises, and the network's outputs where they need no conversion: nobody writes to
    them, and they are let go after their last use. All buffers are made before the loop, and stay.

    Attributes:
        code: one entry for each instruction.
        buffers: how many buffers are written to.
        borrowed: how many places borrowed tensors take.
        registers: the most tensors of the state's size, besides x_T, that exist at one time, with the copy of the first output
            that is kept, which the executor holds until the next call.
    """

    code: tuple[Call | Sum, ...]
    buffers: int
    borrowed: int
    registers: int


def lower(instructions: Sequence[Instruction], raw: Sequence[bool], filled: bool = False) -> Program:
    """Assign places by liveness.

    Args:
        instructions: of a valid plan.
        raw: for each Evaluate, whether the network's output is the value itself; otherwise a buffer takes the conversion.
        filled: whether noises are written into buffers, instead of being somebody's tensors.
    """
    last = {name: i for i, step in enumerate(instructions) for name in uses(step)}
    places = _Places()
    code: list[Call | Sum] = []
    called = [*(i for i, step in enumerate(instructions) if isinstance(step, Evaluate)), len(instructions)]
    most = calls = 0
    copied = range(0)  # the instructions during which the copy of a first output exists
    for i, step in enumerate(instructions):
        dying = [name for name in uses(step) if last[name] == i]
        if isinstance(step, Evaluate):
            src = places.of[step.src]
            kept = raw[calls] and last.get(step.dst, i) > called[calls + 1]
            if kept and not copied:
                copied = range(i, called[calls + 1] + 1)
            most = max(most, places.lent + 1 + (i in copied))  # the output exists, converted or not
            if raw[calls]:
                places.borrow(step.dst)
                ends = places.release(dying)
            else:  # in place on a state that nobody needs any more
                ends = places.release(dying)
                places.own(step.dst)
            code.append(Call(places.of[step.dst], src, calls, ends, kept))
            calls += 1
        else:
            drawn = [name for name in uses(step) if name not in places.of]
            for name in drawn:
                places.own(name) if filled else places.borrow(name)
            into = next((name for name in dying if places.of[name] >= 0 and name[0] != "z"), None)
            order = sorted(range(len(step.terms)), key=lambda j, into=into: step.terms[j][0] != into)  # type: ignore[misc]
            terms = tuple((places.of[step.terms[j][0]], step.terms[j][1]) for j in order)
            draws = tuple((places.of[name], int(name[1:])) for name in drawn)
            if into is not None:
                places.rename(into, step.dst)
                dying.remove(into)
            else:
                places.own(step.dst)
            most = max(most, places.lent + (i in copied))
            code.append(Sum(places.of[step.dst], terms, tuple(order), step.node, draws, places.release(dying)))
    return Program(tuple(code), places.buffers, places.borrowed, places.buffers + most)


def uses(step: Instruction) -> tuple[str, ...]:
    """The names of the values an instruction reads."""
    return (step.src,) if isinstance(step, Evaluate) else tuple(name for name, _ in step.terms)


class _Places:
    """Which value is where, and which places are free."""

    def __init__(self) -> None:
        self.of = {START: -1}
        self.buffers, self.borrowed = 0, 1
        self._free_buffers: list[int] = []
        self._free_borrowed: list[int] = []

    @property
    def lent(self) -> int:
        """Borrowed tensors in use, besides x_T."""
        return self.borrowed - 1 - len(self._free_borrowed)

    def own(self, name: str) -> None:
        if not self._free_buffers:
            self._free_buffers.append(self.buffers)
            self.buffers += 1
        self.of[name] = self._free_buffers.pop()

    def borrow(self, name: str) -> None:
        if not self._free_borrowed:
            self.borrowed += 1
            self._free_borrowed.append(-self.borrowed)
        self.of[name] = self._free_borrowed.pop()

    def rename(self, old: str, new: str) -> None:
        self.of[new] = self.of[old]

    def release(self, names: Sequence[str]) -> tuple[int, ...]:
        """Free the places of dead values; the borrowed ones among them. x_T is the caller's and keeps its place."""
        ended = [self.of[name] for name in names if name != START]
        self._free_buffers += [place for place in ended if place >= 0]
        self._free_borrowed += [place for place in ended if place < 0]
        return tuple(place for place in ended if place < 0)
