"""What every scheduler of diffusers does, done by PlanScheduler: shapes, dtypes, outputs, noise, order of calls, errors."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers import EpsModel, sample, schedules
from samplers.guidance import clip, threshold

diffusers = pytest.importorskip("diffusers")
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps  # noqa: E402

from samplers.adapters.diffusers import PlanScheduler  # noqa: E402

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def network(x: Tensor, t: Any) -> Tensor:
    """Something smooth of the state and the time, in x's dtype."""
    t = torch.as_tensor(t, dtype=torch.float32).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return torch.tanh(0.7 * x) + 0.1 * torch.sin(t / 300)


def made(sampler: str = "dpmpp-2m", steps: int | None = 6, **options: Any) -> Any:
    scheduler = PlanScheduler.from_config({**BETAS, **options.pop("config", {})}, sampler=sampler, **options)
    if steps:
        scheduler.set_timesteps(steps)
    return scheduler


def run(scheduler: Any, x: Tensor, seed: int | None = 3, **step: Any) -> Tensor:
    generator = {} if seed is None else {"generator": torch.Generator().manual_seed(seed)}
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, **generator, **step)[0]
    return x


@pytest.mark.slow
def test_importing_the_adapter_does_not_import_diffusers() -> None:
    code = (
        "import samplers.adapters.diffusers as a, sys; print('diffusers' in sys.modules, 'PlanScheduler' in a.__all__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "True"]
    import samplers.adapters.diffusers

    with pytest.raises(AttributeError, match="has no attribute 'PlanSheduler'"):
        _ = samplers.adapters.diffusers.PlanSheduler


def test_it_is_a_scheduler_of_diffusers() -> None:
    scheduler = made(steps=None)
    assert isinstance(scheduler, (diffusers.SchedulerMixin, diffusers.ConfigMixin))
    assert scheduler.config.num_train_timesteps == len(scheduler) == 1000
    assert scheduler.config.prediction_type == "epsilon"
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))  # before set_timesteps: those of the training
    assert scheduler.init_noise_sigma == pytest.approx(float((1 - scheduler.alphas_cumprod[-1]) ** 0.5))
    assert PlanScheduler().config.beta_schedule == "linear"  # DDPM's, where nothing is said


def test_tuple_and_output_are_the_same() -> None:
    for name in ("ddim", "ddpm", "heun"):
        a, b = made(name), made(name)
        t, z = a.timesteps[0], torch.Generator().manual_seed(1)
        found = a.step(network(X, t), t, X, generator=z)
        both = b.step(network(X, t), t, X, generator=z.manual_seed(1), return_dict=False)
        assert isinstance(both, tuple)
        assert len(both) == 2
        assert torch.equal(found.prev_sample, both[0])
        assert torch.equal(found.pred_original_sample, both[1])
        assert torch.equal(found[0], both[0])
        assert found.prev_sample.shape == X.shape


def test_the_original_sample_is_x0_of_the_output() -> None:
    for prediction in ("epsilon", "sample", "v_prediction"):
        scheduler = made("dpmpp-2m", prediction_type=prediction)
        t = scheduler.timesteps[0]
        alpha, sigma = scheduler.alphas_cumprod[-1] ** 0.5, (1 - scheduler.alphas_cumprod[-1]) ** 0.5
        out = network(X, t)
        x0 = {"epsilon": (X - sigma * out) / alpha, "sample": out, "v_prediction": alpha * X - sigma * out}[prediction]
        assert torch.allclose(scheduler.step(out, t, X).pred_original_sample, x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 8), (1, 4, 6, 6), (2, 4, 3, 4, 4), (3, 5)])
