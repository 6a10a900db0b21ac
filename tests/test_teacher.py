"""The teacher: reproducible batches, the objective by hand, the course of its learning rate, and what it begins with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from distill.batches import examples, step_generator
from distill.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from distill.method import Batch, Phase
from distill.teacher import Teacher, TeacherConfig
from distill.trainer import Trainer
from samplers import schedule as schedules

TINY: dict[str, Any] = {
    "network": {"class": "PatchUNet", "size": 8, "patch": 2, "widths": [16, 16], "classes": 3},
    "images": 16 * 20,
    "batch_size": 16,
    "warmup": 64,
    "cooldown": 64,
    "ema_half_lives": [64],
    "dtype": "fp32",
    "log_every": 5,
    "save_every": 10,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The order of a sum, and with it the last bit, depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(**changes: Any) -> TeacherConfig:
    return TeacherConfig(**{**TINY, **changes})


def trainer(folder: Path, **changes: Any) -> Trainer:
    return Trainer(Teacher(config(**changes)), folder)


def data() -> tuple[Tensor, Tensor]:
    """100 images (1, 8, 8) of three classes that differ in brightness, with a little noise."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 100)
    images = 60 + 60 * labels[:, None, None, None] + rng.integers(0, 10, (100, 1, 8, 8))
    return torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels)


def draw(settings: TeacherConfig, step: int, images: Tensor, labels: Tensor | None = None) -> Batch:
    """The batch of a step, as the trainer makes it."""
    method = Teacher(settings)
    null_class = method.network().classes
    seen = examples(images, labels, null_class, settings.seed, settings.batch_size, step)
    return method.draw(seen["x0"], seen["labels"], step_generator(settings.seed, step), 0)


# batches -------------------------------------------------------------------------------------------------------------


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    images, labels = data()
    first, again, later, other = (
        draw(config(seed=seed), step, images, labels) for seed, step in ((0, 7), (0, 7), (0, 8), (1, 7))
    )
    for name in ("x0", "labels", "t", "eps"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], later[name])
        assert not torch.equal(first[name], other[name])
    assert (first["x0"].dtype, first["labels"].dtype, first["t"].dtype) == (torch.float32, torch.int64, torch.float32)
    assert first["x0"].min() >= -1
    assert first["x0"].max() <= 1


def test_the_order_of_the_images_is_a_permutation_for_each_epoch() -> None:
    count, size = 100, 16
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    drawn = [draw(config(seed=5), step, images)["x0"][:, 0, 0, 0] for step in range(50)]
    seen = ((torch.cat(drawn) + 1) * 127.5).round().long().numpy()
    orders = [np.random.Generator(np.random.Philox(key=[5, epoch])).permutation(count) for epoch in range(8)]
    np.testing.assert_array_equal(seen, np.concatenate(orders)[: 50 * size])
    assert not np.array_equal(orders[0], orders[1])


def test_half_of_the_images_are_mirrored_where_that_is_asked() -> None:
    images = torch.arange(8, dtype=torch.uint8).expand(50, 1, 8, 8)
    turned = [bool(row[0] > row[-1]) for step in range(20) for row in drawn_rows(images, step)]
    assert 0.4 < np.mean(turned) < 0.6
    assert torch.equal(drawn_rows(images, 3), drawn_rows(images, 3))
    assert not any(bool(row[0] > row[-1]) for row in examples(images, None, 3, 0, 32, 0)["x0"][:, 0, 0])


def drawn_rows(images: Tensor, step: int) -> Tensor:
    """The first row of pixels of each image of a step."""
    return examples(images, None, 3, 0, 32, step, mirror=True)["x0"][:, 0, 0]


