"""The features that a Frechet distance is measured with, and the reference statistics of the data in them.

The standard FID of Heusel et al. 2017, arXiv:1706.08500, takes its features from an Inception-v3 that was trained on
photographs, to which all digits look alike. Here the features come from a classifier of the digits themselves, so a
distance between them is called `fd_mnist_cnn`, never FID, and compares with numbers of the same extractor only.
"""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bench.metrics import Moments
from bench.shipped import ASSETS
from distill.checkpoint import CheckpointError, content_hash, load_weights, read_json, read_tensors, write_folder

FORMAT = 1
EXTRACTORS = {"mnist_cnn": ASSETS / "mnist-features"}
STATISTICS = {"mnist": ASSETS / "mnist-stats"}
ROUNDING = (
    "samples are clipped to [-1, 1] and rounded to 8 bits, ties to the even level, before their features are taken"
)
Shape = tuple[int, int, int] | Literal["any"]  # (C, H, W) of the images, or any size of 1 or 3 channels


class Extractor(Protocol):
    """Whatever turns images into the features that a distance is between.

    One that classifies also has `classify(images, batch_size)`, the most probable class (N,) int64, or
    `probabilities(images, batch_size)`, (N, classes), or both.
    """

    @property
    def name(self) -> str:
        """As in a table's column, `fd_<name>`."""
        ...

    @property
    def hash(self) -> str:
        """What identifies the weights and the preprocessing."""
        ...

    @property
    def dims(self) -> int:
        """Number of features."""
        ...

    @property
    def shape(self) -> Shape:
        """(C, H, W) of the images it takes, or "any"."""
        ...

    def features(self, images: np.ndarray | Tensor, batch_size: int = ...) -> np.ndarray:
        """Features (N, dims), float32 or float64, of images (N, C, H, W): uint8, or floating in [-1, 1]."""
        ...


class ImageClassifier(nn.Module):
    """A convolutional classifier of small images; as shipped, of digits, it has 266 000 parameters.

    As in the standard FID, the features are the last convolution's activations averaged over the image; here each is
    shifted and scaled to mean 0 and variance 1 over the training set. The classifier's hidden layer was tried too and is
    too forgiving: it is trained to see the digit and not the stroke, and gives soft or speckled digits nearly the
    distance of clean ones. Strided convolutions instead of pooling halve the time.

    Args:
        width: channels of the first level; each further one has twice as many.
        hidden: units of the layer between convolutions and logits.
        channels, size: of the images; `size` is a multiple of `2 ** levels`.
        classes: number of labels.
        levels: pairs of convolutions, of which the second halves the image.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self, width: int = 32, hidden: int = 64, channels: int = 1, size: int = 28, classes: int = 10, levels: int = 2
    ) -> None:
        super().__init__()
        given = {"width": width, "hidden": hidden, "channels": channels, "size": size, "classes": classes}
        for name, value in {**given, "levels": levels}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if size % 2**levels:
            raise ValueError(f"size must be a multiple of 2 ** levels = {2**levels}, got {size}")
        self.arguments: dict[str, Any] = {**given, "levels": levels}
        self.shape = (channels, size, size)
        self.classes = classes
        widths = [channels, *(width * 2**level for level in range(levels))]
        self.dims = widths[-1]
        pairs = itertools.pairwise(widths)
        self.convolutions = nn.Sequential(
            *(layer for i, o in pairs for layer in (*_convolution(i, o), *_convolution(o, o, stride=2)))
        )
        self.projection = nn.Linear(self.dims * (size // 2**levels) ** 2, hidden, bias=False)
        self.normalisation = nn.BatchNorm1d(hidden, affine=False)
        self.head = nn.Linear(hidden, classes)
        self.register_buffer("feature_mean", torch.zeros(self.dims))
        self.register_buffer("feature_std", torch.ones(self.dims))
        # Convolutions follow the layout of their weights; this one is nearly twice as fast on a CPU.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def pooled(self, x: Tensor) -> Tensor:
        """The last convolution's activations averaged over images (B, C, H, W) in [-1, 1]: (B, dims)."""
        return self.convolutions(x).mean((2, 3))

    def features(self, x: Tensor) -> Tensor:
        """Features (B, dims) of images (B, C, H, W) in [-1, 1]."""
        return (self.pooled(x) - self.feature_mean) / self.feature_std

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [-1, 1]."""
        return self.head(self.normalisation(self.projection(self.convolutions(x).flatten(1))).relu())


def _convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def quantise(images: np.ndarray | Tensor) -> Tensor:
    """Images as the 8-bit values a PNG holds: -1 is 0, 1 is 255, values outside are clipped, ties go to the even level.

    Args:
        images: any shape; floating in [-1, 1], or uint8, which is returned as it is.

    Raises:
        TypeError: another dtype.
        ValueError: a NaN or an infinity.
    """
    if not isinstance(images, Tensor):
        images = torch.from_numpy(
            np.array(images, order="C")
        )  # a copy: torch takes neither read-only nor flipped arrays
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise TypeError(f"images must be floating in [-1, 1] or uint8, got {images.dtype}")
    if not images.isfinite().all():
        raise ValueError("images hold a NaN or an infinity, which has no 8-bit value")
    images = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def dequantise(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1], the inverse of `quantise` on the 256 levels."""
    return images.float() / 127.5 - 1


@dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """A network whose features are compared, with what identifies it.

    Attributes:
        name: as in a table's column, `fd_<name>`.
        network: in evaluation mode, on the device the features are computed on.
        hash: `content_hash` of the weights in float32.
        info: how it was trained and how accurate it is.
    """

    name: str
    network: ImageClassifier
    hash: str
    info: dict[str, Any]

    @property
    def dims(self) -> int:
        """Number of features."""
        return self.network.dims

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images it takes."""
        return self.network.shape

    def features(self, images: np.ndarray | Tensor, batch_size: int = 250) -> np.ndarray:
        """Features (N, dims) float64 of images (N, C, H, W), which are `quantise`d first.

        Images in memory and the PNGs saved from them so have the same features.

        Args:
            images: floating in [-1, 1] (values outside are clipped), or uint8.
            batch_size: how many go through the network at a time; changes the result by rounding only, below 1e-5.

        Raises:
            TypeError: images of another dtype.
            ValueError: images of another shape, or with a NaN or an infinity, or a batch_size below 1.
        """
        return self._apply(self.network.features, images, batch_size, np.empty((len(images), self.dims)))

    def classify(self, images: np.ndarray | Tensor, batch_size: int = 250) -> np.ndarray:
        """Most probable class (N,) int64 of images (N, C, H, W); arguments and errors as in `features`."""
        out = np.empty(len(images), dtype=np.int64)
        return self._apply(lambda x: self.network(x).argmax(1), images, batch_size, out)

    def probabilities(self, images: np.ndarray | Tensor, batch_size: int = 250) -> np.ndarray:
        """Probabilities of the classes (N, classes) float64 of images (N, C, H, W); arguments and errors as in `features`."""
        out = np.empty((len(images), self.network.classes))
        return self._apply(lambda x: self.network(x).double().softmax(1), images, batch_size, out)

    def _apply(
        self, function: Callable[[Tensor], Tensor], images: np.ndarray | Tensor, batch_size: int, out: np.ndarray
    ) -> np.ndarray:
        """Fill the rows of `out` with `function` of the images, quantised, in [-1, 1], a batch at a time."""
        weight = self.network.head.weight
        check_images(images, self.shape)
        # The caller's autocast would halve the digits of the features.
        with torch.autocast(weight.device.type, enabled=False):
            return by_batches(
                lambda x: function(dequantise(x.to(weight.device)).to(weight.dtype)), images, batch_size, out
            )


def check_images(images: np.ndarray | Tensor, shape: Shape) -> None:
    """Raise ValueError where images are not (N, *shape)."""
    found = tuple(images.shape)
    if shape == "any":
        if len(found) != 4 or found[1] not in (1, 3) or 0 in found[1:]:
            raise ValueError(f"images must be (N, 1 or 3, H, W), got {found}")
    elif found[1:] != shape:
        raise ValueError(f"images must be (N, {', '.join(map(str, shape))}), got {found}")


def by_batches(
    function: Callable[[Tensor], Tensor], images: np.ndarray | Tensor, batch_size: int, out: np.ndarray
) -> np.ndarray:
    """Fill the rows of `out` with `function` of the uint8 images, a batch at a time, without gradients.

    Raises:
        TypeError, ValueError: as for `quantise`, or a batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            out[rows] = function(quantise(images[rows])).cpu().numpy()
    return out


def load_extractor(name_or_path: str | Path = "mnist_cnn", device: str | torch.device = "cpu") -> FeatureExtractor:
    """A shipped extractor by name, or one from a folder that `save_extractor` wrote.

    Raises:
        ValueError: an unknown name.
        CheckpointError: a missing, truncated, altered or pickled file, an unknown format, or weights of another
            architecture.
    """
    folder = _find(name_or_path, EXTRACTORS, "feature extractor")
    config = _read_config(folder)
    network = _build(config.get("network"), folder)
    source = folder / "model.safetensors"
    weights = {key: v.float() if v.is_floating_point() else v for key, v in read_tensors(source).items()}
    load_weights(network, weights, source)
    found = content_hash(network.state_dict())
    if config.get("hash") != found:
        raise CheckpointError(f"{source} has hash {found}, its config says {config.get('hash')!r}: it was altered")
    # On a GPU a float32 convolution may be TF32, with 3 digits; float64 never is.
    dtype = torch.float64 if torch.device(device).type == "cuda" else torch.float32
    network = network.to(device, dtype).eval().requires_grad_(False)
    return FeatureExtractor(str(config.get("name")), network, found, config.get("info", {}))


