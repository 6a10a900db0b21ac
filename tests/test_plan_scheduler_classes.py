"""Scheduler classes of diffusers that cannot be served: known by name or by their keys, from memory and from files."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
from diffusers import schedulers  # noqa: E402

from samplers.adapters.diffusers import PlanScheduler, eps_model_from_diffusers  # noqa: E402
from samplers.adapters.diffusers.classes import EXCLUDED, NETWORKS, class_of, keys_of  # noqa: E402

ARGUMENTS: dict[str, dict[str, Any]] = {
    "AmusedScheduler": {"mask_token_id": 5},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
    "RFD4ProteinaScheduler": {"schedule_mode": "power", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
}
TWINS = {"FlowMapEulerDiscreteScheduler": "FlowMatchHeunDiscreteScheduler"}
NETWORK = torch.nn.Conv2d(3, 3, 1)


def made(name: str) -> Any:
    return getattr(schedulers, name)(**ARGUMENTS.get(name, {}))


@pytest.mark.parametrize("name", sorted(EXCLUDED))
def test_its_config_is_refused_from_memory_and_from_a_folder(name: str, tmp_path: Path) -> None:
    message = f"^config of {name}: "
    config = made(name).config
    assert "_class_name" not in config  # it does not say what it is
    every = {key: value for key, value in config.items() if not key.startswith("_")}
    whole = getattr(schedulers, name)(**every).config  # where nothing was left at its default
    for given in (config, {**config}, whole) if name not in TWINS else ():
        with pytest.raises(ValueError, match=message) as caught:
            PlanScheduler.from_config(given, sampler="ddim")
        assert str(caught.value).endswith(EXCLUDED[name])
    made(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        PlanScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "served"), TWINS.items())
def test_of_two_classes_with_the_same_keys_it_is_said_which_one_is_meant(
    name: str, served: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "diffusers")
    logging.getLogger("diffusers").addHandler(caplog.handler)  # it does not propagate
    try:
        ours = [PlanScheduler.from_config(made(one).config) for one in (name, served)]
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert dict(ours[0].config) == dict(ours[1].config)
    assert caplog.text.count(f"taken for one of {served}; {name} has the same keys") == 2
    made(served).save_pretrained(tmp_path)
    caplog.clear()
    assert PlanScheduler.from_pretrained(tmp_path).config.shift == 1.0
    assert not caplog.text


def test_no_class_that_is_served_has_the_keys_of_another() -> None:
    names = [name for name in dir(schedulers) if name.endswith("Scheduler") and name not in EXCLUDED]
    keys = {name: keys_of(getattr(schedulers, name)) for name in (*names, *EXCLUDED)}
    assert {a: b for a in EXCLUDED for b in names if keys[a] == keys[b]} == TWINS


def test_a_config_written_by_hand_is_of_no_class() -> None:
    keys = {"num_train_timesteps": 1000, "shift": 3.0}  # those of a class that is refused
    assert class_of(keys) is None
    assert PlanScheduler.from_config(keys).config.shift == 3.0


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_its_network_is_no_epsilon_model(name: str) -> None:
    with pytest.raises(ValueError, match=f"^scheduler of class {name}: ") as caught:
        eps_model_from_diffusers(NETWORK, made(name))
    assert str(caught.value).endswith(NETWORKS[name])


@pytest.mark.parametrize("name", ["DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"])
def test_a_scheduler_that_runs_back_has_a_network_like_any_other(name: str) -> None:
    theirs, forth = made(name), diffusers.DDIMScheduler()
    ours, other = (eps_model_from_diffusers(NETWORK, one) for one in (theirs, forth))
    assert ours.schedule == other.schedule


def test_what_a_class_alone_tells_is_known_from_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = PlanScheduler.from_config(diffusers.LTXEulerAncestralRFScheduler().config)
    assert flow.config.shift == 1.0
    if importlib.util.find_spec("torchsde") is None:  # which only their Brownian tree needs
        monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    name = "CosineDPMSolverMultistepScheduler"
    module = importlib.import_module("diffusers.schedulers.scheduling_cosine_dpmsolver_multistep")
    monkeypatch.setattr(schedulers, name, getattr(module, name))
    theirs = getattr(module, name)()
    ours = PlanScheduler.from_config(theirs.config)
    theirs.set_timesteps(5)
    ours.set_timesteps(sigmas=[*theirs.sigmas[:-1].tolist(), 0.0])
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-5, atol=1e-5)  # angles, not log(sigma) / 4
