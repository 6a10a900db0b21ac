"""Why two people find different distances for the same images: each usual mistake is made on purpose, and compared.

A distance depends on far more than the images: how many there are (Chong & Forsyth 2020, arXiv:1911.07023), how they were
rounded and resized (Parmar et al. 2022, arXiv:2104.11222), the reference, the extractor, and whether every image was counted
once. A mistake that gives the claimed distance to its digits is the likely one; one that chance could make as good only may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.features import STATISTICS, FeatureExtractor, load_extractor, load_statistics, moments_hash, quantise
from bench.intervals import REACH
from bench.judge import FEATURES, MOMENTS
from bench.metrics import FrechetReference, Moments, frechet_interval

Row = dict[str, Any]
Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Resize = Callable[[np.ndarray, tuple[int, int]], np.ndarray]
AS_IT_IS = "as it is"
EXACT, POSSIBLE, NO = "gives the claim", "within sampling error", "no"
_COUNTS = (1000, 5000, 10_000, 50_000)
_BATCHES = (32, 50, 64, 100, 128, 200, 250, 256, 500, 512)
_BLOCK = 1000


@dataclass(frozen=True)
class Claim:
    """A distance that somebody states.

    Attributes:
        value: as stated.
        digits: half a unit of its last digit.
        count: of the samples behind it; None where it is not stated.
    """

    value: float
    digits: float
    count: int | None = None

    @classmethod
    def of(cls, text: str, count: int | None = None) -> Claim:
        """A claim as it is printed, such as "3.17".

        Raises:
            ValueError: not a finite number of at least 0, or a count below 2.
        """
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise ValueError(f"claim must be a distance, a finite number of at least 0, got {text!r}")
        if count is not None and count < 2:
            raise ValueError(f"count must be at least 2, got {count}")
        mantissa, _, exponent = text.strip().lower().partition("e")
        places = len(mantissa.partition(".")[2]) - int(exponent or 0)
        return cls(value, 0.5 * 10.0**-places, count)


@dataclass(frozen=True)
class Finding:
    """What a hypothesis gives.

    Attributes:
        family: kind of mistake, such as "rounding".
        name: the hypothesis.
        distance: that it leads to.
        half: half the 95 % interval of `distance`; 0 where none is known.
        verdict: `EXACT`, `POSSIBLE` or `NO`.
    """

    family: str
    name: str
    distance: float
    half: float
    verdict: str = NO


@dataclass(frozen=True, eq=False)
class Examiner:
    """The parts of a judge that a mistake can get wrong.

    Attributes:
        extractor: of features.
        references: moments of the splits "train", the usual one, and "test".
    """

    extractor: FeatureExtractor
    references: dict[str, FrechetReference]


def load_examiner(judge: Path | None = None) -> Examiner:
    """The shipped judge of digits, or one from a folder as `bench.judge.folder_judge` takes it.

    Raises:
        distill.checkpoint.CheckpointError: extractor or statistics cannot be used, or do not belong together.
    """
    extractor = load_extractor("mnist_cnn" if judge is None else judge / FEATURES)
    statistics = STATISTICS["mnist"] if judge is None else judge / MOMENTS
    moments = {split: load_statistics(statistics, split, extractor) for split in ("train", "test")}
    return Examiner(extractor, {split: FrechetReference(value) for split, value in moments.items()})


# images --------------------------------------------------------------------------------------------------------------


def examine(
    images: np.ndarray,
    claim: Claim,
    examiner: Examiner,
    others: Sequence[Examiner] = (),
    batch_size: int | None = None,
) -> Iterator[Finding]:
    """What each hypothesis gives for images, the one that nothing is wrong first.

    Args:
        images: (N, C, H, W) uint8, N at least 4; of another size than the judge's they are resized in several ways.
        claim: the distance to explain.
        examiner: of the judge.
        others: of judges whose extractor may be behind the claim.
        batch_size: of the claimant; None tries usual ones.

    Raises:
        ValueError: too few images, or other channels than the judge's.
    """
    extractor, train = examiner.extractor, examiner.references["train"]
    if len(images) < 4:
        raise ValueError(f"the doctor needs at least 4 images, got {len(images)}")
    fitted = _fitted(images, extractor.shape)
    features = _features(extractor, fitted)
    yield _found("", AS_IT_IS, features, train, claim)
    yield from _by_count(features, train, claim)
    yield _found("split", "against the test set's statistics", features, examiner.references["test"], claim)
    yield _without_rounding(features, _features(extractor, fitted, _spread), train, claim)
    for family, name, change in _changes(images.shape[2:], extractor.shape):
        yield _found(family, name, _features(extractor, fitted if family != "size" else images, change), train, claim)
    yield from _by_extractor(features, fitted, examiner, others, claim)
    yield from _by_batch(features, train, claim, batch_size)
    kept = _distinct(images)
    if len(kept) < len(images):
        name = f"each of {len(kept)} different images counted once"
        yield _found("batch", name, features[kept], train, claim)


def _found(family: str, name: str, features: np.ndarray, reference: FrechetReference, claim: Claim) -> Finding:
    distance = frechet_interval(features, reference)
    return judged(Finding(family, name, distance.value, REACH * distance.standard_error), claim)


def judged(finding: Finding, claim: Claim) -> Finding:
    """The finding with its verdict."""
    off = abs(finding.distance - claim.value)
    slack = claim.digits * (1 + 1e-9)  # a half is not exact in binary
    return replace(finding, verdict=EXACT if off <= slack else POSSIBLE if off <= finding.half + slack else NO)


def _without_rounding(rounded: np.ndarray, twice: np.ndarray, reference: FrechetReference, claim: Claim) -> Finding:
    """Of numbers that were not rounded: a noise as large as rounding's is added, and its effect taken off instead.

    Simulation and extrapolation of a measurement error, Cook & Stefanski 1994, J. Am. Stat. Assoc. 89, 1314-1328.
    """
    once = frechet_interval(rounded, reference)
    value = max(0.0, 2 * once.value - frechet_interval(twice, reference).value)
    finding = Finding("rounding", "not rounded to 8 bits, extrapolated", value, REACH * once.standard_error)
    return judged(finding, claim)


def _by_count(features: np.ndarray, reference: FrechetReference, claim: Claim) -> Iterator[Finding]:
    """The first M images, or from fewer than M the value that their bias, which falls like 1 / N, leads to at M."""
    total = len(features)
    whole = frechet_interval(features, reference)
    halves = [frechet_interval(part, reference).value for part in (features[: total // 2], features[total // 2 :])]
    slope = total * (sum(halves) / 2 - whole.value)
    for count in _COUNTS if claim.count is None else (claim.count,):
        if count < total:
            yield _found("count", f"the first {count} images", features[:count], reference, claim)
        elif count > total:
            value = max(0.0, whole.value + slope * (1 / count - 1 / total))
            found = Finding("count", f"{count} images, extrapolated", value, REACH * whole.standard_error)
            yield judged(found, claim)


def _by_extractor(
    features: np.ndarray, images: np.ndarray, examiner: Examiner, others: Sequence[Examiner], claim: Claim
) -> Iterator[Finding]:
    """Features that were not standardised, and those of other judges."""
    network = examiner.extractor.network
    mean, scale = (part.double().cpu().numpy() for part in (network.feature_mean, network.feature_std))
    moments = examiner.references["train"].moments
    raw = Moments(moments.mean * scale + mean, moments.covariance * np.outer(scale, scale), moments.count)
    name = f"features of {examiner.extractor.name} before they are standardised"
    yield _found("extractor", name, features * scale + mean, FrechetReference(raw), claim)
    for other in others:
        seen = _fitted(images, other.extractor.shape)
        name = f"features of {other.extractor.name} {other.extractor.hash}"
        yield _found("extractor", name, _features(other.extractor, seen), other.references["train"], claim)


def _by_batch(
    features: np.ndarray, reference: FrechetReference, claim: Claim, batch_size: int | None
) -> Iterator[Finding]:
    """A last batch that is not full: left out, counted twice, filled up with the first images; the closest of each."""
    kinds: dict[str, list[Finding]] = {}
    for size in _BATCHES if batch_size is None else (batch_size,):
        whole, rest = divmod(len(features), size)
        if not (whole and rest):
            continue
        full = whole * size
        for kind, counted in (
            ("left out", features[:full]),
            ("counted twice", np.concatenate([features, features[full:]])),
            ("filled up with the first images", np.concatenate([features, features[: size - rest]])),
        ):
            found = _found("batch", f"the last batch of {size} {kind}", counted, reference, claim)
            kinds.setdefault(kind, []).append(found)
    for several in kinds.values():
        yield min(several, key=lambda finding: abs(finding.distance - claim.value))


def _changes(size: tuple[int, int], shape: tuple[int, int, int]) -> Iterator[tuple[str, str, Change]]:
    """Family, name and what a mistake makes of the levels (B, C, H, W) of a block of images of a size."""
    yield "rounding", "truncated to 8 bits instead of rounded", lambda x, _: _moved(x, -0.5)
    yield "rounding", "these images were truncated, the claim's rounded", lambda x, _: _moved(x, 0.5)
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


def _there_and_back(sizes: Sequence[tuple[int, int]], resize: Resize, x: np.ndarray, _: object) -> np.ndarray:
    for size in sizes:
        x = resize(x, size)
    return x


def _moved(levels: np.ndarray, by: np.ndarray | float) -> np.ndarray:
    """Levels as float32, moved but for those at an end, where clipping leaves most.

    Truncated numbers are half a level below rounded ones, and their errors have the same variance, 1 / 12.
    """
    return levels + np.where((levels > 0) & (levels < 255), by, 0.0).astype(np.float32)


def _spread(levels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Levels with as much noise as rounding has made."""
    return _moved(levels, rng.uniform(-0.5, 0.5, levels.shape))


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


