"""`fewstep doctor`: every mistake is planted, and has to be the one that is found."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_ranking import folder, row, run, said

from bench.doctor import (
    EXACT,
    NO,
    POSSIBLE,
    Claim,
    Examiner,
    Finding,
    diagnosis,
    examine,
    examine_row,
    frechet_bias,
    load_examiner,
)
from bench.extractors import ImageExtractor
from bench.features import FeatureExtractor, ImageClassifier, load_extractor, save_extractor, save_statistics
from bench.judge import JudgeSpec
from bench.metrics import FrechetReference, Moments, frechet_distance

SIZE = 16
COUNT = 620  # which no usual batch divides but 10, 20, 31, 62, ...


def blobs(count: int, seed: int, sharp: float = 3.0) -> np.ndarray:
    """Images (N, 1, 16, 16) in [-1, 1] of one soft spot each, some clipped at the ends as samples are."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    where, width = rng.uniform(4, 11, (count, 2, 1, 1)), rng.uniform(1.0, sharp, (count, 1, 1))
    spot = np.exp(-((y - where[:, 0]) ** 2 + (x - where[:, 1]) ** 2) / (2 * width**2))
    return (2.6 * spot - 1.2 + 0.05 * rng.standard_normal(spot.shape)).clip(-1, 1)[:, None].astype(np.float32)


def eight_bits(images: np.ndarray) -> np.ndarray:
    return np.rint((images + 1) * 127.5).astype(np.uint8)


def made_judge(path: Path, seed: int) -> Path:
    """A judge's folder: a network with fresh weights, and the statistics of blobs."""
    torch.manual_seed(seed)
    network = ImageClassifier(width=8, hidden=4, size=SIZE, classes=2).eval()
    splits = {"train": blobs(3000, 1), "test": blobs(700, 2)}
    with torch.no_grad():
        for weights in (p for p in network.convolutions.parameters() if p.ndim == 4):
            weights *= 6**0.5  # so that features keep the size of the images
        raw = network.pooled(torch.from_numpy(splits["train"]))
    network.feature_mean, network.feature_std = raw.mean(0), raw.std(0).clamp(min=0.01)  # one may be dead
    save_extractor(path / "features", f"blobs{seed}", network, {})
    extractor = load_extractor(path / "features")
    moments = {split: Moments.of(extractor.features(eight_bits(images))) for split, images in splits.items()}
    save_statistics(path / "statistics", extractor, moments, {split: {} for split in splits})
    return path


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [made_judge(tmp_path_factory.mktemp("judge"), seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def examiner(judges: list[Path]) -> Examiner:
    return load_examiner(judges[0])


SAMPLES = blobs(COUNT, 5, sharp=2.6)
IMAGES = eight_bits(SAMPLES)


def distance(examiner: Examiner, images: np.ndarray, split: str = "train") -> float:
    """As somebody else would compute it: uint8 images go through the extractor as they are, others unrounded."""
    return frechet_distance(Moments.of(seen(examiner.extractor, images)), examiner.references[split])


def seen(extractor: FeatureExtractor, images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return extractor.features(images)
    with torch.no_grad():
        return extractor.network.features(torch.from_numpy(images)).double().numpy()


def claim_of(value: float, count: int | None = None) -> Claim:
    return Claim.of(f"{value:#.6g}", count)


def pillow(images: np.ndarray, size: int, how: Image.Resampling) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(image[0]).resize((size, size), how))[None] for image in images])


def aliased(images: np.ndarray, size: int) -> np.ndarray:
    found = torch.nn.functional.interpolate(torch.from_numpy(images).float(), (size, size), mode="bilinear")
    return found.round().to(torch.uint8).numpy()


BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
LAST = COUNT % 250
PLANTED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "[0, 1] taken as [-1, 1]": lambda x: np.rint((np.float32(x) / 255 + 1) * np.float32(127.5)).astype(np.uint8),
    "[-1, 1] taken as [0, 1]": lambda x: np.rint((x / 127.5 - 1).clip(0, 1) * 255).astype(np.uint8),
    "resized to 8 x 8 and back, bilinear": lambda x: pillow(pillow(x, 8, BILINEAR), 16, BILINEAR),
    "resized to 20 x 20 and back, bicubic": lambda x: pillow(pillow(x, 20, BICUBIC), 16, BICUBIC),
    "resized to 8 x 8 and back, bilinear without antialiasing": lambda x: aliased(aliased(x, 8), 16),
    "the last batch of 250 left out": lambda x: x[:-LAST],
    "the last batch of 250 counted twice": lambda x: np.concatenate([x, x[-LAST:]]),
    "the last batch of 250 filled up with the first images": lambda x: np.concatenate([x, x[: 250 - LAST]]),
    "the first 480 images": lambda x: x[:480],
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_gives_the_claim_and_nothing_else_does(examiner: Examiner, name: str) -> None:
    claim = claim_of(distance(examiner, PLANTED[name](IMAGES)), 480 if name.startswith("the first") else None)
    found = list(examine(IMAGES, claim, examiner, batch_size=250))
    assert [finding.name for finding in found if finding.verdict == EXACT] == [name]
    assert diagnosis(found, claim).startswith(f"To the digits of the claim: {name}.")


def test_the_other_split_gives_the_claim(examiner: Examiner) -> None:
    claim = claim_of(distance(examiner, IMAGES, "test"))
    exact = [f.name for f in examine(IMAGES, claim, examiner) if f.verdict == EXACT]
    assert exact == ["against the test set's statistics"]


def test_another_extractor_gives_the_claim(examiner: Examiner, judges: list[Path]) -> None:
    other = load_examiner(judges[1])
    claim = claim_of(distance(other, IMAGES))
    exact = [f.name for f in examine(IMAGES, claim, examiner, [other]) if f.verdict == EXACT]
    assert exact == [f"features of blobs1 {other.extractor.hash}"]


def test_features_before_they_are_standardised_give_the_claim(examiner: Examiner) -> None:
    def raw(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network.pooled(torch.from_numpy(images).float() / 127.5 - 1).double().numpy()

    network = ImageClassifier(width=8, hidden=4, size=SIZE, classes=2).eval()
    network.load_state_dict(examiner.extractor.network.state_dict())
    network.feature_mean, network.feature_std = torch.full((16,), 0.3), torch.linspace(0.5, 2.0, 16)
    extractor = FeatureExtractor("x", network, "", {})
    train = Moments.of(extractor.features(eight_bits(blobs(3000, 1))))
    standardised = Examiner(extractor, {"train": FrechetReference(train), "test": FrechetReference(train)})
    claim = claim_of(frechet_distance(Moments.of(raw(IMAGES)), Moments.of(raw(eight_bits(blobs(3000, 1))))))
    found = {f.name: f for f in examine(IMAGES, claim, standardised)}
    assert found["features of x before they are standardised"].distance == pytest.approx(claim.value, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "claimed", "given", "left"),
    [
        ("truncated to 8 bits instead of rounded", "truncated", "rounded", 0.1),
        ("these images were truncated, the claim's rounded", "rounded", "truncated", 0.1),
        ("not rounded to 8 bits, extrapolated", "float", "rounded", 0.5),  # to first order in the noise only
    ],
)
def test_rounding_is_found_where_it_matters(
    examiner: Examiner, name: str, claimed: str, given: str, left: float
) -> None:
    # on a few levels, which is where rounding shows, and without a background of one value
    noise = np.random.default_rng(0).normal(0, 1 / 127.5, SAMPLES.shape)
    soft = (SAMPLES * 0.03 - 0.9 + noise).astype(np.float32)
    levels = (soft + 1) * 127.5
    kinds = {"rounded": eight_bits(soft), "truncated": np.floor(levels).astype(np.uint8), "float": soft}
    claim = claim_of(distance(examiner, kinds[claimed]))
    itself, *mistakes = examine(kinds[given], claim, examiner)
    found = next(f for f in mistakes if f.name == name)
    assert abs(found.distance - claim.value) < left * abs(itself.distance - claim.value)


