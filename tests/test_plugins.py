"""A sampler that an installed package adds is one like any other."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.engine import run_suite
from bench.judging import metrics
from bench.suite import load_suite
from bench.zoo import load_model
from samplers import list_samplers, make_plan, schedules
from samplers.grid import make_grid
from samplers.registry import SAMPLERS, get_sampler, registered


def test_an_added_sampler_is_listed_planned_and_measured(add_plugin: Any, tmp_path: Path) -> None:
    add_plugin("fewstep.samplers", replace(SAMPLERS["ddim"], name="mine"), registered)
    assert [s.name for s in list_samplers()] == [*SAMPLERS, "mine"]
    plan = make_plan("mine", schedules.cosine(), nfe=3)
    assert plan.close(make_plan("ddim", schedules.cosine(), nfe=3), 1e-15)
    suite = load_suite("gmm").changed(["mine", "ddim"], nfe=[4], num_samples=50, metrics=())
    mine, ddim, _ = run_suite(suite, load_model("gmm"), tmp_path, "cpu", Console(quiet=True))
    assert (mine["sampler"], mine["value"]) == ("mine", ddim["value"])


def test_the_example_of_the_documentation_works(add_plugin: Any, tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "benchmark.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Draft" in block)
    assert len(code.strip().splitlines()) <= 25
    mine: dict[str, Any] = {}
    exec(code, mine)
    plan = mine["half"].plan(make_grid(schedules.cosine(), "uniform", 6))
    assert plan.nfe == 3
    add_plugin("fewstep.samplers", mine["half"], registered)
    suite = load_suite("gmm").changed(["half"], nfe=[4], num_samples=50, metrics=())
    assert run_suite(suite, load_model("gmm"), tmp_path, "cpu", Console(quiet=True))[0]["status"] == "done"
    add_plugin("fewstep.metrics", mine["brightness"], metrics)
    suite = load_suite("gmm").changed(["ddim"], nfe=[4], num_samples=50, metrics=["brightness"])
    row = run_suite(suite, load_model("gmm"), tmp_path, "cpu", Console(quiet=True))[0]
    assert set(row["metrics"]) == {"brightness"}


def test_an_added_sampler_may_not_take_a_name(add_plugin: Any) -> None:
    add_plugin("fewstep.samplers", SAMPLERS["ddim"], registered)
    assert get_sampler("ddim") is SAMPLERS["ddim"]  # those of fewstep do not wait for packages
    with pytest.raises(ValueError, match="entry point 'mine' of fewstep.samplers: the name 'ddim' is taken"):
        list_samplers()
    add_plugin("fewstep.samplers", "text", registered)
    with pytest.raises(TypeError, match="must be a Sampler, got str"):
        get_sampler("nothing")
