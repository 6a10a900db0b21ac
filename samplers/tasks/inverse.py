"""Linear inverse problems, super-resolution among them: sampling what a measurement `y = A x + noise` may have come from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from samplers.errors import unknown
from samplers.job import Result
from samplers.model import EpsModel, Scalar
from samplers.tasks.conditional import Corrected, Predict
from samplers.tasks.operators import Downsample, Operator
from samplers.tasks.resampling import prepare_resampled
from samplers.tasks.states import check_beside, check_tensor, per_sample


def ddnm(model: EpsModel, operator: Operator, y: Tensor, noise: float = 0.0) -> EpsModel:
    """The model with x0 made consistent with a measurement: `x0 <- x0 + A^+ (y - A x0)`.

    DDNM (Wang et al. 2022, arXiv:2212.00490, equation 13): the part of x0 that the measurement sees comes from it, the rest
    from the model. With noise, `A^+` becomes `A^T (A A^T + (noise / r)^2 I)^-1` with `r^2 = sigma^2 / (alpha^2 + sigma^2)`, which
    gives the mean of x0 given y if x0 is N(x0_hat, r^2 I): the correction fades where the measurement knows less than the state
    does. In DDNM+ (equation 17) it fades likewise, by a factor that follows from the sampler's step. No gradient is taken.

    The noise of a step is the sampler's. That of the authors' code is mostly fresh: its eta = 0.85 is a share of sigma', not
    DDIM's. `consistency` is their step with eta = 1; with samplers of less noise, resample (see `restore`).

    Args:
        model: the epsilon-model.
        operator: A.
        y: (B, ...), or (1, ...) for all samples.
        noise: standard deviation of the measurement's noise, at least 0.

    Raises:
        ValueError, TypeError: noise out of range, not a model; when it is called, y of another shape than A x.
    """
    _check_noise(noise)

    def correct(x: Tensor, alpha: Scalar, sigma: Scalar, predict: Predict) -> Tensor:
        x0 = predict(x)
        return x0 + operator.pinv(_residual(operator, y, x0), _ridge(_spread(alpha, sigma), noise))

    return Corrected(model, correct)


def pigdm(model: EpsModel, operator: Operator, y: Tensor, noise: float = 0.0, scale: float = 1.0) -> EpsModel:
    """The model guided by the gradient of a measurement's likelihood if x0 is N(x0_hat, r^2 I).

    Pseudoinverse-guided diffusion (Song et al. 2023, ICLR, openreview 9_gsMA8MRKQ, equations 7 and 8), with
    `r^2 = sigma^2 / (alpha^2 + sigma^2)`, which is exact where the data is Gaussian with covariance I. One network call and one
    backward pass a call.

    Args:
        model: the epsilon-model, whose network torch can differentiate.
        operator: A.
        y: (B, ...), or (1, ...) for all samples.
        noise: standard deviation of the measurement's noise, at least 0.
        scale: factor on the gradient, at least 0.

    Raises:
        ValueError, TypeError: as `ddnm`; scale out of range.
    """
    _check_noise(noise)

    def pull(x0: Tensor, spread: Scalar) -> Tensor:
        # (y - A x0)^T (r^2 A A^T + noise^2 I)^-1 A x0, whose gradient is taken through the last x0 alone
        toward = operator.pinv(_residual(operator, y, x0.detach()), _ridge(spread, noise))
        return toward * x0 / spread

    return _guided(model, pull, scale)


def dps(
    model: EpsModel, operator: Callable[[Tensor], Tensor], y: Tensor, noise: float = 0.0, scale: float = 1.0
) -> EpsModel:
    """The model guided by the gradient of the squared residual through the network, for any differentiable measurement.

    Diffusion posterior sampling (Chung et al. 2023, arXiv:2209.14687, equation 16): the score gets
    `-grad |y - A x0_hat(x)|^2 / (2 v)`. Theirs is a step of DDPM's, of a length that suits its 1000 steps; for any sampler and
    grid, v here is the variance of the residual, `noise^2 + gain r^2` with `r^2 = sigma^2 / (alpha^2 + sigma^2)`. One network
    call and one backward pass a call.

    Args:
        model: the epsilon-model, whose network torch can differentiate.
        operator: A, an `Operator` or any function of x, not linear ones only; gain is the operator's own, or 1.
        y: (B, ...), or (1, ...) for all samples.
        noise: standard deviation of the measurement's noise, at least 0.
        scale: factor on the gradient, at least 0.

    Raises:
        ValueError, TypeError: as `ddnm`; scale out of range.
    """
    _check_noise(noise)

    def pull(x0: Tensor, spread: Scalar) -> Tensor:
        residual = _residual(operator, y, x0)
        gain = float(getattr(operator, "gain", 1.0))
        return -0.5 * residual.square() / per_sample(noise**2 + gain * spread, residual)

    return _guided(model, pull, scale)


METHODS = {"ddnm": ddnm, "pigdm": pigdm, "dps": dps}


def restore(
    model: EpsModel,
    operator: Operator,
    y: Tensor,
    sampler: str,
    *,
    method: str = "ddnm",
    noise: float = 0.0,
    resamplings: int = 1,
    jump: int = 1,
    x_T: Tensor | None = None,
    scale: float | None = None,
    **how: Any,
) -> Result:
    """Sample images that a linear measurement may have come from.

    What `ddnm` puts into x0 does not know of the rest of it. With `resamplings` above 1 every `jump` steps are taken several
    times with fresh noise, so that the two come to agree: the time travel of DDNM (Wang et al. 2022, arXiv:2212.00490, section
    3.3), which is the resampling of `inpaint`.

    Args:
        model: the epsilon-model.
        operator: A, such as `Downsample(4)`, `Grey()`, `Blur.gaussian(2.0)`, `Mask(known)` or `Matrix(a, shape)`.
        y: the measurement (B, ...).
        sampler: a registered name.
        method: "ddnm", and then without noise the result has exactly A x = y; "pigdm" or "dps", which take a gradient through the
            network.
        noise: standard deviation of the measurement's noise, at least 0.
        resamplings: how often each `jump` steps are taken; 1 is once.
        jump: steps that are taken back at once.
        x_T: start states (B, ...); None: drawn from `seed`.
        scale: of "pigdm" and "dps": factor on the gradient; None is 1.
        how: all other arguments of `samplers.sample`; `nfe` is the budget of the whole, resampling included.

    Returns:
        The samples, with the nodes and network calls.

    Raises:
        ValueError, TypeError: as `samplers.sample`; y of a shape that the operator does not give, an unknown method, scale for a
            method that has none; resampling as in `inpaint`.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if not isinstance(operator, Operator):
        raise TypeError(f"operator must be a samplers.tasks operator, got {type(operator).__name__}")
    job, plan = prepare_resampled(model, sampler, resamplings, jump, how)
    check_tensor(model, "y", y)
    like = operator.pinv(y)
    if x_T is None:
        x_T = job.noise(like) * float(job.grid.sigma[0])
    check_tensor(model, "x_T", x_T)
    if x_T.shape != like.shape:
        raise ValueError(f"x_T must be {tuple(like.shape)}, what the operator takes for this y, got {tuple(x_T.shape)}")
    result = job.run(_of_method(method, model, operator, y, noise, scale), x_T, plan)
    if method == "ddnm" and noise == 0:  # a last node above sigma = 0 leaves some noise
        exact = result.x + operator.pinv(_residual(operator, y, result.x))
        return dataclasses.replace(result, x=exact)
    return result


