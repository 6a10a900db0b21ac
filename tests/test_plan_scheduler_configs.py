"""PlanScheduler made from the config of every scheduler there is in diffusers: what is kept, reported and refused."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
from samplers import make_plan, schedules  # noqa: E402  after the check that diffusers is there
from samplers.adapters.diffusers import PlanScheduler, eps_model_from_diffusers  # noqa: E402
from samplers.adapters.diffusers.keys import EXCLUDED, KEYS  # noqa: E402
from samplers.adapters.diffusers.training import training_of  # noqa: E402


def every_class() -> dict[str, type]:
    found = {name: getattr(diffusers.schedulers, name) for name in dir(diffusers.schedulers)}
    return {
        name: kind
        for name, kind in found.items()
        if inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin) and kind is not diffusers.SchedulerMixin
    }


CLASSES = every_class()
SERVED = sorted(set(CLASSES) - set(EXCLUDED))
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class Heard(logging.Handler):
    """What diffusers' logger said."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.text.append(record.getMessage())


@pytest.fixture
def heard() -> Iterator[list[str]]:
    handler, logger = Heard(), logging.getLogger("diffusers")
    logger.addHandler(handler)
    yield handler.text
    logger.removeHandler(handler)


def test_every_class_is_served_or_excluded_for_a_reason() -> None:
    assert set(EXCLUDED) <= set(CLASSES)  # none that diffusers has no more
    assert len(SERVED) >= 25
    for name in SERVED:
        own = set(inspect.signature(CLASSES[name].__init__).parameters) - {"self", "kwargs"}
        assert own <= KEYS, f"{name} has {own - KEYS}"


@pytest.mark.parametrize("name", SERVED)
def test_a_class_keeps_its_noise_schedule_on_every_way(name: str, tmp_path: Path) -> None:
    theirs = CLASSES[name]()
    theirs.save_pretrained(tmp_path)
    for ours in (
        PlanScheduler.from_config(theirs.config, sampler="dpmpp-2m"),
        PlanScheduler.from_pretrained(tmp_path, sampler="dpmpp-2m"),
    ):
        if hasattr(theirs, "alphas_cumprod"):
            assert np.allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=0, atol=2e-6)
        ours.set_timesteps(4, mu=0.5)
        assert len(ours.timesteps) == 4
        assert len(ours) == theirs.config.get("num_train_timesteps", 1000)
        back = CLASSES[name].from_config(ours.config)  # and what the other scheduler had is not lost
        kept = {k: v for k, v in theirs.config.items() if not k.startswith("_")}
        assert {k: back.config[k] for k in kept} == kept
        again = PlanScheduler.from_config(back.config)
        again.set_timesteps(4, mu=0.5)
        assert again.plan == ours.plan


@pytest.mark.parametrize("name", sorted(EXCLUDED))
def test_a_class_that_is_excluded_says_why(name: str) -> None:
    with pytest.raises(ValueError, match=f"config of {name}: ") as caught:
        PlanScheduler.from_config({"_class_name": name, "num_train_timesteps": 1000})
    assert EXCLUDED[name] in str(caught.value)


def test_a_key_left_at_its_default_keeps_the_value_it_had() -> None:
    """diffusers' own from_config takes the other class's default instead: another noise schedule."""
    theirs = diffusers.HeunDiscreteScheduler()
    ours = PlanScheduler.from_config(theirs.config)
    assert ours.config.beta_start == theirs.config.beta_start != diffusers.DDIMScheduler().config.beta_start
    # as an old file has it, where keys are missing
    ours = PlanScheduler.from_config({"_class_name": "HeunDiscreteScheduler", "num_train_timesteps": 500})
    assert ours.config.beta_start == theirs.config.beta_start
    assert len(ours) == 500


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "sigmoid", "squaredcos_cap_v2", "laplace"])
@pytest.mark.parametrize("zero", [False, True])
def test_betas_are_diffusers_in_float64(kind: str, zero: bool) -> None:
    theirs = diffusers.DDPMScheduler(beta_schedule=kind, rescale_betas_zero_snr=zero)
    table = np.array(training_of(theirs.config).schedule.alphas_cumprod)  # type: ignore[attr-defined]
    assert np.allclose(table, theirs.alphas_cumprod, rtol=0, atol=1e-6)
    assert (table[-1] == 0) == zero


