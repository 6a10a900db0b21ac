"""What usual mistakes make of images: rounded, resized or ranged otherwise, block by block, and the features of that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image

from bench.features import Extractor, FeatureExtractor, Shape, quantise

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Resize = Callable[[np.ndarray, tuple[int, int]], np.ndarray]
_BLOCK = 1000
_INSIDE = {"inception": 299, "dinov2": 224}  # pixels a side to which these extractors resize whatever they get


def changes(size: tuple[int, int], shape: tuple[int, int, int], extractor: str) -> Iterator[tuple[str, str, Change]]:
    """Family, name and what a mistake makes of the levels (B, C, H, W) of a block of images.

    Args:
        size: (H, W) of the images.
        shape: (C, H, W) in which the extractor gets them.
        extractor: its name.
    """
    yield "rounding", "truncated to 8 bits instead of rounded", lambda x, _: moved(x, -0.5)
    yield "rounding", "these images were truncated, the claim's rounded", lambda x, _: moved(x, 0.5)
    yield "range", "[0, 1] taken as [-1, 1]", lambda x, _: quantise(x / np.float32(255)).numpy()
    yield "range", "[-1, 1] taken as [0, 1]", lambda x, _: (2 * x.astype(np.int16) - 255).clip(0).astype(np.uint8)
    if shape[0] == 3:
        yield "channels", "blue and red exchanged", lambda x, _: x[:, ::-1].copy()
    fitting = shape[1:]
    if size != fitting:
        for name, resize in _RESIZES.items():
            yield "size", f"resized, {name}", partial(_there_and_back, [fitting], resize)
        return
    for other in ((size[0] // 2, size[1] // 2), (size[0] + 4, size[1] + 4)):
        for name, resize in _RESIZES.items():
            where = f"resized to {other[0]} x {other[1]} and back, {name}"
            yield "resize", where, partial(_there_and_back, [other, size], resize)
    inside = next((side for name, side in _INSIDE.items() if extractor.startswith(name)), 0)
    for name, resize in _RESIZES.items() if inside else ():
        where = f"resized to {inside} x {inside} before the extractor does it, {name}"
        yield "resize", where, partial(_there_and_back, [(inside, inside)], resize)


def _there_and_back(sizes: Sequence[tuple[int, int]], resize: Resize, x: np.ndarray, _: object) -> np.ndarray:
    for size in sizes:
        x = resize(x, size)
    return x


def moved(levels: np.ndarray, by: np.ndarray | float) -> np.ndarray:
    """Levels as float32, moved but for those at an end, where clipping leaves most.

    Truncated numbers are half a level below rounded ones, and their errors have the same variance, 1 / 12.
    """
    return levels + np.where((levels > 0) & (levels < 255), by, 0.0).astype(np.float32)


def spread(levels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Levels with as much noise as rounding has made."""
    return moved(levels, rng.uniform(-0.5, 0.5, levels.shape))


def _resized(kind: Image.Resampling, images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Images (B, C, H, W) uint8 at another size by Pillow, which smooths before it makes smaller."""
    resize = [[Image.fromarray(channel).resize(size[::-1], kind) for channel in image] for image in images]
    return np.stack([np.stack([np.asarray(channel) for channel in image]) for image in resize])


def _aliased(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Images (B, C, H, W) uint8 at another size by bilinear interpolation of the nearest four pixels only."""
    levels = torch.from_numpy(np.ascontiguousarray(images)).float()
    found = torch.nn.functional.interpolate(levels, size, mode="bilinear", align_corners=False, antialias=False)
    return found.round().clamp(0, 255).to(torch.uint8).numpy()


_RESIZES: dict[str, Resize] = {
    "nearest": partial(_resized, Image.Resampling.NEAREST),
    "bilinear": partial(_resized, Image.Resampling.BILINEAR),
    "bicubic": partial(_resized, Image.Resampling.BICUBIC),
    "bilinear without antialiasing": _aliased,
}


def fitted_to(images: np.ndarray, shape: Shape) -> np.ndarray:
    """Images in the judge's shape: equal colour channels as one grey one, another size by bicubic interpolation.

    Raises:
        ValueError: other channels than the judge's.
    """
    if shape == "any":
        return images
    if images.shape[1] == 3 and shape[0] == 1 and (images == images[:, :1]).all():
        images = images[:, :1]
    if images.shape[1] != shape[0]:
        raise ValueError(f"images must have {shape[0]} channel(s) like the judge's, got {images.shape[1]}")
    return images if images.shape[2:] == shape[1:] else _in_blocks(images, lambda x: _RESIZES["bicubic"](x, shape[1:]))


def _in_blocks(images: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.concatenate([change(images[i : i + _BLOCK]) for i in range(0, len(images), _BLOCK)])


def features_of(extractor: Extractor, images: np.ndarray, change: Change | None = None) -> np.ndarray:
    """Features (N, d) of images, changed or not.

    Levels that are not whole go to a classifier as they are. Other extractors take 8 bits, so that each level goes up or down
    with the chances that keep its mean: half a level less is then what truncating the same numbers gives, in distribution.
    """
    rng = np.random.default_rng(0)

    def of(block: np.ndarray) -> np.ndarray:
        levels = block if change is None else change(block, rng)
        if levels.shape[1] == 3 and extractor.shape != "any" and extractor.shape[0] == 1:
            levels = levels[:, :1]
        if levels.dtype != np.uint8 and not isinstance(extractor, FeatureExtractor):
            levels = np.floor(levels + rng.random(levels.shape, np.float32)).clip(0, 255).astype(np.uint8)
        if levels.dtype == np.uint8 or not isinstance(extractor, FeatureExtractor):
            return extractor.features(levels)
        weight = extractor.network.head.weight
        with torch.no_grad():
            pixels = torch.from_numpy(levels).to(weight.device, weight.dtype) / 127.5 - 1
            return extractor.network.features(pixels).double().cpu().numpy()

    return _in_blocks(images, of)


def distinct(images: np.ndarray) -> list[int]:
    """The number of the first of each group of equal images."""
    first: dict[bytes, int] = {}
    for number, image in enumerate(images):
        first.setdefault(image.tobytes(), number)
    return list(first.values())
