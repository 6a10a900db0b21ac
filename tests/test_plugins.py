"""A sampler that an installed package adds is one like any other."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.engine import run_suite
from bench.judging import get_metric, metrics
from bench.store import _package_fingerprint, plugin_fingerprint
from bench.suite import load_suite
from bench.zoo import load_model
from samplers import list_samplers, make_plan, plugins, schedules
from samplers.grid import make_grid
from samplers.registry import SAMPLERS, Sampler, get_sampler, registered


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


ADDED = """
from bench import Metric
from bench.intervals import Distance
from {package}.amount import amount
def compute(arrays, judge):
    return Distance(float(amount), 0.0, 0.0, 0.0, 0)
added = Metric("added", compute)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: Any) -> Any:
    """`package(amount)`: the module of a package whose metric is a number that stands in another of its files."""
    folder = tmp_path / "fewstep_added"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "mine.py").write_text(ADDED.format(package=folder.name))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two versions within a second

    def load(amount: int) -> Any:
        (folder / "amount.py").write_text(f"amount = {amount}")
        for name in [name for name in sys.modules if name.startswith(folder.name)]:
            del sys.modules[name]
        importlib.invalidate_caches()
        _package_fingerprint.cache_clear()
        return importlib.import_module(f"{folder.name}.mine")

    yield load
    _package_fingerprint.cache_clear()
    for name in [name for name in sys.modules if name.startswith(folder.name)]:
        del sys.modules[name]


def test_a_cell_is_measured_again_where_an_added_metric_has_changed(
    add_plugin: Any, package: Any, tmp_path: Path
) -> None:
    def row(amount: int) -> dict[str, Any]:
        add_plugin("fewstep.metrics", package(amount).added, metrics)
        suite = load_suite("gmm").changed(["ddim"], nfe=[4], num_samples=50, metrics=["added"])
        return run_suite(suite, load_model("gmm"), tmp_path / "run", "cpu", Console(quiet=True))[0]

    one, hundred, again = row(1), row(100), row(1)
    assert [r["metrics"]["added"]["value"] for r in (one, hundred, again)] == [1.0, 100.0, 1.0]
    assert again == one  # the cell from before
    assert re.fullmatch(r"added [0-9a-f]{16}", one["plugins"])
    assert one["plugins"] != hundred["plugins"]


def test_the_code_of_an_added_function_is_known_without_a_file(package: Any) -> None:
    def typed(text: str) -> Any:
        names: dict[str, Any] = {"__name__": "prompt_without_a_file"}
        exec(text, names)
        return names["f"]

    texts = ("f = lambda x: x + 1", "f = lambda x: x + 100", "f = lambda x: [x + 1 for _ in x]")
    found = [plugin_fingerprint(typed(text)) for text in texts]
    assert len(set(found)) == 3
    assert found[0] == plugin_fingerprint(partial(typed(texts[0]), 2))
    assert plugin_fingerprint(get_metric("kid").compute) == ""  # covered by the sources of fewstep
    one = plugin_fingerprint(package(1).compute)
    assert one != plugin_fingerprint(package(2).compute)
    assert one == plugin_fingerprint(package(1).compute)


def test_an_added_sampler_may_not_take_a_name(add_plugin: Any) -> None:
    add_plugin("fewstep.samplers", SAMPLERS["ddim"], registered)
    assert get_sampler("ddim") is SAMPLERS["ddim"]  # those of fewstep do not wait for packages
    with pytest.raises(ValueError, match="entry point 'mine' of fewstep.samplers: the name 'ddim' is taken"):
        list_samplers()
    add_plugin("fewstep.samplers", "text", registered)
    with pytest.raises(TypeError, match="must be a Sampler, got str"):
        get_sampler("nothing")


def test_a_package_that_cannot_be_loaded_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("mine", "no.such.module:sampler", "fewstep.samplers")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [broken])
    with pytest.warns(UserWarning, match=r"'mine' of fewstep.samplers, from package no.such.module, cannot be loaded"):
        known = plugins.with_plugins("fewstep.samplers", Sampler, SAMPLERS)
    assert known == SAMPLERS
