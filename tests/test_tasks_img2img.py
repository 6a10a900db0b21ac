"""Image to image: where it starts, what it executes, and that every sampler can do it."""

from __future__ import annotations

import pytest
import torch

from samplers import EpsModel, list_samplers, make_plan, sample, schedules, tasks
from samplers.noise import standard_normal

VP, EDM, FLOW = schedules.vp_linear(), schedules.edm(), schedules.flow()
ALL = {s.name: s for s in list_samplers()}
IMAGE = 0.5 * torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("schedule", [VP, EDM, FLOW], ids=["vp", "edm", "flow"])
def test_every_sampler_starts_from_the_noised_image(exact, name, schedule):
    model = exact(schedule, "v")
    where = {} if ALL[name].adaptive else {"steps": 8}
    edit = tasks.img2img(model, IMAGE, name, strength=0.5, seed=3, **where)
    t = edit.times[0]
    z = standard_normal(3, torch.arange(3), 0, (2,), torch.float64)
    x_T = IMAGE * float(schedule.alpha(t)) + z * float(schedule.sigma(t))
    alone = sample(model, name, x_T=x_T, timesteps=edit.times, seed=3)
    torch.testing.assert_close(edit.x, alone, rtol=1e-9, atol=1e-9)
    if not ALL[name].adaptive:
        full = make_plan(name, schedule, steps=8)
        assert edit.times == full.times[4:]
        assert edit.steps == 4
        assert edit.nfe == edit.plan.nfe < full.nfe
    else:
        assert t == pytest.approx(schedule.t_min + 0.5 * (schedule.t_max - schedule.t_min))
        assert edit.plan is None
        assert edit.nfe > 4


@pytest.mark.parity
@pytest.mark.parametrize("steps", [1, 2, 10, 25, 50])
@pytest.mark.parametrize("strength", [0.02, 0.1, 0.29, 0.3, 0.55, 0.6, 0.7, 0.99, 1.0])
def test_nodes_are_those_of_diffusers(steps, strength):
    from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

    scheduler = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)

    class Pipeline:
        pass

    pipeline = Pipeline()
    pipeline.scheduler = scheduler
    expected, left = StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")
    schedule = schedules.from_alphas_cumprod(scheduler.alphas_cumprod)
    model = EpsModel(lambda x, t: x, schedule)
    if left == 0:
        with pytest.raises(ValueError, match="strength="):
            tasks.img2img(model, IMAGE, "ddim", strength=strength, steps=steps, grid="trailing")
        return
    edit = tasks.img2img(model, IMAGE, "ddim", strength=strength, steps=steps, grid="trailing")
    assert edit.times[:-1] == tuple(expected.tolist())
    assert edit.steps == edit.nfe == left


def test_full_strength_is_sampling_but_for_what_is_left_of_the_image(exact):
    model = exact(FLOW, "v")
    edit = tasks.img2img(model, IMAGE, "dpmpp-2m", strength=1.0, nfe=6, seed=1)
    x_T = standard_normal(1, torch.arange(3), 0, (2,), torch.float64)
    torch.testing.assert_close(edit.x, sample(model, "dpmpp-2m", x_T=x_T, nfe=6), rtol=0, atol=0)
    assert edit.nfe == 6


def test_less_strength_stays_nearer_to_the_image(exact):
    model = exact(VP)
    distances = [
        float((tasks.img2img(model, IMAGE, "ddim", strength=s, steps=50).x - IMAGE).square().mean())
        for s in (0.02, 0.2, 0.5, 1.0)
    ]
    assert distances == sorted(distances)
    assert distances[0] < 0.01 < 0.1 < distances[-1]


def test_budget_is_of_the_whole_grid(exact):
    edit = tasks.img2img(exact(VP), IMAGE, "heun", strength=0.6, nfe=10)
    assert (edit.steps, edit.nfe) == (3, 6)
    mixed = tasks.img2img(exact(VP), IMAGE, "dpm-solver-3s", strength=0.5, nfe=10)  # steps of orders 3, 3, 3, 1
    assert (mixed.steps, mixed.nfe) == (2, 4)


def test_a_sample_is_the_same_in_any_batch(exact):
    whole = tasks.img2img(exact(VP), IMAGE, "ddpm", strength=0.5, steps=6, seed=7)
    alone = tasks.img2img(exact(VP), IMAGE[2:], "ddpm", strength=0.5, steps=6, seed=7, indices=torch.tensor([2]))
    torch.testing.assert_close(whole.x[2:], alone.x, rtol=1e-12, atol=1e-12)


