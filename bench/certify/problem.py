"""The exactly solvable problems that certificates are made on: a narrow Gaussian mixture, in float64, from eight start states."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from bench.mixture import GaussianMixture
from samplers import EpsModel, Plan, sample
from samplers.program import START, Evaluate
from samplers.schedule import Schedule

# Narrow components: with broad ones the third-order term of dpm-solver-3s on (cosine, quadratic) is so small that the
# fourth-order one hides it until both reach rounding (measured slopes 3.8 up to 2560 steps).
MIXTURE = GaussianMixture.isotropic([[1.0, 0.0], [-0.5, 0.8], [0.0, -1.0]], [0.12, 0.1, 0.15])
STATES = 8
_MEANS, _VARIANCES, _LOG_WEIGHTS = MIXTURE.means.numpy(), MIXTURE.residual.numpy(), MIXTURE.weights.log().numpy()


def epsilon(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """`MIXTURE.eps` in NumPy: eight times faster on eight states."""
    total = alpha**2 * _VARIANCES + sigma**2
    away = x[:, None] - alpha * _MEANS
    joint = _LOG_WEIGHTS - np.log(total) - 0.5 * (away**2).sum(2) / total
    likelihood = np.exp(joint - joint.max(1, keepdims=True))
    posterior = likelihood / likelihood.sum(1, keepdims=True)
    return sigma * ((posterior / total)[:, :, None] * away).sum(1)


def network(schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
    """`MIXTURE.net(schedule)` for a time that all samples share."""

    @functools.cache
    def levels(t: float) -> tuple[float, float]:
        return float(schedule.alpha(t)), float(schedule.sigma(t))

    return lambda x, t: torch.from_numpy(epsilon(x.numpy(), *levels(t[0].item())))


class Problem:
    """The probability-flow ODE from eight start states at `t_max`, with its solution at `t_min`.

    Args:
        schedule: with alpha > 0 at `t_max`.

    Attributes:
        schedule, model: the noise schedule, and the exact network on it.
        x_T: the start states.
        solution: by rk45 with tolerance 1e-12, which agrees with SciPy's DOP853 to 5e-13.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.model = schedule, EpsModel(network(schedule), schedule)
        z = torch.randn(STATES, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.x_T = float(schedule.sigma(schedule.t_max)) * z
        self.solution = sample(self.model, "rk45", x_T=self.x_T, rtol=1e-12, atol=1e-12)
        self._ends: dict[tuple[bytes, int], np.ndarray] = {}

    def error(self, plan: Plan, exact_start: int = 0) -> float:
        """The largest difference between a plan's result and the solution; plans that are equal run once.

        Args:
            plan: deterministic, from `t_max` to `t_min`.
            exact_start: the states at nodes 1 .. exact_start are replaced by the solution there, which removes what the
                low orders of a start-up cost.
        """
        return float(np.abs(self._end(plan, exact_start) - self.solution.numpy()).max())

    def apart(self, a: Plan, b: Plan) -> float:
        """The largest difference between the results of two plans."""
        return float(np.abs(self._end(a) - self._end(b)).max())

    def _end(self, plan: Plan, exact_start: int = 0) -> np.ndarray:
        # what tells plans apart, and not the plans, which are millions of objects in a whole run of certificates
        key = (hashlib.sha256(repr((plan.instructions, plan.times)).encode()).digest(), exact_start)
        if key not in self._ends:
            states = [self.x_T.numpy()]
            if exact_start:
                states = solution_at(
                    self.schedule, self.schedule.lam(np.array(plan.times[: exact_start + 1])), states[0]
                )
            self._ends[key] = run_from(plan, states)
        return self._ends[key]


def run_from(
    plan: Plan, states: Sequence[np.ndarray], eps_of: Callable[[np.ndarray, float, float], np.ndarray] = epsilon
) -> np.ndarray:
    """Run a plan without its noises, with given states in place of its own at nodes 0 .. len(states) - 1.

    What `run_plan` computes, to rounding, in a third of its time on so few states.

    Args:
        plan: what to run.
        states: at least the one it starts from.
        eps_of: epsilon of (x, alpha, sigma); by default the mixture's.
    """
    values = {START: states[0]}
    for step in plan.instructions:
        if isinstance(step, Evaluate):
            x = values[step.src]
            eps = eps_of(x, step.alpha, step.sigma)
            values[step.dst] = eps if step.kind == "eps" else (x - step.sigma * eps) / step.alpha
        elif step.node is not None and step.node < len(states):
            values[step.dst] = states[step.node]
        else:
            values[step.dst] = sum(c * values[name] for name, c in step.terms if name[0] != "z")  # type: ignore[assignment]
    return values[plan.instructions[-1].dst]


def solution_at(schedule: Schedule, lam: np.ndarray, x: np.ndarray) -> list[np.ndarray]:
    """The exact states at increasing log-SNRs from x at the first, by SciPy's DOP853 with tolerance 1e-13."""
    from scipy.integrate import solve_ivp

    def slope(at: float, y: np.ndarray) -> np.ndarray:  # d(x/alpha) / d lam = -sigma_bar eps
        alpha, sigma = _levels(schedule, at)
        return (-np.exp(-at) * epsilon(y.reshape(x.shape) * alpha, alpha, sigma)).ravel()

    # from node to node: a solution interpolated between the integrator's steps is of seventh order only
    states = [x]
    for a, b in itertools.pairwise(lam):
        y0 = (states[-1] / _levels(schedule, a)[0]).ravel()
        end = solve_ivp(slope, (a, b), y0, method="DOP853", rtol=1e-13, atol=1e-14).y[:, -1]
        states.append(end.reshape(x.shape) * _levels(schedule, b)[0])
    return states


def _levels(schedule: Schedule, lam: float) -> tuple[float, float]:
    t = float(schedule.t_of_lam(float(lam)))
    return float(schedule.alpha(t)), float(schedule.sigma(t))