def test_states_of_any_rank(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for name in ("unipc-3", "euler-ancestral", "heun"):
        assert run(made(name), x).shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    for name in ("dpmpp-2m", "unipc-3", "dpmpp-2m-sde"):
        half = run(made(name), X.to(dtype))
        assert half.dtype == dtype
        assert torch.isfinite(half).all()
        exact = run(made(name), X.to(dtype).float())
        assert (half - exact).abs().max() / exact.abs().max() < 8 * torch.finfo(dtype).eps
    # one step whose terms nearly cancel: in half precision alone the digits would be gone
    scheduler = made("dpmpp-3m", 30)
    t, x = scheduler.timesteps[0], X.to(dtype)
    wide = made("dpmpp-3m", 30).step(x.float(), t, x.float()).prev_sample
    assert torch.equal(scheduler.step(x, t, x).prev_sample, wide.to(dtype))


def test_an_output_of_another_dtype_than_the_state() -> None:
    scheduler = made("ddim")
    t = scheduler.timesteps[0]
    assert scheduler.step(network(X, t).half(), t, X).prev_sample.dtype == torch.float32


def test_a_generator_fixes_the_noise_and_a_list_fixes_each_samples() -> None:
    both = run(made("ddpm"), X, seed=3)
    assert torch.equal(both, run(made("ddpm"), X, seed=3))
    assert not torch.equal(both, run(made("ddpm"), X, seed=4))
    seeds = (11, 12)
    many = run(made("ddpm"), X, seed=None, **{"generator": [torch.Generator().manual_seed(s) for s in seeds]})
    for i, seed in enumerate(seeds):
        assert torch.allclose(many[i : i + 1], run(made("ddpm"), X[i : i + 1], seed=seed), atol=1e-6)
    scheduler = made("ddpm")
    with pytest.raises(ValueError, match="generator must be one or 2, one for each sample, got a list of 3"):
        scheduler.step(X, scheduler.timesteps[0], X, generator=[torch.Generator()] * 3)


def test_without_a_generator_torchs_own_seed_counts() -> None:
    results = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            results.append(run(made("euler-ancestral"), X, seed=None))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_deterministic_sampler_draws_nothing() -> None:
    def never(k: int, like: Tensor) -> Tensor:
        raise AssertionError("noise was drawn")

    run(made("unipc-3"), X, seed=None, noise_source=never)
    with pytest.raises(ValueError, match=r"noise_source must return shape \(2, 4, 6, 6\), got \(2,\)"):
        run(made("ddpm"), X, seed=None, noise_source=lambda k, like: torch.zeros(2))


def test_a_learned_variance_is_left_out() -> None:
    scheduler, plain = (made("ddim", config={"variance_type": "learned_range"}) for _ in range(2))
    t = scheduler.timesteps[0]
    both = torch.cat([network(X, t), torch.full_like(X, 9.0)], 1)
    assert torch.equal(scheduler.step(both, t, X).prev_sample, plain.step(network(X, t), t, X).prev_sample)


@pytest.mark.parametrize(
    ("config", "wrapped"),
    [
        ({"clip_sample": True, "clip_sample_range": 0.8}, lambda model: clip(model, 0.8)),
        (
            {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
            lambda model: threshold(model, 0.9, limit=1.5),
        ),
    ],
)
@pytest.mark.parametrize("name", ["dpmpp-2m", "ddim", "heun"])
def test_clipping_is_that_of_guidance(name: str, config: dict[str, Any], wrapped: Any) -> None:
    scheduler = made(name, config=config)
    model = EpsModel(network, schedules.from_alphas_cumprod(table()))
    x = X.double()
    wanted = sample(wrapped(model), name, x_T=x, steps=6)
    got = run(scheduler, x)
    assert (got - wanted).abs().max() < 1e-5  # their network is told times in float64
    assert (got - run(made(name), x)).abs().max() > 1e-2  # and the clipping does something


def table() -> np.ndarray:
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def test_a_pipeline_may_change_the_config_after_the_fact() -> None:
    """Stable Diffusion's pipelines set `clip_sample` to False in the config of a scheduler they are given."""
    scheduler, never = made("ddim", config={"clip_sample": True}), made("ddim", config={"clip_sample": False})
    new = dict(scheduler.config)
    new["clip_sample"] = False
    scheduler._internal_dict = diffusers.configuration_utils.FrozenDict(new)
    assert torch.equal(run(scheduler, X), run(never, X))


def test_the_list_of_calls() -> None:
    heun = made("heun", 3, grid="uniform", final="zero")
    assert heun.order == 2
    assert heun.timesteps.tolist() == [999, 500, 500, 0, 0] or heun.timesteps.tolist() == [
        999.0,
        499.5,
        499.5,
        0.0,
        0.0,
    ]
    assert len(heun.sigmas) == 6  # the last step is Euler's, to clean data
    assert heun.sigmas[-1] == 0
    assert heun.num_inference_steps == 3
    inner = made("dpmpp-2s", 3)
    begins = inner.timesteps[:: inner.order].double()
    assert torch.allclose(begins, torch.tensor(inner.plan.times[:-1], dtype=torch.float64), rtol=1e-6)
    assert made("dpm-solver-3s", 4).order == 3
    assert len(made("dpm-solver-3s", 4).timesteps) == 12
    assert made("pndm", 5).order == 1


def test_sigmas_are_the_noise_levels_of_the_calls() -> None:
    scheduler = made("euler", 5, grid="karras", final="zero")
    assert torch.allclose(
        scheduler.sigmas[0], ((1 - scheduler.alphas_cumprod[-1]) / scheduler.alphas_cumprod[-1]).sqrt()
    )
    assert (scheduler.sigmas.diff() < 0).all()
    given = [14.0, 5.0, 1.0, 0.1, 0.0]
    scheduler.set_timesteps(sigmas=given)
    assert torch.allclose(scheduler.sigmas, torch.tensor(given))
    assert len(scheduler.timesteps) == 4


def test_custom_timesteps_through_a_pipelines_own_function() -> None:
    scheduler = made("dpmpp-2m", None)
    published = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]  # Align Your Steps
    timesteps, steps = retrieve_timesteps(scheduler, timesteps=published)
    assert timesteps.tolist() == published
    assert steps == 10
    assert scheduler.plan.times[-1] == -1.0  # clean data
    timesteps, steps = retrieve_timesteps(scheduler, sigmas=[10.0, 3.0, 0.5, 0.0])
    assert steps == 3
    ended = made("dpmpp-2m", None, final="t_min")
    ended.set_timesteps(timesteps=[999, 500, 0])
    assert ended.timesteps.tolist() == [999, 500]  # a step from t_min to t_min is none
    ended.set_timesteps(timesteps=torch.tensor([999, 500]))
    assert ended.plan.times == (999.0, 500.0, 0.0)


def test_noise_is_added_at_the_networks_times() -> None:
    scheduler = made(steps=None)  # also before set_timesteps, as training does
    noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(5))
    times = torch.tensor([10, 700])
    theirs = diffusers.DDIMScheduler(**BETAS)
    assert torch.allclose(scheduler.add_noise(X, noise, times), theirs.add_noise(X, noise, times), atol=1e-5)
    assert torch.allclose(scheduler.get_velocity(X, noise, times), theirs.get_velocity(X, noise, times), atol=1e-5)
    assert torch.equal(scheduler.scale_noise(X, times, noise), scheduler.add_noise(X, noise, times))
    assert torch.equal(scheduler.add_noise(X, noise, 10), scheduler.add_noise(X, noise, torch.tensor([10])))
    several = scheduler.add_noise(X[:1], noise, times)  # one image under two noises
    assert torch.equal(several, scheduler.add_noise(X[:1].expand(2, -1, -1, -1), noise, times))
    assert scheduler.add_noise(X.half(), noise.half(), times).dtype == torch.float16
    flow = PlanScheduler.from_config({"shift": 3.0})
    assert torch.allclose(flow.scale_noise(X, torch.tensor([250.0]), noise), 0.75 * X + 0.25 * noise)
    edm = PlanScheduler.from_config({"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5})
    assert torch.allclose(edm.add_noise(X, noise, torch.tensor([0.25 * np.log(2.0)])), X + 2 * noise, atol=1e-5)
    zero = made(steps=None, config={"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    assert torch.equal(zero.add_noise(X, noise, torch.tensor([999])), noise)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, X[:, :3], 10), r"noise must have the shape of original_samples, \(2, 4, 6, 6\), got \(2, 3, 6, 6\)"),
        ((X, X.to("meta"), 10), "noise is on meta, original_samples on cpu; move one of them"),
        ((X, X, torch.tensor([1, 2, 3])), r"timesteps must be one or 2, one for each sample, got shape \(3,\)"),
        ((X, X, 1000), "timesteps must be at most 999, the network's last, got 1000"),
    ],
)
def test_noise_that_does_not_fit_is_an_error(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made().add_noise(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give num_inference_steps, timesteps or sigmas, got none of them"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1, got 0"),
        ({"num_inference_steps": 2.0}, "num_inference_steps must be an integer of at least 1, got 2.0"),
        ({"num_inference_steps": 3, "timesteps": [900, 10]}, "num_inference_steps=3 and timesteps that make 2 steps"),
        ({"timesteps": [10, 900]}, r"a grid must decrease strictly: t\[0\]=10, t\[1\]=900"),
        ({"timesteps": [1000, 1]}, r"timesteps: network time 1000 is outside \[0, 999\]"),
        ({"timesteps": []}, "timesteps must be finite numbers in one dimension"),
        ({"timesteps": ["a"]}, "timesteps must be a sequence of numbers"),
        ({"sigmas": [1.0, -1.0]}, r"sigmas must be positive \(only the last may be 0\)"),
        ({"sigmas": [1e6, 1.0, 0.0]}, "sigmas must lie in"),
        ({"timesteps": [900, 10], "sigmas": [5.0, 1.0]}, "timesteps and sigmas together .* on a flow alone"),
    ],
)
def test_steps_that_there_are_not(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(steps=None).set_timesteps(**arguments)


def test_epsilon_of_pure_noise_is_an_error_before_the_loop() -> None:
    scheduler = made("ddim", None, config={"rescale_betas_zero_snr": True}, grid="trailing")
    with pytest.raises(ValueError, match="predicts='eps' gives no x0 at t=999, where alpha=0"):
        scheduler.set_timesteps(5)


def test_calls_out_of_order_are_errors() -> None:
    scheduler = made("ddim", None)
    with pytest.raises(ValueError, match=r"call set_timesteps\(\) first"):
        scheduler.step(X, 999, X)
    with pytest.raises(ValueError, match=r"call set_timesteps\(\) first"):
        scheduler.set_begin_index(0)
    scheduler.set_timesteps(3, device="cpu")
    with pytest.raises(ValueError, match="timestep 5 is none of the scheduler's timesteps: 999, "):
        scheduler.step(X, 5, X)
    first, second, third = scheduler.timesteps
    scheduler.step(X, first, X)
    with pytest.raises(ValueError, match=r"timestep 999 is not the next one: call 2 of 3 is at"):
        scheduler.step(X, first, X)
    with pytest.raises(ValueError, match="is not the next one"):
        scheduler.step(X, third, X)
    scheduler.step(X, float(second), X)  # a number will do, and the errors have done no harm
    scheduler.step(X, third.expand(2), X)
    with pytest.raises(ValueError, match=r"all 3 calls are done; call set_timesteps\(\) or set_begin_index\(\)"):
        scheduler.step(X, third, X)
    scheduler.set_begin_index(0)
    scheduler.step(X, first, X)
    assert scheduler.index_for_timestep(second) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (X[:, :3], 999, X),
            ValueError,
            r"model_output must have the shape of sample, \(2, 4, 6, 6\), got \(2, 3, 6, 6\)",
        ),
        ((X.to("meta"), 999, X), ValueError, "model_output is on meta, sample on cpu; move one of them"),
        ((X, 999, X.long()), TypeError, r"sample must be a floating-point tensor \(B, ...\), got torch.int64"),
        ((None, 999, X), TypeError, r"model_output must be a floating-point tensor \(B, ...\), got NoneType"),
        ((X, None, X), TypeError, "timestep must be a number or a tensor of one, got None"),
        ((X, torch.tensor([999, 1]), X), ValueError, r"timestep must be one time for the whole batch, got \[999, 1\]"),
    ],
)
def test_a_step_that_does_not_fit(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        made("ddim").step(*arguments)


def test_set_timesteps_begins_anew() -> None:
    scheduler = made("unipc-3")
    first = run(scheduler, X)
    scheduler.set_timesteps(6)
    assert scheduler.step_index is None
    assert torch.equal(run(scheduler, X), first)
    scheduler.set_timesteps(1)
    assert run(scheduler, X).shape == X.shape


def test_a_copy_in_the_middle_goes_on_by_itself() -> None:
    """Pipelines that share a scheduler between views keep one copy of its state for each."""
    scheduler = made("unipc-3")
    wanted = run(made("unipc-3"), X)
    x, before = X, scheduler.timesteps[:3]
    for t in before:
        x = scheduler.step(network(x, t), t, x).prev_sample
    copies = [copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))]
    state = copy.deepcopy(scheduler.__dict__)
    for one in (scheduler, *copies, scheduler):
        if one is scheduler:
            scheduler.__dict__.update(copy.deepcopy(state))
        y = x
        for t in one.timesteps[3:]:
            y = one.step(network(y, t), t, y).prev_sample
        assert torch.equal(y, wanted)


@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m", "heun"])
def test_two_schedulers_that_share_the_steps(name: str) -> None:
    """SDXL's base and refiner: the first stops at a noise level where the second begins."""
    base, refiner = made(name, 8), made(name, 8)
    x = X
    split = 4 * base.order
    for t in base.timesteps[:split]:
        x = base.step(network(x, t), t, x).prev_sample
    refiner.set_begin_index(split)
    for t in refiner.timesteps[split:]:
        x = refiner.step(network(x, t), t, x).prev_sample
    whole = run(made(name, 8), X)
    assert (x - whole).abs().max() < (1e-5 if name != "dpmpp-2m" else 0.1)  # which has lost its history
    assert torch.isfinite(x).all()


def test_an_empty_batch_stays_empty() -> None:
    assert run(made("dpmpp-2m"), X[:0], seed=None).shape == (0, 4, 6, 6)