def test_explicit_nodes_and_noise(exact):
    model, noise = exact(EDM), torch.ones_like(IMAGE)
    edit = tasks.img2img(model, IMAGE, "euler", strength=1.0, sigmas=[2.0, 1.0, 0.0], noise=noise)
    torch.testing.assert_close(edit.x, sample(model, "euler", x_T=IMAGE + 2 * noise, sigmas=[2.0, 1.0, 0.0]))


def test_callback_tells_of_executed_steps(exact):
    seen = []
    for name in ("heun", "rk45"):
        edit = tasks.img2img(exact(VP), IMAGE, name, strength=0.5, steps=6, callback=seen.append)
        assert [(p.step, p.steps, p.t) for p in seen] == [(k + 1, 3, edit.times[k + 1]) for k in range(3)]
        assert seen[-1].nfe == edit.nfe
        seen.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": 0}, r"strength must lie in \(0, 1\], got 0"),
        ({"strength": 1.2}, r"strength must lie in \(0, 1\], got 1.2"),
        ({"strength": float("nan")}, "strength must lie in"),
        ({"strength": True}, "strength must lie in"),
        ({"strength": 0.05}, "strength=0.05 of 10 steps leaves none to take; give a strength of at least 0.1"),
        ({"noise": torch.zeros(1, 2)}, r"noise must be of the shape of image, \(3, 2\), got \(1, 2\)"),
        ({"noise": torch.zeros(3, 2, device="meta")}, "noise is on meta, image on cpu"),
        ({"nfe": 10}, "give exactly one of steps, nfe"),
        ({"sampler": "dimm"}, "unknown sampler 'dimm'; did you mean"),
        ({"eta_": 1}, "unknown option of sampler 'ddim'"),
    ],
)
def test_mistakes(exact, change, message):
    arguments = {"sampler": "ddim", "strength": 0.5, "steps": 10} | change
    with pytest.raises(ValueError, match=message):
        tasks.img2img(exact(VP), IMAGE, **arguments)


def test_mixed_devices_and_dtypes():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, t):
            return x * self.weight

    model = EpsModel(Net(), VP)
    with pytest.raises(ValueError, match="image is on meta, the network on cpu"):
        tasks.img2img(model, torch.zeros(1, 2, device="meta"), "ddim", strength=0.5, steps=2)
    with pytest.raises(ValueError, match=r"image is torch.float64, the network torch.float32"):
        tasks.img2img(model, IMAGE, "ddim", strength=0.5, steps=2)
    with pytest.raises(TypeError, match="image must be a floating-point tensor"):
        tasks.img2img(model, torch.zeros(1, 2, dtype=torch.uint8), "ddim", strength=0.5, steps=2)
    with pytest.raises(TypeError, match="model must be an EpsModel"):
        tasks.img2img(Net(), IMAGE, "ddim", strength=0.5, steps=2)


def test_an_analytical_first_step_is_for_start_noise_alone(exact):
    model, start = exact(VP, "eps"), torch.zeros(3, 2, dtype=torch.float64)
    edit = tasks.img2img(model, IMAGE, "dpmpp-2m", strength=0.5, nfe=6, afs=True)
    plain = tasks.img2img(model, IMAGE, "dpmpp-2m", strength=1, timesteps=edit.times)
    assert edit.nfe == edit.steps == 3
    torch.testing.assert_close(edit.x, plain.x, rtol=1e-12, atol=1e-12)
    noise = standard_normal(0, torch.arange(3), 0, (2,), torch.float64)
    whole = tasks.img2img(model, start, "dpmpp-2m", strength=1, nfe=6, afs=True, noise=noise)
    expected = sample(model, "dpmpp-2m", x_T=noise * float(VP.sigma(VP.t_max)), nfe=6, afs=True)
    assert whole.nfe == 6
    torch.testing.assert_close(whole.x, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_compiled_loop_is_the_same(exact):
    given = {"strength": 0.5, "nfe": 4}
    eager, compiled = (
        tasks.img2img(exact(VP, "eps"), IMAGE, "dpmpp-2m", **given, compile=how) for how in (None, "loop")
    )
    torch.testing.assert_close(compiled.x, eager.x, rtol=1e-10, atol=1e-10)
