"""PlanScheduler in the loop that every diffusers pipeline runs, against `sample()`: every sampler, on every kind of schedule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers import EpsModel, list_samplers, make_plan, run_plan, sample
from samplers.adapters.diffusers.training import Training, training_of

diffusers = pytest.importorskip("diffusers")
from samplers.adapters.diffusers import PlanScheduler  # noqa: E402  after the check that diffusers is there

NAMES = [entry.name for entry in list_samplers() if entry.build is not None]
CONFIGS = {
    "discrete": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "zero_snr": {"beta_schedule": "linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "flow": {"shift": 1.0},
    "edm": {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5},
    "edm_v": {"sigma_min": 0.002, "sigma_max": 700.0, "sigma_data": 1.0, "prediction_type": "v_prediction"},
    "edm_angle": {"sigma_min": 0.3, "sigma_max": 500.0, "sigma_data": 1.0, "time_input": "angle"},
}
Z = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Net = Callable[[Tensor, Any], Tensor]


@pytest.fixture(scope="session")
def problem(exact: Any) -> Callable[[str], tuple[Training, Net, EpsModel]]:
    """`problem(kind)`: the training of a config, the mixture's network as a pipeline calls it, and its epsilon-model."""

    def made(kind: str) -> tuple[Training, Net, EpsModel]:
        training = training_of(CONFIGS[kind])
        inner = exact(training.schedule, training.predicts).net
        data = training.sigma_data
        if training.predicts == "edm":  # the fixture's knows data of 0.5 alone
            inner = partial(inner, data=data)

        def net(x: Tensor, tau: Any) -> Tensor:
            tau = (
                torch.as_tensor(tau).float().double().expand(len(x))
            )  # no network of diffusers knows more than float32
            t = training.schedule_time(tau)
            return training.sign * inner(x, 0.25 * t.log() if training.predicts == "edm" else t)

        return training, net, training.model(lambda x, tau: training.sign * net(x, tau))

    return made


def loop(scheduler: Any, net: Net, x: Tensor, begin: int = 0, **step: Any) -> Tensor:
    """What a pipeline does."""
    for t in scheduler.timesteps[begin:]:
        output = net(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, **step).prev_sample
    return x


def normals(seed: int = 1) -> Callable[[int, Tensor], Tensor]:
    """A noise source that draws from a generator in the order it is asked."""
    generator = torch.Generator().manual_seed(seed)
    return lambda k, like: torch.randn(like.shape, generator=generator, dtype=like.dtype)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_the_loop_gives_what_sample_gives(problem: Any, kind: str, name: str) -> None:
    _, net, model = problem(kind)
    for steps in (1, 6):
        scheduler = PlanScheduler.from_config(CONFIGS[kind], sampler=name)
        scheduler.set_timesteps(steps)
        x_T = Z * scheduler.init_noise_sigma
        wanted = sample(model, name, x_T=x_T, steps=steps, noise_source=normals())
        got = loop(scheduler, net, x_T, generator=torch.Generator().manual_seed(1))
        assert error(got, wanted) < 1e-10
        assert len(scheduler.timesteps) == scheduler.plan.nfe


