"""Where two samplers part: the first difference in what they compute, by name and with numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from bench.explain_space import Side, Traced
from bench.explain_trace import in_kind, trace
from bench.export import Noise
from samplers.schedule import Flow, Schedule

TOLERANCE = 1e-9
CAUSES = ("node", "time", "final step", "order", "prediction", "noise order", "noise", "coefficients", "calls", "dtype")
_TINY = 1e-7  # a weight, relative to the largest, that is rounding


@dataclass(frozen=True)
class Part:
    """The first point where two samplers part.

    Attributes:
        cause: one of `CAUSES`.
        step: 1 .. steps; 0 at the start.
        text: what it is, with numbers.
    """

    cause: str
    step: int
    text: str


@dataclass(frozen=True)
class Explanation:
    """What became of comparing two samplers.

    Attributes:
        a, b: what each computes, in float64.
        part: where they part; None: nowhere, within the tolerance.
        steps: for each row of the coefficients its step, and the largest difference there.
        beyond: where the first difference is a time that the network is told: the first one of another kind.
        on_same_nodes: where the nodes differ and one can run on the other's: what remains then.
    """

    a: Traced
    b: Traced
    part: Part | None
    steps: tuple[tuple[int, float], ...]
    beyond: Part | None = None
    on_same_nodes: Explanation | None = None

    @property
    def difference(self) -> float:
        """The largest difference of two coefficients."""
        return max((value for _, value in self.steps), default=math.nan)


def explain(
    a: Side,
    b: Side,
    noise: Noise,
    steps: int,
    *,
    grid: str | None = None,
    same_nodes: bool = False,
    tolerance: float = TOLERANCE,
) -> Explanation:
    """Compare what two samplers compute.

    Args:
        a, b: of which kind each may be is said at `Side`.
        noise: the noise schedule.
        steps: of both loops.
        grid: of samplers, by name; None: the recommended ones. A function takes the nodes of the other.
        same_nodes: whether a sampler takes the nodes of the other, which cannot take its.
        tolerance: on coefficients, relative to the largest; on noise levels and times, relative.

    Raises:
        ValueError: as `trace`; or two functions without a grid to run them on.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie between 0 and 1, got {tolerance}")
    kind = "x0" if isinstance(noise.schedule, Flow) or noise.schedule.alpha(noise.schedule.t_max) == 0 else "eps"
    run = _Run(noise, steps, grid, kind, tolerance)
    found = run.compare(a, b, *run.nodes_for(a, b, same_nodes))
    if found.part is None or np.array_equal(found.a.nodes, found.b.nodes):
        return found
    for mine, other in ((a, found.b), (b, found.a)):
        if mine.takes_nodes:
            nodes = (other.nodes, None) if mine is a else (None, other.nodes)
            again = run.compare(a, b, *nodes)
            return replace(found, on_same_nodes=again)
    return found


@dataclass(frozen=True)
class _Run:
    """What two traces have in common."""

    noise: Noise
    steps: int
    grid: str | None
    kind: str
    tolerance: float

    def trace(self, side: Side, nodes: np.ndarray | None, double: bool = True) -> Traced:
        return trace(side, self.noise, self.steps, grid=self.grid, nodes=nodes, kind=self.kind, double=double)

    def nodes_for(self, a: Side, b: Side, same: bool) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Nodes to be given, to a function always and to a sampler for `same`: the other's, or those of the grid."""
        if a.form == b.form == "function":
            if self.grid is None:
                raise ValueError("two functions have no nodes of their own: give a grid, such as karras")
            nodes = self.trace(Side("euler"), None).nodes
            return nodes, nodes
        for mine, other in ((a, b), (b, a)):
            if mine.form == "function" or (same and mine.form == "sampler" and not other.takes_nodes):
                nodes = self.trace(other, None).nodes
                return (nodes, None) if mine is a else (None, nodes)
        return None, None

    def compare(self, a: Side, b: Side, nodes_a: np.ndarray | None, nodes_b: np.ndarray | None) -> Explanation:
        """Both in float64, and where they do not part there, once more as they are shipped."""
        one, two = self.trace(a, nodes_a), self.trace(b, nodes_b)
        part = first_part(one, two, self.noise.schedule, self.tolerance)
        steps, beyond = _differences(one, two), None
        if part is not None and part.cause == "time":
            beyond = first_part(one, two, self.noise.schedule, self.tolerance, times=False)
        if part is None:
            shipped = self.trace(a, nodes_a, double=False), self.trace(b, nodes_b, double=False)
            part = self._of_dtype(*shipped, max(value for _, value in steps))
        return Explanation(one, two, part, steps, beyond)

    def _of_dtype(self, a: Traced, b: Traced, exact: float) -> Part | None:
        apart = first_part(a, b, self.noise.schedule, self.tolerance)
        if apart is None:
            return None
        most = max(value for _, value in _differences(a, b))
        levels, times = (float(_relative(*pair).max()) for pair in ((a.levels, b.levels), (a.times, b.times)))
        text = (
            f"in float64 they are the same to {exact:.1e}; as shipped, with float32 in their tables or arguments, "
            f"coefficients differ by up to {most:.1e}, times of noise levels by up to {levels:.1e} and times told to the network "
            f"by up to {times:.1e} (relative)"
        )
        return Part("dtype", apart.step, text)


