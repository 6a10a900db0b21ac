"""Noise by counter: the published generator, standard normal numbers, and independence of whatever batch it is drawn in."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from samplers.noise import SeededNoise, check_seed, philox, standard_normal


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter, key, expected):
    words = tuple(torch.tensor([int(word, 16)]) for word in counter.split())
    low, high = (int(word, 16) for word in key.split())
    assert " ".join(f"{int(word):08x}" for word in philox(words, low | high << 32)) == expected


def numbers(seed=0, indices=range(64), number=0, shape=(1024,), dtype=torch.float64):
    return standard_normal(seed, torch.tensor(indices), number, shape, dtype)


def test_numbers_are_box_mullers():
    words = [(word + 0.5) / 2**32 for word in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)]  # of counter 0, key 0
    radius = [math.sqrt(-2 * math.log(word)) for word in words[:2]]
    angle = [2 * math.pi * word for word in words[2:]]
    expected = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
    expected += [r * math.sin(a) for r, a in zip(radius, angle, strict=True)]
    assert numbers(indices=[0], shape=(4,))[0].tolist() == pytest.approx(expected, rel=1e-13)


def test_numbers_are_standard_normal():
    z = numbers().flatten().numpy()  # 65536 of them: four standard errors of each moment
    for power, moment, error in ((1, 0.0, 1.0), (2, 1.0, 2**0.5), (3, 0.0, 15**0.5), (4, 3.0, 96**0.5)):
        assert (z**power).mean() == pytest.approx(moment, abs=4 * error / len(z) ** 0.5)
    assert stats.kstest(z, "norm").pvalue > 0.01


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"seed": 2**63}, {"number": 1}, {"indices": range(64, 128)}, {"indices": range(2**40, 2**40 + 64)}],
)
def test_streams_are_independent(other):
    a, b = numbers().flatten(), numbers(**other).flatten()
    assert abs(stats.pearsonr(a, b).statistic) < 4 / len(a) ** 0.5
    assert abs(stats.pearsonr(a**2, b**2).statistic) < 4 / len(a) ** 0.5
    assert len(torch.cat([a, b]).unique()) > 1.99 * len(a)


def test_numbers_within_a_sample_are_independent():
    z = numbers(indices=range(4096), shape=(32,))  # four neighbours share a counter
    for values in (z, z**2):
        assert torch.corrcoef(values.T).sub(torch.eye(32)).abs().max() < 5 / 4096**0.5


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("shape", [(5,), (3, 8, 8), ()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_sample_does_not_depend_on_its_batch(batch, shape, dtype):
    together = numbers(indices=range(64), shape=shape, dtype=dtype)
    assert together.shape == (64, *shape)
    assert together.dtype == dtype
    parts = [numbers(indices=range(i, min(i + batch, 64)), shape=shape, dtype=dtype) for i in range(0, 64, batch)]
    assert torch.equal(torch.cat(parts), together)


def test_order_of_indices_is_order_of_samples():
    assert torch.equal(numbers(indices=[3, 1, 3]), numbers(indices=range(4))[[3, 1, 3]])


def test_lower_precision_is_the_rounded_number():
    assert torch.equal(numbers(dtype=torch.float32), numbers().float())


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "0", True, None])
def test_bad_seeds(seed):
    with pytest.raises(ValueError, match=r"seed must be an integer in \[0, 2\^64\), got"):
        check_seed(seed)


def test_a_bad_seed_draws_nothing():
    with pytest.raises(ValueError, match="seed must be an integer .* got -1"):
        numbers(seed=-1)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, np.int64(3), np.uint64(2**64 - 1)])
def test_good_seeds(seed):
    assert check_seed(seed) == seed
    assert type(check_seed(seed)) is int
    assert torch.equal(numbers(seed=seed), numbers(seed=int(seed)))


@pytest.mark.parametrize("at_once", [4, 1 << 12, 1 << 30])
def test_the_bits_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch, at_once):
    indices, shape = torch.arange(3), (5, 31, 31)
    whole = standard_normal(7, indices, 2, shape)
    monkeypatch.setattr("samplers.noise._AT_ONCE", at_once)
    assert torch.equal(standard_normal(7, indices, 2, shape), whole)


@pytest.mark.parametrize("shape", [(3, 4), (3, 1000), (3, 3000), (0, 4)])
def test_a_source_gives_any_noise_at_any_time(shape):
    """Small states have their noises drawn together, which nobody sees: not in their order, nor by writing into one."""
    indices, like = torch.arange(5, 5 + shape[0]), torch.empty(shape)
    draw, out = SeededNoise(7, indices), torch.empty(shape)
    for k in (0, 1, 15, 16, 40, 2, 2, 17, 2**31):
        expected = standard_normal(7, indices, k + 1, shape[1:])
        assert torch.equal(draw(k, like), expected)
        draw(k, like).zero_()
        assert torch.equal(draw(k, like, out), expected)
        assert torch.equal(out, expected)
        assert torch.equal(draw(k, like.double()).float(), expected)


def test_a_source_goes_on_after_a_mistake_and_from_mode_to_mode():
    like, draw = torch.empty(3, 5), SeededNoise(7, torch.arange(3, dtype=torch.int32))
    expected = standard_normal(7, torch.arange(3), 1, (5,))
    assert draw(0, torch.empty(6, 5)).shape == (3, 5)  # not what was asked for, which the executor says
    with torch.inference_mode():
        assert torch.equal(draw(0, like), expected)
    assert torch.equal(draw(0, like).mul_(1.0), expected)
    assert torch.equal(draw(30, like), standard_normal(7, torch.arange(3), 31, (5,)))


def test_noise_is_drawn_where_tensors_have_no_memory_to_show():
    expected = standard_normal(7, torch.arange(3), 2, (5,))

    def squares(scale):
        return (scale * standard_normal(7, torch.arange(3), 2, (5,))).square().sum()

    assert float(torch.func.grad(squares)(torch.tensor(1.0))) == pytest.approx(2 * float(expected.square().sum()))
    with torch.device("meta"):
        assert torch.equal(standard_normal(7, torch.arange(3, device="cpu"), 2, (5,), device="cpu"), expected)


def test_a_large_batch_has_the_bits_of_each_sample_alone():
    indices, shape = torch.arange(5), (3, 300, 300)  # more numbers than are drawn at once
    whole = standard_normal(7, indices, 2, shape)
    for i in range(5):
        assert torch.equal(whole[i : i + 1], standard_normal(7, indices[i : i + 1], 2, shape))
    out = torch.empty((5, *shape)).contiguous(memory_format=torch.channels_last)
    assert torch.equal(standard_normal(7, indices, 2, shape, out=out), whole)
