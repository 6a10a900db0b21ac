"""Linear multistep methods in epsilon: LMS, iPNDM, its variable-step form, and PNDM.

In `x / alpha` against `sigma_bar` the probability-flow ODE is `d(x / alpha) = eps d sigma_bar`, so every step here is a DDIM
step whose epsilon is a weighted sum of the last ones, with weights that add up to 1 (Liu et al. 2022, arXiv:2202.09778, section
3.3, call the step the transfer part). The methods differ in the weights, and in how they start and end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from samplers.draft import Draft, step_orders
from samplers.grid import Grid
from samplers.plan import Plan
from samplers.solvers.weights import adams, history

Weights = Callable[[int], np.ndarray]  # k -> (steps, k): of the last k epsilons, newest first, in every step


def lms(grid: Grid, *, order: int, lower_order_final: bool | int = False) -> Plan:
    """Adams-Bashforth in sigma_bar with the exact weights of the grid, orders rising 1, 2, ..., k; also on a step to sigma = 0.

    k-diffusion's `sample_lms` (Crowson 2022), which integrates the same polynomials numerically; for the method, Hairer,
    Norsett & Wanner 1993, "Solving Ordinary Differential Equations I", section III.5.

    Args:
        grid: the nodes.
        order: k, 1 to 4: how many epsilons a step uses.
        lower_order_final: whether orders fall again at the end; an int n means "where there are fewer than n steps".
    """
    p = Draft(grid, "eps")
    return adams_plan(p, step_orders(p.steps, order, lower_order_final), adams_weights(p))


def ipndm_v(grid: Grid, *, order: int, lower_order_final: bool | int = False) -> Plan:
    """Variable-step iPNDM: exact Adams-Bashforth in sigma_bar, orders rising 1, 2, ..., k, first order to sigma = 0.

    iPNDM is from Zhang & Chen 2023, arXiv:2204.13902, appendix, with the weights of constant steps. Its form for variable steps
    is known from the diff-sampler toolbox, whose third- and fourth-order weights are wrong (a bracket that should end after a
    difference ends after a product); here they are exact. On a grid that ends at sigma > 0 this is the same plan as `lms`, and
    as `deis` with `variant="rhoab"` and the same `lower_order_final`.

    Args:
        grid, order, lower_order_final: as in `lms`.
    """
    p = Draft(grid, "eps")
    return adams_plan(p, orders_to_zero(p, order, lower_order_final), adams_weights(p))


def ipndm(grid: Grid, *, order: int, lower_order_final: bool | int = False) -> Plan:
    """iPNDM: Adams-Bashforth weights of constant steps on any grid, orders rising 1, 2, ..., k, first order to sigma = 0.

    Zhang & Chen 2023, arXiv:2204.13902, appendix: PNDM's multistep formula without its Runge-Kutta start. The weights,
    (3/2, -1/2), (23/12, -16/12, 5/12) and (55/24, -59/24, 37/24, -9/24), give the mean of epsilon over the next step in the
    step's index, where the mean in sigma_bar is needed. Unless the grid is uniform in sigma_bar the two differ by the square of
    the step, so `ipndm-3` and `ipndm-4` are of second order too, and are registered so.

    Args:
        grid, order, lower_order_final: as in `lms`.
    """
    p = Draft(grid, "eps")
    return adams_plan(p, orders_to_zero(p, order, lower_order_final), constant_weights(p))


def pndm(grid: Grid) -> Plan:
    """PNDM: three classical Runge-Kutta steps of four calls, then one call a step with the weights of `ipndm-4`.

    Liu et al. 2022, arXiv:2202.09778, algorithm 2; second order. Every stage of a Runge-Kutta step is a DDIM step from its
    start, to its middle in t or to its end; its first epsilon enters the history. With fewer than three steps all are
    Runge-Kutta steps; one to sigma = 0 is DDIM. There is no empty step. A budget of 8 or 12 calls from pure noise is two or three
    such steps, too long for the method to be stable.

    Args:
        grid: the nodes.
    """
    p = Draft(grid, "eps")
    orders = orders_to_zero(p, 4, False)
    t = 0.5 * (grid.t[:-1] + grid.t[1:])[p.steps.start :][:3]
    middles = zip(t.tolist(), grid.schedule.alpha(t).tolist(), grid.schedule.sigma(t).tolist(), strict=True)
    x, outs = p.x, list[str]()
    for i, middle in zip(p.steps, middles, strict=False):
        outs = [p.evaluate(x, i), *outs]
        x = p.first_order(i, x, outs[0]) if p.sigma[i + 1] == 0 else _runge_kutta(p, i, x, outs[0], middle)
    return adams_plan(p, orders, constant_weights(p), x, outs)


def _runge_kutta(p: Draft, i: int, x: str, first: str, middle: tuple[float, float, float]) -> str:
    """The state after step i, from its first epsilon; the last stage's state is corrected to it."""
    (_, alpha, sigma), (state, slope) = middle, p.transfer(i)
    half, half_slope = alpha / p.alpha[i], sigma - p.sigma[i] * (alpha / p.alpha[i])
    second = p.evaluate_at(p.combine(None, (x, half), (first, half_slope)), *middle)
    third = p.evaluate_at(p.combine(None, (x, half), (second, half_slope)), *middle)
    end = p.combine(None, (x, state), (third, slope))
    fourth = p.evaluate(end, i + 1)
    sixth = slope / 6
    return p.combine(i + 1, (end, 1.0), (first, sixth), (second, 2 * sixth), (third, -4 * sixth), (fourth, sixth))


def adams_weights(p: Draft) -> Weights:
    """The mean over the step, in sigma_bar, of the polynomial in sigma_bar through the last k epsilons."""
    sigma_bar = p.grid.sigma[p.steps.start :] / p.grid.alpha[p.steps.start :]
    return lambda k: adams(history(sigma_bar, k))


def constant_weights(p: Draft) -> Weights:
    """The same for steps of one length, whatever the grid."""
    return lambda k: np.broadcast_to(adams(-np.arange(float(k))), (len(p.steps), k))


def orders_to_zero(p: Draft, order: int, lower_order_final: bool | int) -> list[int]:
    """`step_orders`, but first order on a step to sigma = 0."""
    orders = step_orders(p.steps, order, lower_order_final)
    return [1 if p.sigma[i + 1] == 0 else k for i, k in zip(p.steps, orders, strict=True)]


def adams_plan(p: Draft, orders: Sequence[int], weights: Weights, x: str = "", outs: Sequence[str] = ()) -> Plan:
    """The plan of DDIM steps with a weighted epsilon.

    Args:
        p: the draft.
        orders: how many epsilons each step of `p.steps` uses.
        weights: of them.
        x, outs: the state to go on from and its history, newest first, where len(outs) steps have been written.
    """
    begin, x = len(outs), x or p.x
    rows = {k: weights(k).tolist() for k in set(orders[begin:])}
    for j, i in list(enumerate(p.steps))[begin:]:
        outs = [p.evaluate(x, i), *outs][: orders[j]]
        state, slope = p.transfer(i)
        x = p.combine(i + 1, (x, state), *((o, slope * w) for o, w in zip(outs, rows[orders[j]][j], strict=True)))
    return p.plan()
