"""Networks that learned a variance too, under "ddpm" of PlanScheduler: the noise of diffusers' DDPM with `learned_range`."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
from samplers import sample  # noqa: E402  after the check that diffusers is there
from samplers.adapters.diffusers import PlanScheduler, eps_model_from_diffusers  # noqa: E402
from samplers.adapters.variance import sample_learned_variance  # noqa: E402

CONFIG = {"beta_schedule": "linear", "variance_type": "learned_range", "clip_sample": False}
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Learned(nn.Module):
    """Epsilon, and the learned interpolation between the two variances, other for every number."""

    def forward(self, x: Tensor, t: Any) -> Tensor:
        return torch.cat([0.9 * x.tanh(), (3.0 * x).sin()], 1)


def draw(k: int) -> Tensor:
    return torch.randn(X.shape, generator=torch.Generator().manual_seed(100 + k), dtype=torch.float64)


def loop(scheduler: Any, x: Tensor, net: Any = None, begin: int = 0, end: int | None = None) -> Tensor:
    net = Learned() if net is None else net
    if begin:
        scheduler.set_begin_index(begin)
    for t in scheduler.timesteps[begin:end]:
        x = scheduler.step(net(x, t), t, x, noise_source=lambda k, like: draw(k).to(like.dtype)).prev_sample
    return x


def made(steps: int, config: dict[str, Any] = CONFIG, sampler: str = "ddpm", **options: Any) -> Any:
    scheduler = PlanScheduler.from_config(config, sampler=sampler, grid="config", **options)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("steps", [4, 20, 250])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_it_is_ddpm_of_diffusers(steps: int, spacing: str, prediction: str) -> None:
    """But for the step to clean data from above t = 0, in which they draw noise between beta and 1e-20; here there is none."""
    config = {**CONFIG, "timestep_spacing": spacing, "prediction_type": prediction}
    theirs, ours = diffusers.DDPMScheduler(**config), made(steps, config)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    theirs.alphas_cumprod = torch.cumprod(1 - betas, 0)  # theirs is of float32
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == ours.timesteps.tolist()
    drawn, x, net = iter(range(steps)), X, Learned()
    end = steps - (spacing == "trailing")
    with pytest.MonkeyPatch.context() as patch:
        module = diffusers.schedulers.scheduling_ddpm
        patch.setattr(module, "randn_tensor", lambda *_, **__: draw(next(drawn)))
        for t in theirs.timesteps[:end]:
            x = theirs.step(net(x, t), t, x).prev_sample
    assert (loop(ours, X, end=end) - x).abs().max() < 1e-10 * x.abs().max()
    fixed = made(steps, {**config, "variance_type": "fixed_small"})
    assert (loop(fixed, X, end=end) - x).abs().max() > 1e-2


@pytest.mark.parametrize("begin", [0, 3])
@torch.no_grad()
def test_it_is_sample_learned_variance(begin: int) -> None:
    ours = made(8)
    sigmas = [*(call.sigma / call.alpha for call in ours.plan.calls[begin:]), 0.0]
    model = eps_model_from_diffusers(Learned(), diffusers.DDPMScheduler(**CONFIG))
    wanted = sample_learned_variance(model, x_T=X, sigmas=sigmas, noise_source=lambda k, like: draw(k))
    assert (loop(ours, X, begin=begin) - wanted).abs().max() < 1e-10


@torch.no_grad()
def test_the_option_and_other_samplers_leave_it_out() -> None:
    class Half(Learned):
        def forward(self, x: Tensor, t: Any) -> Tensor:
            return super().forward(x, t)[:, :4]

    for sampler, options in (
        ("ddpm", {"variance": "fixed_small"}),
        ("ddpm", {"variance": "fixed_large"}),
        ("ddim", {}),
    ):
        whole, half = (loop(made(6, sampler=sampler, **options), X, net) for net in (Learned(), Half()))
        assert torch.equal(whole, half)
    assert torch.equal(
        loop(made(6), X, Half()), loop(made(6, variance="fixed_small"), X, Half())
    )  # nothing was learned


@torch.no_grad()
def test_half_precision_stays_what_it_is() -> None:
    assert loop(made(5), X.half()).dtype == torch.float16


def test_a_variance_that_is_learned_otherwise_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)  # it does not propagate
    try:
        made(5, {**CONFIG, "variance_type": "learned"}, sampler="ddim")
        assert not caplog.text
        made(5, {**CONFIG, "variance_type": "learned"})
    finally:
        logger.removeHandler(caplog.handler)
    assert "variance_type='learned' of the scheduler's config is not used: of learned variances" in caplog.text


def test_a_plan_cannot_have_it_and_says_what_can() -> None:
    model = eps_model_from_diffusers(Learned(), diffusers.DDPMScheduler(**CONFIG))
    with pytest.raises(ValueError, match="variance of a plan .* got 'learned'.*sample_learned_variance"):
        sample(model, "ddpm", x_T=X, steps=3, variance="learned")