def _of_method(
    method: str, model: EpsModel, operator: Operator, y: Tensor, noise: float, scale: float | None
) -> EpsModel:
    """The model that a method of `METHODS` corrects by the measurement, arguments as of `restore`."""
    _check_noise(noise)
    options: dict[str, float] = {} if scale is None else {"scale": scale}
    if options and method == "ddnm":
        raise ValueError(f"scale is of methods 'pigdm' and 'dps', got scale={scale} for method 'ddnm'")
    made: Callable[..., EpsModel] = METHODS[method]
    return made(model, operator, y, noise, **options)


def super_resolution(model: EpsModel, image: Tensor, sampler: str, *, factor: int, **how: Any) -> Result:
    """Sample images of `factor` times the size, whose means over blocks are the given image: `restore` with `Downsample`.

    Args:
        model: of samples of the larger size.
        image: (B, C, h, w) in the model's range.
        sampler: a registered name.
        factor: at least 1.
        how: all other arguments of `restore`.
    """
    check_tensor(model, "image", image)
    if image.ndim != 4:
        raise ValueError(f"image must be (B, C, h, w), got {tuple(image.shape)}")
    return restore(model, Downsample(factor), image, sampler, **how)


def _guided(model: EpsModel, pull: Callable[[Tensor, Scalar], Tensor], scale: float) -> EpsModel:
    """The model whose score gets the gradient, with respect to the state, of `scale` times the sum of `pull(x0, r^2)`."""
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale must be finite and at least 0, got {scale}")

    def correct(x: Tensor, alpha: Scalar, sigma: Scalar, predict: Predict) -> Tensor:
        # Tweedie: x0 = (x + sigma^2 score) / alpha. At alpha = 0, where x0 does not depend on the state, what is left of
        # sigma^2 / alpha times its derivative is the covariance of x0, which all of these take for r^2 I.
        blind = not isinstance(alpha, Tensor) and alpha == 0
        with torch.enable_grad():
            state = torch.clone(x.detach()).requires_grad_()
            x0 = predict(state)
            source = x0.detach().requires_grad_() if blind else x0
            likely = pull(source, _spread(alpha, sigma)).sum()
            (gradient,) = torch.autograd.grad(likely, source if blind else state)
        factor = _spread(alpha, sigma) if blind else sigma**2 / alpha
        return x0.detach() + per_sample(scale * factor, x) * gradient

    return Corrected(model, correct)


def _spread(alpha: Scalar, sigma: Scalar) -> Scalar:
    """`r^2 = sigma^2 / (alpha^2 + sigma^2)`: variance of x0 given the state, for data of covariance I."""
    return sigma**2 / (alpha**2 + sigma**2)


def _ridge(spread: Scalar, noise: float) -> Scalar:
    return noise**2 / spread if noise else 0.0


def _residual(operator: Callable[[Tensor], Tensor], y: Tensor, x0: Tensor) -> Tensor:
    """The residual `y - A x0`."""
    seen = operator(x0)
    check_beside("y", y, "the model's samples", x0)
    if y.shape[1:] != seen.shape[1:] or len(y) not in (1, len(seen)):
        raise ValueError(f"y must be of the shape that the operator gives, {tuple(seen.shape)}, got {tuple(y.shape)}")
    return y - seen


def _check_noise(noise: float) -> None:
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be finite and at least 0, got {noise}")
