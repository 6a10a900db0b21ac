"""Settings of a run: their ranges, the shipped files, overrides, and YAML that gives the same run again."""

from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distill.config import CONFIGS, Training, default_dtype
from distill.methods import METHODS, config_names, load_config, make_method
from distill.teacher import Teacher, TeacherConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predicts": "x0"}, "predicts: Input should be 'eps' or 'v', got 'x0'"),
        ({"dtype": "fp16"}, "dtype: Input should be 'auto', 'bf16' or 'fp32', got 'fp16'"),
        ({"images": 0}, "images: .*greater than or equal to 1, got 0"),
        ({"images": 3.5}, r"images: .*integer.*got 3\.5"),
        ({"batch_size": -1}, "batch_size: .*got -1"),
        ({"accumulate": 0}, "accumulate: .*got 0"),
        ({"ema_half_lives": [50, 0]}, r"ema_half_lives: must be different and at least 1, got \[50, 0\]"),
        ({"ema_half_lives": [50, 50]}, r"ema_half_lives: must be different and at least 1, got \[50, 50\]"),
        ({"ema_half_lives": []}, "ema_half_lives: .*at least 1 item"),
        ({"warmup": -1}, "warmup: .*got -1"),
        ({"weight_decay": math.inf}, "weight_decay: .*finite number, got inf"),
        ({"learning_rate": 0.0}, r"learning_rate: .*greater than 0, got 0\.0"),
        ({"learning_rate": math.nan}, "learning_rate: .*got nan"),
        ({"learning_rate": None}, "learning_rate: .*got None"),
        ({"grad_clip": -1.0}, "grad_clip: .*greater than 0"),
        ({"drop_label": 1.1}, r"drop_label: .*less than or equal to 1, got 1\.1"),
        ({"seed": -1}, "seed: .*got -1"),
        ({"seed": 2**31}, "seed: .*less than 2147483648, got 2147483648"),
        ({"keep": 0}, "keep: .*got 0"),
        ({"rollbacks": -1}, "rollbacks: .*got -1"),
        ({"log_every": 3, "save_every": 20}, "save_every must be a multiple of log_every=3, got 20"),
        ({"evaluate_every": 75}, "evaluate_every must be a multiple of log_every=50, got 75"),
        ({"network": {"class": "UNet"}}, "network: unknown network class 'UNet'; did you mean 'PatchUNet'"),
        ({"network": {"class": "PatchUNet", "width": [8]}}, "network: .*'width'; did you mean 'widths'"),
        ({"network": "PatchUNet"}, "network: .*valid dictionary, got 'PatchUNet'"),
        ({"schedule": {"name": "cosin"}}, "schedule: .*name must be one of .* got 'cosin'"),
        ({"imges": 3}, "imges: no such field; did you mean 'images'"),
        ({"method": "techer"}, "unknown method 'techer'; did you mean 'teacher'"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        TeacherConfig(**changes)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"method": "teacher", **changes}))
    with pytest.raises(ValueError, match=message) as caught:
        load_config(file)
    assert str(file) in str(caught.value)


def test_the_error_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: teacher\n\nimages: 100\nnetwork:\n  class: PatchUNet\n  width: [8]\nseed: 3\n")
    with pytest.raises(ValueError, match=r"run\.yaml, line 4: network: "):
        load_config(file)
    file.write_text(file.read_text().replace("seed: 3", "seed: x"))
    with pytest.raises(ValueError, match=r"run\.yaml, line 7: seed: "):
        load_config(file)


def test_the_shipped_teacher_is_the_defaults_written_out() -> None:
    written = yaml.safe_load((CONFIGS / "mnist.yaml").read_text())
    default = TeacherConfig().document()
    assert {name for name, value in written.items() if value != default[name]} == {"images"}
    assert load_config("mnist") == TeacherConfig(images=2_920_000)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_shipped_run_is_valid(name: str) -> None:
    assert name in config_names()
    config = load_config(name)
    assert type(config) is METHODS[config.method].settings
    assert config.may_change <= set(type(config).model_fields)


def test_a_run_is_found_by_name_or_path_and_overrides_replace_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "run.yml"
    file.write_text("batch_size: 4\nlearning_rate: 1\n")
    assert load_config(str(file)) == TeacherConfig(batch_size=4, learning_rate=1.0)
    assert load_config(file, batch_size=8, seed=3) == TeacherConfig(batch_size=8, learning_rate=1.0, seed=3)
    assert load_config("mnist", images=100).images == 100
    with pytest.raises(ValueError, match="images: .*got -3"):
        load_config("mnist", images=-3)
    with pytest.raises(ValueError, match="imags: no such field; did you mean 'images'"):
        load_config("mnist", imags=3)


def test_an_unknown_run_offers_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown training run 'mnits'; did you mean 'mnist'"):
        load_config("mnits")
    with pytest.raises(ValueError, match=r"unknown training run .*nothing\.yaml'.*a \.yaml file"):
        load_config(tmp_path / "nothing.yaml")


def test_a_run_written_as_yaml_is_the_same_run(tmp_path: Path) -> None:
    config = TeacherConfig(
        images=77, learning_rate=1e-05, ema_half_lives=(5, 1_000_000), init="a: b", schedule={"name": "flow"}
    )
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml())
    assert load_config(file) == config
    assert list(yaml.safe_load(config.to_yaml())) == list(TeacherConfig.model_fields)


def test_a_method_is_made_from_its_settings() -> None:
    method = make_method(TeacherConfig(images=128 * 7))
    assert isinstance(method, Teacher)
    assert [phase.steps(128) for phase in method.phases] == [7]
    assert Training.may_change < TeacherConfig.may_change


def test_the_dtype_of_a_run_follows_from_its_device_unless_it_is_given() -> None:
    given = TeacherConfig(dtype="bf16")
    assert given.on("cpu") is given
    assert (given.autocast, TeacherConfig(dtype="fp32").autocast) == (torch.bfloat16, torch.float32)
    assert TeacherConfig().on("cpu").dtype == default_dtype("cpu")
    with pytest.raises(ValueError, match=r"dtype='auto' stands for no dtype until a device is given"):
        _ = TeacherConfig().autocast


@pytest.mark.parametrize(("flags", "dtype"), [("fma avx2", "fp32"), ("avx512_bf16 avx2", "bf16"), ("amx_bf16", "bf16")])
def test_a_processor_without_bf16_trains_in_fp32(flags: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: f"flags : {flags}")
    assert default_dtype("cpu") == dtype
