"""UniPC: a multistep predictor in lam whose result is corrected by the output that the next step takes anyway.

Zhao et al. 2023, arXiv:2302.04867. The paper's conditions on the p weights are those of interpolation, so a predictor
(UniP-p, corollary 3.2) is exponential Adams-Bashforth and a corrector (UniC-p, theorem 3.1) exponential Adams-Moulton, with
the point at the step's end, whatever B(h) is: it cancels. B(h) matters where the authors take 1/2 instead of solving for the
only weight, which is in the predictor of order 2 and in the corrector of order 1.
"""

from __future__ import annotations

import numpy as np

from samplers.draft import Draft
from samplers.errors import unknown
from samplers.grid import Grid
from samplers.plan import Plan
from samplers.solvers.exponential import psi
from samplers.solvers.exponential_multistep import Rows, check_predict, multistep_plan, two_points

_VARIANTS = ("bh1", "bh2", "vary_coeff")


def unipc(
    grid: Grid,
    *,
    order: int,
    variant: str = "bh2",
    predict: str = "x0",
    corrector: bool = True,
    lower_order_final: bool | int = 15,
) -> Plan:
    """UniPC-p, one call a step; the last step is not corrected, which would take another call.

    The network is evaluated at the predicted state, and the correction is written as a change to that state, in one
    combination with the next prediction. A plan's states are therefore the predicted ones. Of order 3 and more in x0 it is
    unstable below ten calls on wide "karras" and "logsnr" grids, as `eab` is.

    Args:
        grid: the nodes.
        order: p, 1 to 4, of predictor and corrector; steps begin with orders 1, 2, ... With the corrector the method
            converges with order p + 1, apart from an error of third order in the length of the first step in lam.
        variant: "bh1", B(h) = h, or "bh2", B(h) = e^h - 1, with 1/2 for the only weight; "vary_coeff", the paper's
            UniPC_v, all weights solved for.
        predict: "x0" or "eps", the quantity that is interpolated.
        corrector: False leaves the predictor alone.
        lower_order_final: whether the last steps are of orders ..., 2, 1; an int n means "where there are fewer than n".
    """
    check_predict(predict)
    if variant not in _VARIANTS:
        raise unknown("variant", variant, _VARIANTS)
    if not isinstance(corrector, bool):
        raise TypeError(f"corrector must be True or False, got {corrector!r}")
    p = Draft(grid, predict)
    rows = Rows(p, order, lower_order_final)
    columns = np.arange(order + 1)  # newest first: the output at the step's end, then those that the predictor has
    points = np.ones((len(rows.z), order + 1))
    points[:, 1:] = rows.points
    used = (columns <= rows.orders[:, None]) & np.stack([columns > 0, columns >= 0])[:, None]
    predicted, corrected = rows.weights(points, used)
    if variant != "vary_coeff":
        half = 0.5 * (rows.z if variant == "bh1" else psi(1, rows.z))
        first, second = rows.orders == 1, rows.orders == 2
        corrected[first, 1::-1] = two_points(rows.z, half, 1.0)[first]
        if order > 1:
            predicted[second, 1:3] = two_points(rows.z, half, points[:, 2])[second]
    coefficients = np.zeros_like(points)
    coefficients[:, :-1] = rows.coefficients(predicted[:, 1:])
    if corrector:
        change = -rows.scale[:, None] * (corrected - predicted)
        coefficients[1:] += rows.transfer[1:, :1] * change[:-1]
    return multistep_plan(p, rows, coefficients)
