"""Teacher training: reproducible batches, the objective by hand, the schedules of a run, and its settings."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from torch import Tensor, nn

from distill.config import MNIST_CONFIG, TeacherConfig, load_config
from distill.teacher import (
    Trainer,
    diffusion_loss,
    draw_batch,
    ema_decay,
    learning_rate,
)
from samplers import schedule as schedules

TINY: dict[str, Any] = {
    "network": {"class": "PatchUNet", "size": 8, "patch": 2, "widths": [16, 16], "classes": 3},
    "images": 16 * 40,
    "batch_size": 16,
    "warmup": 64,
    "cooldown": 64,
    "ema_half_life": 64,
    "dtype": "fp32",
    "log_every": 5,
    "save_every": 20,
}


def config(**changes: Any) -> TeacherConfig:
    return TeacherConfig(**{**TINY, **changes})


def data() -> tuple[Tensor, Tensor]:
    """100 images (1, 8, 8) of three classes that differ in brightness, with a little noise."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 100)
    images = 60 + 60 * labels[:, None, None, None] + rng.integers(0, 10, (100, 1, 8, 8))
    return torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels)


# batches -------------------------------------------------------------------------------------------------------------


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    images, labels = data()
    first, again, later, other = (
        draw_batch(images, labels, 3, schedules.cosine(), config(seed=seed), step)
        for seed, step in ((0, 7), (0, 7), (0, 8), (1, 7))
    )
    for name in ("x0", "labels", "t", "eps"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(later, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert (first.x0.dtype, first.labels.dtype, first.t.dtype) == (torch.float32, torch.int64, torch.float32)
    assert first.x0.min() >= -1
    assert first.x0.max() <= 1


def test_the_order_of_the_images_is_a_permutation_for_each_epoch() -> None:
    count, size = 100, 16
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    drawn = [draw_batch(images, None, 3, schedules.cosine(), config(seed=5), step).x0[:, 0, 0, 0] for step in range(50)]
    seen = ((torch.cat(drawn) + 1) * 127.5).round().long().numpy()
    orders = [np.random.Generator(np.random.Philox(key=[5, epoch])).permutation(count) for epoch in range(8)]
    np.testing.assert_array_equal(seen, np.concatenate(orders)[: 50 * size])
    assert not np.array_equal(orders[0], orders[1])


def test_a_batch_larger_than_the_data_goes_through_it_more_than_once() -> None:
    images = torch.arange(3, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    batch = draw_batch(images, None, 3, schedules.cosine(), config(batch_size=9), 0)
    values = ((batch.x0[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert torch.bincount(values).tolist() == [3, 3, 3]


def test_image_and_label_stay_together() -> None:
    images, _ = data()
    labels = (images[:, 0, 0, 0] % 3).long()
    batch = draw_batch(images, labels, 3, schedules.cosine(), config(drop_label=0.0), 3)
    values = ((batch.x0[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert torch.equal(batch.labels, values % 3)


def test_labels_are_dropped_with_their_probability() -> None:
    images, labels = data()
    settings = config(batch_size=1000, drop_label=0.1)
    dropped = sum(
        int((draw_batch(images, labels, 3, schedules.cosine(), settings, step).labels == 3).sum()) for step in range(10)
    )
    assert stats.binomtest(dropped, 10_000, 0.1).pvalue > 1e-3
    assert not (draw_batch(images, labels, 3, schedules.cosine(), config(drop_label=0.0), 0).labels == 3).any()
    assert (draw_batch(images, labels, 3, schedules.cosine(), config(drop_label=1.0), 0).labels == 3).all()


def test_without_labels_every_row_has_the_null_class() -> None:
    assert (draw_batch(data()[0], None, 3, schedules.cosine(), config(), 0).labels == 3).all()


@pytest.mark.parametrize("schedule", [schedules.cosine(), schedules.from_betas(np.linspace(1e-4, 0.02, 1000))])
def test_times_are_uniform_and_stratified(schedule: schedules.Schedule) -> None:
    settings = config(batch_size=50)
    drawn = torch.stack([draw_batch(data()[0], None, 3, schedule, settings, step).t for step in range(40)]).double()
    unit = ((drawn - schedule.t_min) / (schedule.t_max - schedule.t_min)).numpy()
    np.testing.assert_array_equal(np.sort(np.floor(unit * 50), axis=1), np.tile(np.arange(50), (40, 1)))
    assert stats.kstest((unit * 50 % 1).ravel(), "uniform").pvalue > 1e-3  # within a stratum
    assert (
        stats.kstest(unit[:, 0], "uniform").pvalue > 1e-3
    )  # of the image in one place, which is why they are shuffled


def test_the_noise_is_standard_normal() -> None:
    eps = draw_batch(data()[0], None, 3, schedules.cosine(), config(batch_size=200), 1).eps
    assert stats.kstest(eps.numpy().ravel(), "norm").pvalue > 1e-3


# the objective -------------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """A network that answers half its input and remembers what it was asked."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.asked = x, t, labels
        return 0.5 * x


@pytest.mark.parametrize("schedule", [schedules.cosine(), schedules.flow()])
@pytest.mark.parametrize("predicts", ["eps", "v"])
def test_the_loss_is_its_definition(predicts: str, schedule: schedules.Schedule) -> None:
    batch = draw_batch(*data(), 3, schedule, config(batch_size=4), 0)
    network = Recorder()
    loss = diffusion_loss(network, batch, schedule, predicts, torch.float32)
    total = 0.0
    for i in range(4):
        t = float(batch.t[i])
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        x0, eps = batch.x0[i].double().numpy(), batch.eps[i].double().numpy()
        state = alpha * x0 + sigma * eps
        np.testing.assert_allclose(network.asked[0][i].numpy(), state, atol=1e-5)
        target = eps if predicts == "eps" else alpha * eps - sigma * x0
        total += float(((0.5 * state - target) ** 2).mean()) / 4
    assert float(loss) == pytest.approx(total, rel=1e-5)
    assert torch.equal(network.asked[1], batch.t)
    assert torch.equal(network.asked[2], batch.labels)


def test_a_perfect_network_has_no_loss() -> None:
    batch = draw_batch(*data(), 3, schedules.cosine(), config(), 0)
    alpha, sigma = (f(batch.t).view(-1, 1, 1, 1) for f in (schedules.cosine().alpha, schedules.cosine().sigma))
    for predicts, answer in (("eps", batch.eps), ("v", alpha * batch.eps - sigma * batch.x0)):
        network = Recorder()
        network.forward = lambda x, t, labels, answer=answer: answer  # type: ignore[method-assign,misc]
        assert float(diffusion_loss(network, batch, schedules.cosine(), predicts, torch.float32)) < 1e-12


def test_the_learning_rate_rises_stays_and_falls() -> None:
    settings = config(images=1600, batch_size=16, warmup=160, cooldown=320, learning_rate=0.5)
    rates = [learning_rate(settings, step) for step in range(settings.steps)]
    np.testing.assert_allclose(rates[:10], 0.05 * np.arange(1, 11))
    np.testing.assert_allclose(rates[9:81], 0.5)
    np.testing.assert_allclose(rates[80:], 0.025 * np.arange(20, 0, -1))
    flat = config(warmup=0, cooldown=0, learning_rate=0.5)
    assert {learning_rate(flat, step) for step in range(flat.steps)} == {0.5}


def test_the_steps_are_whole_batches() -> None:
    assert [config(images=n).steps for n in (1, 16, 17, 640)] == [1, 1, 2, 40]


def test_the_average_follows_its_formula(tmp_path: Path) -> None:
    settings = config(ema_half_life=20)
    trainer = Trainer(settings, tmp_path)
    name = "unet.conv_in.weight"
    average = trainer.network.state_dict()[name].double().clone()
    for step in range(1, 16):
        trainer._train_step(*data())
        decay = 0.5 ** (16 / min(20, 0.05 * 16 * step))
        assert ema_decay(settings, step) == decay
        average = decay * average + (1 - decay) * trainer.network.state_dict()[name].double()
        torch.testing.assert_close(trainer.ema.state_dict()[name].double(), average, rtol=1e-5, atol=1e-6)
    assert ema_decay(settings, 1) == 0.5**20, "after one step the first weights are forgotten"
    assert ema_decay(settings, 1000) == 0.5**0.8, "the half-life is the configured one in the end"
    assert not torch.equal(trainer.ema.state_dict()[name], trainer.network.state_dict()[name])


# settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predicts": "x0"}, r"unknown predicts 'x0'; .*accepted: eps, v"),
        ({"dtype": "fp16"}, r"unknown dtype 'fp16'; .*accepted: bf16, fp32"),
        ({"images": 0}, r"images must be at least 1 .* got 0"),
        ({"batch_size": -1}, r"batch_size must be at least 1 .* got -1"),
        ({"ema_half_life": 0}, r"ema_half_life must be at least 1"),
        ({"warmup": -1}, r"warmup must be at least 0"),
        ({"weight_decay": math.inf}, r"weight_decay must be at least 0 and finite, got inf"),
        ({"learning_rate": 0.0}, r"learning_rate must be positive and finite, got 0\.0"),
        ({"learning_rate": math.nan}, r"learning_rate must be positive and finite, got nan"),
        ({"grad_clip": -1.0}, r"grad_clip must be positive"),
        ({"drop_label": 1.1}, r"drop_label must be at most 1, got 1\.1"),
        ({"drop_label": -0.1}, r"drop_label must be at least 0"),
        ({"seed": -1}, r"seed must be at least 0"),
        ({"seed": 2**31}, r"seed must be at most 2147483647"),
        ({"log_every": 3, "save_every": 20}, r"save_every must be a multiple of log_every=3, got 20"),
        ({"network": {"class": "UNet"}}, r"unknown network class 'UNet'; did you mean 'PatchUNet'"),
        ({"network": {"class": "PatchUNet", "width": [8]}}, r"'width'; did you mean 'widths'"),
        ({"schedule": {"name": "cosin"}}, r"schedule name must be one of .* got 'cosin'"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**TINY, **changes}))
    with pytest.raises(ValueError, match=message) as caught:
        load_config(file)
    assert str(file) in str(caught.value)


def test_the_shipped_settings_are_the_defaults_written_out() -> None:
    assert load_config(MNIST_CONFIG) == TeacherConfig(images=2_920_000)
    written = yaml.safe_load(MNIST_CONFIG.read_text())
    assert list(written) == [f.name for f in dataclasses.fields(TeacherConfig)]


def test_overrides_replace_what_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("batch_size: 4\nlearning_rate: 1\n")
    assert load_config(str(file)) == TeacherConfig(batch_size=4, learning_rate=1.0)
    assert load_config(file, batch_size=8, seed=3) == TeacherConfig(batch_size=8, learning_rate=1.0, seed=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imges: 3", r"'imges'; did you mean 'images'"),
        ("3: 3", r"unknown setting in .* 3; .*accepted: "),
        ("images: '3'", r"images must be of type int, got '3'"),
        ("images: 3.0", r"images must be of type int, got 3\.0"),
        ("images: true", r"images must be of type int, got True"),
        ("learning_rate: 1e-3", r"learning_rate must be of type float, got '1e-3' \(.*1\.0e-3"),
        ("learning_rate: null", r"learning_rate must be of type float, got None"),
        ("dtype: 16", r"dtype must be of type str, got 16"),
        ("network: PatchUNet", r"network must be of type dict, got 'PatchUNet'"),
        ("- images", r"must map the names of TeacherConfig to values, got a list"),
        ("", r"must map the names of TeacherConfig to values, got a NoneType"),
        ("images: [", r"is not YAML"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_name(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_config(file)
    assert str(file) in str(caught.value)


def test_overrides_are_checked_like_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"overrides of .*mnist\.yaml.* 'imags'; did you mean 'images'"):
        load_config(MNIST_CONFIG, imags=3)
    with pytest.raises(ValueError, match=r"overrides of .*mnist\.yaml: images must be of type int, got 1\.5"):
        load_config(MNIST_CONFIG, images=1.5)
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_config(tmp_path / "nothing.yaml")


# a trainer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (data()[0].float(), None, r"images must be \(N, 1, 8, 8\) uint8 .* got \(100, 1, 8, 8\) torch\.float32"),
        (data()[0][:, 0], None, r"images must be .* got \(100, 8, 8\)"),
        (data()[0].expand(-1, 3, -1, -1), None, r"images must be .* got \(100, 3, 8, 8\)"),
        (data()[0][:0], None, r"with N > 0, got \(0, 1, 8, 8\)"),
        (data()[0], data()[1][:-1], r"labels must be \(100,\) integers in 0 \.\. 2, got \(99,\)"),
        (data()[0], data()[1] + 1, r"labels must be \(100,\) integers in 0 \.\. 2, got 1 \.\. 3"),
        (data()[0], data()[1] - 1, r"labels must be .* got -1 \.\. 1"),
        (data()[0], data()[1].float(), r"labels must be .* got \(100,\) torch\.float32"),
        (data()[0], data()[1][:, None], r"labels must be .* got \(100, 1\)"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(
    images: Tensor, labels: Tensor | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(config(), tmp_path).run(images, labels, quiet=True)
    assert not any(tmp_path.iterdir())


def test_the_first_weights_depend_on_the_seed(tmp_path: Path) -> None:
    first, again, other = (Trainer(config(seed=seed), tmp_path).network.unet.conv_in.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_building_a_trainer_leaves_the_global_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    Trainer(config(seed=1), tmp_path)
    assert torch.equal(torch.rand(1), expected)
