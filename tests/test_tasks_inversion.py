"""Inversion and interpolation: round trips, their order, and arcs of noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from samplers import list_samplers, make_plan, sample, schedules, tasks
from samplers.tasks import Mirrored, MirroredModel

VP, EDM, FLOW = schedules.vp_linear(), schedules.edm(), schedules.flow()
SCHEDULES = {"vp": VP, "edm": EDM, "flow": FLOW, "cosine": schedules.cosine()}
STOCHASTIC = ("euler-ancestral", "dpm2-ancestral", "dpmpp-sde", "dpmpp-2m-sde", "dpmpp-3m-sde", "seeds", "sa-solver")
SAMPLERS = [s for s in list_samplers() if s.stochastic != "yes" and s.name not in STOCHASTIC]


@pytest.fixture(scope="module")
def data(mixture):
    return mixture.sample(8)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_mirrored_schedule_is_one(schedule):
    mirror = Mirrored(schedule)
    t = np.linspace(schedule.t_min, schedule.t_max, 50)[1:-1]
    np.testing.assert_allclose(mirror.alpha(-t), schedule.sigma(t))
    np.testing.assert_allclose(mirror.lam(-t), -schedule.lam(t), atol=1e-12)
    np.testing.assert_allclose(mirror.t_of_lam(mirror.lam(-t)), -t, rtol=1e-9)
    h = 1e-6 * t
    np.testing.assert_allclose(mirror.dalpha(-t), (mirror.alpha(-t + h) - mirror.alpha(-t - h)) / (2 * h), rtol=1e-5)
    np.testing.assert_allclose(
        mirror.dsigma(-t), (mirror.sigma(-t + h) - mirror.sigma(-t - h)) / (2 * h), rtol=1e-5, atol=1e-9
    )
    assert (np.diff(mirror.lam(np.sort(-t))) < 0).all()


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "score", "flow", "edm"])
@pytest.mark.parametrize("schedule", [VP, EDM], ids=["vp", "edm"])
def test_a_mirrored_model_exchanges_data_and_noise(exact, data, schedule, predicts):
    model, t = exact(schedule, predicts), 0.4 * schedule.t_max
    x = 3 * data
    for at in (t, torch.full((len(x),), t, dtype=torch.float64)):
        torch.testing.assert_close(MirroredModel(model).x0(x, -at), model.eps(x, at), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(MirroredModel(model).eps(x, -at), model.x0(x, at), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("entry", SAMPLERS, ids=lambda s: s.name)
@pytest.mark.parametrize("schedule", [VP, EDM], ids=["vp", "edm"])
def test_the_round_trip_converges_at_the_samplers_order(exact, data, schedule, entry):
    model = exact(schedule)
    if entry.adaptive:
        tight = 1e-4 if entry.name.startswith("dpm") else 1e-6
        found = tasks.reconstruct(model, data, entry.name, rtol=tight, atol=tight)
        assert found.plan is None
        assert float(found.error.max()) < 10 * tight
        return
    grid = "logsnr" if entry.name.startswith(("lms", "ipndm-v", "heun", "edm", "pndm")) else entry.grid
    found = [tasks.reconstruct(model, data, entry.name, steps=n, grid=grid) for n in (48, 96)]
    before, after = (float(f.error.square().mean().sqrt()) for f in found)
    order = min(entry.order, 2) if "3m" in entry.name or entry.name.startswith("ipndm") else min(entry.order, 3)
    assert math.log2(before / after) > order - 0.75 or after < 1e-5
    assert after < 0.2
    assert found[1].nfe == 2 * make_plan(entry.name, schedule, steps=96, grid=grid).nfe


def test_ddim_inversion_is_the_published_step(exact, data):
    """Song et al. 2021, equation 13 in x / alpha, from low noise to high, with epsilon at the start of each step."""
    model, nodes = exact(VP), [0.9, 0.5, 0.2, 0.05]
    x = data
    for t, to in zip(nodes[::-1], nodes[-2::-1], strict=False):
        a, s, a_to, s_to = (float(f(v)) for v in (t, to) for f in (VP.alpha, VP.sigma))
        x = a_to * (x / a + (s_to / a_to - s / a) * model.eps(x, t))
    found = tasks.invert(model, data, "ddim", timesteps=nodes)
    torch.testing.assert_close(found.x, x, rtol=1e-9, atol=1e-9)
    assert found.times == tuple(nodes[::-1])
    assert found.nfe == 3


def test_the_noise_makes_the_image_again(exact, data):
    model = exact(VP)
    found = tasks.invert(model, data, "dpm-solver-3s", steps=60)
    again = sample(model, "rk45", x_T=found.x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(again, data, rtol=1e-3, atol=1e-3)


def test_pure_noise_is_reached(exact, data):
    """On a schedule that ends at alpha = 0, with a network that has a v there."""
    for name, where in (("ddim", {"steps": 20}), ("unipc-2", {"steps": 40}), ("rk45", {"rtol": 1e-7, "atol": 1e-7})):
        found = tasks.reconstruct(exact(FLOW, "v"), data, name, **where)
        assert found.times[0] == 1.0
        assert float(found.error.max()) < {"ddim": 0.5, "unipc-2": 0.1, "rk45": 1e-4}[name]


def test_error_and_budget(exact, data):
    found = tasks.reconstruct(exact(VP), data, "dpm-solver-3s", nfe=10, grid="time-quadratic")
    torch.testing.assert_close(found.error, (found.x - data).square().mean(1).sqrt())
    assert found.error.shape == (8,)
    assert found.nfe == 20
    ended = tasks.reconstruct(exact(VP), data, "ddim", sigmas=[10.0, 1.0, 0.1, 0.0])  # clean data is left out
    assert ended.steps == 2


@pytest.mark.parametrize("name", [*STOCHASTIC, "ddpm", "restart", "consistency"])
def test_stochastic_samplers_are_refused(exact, data, name):
    with pytest.raises(ValueError, match=f"sampler '{name}' adds noise"):
        tasks.invert(exact(VP), data, name, steps=8)


def test_an_analytical_first_step_is_refused(exact, data):
    with pytest.raises(ValueError, match="afs=True takes the first state for noise"):
        tasks.invert(exact(VP), data, "ddim", steps=4, afs=True)


def test_options_make_a_sampler_deterministic(exact, data):
    assert (
        tasks.reconstruct(exact(VP), data, "euler-ancestral", steps=80, eta=0.0, grid="time-uniform").error.max() < 0.2
    )
    with pytest.raises(ValueError, match="an option such as eta=0"):
        tasks.invert(exact(VP), data, "ddim", steps=8, eta=0.5)
    with pytest.raises(ValueError, match="final must be 't_min' for an inversion"):
        tasks.invert(exact(VP), data, "ddim", steps=8, final="zero")
    with pytest.raises(TypeError, match="image must be"):
        tasks.invert(exact(VP), [1.0], "ddim", steps=8)


def test_slerp_keeps_the_norm():
    a, b = torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = (v / v.norm(dim=1, keepdim=True) * 300**0.5 for v in (a, b))
    for w in (0.0, 0.1, 0.5, 0.9, 1.0):
        arc, line = tasks.slerp(a, b, w), tasks.lerp(a, b, w)
        torch.testing.assert_close(arc.norm(dim=1), a.norm(dim=1))
        to_a, to_b = (torch.arccos((arc * v).sum(1) / 300) for v in (a, b))
        whole = torch.arccos((a * b).sum(1) / 300)
        if 0 < w < 1:
            torch.testing.assert_close(to_a, w * whole, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(to_a + to_b, whole)
            assert (line.norm(dim=1) < a.norm(dim=1)).all()
    torch.testing.assert_close(tasks.slerp(a, b, 0.0), a)
    torch.testing.assert_close(tasks.slerp(a, b, 1.0), b)


def test_slerp_of_parallel_ends_is_a_line():
    a = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[1.0, 2.0], [1.0, 1.0], [-1.0, 0.0]])
    assert torch.isfinite(tasks.slerp(a, b, 0.3)).all()
    torch.testing.assert_close(tasks.slerp(a, b, 0.3)[0], a[0])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["slerp", "lerp"])
def test_interpolation_ends_at_the_samples_of_every_sampler(exact, way):
    a, b = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    failed = {}
    for entry in list_samplers():
        # its step sizes follow the batch, in which the film has frames beside the ends
        where, tolerance = ({"rtol": 1e-3, "atol": 1e-3}, 0.02) if entry.adaptive else ({"steps": 5}, 1e-10)
        film = tasks.interpolate(exact(VP), a, b, entry.name, frames=3, way=way, **where)
        ends = torch.stack([sample(exact(VP), entry.name, x_T=end, **where) for end in (a, b)], 1)
        error = float((film[:, [0, -1]] - ends).abs().max()) if film.shape == (2, 3, 2) else math.inf
        middle = float((film[:, 1] - ends.transpose(0, 1)).abs().amax(-1).min())
        forgets = entry.name == "consistency"  # its later steps start from fresh noise, which is that of the seed
        if not error < tolerance or not (middle > 1e-3 or forgets):
            failed[entry.name] = error, middle
    assert not failed


@pytest.mark.slow
def test_images_interpolate_with_every_deterministic_sampler(exact, data):
    failed = {}
    for entry in SAMPLERS:
        where = {"rtol": 1e-3, "atol": 1e-3} if entry.adaptive else {"steps": 32, "grid": "logsnr"}
        film = tasks.interpolate_images(exact(VP), data[:2], data[2:4], entry.name, frames=2, **where)
        error = float((film - torch.stack([data[:2], data[2:4]], 1)).abs().max())
        if not error < (0.5 if entry.order == 1 else 0.2):
            failed[entry.name] = error
    assert not failed


def test_interpolation_of_images(exact, data):
    film = tasks.interpolate_images(exact(VP), data[:4], data[4:], "unipc-2", frames=3, nfe=80)
    torch.testing.assert_close(film[:, 0], data[:4], rtol=0.01, atol=0.01)
    torch.testing.assert_close(film[:, -1], data[4:], rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 1}, "frames must be a whole number, at least 2, got 1"),
        ({"way": "slep"}, "unknown way 'slep'; did you mean 'slerp'"),
        ({"end": torch.zeros(2, 2)}, r"end must be of the shape of start, \(3, 2\), got \(2, 2\)"),
        ({"end": torch.zeros(3, 2, device="meta")}, "end is on meta, start on cpu"),
    ],
)
def test_mistakes(exact, change, message):
    start = torch.zeros(3, 2, dtype=torch.float64)
    arguments = {"start": start, "end": start, "sampler": "ddim", "steps": 2} | change
    with pytest.raises(ValueError, match=message):
        tasks.interpolate(exact(VP), **arguments)
