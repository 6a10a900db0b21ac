"""ODE inversion: the noise that a deterministic sampler would make an image of, and the way back.

The probability-flow ODE is `dx = x0 d alpha + eps d sigma`. It does not change when data and noise trade places, x0 with eps
and alpha with sigma, and time turns round: the way up is a way down on the mirrored schedule, whose "data" is noise. So every
deterministic sampler inverts, as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from samplers.grid import Grid
from samplers.guidance.wrapped import Wrapped
from samplers.job import Job, Result, prepare
from samplers.model import Affine, EpsModel, Scalar
from samplers.schedule import Schedule
from samplers.tasks.states import check_tensor, rmse

_NEARLY_NOISE = 1e-5  # alpha / sigma from which an error-controlled sampler takes one first-order step to alpha = 0


@dataclass(frozen=True)
class Mirrored(Schedule):
    """A schedule with data and noise exchanged and time reversed: `alpha'(t) = sigma(-t)`, `sigma'(t) = alpha(-t)`.

    Args:
        of: the schedule.
    """

    of: Schedule
    name: ClassVar[str] = "mirrored"

    @property
    def t_min(self) -> float:
        """Pure noise, which takes the place of data."""
        return -self.of.t_max

    @property
    def t_max(self) -> float:
        """Data."""
        return -self.of.t_min

    def config(self) -> dict[str, Any]:
        """JSON-ready description."""
        return {"name": self.name, "of": self.of.config()}

    def _alpha(self, t: Any, xp: Any) -> Any:
        return self.of._sigma(-t, xp)

    def _sigma(self, t: Any, xp: Any) -> Any:
        return self.of._alpha(-t, xp)

    def _dalpha(self, t: Any, xp: Any) -> Any:
        return -self.of._dsigma(-t, xp)

    def _dsigma(self, t: Any, xp: Any) -> Any:
        return -self.of._dalpha(-t, xp)

    def _t_of_lam(self, lam: Any, xp: Any) -> Any:
        return -self.of._t_of_lam(-lam, xp)


class MirroredModel(Wrapped):
    """A model on the mirrored schedule: its epsilon is the model's x0, its x0 the model's epsilon.

    Both follow from `v = alpha eps - sigma x0`, which changes its sign.

    Args:
        model: the epsilon-model.

    Raises:
        TypeError: not a model.
    """

    def __init__(self, model: EpsModel) -> None:
        super().__init__(model, "v")
        self.schedule = Mirrored(model.schedule)

    def affine(self, kind: str, t: Scalar, alpha: Scalar, sigma: Scalar) -> Affine:
        """As of a network that predicts v."""
        return EpsModel.affine(self, kind, t, alpha, sigma)

    def output(self, x: Tensor, times: Tensor, alpha: Scalar, sigma: Scalar, cond: Mapping[str, Any]) -> Tensor:
        """`-v` of the model inside, whose alpha is the sigma here."""
        out = self.model.output(x, -times, sigma, alpha, cond)
        return -self.model.relation("v", x, -times, sigma, alpha).of(x, out)


@dataclass(frozen=True)
class Reconstruction(Result):
    """An image, its noise, and what became of it on the way back.

    Attributes:
        x_T: (B, ...) the noise, at the first node.
        error: (B,) float64: root mean square difference between the image and x, the round trip's end.
    """

    x_T: Tensor
    error: Tensor


def invert(model: EpsModel, image: Tensor, sampler: str, **how: Any) -> Result:
    """The noise that the sampler makes the image of, up to the error of its steps.

    With `ddim` this is DDIM inversion (Song et al. 2021, arXiv:2010.02502, section 4.3); every deterministic sampler can do it,
    at its own order, and the error-controlled ones to their tolerance. The image is taken as the state at the last node above
    sigma = 0, t_min.

    Args:
        model: the epsilon-model.
        image: (B, ...) in the model's range.
        sampler: a registered name, of a deterministic sampler.
        how: all other arguments of `samplers.sample`; the nodes are those on which the noise is to be sampled from.

    Returns:
        The noise (B, ...), a start `x_T` for `samplers.sample` on the same nodes, with the nodes from data to noise.

    Raises:
        ValueError, TypeError: as `samplers.sample`; a stochastic sampler, options that make it so, or afs.
    """
    return up(model, image, way_back(model, sampler, how))


def reconstruct(model: EpsModel, image: Tensor, sampler: str, **how: Any) -> Reconstruction:
    """An image to noise and back, by the same sampler on the same nodes.

    Args:
        model, image, sampler, how: as for `invert`; `nfe` is the budget of either way.

    Returns:
        The image as it came back, the noise, the error of each sample, and the network calls of both ways together.

    Raises:
        ValueError, TypeError: as `invert`.
    """
    job = way_back(model, sampler, how)
    noise = up(model, image, job)
    back = job.run(model, noise.x)
    return Reconstruction(back.x, back.times, noise.nfe + back.nfe, back.plan, noise.x, rmse(image, back.x))


def way_back(model: EpsModel, sampler: str, how: Mapping[str, Any]) -> Job:
    """The sampler from noise to the last node above sigma = 0, the way that `up` inverts; `how` as for `invert`.

    A named grid ends at t_min: at sigma = 0 no noise is left to tell where an image came from.
    """
    if how.get("final") not in (None, "t_min"):
        raise ValueError(f"final must be 't_min' for an inversion, which starts above sigma = 0, got {how['final']!r}")
    if how.get("afs"):
        raise ValueError("afs=True takes the first state for noise, and an inversion starts from data; leave it out")
    named = how.get("timesteps") is None and how.get("sigmas") is None
    job = prepare(model, sampler, **({**how, "final": "t_min"} if named else how))
    if job.plan is not None and job.plan.stochastic:
        raise ValueError(
            f"sampler {sampler!r} adds noise, and its way cannot be gone back; take a deterministic one, or an option such as "
            "eta=0"
        )
    if job.grid.sigma[-1] > 0:
        return job
    if job.grid.steps < 2:
        raise ValueError("an inversion needs two nodes above sigma = 0, got one")
    return dataclasses.replace(job, grid=Grid(job.grid.schedule, job.grid.t[:-1]))


def up(model: EpsModel, image: Tensor, job: Job) -> Result:
    """From data to noise, on the nodes of `job` and on the mirrored schedule."""
    check_tensor(model, "image", image)
    t = job.grid.t
    if job.entry.adaptive and job.grid.alpha[0] == 0:
        t = np.unique([*t, float(model.schedule.t_of_lam(np.log(_NEARLY_NOISE)))])[::-1]
    options = dict(job.options)
    if options.get("orders") is not None:  # one for each step
        options["orders"] = list(options["orders"])[::-1]
    way = dataclasses.replace(job, grid=Grid(Mirrored(model.schedule), -t[::-1]), options=options)
    found = way.run(MirroredModel(model), image)
    return dataclasses.replace(found, times=tuple(-at for at in found.times))