@pytest.mark.parametrize("kind", CONFIGS)
def test_in_float32_to_a_millionth(problem: Any, kind: str) -> None:
    _, net, model = problem(kind)
    for name in ("ddim", "unipc-3", "dpmpp-2m", "euler-ancestral", "heun"):
        scheduler = PlanScheduler.from_config(CONFIGS[kind], sampler=name)
        scheduler.set_timesteps(8)
        x_T = Z.float() * scheduler.init_noise_sigma
        wanted = sample(model, name, x_T=x_T, steps=8, noise_source=normals())
        rounding = 3e-8 * scheduler.init_noise_sigma  # of states of 80 or 700, where the result is of size 1
        assert error(loop(scheduler, net, x_T, generator=torch.Generator().manual_seed(1)), wanted) < 1e-6 + rounding


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddim", {"eta": 0.7}),
        ("ddpm", {"variance": "fixed_large"}),
        ("dpmpp-2m-sde", {"solver_type": "heun", "eta": 0.5}),
        ("unipc-2", {"variant": "bh1", "lower_order_final": False}),
        ("edm", {"s_churn": 20.0, "s_tmax": 5.0}),
        ("seeds", {"eta": 0.5}),
        ("sa-solver", {"tau": 0.4}),
    ],
)
def test_options_are_the_samplers_own(problem: Any, name: str, options: dict[str, Any]) -> None:
    _, net, model = problem("discrete")
    scheduler = PlanScheduler.from_config(CONFIGS["discrete"], sampler=name, **options)
    scheduler.set_timesteps(7)
    x_T = Z * scheduler.init_noise_sigma
    wanted = sample(model, name, x_T=x_T, steps=7, noise_source=normals(), **options)
    assert error(loop(scheduler, net, x_T, noise_source=normals()), wanted) < 1e-10
    assert (
        error(sample(model, name, x_T=x_T, steps=7, noise_source=normals()), wanted) > 1e-5
    )  # the options do something


@pytest.mark.parametrize("final", ["t_min", "zero", "denoise"])
@pytest.mark.parametrize("grid", ["uniform", "karras", "logsnr", "trailing"])
def test_grids_and_their_ends_are_those_of_sample(problem: Any, grid: str, final: str) -> None:
    _, net, model = problem("discrete")
    scheduler = PlanScheduler.from_config(CONFIGS["discrete"], sampler="dpmpp-2m", grid=grid, final=final)
    scheduler.set_timesteps(5)
    x_T = Z * scheduler.init_noise_sigma
    wanted = sample(model, "dpmpp-2m", x_T=x_T, steps=5, grid=grid, final=final)
    assert error(loop(scheduler, net, x_T), wanted) < 1e-10


def rest(scheduler: Any, k: int) -> np.ndarray:
    return np.array(scheduler.plan.times[k:])


@pytest.mark.parametrize("kind", ["discrete", "edm", "zero_snr", "flow"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("pndm", "restart")])
def test_a_loop_that_begins_later_is_sample_on_the_rest_of_the_grid(problem: Any, kind: str, name: str) -> None:
    """As image-to-image pipelines begin: from data with noise, at `timesteps[t_start * order:]`.

    The first step from pure noise, on the last two schedules, has one call whatever the sampler.
    """
    _, net, model = problem(kind)
    scheduler = PlanScheduler.from_config(CONFIGS[kind], sampler=name)
    scheduler.set_timesteps(6)
    for t_start in (2, 5):
        begin = t_start * scheduler.order
        start = scheduler.add_noise(Z, -Z, scheduler.timesteps[begin : begin + 1].repeat(3))
        wanted = sample(model, name, x_T=start, timesteps=rest(scheduler, t_start), noise_source=normals())
        scheduler.set_begin_index(begin)
        assert scheduler.begin_index == begin
        assert scheduler.step_index is None
        assert error(loop(scheduler, net, start, begin, noise_source=normals()), wanted) < 1e-10
        assert scheduler.step_index == len(scheduler.timesteps)
        scheduler.set_timesteps(6)  # and where the pipeline does not say where: by the first time
        assert error(loop(scheduler, net, start, begin, noise_source=normals()), wanted) < 1e-10


@pytest.mark.parametrize(("kind", "within"), [("discrete", 8), ("zero_snr", None)])
def test_restart_begins_at_every_step_but_within_a_restart(problem: Any, kind: str, within: int | None) -> None:
    _, net, model = problem(kind)
    scheduler = PlanScheduler.from_config(CONFIGS[kind], sampler="restart")
    scheduler.set_timesteps(10)
    for t_start in set(range(1, 10)) - {within}:
        begin = t_start * scheduler.order
        scheduler.set_begin_index(begin)
        start = scheduler.add_noise(Z, -Z, scheduler.timesteps[begin])
        wanted = sample(model, "restart", x_T=start, timesteps=rest(scheduler, t_start), noise_source=normals())
        assert error(loop(scheduler, net, start, begin, noise_source=normals()), wanted) < 1e-10
    if within is not None:
        with pytest.raises(ValueError, match="from there on it takes other calls than when it begins at 0"):
            scheduler.set_begin_index(within * scheduler.order)


