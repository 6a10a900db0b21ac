"""Linear operators of inverse problems, `y = A x + noise`, each with its regularised pseudo-inverse.

`operator(x)` is A x, and `operator.pinv(y, ridge)` is `A^T (A A^T + ridge I)^-1 y`: the pseudo-inverse for ridge = 0 (then
`A pinv(A x) = A x`), and for `ridge = noise^2 / r^2` the posterior mean of an x that is N(0, r^2 I) beforehand.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from samplers.model import Scalar
from samplers.tasks.states import broadcasts, check_beside, per_sample

_RCOND = 1e-4  # singular values below this share of the largest are taken for zero


class Operator(ABC):
    """A linear map from states x (B, ...) to measurements y (B, ...)."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A x.

        Raises:
            ValueError: x of a shape that the operator does not take, or on another device than what it is made of.
        """

    @abstractmethod
    def pinv(self, y: Tensor, ridge: Scalar = 0.0) -> Tensor:
        """`A^T (A A^T + ridge I)^-1 y`, of x's shape.

        Args:
            y: (B, ...).
            ridge: at least 0; a tensor has one for each sample.

        Raises:
            ValueError: y of a shape that no x has, or on another device than what the operator is made of.
        """

    @property
    @abstractmethod
    def gain(self) -> float:
        """Mean eigenvalue of `A A^T`: how far A scales a change of x, squared."""


@dataclass(frozen=True, eq=False)
class Mask(Operator):
    """Some of the numbers are known: `y = known * x` (inpainting).

    Attributes:
        known: bool or 0 and 1; broadcasts against x.
    """

    known: Tensor

    def __post_init__(self) -> None:
        of_bits = isinstance(self.known, Tensor) and (
            self.known.is_meta or ((self.known == 0) | (self.known == 1)).all()
        )
        if not of_bits:
            raise ValueError("known must be a tensor of bool, or of 0 and 1")

    def __call__(self, x: Tensor) -> Tensor:
        """The known numbers, zeros elsewhere."""
        known = _like("known", self.known, x)
        if not broadcasts(known.shape, x.shape):
            raise ValueError(f"known must broadcast against the samples, {tuple(x.shape)}, got {tuple(known.shape)}")
        return x * known

    def pinv(self, y: Tensor, ridge: Scalar = 0.0) -> Tensor:
        """`known * y / (1 + ridge)`, as `A A^T` is the identity on what is known."""
        return self(y) / (1.0 + per_sample(ridge, y))

    @property
    def gain(self) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True)
class Downsample(Operator):
    """Means over blocks of `factor` x `factor` pixels (super-resolution).

    Attributes:
        factor: at least 1; divides height and width.
    """

    factor: int

    def __post_init__(self) -> None:
        _check_whole("factor", self.factor)

    def __call__(self, x: Tensor) -> Tensor:
        """Means over blocks, (B, C, H / factor, W / factor)."""
        if x.ndim != 4 or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"x must be (B, C, H, W) with sides divisible by {self.factor}, got {tuple(x.shape)}")
        return torch.nn.functional.avg_pool2d(x, self.factor)

    def pinv(self, y: Tensor, ridge: Scalar = 0.0) -> Tensor:
        """Every mean over its block, shrunk by `1 + factor^2 ridge`, as `A A^T = I / factor^2`."""
        _check_images("y", y)
        wide = y.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)
        return wide / (1.0 + self.factor**2 * per_sample(ridge, wide))

    @property
    def gain(self) -> float:
        """`1 / factor^2`."""
        return 1.0 / self.factor**2


@dataclass(frozen=True)
class Grey(Operator):
    """A weighted sum of the channels (colourisation).

    Attributes:
        weights: one for each channel; by default those of luma, ITU-R BT.601.
    """

    weights: tuple[float, ...] = (0.299, 0.587, 0.114)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
        if not self.weights or not any(self.weights) or not all(map(math.isfinite, self.weights)):
            raise ValueError(f"weights must be finite numbers, not all 0, got {self.weights}")

    def __call__(self, x: Tensor) -> Tensor:
        """The weighted sum, (B, 1, H, W)."""
        if x.ndim != 4 or x.shape[1] != len(self.weights):
            raise ValueError(f"x must be (B, {len(self.weights)}, H, W), got {tuple(x.shape)}")
        return (x * self._row(x)).sum(1, keepdim=True)

    def pinv(self, y: Tensor, ridge: Scalar = 0.0) -> Tensor:
        """`weights y / (|weights|^2 + ridge)`."""
        _check_images("y", y, channels=1)
        return y * self._row(y) / (self.gain + per_sample(ridge, y))

    @property
    def gain(self) -> float:
        """`|weights|^2`."""
        return sum(w * w for w in self.weights)

    def _row(self, like: Tensor) -> Tensor:
        return torch.tensor(self.weights, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


@dataclass(frozen=True, eq=False)
class Blur(Operator):
    """Convolution of every channel with one kernel, around the image's borders (deblurring).

    Frequencies that the kernel leaves less than 1e-4 of the strongest of are lost to the pseudo-inverse.

    Attributes:
        kernel: (h, w), both odd and at most the image's sides; on the device of the images, or on the CPU.
    """

    kernel: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, Tensor) or self.kernel.ndim != 2 or not all(n % 2 for n in self.kernel.shape):
            shape = getattr(self.kernel, "shape", None)
            raise ValueError(
                f"kernel must be a tensor (h, w) with odd sides, got {self.kernel if shape is None else tuple(shape)}"
            )
        empty = not self.kernel.is_meta and not (torch.isfinite(self.kernel).all() and self.kernel.any())
        if not self.kernel.is_floating_point() or empty:
            raise ValueError("kernel must be of finite floating-point numbers, not all 0")

    @classmethod
    def gaussian(cls, std: float, size: int | None = None) -> Blur:
        """A Gaussian kernel of sum 1.

        Args:
            std: in pixels, positive.
            size: of a side, odd; None reaches three standard deviations.
        """
        if not 0 < std < math.inf:
            raise ValueError(f"std must be positive and finite, got {std}")
        size = 2 * math.ceil(3 * std) + 1 if size is None else size
        _check_whole("size", size)
        line = torch.exp(-0.5 * (torch.arange(size, dtype=torch.float64) - size // 2).square() / std**2)
        kernel = line[:, None] * line
        return cls(kernel / kernel.sum())

    def __call__(self, x: Tensor) -> Tensor:
        """The blurred images, shape of x."""
        return self._filtered(x, self._response(x))

    def pinv(self, y: Tensor, ridge: Scalar = 0.0) -> Tensor:
        """The filter `conj(H) / (|H|^2 + ridge)`, H the kernel's Fourier transform."""
        response = self._response(y)
        power = response.abs().square()
        kept = power > _RCOND**2 * power.max()
        total = power + per_sample(ridge, y)
        return self._filtered(y, torch.where(kept, response.conj() / total, torch.zeros_like(response)))

    @cached_property
    def gain(self) -> float:
        """Mean of `|H|^2`, which is the sum of the kernel's squares."""
        return float(self.kernel.double().square().sum())  # Parseval

    def _response(self, like: Tensor) -> Tensor:
        """The kernel's Fourier transform (H, W // 2 + 1) for images of this size."""
        _check_images("x", like)
        (h, w), (height, width) = self.kernel.shape, like.shape[2:]
        if h > height or w > width:
            raise ValueError(f"kernel {(h, w)} must fit into the image, of {(height, width)} pixels")
        kernel = self.kernel
        if kernel.device.type == "cpu":  # where `gaussian` makes it
            kernel = kernel.to(like)
        canvas = torch.nn.functional.pad(_like("kernel", kernel, like), (0, width - w, 0, height - h))
        return torch.fft.rfft2(canvas.roll((-(h // 2), -(w // 2)), (0, 1)))

    @staticmethod
    def _filtered(x: Tensor, response: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * response, s=x.shape[2:])


@dataclass(frozen=True, eq=False)
class Matrix(Operator):
    """Any linear map, as a matrix on the numbers of a sample.

    Attributes:
        matrix: (m, D).
        shape: of one sample, with D numbers in it.
    """

    matrix: Tensor
    shape: Sequence[int]

    def __post_init__(self) -> None:
        if not isinstance(self.matrix, Tensor) or self.matrix.ndim != 2 or not self.matrix.is_floating_point():
            raise ValueError("matrix must be a floating-point tensor (m, D)")
        if self.matrix.shape[1] != math.prod(self.shape):
            raise ValueError(
                f"matrix must be (m, {math.prod(self.shape)}) for samples of shape {tuple(self.shape)}, got "
                f"{tuple(self.matrix.shape)}"
            )

    def __call__(self, x: Tensor) -> Tensor:
        """`matrix x`, (B, m)."""
        if x.shape[1:] != tuple(self.shape):
            raise ValueError(f"x must be (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        return x.flatten(1) @ _like("matrix", self.matrix, x).mT

    def pinv(self, y: Tensor, ridge: Scalar = 0.0) -> Tensor:
        """By the singular value decomposition, made once."""
        if y.ndim != 2 or y.shape[1] != len(self.matrix):
            raise ValueError(f"y must be (B, {len(self.matrix)}), got {tuple(y.shape)}")
        check_beside("matrix", self.matrix, "the samples", y)
        left, singular, right = (part.to(y) for part in self._svd)
        return ((y @ left) * (singular / (singular**2 + per_sample(ridge, y))) @ right).view(len(y), *self.shape)

    @cached_property
    def gain(self) -> float:
        """`|matrix|^2 / m`."""
        return float(self.matrix.double().square().sum()) / len(self.matrix)

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        left, singular, right = torch.linalg.svd(self.matrix.double(), full_matrices=False)
        kept = singular > _RCOND * singular.max()
        return left[:, kept], singular[kept], right[kept]


def _like(name: str, part: Tensor, samples: Tensor) -> Tensor:
    """A tensor of an operator in the dtype of the samples, whose device it must be on."""
    check_beside(name, part, "the samples", samples)
    return part.to(samples)


def _check_whole(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")


def _check_images(name: str, value: Tensor, channels: int | None = None) -> None:
    if value.ndim != 4 or channels not in (None, value.shape[1]):
        raise ValueError(f"{name} must be (B, {channels or 'C'}, H, W), got {tuple(value.shape)}")