def first_part(
    a: Traced, b: Traced, schedule: Schedule, tolerance: float = TOLERANCE, *, times: bool = True
) -> Part | None:
    """The first point where two traces part, in the order of the loop; None: nowhere.

    Args:
        a, b: what to compare.
        schedule: the noise schedule of both.
        tolerance: as in `explain`.
        times: whether the times that the network is told count.
    """
    for row in range(min(a.calls, b.calls)):
        part = _at_level(a, b, row, schedule, tolerance, times) or _at_state(a, b, row, schedule, tolerance)
        if part is not None:
            return part
    if a.calls != b.calls:
        step = (a if a.calls > b.calls else b).step_of(min(a.calls, b.calls))
        return Part("calls", step, f"A makes {a.calls} network calls, B {b.calls}")
    part = _at_end(a, b, schedule, tolerance) or _at_state(a, b, a.calls, schedule, tolerance)
    moved = [k for k, (x, y) in enumerate(zip(a.draws, b.draws, strict=False)) if x != y]
    if part is None and moved:
        k = moved[0]
        step = next(a.step_of(row) for row in range(a.calls + 1) if a.matrix[row, 1 + a.calls + k])
        text = f"noise {k} is draw {a.draws[k]} of A and draw {b.draws[k]} of B: one draws noise that it does not use"
        return Part("noise order", step, text)
    return part


def _at_level(a: Traced, b: Traced, row: int, schedule: Schedule, tolerance: float, times: bool) -> Part | None:
    """Another noise level, or another time that the network is told."""
    if _relative(a.levels[row], b.levels[row]) > tolerance:
        levels = f"{_sigma(schedule, a.levels[row])} in A and {_sigma(schedule, b.levels[row])} in B"
        text = f"call {row + 1} is at sigma {levels} (t {a.levels[row]:.8g} and {b.levels[row]:.8g})"
        return Part("node", a.step_of(row), text)
    if times and _relative(a.times[row], b.times[row]) > tolerance:
        told = f"A tells the network t={a.times[row]:.8g}, B t={b.times[row]:.8g}"
        text = f"{told}, at the noise level of t={a.levels[row]:.8g}"
        return Part("time", a.step_of(row), text)
    return None


def _at_end(a: Traced, b: Traced, schedule: Schedule, tolerance: float) -> Part | None:
    if _relative(a.levels[-1], b.levels[-1], schedule.t_max) > tolerance:
        levels = f"{_sigma(schedule, a.levels[-1])}, B at {_sigma(schedule, b.levels[-1])}"
        return Part("final step", a.step_of(a.calls), f"A ends at sigma {levels}")
    return None


def _at_state(a: Traced, b: Traced, row: int, schedule: Schedule, tolerance: float) -> Part | None:
    """A difference between the coefficients of one state, whose level is the same and before which there was none."""
    for each, name in ((a, "A"), (b, "B")):
        if not np.isfinite(each.matrix[row]).all():
            return Part("coefficients", a.step_of(row), f"{name}'s coefficients are not finite")
    (x, noise_x), (y, noise_y) = _split(a, b, row)
    scale = max(np.abs(x).max(), np.abs(y).max())
    limit = tolerance * scale
    step = a.step_of(row)
    if np.abs(x - y).max() > limit:
        return _of_outputs(a, b, row, schedule, float(np.abs(x - y).max()))
    if np.abs(noise_x - noise_y).max(initial=0.0) <= limit:
        return None
    return _of_noise(noise_x, noise_y, step, limit)


def _of_outputs(a: Traced, b: Traced, row: int, schedule: Schedule, difference: float) -> Part:
    """Why the weights of the start state and of the outputs differ."""
    step, last = a.step_of(row), row == a.calls
    used = [min(_outputs_used(each, row, schedule).values(), key=len) for each in (a, b)]
    where = f"the step that ends at sigma {_sigma(schedule, a.levels[row])}"
    reached = [_alpha_reached(each, row, schedule) for each in (a, b)]
    if abs(reached[0] - reached[1]) > _TINY * max(reached):
        text = f"{where} leads to the level of alpha={reached[0]:.9g} in A and alpha={reached[1]:.9g} in B"
        return Part("node", step, text)
    works = [_works_in(each, schedule) for each in (a, b)]
    if not works[0] & works[1]:
        text = f"A works in {min(works[0])}, B in {min(works[1])}; in {where} a coefficient differs by {difference:.3g}"
        return Part("prediction", step, text)
    if len(used[0]) != len(used[1]):
        text = f"in {where} A uses {_calls(used[0])}, B {_calls(used[1])}; a coefficient differs by {difference:.3g}"
        return Part("final step" if last else "order", step, text)
    (x, _), (y, _) = _split(a, b, row)
    k = int(np.abs(x - y).argmax())
    name = "x_T" if k == 0 else f"output {k}"
    values = f"{x[k]:.9g} in A and {y[k]:.9g} in B"
    text = f"in {where}, with {_calls(used[0])} in both, the coefficient of {name} is {values}"
    return Part("final step" if last else "coefficients", step, text)