def test_trained_betas_and_shifted_ones() -> None:
    betas = [0.1, 0.2, 0.3, 0.5]
    ours = PlanScheduler(trained_betas=betas)
    assert np.allclose(ours.alphas_cumprod, np.cumprod(1 - np.array(betas)))
    video = diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, snr_shift_scale=1.0, beta_schedule="linear")
    assert np.allclose(PlanScheduler.from_config(video.config).alphas_cumprod, video.alphas_cumprod, rtol=0, atol=1e-6)


SAME = {
    "DDIM": (diffusers.DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1), "ddim"),
    "DDIM to training step 0": (
        diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        "ddim",
    ),
    "DDIM trailing": (diffusers.DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing"), "ddim"),
    "DDIM clipped x0": (
        diffusers.DDIMScheduler(**BETAS, clip_sample=True, clip_sample_range=0.5, prediction_type="sample"),
        "ddim",
    ),
    "zero SNR": (
        diffusers.DDIMScheduler(
            **BETAS,
            clip_sample=False,
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            prediction_type="v_prediction",
        ),
        "ddim",
    ),
    "DPM-Solver++ on Karras sigmas": (
        diffusers.DPMSolverMultistepScheduler(
            **BETAS, use_karras_sigmas=True, euler_at_final=True, lower_order_final=False
        ),
        "dpmpp-2m",
    ),
    "Euler exponential": (diffusers.EulerDiscreteScheduler(**BETAS, use_exponential_sigmas=True), "euler"),
    "EDM Euler": (diffusers.EDMEulerScheduler(), "euler"),
    "EDM Euler exponential": (diffusers.EDMEulerScheduler(sigma_schedule="exponential"), "euler"),
    "flow": (diffusers.FlowMatchEulerDiscreteScheduler(), "euler"),
}


@pytest.mark.parametrize("case", SAME)
def test_the_configs_grid_and_its_solver_give_what_the_scheduler_gave(case: str) -> None:
    """`grid="config"` with the same method: one's states are in x coordinates, the other's may be divided by alpha."""
    theirs, name = SAME[case]
    options = {"lower_order_final": False} if name == "dpmpp-2m" else {}
    ours = PlanScheduler.from_config(theirs.config, sampler=name, grid="config", **options)
    theirs.set_timesteps(10)
    ours.set_timesteps(10)
    rounded = 0.51 if "Karras" in case else 1e-2  # diffusers rounds the times of these, which the network is told
    count = len(ours.timesteps)
    assert torch.allclose(ours.timesteps.float(), theirs.timesteps.float()[:count], atol=rounded)
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    a = z * ours.init_noise_sigma
    over = isinstance(theirs, diffusers.EulerDiscreteScheduler)
    b = a / float(ours.plan.calls[0].alpha) if over else a
    for t, s in zip(ours.timesteps, theirs.timesteps, strict=False):
        out = 0.9 * z + 0.1 * torch.sin(s.float())  # the same whatever the state's coordinates are
        if hasattr(theirs, "scale_model_input"):
            theirs.scale_model_input(b, s)
        a, b = ours.step(out, t, a).prev_sample, theirs.step(out, s, b).prev_sample
    assert torch.allclose(a, b, rtol=1e-3, atol=2e-4 * float(b.abs().max()))


def test_the_recommended_grid_is_the_default_and_a_choice_of_the_config_is_reported(heard: list[str]) -> None:
    plain = PlanScheduler.from_config(diffusers.DDIMScheduler(**BETAS).config, sampler="unipc-3")
    plain.set_timesteps(6)
    assert plain.plan == make_plan("unipc-3", training_of(BETAS).schedule, steps=6)
    assert heard == []
    chosen = diffusers.DDIMScheduler(**BETAS, timestep_spacing="trailing").config
    PlanScheduler.from_config(chosen, sampler="unipc-3")
    assert heard == [
        "timestep_spacing='trailing' of the scheduler's config is not used: the grid is the one recommended for 'unipc-3'; "
        "grid='config' keeps the config's"
    ]
    karras = diffusers.DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True).config
    PlanScheduler.from_config(karras, grid="config")
    assert len(heard) == 1  # it is used now
    PlanScheduler.from_config(karras)
    assert "use_karras_sigmas=True" in heard[1]


