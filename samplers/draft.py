"""A plan under construction: the vocabulary in which solvers are written."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from samplers.grid import Grid
from samplers.plan import Plan
from samplers.program import START, Combine, Evaluate, Instruction

Term = tuple[str, float]


class Draft:
    """Collects instructions over a grid and names the values.

    Where the grid starts at alpha = 0 (pure noise: flow at t = 1, zero terminal SNR) no epsilon exists and lam is
    infinite, so the first step is written here, `x' = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) x0`, and solvers
    begin at the second node: `steps` and `x` say where.

    Args:
        grid: the nodes.
        prediction: "eps" or "x0", the kind of every other evaluation.
        first_step: whether to write that step; False for a method that is defined there.

    Attributes:
        t, alpha, sigma: node values as Python floats.
        steps: the indices of the steps a solver has to write.
        x: the state it begins with.
    """

    def __init__(self, grid: Grid, prediction: str, *, first_step: bool = True) -> None:
        self.grid, self.prediction = grid, prediction
        self.t, self.alpha, self.sigma = (a.tolist() for a in (grid.t, grid.alpha, grid.sigma))
        self._instructions: list[Instruction] = []
        self._outputs = self._states = self._drawn = 0
        self._noises: dict[str, str] = {}
        self.x, first = START, 0
        if self.alpha[0] == 0 and first_step:
            out = self.evaluate_at(START, self.t[0], 0.0, self.sigma[0], kind="x0")
            self.x, first = self.combine(1, (START, self.sigma[1] / self.sigma[0]), (out, self.alpha[1])), 1
        self.steps = range(first, grid.steps)

    def evaluate(self, src: str, i: int) -> str:
        """The model's output at state `src`, at node i."""
        return self.evaluate_at(src, self.t[i], self.alpha[i], self.sigma[i])

    def evaluate_at(self, src: str, t: float, alpha: float, sigma: float, kind: str | None = None) -> str:
        """The model's output at state `src` and any time."""
        dst = f"o{self._outputs}"
        self._outputs += 1
        self._instructions.append(Evaluate(dst, src, t, alpha, sigma, kind or self.prediction))
        return dst

    def combine(self, node: int | None, *terms: Term) -> str:
        """A new state as a linear combination; `node` is given where it ends a step. Terms with coefficient 0 do not exist."""
        kept: list[Term] = []
        for name, coefficient in terms:
            if coefficient != 0.0:
                if name[0] == "z":  # numbered by first use, so that a plan's k-th noise is the k-th that is drawn
                    name = self._noises.setdefault(name, f"z{len(self._noises)}")
                kept.append((name, coefficient))
        self._states += 1
        dst = f"x{self._states}"
        self._instructions.append(Combine(dst, tuple(kept), node))
        return dst

    def noise(self) -> str:
        """A fresh standard-normal noise."""
        self._drawn += 1
        return f"z?{self._drawn}"

    def transfer(self, i: int) -> tuple[float, float]:
        """Coefficients of (state, output) in the first-order step from node i to i + 1, which is DDIM's.

        Song et al. 2021, arXiv:2010.02502, equation 12; finite also where the step ends at sigma = 0.
        """
        a, s, a_next, s_next = self.alpha[i], self.sigma[i], self.alpha[i + 1], self.sigma[i + 1]
        if self.prediction == "eps":
            return a_next / a, s_next - s * (a_next / a)
        return s_next / s, a_next - a * (s_next / s)

    def first_order(self, i: int, x: str, out: str, *more: Term) -> str:
        """The DDIM step from node i to i + 1, plus further terms."""
        state, output = self.transfer(i)
        return self.combine(i + 1, (x, state), (out, output), *more)

    def plan(self) -> Plan:
        """The finished plan; its result is the last state."""
        return Plan(tuple(self._instructions), tuple(self.t), self.prediction, self.sigma[0])


def step_orders(steps: Sequence[int], order: int, lower_order_final: bool | int) -> list[int]:
    """The order of each step of a multistep method: `min(i + 1, k, N - i)`.

    Args:
        steps: the step indices the method writes.
        order: k, the method's own.
        lower_order_final: whether orders fall again at the end; an int n means "where N < n", N the steps the method writes.

    Raises:
        ValueError: lower_order_final is none of these.
    """
    if not isinstance(lower_order_final, Integral) or lower_order_final < 0:
        raise ValueError(f"lower_order_final must be True, False or a step count, got {lower_order_final!r}")
    n = len(steps)
    lower = n < lower_order_final if not isinstance(lower_order_final, bool) else lower_order_final
    return [min(i + 1, order, n - i if lower else order) for i in range(n)]
