"""Multistep sampling of a consistency model."""

from __future__ import annotations

import math

from samplers.draft import Draft
from samplers.grid import Grid
from samplers.plan import Plan


def consistency(grid: Grid) -> Plan:
    """Multistep consistency sampling: at every node the model's x0, then fresh noise up to the next node.

    Song et al. 2023, arXiv:2303.01469, algorithm 1: `x' = alpha' (x0 + sqrt(sigma_bar'^2 - epsilon^2) z)`. The model's x0 is
    taken to be its sample at the grid's last node, whose sigma_bar is the paper's epsilon, so that the last step adds no
    noise and the result is `alpha_N x0`; on a grid that ends in clean data epsilon is 0. Only a model that was trained or
    distilled for consistency samples its data in this way; with a denoiser it is a sequence of posterior means.

    Every step starts from fresh noise, also the one from a node with alpha = 0.
    """
    p = Draft(grid, "x0", first_step=False)
    end = p.sigma[-1] / p.alpha[-1]
    x = p.x
    for i in p.steps:
        alpha, sigma = p.alpha[i + 1], p.sigma[i + 1]
        out = p.evaluate(x, i)
        last = i + 1 == grid.steps  # where rounding may leave a difference
        added = 0.0 if last else math.sqrt(max(sigma**2 - (alpha * end) ** 2, 0.0))
        x = p.combine(i + 1, (out, alpha), (p.noise(), added))
    return p.plan()