def test_a_spacing_that_is_asked_for_is_used() -> None:
    config = diffusers.DDIMScheduler(**BETAS).config
    ours = PlanScheduler.from_config(config, sampler="dpmpp-2m", timestep_spacing="trailing")
    ours.set_timesteps(5)
    assert ours.config.grid == "config"
    assert ours.timesteps.tolist() == [999, 799, 599, 399, 199]
    assert ours.timesteps.dtype == torch.int64
    karras = PlanScheduler.from_config(config, sampler="dpmpp-2m", use_karras_sigmas=True)
    karras.set_timesteps(5)
    named = PlanScheduler.from_config(config, sampler="dpmpp-2m", grid="karras", final="zero")
    named.set_timesteps(5)
    assert karras.plan == named.plan
    with pytest.raises(ValueError, match=r"timestep_spacing goes with grid='config', got grid='karras'"):
        PlanScheduler.from_config(config, grid="karras", timestep_spacing="trailing")


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (diffusers.DPMSolverMultistepScheduler(lambda_min_clipped=-5.1), "lambda_min_clipped=-5.1"),
        (diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "sampler='consistency' draws new noise"),
        (diffusers.LCMScheduler(), "original_inference_steps=50"),
    ],
)
def test_what_cannot_be_honoured_is_reported(theirs: Any, said: str, heard: list[str]) -> None:
    PlanScheduler.from_config(theirs.config)
    assert any(said in line and "is not used" in line for line in heard)


def test_what_describes_the_old_solver_is_kept_in_silence(heard: list[str]) -> None:
    theirs = diffusers.UniPCMultistepScheduler(solver_order=3, solver_type="bh1", lower_order_final=False)
    ours = PlanScheduler.from_config(theirs.config, sampler="unipc-2")
    assert heard == []
    assert ours.config.solver_order == 3
    assert ours.config.options == {}
    assert PlanScheduler.from_config(ours.config, sampler="dpmpp-2m", solver_type="heun").config.options == {
        "solver_type": "heun"
    }