def save_extractor(folder: str | Path, name: str, network: ImageClassifier, info: dict[str, Any]) -> None:
    """Save `network` in half precision; `train_classifier` returns one that this does not change."""
    weights = {key: v.half() if v.is_floating_point() else v for key, v in network.state_dict().items()}
    config = {
        "format": FORMAT,
        "name": name,
        "network": {"class": type(network).__name__, **network.arguments},
        "hash": content_hash({key: v.float() if v.is_floating_point() else v for key, v in weights.items()}),
        "info": info,
    }
    write_folder(Path(folder), {"model": weights}, {"config": config})


def save_statistics(
    folder: str | Path, extractor: Extractor, moments: dict[str, Moments], data: dict[str, dict[str, Any]]
) -> None:
    """Save the moments of the splits of a data set.

    Args:
        folder: is replaced.
        extractor: whose features the moments are of.
        moments: by split.
        data: by split, what identifies the images.
    """
    tensors = {
        f"{split}.{part}": torch.from_numpy(np.ascontiguousarray(getattr(value, part), dtype=np.float64))
        for split, value in moments.items()
        for part in ("mean", "covariance")
    }
    splits = {
        split: {"count": value.count, "hash": moments_hash(value), "data": data[split]}
        for split, value in moments.items()
    }
    config = {"format": FORMAT, "extractor": {"name": extractor.name, "hash": extractor.hash}, "splits": splits}
    write_folder(Path(folder), {"moments": tensors}, {"config": config})


def load_statistics(
    name_or_path: str | Path = "mnist", split: str = "train", extractor: Extractor | None = None
) -> Moments:
    """Reference moments of a data set's features.

    Args:
        name_or_path: "mnist", or a folder that `save_statistics` wrote.
        split: "train" (60 000 images, the usual reference) or "test" (10 000).
        extractor: that the other side of the distance is measured with; None = the shipped one of the same name.

    Raises:
        ValueError: an unknown name or split.
        CheckpointError: statistics of another extractor, or a damaged or altered file.
    """
    folder = _find(name_or_path, STATISTICS, "statistics")
    config = _read_config(folder)
    try:
        made_with, splits = config["extractor"], config["splits"]
        extractor = extractor or load_extractor(made_with["name"])
        _check_extractor(made_with, extractor, folder)
        if split not in splits:
            raise ValueError(f"split of {str(name_or_path)!r} must be one of {sorted(splits)}, got {split!r}")
        return _read_moments(folder, split, splits[split], extractor.dims)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {type(error).__name__}: {error}") from error


def moments_hash(moments: Moments) -> str:
    """`content_hash` of mean, covariance and count."""
    count = np.asarray(moments.count, dtype=np.int64)
    return content_hash({"mean": moments.mean, "covariance": moments.covariance, "count": count})


def _check_extractor(made_with: dict[str, str], extractor: Extractor, folder: Path) -> None:
    if made_with["hash"] != extractor.hash:
        raise CheckpointError(
            f"statistics {folder} are of features of {made_with['name']} {made_with['hash']}, not of the extractor "
            f"{extractor.name} {extractor.hash}; a distance between the two means nothing"
        )


def _read_moments(folder: Path, split: str, record: dict[str, Any], dims: int) -> Moments:
    source = folder / "moments.safetensors"
    tensors = read_tensors(source)
    mean, covariance = (tensors[f"{split}.{part}"].numpy() for part in ("mean", "covariance"))
    try:
        moments = Moments(mean, covariance, record["count"])
    except ValueError as error:
        raise CheckpointError(f"{source}: {split}: {error}") from error
    if moments.dim != dims:
        raise CheckpointError(f"{source}: {split} has {moments.dim} features, the extractor {dims}")
    if moments_hash(moments) != record["hash"]:
        raise CheckpointError(f"{source}: {split} does not have the hash {record['hash']!r} of its config")
    return moments


def _find(name_or_path: str | Path, shipped: dict[str, Path], what: str) -> Path:
    if name_or_path in shipped:
        return shipped[str(name_or_path)]
    path = Path(name_or_path)
    if isinstance(name_or_path, str) and os.sep not in name_or_path and not path.exists():
        close = difflib.get_close_matches(name_or_path, shipped, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{what} must be one of {sorted(shipped)} or a folder, got {name_or_path!r}{hint}")
    return path


def _read_config(folder: Path) -> dict[str, Any]:
    if folder.is_file():
        read_tensors(folder)  # names a pickle as one
        raise CheckpointError(f"{folder} is a file; give the folder that holds it and its config.json")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"{folder / 'config.json'}: format must be {FORMAT}, got {found!r}")
    return config


def _build(arguments: Any, folder: Path) -> ImageClassifier:
    source = folder / "config.json"
    arguments = dict(arguments) if isinstance(arguments, dict) else {}
    found = arguments.pop("class", None)
    if found != ImageClassifier.__name__:
        raise CheckpointError(f"{source} is of another architecture: class must be 'ImageClassifier', got {found!r}")
    try:
        return ImageClassifier(**arguments)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {type(error).__name__}: {error}") from error
