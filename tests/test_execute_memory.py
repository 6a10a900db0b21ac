"""What the executor holds and makes: as many tensors as the plan has registers, none of them after the first step."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from samplers import EpsModel, guidance, list_samplers, make_plan, run_plan, schedules

VP = schedules.vp_linear()
every_sampler = pytest.mark.parametrize("name", [s.name for s in list_samplers() if not s.adaptive])
every_prediction = pytest.mark.parametrize("predicts", ["eps", "v", "x0", "edm"])
NOISE = torch.randn(64, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
# that of the seed, which writes into buffers, and one that gives tensors of its own
every_source = pytest.mark.parametrize("source", [None, lambda k, like: NOISE.mul(1.0)], ids=["seed", "own"])


def start():
    return torch.randn(64, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Watching(TorchDispatchMode):
    """Notes the state-sized tensors that are made and exist, in each step, and the copies of a number to the host."""

    def __init__(self, size):
        super().__init__()
        self.size, self.step, self.in_network = size, 1, False
        self.alive, self.most, self.made, self.synchronised = [], 0, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.synchronised += function is torch.ops.aten._local_scalar_dense.default
        if isinstance(result, torch.Tensor) and result.numel() == self.size:
            if result.untyped_storage().data_ptr() not in self._storages() and not self.in_network:
                self.made.setdefault(self.step, []).append(str(function))
            self.alive.append(weakref.ref(result))
            self.most = max(self.most, len(self._storages()))
        return result

    def _storages(self):
        self.alive = [reference for reference in self.alive if reference() is not None]
        there = [tensor for reference in self.alive if (tensor := reference()) is not None]
        return {tensor.untyped_storage().data_ptr() for tensor in there}

    def network(self, x, t):
        """A network whose own tensors are not ours."""
        self.in_network = True
        out = 0.3 * x
        self.in_network = False
        return out

    def told(self, progress):
        self.step = progress.step + 1


def watched(plan, predicts, source=None, callback=False):
    x_T = start()
    with Watching(x_T.numel()) as watching:
        model = EpsModel(watching.network, VP, predicts)
        told = watching.told if callback else None
        run_plan(plan, model, x_T, check=False, noise_source=source, callback=told)
    return watching


@every_sampler
@every_prediction
@every_source
def test_memory_is_the_plans_registers_and_nothing_waits_for_the_device(name, predicts, source):
    plan = make_plan(name, VP, steps=8)
    raw = tuple(call.kind == predicts for call in plan.calls)
    watching = watched(plan, predicts, source)
    scaled = predicts == "edm"  # what such a network is given is not the state
    assert watching.most == plan.program(raw, source is None).registers + scaled
    assert watching.synchronised == 0


class Bytes(TorchDispatchMode):
    """The most bytes of tensors that were made under it and exist at one time, whatever their size and dtype."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.alive = [reference for reference in (*self.alive, weakref.ref(result)) if reference() is not None]
            there = [tensor.untyped_storage() for reference in self.alive if (tensor := reference()) is not None]
            self.most = max(self.most, sum({storage.data_ptr(): storage.nbytes() for storage in there}.values()))
        return result