def test_images_of_another_size_are_resized_in_every_way(examiner: Examiner) -> None:
    large = pillow(IMAGES, 24, BICUBIC)
    claim = claim_of(distance(examiner, aliased(large, SIZE)))
    exact = [f.name for f in examine(large, claim, examiner) if f.verdict == EXACT]
    assert exact == ["resized, bilinear without antialiasing"]


def test_the_bias_of_more_samples_is_extrapolated(examiner: Examiner) -> None:
    many = eight_bits(blobs(5000, 7))  # of the reference's own distribution, where the bias is most of the distance
    claim = claim_of(distance(examiner, many), 5000)
    itself, *mistakes = examine(many[:300], claim, examiner)
    found = next(f for f in mistakes if f.family == "count")
    assert found.name == "5000 images, extrapolated"
    assert abs(found.distance - claim.value) < 0.6 * abs(itself.distance - claim.value)


def test_images_that_are_there_twice_are_found(examiner: Examiner) -> None:
    claim = claim_of(distance(examiner, IMAGES))
    exact = [f.name for f in examine(np.concatenate([IMAGES, IMAGES[:100]]), claim, examiner) if f.verdict == EXACT]
    assert f"each of {COUNT} different images counted once" in exact


def test_a_claim_that_holds_and_one_that_nothing_explains(examiner: Examiner) -> None:
    value = distance(examiner, IMAGES)
    holds, wrong = claim_of(value), claim_of(1e6 * value + 123.0)
    assert diagnosis(list(examine(IMAGES, holds, examiner)), holds) == "The claim holds as it is."
    assert diagnosis(list(examine(IMAGES, wrong, examiner)), wrong).startswith(
        "None of these explains the claim. Closest"
    )


def test_a_difference_that_chance_can_make_is_not_blamed_on_a_mistake() -> None:
    claim = Claim.of("1.00")
    findings = [Finding("", "as it is", 1.05, 0.1, POSSIBLE), Finding("split", "x", 1.01, 0.1, POSSIBLE)]
    assert diagnosis(findings, claim).startswith("The claim is within the sampling error of the value as it is.")
    assert "Within sampling error: x" in diagnosis([Finding("", "as it is", 9.0, 0.1, NO), findings[1]], claim)


@pytest.mark.parametrize(
    ("text", "digits"), [("3.17", 0.005), ("3", 0.5), ("3.170", 0.0005), ("1.2e-3", 0.00005), ("2e2", 50.0)]
)
def test_a_claim_has_the_digits_that_are_printed(text: str, digits: float) -> None:
    assert Claim.of(text).digits == pytest.approx(digits)


# any extractor with real images --------------------------------------------------------------------------------------


