"""What `fewstep speed` counts and writes; how fast anything is belongs to its results, not to a test."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from torch.utils._python_dispatch import TorchDispatchMode

from bench import speed
from bench.cli import main
from distill import network
from distill.network import PatchUNet
from samplers import EpsModel, list_samplers, make_plan, run_plan
from samplers.registry import SAMPLERS


def test_every_method_exists_on_both_sides():
    import diffusers

    for method in speed.METHODS:
        SAMPLERS[method.sampler].check_options(method.options)
        assert hasattr(diffusers, method.scheduler)


def test_every_one_call_deterministic_sampler_is_held_against_the_floor():
    one_call = {s.name for s in list_samplers() if not s.adaptive and s.calls == 1 and s.stochastic == "no"}
    timed = speed.methods()
    alone = [method.sampler for method in timed if not method.scheduler]
    assert timed[: len(speed.METHODS)] == speed.METHODS
    assert {method.sampler for method in timed} - {"pndm"} >= one_call - {"pndm"}
    assert set(alone) == one_call - {method.sampler for method in speed.METHODS}
    assert len(alone) == len(set(alone)) == 21


def test_bytes_of_known_plans():
    def passes(name, steps=10):
        return speed.bytes_moved(make_plan(name, speed.SCHEDULE, steps=steps, grid="uniform"), 1)

    assert passes("ddim") == 10 * 3  # state and output in, state out
    assert passes("ddpm") == 10 * 4  # and a noise
    # a conversion (3) each; sums of 2 inputs first and last, else of 3
    assert passes("dpmpp-2m") == 10 * 3 + 2 * 3 + 8 * 4


@pytest.mark.parametrize(
    "method", [m for m in speed.METHODS if SAMPLERS[m.sampler].stochastic == "no"], ids=lambda m: m.sampler
)
def test_both_sides_do_the_same_work(method):
    """As many network calls on each side, to one: what is compared is one method, on the settings of the table."""
    plan = make_plan(method.sampler, speed.SCHEDULE, steps=speed.STEPS, grid="linspace", **method.options)
    calls = len(speed._scheduler(method, torch.device("cpu")).timesteps)
    assert abs(calls - plan.nfe) <= 1 or method.sampler in CALLS_DIFFER
    model = EpsModel(lambda x, t: torch.zeros_like(x), speed.SCHEDULE)
    assert run_plan(plan, model, torch.ones(2, 3)).isfinite().all()


# diffusers counts calls as steps in its singlestep solver
CALLS_DIFFER = {"dpmpp-2s", "dpmpp-3s"}


def test_what_known_plans_cycle_over():
    def held(name, steps=10):
        return speed.held(speed._program(make_plan(name, speed.SCHEDULE, steps=steps, grid="uniform")))

    assert held("ddim") == (1, 2)  # an output and the state
    assert held("ddpm") == (1, 3)  # and a noise
    assert held("heun") == (2, 3)
    assert held("lms-4") == (4, 5)
    assert held("dpmpp-2m") == (1, 4)  # the state, two conversions and the output


@pytest.mark.parametrize("method", speed.methods(), ids=lambda m: m.sampler)
def test_the_null_network_repeats_no_output_that_is_alive(method):
    """Were two of them one tensor, the executor would take it for a network that writes over its output, and copy."""
    plan = make_plan(method.sampler, speed.SCHEDULE, steps=speed.STEPS, grid="linspace", **method.options)
    program = speed._program(plan)
    alive, registers = speed.held(program)
    assert program.registers - 1 <= registers <= program.registers  # but for one copy
    kept = any(getattr(step, "kept", False) for step in program.code)
    assert alive >= 1 + kept


@pytest.mark.parametrize(("buffers", "moved", "copied"), [(3, 240, 240), (5, 1000, 1008), (1, 1, 48)])
def test_copies_of_the_floor_move_what_a_plan_does_and_go_round(buffers, moved, copied):
    copies, total = speed._copies(torch.zeros(2, 3), buffers, moved)
    assert total == copied  # whole copies of 24 bytes, read and written
    with _Written() as written:
        copies()
    assert len(written.places) == copied // 48
    assert len(set(written.places)) == min(max(2, buffers), copied // 48)


class _Written(TorchDispatchMode):
    """Where copies go."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.places.append(args[0].data_ptr())
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_command_writes_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "SHAPES", ((2, 3),))
    monkeypatch.setattr(speed.end_to_end, "__defaults__", (("ddim",), (1,), "cpu", 0.0))
    small = PatchUNet(widths=(16,))
    monkeypatch.setattr(network, "PatchUNet", lambda: small)
    out = tmp_path / "speed"
    done = CliRunner().invoke(
        main, ["speed", "--samplers", "ddim,unipc-3,ddpm,eab-2", "--seconds", "0", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "UniPC" in done.output
    table = pd.read_csv(out / "table.csv")
    assert table["sampler"].tolist() == ["ddpm", "ddim", "unipc-3", "eab-2"]
    assert (table[["ours", "floor", "over_floor"]] > 0).all().all()
    assert (table[["theirs", "ratio"]] > 0).all(axis=1).tolist() == [True, True, True, False]
    assert table["theirs"].isna().tolist() == [False, False, False, True]
    assert table["one_call"].tolist() == [False, True, True, True]
    page = (out / "table.md").read_text()
    assert page.startswith("# Cost of a sampler's own arithmetic")
    assert "(mean of 3)" in page
    assert "3 one-call methods" in page
    assert "nan" not in page
    assert (out / "speed.png").stat().st_size > 1000
    assert pd.read_csv(out / "end_to_end.csv")["efficiency"].gt(0).all()
    assert json.loads((out / "provenance.json").read_text())["threads"] >= 1


def test_unknown_method_is_offered_the_closest():
    done = CliRunner().invoke(main, ["speed", "--samplers", "unipc3"])
    assert done.exit_code == 2
    assert "unknown method 'unipc3'; did you mean 'unipc-3'" in done.output
