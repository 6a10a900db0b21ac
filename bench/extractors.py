"""Further extractors of features, and the one entry to all: pixels, Inception-v3 (FID) and DINOv2.

An extractor is named as a judge takes it:

    mnist_cnn            the shipped classifier of digits (`bench.features`)
    pixels               the images themselves, averaged down to at most 1024 numbers
    inception            Inception-v3 with the weights that the environment variable FEWSTEP_INCEPTION points to
    inception:<file>     Inception-v3 with the weights in that file
    dinov2:<folder>      DINOv2 with the weights in that folder (config.json, model.safetensors)
    <folder>             a classifier that `bench.features.save_extractor` wrote

Nothing is downloaded and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from bench.features import EXTRACTORS, Extractor, Shape, by_batches, check_images, dequantise, load_extractor
from distill.checkpoint import CheckpointError, content_hash, read_json
from samplers.errors import unknown

NAMES = (*EXTRACTORS, "pixels", "inception", "inception:<file>", "dinov2:<folder>", "<folder of save_extractor>")
MAX_PIXELS = 1024  # features, whose covariance has 1024 ** 2 numbers

INCEPTION_VARIABLE = "FEWSTEP_INCEPTION"
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d"  # its first digits, which stand in the file's name as torch.hub has it


DINO_SIZE = 224
_DINO_MEAN, _DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class ImageExtractor:
    """Features of images of 8 bits; those in [-1, 1] are `quantise`d first, so that they have the features of their PNGs.

    Attributes:
        name: as in a table's column, `fd_<name>`.
        hash: of the weights in float32 and of the preprocessing.
        dims: number of features.
        shape: (C, H, W) of the images it takes, or "any".
        compute: uint8 images (B, C, H, W) to features (B, dims).
        batch: images that go through it at a time, unless the caller says otherwise.
        info: where the weights are from.
    """

    name: str
    hash: str
    dims: int
    shape: Shape
    compute: Callable[[Tensor], Tensor]
    batch: int = 250
    info: dict[str, Any] = field(default_factory=dict)

    def features(self, images: np.ndarray | Tensor, batch_size: int | None = None) -> np.ndarray:
        """Features (N, dims) float32 of images (N, C, H, W): uint8, or floating in [-1, 1] (values outside are clipped).

        Raises:
            TypeError: images of another dtype.
            ValueError: images of another shape, or with a NaN or an infinity, or a batch_size below 1.
        """
        return self._apply(self.compute, images, batch_size, np.empty((len(images), self.dims), np.float32))

    def _apply(
        self, function: Callable[[Tensor], Tensor], images: np.ndarray | Tensor, batch_size: int | None, out: np.ndarray
    ) -> np.ndarray:
        check_images(images, self.shape)
        with _full_float32():
            return by_batches(function, images, self.batch if batch_size is None else batch_size, out)


@dataclass(frozen=True, eq=False)
class InceptionExtractor(ImageExtractor):
    """Inception-v3, whose 1008 outputs the Inception score is computed from (Salimans et al. 2016, arXiv:1606.03498).

    It has no `classify`: its classes are those of ImageNet, which are no labels of other images.

    Attributes:
        logits: uint8 images (B, C, H, W) to the last layer's outputs without its bias (B, 1008), as that score has them.
    """

    logits: Callable[[Tensor], Tensor] = field(kw_only=True)

    def probabilities(self, images: np.ndarray | Tensor, batch_size: int | None = None) -> np.ndarray:
        """Probabilities of the classes (N, 1008) float32; images and errors as in `features`."""
        out = np.empty((len(images), 1008), np.float32)
        return self._apply(lambda x: self.logits(x).softmax(1), images, batch_size, out)


def load_any_extractor(
    name_or_path: str | Path, device: str | torch.device = "cpu", shape: tuple[int, int, int] | None = None
) -> Extractor:
    """An extractor by name, with its weights after a colon, or from a folder; the module's text lists the forms.

    Args:
        name_or_path: one of `NAMES`.
        device: the features are computed on.
        shape: (C, H, W) of the images that it will be given; `pixels` needs it, any other is checked against it.

    Raises:
        ValueError: an unknown name, images of a shape that the extractor does not take, no weights at hand, or a package
            that is not installed.
        distill.checkpoint.CheckpointError: weights that are missing, damaged, of another network, or a pickle of anything
            but tensors.
    """
    name = str(name_or_path)
    kind, _, path = name.partition(":")
    extractor: Extractor
    if name == "pixels":
        if shape is None:
            raise ValueError("extractor 'pixels' needs the shape (C, H, W) of the images, got None")
        extractor = pixels(shape)
    elif kind == "inception":
        extractor = load_inception(path or None, device)
    elif kind == "dinov2" and path:
        extractor = load_dinov2(path, device)
    elif name in EXTRACTORS or Path(name).exists() or isinstance(name_or_path, Path) or os.sep in name:
        extractor = load_extractor(name_or_path, device)
    else:
        raise unknown("extractor", name, NAMES)
    if shape is not None:
        _check_shape(name, extractor.shape, shape)
    return extractor


def _check_shape(name: str, accepted: Shape, shape: tuple[int, ...]) -> None:
    fits = len(shape) == 3 and shape[0] in (1, 3) if accepted == "any" else tuple(shape) == accepted
    if not fits:
        takes = "(1 or 3, H, W)" if accepted == "any" else accepted
        raise ValueError(f"extractor {name!r} takes images of shape {takes}, got {tuple(shape)}")


# pixels --------------------------------------------------------------------------------------------------------------


def pixels(shape: tuple[int, int, int], limit: int = MAX_PIXELS) -> ImageExtractor:
    """The pixels in [-1, 1], in the order (C, H, W), averaged over squares of k x k.

    k is the least that leaves at most `limit` numbers: 1 for 28 x 28 in grey, 2 for 32 x 32 in colour (768 numbers). A square
    that the edge cuts averages what is left of it.

    Args:
        shape: (C, H, W) of the images.
        limit: of the number of features, at least C.

    Raises:
        ValueError: a shape that is not three numbers above 0, or a limit below C.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape must be (C, H, W), each at least 1, got {shape}")
    if limit < shape[0]:
        raise ValueError(f"limit must be at least the {shape[0]} channels, got {limit}")
    channels, height, width = shape
    side = next(k for k in range(1, max(height, width) + 1) if channels * -(-height // k) * -(-width // k) <= limit)

    def pooled(images: Tensor) -> Tensor:
        # windows that reach beyond the edge are divided by what of them lies inside
        return nn.functional.avg_pool2d(dequantise(images), side, ceil_mode=True).flatten(1)

    dims = channels * -(-height // side) * -(-width // side)
    digest = content_hash({"pixels": np.array([*shape, side], dtype=np.int64)})
    return ImageExtractor("pixels", digest, dims, (channels, height, width), pooled, info={"square": side})


# Inception-v3 --------------------------------------------------------------------------------------------------------


def load_inception(
    path: str | Path | None = None, device: str | torch.device = "cpu", sha256: str = INCEPTION_SHA256
) -> InceptionExtractor:
    """The Inception-v3 of FID: 2048 features after the last pooling, from the network of the package torch-fidelity.

    As in the original, images of 8 bits are resized to 299 x 299 by the bilinear interpolation of TensorFlow 1, which aligns
    the corners of neither (torch's own differs, and so would the distance), and scaled as (x - 128) / 128; grey ones are
    repeated to three channels.

    Args:
        path: of the weights; None = where the environment variable FEWSTEP_INCEPTION says.
        device: the features are computed on, in float32 without TF32.
        sha256: digits that the file's SHA-256 begins with. With other weights than the standard ones the extractor is called
            `inception_<first 8 digits>`, and no distance on its features is called FID.

    Raises:
        ValueError: no path is given, or torch-fidelity cannot be imported.
        CheckpointError: the file is missing, has another SHA-256, is a pickle of anything but tensors, or has the weights of
            another network.
    """
    file = _inception_file(path)
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if not digest.startswith(sha256):
        raise CheckpointError(
            f"{file} has SHA-256 {digest[:16]}..., that of {INCEPTION_FILE} begins with {sha256}: it is damaged or another file"
        )
    network = _inception_network(_tensors_of_pickle(content, file), file).to(device)
    name = "inception" if digest.startswith(INCEPTION_SHA256) else f"inception_{digest[:8]}"

    def outputs(images: Tensor) -> tuple[Tensor, Tensor]:
        return network(rgb(images).to(device))

    return InceptionExtractor(
        name,
        content_hash(
            {**network.state_dict(), "preprocessing": _text("8 bits, 299 x 299 as TensorFlow 1, (x - 128) / 128")}
        ),
        2048,
        "any",
        lambda images: outputs(images)[0],
        batch=50,
        info={"weights": file.name, "sha256": digest},
        logits=lambda images: outputs(images)[1],
    )


def rgb(images: Tensor) -> Tensor:
    """Images (B, 1 or 3, H, W) with three channels; grey is repeated."""
    return images.expand(-1, 3, -1, -1)


def _inception_file(path: str | Path | None) -> Path:
    given = path if path is not None else os.environ.get(INCEPTION_VARIABLE) or None
    get_it = f"get {INCEPTION_FILE} (96 MB) from {INCEPTION_URL}"
    if given is None:
        raise ValueError(
            f"extractor 'inception' needs weights, which are not shipped: {get_it}, and give 'inception:<file>' or set "
            f"{INCEPTION_VARIABLE} to its path"
        )
    file = Path(given)
    if not file.is_file():
        source = f" (from {INCEPTION_VARIABLE})" if path is None else ""
        raise CheckpointError(f"weights {file}{source} do not exist: {get_it}")
    return file


def _tensors_of_pickle(content: bytes, file: Path) -> dict[str, Tensor]:
    """The tensors that a file of `torch.save` holds. torch refuses to unpickle anything else, before it does anything."""
    try:
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        raise CheckpointError(f"{file} is not a file of tensors alone: {_first_line(error)}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{file} must hold a dictionary of tensors, got {type(weights).__name__}")
    return weights


def _inception_network(weights: dict[str, Tensor], file: Path) -> nn.Module:
    """torch-fidelity's network, in evaluation mode: uint8 (B, 3, H, W) to features (B, 2048) and outputs (B, 1008)."""
    module = _optional("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity", "fid", "extractor 'inception'")
    # Its constructor unpickles whatever the file holds, so it is given these tensors written anew and never the file.
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    buffer.seek(0)
    try:
        return module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], buffer)
    except RuntimeError as error:
        raise CheckpointError(f"{file} is of another network: {_first_line(error)}") from error


# DINOv2 --------------------------------------------------------------------------------------------------------------


def load_dinov2(folder: str | Path, device: str | torch.device = "cpu") -> ImageExtractor:
    """DINOv2's class token after the last normalisation, from a folder with weights of the package transformers.

    Stein et al. 2023, arXiv:2306.04675, find that a Frechet distance on DINOv2's features ranks images as people do where FID
    does not; they take ViT-L/14 ("facebook/dinov2-large"). Their preprocessing: bicubic to 224 x 224 with Pillow, which
    filters against aliases and rounds to 8 bits, then the mean and standard deviation of ImageNet's channels. Grey images
    are repeated to three channels. Positions are interpolated as transformers does it, which is not to the last digit as the
    original code does.

    Args:
        folder: with `config.json` and `model.safetensors`, as `snapshot_download` or `save_pretrained` leaves them.
        device: the features are computed on, in float32 without TF32.

    Returns:
        An extractor named `dinov2_<features>`, such as `dinov2_1024` for ViT-L.

    Raises:
        ValueError: transformers is not installed.
        CheckpointError: the folder or its safetensors are missing or damaged, or are of another network.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "dinov2":
        raise CheckpointError(f"{folder / 'config.json'}: model_type must be 'dinov2', got {kind!r}")
    if not any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        raise CheckpointError(f"{folder} has no model.safetensors; files of other kinds are pickles and are not read")
    network = _dinov2_network(folder).to(device, torch.float32).eval().requires_grad_(False)
    dims = network.config.hidden_size

    def class_token(images: Tensor) -> Tensor:
        return network(pixel_values=dino_input(images).to(device)).last_hidden_state[:, 0]

    how = _text(f"Pillow bicubic {DINO_SIZE}, mean {_DINO_MEAN}, std {_DINO_STD}, class token")
    digest = content_hash({**network.state_dict(), "preprocessing": how})
    info = {"weights": folder.name, "layers": network.config.num_hidden_layers}
    return ImageExtractor(f"dinov2_{dims}", digest, dims, "any", class_token, batch=50, info=info)


def dino_input(images: Tensor) -> Tensor:
    """uint8 images (B, 1 or 3, H, W) as DINOv2 is given them: (B, 3, 224, 224) float32 on the CPU."""
    size = (DINO_SIZE, DINO_SIZE)
    resized = [
        np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        for image in rgb(images).permute(0, 2, 3, 1).cpu().contiguous().numpy()
    ]
    scaled = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(_DINO_MEAN).view(3, 1, 1)) / torch.tensor(_DINO_STD).view(3, 1, 1)


def _dinov2_network(folder: Path) -> Any:
    transformers = _optional("transformers", "transformers", "dino", "extractor 'dinov2'")
    try:
        network, report = transformers.Dinov2Model.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # safetensors, transformers and torch have no common base of errors
        raise CheckpointError(f"{folder} cannot be read as DINOv2: {_first_line(error)}") from error
    # transformers fills what is missing with random numbers; a classifier's head, which is not needed, may be over
    wrong = sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"])))
    if wrong:
        raise CheckpointError(f"{folder}: weights of {wrong[0]} and {len(wrong) - 1} others are missing or misshapen")
    return network


# what they share -----------------------------------------------------------------------------------------------------


@contextmanager
def _full_float32() -> Iterator[None]:
    """Products in float32 without TF32, which has 3 digits, and without the caller's autocast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
            torch.autocast("cuda", enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _optional(module: str, package: str, extra: str, what: str) -> Any:
    """A module that is needed for one purpose only.

    Raises:
        ValueError: it, or what it imports, is not installed; the message says which.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = getattr(error, "name", None)
        because = f", which needs {missing}" if missing and missing.split(".")[0] != module.split(".")[0] else ""
        raise ValueError(f"{what} needs the package {package}{because}: pip install 'fewstep[{extra}]'") from error


def _text(words: str) -> np.ndarray:
    return np.frombuffer(words.encode(), dtype=np.uint8)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