@pytest.fixture
def real(tmp_path: Path, monkeypatch: Any) -> dict[str, Path]:
    """Files of real images, of the splits train and test."""
    monkeypatch.setattr("bench.doctor.CACHE", tmp_path / "cache")
    files = {split: tmp_path / f"{split}.npz" for split in ("train", "test")}
    for number, file in enumerate(files.values(), 1):
        np.savez(file, images=eight_bits(blobs(900 // number, number)))
    return files


@pytest.mark.slow
def test_the_command_finds_mistakes_on_an_extractor_with_real_images(real: dict[str, Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=IMAGES)
    seen = load_examiner(JudgeSpec(extractor="pixels", reference=str(real["train"])), (1, SIZE, SIZE))
    planted = PLANTED["resized to 8 x 8 and back, bilinear"](IMAGES)
    given = ("doctor", tmp_path / "images.npz", "--extractor", "pixels", "--reference", real["train"])
    resized = run(*given, "--claim", f"{distance(seen, planted):#.6g}")
    assert resized.exit_code == 0, resized.output
    assert "fd_pixels, and the claim" in said(resized)
    assert "To the digits of the claim: resized to 8 x 8 and back, bilinear." in said(resized)
    other = FrechetReference(Moments.of(seen.extractor.features(eight_bits(blobs(450, 2)))))
    split = frechet_distance(Moments.of(seen.extractor.features(IMAGES)), other)
    found = run(*given, "--test", real["test"], "--claim", f"{split:#.6g}")
    assert "To the digits of the claim: against the test set's statistics." in said(found)


def test_truncation_is_found_where_an_extractor_takes_8_bits() -> None:
    rng = np.random.default_rng(0)
    pooled = ImageExtractor(
        "any", "0", 4, "any", lambda x: torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)
    )
    levels = rng.uniform(90, 110, (400, 1, SIZE, SIZE))
    reference = FrechetReference(
        Moments.of(pooled.features(np.rint(rng.uniform(90, 110, (900, 1, SIZE, SIZE))).astype(np.uint8)))
    )
    examiner = Examiner(pooled, {"train": reference})
    claim = claim_of(distance(examiner, np.floor(levels).astype(np.uint8)))
    itself, *mistakes = examine(np.rint(levels).astype(np.uint8), claim, examiner)
    found = {f.name: f for f in mistakes}
    truncated = found["truncated to 8 bits instead of rounded"]
    assert abs(truncated.distance - claim.value) < 0.1 * abs(itself.distance - claim.value)
    assert not {"not rounded to 8 bits, extrapolated", "against the test set's statistics"} & set(found)


def test_images_resized_before_the_extractor_does_it_give_the_claim() -> None:
    def compute(images: torch.Tensor) -> torch.Tensor:
        inside = torch.nn.functional.interpolate(images.float(), (299, 299), mode="nearest")
        return torch.nn.functional.adaptive_avg_pool2d(inside, 2).flatten(1)

    examiner = Examiner(ImageExtractor("inception_0", "0", 4, "any", compute), {})
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 16, 16), dtype=np.uint8)
    train = FrechetReference(Moments.of(examiner.extractor.features(images[::-1] // 2)))
    examiner = Examiner(examiner.extractor, {"train": train})
    before = np.stack([np.asarray(Image.fromarray(image[0]).resize((299, 299), BILINEAR))[None] for image in images])
    claim = Claim.of(f"{distance(examiner, before):.12g}")
    exact = [f.name for f in examine(images, claim, examiner, batch_size=40) if f.verdict == EXACT]
    assert exact == ["resized to 299 x 299 before the extractor does it, bilinear"]


# tables --------------------------------------------------------------------------------------------------------------


def test_the_bias_of_a_gaussian_is_that_of_a_simulation() -> None:
    rng, count = np.random.default_rng(0), 2000
    factor = rng.standard_normal((6, 6)) * np.array([3.0, 2.0, 1.0, 1.0, 0.5, 0.1])
    covariance = factor.T @ factor
    exact = FrechetReference(Moments(np.zeros(6), covariance, 0))
    found = [
        frechet_distance(Moments.of(rng.multivariate_normal(np.zeros(6), covariance, count)), exact) for _ in range(400)
    ]
    assert count * np.mean(found) == pytest.approx(frechet_bias(covariance), rel=0.05)
    assert frechet_bias(np.eye(3)) == pytest.approx(3 + (3 + 9) / 4)


def test_a_row_of_a_table_has_its_count_its_metrics_and_its_neighbours(examiner: Examiner) -> None:
    from bench.features import moments_hash

    reference = moments_hash(examiner.references["train"].moments)
    slope = frechet_bias(examiner.references["train"].moments.covariance)
    parts = {"low": 0.2, "high": 0.3, "standard_error": 0.025}
    more = {"fd_infinity": {"value": 0.25, **parts}, "rmse": {"value": 0.75, **parts}}
    mine = row("a", 4, 2.0, 0.001, hashes={"reference": reference}, metrics=more)
    rows = [mine, row("b", 4, 3.5), row("a", 8, 1.5)]

    def exact(value: float, count: int | None = None) -> list[str]:
        return [f.name for f in examine_row(mine, rows, claim_of(value, count), examiner) if f.verdict == EXACT]

    assert exact(2.0) == ["as it is"]
    assert exact(3.5) == ["b at 4"]
    assert exact(1.5) == ["a at 8"]
    assert exact(0.25) == ["fd_infinity of this row"]
    assert exact(0.75) == []  # of another unit
    assert exact(2.0 + slope * (1 / 50 - 1 / 100), 50) == ["50 images, by the reference's bias"]
    unknown = {**mine, "hashes": {"reference": "other"}}
    assert {f.family for f in examine_row(unknown, rows, claim_of(9.0), examiner)} == {"", "metric"}


# the command ---------------------------------------------------------------------------------------------------------


def test_the_command_finds_a_planted_mistake(judges: list[Path], examiner: Examiner, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=IMAGES)
    value = distance(examiner, PLANTED["the last batch of 250 left out"](IMAGES))
    given = "doctor", tmp_path / "images.npz", "--claim", f"{value:.6g}", "--judge", judges[0], "--batch-size", 250
    result = run(*given, "--also", judges[1])
    assert result.exit_code == 0, result.output
    assert f"{COUNT} images, 1 x 16 x 16, levels 0 to 255" in said(result)
    assert "To the digits of the claim: the last batch of 250 left out." in said(result)


def test_the_command_takes_the_shipped_judge_and_a_table(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).integers(0, 256, (8, 28, 28), dtype=np.uint8))
    assert "fd_mnist_cnn, and the claim 3" in said(run("doctor", tmp_path / "images.npz", "--claim", "3"))
    out = folder(tmp_path / "run", [row("a", 4, 1.0), row("a", 8, 0.5)])
    for source in (out, out / "table.csv"):
        result = run("doctor", source, "--claim", "0.50", "--row", "a", "--budget", 4)
        assert "To the digits of the claim: a at 8." in said(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--claim", "low"], "claim must be a distance, a finite number of at least 0, got 'low'"),
        (["--claim", "-1"], "finite number of at least 0, got '-1'"),
        (["--claim", "nan"], "got 'nan'"),
        (["--claim", "1", "--row", "a"], "--row and --budget are for a table.csv"),
        (["--claim", "1", "--judge", "nowhere"], "nowhere/features/config.json does not exist"),
        ([], "Missing option '--claim'"),
        (["--claim", "1", "--extractor", "pixels"], "give --reference too"),
        (["--claim", "1", "--judge", "x", "--extractor", "pixels"], "give it, or --extractor and --reference"),
        (["--claim", "1", "--test", "x"], "--test is for --extractor and --reference"),
    ],
)
def test_mistakes_of_the_user_are_one_line(tmp_path: Path, arguments: list[Any], message: str) -> None:
    np.savez(tmp_path / "images.npz", images=IMAGES[:8])
    result = run("doctor", tmp_path / "images.npz", *arguments)
    assert result.exit_code == 2
    assert message in said(result)


def test_images_that_the_judge_cannot_see_are_refused(judges: list[Path], examiner: Examiner, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 4 images, got 3"):
        list(examine(IMAGES[:3], claim_of(1.0), examiner))
    colours = np.random.default_rng(0).integers(0, 256, (8, 3, SIZE, SIZE), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"must have 1 channel\(s\) like the judge's, got 3"):
        list(examine(colours, claim_of(1.0), examiner))
    grey = np.repeat(IMAGES[:50], 3, axis=1)
    values = [next(iter(examine(images, claim_of(1.0), examiner))).distance for images in (grey, IMAGES[:50])]
    assert values[0] == values[1]
    assert "does not exist" in said(run("doctor", tmp_path / "x", "--claim", "1"))
    out = folder(tmp_path / "run", [row("a", 4, 1.0)])
    for given, message in (([], "needs --row and --budget"), (["--row", "b", "--budget", 4], "unknown row 'b'")):
        assert message in said(run("doctor", out, "--claim", "1", *given))


def test_no_two_hypotheses_have_one_name(examiner: Examiner) -> None:
    names = [f.name for f in examine(IMAGES, claim_of(1.0), examiner)]
    assert not [a for a, b in itertools.combinations(names, 2) if a == b]
