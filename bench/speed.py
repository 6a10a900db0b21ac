"""Cost of a sampler's own arithmetic: per step against diffusers' scheduler of the same method and against the memory floor.

The network is a null one that returns prepared tensors, so what is timed is the update: Python, allocation and memory
traffic. Both sides run the same number of steps with the same threads in one process, in turn, and medians are compared,
because the clock of a shared machine drifts. Stochastic methods draw their noise from torch's generator on both sides, and ours
also as it is drawn by default, for each sample by itself.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from samplers import EpsModel, Plan, list_samplers, make_plan, run_plan, schedules
from samplers.execute import NoiseSource
from samplers.program import Call, Program, Sum

SHAPES = ((1, 4, 8, 8), (64, 3, 32, 32), (16, 4, 128, 128))
STEPS = 20
_BETAS = torch.linspace(1e-4, 0.02, 1000)
SCHEDULE = schedules.from_betas(_BETAS)


class Method(NamedTuple):
    """A sampler of ours and the scheduler of diffusers that implements the same method, "" where none does."""

    sampler: str
    options: dict[str, Any]
    scheduler: str
    settings: dict[str, Any]

    def plan(self) -> Plan:
        """Ours, as it is timed."""
        return make_plan(self.sampler, SCHEDULE, steps=STEPS, grid="linspace", **self.options)


def _multistep(**settings: Any) -> tuple[str, dict[str, Any]]:
    return "DPMSolverMultistepScheduler", settings


METHODS = (
    Method("ddpm", {}, "DDPMScheduler", {"clip_sample": False}),
    Method("ddim", {}, "DDIMScheduler", {"clip_sample": False}),
    Method("euler", {}, "EulerDiscreteScheduler", {}),
    Method("euler-ancestral", {}, "EulerAncestralDiscreteScheduler", {}),
    Method("heun", {}, "HeunDiscreteScheduler", {}),
    Method("dpm2", {}, "KDPM2DiscreteScheduler", {}),
    Method("dpm2-ancestral", {}, "KDPM2AncestralDiscreteScheduler", {}),
    Method("dpm-solver-2m", {}, *_multistep(algorithm_type="dpmsolver", final_sigmas_type="sigma_min")),
    Method("dpmpp-2m", {}, *_multistep()),
    Method("dpmpp-3m", {}, *_multistep(solver_order=3)),
    Method("dpmpp-2m-sde", {}, *_multistep(algorithm_type="sde-dpmsolver++")),
    Method("dpmpp-2s", {}, "DPMSolverSinglestepScheduler", {"solver_order": 2}),
    Method("dpmpp-3s", {}, "DPMSolverSinglestepScheduler", {"solver_order": 3}),
    Method("unipc-2", {}, "UniPCMultistepScheduler", {"solver_order": 2}),
    Method("unipc-3", {}, "UniPCMultistepScheduler", {"solver_order": 3}),
    Method(
        "eab-3", {"predict": "eps"}, "DEISMultistepScheduler", {"solver_order": 3}
    ),  # its polynomial is in log sigma
    Method("pndm", {}, "PNDMScheduler", {}),
    Method("lms-4", {}, "LMSDiscreteScheduler", {}),
    Method("ipndm-4", {}, "IPNDMScheduler", {}),
    Method("sa-solver", {}, "SASolverScheduler", {}),
)


@functools.cache
def methods() -> tuple[Method, ...]:
    """`METHODS`, and for the memory floor every other registered sampler that is deterministic with one call a step."""
    compared = {method.sampler for method in METHODS}
    others = (Method(s.name, {}, "", {}) for s in list_samplers() if not s.adaptive and s.name not in compared)
    return (*METHODS, *(method for method in others if _one_call(method.plan())))


def _one_call(plan: Plan) -> bool:
    return not plan.stochastic and plan.nfe <= plan.steps + 1


@dataclass(frozen=True)
class Row:
    """One method at one shape; times in microseconds for each network call, medians, with half the interquartile range.

    Attributes:
        sampler, scheduler: the two sides; scheduler is "" where diffusers has no such method.
        shape: of the state.
        ours, ours_spread: of `run_plan`, everything in it included.
        theirs, theirs_spread: of diffusers' loop over `step` and `scale_model_input`, `set_timesteps` not included; NaN where
            there is none.
        ratio: theirs / ours.
        seeded: of `run_plan` with the noise of a seed, which each sample has for itself; NaN where the plan is deterministic.
        seeded_ratio: theirs / seeded.
        floor: the bytes our plan must move over the bandwidth of a copy that cycles over as many buffers as the plan does, for
            as many bytes, and in turn with both sides.
        over_floor: ours / floor.
        registers: tensors of the state's size that the plan cycles over, besides the start.
        one_call: deterministic, with one network call a step.
    """

    sampler: str
    scheduler: str
    shape: str
    ours: float
    ours_spread: float
    theirs: float
    theirs_spread: float
    ratio: float
    seeded: float
    seeded_ratio: float
    floor: float
    over_floor: float
    registers: int
    one_call: bool


def measure(
    chosen: Sequence[Method],
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    device: str = "cpu",
    seconds: float = 1.0,
) -> Iterator[Row]:
    """Measure every method at every shape.

    Args:
        chosen: of `methods()`.
        shapes: of states.
        device: of torch.
        seconds: of timing for each method and shape, both sides together.
    """
    for shape in shapes:
        for method in chosen:
            yield _row(method, shape, torch.device(device), seconds)


def _row(method: Method, shape: tuple[int, ...], device: torch.device, seconds: float) -> Row:
    x_T = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    plan = method.plan()
    alive, registers = held(_program(plan))
    # no more outputs than are alive at a time, as a real network's allocator would give out the same memory again
    outputs = _cycle([torch.randn(shape).to(device) for _ in range(alive)])
    model = EpsModel(lambda x, t: next(outputs), SCHEDULE)
    generator = torch.Generator(device).manual_seed(0)

    def noise(k: int, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=device)

    @torch.no_grad()
    def theirs() -> float:
        scheduler = _scheduler(method, device)
        extra = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
        return _timed(device, lambda: _follow(scheduler, x_T, outputs, extra))

    def ours(draw: NoiseSource | None = noise) -> float:
        return _timed(device, lambda: run_plan(plan, model, x_T, noise_source=draw))

    moved = bytes_moved(plan, x_T.numel() * x_T.element_size())
    copies, copied = _copies(x_T, registers + 1, moved)
    timed = {"ours": ours, "copies": copies}
    if method.scheduler:
        timed["theirs"] = theirs
    if plan.stochastic:
        timed["seeded"] = partial(ours, None)
    times = dict(zip(timed, _alternate(list(timed.values()), seconds), strict=True))
    loop_floor = statistics.median(times["copies"]) * moved / copied / plan.nfe
    a, a_spread = _centre(times["ours"], plan.nfe)
    b, b_spread = math.nan, math.nan
    if method.scheduler:
        b, b_spread = _centre(times["theirs"], len(_scheduler(method, device).timesteps))
    seeded = _centre(times["seeded"], plan.nfe)[0] if plan.stochastic else math.nan
    return Row(
        method.sampler,
        method.scheduler,
        "x".join(map(str, shape)),
        *(a, a_spread, b, b_spread),
        b / a,
        seeded,
        b / seeded,
        loop_floor,
        a / loop_floor,
        registers,
        _one_call(plan),
    )


def _scheduler(method: Method, device: torch.device) -> Any:
    import diffusers

    told = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()  # it warns of each setting it changes
    try:
        scheduler = getattr(diffusers, method.scheduler)(
            **({} if method.scheduler == "IPNDMScheduler" else {"trained_betas": _BETAS.numpy()}), **method.settings
        )
        scheduler.set_timesteps(STEPS, device=device)
    finally:
        diffusers.utils.logging.set_verbosity(told)
    return scheduler


def _follow(scheduler: Any, x: Tensor, outputs: Iterator[Tensor], extra: dict[str, Any]) -> Tensor:
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        x = scheduler.step(next(outputs), t, x, **extra).prev_sample
    return x


def _cycle(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from tensors


def _timed(device: torch.device, run: Callable[[], object]) -> float:
    """Microseconds of one run; by CUDA events on a GPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)
    began = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - began)


