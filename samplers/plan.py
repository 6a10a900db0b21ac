"""A fixed-step sampler as data: a straight-line program of network evaluations and linear combinations."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from samplers.program import START, Combine, Evaluate, Instruction, Program, lower

FORMAT, VERSION = "fewstep-plan", 1
_HEAD = ("format", "version", "sampler", "prediction", "sigma_T", "times", "instructions")
# nodes for programs that take their own: a file may have them, and no plan is made of them
_LISTS = ("sigmas", "timesteps")
KINDS = ("eps", "x0")
_LARGEST = sys.float_info.max


class PlanError(ValueError):
    """A plan that cannot be run; the message gives the path of the bad field."""


@dataclass(frozen=True)
class Plan:
    """A sampler's whole computation, each value named once (single assignment).

    Attributes:
        instructions: in order; the last Combine's `dst` is the result.
        times: the grid's nodes t_0 > ... > t_N, in the schedule's time.
        prediction: "eps" or "x0", what the solver works in.
        sigma_T: sigma at t_0, the standard deviation of the start noise.
        sampler: the name it was made under; not part of equality, which compares what is computed.

    Raises:
        PlanError: an unknown prediction or kind, a sigma_T that is negative or not finite, times that do not decrease, nodes
            that do not rise, a name used before it exists or defined twice, a noise or an output that is evaluated, an alpha or
            sigma of a call below 0 or both 0, a sum that uses a name twice, noises that are not z0, z1, ... in order of first
            use, a coefficient that is not finite, no result.
    """

    instructions: tuple[Instruction, ...]
    times: tuple[float, ...]
    prediction: str
    sigma_T: float
    sampler: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.prediction not in KINDS:
            raise PlanError(f"prediction: must be one of {KINDS}, got {self.prediction!r}")
        if not 0 <= self.sigma_T < math.inf:
            raise PlanError(f"sigma_T: must be a finite number of at least 0, got {self.sigma_T!r}")
        if len(self.times) < 2 or not all(a > b for a, b in zip(self.times, self.times[1:], strict=False)):
            raise PlanError(f"times: must be at least 2 and decrease strictly, got {self.times}")
        known, outputs, noises, node = {START}, set[str](), 0, 0
        for i, step in enumerate(self.instructions):
            dst = step.dst
            if isinstance(step, Combine):
                terms = dict(step.terms)
                if len(terms) < max(len(step.terms), 1):
                    raise PlanError(
                        f"instructions[{i}]: must use at least one name, and each once, got {[*step.terms]}"
                    )
                for name in terms:
                    if name not in known:
                        if name != f"z{noises}":
                            raise PlanError(f"instructions[{i}]: uses {name!r} before it exists")
                        known.add(name)
                        noises += 1
                # one sum is quicker than a look at each, and only ever too careful
                if not math.isfinite(sum(terms.values())) and not all(map(math.isfinite, terms.values())):
                    raise PlanError(f"instructions[{i}]: not finite: {step}")
                if step.node is not None:
                    _check_node(step.node, node, self.steps, i)
                    node = step.node
            else:
                _check_call(step, known, outputs, i)
                outputs.add(dst)
            if dst in known or dst[:1] in ("", "z"):
                why = "a second time" if dst in known else "but names with z are for noises and none is empty"
                raise PlanError(f"instructions[{i}]: defines {dst!r} {why}")
            known.add(dst)
        if not self.instructions or not isinstance(self.instructions[-1], Combine):
            raise PlanError("instructions: the last one must be a combine, whose dst is the result")

    @property
    def nfe(self) -> int:
        """Network calls per sample."""
        return len(self.calls)

    @property
    def steps(self) -> int:
        """Steps of the grid."""
        return len(self.times) - 1

    @cached_property
    def noises(self) -> int:
        """Standard-normal noises the plan uses."""
        return len(
            {
                name
                for step in self.instructions
                if isinstance(step, Combine)
                for name, _ in step.terms
                if name[0] == "z"
            }
        )

    @property
    def stochastic(self) -> bool:
        """Whether the plan uses any noise but the start noise."""
        return self.noises > 0

    @cached_property
    def calls(self) -> tuple[Evaluate, ...]:
        """The network calls, in order."""
        return tuple(step for step in self.instructions if isinstance(step, Evaluate))

    def program(self, raw: tuple[bool, ...], filled: bool = False) -> Program:
        """The plan lowered to buffers, made once for each pattern of calls whose output needs no conversion.

        Args:
            raw: for each call, whether the network gives what the plan evaluates, as it is.
            filled: whether the noise source writes into buffers.
        """
        if (raw, filled) not in self._programs:
            self._programs[raw, filled] = lower(self.instructions, raw, filled)
        return self._programs[raw, filled]

    @cached_property
    def _programs(self) -> dict[tuple[tuple[bool, ...], bool], Program]:
        return {}

    @cached_property
    def checked_on(self) -> list[object]:
        """The schedule that the executor last found to be the one of the calls, if any."""
        return []

    def matrix(self, kind: str | None = None) -> np.ndarray:
        """Every evaluated state and the result as absolute coefficients on (x_T, outputs, noises).

        Args:
            kind: express every output as "eps" or "x0"; None: as the plan evaluates it.

        Returns:
            (nfe + 1, 1 + nfe + noises) float64: row j is the state of the j-th evaluation, the last row the result;
            lower triangular in the outputs.

        Raises:
            ValueError: an unknown kind, or "eps" where the plan takes x0 at alpha = 0.
        """
        if kind not in (None, *KINDS):
            raise ValueError(f"kind must be 'eps', 'x0' or None, got {kind!r}")
        unit = np.eye(1 + self.nfe + self.noises)
        rows: dict[str, np.ndarray] = {START: unit[0]}
        evaluated: list[np.ndarray] = []
        for step in self.instructions:
            if isinstance(step, Evaluate):
                state, output = rows[step.src], unit[1 + len(evaluated)]
                evaluated.append(state)
                rows[step.dst] = output if kind in (None, step.kind) else _converted(step, state, output)
            else:
                terms = [(unit[1 + self.nfe + int(n[1:])] if n[0] == "z" else rows[n], c) for n, c in step.terms]
                rows[step.dst] = np.add.reduce([c * row for row, c in terms])
        return np.stack([*evaluated, rows[self.instructions[-1].dst]])

    def close(self, other: Plan, rtol: float = 1e-9) -> bool:
        """Whether two plans compute the same: equal evaluation times and equal matrices in epsilon, up to rounding.

        Args:
            other: the plan to compare with.
            rtol: tolerance relative to the largest coefficient.
        """
        require_plan("other", other)
        mine, theirs = ([s.t for s in plan.instructions if isinstance(s, Evaluate)] for plan in (self, other))
        if (
            len(mine) != len(theirs)
            or self.noises != other.noises
            or not np.allclose(mine, theirs, rtol=rtol, atol=rtol)
        ):
            return False
        zero_alpha = any(isinstance(s, Evaluate) and s.alpha == 0 for p in (self, other) for s in p.instructions)
        a, b = (plan.matrix("x0" if zero_alpha else "eps") for plan in (self, other))
        return bool(np.abs(a - b).max() <= rtol * max(np.abs(a).max(), np.abs(b).max()))

    def to_json(self) -> str:
        """The plan as JSON text; numbers in shortest form that reads back to the same bits."""
        steps = [{"op": type(step).__name__.lower(), **step._asdict()} for step in self.instructions]
        head = {
            "format": FORMAT,
            "version": VERSION,
            "sampler": self.sampler,
            "prediction": self.prediction,
            "sigma_T": self.sigma_T,
        }
        return json.dumps({**head, "times": self.times, "instructions": steps}, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that `to_json` wrote.

        Beside the plan's own fields a file may have the lists "sigmas" and "timesteps" that `fewstep export` writes.

        Raises:
            TypeError: not a text.
            PlanError: not JSON, another format or version, or a malformed, missing, repeated or unknown field, named by its path.
        """
        if not isinstance(text, (str, bytes)):
            raise TypeError(f"text must be the JSON of a plan, got {type(text).__name__}")
        try:
            document = json.loads(text, object_pairs_hook=_Fields)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"not JSON: {error}") from error
        head = _Reader(document, "")
        head.choice("format", (FORMAT,))
        if (version := head.get("version", int)) != VERSION:
            raise PlanError(f"version: must be {VERSION}, got {version}; this code reads version {VERSION}")
        head.only(*_HEAD, *_LISTS)
        for name in _LISTS:
            if name in document:
                head.numbers(name)
        times = head.numbers("times")
        steps = tuple(
            _instruction(_Reader(item, f"instructions[{i}]")) for i, item in enumerate(head.get("instructions", list))
        )
        return Plan(steps, times, head.choice("prediction", KINDS), head.number("sigma_T"), head.get("sampler", str))


