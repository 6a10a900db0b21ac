"""Why two people find different distances for the same images: each usual mistake is made on purpose, and compared.

A distance depends on far more than the images: how many there are (Chong & Forsyth 2020, arXiv:1911.07023), how they were
rounded and resized (Parmar et al. 2022, arXiv:2104.11222), the reference, the extractor, and whether every image was counted
once. A mistake that gives the claimed distance to its digits is the likely one; one that chance could make as good only may be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.doctor_images import changes, distinct, features_of, fitted_to, spread
from bench.extractors import load_any_extractor
from bench.features import STATISTICS, Extractor, FeatureExtractor, load_extractor, load_statistics, moments_hash
from bench.intervals import REACH
from bench.judge import CACHE, FEATURES, MOMENTS, JudgeSpec
from bench.metrics import FrechetReference, Moments, frechet_interval
from bench.reference import reference_of

Row = dict[str, Any]
AS_IT_IS = "as it is"
EXACT, POSSIBLE, NO = "gives the claim", "within sampling error", "no"
_COUNTS = (1000, 5000, 10_000, 50_000)
_BATCHES = (32, 50, 64, 100, 128, 200, 250, 256, 500, 512)
_SAME_UNIT = ("fd_infinity",)  # metrics of a table that a distance can be taken for


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
        references: moments of the splits "train", the usual one, and "test" where that is known.
    """

    extractor: Extractor
    references: dict[str, FrechetReference]


def load_examiner(judge: Path | JudgeSpec | None = None, shape: tuple[int, int, int] | None = None) -> Examiner:
    """The shipped judge of digits, one from a folder as `bench.judge.folder_judge` takes it, or any extractor with real images.

    Args:
        judge: of these; moments of the images of a `JudgeSpec` are kept as those of a suite's judge are.
        shape: (C, H, W) of the images to examine, which the extractor "pixels" needs.

    Raises:
        ValueError, FileNotFoundError: an extractor or images that cannot be used.
        distill.checkpoint.CheckpointError: extractor or statistics cannot be used, or do not belong together.
    """
    if isinstance(judge, JudgeSpec):
        extractor = load_any_extractor(judge.extractor, shape=shape if judge.extractor == "pixels" else None)
        sources = {"train": judge.reference, **({"test": judge.test} if judge.test else {})}
        moments = {split: reference_of(extractor, source, CACHE, split) for split, source in sources.items()}
    else:
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
        images: (N, C, H, W) uint8, N at least 4; of another size than the judge's they are resized in several ways. An extractor
            that takes any size resizes them itself, and what is tried is that somebody did it before.
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
    fitted = fitted_to(images, extractor.shape)
    features = features_of(extractor, fitted)
    yield _found("", AS_IT_IS, features, train, claim)
    yield from _by_count(features, train, claim)
    if "test" in examiner.references:
        yield _found("split", "against the test set's statistics", features, examiner.references["test"], claim)
    if isinstance(extractor, FeatureExtractor):  # others take 8 bits
        yield _without_rounding(features, features_of(extractor, fitted, spread), train, claim)
    for family, name, change in changes(images.shape[2:], fitted.shape[1:], extractor.name):
        changed = features_of(extractor, fitted if family != "size" else images, change)
        yield _found(family, name, changed, train, claim)
    yield from _by_extractor(features, fitted, examiner, others, claim)
    yield from _by_batch(features, train, claim, batch_size)
    kept = distinct(images)
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
    extractor = examiner.extractor
    if isinstance(extractor, FeatureExtractor):
        mean, scale = (
            part.double().cpu().numpy() for part in (extractor.network.feature_mean, extractor.network.feature_std)
        )
        moments = examiner.references["train"].moments
        raw = Moments(moments.mean * scale + mean, moments.covariance * np.outer(scale, scale), moments.count)
        name = f"features of {extractor.name} before they are standardised"
        yield _found("extractor", name, features * scale + mean, FrechetReference(raw), claim)
    for other in others:
        seen = fitted_to(images, other.extractor.shape)
        name = f"features of {other.extractor.name} {other.extractor.hash}"
        yield _found("extractor", name, features_of(other.extractor, seen), other.references["train"], claim)


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


# a table -------------------------------------------------------------------------------------------------------------


def examine_row(row: Row, rows: Sequence[Row], claim: Claim, examiner: Examiner) -> Iterator[Finding]:
    """What a table without its images can say: the row itself, other counts, its distance without bias, and other rows.

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
    known = row.get("metrics") or {}
    for name, parts in ((name, known[name]) for name in _SAME_UNIT if (known.get(name) or {}).get("value") is not None):
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