def test_a_batch_larger_than_the_data_goes_through_it_more_than_once() -> None:
    images = torch.arange(3, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    batch = draw(config(batch_size=9), 0, images)
    values = ((batch["x0"][:, 0, 0, 0] + 1) * 127.5).round().long()
    assert torch.bincount(values).tolist() == [3, 3, 3]


def test_image_and_label_stay_together() -> None:
    images, _ = data()
    labels = (images[:, 0, 0, 0] % 3).long()
    batch = draw(config(drop_label=0.0), 3, images, labels)
    values = ((batch["x0"][:, 0, 0, 0] + 1) * 127.5).round().long()
    assert torch.equal(batch["labels"], values % 3)


def test_labels_are_dropped_with_their_probability() -> None:
    images, labels = data()
    settings = config(batch_size=1000, drop_label=0.1)
    dropped = sum(int((draw(settings, step, images, labels)["labels"] == 3).sum()) for step in range(10))
    assert stats.binomtest(dropped, 10_000, 0.1).pvalue > 1e-3
    assert not (draw(config(drop_label=0.0), 0, images, labels)["labels"] == 3).any()
    assert (draw(config(drop_label=1.0), 0, images, labels)["labels"] == 3).all()


def test_without_labels_every_row_has_the_null_class() -> None:
    assert (draw(config(), 0, data()[0])["labels"] == 3).all()


@pytest.mark.parametrize("schedule", [schedules.cosine(), schedules.from_betas(np.linspace(1e-4, 0.02, 10))])
def test_times_are_uniform_and_stratified(schedule: schedules.Schedule) -> None:
    settings = config(batch_size=50, schedule=schedule.config())
    drawn = torch.stack([draw(settings, step, data()[0])["t"] for step in range(40)]).double()
    unit = ((drawn - schedule.t_min) / (schedule.t_max - schedule.t_min)).numpy()
    np.testing.assert_array_equal(np.sort(np.floor(unit * 50), axis=1), np.tile(np.arange(50), (40, 1)))
    assert stats.kstest((unit * 50 % 1).ravel(), "uniform").pvalue > 1e-3  # within a stratum
    shuffled = stats.kstest(unit[:, 0], "uniform")  # of the image in one place
    assert shuffled.pvalue > 1e-3


def test_the_noise_is_standard_normal() -> None:
    eps = draw(config(batch_size=200), 1, data()[0])["eps"]
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
    settings = config(batch_size=4, predicts=predicts, schedule=schedule.config())
    batch, network = draw(settings, 0, *data()), Recorder()
    loss = Teacher(settings).loss(network, batch, 0)
    total = 0.0
    for i in range(4):
        t = float(batch["t"][i])
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        x0, eps = batch["x0"][i].double().numpy(), batch["eps"][i].double().numpy()
        state = alpha * x0 + sigma * eps
        np.testing.assert_allclose(network.asked[0][i].numpy(), state, atol=1e-5)
        target = eps if predicts == "eps" else alpha * eps - sigma * x0
        total += float(((0.5 * state - target) ** 2).mean()) / 4
    assert float(loss) == pytest.approx(total, rel=1e-5)
    assert torch.equal(network.asked[1], batch["t"])
    assert torch.equal(network.asked[2], batch["labels"])


def test_a_perfect_network_has_no_loss() -> None:
    batch = draw(config(), 0, *data())
    alpha, sigma = (f(batch["t"]).view(-1, 1, 1, 1) for f in (schedules.cosine().alpha, schedules.cosine().sigma))
    for predicts, answer in (("eps", batch["eps"]), ("v", alpha * batch["eps"] - sigma * batch["x0"])):
        network = Recorder()
        network.forward = lambda x, t, labels, answer=answer: answer  # type: ignore[method-assign,misc]
        assert float(Teacher(config(predicts=predicts)).loss(network, batch, 0)) < 1e-12


@pytest.mark.parametrize(("dtype", "inside"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_network_computes_in_the_configured_dtype_and_the_loss_in_fp32(dtype: str, inside: torch.dtype) -> None:
    settings = config(dtype=dtype)
    network, seen = Teacher(settings).network(), []
    network.unet.conv_in.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    loss = Teacher(settings).loss(network, draw(settings, 0, *data()), 0)
    assert (loss.dtype, loss.dim(), seen) == (torch.float32, 0, [inside])


# the learning rate ---------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_stays_and_falls() -> None:
    (phase,) = Teacher(config(images=1600, warmup=160, cooldown=320, learning_rate=0.5)).phases
    rates = [phase.rate(step, 16) for step in range(phase.steps(16))]
    np.testing.assert_allclose(rates[:10], 0.05 * np.arange(1, 11))
    np.testing.assert_allclose(rates[9:81], 0.5)
    np.testing.assert_allclose(rates[80:], 0.025 * np.arange(20, 0, -1))
    flat = Phase("", 640, 0.5)
    assert {flat.rate(step, 16) for step in range(flat.steps(16))} == {0.5}


def test_the_steps_are_whole_batches() -> None:
    assert [Phase("", images, 0.5).steps(16) for images in (1, 16, 17, 640)] == [1, 1, 2, 40]


# what a run begins with ----------------------------------------------------------------------------------------------


def test_the_first_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    first, again, other = (trainer(tmp_path, seed=s).weights.network.unet.conv_in.weight for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_building_a_trainer_leaves_the_global_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    trainer(tmp_path, seed=1)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.slow
def test_a_new_run_may_begin_with_the_weights_of_a_checkpoint(tmp_path: Path) -> None:
    trainer(tmp_path / "first", images=32).run(*data(), quiet=True)
    init, trained = str(tmp_path / "first/model"), load_checkpoint(tmp_path / "first/model").network.state_dict()
    begun = trainer(tmp_path / "new", images=32, init=init)
    for network in (begun.weights.network, begun.weights.averaged()):
        assert all(torch.equal(value, trained[name]) for name, value in network.state_dict().items())
    assert begun.step == 0
    begun.run(*data(), quiet=True)
    resumed = trainer(tmp_path / "new", images=32, init=None)  # a run that goes on keeps its own weights
    assert resumed.step == 2
    assert not torch.equal(resumed.weights.averaged().unet.conv_in.weight, trained["unet.conv_in.weight"])


@pytest.mark.slow
def test_a_run_that_goes_on_does_not_need_what_it_began_with(tmp_path: Path) -> None:
    trainer(tmp_path / "first", images=32).run(*data(), quiet=True)
    init = str(tmp_path / "first/model")
    trainer(tmp_path / "new", images=32, init=init).run(*data(), quiet=True)
    shutil.rmtree(init)
    assert trainer(tmp_path / "new", images=32, init=init).step == 2


@pytest.mark.parametrize("changes", [{"predicts": "eps"}, {"schedule": {"name": "vp_linear"}}], ids=str)
def test_weights_that_predict_something_else_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    trainer(tmp_path / "first", images=32).run(*data(), quiet=True)
    with pytest.raises(CheckpointError, match=f"does not fit: {next(iter(changes))} is"):
        trainer(tmp_path / "new", init=str(tmp_path / "first/model"), **changes)


def test_a_run_may_begin_with_a_narrower_network_of_the_same_layout(tmp_path: Path) -> None:
    narrow, wide = ({**config().network, "widths": [16, width]} for width in (32, 64))
    method = Teacher(config(network=narrow))
    trained = method.network().eval()
    save_checkpoint(tmp_path / "narrow", method.checkpoint(trained, 0, {}))
    begun = trainer(tmp_path / "wide", network=wide, init=str(tmp_path / "narrow"))
    assert begun.weights.network.arguments["widths"] == [16, 64]
    first, second = trained.state_dict(), begun.weights.network.state_dict()
    assert torch.equal(first["unet.conv_in.weight"], second["unet.conv_in.weight"])
    for widths, classes, message in (
        ([32, 32], 3, "widths must begin with 16"),
        ([16, 32], 4, "is of another architecture: 'unet.*' is "),
    ):
        other = {**narrow, "widths": widths, "classes": classes}
        with pytest.raises(CheckpointError, match=message):
            trainer(tmp_path / "other", network=other, init=str(tmp_path / "narrow"))
    with pytest.raises(CheckpointError, match="nothing/config.json does not exist"):
        trainer(tmp_path / "other", init=str(tmp_path / "nothing"))