def _converted(step: Evaluate, state: np.ndarray, output: np.ndarray) -> np.ndarray:
    """The output of `step` in terms of the other kind: `x = alpha x0 + sigma eps`."""
    own, other = (step.alpha, step.sigma) if step.kind == "x0" else (step.sigma, step.alpha)
    if own == 0:
        raise ValueError(f"the plan takes {step.kind} at t={step.t:g}, where it does not follow from the other kind")
    return (state - other * output) / own


def _check_node(node: int, before: int, steps: int, i: int) -> None:
    """Raise PlanError where the node of instruction i is none of the grid's, or not above the one before."""
    if not 1 <= node <= steps:
        raise PlanError(f"instructions[{i}].node: must be 1 to {steps}, got {node}")
    if node <= before:
        raise PlanError(f"instructions[{i}].node: must be above {before}, the one before, got {node}")


def _check_call(step: Evaluate, known: set[str], outputs: set[str], i: int) -> None:
    """Raise PlanError for a call, instruction i, that cannot be made."""
    _, src, t, alpha, sigma, kind = step
    if kind not in KINDS:
        raise PlanError(f"instructions[{i}].kind: must be one of {KINDS}, got {kind!r}")
    if src[:1] == "z":
        raise PlanError(f"instructions[{i}].src: must be a state, got the noise {src!r}")
    if src not in known:
        raise PlanError(f"instructions[{i}]: uses {src!r} before it exists")
    if src in outputs:  # a network that writes its outputs into one buffer would write over its own input
        raise PlanError(f"instructions[{i}].src: must be a state, got the output {src!r} of another call")
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        if value < 0:
            raise PlanError(f"instructions[{i}].{name}: must be at least 0, got {value!r}")
    if alpha == sigma == 0:
        raise PlanError(f"instructions[{i}].sigma: must be above 0 where alpha is 0, got {sigma!r}")
    if not math.isfinite(t + alpha + sigma) and not all(map(math.isfinite, (t, alpha, sigma))):
        raise PlanError(f"instructions[{i}]: not finite: {step}")