@pytest.mark.parametrize("name", ["heun", "dpm2", "dpmpp-3s"])
def test_where_nodes_are_given_a_pipeline_counts_calls(problem: Any, name: str) -> None:
    """It takes the length of `timesteps` for the number of steps, as Flux's image to image does."""
    _, net, model = problem("flow")
    scheduler = PlanScheduler.from_config(CONFIGS["flow"], sampler=name)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 6, 6))
    steps = len(scheduler.timesteps)
    begin = int(steps - 0.5 * steps) * scheduler.order
    assert scheduler.plan.calls[begin].t == scheduler.plan.times[3]  # half of six steps
    start = scheduler.scale_noise(Z, scheduler.timesteps[begin], -Z)
    scheduler.set_begin_index(begin)
    nodes = rest(scheduler, 3)
    wanted = sample(model, name, x_T=start, steps=3, grid=lambda _, n: nodes[:n], final="zero")
    assert error(loop(scheduler, net, start, begin), wanted) < 1e-10
    last = (steps - 1) * scheduler.order  # the smallest strength takes the last step
    assert scheduler.plan.calls[last].t == scheduler.plan.times[5]


def test_heun_passes_over_the_last_call_of_a_step(problem: Any) -> None:
    """A refiner begins at the first call below a time, which may be the second of a step that the base has made."""
    _, net, model = problem("discrete")
    scheduler = PlanScheduler.from_config(CONFIGS["discrete"], sampler="heun")
    scheduler.set_timesteps(5)
    begin = 2 * scheduler.order - 1
    assert scheduler.plan.calls[begin].t == scheduler.plan.times[2]
    start = scheduler.add_noise(Z, -Z, scheduler.timesteps[begin])
    scheduler.set_begin_index(begin)
    wanted = sample(model, "heun", x_T=start, timesteps=rest(scheduler, 2))
    assert error(loop(scheduler, net, start, begin), wanted) < 1e-10


