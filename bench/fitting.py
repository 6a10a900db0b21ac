"""Mixtures of low-rank Gaussians fitted to images: exact models of image-sized data, by expectation maximisation (EM).

The model is a `SpectralMixture`: a mixture of probabilistic principal components (Tipping & Bishop 1999,
doi:10.1162/089976699300016728) of the cosine coefficients of largest variance, and one variance for each component and band of
the others. The fit is maximum likelihood of that model in whole images: the bands enter through their energy alone, so the
cost of an iteration does not grow with the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.mixture import GaussianMixture
from bench.spectral import SpectralMixture, bands_of, cosines, transformed
from samplers.noise import check_seed

DIMENSIONS, BANDS = 96, 96
_BLOCK = 4096  # images that are held as floating-point numbers at a time
_LLOYD = 10  # steps of k-means before EM
_NEGLIGIBLE = 1e-14  # a share of an image that no sum in float64 would show
_FLOOR = (2 / 255) ** 2 / 12  # variance of the rounding to 8 bits: no direction of an image has less
_TOLERANCE = 1e-5  # nats for each number of an image; an iteration that gains less is the last


class Step(NamedTuple):
    """What one iteration of EM found.

    Attributes:
        iteration: from 0.
        log_likelihood: of the model that the iteration started from, nats for each image. It never falls, except by an
            iteration after one that re-seeded.
        reseeded: components that held too few images after the iteration, and were put elsewhere.
    """

    iteration: int
    log_likelihood: float
    reseeded: int


class _Coefficients(NamedTuple):
    """Images as their cosine coefficients, of which those in bands enter by their energy alone."""

    y: Tensor  # (N, d)
    energy: Tensor  # (N, G): sums of squares in each band
    sizes: Tensor  # (G,): coefficients in each band

    @property
    def dim(self) -> int:
        """D, all coefficients."""
        return self.y.shape[1] + int(self.sizes.sum())


class _State(NamedTuple):
    """The parameters; variances are in all, not on top of the residual."""

    weights: Tensor  # (K,)
    means: Tensor  # (K, d)
    basis: Tensor  # (K, d, r)
    variances: Tensor  # (K, r), descending
    residual: Tensor  # (K,)
    outside: Tensor  # (K, G)


def fit_mixture(
    images: np.ndarray,
    components: int,
    rank: int,
    seed: int = 0,
    iterations: int = 100,
    dimensions: int = DIMENSIONS,
    bands: int = BANDS,
    progress: Callable[[Step], None] | None = None,
) -> SpectralMixture:
    """Fit a mixture to images; the same arguments on the same machine give the same mixture.

    The start is k-means++ (Arthur & Vassilvitskii 2007) and some steps of k-means. In the first half of the iterations a
    component that holds fewer than `2 (rank + 1)` images is put on one half of the heaviest one.

    Args:
        images: (N, C, H, W) uint8, taken as [-1, 1]; or floating numbers (N, ...), taken as they are.
        components: K, 1 <= K <= N / (2 (rank + 1)).
        rank: directions of each component with a variance of their own, 1 <= rank < dimensions.
        seed: of the start, >= 0.
        iterations: of EM, >= 1; it ends before where one gains less than 1e-5 nats for each number of an image.
        dimensions: d, the coefficients of largest variance that are not in bands; D where it is beyond.
        bands: G >= 1, groups of the others by their variance; as many as there are others, where those are fewer.
        progress: called after each iteration, and once with the result.

    Raises:
        ValueError: an argument out of range.
        TypeError: images of another type.
    """
    _check_images(images)
    dim = math.prod(images.shape[1:])
    dimensions = min(dimensions, dim)
    bands = min(bands, dim - dimensions)
    _check_sizes(len(images), components, rank, iterations, dimensions)
    rng = np.random.default_rng(check_seed(seed))
    centre, order, data = _transform(images, dimensions, bands)
    state = _start(data, components, rank, rng)
    least, before = 2.0 * (rank + 1) / len(images), -math.inf
    for iteration in range(iterations):
        shares, log_likelihood = _expect(state, data)
        state, reseeded = _maximise(shares, data, rank), 0
        if iteration < iterations // 2:
            state, reseeded = _reseed(state, least)
        if progress is not None:
            progress(Step(iteration, log_likelihood, reseeded))
        gain, before = log_likelihood - before, math.inf if reseeded else log_likelihood
        if abs(gain) < _TOLERANCE * dim:
            break
    if progress is not None:
        progress(Step(iteration + 1, _expect(state, data)[1], 0))
    variances = state.variances - state.residual[:, None]
    inside = GaussianMixture(state.weights, state.means, state.residual, state.basis, variances.clamp(min=0.0))
    return SpectralMixture(inside, centre, order, state.outside)


def log_likelihood(mixture: SpectralMixture, images: np.ndarray) -> float:
    """The mean log-likelihood of images, taken as `fit_mixture` takes them, in nats for each image."""
    return sum(float(mixture.log_prob(block).sum()) for block in _rows(images)) / len(images)


def bits_per_number(nats: float, dim: int) -> float:
    """A log-likelihood of images in [-1, 1] with D numbers as bits for each number of 8 bits, of which 2 / 255 is one level."""
    return -nats / (dim * math.log(2)) - math.log2(2 / 255)


def _rows(images: np.ndarray) -> Iterator[Tensor]:
    """Blocks of images in float64, bytes as [-1, 1]."""
    for start in range(0, len(images), _BLOCK):
        block = torch.from_numpy(np.ascontiguousarray(images[start : start + _BLOCK]))
        yield block.double() / 127.5 - 1 if block.dtype == torch.uint8 else block.double()


def _transform(images: np.ndarray, dimensions: int, bands: int) -> tuple[Tensor, Tensor, _Coefficients]:
    """The mean image, the order of the coefficients by falling variance, and the coefficients of the images."""
    count, shape = len(images), images.shape[1:]
    matrices = tuple(cosines(size) for size in shape)
    centre, squares = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for block in _rows(images):
        centre += block.sum(0) / count
    for block in _rows(images):
        squares += (transformed(block - centre, matrices) ** 2).sum(0)
    order = squares.flatten().argsort(descending=True, stable=True)
    members = torch.nn.functional.one_hot(bands_of(len(order) - dimensions, bands), max(bands, 1))[:, :bands].double()
    coordinates, energies = [], []
    for block in _rows(images):
        ordered = transformed(block - centre, matrices).flatten(1)[:, order]
        coordinates.append(ordered[:, :dimensions].clone())
        energies.append(ordered[:, dimensions:] ** 2 @ members)
    return centre, order, _Coefficients(torch.cat(coordinates), torch.cat(energies), members.sum(0))


def _start(data: _Coefficients, components: int, rank: int, rng: np.random.Generator) -> _State:
    """The state that k-means leads to, in a metric of about one nat: coefficients by their width, and bands by the logarithm
    of their energy, as often as they have coefficients.
    """
    level = (data.energy / data.sizes).clamp(min=_FLOOR).log() * (0.5 * data.sizes.sqrt())
    width = data.y.var(0, correction=0).clamp(min=_FLOOR).sqrt()
    points = torch.cat([data.y / width, level], 1)
    centres = _spread_centres(points, components, rng)
    for _ in range(_LLOYD):
        nearest = _distances(points, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=components)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    nearest = _distances(points, centres).argmin(1)
    return _maximise(torch.nn.functional.one_hot(nearest, components).double(), data, rank)


def _spread_centres(y: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """k-means++: each further centre is a point drawn with a probability as its squared distance from those before."""
    chosen = [int(rng.integers(len(y)))]
    distance = torch.full((len(y),), math.inf, dtype=y.dtype)
    for _ in range(count - 1):
        distance = torch.minimum(distance, _distances(y, y[chosen[-1:]])[:, 0])
        total = torch.cumsum(distance, 0)
        chosen.append(min(int(torch.searchsorted(total, rng.random() * float(total[-1]), right=True)), len(y) - 1))
    return y[chosen]


def _distances(y: Tensor, centres: Tensor) -> Tensor:
    """Squared distances (N, K)."""
    return ((y**2).sum(1, keepdim=True) - 2 * (y @ centres.T) + (centres**2).sum(1)).clamp_(min=0.0)


def _expect(state: _State, data: _Coefficients) -> tuple[Tensor, float]:
    """The E step: the share (N, K) of each component in each image, and the mean log-likelihood."""
    dim, rank = state.basis.shape[1:]
    # |y - m|^2 / residual minus this product, squared, is the distance in the component's own covariance
    scaled = state.basis * (1 / state.residual[:, None] - 1 / state.variances).clamp(min=0.0).sqrt()[:, None, :]
    wide = scaled.transpose(0, 1).flatten(1)
    shift = torch.einsum("kd,kdr->kr", state.means, scaled).flatten()
    constant = state.variances.log().sum(1) + (dim - rank) * state.residual.log() + state.outside.log() @ data.sizes
    constant += data.dim * math.log(2 * math.pi)
    shares, total = [], 0.0
    for y, energy in zip(data.y.split(_BLOCK), data.energy.split(_BLOCK), strict=True):
        along = ((y @ wide).sub_(shift).square_()).view(len(y), -1, rank).sum(2)
        distance = _distances(y, state.means) / state.residual - along + energy @ (1 / state.outside).T
        joint = state.weights.log() - 0.5 * (constant + distance)
        likelihood = torch.logsumexp(joint, 1)
        shares.append(torch.exp(joint - likelihood[:, None]))
        total += float(likelihood.sum())
    return torch.cat(shares), total / len(data.y)


def _maximise(shares: Tensor, data: _Coefficients, rank: int) -> _State:
    """The M step: principal components of each component's share of the images. One that has no image left is dropped."""
    parts: list[tuple[Tensor, ...]] = []
    for share in shares.T:
        held = torch.nonzero(share > _NEGLIGIBLE)[:, 0]
        if not len(held):
            continue
        share, y = share[held], data.y[held]
        count = share.sum()
        mean = share @ y / count
        root = (y - mean).mul_(share.sqrt()[:, None])
        values, vectors = torch.linalg.eigh(root.T @ root / count)
        values, vectors = values.flip(0).clamp(min=_FLOOR), vectors.flip(1)
        outside = share @ data.energy[held] / (count * data.sizes)
        residual = values[rank:].mean()
        parts.append((count, mean, vectors[:, :rank], values[:rank], residual, outside.clamp(min=_FLOOR)))
    state = _State(*(torch.stack(column) for column in zip(*parts, strict=True)))
    return state._replace(weights=state.weights / state.weights.sum())


