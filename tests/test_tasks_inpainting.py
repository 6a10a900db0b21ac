"""Inpainting, outpainting and RePaint's resampling."""

from __future__ import annotations

import pytest
import torch

from bench.mixture import GaussianMixture
from samplers import EpsModel, Plan, list_samplers, make_plan, run_plan, sample, schedules, tasks
from samplers.grid import make_grid
from samplers.registry import get_sampler
from samplers.tasks import resampled

VP, EDM, FLOW = schedules.vp_linear(), schedules.edm(), schedules.flow()
ALL = {s.name: s for s in list_samplers()}
PLANNED = [name for name, s in ALL.items() if not s.adaptive]
IMAGE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MASK = torch.zeros(4, 4, dtype=torch.bool)
MASK[1:3, 1:] = True


def gaussian(schedule, mean=0.0):
    """Independent standard normal pixels: x0 is the posterior mean."""

    def x0(x, t):
        t = t.double().view(-1, *[1] * (x.ndim - 1))
        a, s = schedule.alpha(t), schedule.sigma(t)
        return mean + a / (a**2 + s**2) * (x - a * mean)

    return EpsModel(x0, schedule, "x0")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("schedule", [VP, EDM, FLOW], ids=["vp", "edm", "flow"])
def test_every_sampler_keeps_what_is_known(name, schedule):
    where = {} if ALL[name].adaptive else {"steps": 6}
    result = tasks.inpaint(gaussian(schedule), IMAGE, MASK, name, **where)
    assert torch.equal(result.x[..., ~MASK], IMAGE[..., ~MASK])
    assert torch.isfinite(result.x).all()
    assert (result.x[..., MASK] != IMAGE[..., MASK]).all()
    if not ALL[name].adaptive:
        assert result.nfe == make_plan(name, schedule, steps=6).nfe


@pytest.mark.slow
@pytest.mark.parametrize("resamplings", [1, 10])
def test_the_painted_part_follows_the_known_one(resamplings):
    """Two strongly correlated numbers: one is given, the other must agree; with resampling it does better."""
    rho = 0.95
    covariance = torch.tensor([[[1.0, rho], [rho, 1.0]]])
    mixture = GaussianMixture.from_covariances([1.0], torch.zeros(1, 2), covariance)
    model = EpsModel(mixture.net(VP), VP)
    given = torch.randn(4000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    image = torch.cat([given, torch.zeros_like(given)], 1)
    x = tasks.inpaint(model, image, torch.tensor([False, True]), "ddpm", steps=60, resamplings=resamplings, jump=5).x
    slope = float((x[:, 0] * x[:, 1]).mean() / x[:, 0].square().mean())
    spread = float((x[:, 1] - rho * x[:, 0]).std())
    if resamplings == 1:  # the replaced x0 alone falls short of the posterior N(rho x, 1 - rho^2)
        assert 0.5 < slope < 0.9
    else:
        assert slope == pytest.approx(rho, abs=0.06)
        assert spread == pytest.approx((1 - rho**2) ** 0.5, abs=0.08)


def test_strength_starts_from_the_image_under_the_mask_too():
    weak = tasks.inpaint(gaussian(VP), IMAGE, MASK, "ddim", strength=0.2, steps=20)
    assert weak.steps == 4
    assert torch.equal(weak.x[..., ~MASK], IMAGE[..., ~MASK])
    full = tasks.inpaint(gaussian(VP), IMAGE, MASK, "ddim", steps=20)
    near, far = ((r.x - IMAGE)[..., MASK].square().mean() for r in (weak, full))
    assert near < 0.3 * far
    both = tasks.inpaint(gaussian(VP), IMAGE, MASK, "ddim", strength=0.5, nfe=20, resamplings=2, jump=2)
    assert both.nfe <= 20
    with pytest.raises(ValueError, match="strength must lie in"):
        tasks.inpaint(gaussian(VP), IMAGE, MASK, "ddim", strength=0, steps=20)


def test_soft_masks_blend():
    mask = torch.full((4, 4), 0.25, dtype=torch.float64)
    result = tasks.inpaint(gaussian(VP), IMAGE, mask, "ddim", steps=5, final="zero")
    hard = tasks.inpaint(gaussian(VP), IMAGE, torch.ones(4, 4), "ddim", steps=5, final="zero")
    assert not torch.equal(result.x, hard.x)
    assert (result.x - IMAGE).square().mean() < 0.2 * (hard.x - IMAGE).square().mean()


def test_a_mask_of_ones_is_sampling():
    x_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = tasks.inpaint(gaussian(VP), IMAGE, torch.ones(4, 4), "dpmpp-2m", steps=5, x_T=x_T)
    torch.testing.assert_close(got.x, sample(gaussian(VP), "dpmpp-2m", x_T=x_T, steps=5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4), (3, 4, 4), (1, 1, 4, 4), (2, 1, 4, 4), (2, 3, 4, 4), (1, 4), ()])
def test_masks_that_broadcast(shape):
    result = tasks.inpaint(gaussian(VP), IMAGE, torch.zeros(shape), "ddim", steps=2)
    assert torch.equal(result.x, IMAGE)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            torch.zeros(5, 4),
            r"mask must be of the size of image, \(2, 3, 4, 4\), or broadcast against it, got \(5, 4\)",
        ),
        (torch.zeros(3, 3, 4, 4), "mask must be of the size of image"),
        (torch.zeros(1, 2, 3, 4, 4), "mask must be of the size of image"),
        (torch.full((4, 4), 2.0), r"mask must lie in \[0, 1\], got 2 to 2"),
        (torch.full((4, 4), float("nan")), r"mask must lie in \[0, 1\]"),
        (torch.zeros(4, 4, device="meta"), "mask is on meta, image on cpu"),
    ],
)
def test_wrong_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        tasks.inpaint(gaussian(VP), IMAGE, mask, "ddim", steps=2)