def test_options_belong_to_their_sampler() -> None:
    ours = PlanScheduler.from_config(BETAS, sampler="ddim", eta=0.5)
    assert PlanScheduler.from_config(ours.config, grid="karras").config.options == {"eta": 0.5}
    assert PlanScheduler.from_config(ours.config, sampler="dpmpp-2m").config.options == {}


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({"beta_shedule": "linear"}, {}, "config must say what the noise schedule is.* got beta_shedule"),
        (
            {**BETAS, "beta_strat": 1},
            {},
            "unknown key of the scheduler's config 'beta_strat'; did you mean 'beta_start'",
        ),
        (BETAS, {"prediction_type": "noise"}, "unknown prediction_type of the scheduler 'noise'"),
        (BETAS, {"prediction_type": "flow_prediction"}, "'flow_prediction' beside alphas_cumprod"),
        (BETAS, {"beta_schedule": "cosine"}, "unknown beta_schedule of the scheduler 'cosine'"),
        (BETAS, {"beta_end": 2}, r"beta_end of the scheduler must lie in \(0, 1\), got 2"),
        (
            BETAS,
            {"num_train_timesteps": 0},
            "num_train_timesteps of the scheduler must be an integer of at least 2, got 0",
        ),
        ({"trained_betas": [[0.1]]}, {}, "trained_betas of the scheduler must be a list of numbers"),
        ({"trained_betas": [0.1, 1.5]}, {}, r"betas of the scheduler must lie in \(0, 1\]"),
        ({"shift": 3.0, "invert_sigmas": True}, {}, "invert_sigmas=True of the scheduler's config is not supported"),
        (BETAS, {"sampler": "unipc3"}, "unknown sampler 'unipc3'; did you mean 'unipc-3'"),
        (BETAS, {"sampler": "rk45"}, "sampler 'rk45' chooses its steps by an error estimate.* no plan"),
        (BETAS, {"sampler": "ddim", "et": 1.0}, "unknown option of sampler 'ddim': 'et'; did you mean 'eta'"),
        (BETAS, {"sampler": "unipc-3", "solver_order": 2}, "unknown option of sampler 'unipc-3': 'solver_order'"),
        (BETAS, {"grid": "karas"}, "unknown grid 'karas'; did you mean 'karras'"),
        (BETAS, {"final": "one"}, "unknown final 'one'"),
        ({"sigma_data": 0.5, "sigma_max": "80", "sigma_min": 0.1}, {}, "sigma_min and sigma_max .* must be numbers"),
        ({"sigma_data": 0.5, "sigma_max": 80, "sigma_min": 0.1, "prediction_type": "sample"}, {}, "prediction_type"),
        (
            {"sigma_data": 0.5, "sigma_max": 80, "sigma_min": 0.1, "clip_denoised": True},
            {},
            "clip_denoised|consistency",
        ),
    ],
)
def test_a_bad_config_is_an_error_that_names_the_argument(config: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanScheduler.from_config(config, **changes)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ("a/folder", {}, "config must be a mapping such as pipe.scheduler.config, got str; a folder is read by"),
        (BETAS, {"grid": schedules.edm}, "grid must be a name, which a config can hold"),
        (BETAS, {"afs": 1}, "afs must be True or False, got 1"),
        (BETAS, {"sampler": "ddim", "eta": "much"}, "eta of sampler 'ddim' must be like its default"),
    ],
)
def test_a_bad_type_too(config: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        PlanScheduler.from_config(config, **changes)


def public(scheduler: Any) -> dict[str, Any]:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def test_a_saved_scheduler_is_the_same_plan(tmp_path: Path) -> None:
    ours = PlanScheduler.from_config(
        diffusers.DDPMScheduler(**BETAS).config, sampler="ddim", grid="logsnr", final="denoise", eta=0.25
    )
    ours.set_timesteps(7)
    ours.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert text["_class_name"] == "PlanScheduler"
    assert (text["sampler"], text["grid"], text["final"], text["options"]) == (
        "ddim",
        "logsnr",
        "denoise",
        {"eta": 0.25},
    )
    again = PlanScheduler.from_pretrained(tmp_path)
    again.set_timesteps(7)
    assert again.plan == ours.plan
    assert public(again) == public(ours)
    other = PlanScheduler.from_pretrained(tmp_path, sampler="unipc-3")  # its options were the other sampler's
    assert other.config.options == {}
    same, unused = PlanScheduler.from_pretrained(tmp_path, return_unused_kwargs=True)
    assert public(same) == public(ours)
    assert unused == {}


def test_compatibles_load_each_others_configs() -> None:
    ours = PlanScheduler.from_config(diffusers.DDIMScheduler(**BETAS).config, sampler="unipc-3")
    assert PlanScheduler in ours.compatibles
    assert len(ours.compatibles) > 10
    for kind in ours.compatibles:
        if "dummy" in kind.__module__:  # needs torchsde, which is not there
            continue
        theirs = kind.from_config(ours.config)
        again = PlanScheduler.from_config(theirs.config)
        assert again.config.beta_start == BETAS["beta_start"]
        assert again.config.sampler == "unipc-3"


def test_a_network_with_a_plan_scheduler_is_an_epsilon_model(tiny_unet: Any) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for theirs in (
        diffusers.DDPMScheduler(),
        diffusers.EDMEulerScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(),
    ):
        a = eps_model_from_diffusers(tiny_unet, theirs)
        b = eps_model_from_diffusers(tiny_unet, PlanScheduler.from_config(theirs.config))
        t = 0.5 * a.schedule.t_max
        assert torch.equal(a.x0(x, t), b.x0(x, t))