def _alternate(runs: Sequence[Callable[[], float]], seconds: float) -> list[list[float]]:
    """Measure runs in turn, at least five times each after one that does not count."""
    for run in runs:
        run()
    values: list[list[float]] = [[] for _ in runs]
    began = time.perf_counter()
    while len(values[0]) < 5 or time.perf_counter() - began < seconds:
        for mine, run in zip(values, runs, strict=True):
            mine.append(run())
    return values


def _centre(values: Sequence[float], calls: int) -> tuple[float, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return middle / calls, (high - low) / 2 / calls


def bytes_moved(plan: Plan, state_bytes: int) -> int:
    """Bytes a plan must move on an epsilon-network: each sum reads its terms and writes its result, once.

    Args:
        plan: whose.
        state_bytes: of one state.
    """
    passes = 0
    for step in _program(plan).code:
        if isinstance(step, Sum):
            passes += len(step.terms) + 1
        elif step.dst >= 0:
            passes += 3  # a conversion to x0 reads two and writes one
    return passes * state_bytes


def held(program: Program) -> tuple[int, int]:
    """What a plan cycles over: network outputs that are alive at once, and tensors of the state's size besides the start.

    Not counted is the executor's copy of one output, which exists during one call of the whole loop.
    """
    outputs, noises = set[int](), set[int]()
    most_outputs = most = 0
    for step in program.code:
        if isinstance(step, Call):
            most_outputs, most = max(most_outputs, len(outputs) + 1), max(most, len(outputs) + len(noises) + 1)
            outputs |= {step.dst} if step.dst < 0 else set()
        else:
            noises |= {place for place, _ in step.draws}
            most = max(most, len(outputs) + len(noises))
        outputs -= set(step.ends)
        noises -= set(step.ends)
    return most_outputs, program.buffers + most


def _program(plan: Plan) -> Program:
    return plan.program(tuple(call.kind == "eps" for call in plan.calls))


def _copies(like: Tensor, buffers: int, moved: int) -> tuple[Callable[[], float], int]:
    """Timed copies that go round over a number of buffers, about `moved` bytes in all, and how many those are.

    Read and write both count. A single round would be over before the caches hold what a plan's twenty steps find in them.
    """
    ring = [torch.empty_like(like).fill_(k) for k in range(max(2, buffers))]
    each = 2 * like.numel() * like.element_size()
    count = max(1, round(moved / each))

    def copy() -> None:
        for k in range(count):
            ring[(k + 1) % len(ring)].copy_(ring[k % len(ring)])

    return lambda: _timed(like.device, copy), each * count


@dataclass(frozen=True)
class EndToEnd:
    """Images/s of a network through a sampler over images/s of the bare network for each call.

    Attributes:
        sampler, batch: what ran.
        compile: "" or "graph".
        bare: milliseconds of one bare call, median.
        sampled: milliseconds of a run for each call, median.
        efficiency: bare / sampled.
    """

    sampler: str
    batch: int
    compile: str
    bare: float
    sampled: float
    efficiency: float


@torch.no_grad()
def end_to_end(
    samplers: Sequence[str] = ("ddim", "dpmpp-2m", "unipc-3"),
    batches: Sequence[int] | None = None,
    device: str = "cpu",
    seconds: float = 3.0,
) -> Iterator[EndToEnd]:
    """How much of a U-Net's speed is left when a sampler drives it, ten steps, 28 x 28 pixels.

    Args:
        samplers: registered names.
        batches: batch sizes, by default 1 and 256 on CUDA, where 1 runs also as a CUDA graph, and 1 and 16 elsewhere.
        device: of torch.
        seconds: of timing for each cell.
    """
    from distill.network import PatchUNet

    network = PatchUNet()
    shape = network.shape
    place = torch.device(device)
    network = network.to(place).eval()
    model = EpsModel(network, SCHEDULE)
    for batch in batches or ((1, 256) if place.type == "cuda" else (1, 16)):
        x = torch.randn((batch, *shape), device=place)
        t = torch.full((batch,), 500.0, device=place)
        for name in samplers:
            plan = make_plan(name, SCHEDULE, steps=10)
            for how in (None, "graph") if place.type == "cuda" and batch == 1 else (None,):
                bare_run = _graphed(network, x, t) if how else lambda x=x, t=t: [network(x, t) for _ in range(10)]
                runs = [bare_run, lambda plan=plan, x=x, how=how: run_plan(plan, model, x, compile=how)]
                bare, sampled = _alternate([partial(_timed, place, run) for run in runs], seconds)
                one = statistics.median(bare) / 10 / 1e3
                each = statistics.median(sampled) / plan.nfe / 1e3
                yield EndToEnd(name, batch, how or "", one, each, one / each)


def _graphed(network: nn.Module, x: Tensor, t: Tensor) -> Callable[[], None]:
    """Ten bare calls as one CUDA graph, the fair rival of a graph of the whole loop."""
    side = torch.cuda.Stream(x.device)
    side.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(side):
        network(x, t)
    torch.cuda.current_stream(x.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            network(x, t)
    return graph.replay


def as_dict(row: Row | EndToEnd) -> dict[str, Any]:
    """A row with numbers rounded to what a timing can carry."""
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(row).items()}