def _fitted(images: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Images in the judge's shape: equal colour channels as one grey one, another size by bicubic interpolation."""
    if images.shape[1] == 3 and shape[0] == 1 and (images == images[:, :1]).all():
        images = images[:, :1]
    if images.shape[1] != shape[0]:
        raise ValueError(f"images must have {shape[0]} channel(s) like the judge's, got {images.shape[1]}")
    return images if images.shape[2:] == shape[1:] else _in_blocks(images, lambda x: _RESIZES["bicubic"](x, shape[1:]))


def _in_blocks(images: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.concatenate([change(images[i : i + _BLOCK]) for i in range(0, len(images), _BLOCK)])


def _features(extractor: FeatureExtractor, images: np.ndarray, change: Change | None = None) -> np.ndarray:
    """Features (N, d) of images, changed or not; levels that are not whole are not rounded on the way."""
    rng = np.random.default_rng(0)

    def of(block: np.ndarray) -> np.ndarray:
        levels = block if change is None else change(block, rng)
        if levels.shape[1] == 3 and extractor.shape[0] == 1:
            levels = levels[:, :1]
        if levels.dtype == np.uint8:
            return extractor.features(levels)
        weight = extractor.network.head.weight
        with torch.no_grad():
            pixels = torch.from_numpy(levels).to(weight.device, weight.dtype) / 127.5 - 1
            return extractor.network.features(pixels).double().cpu().numpy()

    return _in_blocks(images, of)


def _distinct(images: np.ndarray) -> list[int]:
    """The number of the first of each group of equal images."""
    first: dict[bytes, int] = {}
    for number, image in enumerate(images):
        first.setdefault(image.tobytes(), number)
    return list(first.values())


# a table -------------------------------------------------------------------------------------------------------------


def examine_row(row: Row, rows: Sequence[Row], claim: Claim, examiner: Examiner) -> Iterator[Finding]:
    """What a table without its images can say: the row itself, other counts, its other metrics, and other rows.

    Args:
        row: a measured one, over all seeds.
        rows: of the same table, `row` among them.
        claim: the distance to explain.
        examiner: of the judge, whose reference tells the bias where it is the row's.
    """
    error = row.get("standard_error") or 0.0
    yield judged(Finding("", AS_IT_IS, row["value"], REACH * error), claim)
    reference = examiner.references["train"].moments
    if row.get("hashes", {}).get("reference") == moments_hash(reference):
        total, slope = row["num_samples"], frechet_bias(reference.covariance)
        for count in _COUNTS if claim.count is None else (claim.count,):
            if count != total:
                value = max(0.0, row["value"] + slope * (1 / count - 1 / total))
                half = REACH * error * math.sqrt(max(1.0, total / count))
                yield judged(Finding("count", f"{count} images, by the reference's bias", value, half), claim)
    for name, parts in (row.get("metrics") or {}).items():
        half = REACH * (parts.get("standard_error") or 0.0)
        yield judged(Finding("metric", f"{name} of this row", parts["value"], half), claim)
    for other in rows:
        if other is not row and other["status"] == "done":
            name = f"{other['label']} at {other['budget']}"
            found = judged(Finding("row", name, other["value"], REACH * (other.get("standard_error") or 0.0)), claim)
            if found.verdict == EXACT:
                yield found


def frechet_bias(covariance: np.ndarray) -> float:
    """c, where N samples of a Gaussian are on average c / N away from it, to leading order.

    The mean adds `tr S`, and from `W_2^2(S, S + E) = sum_ij E_ij^2 / (2 (l_i + l_j))` in the eigenbasis of S, with
    `Var E_ij = l_i l_j (1 + [i = j]) / N`, the covariance `sum_ij l_i l_j (1 + [i = j]) / (2 (l_i + l_j))`.

    Args:
        covariance: S (d, d), positive semi-definite.
    """
    values = np.linalg.eigvalsh(covariance).clip(min=0.0)
    total = values[:, None] + values
    pairs = np.divide(np.outer(values, values), 2.0 * total, out=np.zeros_like(total), where=total > 0)
    return float(values.sum() + pairs.sum() + np.trace(pairs))


# what it comes to ----------------------------------------------------------------------------------------------------


def diagnosis(findings: Sequence[Finding], claim: Claim) -> str:
    """The findings in a sentence."""
    itself, *mistakes = findings
    if itself.verdict == EXACT:
        return "The claim holds as it is."
    exact = [finding for finding in mistakes if finding.verdict == EXACT]
    closest = min(mistakes, key=lambda finding: abs(finding.distance - claim.value), default=None)
    near = "" if closest is None else f" Closest for these very samples: {closest.name} ({closest.distance:.4g})."
    if exact:
        names = "; ".join(finding.name for finding in exact)
        others = "" if itself.verdict == NO else " Chance alone could make such a difference too."
        return f"To the digits of the claim: {names}.{others}"
    if itself.verdict == POSSIBLE:
        return f"The claim is within the sampling error of the value as it is.{near}"
    possible = [finding for finding in mistakes if finding.verdict == POSSIBLE]
    if possible:
        return f"Within sampling error: {'; '.join(finding.name for finding in possible)}.{near}"
    return f"None of these explains the claim.{near}"