@every_sampler
@pytest.mark.parametrize("predicts", ["eps", "v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_the_plans_registers_and_little_more(monkeypatch, name, predicts, dtype):
    """Of any dtype, with what a seed's noise is made of, float64 and integers of a part of the state that stays as it is."""
    monkeypatch.setattr("samplers.noise._AT_ONCE", 1 << 9)
    plan, x_T = make_plan(name, VP, steps=6), start().to(dtype)
    model = EpsModel(lambda x, t: 0.3 * x, VP, predicts)
    with Bytes() as watching:
        run_plan(plan, model, x_T, check=False)
    registers = plan.program(tuple(call.kind == predicts for call in plan.calls), True).registers
    assert watching.most <= (registers + 0.5) * x_T.numel() * x_T.element_size()


def test_noise_in_another_layout_takes_a_part_of_the_state(monkeypatch):
    monkeypatch.setattr("samplers.noise._AT_ONCE", 1 << 9)
    x_T = torch.zeros(64, 3, 10, 10).contiguous(memory_format=torch.channels_last)
    with Bytes() as watching:
        run_plan(make_plan("ddpm", VP, steps=3), EpsModel(lambda x, t: 0.3 * x, VP), x_T, check=False)
    assert watching.most <= 3.5 * x_T.numel() * x_T.element_size()  # the state, the output and the noise


@every_sampler
@every_prediction
def test_nothing_is_made_after_the_first_step(name, predicts):
    """Every buffer, the copy of a first output, the scaled input of an EDM network and the noise of a seed."""
    plan = make_plan(name, VP, steps=8)
    made = watched(plan, predicts, callback=True).made
    program = plan.program(tuple(call.kind == predicts for call in plan.calls), filled=True)
    first_output = any(getattr(step, "kept", False) for step in program.code)
    assert {step: len(what) for step, what in made.items()} == {1: program.buffers + (predicts == "edm") + first_output}


@every_sampler
@pytest.mark.parametrize(("predicts", "per_output"), [("eps", 0), ("v", 1)])
def test_memory_does_not_grow_with_steps(monkeypatch, name, predicts, per_output):
    """Buffers the executor makes, and outputs it keeps alive while the network runs, are constant in the steps."""
    empty_like, alive, counts = torch.empty_like, [], {}

    def net(x, t):
        peak[0] = max(peak[0], sum(output() is not None for output in alive))
        out = 0.3 * x
        alive.append(weakref.ref(out))
        return out

    for steps in (10, 50):  # of enough steps for the whole history of every multistep method
        made, peak = [], [0]
        monkeypatch.setattr(torch, "empty_like", lambda like, made=made: made.append(1) or empty_like(like))
        run_plan(make_plan(name, VP, steps=steps), EpsModel(net, VP, predicts), start()[:2])
        counts[steps] = (len(made), peak[0])
    assert counts[10] == counts[50]
    if name == "ddim":
        assert counts[10] == (1 + per_output, 0)


def test_registers_of_known_methods():
    def registers(name, raw, **options):
        plan = make_plan(name, VP, steps=20, **options)
        return plan.program((raw,) * plan.nfe).registers

    assert registers("ddim", True) == 2  # the state and the output
    assert registers("ddim", False) == 3  # and its conversion
    assert registers("ddpm", True) == 3  # and the noise
    assert registers("heun", True) == 4  # a second output and, until it is there, a copy of the first
    assert registers("heun", False) == 4  # no copy, but two conversions beside the state and an output
    assert registers("dpmpp-2m", True) == 4  # the output before, of which the first is copied
    assert registers("dpmpp-2m", False) == 4
    assert registers("lms-4", True) == 5  # the copy is let go before there are four outputs


@pytest.mark.parametrize("given", [lambda x, t: x, lambda x, t: x[:], lambda x, t: x.mul_(0.5)])
def test_an_edm_network_may_return_what_it_is_given(given):
    """What it is given lies where the next call's lies: of two calls at one point, each keeps its own output."""

    def net(x, t, by):
        return given(x, t) if by == 1.0 else by * x

    def apart(x, t, **cond):
        return net(x.clone(), t, **cond).clone()

    plan, x_T = make_plan("dpmpp-2m", VP, steps=4), start()[:3]
    got, expected = (
        run_plan(
            plan,
            guidance.classifier_free(EpsModel(one, VP, "edm"), 2.0, {"by": 0.25}, batched=False),
            x_T,
            cond={"by": 1.0},
        )
        for one in (net, apart)
    )
    assert torch.equal(got, expected)


def test_an_edm_network_of_changing_batches_gets_what_it_asks_for():
    """Guidance in an interval doubles the batch in some steps only."""

    def net(x, t, by):
        return torch.tanh(x) * torch.as_tensor(by).view(-1, *[1] * (x.ndim - 1))

    x_T, cond = start()[:3].float(), {"by": torch.full((3,), 0.5)}
    for way in (True, False):
        model = guidance.classifier_free(EpsModel(net, VP, "edm"), 2.0, {"by": 0.1}, interval=(0.2, 2.0), batched=way)
        got = run_plan(make_plan("heun", VP, steps=6), model, x_T, cond=cond)
        each = [
            run_plan(make_plan("heun", VP, steps=6), model, x_T[i : i + 1], cond={"by": cond["by"][i : i + 1]})
            for i in range(3)
        ]
        torch.testing.assert_close(got, torch.cat(each), rtol=1e-5, atol=1e-5)