class _Fields(dict[str, Any]):
    """A JSON object that knows which fields its text has more than once, of which a dict keeps the last alone."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.twice = [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]


class _Reader:
    """A JSON object whose fields are checked as they are read, with the path for the message."""

    def __init__(self, item: Any, path: str) -> None:
        self.item, self.path = item, path
        if not isinstance(item, _Fields):
            raise PlanError(f"{path or 'plan'}: must be an object, got {type(item).__name__}")
        if item.twice:
            raise PlanError(f"{self.at(item.twice[0])}: must be there once, and is there more often")

    def at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def get(self, name: str, kind: type) -> Any:
        if name not in self.item:
            raise PlanError(f"{self.at(name)}: missing")
        if not isinstance(self.item[name], kind) or isinstance(self.item[name], bool):
            raise PlanError(f"{self.at(name)}: must be {kind.__name__}, got {self.item[name]!r}")
        return self.item[name]

    def only(self, *names: str) -> None:
        """Refuse a field that has no meaning, such as a misspelt one."""
        for name in self.item:
            if name not in names:
                raise PlanError(f"{self.at(name)}: unknown field; accepted: {', '.join(names)}")

    def number(self, name: str) -> float:
        return _number(self.get(name, object), self.at(name))

    def numbers(self, name: str) -> tuple[float, ...]:
        return tuple(_number(value, f"{self.at(name)}[{i}]") for i, value in enumerate(self.get(name, list)))

    def choice(self, name: str, accepted: tuple[str, ...]) -> str:
        value = self.get(name, str)
        if value not in accepted:
            raise PlanError(f"{self.at(name)}: must be one of {accepted}, got {value!r}")
        return value


def _number(value: Any, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_LARGEST <= value <= _LARGEST:
        raise PlanError(f"{path}: must be a finite number, got {value!r}")
    return float(value)


def _instruction(item: _Reader) -> Instruction:
    op = item.choice("op", ("evaluate", "combine"))
    item.only("op", *(Evaluate if op == "evaluate" else Combine)._fields)
    if op == "evaluate":
        t, alpha, sigma = (item.number(name) for name in ("t", "alpha", "sigma"))
        return Evaluate(item.get("dst", str), item.get("src", str), t, alpha, sigma, item.choice("kind", KINDS))
    terms = []
    for j, term in enumerate(item.get("terms", list)):
        path = f"{item.at('terms')}[{j}]"
        if not isinstance(term, list) or len(term) != 2 or not isinstance(term[0], str) or not term[0]:
            raise PlanError(f"{path}: must be [name, coefficient], got {term!r}")
        terms.append((term[0], _number(term[1], f"{path}[1]")))
    if not terms:
        raise PlanError(f"{item.at('terms')}: must not be empty")
    if "node" not in item.item:
        raise PlanError(f"{item.at('node')}: missing")
    node = item.item["node"]
    if node is not None and (isinstance(node, bool) or not isinstance(node, int)):
        raise PlanError(f"{item.at('node')}: must be an integer or null, got {node!r}")
    return Combine(item.get("dst", str), tuple(terms), node)


def require_plan(name: str, plan: Plan) -> None:
    """Raise TypeError where an argument is no plan."""
    if not isinstance(plan, Plan):
        raise TypeError(f"{name} must be a Plan, as of make_plan(sampler, schedule, ...), got {type(plan).__name__}")
