"""The checks that diffusers keeps for all of its schedulers (its SchedulerCommonTest), made of PlanScheduler.

One of them is made otherwise. Theirs calls `step` at the times 0 and 1, whatever `set_timesteps(10)` chose, which some of their
schedulers take for the last of their own, and others work out coefficients for. A plan's coefficients belong to its calls, in
their order, so another time is an error here, and the checks take the scheduler's own times.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
from samplers.adapters.diffusers import PlanScheduler  # noqa: E402  after the check that diffusers is there

TRAINED = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
# first order with noise, multistep, multistep with a corrector, two calls a step with noise, Runge-Kutta start
SAMPLERS = ("ddpm", "dpmpp-2m", "unipc-3", "dpmpp-sde", "pndm")
X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OUTPUT = 0.1 * X


def made(sampler: str, steps: int | None = 10, **more: Any) -> Any:
    scheduler = PlanScheduler(sampler=sampler, **{**TRAINED, **more})
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


def saved_and_loaded(scheduler: Any, folder: Path) -> Any:
    scheduler.save_pretrained(folder)
    return PlanScheduler.from_pretrained(folder)


def first_steps(scheduler: Any, count: int = 3, x: torch.Tensor = X) -> torch.Tensor:
    """The state after some calls, with noise of one seed."""
    generator = torch.Generator().manual_seed(0)
    for t in scheduler.timesteps[:count]:
        out = 0.1 * scheduler.scale_model_input(x, t)
        x = scheduler.step(out, t, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_saved_and_loaded_it_steps_alike(sampler: str, tmp_path: Path) -> None:
    ours = made(sampler)
    again = saved_and_loaded(ours, tmp_path)
    again.set_timesteps(10)
    assert torch.equal(first_steps(ours), first_steps(again))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("time", [0, 1, 1.0])
def test_a_time_that_is_none_of_its_own_is_an_error(sampler: str, time: float) -> None:
    ours = made(sampler, grid="logsnr", final="t_min")
    if time in ours.timesteps.tolist():
        pytest.skip("a time of this grid")
    with pytest.raises(ValueError, match=f"timestep {time:g} is none of the scheduler's timesteps"):
        ours.step(OUTPUT, time, X)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "config",
    [
        {"num_train_timesteps": 100},
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_start": 0.001, "beta_end": 0.002},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample", "thresholding": True, "sample_max_value": 0.5},
        {"clip_sample": True},
        {"timestep_spacing": "trailing", "grid": "config"},
        {"final": "zero"},
    ],
)
def test_every_config_comes_back(sampler: str, config: dict[str, Any], tmp_path: Path) -> None:
    ours = made(sampler, **config)
    again = saved_and_loaded(ours, tmp_path)
    again.set_timesteps(10)
    assert torch.equal(first_steps(ours), first_steps(again))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_loaded_has_the_config_that_was_saved(sampler: str, tmp_path: Path) -> None:
    ours = made(sampler, None)
    again = saved_and_loaded(ours, tmp_path)
    config = dict(ours.config)
    del config["_use_default_values"]  # nothing is left at its default in a file
    assert config == dict(again.config)
    once_more = saved_and_loaded(again, tmp_path / "again")
    assert dict(once_more.config) == dict(again.config)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_config_goes_through_every_compatible_class_and_back(sampler: str) -> None:
    ours = made(sampler, None)
    assert all(kind is not None for kind in ours.compatibles)
    assert len(ours.compatibles) > 10
    taken = set(inspect.signature(PlanScheduler.__init__).parameters)
    for kind in ours.compatibles:
        if "dummy" in kind.__module__:  # of diffusers, where torchsde is not installed
            continue
        again = PlanScheduler.from_config(kind.from_config(ours.config).config)
        assert {key: value for key, value in again.config.items() if key in ours.config} == dict(ours.config), kind
        assert not taken & (set(again.config) - set(ours.config)), kind


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_keeps_the_shape(sampler: str) -> None:
    ours = made(sampler)
    for t in ours.timesteps:
        assert ours.step(OUTPUT, t, X).prev_sample.shape == X.shape


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_output_is_a_tuple_or_an_object(sampler: str) -> None:
    results = []
    for return_dict in (True, False):
        ours = made(sampler, 50)
        t = ours.timesteps[0]
        generator = torch.Generator().manual_seed(0)
        results.append(ours.step(OUTPUT, t, X, return_dict=return_dict, generator=generator))
    named, plain = results
    assert isinstance(plain, tuple)
    assert [torch.equal(a, b) for a, b in zip(named.values(), plain, strict=True)] == [True, True]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_has_what_pipelines_call_also_before_there_are_steps(sampler: str) -> None:
    ours = made(sampler, None)
    for name in ("init_noise_sigma", "scale_model_input", "step", "set_timesteps", "timesteps", "order", "add_noise"):
        assert hasattr(ours, name), name
    assert ours.scale_model_input(X, 0.0).shape == X.shape
    assert ours.plan is None
    assert {"sigmas", "plan", "betas"} <= {name for name, _ in inspect.getmembers(ours)}  # no property raises


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_is_added_at_one_of_its_times(sampler: str) -> None:
    ours = made(sampler, 100)
    noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
    assert ours.add_noise(X, noise, ours.timesteps[5][None]).shape == X.shape


def test_it_takes_no_arguments_that_are_deprecated() -> None:
    takes = "kwargs" in inspect.signature(PlanScheduler.__init__).parameters
    assert takes == bool(PlanScheduler._deprecated_kwargs)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trained_betas_come_back(sampler: str, tmp_path: Path) -> None:
    ours = made(sampler, None, trained_betas=np.array([0.1, 0.3]))
    assert ours.betas.tolist() == torch.tensor([0.1, 0.3]).tolist()
    assert ours.betas.tolist() == saved_and_loaded(ours, tmp_path).betas.tolist()


def test_attributes_of_the_config_are_deprecated_and_others_do_not_exist() -> None:
    ours = made("dpmpp-2m", None)
    ours.dummy_attribute = 5
    ours.register_to_config(test_attribute=5)
    assert ours.dummy_attribute == 5
    assert ours.save_pretrained == ours.__getattribute__("save_pretrained")
    with pytest.warns(FutureWarning, match="Accessing config attribute `test_attribute`"):
        assert ours.test_attribute == 5
    with pytest.raises(AttributeError) as caught:
        _ = ours.does_not_exist
    assert str(caught.value) == "'PlanScheduler' object has no attribute 'does_not_exist'"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_thresholding_is_that_of_diffusers_below_a_limit_of_1_too(sampler: str) -> None:
    x = 3 * X.double() - 1
    for limit in (0.5, 1.0, 2.0):
        keys = {"thresholding": True, "prediction_type": "sample", "sample_max_value": limit}
        theirs = diffusers.DDIMScheduler(**TRAINED, **keys)
        ours = made(sampler, **keys)
        found = ours.step(x, ours.timesteps[0], x, generator=torch.Generator().manual_seed(0)).pred_original_sample
        torch.testing.assert_close(found, theirs._threshold_sample(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_half_precision_goes_through_the_loop(sampler: str) -> None:
    ours = made(sampler)
    assert first_steps(ours, len(ours.timesteps), X.half()).dtype == torch.float16


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_scheduler_can_be_copied_before_and_within_a_run(sampler: str) -> None:
    ours = made(sampler, None)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert dict(other.config) == dict(ours.config)
    assert "PlanScheduler" in repr(ours)


TABLES = ("betas", "alphas", "alphas_cumprod")


@pytest.mark.parametrize("config", [TRAINED, {"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True}])
def test_the_tables_are_those_of_ddim(config: dict[str, Any]) -> None:
    for ends in ({}, {"set_alpha_to_one": False}):
        theirs = diffusers.DDIMScheduler(**config, **ends, prediction_type="v_prediction")
        ours = PlanScheduler.from_config(theirs.config)
        for name in TABLES:
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=2e-6)
        torch.testing.assert_close(ours.final_alpha_cumprod, theirs.final_alpha_cumprod, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "theirs",
    [
        diffusers.EulerDiscreteScheduler(**TRAINED),
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.EDMEulerScheduler(),
    ],
    ids=["betas", "flow", "edm"],
)
def test_before_there_are_steps_sigmas_are_those_of_the_training(theirs: Any) -> None:
    ours = PlanScheduler.from_config(theirs.config)
    assert len(ours.sigmas) == len(ours.timesteps) + 1 == 1001
    assert ours.sigmas[-1] == 0
    assert (ours.sigmas.diff() < 0).all()
    top = theirs.sigmas.max()
    assert float(ours.sigmas[0]) == pytest.approx(float(top), rel=1e-5)
    if hasattr(theirs, "alphas_cumprod"):
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-4, atol=1e-4)
    else:
        assert not any(hasattr(ours, name) for name in TABLES)


def test_another_class_gets_the_noise_schedule_that_was_left_at_its_default() -> None:
    """A PlanScheduler of nothing has DDPM's betas; diffusers' Heun, told nothing, has Stable Diffusion's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = diffusers.HeunDiscreteScheduler.from_config(PlanScheduler().config)
    torch.testing.assert_close(theirs.betas, diffusers.DDPMScheduler().betas)