def test_the_order_is_a_number_as_any_other_but_for_its_multiples() -> None:
    scheduler = PlanScheduler.from_config(CONFIGS["flow"], sampler="heun")
    assert scheduler.order == 2
    assert 3 * scheduler.order == 6  # before there are steps
    scheduler.set_timesteps(4)
    assert [i * scheduler.order for i in range(4)] == [scheduler.order * i for i in range(4)] == [0, 1, 3, 5]
    assert (-1 * scheduler.order, 4 * scheduler.order, 9 // scheduler.order, 7 % scheduler.order) == (-2, 8, 4, 1)
    afs = PlanScheduler.from_config(CONFIGS["discrete"], sampler="ddim", afs=True)
    afs.set_timesteps(5)
    for i in (2, 3, 4):  # the first step has no call
        assert afs.plan.calls[i * afs.order].t == afs.plan.times[i]


@pytest.mark.parametrize(
    ("name", "index", "message"),
    [
        ("dpmpp-2s", 3, r"no step of sampler 'dpmpp-2s' begins at index 3 of timesteps \(steps begin at 0, 2, 4"),
        ("pndm", 12, "sampler 'pndm' cannot begin at index 12 of timesteps"),
        ("ddim", 6, "begin_index must be 0 to 5, got 6"),
        ("ddim", -1, "begin_index must be 0 to 5, got -1"),
    ],
)
def test_where_no_step_begins_is_an_error(name: str, index: int, message: str) -> None:
    scheduler = PlanScheduler.from_config(CONFIGS["discrete"], sampler=name)
    scheduler.set_timesteps(6)
    with pytest.raises(ValueError, match=message):
        scheduler.set_begin_index(index)


def test_noise_before_the_first_call_is_part_of_the_start_noise(problem: Any) -> None:
    """edm with churn, begun below t_max: the loop begins at the noise level after the churn."""
    _, net, model = problem("edm")
    options = {
        "s_churn": 100.0
    }  # more than sqrt(2) - 1 at any number of steps, so that the rest of a grid has the same
    scheduler = PlanScheduler.from_config(CONFIGS["edm"], sampler="edm", **options)
    sigmas = [5.0, 2.0, 0.7, 0.1]
    scheduler.set_timesteps(sigmas=sigmas)
    assert scheduler.init_noise_sigma == pytest.approx(5.0 * 2**0.5)
    plan = make_plan("edm", model.schedule, sigmas=sigmas, **options)
    assert plan.close(scheduler.plan)
    noises = [torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(9)]
    x_T = 5.0 * Z
    wanted = run_plan(plan, model, x_T, noise_source=lambda k, like: noises[k])
    (_, by), (_, added) = plan.instructions[0].terms  # type: ignore[union-attr]
    start = by * x_T + added * noises[0]
    got = loop(scheduler, net, start, noise_source=lambda k, like: noises[k])
    assert error(got, wanted) < 1e-10


def test_the_analytical_first_step_is_taken_in_scale_model_input(problem: Any) -> None:
    _, net, model = problem("discrete")
    scheduler = PlanScheduler.from_config(CONFIGS["discrete"], sampler="dpmpp-2m", afs=True)
    scheduler.set_timesteps(5)
    assert len(scheduler.timesteps) == 4
    x_T = Z * scheduler.init_noise_sigma
    wanted = sample(model, "dpmpp-2m", x_T=x_T, steps=5, afs=True)
    assert error(loop(scheduler, net, x_T), wanted) < 1e-10
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="afs=True makes the first step without the network, in scale_model_input"):
        scheduler.step(Z, scheduler.timesteps[0], x_T)


@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m", "unipc-3", "euler-ancestral"])
def test_a_state_that_the_pipeline_changed_is_the_one_that_goes_on(problem: Any, name: str) -> None:
    """Inpainting blends known pixels into the latents after every step."""
    _, net, _ = problem("discrete")
    known = torch.tensor([[0.4, -0.2]], dtype=torch.float64).expand(3, 2)
    mask = torch.tensor([1.0, 0.0], dtype=torch.float64)
    scheduler = PlanScheduler.from_config(CONFIGS["discrete"], sampler=name, final="zero")
    scheduler.set_timesteps(8)
    x, seen = Z * scheduler.init_noise_sigma, []
    for i, t in enumerate(scheduler.timesteps):
        seen.append(x)
        x = scheduler.step(net(x, t), t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        after = scheduler.timesteps[i + 1 :][:1]
        blend = scheduler.add_noise(known, Z, after) if len(after) else known
        x = mask * blend + (1 - mask) * x
    assert torch.allclose(x[:, 0], known[:, 0])
    alone = loop_result(scheduler, net)
    assert (x[:, 1] - alone[:, 1]).abs().max() > 1e-3  # the other number has followed


def loop_result(scheduler: Any, net: Net) -> Tensor:
    scheduler.set_timesteps(8)
    return loop(scheduler, net, Z * scheduler.init_noise_sigma, generator=torch.Generator().manual_seed(0))


def test_one_edit_of_the_state_is_one_edit_of_the_result(problem: Any) -> None:
    """On a network that ignores its input, DDIM's result moves by the edit times what is left of it."""
    scheduler = PlanScheduler.from_config(CONFIGS["discrete"], sampler="ddim", final="zero")
    results = []
    for edit in (0.0, 1.0):
        scheduler.set_timesteps(4)
        x = Z * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(torch.ones_like(Z), t, x + edit * (i == 2)).prev_sample
        results.append(x)
    alpha = scheduler.plan.calls[2].alpha
    assert torch.allclose(results[1] - results[0], torch.full_like(Z, 1.0 / alpha))
