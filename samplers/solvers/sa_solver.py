"""SA-Solver: stochastic Adams methods in lam with data prediction.

The reverse SDE whose noise is scaled by tau has, over a step of length h in lam on which tau is constant, the exact solution
(Xue et al. 2023, arXiv:2309.05019, section 4)

    x' = (sigma'/sigma) e^(-tau^2 h) x + alpha' c h integral_0^1 e^(-c h (1 - u)) x0(u) du + sigma' sqrt(1 - e^(-2 tau^2 h)) z

with `c = 1 + tau^2`. tau = 0 is the probability-flow ODE, tau = 1 the reverse SDE of the forward process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

from samplers.draft import Draft, step_orders
from samplers.errors import LARGEST_AMOUNT, unknown
from samplers.grid import Grid
from samplers.plan import Plan
from samplers.solvers.stages import finite_lam
from samplers.solvers.weights import exponential_adams, history, lagrange, phi


def sa_solver(
    grid: Grid,
    *,
    predictor_order: int = 3,
    corrector_order: int = 4,
    tau: float | Callable[[np.ndarray], np.ndarray] = 1.0,
    tau_start: float = 25.8,
    tau_end: float = 0.72,
    weights: str = "exact",
    lower_order_final: bool | int = 15,
) -> Plan:
    """SA-Solver: a stochastic Adams-Bashforth predictor and Adams-Moulton corrector, one call a step.

    Xue et al. 2023, arXiv:2309.05019, equations 15 and 18. The corrector of a step uses the evaluation with which
    the next step begins and the noise of its predictor, so it is a correction to the predicted state and part of the next
    step's sum; the last step has none. A step to sigma = 0 is first order and without noise.

    Args:
        grid: the nodes.
        predictor_order: points of the predictor, 1 to 4.
        corrector_order: points of the corrector, the new one among them, 1 to 4; 0 is no corrector. The authors recommend
            3 and 4 for unconditional sampling, 2 and 2 under strong guidance.
        tau: scale of the noise, 0 to 1000, on steps that begin at `tau_end <= sigma_bar <= tau_start`; 0 elsewhere. A number,
            or a function of the values of sigma_bar (N,) at which the steps begin, each of which keeps its value.
        tau_start, tau_end: by default the released choice, training steps 800 to 200 of the 1000 of DDPM's linear schedule.
        weights: "exact", the paper's integrals, or "published", the authors' code, which at order 2 integrates the slope
            without the exponential (a difference of the third order in h).
        lower_order_final: whether orders fall again at the end; an int n means "where there are fewer than n steps".
    """
    _check(predictor_order, corrector_order, tau_start, tau_end, weights)
    p = Draft(grid, "x0")
    predictor = step_orders(p.steps, predictor_order, lower_order_final)
    corrector = [1 + k for k in step_orders(p.steps, corrector_order - 1, lower_order_final)] if corrector_order else []
    lam, alpha, sigma = (a[p.steps.start :] for a in (finite_lam(grid), grid.alpha, grid.sigma))
    h, sigma_bar = np.diff(lam), np.exp(-lam[:-1])
    square = np.where(
        (tau_end <= sigma_bar) & (sigma_bar <= min(tau_start, sys.float_info.max)), _scales(tau, sigma_bar) ** 2, 0.0
    )
    state = sigma[1:] / sigma[:-1] * np.exp(-square * h)
    noise = sigma[1:] * np.sqrt(-np.expm1(-2.0 * square * h))
    outputs, corrected = _weights(lam, -(1.0 + square) * h, predictor, corrector, weights)
    scale = (alpha[1:] * (1.0 + square) * h)[:, None]
    outputs *= scale
    if corrector:  # what it adds to the predicted state
        correction = scale * corrected
        correction[:, 1:] -= outputs[:, :-1]
        outputs[1:] += state[1:, None] * correction[:-1]
    x, outs = p.x, list[str]()
    for i, by_state, by_outputs, by_noise in zip(
        p.steps, state.tolist(), outputs.tolist(), noise.tolist(), strict=True
    ):
        outs = [p.evaluate(x, i), *outs[:4]]
        if p.sigma[i + 1] == 0:
            x = p.first_order(i, x, outs[0])
        else:
            x = p.combine(i + 1, (x, by_state), *zip(outs, by_outputs, strict=False), (p.noise(), by_noise))
    return p.plan()


def _weights(
    lam: np.ndarray, z: np.ndarray, predictor: list[int], corrector: list[int], weights: str
) -> tuple[np.ndarray, np.ndarray]:
    """Integrals of the predictor's and the corrector's polynomials over each step, by their points, the newest first.

    Returns:
        Two times (N, 5): of row i the first `predictor[i]` and `corrector[i]` are in use, the others 0.
    """
    behind = history(lam, 4)
    both = np.concatenate([behind, np.insert(behind[:, :3], 0, 1.0, axis=1)])  # the corrector's first is the step's end
    orders, z = np.array(predictor + (corrector or [0] * len(z))), np.tile(z, 2)
    result = np.zeros((len(z), 5))
    for k in {*predictor, *corrector}:
        rows = orders == k
        points = both[rows, :k]
        if k == 2 and weights == "published":
            moments = np.stack([phi(1, z[rows]), np.full(len(points), 0.5)], axis=-1)
            result[rows, :k] = (lagrange(points) @ moments[..., None])[..., 0]
        else:
            result[rows, :k] = exponential_adams(points, z[rows])
    return result[: len(lam) - 1], result[len(lam) - 1 :]


def _scales(tau: float | Callable[[np.ndarray], np.ndarray], sigma_bar: np.ndarray) -> np.ndarray:
    """The value of tau on each step (N,)."""
    wanted = "tau must be a number or a function of sigma_bar at the steps, an array (N,), that gives an array"
    try:
        found = tau(sigma_bar) if callable(tau) else tau
        values = np.asarray(found)
    except Exception as error:  # a function of the caller's may raise anything
        raise ValueError(f"{wanted}, got {tau!r}: {type(error).__name__}: {error}") from error
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{wanted}, got {f'{tau!r}, which gives ' if callable(tau) else ''}{found!r}")
    values = values.astype(np.float64)
    if values.shape not in ((), sigma_bar.shape):
        raise ValueError(f"tau must give a value for each of {len(sigma_bar)} steps, got shape {values.shape}")
    if not ((values >= 0) & (values <= LARGEST_AMOUNT)).all():
        raise ValueError(f"tau must lie in [0, {LARGEST_AMOUNT:g}], got {values.tolist()}")
    return values


def _check(predictor_order: int, corrector_order: int, tau_start: float, tau_end: float, weights: str) -> None:
    if isinstance(predictor_order, bool) or predictor_order not in range(1, 5):
        raise ValueError(f"predictor_order must be 1, 2, 3 or 4, got {predictor_order!r}")
    if isinstance(corrector_order, bool) or corrector_order not in range(5):
        raise ValueError(f"corrector_order must be 0 (none), 1, 2, 3 or 4, got {corrector_order!r}")
    if not 0 <= tau_end <= tau_start:
        raise ValueError(f"tau_start and tau_end must satisfy 0 <= tau_end <= tau_start, got {tau_start} and {tau_end}")
    if weights not in ("exact", "published"):
        raise unknown("weights", weights, ("exact", "published"))