def _reseed(state: _State, least: float) -> tuple[_State, int]:
    """Components of a weight below `least` put on the heaviest ones, which move aside along their longest axis."""
    starved = torch.nonzero(state.weights < least)[:, 0].tolist()
    state = _State(*(value.clone() for value in state))
    for k in starved:
        heaviest = int(state.weights.argmax())
        for value in state:
            value[k] = value[heaviest]
        state.weights[[k, heaviest]] /= 2
        aside = state.variances[k, 0].sqrt() * state.basis[k, :, 0]
        state.means[k] += aside
        state.means[heaviest] -= aside
    return state._replace(weights=state.weights / state.weights.sum()), len(starved)


def _check_images(images: np.ndarray) -> None:
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise TypeError(f"images must be uint8 or floating, got {images.dtype}")
    if images.ndim < 2 or images.size == 0 or not (images.dtype == np.uint8 or np.isfinite(images).all()):
        raise ValueError(f"images must be (N, ...) and finite, N >= 1, got {images.shape} {images.dtype}")


def _check_sizes(count: int, components: int, rank: int, iterations: int, dimensions: int) -> None:
    for name, value in (("components", components), ("rank", rank), ("iterations", iterations)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if rank >= dimensions:
        raise ValueError(f"rank must be below the dimensions that are not in bands, {dimensions}, got {rank}")
    if components * 2 * (rank + 1) > count:
        most = count // (2 * (rank + 1))
        raise ValueError(f"components must be at most {most} for {count} images and rank {rank}, got {components}")