def _of_noise(x: np.ndarray, y: np.ndarray, step: int, limit: float) -> Part:
    mine, theirs = (np.flatnonzero(np.abs(v) > limit) for v in (x, y))
    total = [float(np.linalg.norm(v)) for v in (x, y)]
    if abs(total[0] - total[1]) > limit:
        return Part("noise", step, f"the noise in the state has deviation {total[0]:.9g} in A and {total[1]:.9g} in B")
    numbers = [", ".join(map(str, v.tolist())) or "none" for v in (mine, theirs)]
    k = int(np.abs(x - y).argmax())
    text = (
        f"the noise in the state has the same deviation {total[0]:.6g}, of noises {numbers[0]} in A and {numbers[1]} in B: "
        f"noise {k} has weight {x[k]:.6g} in A and {y[k]:.6g} in B"
    )
    return Part("noise order", step, text)


def _split(a: Traced, b: Traced, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of both, the weights on (x_T, outputs) and on the noises, filled up to common numbers."""
    calls, noises = max(a.calls, b.calls), max(a.noises, b.noises)
    found = []
    for traced in (a, b):
        outputs, noise = np.split(traced.matrix[row], [1 + traced.calls])
        found.append((np.pad(outputs, (0, calls - traced.calls)), np.pad(noise, (0, noises - traced.noises))))
    return found


def _alpha_reached(traced: Traced, row: int, schedule: Schedule) -> float:
    """The alpha of the level that a state is at by its coefficients, which may be another than the next call's.

    Where the network sees no noise at all, x / alpha stays what it is: any method carries x_T on by the ratio of the alphas.
    """
    start = float(schedule.alpha(traced.levels[0]))
    return float(traced.matrix[row, 0]) * start if traced.kind == "eps" else math.nan


def _outputs_used(traced: Traced, row: int, schedule: Schedule) -> dict[str, list[int]]:
    """The outputs that a step adds to what it carries on of the state before, in either kind where that exists.

    They are the fewest in the kind that the method works in; in the other they bring earlier states with them.
    """
    alpha, sigma = (np.abs(f(traced.levels[:row])) for f in (schedule.alpha, schedule.sigma))
    used = {}
    for kind, scale in (("eps", alpha), ("x0", sigma)):
        if kind == traced.kind or (scale > 0).all():
            before, now = in_kind(traced, kind, schedule).matrix[row - 1 : row + 1]
            carried = now - (now[0] / before[0]) * before if before[0] else now
            limit = _TINY * max(np.abs(now).max(), np.abs(carried).max())
            used[kind] = np.flatnonzero(np.abs(carried[1 : 1 + traced.calls]) > limit).tolist()
    return used


def _works_in(traced: Traced, schedule: Schedule) -> set[str]:
    """The kinds in which the method takes the fewest outputs: both where all steps are of first order."""
    counts: dict[str, int] = {}
    for row in range(1, traced.calls + 1):
        for kind, used in _outputs_used(traced, row, schedule).items():
            counts[kind] = counts.get(kind, 0) + len(used)
    return {kind for kind, count in counts.items() if count == min(counts.values())}


def _calls(used: list[int]) -> str:
    names = ", ".join(str(k + 1) for k in used)
    return f"{len(used)} output{'s'[: len(used) != 1]} ({names})" if used else "no output"


def _sigma(schedule: Schedule, t: float) -> str:
    value = t if isinstance(schedule, Flow) else abs(float(schedule.sigma_bar(t)))
    return f"{value:.9g}"


def _relative(a: np.ndarray, b: np.ndarray, least: float = 1.0) -> np.ndarray:
    """Differences of times that both have: relative, and absolute where the times are below `least`."""
    n = min(np.size(a), np.size(b))
    x, y = np.atleast_1d(a)[:n], np.atleast_1d(b)[:n]
    return np.abs(x - y) / np.maximum(np.maximum(np.abs(x), np.abs(y)), least)


def _differences(a: Traced, b: Traced) -> tuple[tuple[int, float], ...]:
    """For each state that both have, its step and the largest difference of two coefficients."""
    found = []
    for row in range(min(a.calls, b.calls) + (a.calls == b.calls)):
        (x, noise_x), (y, noise_y) = _split(a, b, row)
        found.append((a.step_of(row), float(np.abs(np.concatenate([x - y, noise_x - noise_y])).max())))
    return tuple(found)
