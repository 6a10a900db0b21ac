"""The compiled loop and the CUDA graph against the eager executor."""

from __future__ import annotations

import math

import pytest
import torch

from samplers import EpsModel, make_plan, run_plan, sample, schedules
from samplers.execute import Loop, noise_of

VP = schedules.vp_linear()


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def refuse(k, like):
    raise AssertionError("asked for noise")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpm", "heun", "dpmpp-2m", "dpm-solver-3s"])
@pytest.mark.parametrize("predicts", ["eps", "v"])
def test_compiled_loop_gives_the_eager_result(name, predicts):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 8))
    # many small steps: a few long ones multiply the rounding, which differs
    plan, x_T = make_plan(name, VP, steps=6, grid="logsnr"), normal(4, 8, dtype=torch.float32)

    class Conditional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t, shift):
            return self.net(x + shift * t[:, None])

    model = EpsModel(Conditional(), VP, predicts)
    for shift in (0.1, 0.2):  # the second run uses what the first one compiled, on other numbers
        cond = {"shift": torch.tensor(shift)}
        eager = run_plan(plan, model, x_T, cond=cond, seed=2)
        torch.testing.assert_close(
            run_plan(plan, model, x_T, cond=cond, seed=2, compile="loop"), eager, rtol=1e-5, atol=1e-5
        )
    assert len(model.compiled) == 1


def test_bad_compile(exact):
    plan, x_T = make_plan("ddim", VP, steps=2), normal(2, 2)
    with pytest.raises(ValueError, match="unknown compile 'grap'; did you mean 'graph'"):
        run_plan(plan, exact(VP), x_T, compile="grap")
    with pytest.raises(ValueError, match="compile='graph' needs x_T on a CUDA device, got cpu"):
        run_plan(plan, exact(VP), x_T, compile="graph")
    with pytest.raises(ValueError, match="compile='loop' runs the loop as a whole: it has no callback"):
        run_plan(plan, exact(VP), x_T, compile="loop", callback=print)
    for option, value in (("compile", "loop"), ("check", False), ("noise_source", refuse)):
        with pytest.raises(ValueError, match=f"'rk45' chooses its steps while it samples: {option} must be"):
            sample(exact(VP), "rk45", x_T=x_T, **{option: value})


@pytest.mark.slow
def test_each_compiled_loop_counts_for_itself():
    model = EpsModel(lambda x, t: 0.3 * x, VP)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for steps in (1, 2, 3, 4):
            plan, x_T = make_plan("ddim", VP, steps=steps), normal(2, 2)
            torch.testing.assert_close(run_plan(plan, model, x_T, compile="loop"), run_plan(plan, model, x_T))


def test_indices_are_on_the_device_of_the_states_before_the_loop():
    assert noise_of(None, 0, None, 4, "meta")._indices.device.type == "meta"
    assert noise_of(None, 0, torch.arange(4), 4, "meta")._indices.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["ddpm", "heun", "dpmpp-2m"])
@pytest.mark.parametrize("seeded", [False, True])
def test_on_a_gpu_nothing_synchronises_and_a_graph_gives_the_eager_result(name, seeded):
    def net(x, t, shift):
        return 0.1 * x * t[:, None, None, None] + shift

    model, plan = EpsModel(net, VP), make_plan(name, VP, steps=5)
    x_T = normal(4, 3, 8, 8, dtype=torch.float32).cuda()
    source = None if seeded else lambda k, like: torch.full_like(like, 0.1 * k)
    draw = noise_of(source, 3, torch.arange(4), len(x_T), x_T.device)  # of indices on the host
    loop, cond = Loop.of(plan, model, x_T, draw), {"shift": torch.tensor(0.1).cuda()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            loop.run(x_T, draw, cond)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for start, shift in ((x_T, torch.tensor(0.1)), (-x_T, torch.tensor(0.2)), (x_T, torch.tensor(0.3).cuda())):
        # memory that the graph reads must be its own: what is free is overwritten here
        torch.cuda.empty_cache()
        rubbish = [torch.full((64,), math.nan, device="cuda") for _ in range(300)]
        del rubbish
        options = {"noise_source": source, "seed": 3, "cond": {"shift": shift}}
        graphed = run_plan(plan, model, start, compile="graph", **options)
        torch.testing.assert_close(graphed, run_plan(plan, model, start, **options), rtol=1e-5, atol=1e-5)
