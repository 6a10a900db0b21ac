"""A plan for a caller that owns the loop: who calls the network itself, and hands over each output as it comes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from samplers.plan import Plan
from samplers.program import START, Combine, Evaluate, uses

Draw = Callable[[int, Tensor], Tensor]


class Stepwise:
    """Walks through a plan, one network call at a time.

    The caller evaluates the plan's calls in order and gives the value of each to `feed`, which runs the plan up to the next
    call. `run_plan` does the same with a loop of its own and in place; here every state is a new tensor, because the caller
    keeps the ones it is given.

    Args:
        plan: what to compute.

    Attributes:
        done: calls fed so far.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.done = plan, 0
        self._values: dict[str, Tensor] = {}
        calls = [i for i, step in enumerate(plan.instructions) if isinstance(step, Evaluate)]
        self._begins = [*calls, len(plan.instructions)]
        self._last = {name: i for i, step in enumerate(plan.instructions) for name in uses(step)}

    def start(self, x_T: Tensor, draw: Draw) -> Tensor:
        """The state of the first call: x_T, unless the plan changes it before."""
        self._values = {START: x_T}
        return self._run(0, self._begins[0], x_T, draw)

    @property
    def starts_at_once(self) -> bool:
        """Whether the first call's state is x_T itself."""
        return self._begins[0] == 0

    @property
    def draws_first(self) -> bool:
        """Whether noise is added before the first call."""
        before = self.plan.instructions[: self._begins[0]]
        return any(name[0] == "z" for step in before for name in uses(step))

    @property
    def start_is_free(self) -> bool:
        """Whether nothing but the first call's state is used after it, so that `feed(x=...)` may do without `start`."""
        before = self.plan.instructions[: self._begins[0]]
        names = {START, *(name for step in before for name in (*uses(step), step.dst))} - {self.plan.calls[0].src}
        return all(self._last.get(name, -1) < self._begins[0] for name in names)

    def feed(self, value: Tensor, draw: Draw, x: Tensor | None = None) -> Tensor:
        """The state of the next call, or the result after the last one.

        Args:
            value: epsilon or x0, as `plan.calls[done].kind` says, at the state of call `done`.
            draw: `(k, like) -> Tensor`, the plan's k-th noise.
            x: takes the place of that state, where the caller changed it.

        Raises:
            RuntimeError: the plan has no call left.
        """
        if self.done == self.plan.nfe:
            raise RuntimeError(f"all {self.plan.nfe} calls of the plan are done; begin again with another Stepwise")
        begin, end = self._begins[self.done : self.done + 2]
        call = self.plan.instructions[begin]
        if x is not None:
            self._values[call.src] = x  # type: ignore[union-attr]
        self._values[call.dst] = value
        self._forget(begin)
        self.done += 1
        return self._run(begin + 1, end, value, draw)

    def _run(self, begin: int, end: int, like: Tensor, draw: Draw) -> Tensor:
        """The sums between two calls; returns the state of the next call, or the last sum."""
        for i in range(begin, end):
            step = self.plan.instructions[i]
            if isinstance(step, Combine):
                for name, _ in step.terms:
                    if name not in self._values:  # a noise, as the plan was checked
                        self._values[name] = draw(int(name[1:]), like)
                self._values[step.dst] = _sum([(self._values[name], by) for name, by in step.terms])
                self._forget(i)
        instructions = self.plan.instructions
        following = instructions[end] if end < len(instructions) else None
        return self._values[following.src if isinstance(following, Evaluate) else instructions[-1].dst]

    def _forget(self, i: int) -> None:
        """Let go of what instruction i was the last to use."""
        for name in uses(self.plan.instructions[i]):
            if self._last[name] == i:
                del self._values[name]


def _sum(terms: list[tuple[Tensor, float]]) -> Tensor:
    (value, by), *rest = terms
    total = value * by
    for value, by in rest:
        total.add_(value, alpha=by)
    return total