@pytest.mark.parametrize("mask", [torch.zeros(4, 4, dtype=torch.uint8), "mask.png"])
def test_masks_of_another_kind(mask):
    with pytest.raises(TypeError, match="mask"):
        tasks.inpaint(gaussian(VP), IMAGE, mask, "ddim", steps=2)


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("schedule", [VP, EDM, FLOW], ids=["vp", "edm", "flow"])
def test_every_plan_can_be_resampled(name, schedule):
    grid = make_grid(schedule, get_sampler(name).grid_on(schedule), 7, "zero")
    plan = resampled(lambda nodes: get_sampler(name).plan(nodes), grid, 3, 2)
    assert plan.times == tuple(grid.t)
    parts = [get_sampler(name).plan(type(grid)(schedule, grid.t[i : i + 3])) for i in (1, 3, 5)]
    first = get_sampler(name).plan(type(grid)(schedule, grid.t[:2]))
    assert plan.nfe == first.nfe + 3 * sum(part.nfe for part in parts)
    assert plan.noises == first.noises + 3 * sum(part.noises for part in parts) + 6
    assert Plan.from_json(plan.to_json()) == plan
    nodes = [step.node for step in plan.instructions if getattr(step, "node", None) is not None]
    assert nodes == sorted(set(nodes))
    assert nodes[-1] == 7
    x = tasks.inpaint(gaussian(schedule), IMAGE, MASK, name, steps=5, resamplings=2, jump=2).x
    assert torch.isfinite(x).all()
    assert torch.equal(x[..., ~MASK], IMAGE[..., ~MASK])


def test_resampling_once_is_the_parts_in_a_row():
    grid = make_grid(VP, "uniform", 6)
    plan = resampled(lambda nodes: get_sampler("ddim").plan(nodes), grid, 1, 2)
    assert plan.close(make_plan("ddim", VP, steps=6, grid="uniform"), 1e-12)


@pytest.mark.parametrize("name", ["ddpm", "dpmpp-2m"])
def test_resampling_keeps_the_distribution(name):
    """On data that the sampler draws nearly exactly, going back up and down again must not change the moments."""
    model = gaussian(VP, mean=0.5)
    grid = make_grid(VP, "logsnr", 60)
    plan = resampled(lambda nodes: get_sampler(name).plan(nodes), grid, 3, 20)
    x_T = torch.randn(20000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = run_plan(plan, model, x_T)
    assert float(x.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(x.std()) == pytest.approx(1.0, abs=0.1 if name == "ddpm" else 0.04)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpm-solver-3s", "dpmpp-2m"])
@pytest.mark.parametrize("budget", [16, 23, 40])
def test_a_budget_holds_resampling_included(name, budget):
    result = tasks.inpaint(gaussian(VP), IMAGE, MASK, name, nfe=budget, resamplings=2, jump=2)
    assert result.nfe <= budget
    more = tasks.inpaint(gaussian(VP), IMAGE, MASK, name, steps=result.steps + 1, resamplings=2, jump=2)
    assert more.nfe > budget
    assert result.plan.sampler == f"{name}+resampled"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resamplings": 0}, "resamplings must be a whole number, at least 1, got 0"),
        ({"resamplings": 2.5}, "resamplings must be a whole number"),
        ({"resamplings": 2, "jump": 10}, "jump must be a whole number, 1 to 9, less than the grid's 10 steps, got 10"),
        ({"resamplings": 2, "jump": 0}, "jump must be a whole number"),
        ({"resamplings": 2, "sampler": "rk45", "steps": None}, "sampler 'rk45' has no plan to resample"),
        ({"resamplings": 2, "jump": 3, "steps": None, "nfe": 6}, "nfe must be at least 7 for resamplings=2 and jump=3"),
        ({"resamplings": 3, "steps": 1}, "resampling needs at least 2 steps, got 1"),
        ({"resamplings": 3, "steps": None, "nfe": 2}, "resampling needs at least 2 steps, got 1"),
        ({"resamplings": 2, "nfe": 20}, "give exactly one of steps"),
        ({"resamplings": 2, "afs": True}, "afs=True begins with start noise"),
        ({"x_T": torch.zeros(1, 3, 4, 4)}, "x_T must be of the shape of image"),
    ],
)
def test_mistakes(change, message):
    arguments = {"sampler": "ddim", "steps": 10} | change
    with pytest.raises(ValueError, match=message):
        tasks.inpaint(gaussian(VP), IMAGE, MASK, **arguments)


def test_outpainting():
    result = tasks.outpaint(gaussian(VP), IMAGE, "dpmpp-2m", left=1, bottom=2, steps=5)
    assert result.x.shape == (2, 3, 6, 5)
    assert torch.equal(result.x[:, :, :4, 1:], IMAGE)
    assert (result.x[:, :, 4:] != 0).all()
    canvas, mask = tasks.extended(IMAGE, top=1, right=2)
    assert canvas.shape == (2, 3, 5, 6)
    assert mask.sum() == 30 - 16
    with pytest.raises(ValueError, match="one of left, right, top and bottom must be positive"):
        tasks.outpaint(gaussian(VP), IMAGE, "ddim", steps=2)
    with pytest.raises(ValueError, match="left must be a whole number of pixels, at least 0, got -1"):
        tasks.outpaint(gaussian(VP), IMAGE, "ddim", left=-1, steps=2)


def test_a_network_without_x0_at_pure_noise(exact):
    with pytest.raises(ValueError, match="gives no x0 at t=1"):
        tasks.inpaint(exact(FLOW), torch.zeros(1, 2, dtype=torch.float64), torch.ones(2), "ddim", steps=2)
