"""Problems with exact epsilon for a benchmark: the models, and how their samples are judged by moments known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.data import load_images
from bench.ideal import ideal_denoiser
from bench.metrics import Moments
from bench.mixture import GaussianMixture
from bench.mixture_file import load_mixture
from bench.spectral import SpectralMixture
from distill.checkpoint import content_hash
from samplers.schedule import Schedule

CIFAR_MIXTURE = Path(__file__).parent / "assets" / "cifar10-mixture"
NAMES = ("gmm", "gmm-DIMENSION", "cifar10-gmm", "ideal:DATA")
_GRID = 8  # pixels of the thumbnail and of the detail, along a side
_BLOCK = 1024


@dataclass(frozen=True)
class Problem:
    """A model without error, and what its samples should be like.

    Attributes:
        name: as given.
        hash: what identifies the distribution.
        net: a schedule to a network `(x, t) -> epsilon` for `EpsModel(net, schedule, predicts="eps")`.
        shape: of a sample.
        metric: the column's name of the Frechet distance between features.
        features: samples (N, *shape) to features (N, d) float64.
        reference: the exact moments of the features of the data; count 0.
        sample: `(n, seed)` to exact samples of the data (n, *shape) float64, which tell the distance that chance gives.
        info: what the file of a fitted mixture says.
    """

    name: str
    hash: str
    net: Callable[[Schedule], Callable[[Tensor, Tensor], Tensor]]
    shape: tuple[int, ...]
    metric: str
    features: Callable[[Tensor], np.ndarray]
    reference: Moments
    sample: Callable[[int, int], Tensor]
    info: dict[str, Any] = field(default_factory=dict)


def load_problem(name: str) -> Problem | None:
    """A problem by name: "gmm", "gmm-16" (of that dimension), "cifar10-gmm", "ideal:" and a data set, or a fitted mixture's
    folder. None for any other name.

    Raises:
        ValueError: a dimension that is not a whole number from 1 on; data or a folder that cannot be read.
        FileNotFoundError: no such data.
    """
    kind, _, given = name.partition(":")
    if kind == "ideal" and given:
        return ideal_problem(given)
    if name == "gmm" or name.startswith("gmm-"):
        digits = name.removeprefix("gmm").removeprefix("-") or "2"
        if not (digits.isascii() and digits.isdecimal() and int(digits) >= 1) or name == "gmm-":
            raise ValueError(f"model {name!r}: give gmm-D with a dimension D of 1 or more, such as gmm-16")
        return gmm_problem(int(digits))
    if name == "cifar10-gmm":
        return cifar_mixture_problem()
    if (Path(name) / "mixture.safetensors").is_file():
        return mixture_problem(name)
    return None


def gmm_problem(dim: int = 2) -> Problem:
    """The standard mixture of `GaussianMixture.random` in any dimension, judged in all of it; "gmm" is the one of two."""
    mixture = GaussianMixture.random(dim=dim, components=5, seed=0)
    digest = content_hash({"means": mixture.means, "weights": mixture.weights})
    name = "gmm" if dim == 2 else f"gmm-{dim}"
    return Problem(
        name, digest, mixture.net, mixture.shape, "frechet", flat, Moments.of_mixture(mixture), mixture.sample
    )


@lru_cache(maxsize=1)
def cifar_mixture_problem() -> Problem:
    """The shipped mixture of 3 x 32 x 32 images, fitted to a JPEG copy of CIFAR-10."""
    return mixture_problem(CIFAR_MIXTURE, "cifar10-gmm")


def mixture_problem(folder: str | Path, name: str | None = None) -> Problem:
    """A mixture that `fewstep fit` wrote.

    Raises:
        distill.checkpoint.CheckpointError: a folder that cannot be used.
    """
    file = load_mixture(folder)
    mixture, features = file.mixture, _features_of(file.mixture.shape)
    linear = _as_matrix(features, mixture.shape)
    if isinstance(mixture, SpectralMixture):
        mean, covariance = mixture.moments_of(linear)
    else:
        mean, covariance = linear @ mixture.mean(), linear @ mixture.covariance() @ linear.T
    reference = Moments(mean.numpy(), _symmetric(covariance), 0)
    return Problem(
        *(name or str(folder), file.hash, mixture.net, mixture.shape, "fd_pixels"),
        *(_as_array(features), reference, mixture.sample, file.info),
    )


def ideal_problem(data: str | Path) -> Problem:
    """The ideal denoiser of a data set: its probability flow ends in the images themselves, which is what a sampler makes of a
    model that has learnt them by heart.

    Args:
        data: images, as `bench.data.load_images` takes them.

    Raises:
        FileNotFoundError, ValueError: as for `load_images`.
    """
    images = load_images(data).images
    ideal, features = ideal_denoiser(images), _features_of(images.shape[1:])
    mean, covariance = ideal.moments_of(features)
    reference = Moments(mean.numpy(), _symmetric(covariance), 0)
    digest = content_hash({"images": images})
    return Problem(
        *(f"ideal:{data}", digest, ideal.net, ideal.shape, "fd_pixels"),
        *(_as_array(features), reference, ideal.sample, {"images": len(images)}),
    )


def flat(samples: Tensor) -> np.ndarray:
    """All numbers of the samples as features."""
    return samples.detach().cpu().double().flatten(1).numpy()


def pixels(x: Tensor) -> Tensor:
    """Linear features of images (N, C, H, W): a thumbnail of 8 x 8 means, and the middle 8 x 8 pixels as they are.

    The one sees the large structure and the other the finest, which a thumbnail averages away; being linear, their moments
    over a mixture are exact. (N, 128 C); where an image has no more than 8 x 8 pixels, these.
    """
    height, width = x.shape[2:]
    if height <= _GRID and width <= _GRID:
        return x.flatten(1)
    rows, columns = min(_GRID, height), min(_GRID, width)
    thumbnail = torch.nn.functional.adaptive_avg_pool2d(x, (rows, columns))
    top, left = (height - rows) // 2, (width - columns) // 2
    return torch.cat([thumbnail.flatten(1), x[:, :, top : top + rows, left : left + columns].flatten(1)], 1)


def _features_of(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    return pixels if len(shape) == 3 else lambda x: x.flatten(1)


def _as_array(features: Callable[[Tensor], Tensor]) -> Callable[[Tensor], np.ndarray]:
    return lambda samples: features(samples.detach().cpu().double()).numpy()


def _as_matrix(features: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """The matrix (d, D) of linear features, float64."""
    eye = torch.eye(int(np.prod(shape)), dtype=torch.float64)
    return torch.cat([features(block.view(-1, *shape)) for block in eye.split(_BLOCK)]).T.contiguous()


def _symmetric(covariance: Tensor) -> np.ndarray:
    return (0.5 * (covariance + covariance.T)).numpy()
