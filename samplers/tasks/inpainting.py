"""Inpainting and outpainting: sampling where part of the image is given."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from samplers.job import Result
from samplers.model import EpsModel, Scalar
from samplers.tasks.conditional import Corrected, Predict
from samplers.tasks.resampling import prepare_resampled
from samplers.tasks.states import broadcasts, check_beside, check_tensor, noised


def with_known(model: EpsModel, image: Tensor, mask: Tensor) -> EpsModel:
    """The model with x0 replaced by the image where that is known: `x0 <- mask x0 + (1 - mask) image`.

    A sampler then carries the known part along the forward process of the image, whatever noise it started from: this is
    the projection of DDNM (Wang et al. 2022, arXiv:2212.00490, section 3.2) for a mask.

    Args:
        model: the epsilon-model.
        image: (B, ...), or (1, ...) for all samples.
        mask: in [0, 1], 1 where the model paints and 0 where the image is kept; broadcasts against image.

    Raises:
        ValueError, TypeError: a mask of another size or on another device than image, values outside [0, 1]; not a model.
    """
    mask = checked_mask(mask, image)
    keep = 1.0 - mask

    def correct(x: Tensor, alpha: Scalar, sigma: Scalar, predict: Predict) -> Tensor:
        return predict(x) * mask + image * keep

    return Corrected(model, correct)


def inpaint(
    model: EpsModel,
    image: Tensor,
    mask: Tensor,
    sampler: str,
    *,
    strength: float = 1.0,
    resamplings: int = 1,
    jump: int = 1,
    x_T: Tensor | None = None,
    **how: Any,
) -> Result:
    """Paint the masked part of an image anew, so that it fits the rest.

    The model is wrapped by `with_known`, and with `resamplings` above 1 the sampler's plan goes over every `jump` steps several
    times with fresh noise, which lets the painted part come to terms with the known one (RePaint, Lugmayr et al. 2022,
    arXiv:2201.09865; theirs are 10 and 10 on 250 steps of `ddpm`). In the result the known part is the image, to the bit.

    Args:
        model: the epsilon-model.
        image: (B, ...) in the model's range; at full strength, what it holds under the mask does not matter.
        mask: bool, or numbers in [0, 1]: 1 where to paint, 0 where the image is kept, between them a blend; (H, W), or any shape
            that broadcasts against image.
        sampler: a registered name.
        strength: as in `img2img`: below 1, sampling starts from the noised image, also under the mask.
        resamplings: how often each `jump` steps are taken; 1 is once.
        jump: steps that are taken back at once.
        x_T: start states (B, ...); None: noised from `seed`, and where the image is known around it.
        how: all other arguments of `samplers.sample`; `nfe` is the budget of the whole, resampling included.

    Returns:
        The samples, with the nodes and network calls that were executed.

    Raises:
        ValueError, TypeError: as `samplers.sample`; a mask of another size, or on another device than image; resampling with an
            error-controlled sampler or afs, or jump not less than the steps.
    """
    check_tensor(model, "image", image)
    mask = checked_mask(mask, image)
    job, plan = prepare_resampled(model, sampler, resamplings, jump, how, strength)
    if x_T is None:
        x_T = noised(job.grid, image if strength < 1 else image * (1.0 - mask), job.noise(image))
    check_tensor(model, "x_T", x_T)
    if x_T.shape != image.shape:
        raise ValueError(f"x_T must be of the shape of image, {tuple(image.shape)}, got {tuple(x_T.shape)}")
    result = job.run(with_known(model, image, mask), x_T, plan)
    painted = torch.where(mask == 0, image, result.x * mask + image * (1.0 - mask))
    return dataclasses.replace(result, x=painted)


def outpaint(
    model: EpsModel,
    image: Tensor,
    sampler: str,
    *,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    **how: Any,
) -> Result:
    """Paint around an image: `extended`, then `inpaint`.

    Args:
        model: of samples of the larger size.
        image: (B, C, H, W).
        sampler: a registered name.
        left, right, top, bottom: pixels to paint on each side; not all 0.
        how: all other arguments of `inpaint`.

    Returns:
        Samples (B, C, H + top + bottom, W + left + right), the image unchanged within them.

    Raises:
        ValueError, TypeError: as `inpaint`; sides that are negative or all 0.
    """
    check_tensor(model, "image", image)
    canvas, mask = extended(image, left=left, right=right, top=top, bottom=bottom)
    return inpaint(model, canvas, mask, sampler, **how)


def extended(image: Tensor, *, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0) -> tuple[Tensor, Tensor]:
    """A larger canvas with an image in it, of zeros elsewhere, and the mask (H', W') bool that is true around the image.

    Raises:
        ValueError: not an image (B, C, H, W), or sides that are negative or all 0.
    """
    sides = {"left": left, "right": right, "top": top, "bottom": bottom}
    for name, pixels in sides.items():
        if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 0:
            raise ValueError(f"{name} must be a whole number of pixels, at least 0, got {pixels!r}")
    if not any(sides.values()):
        raise ValueError("one of left, right, top and bottom must be positive, got none")
    if image.ndim != 4:
        raise ValueError(f"image must be (B, C, H, W), got shape {tuple(image.shape)}")
    canvas = torch.nn.functional.pad(image, (left, right, top, bottom))
    mask = torch.ones(canvas.shape[2:], dtype=torch.bool, device=image.device)
    mask[top : top + image.shape[2], left : left + image.shape[3]] = False
    return canvas, mask


def checked_mask(mask: Tensor, image: Tensor) -> Tensor:
    """The mask in the dtype of image, of its number of dimensions.

    Raises:
        TypeError: not a tensor of bool or floating-point numbers.
        ValueError: it does not broadcast against image, lies on another device, or has values outside [0, 1].
    """
    check_beside("mask", mask, "image", image)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be of bool or floating-point numbers in [0, 1], got {mask.dtype}")
    if not broadcasts(mask.shape, image.shape):
        raise ValueError(
            f"mask must be of the size of image, {tuple(image.shape)}, or broadcast against it, got {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool and not ((mask >= 0) & (mask <= 1)).all():
        raise ValueError(f"mask must lie in [0, 1], got {float(mask.min()):g} to {float(mask.max()):g}")
    return mask.to(image.dtype).view(*[1] * (image.ndim - mask.ndim), *mask.shape)
