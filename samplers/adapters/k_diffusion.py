"""Between k-diffusion and here: its denoisers as epsilon-models, and every sampler as one of its `sample_*` functions.

k-diffusion, and with it ComfyUI and A1111, calls a sampler as `sample(model, x, sigmas, extra_args, callback, disable)`, where
`model(x, sigma, **extra_args)` is the clean data behind `x = x0 + sigma eps`. That is the schedule `edm`, whose time is sigma.
ComfyUI's flow models keep the form with `x = (1 - sigma) x0 + sigma eps`, the schedule `flow`, whose time is sigma too. So a
sampler's function builds its plan on the sigmas that it is given, and nothing has to be converted. What a sampler computes does
not depend on the schedule's own time, with three exceptions, which take sigma for it here: `deis-k` with `variant="tab"`, `pndm`,
and `euler` with `variable="t"`.

Nothing of k-diffusion is imported here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from samplers import schedules
from samplers.errors import unknown
from samplers.execute import NoiseSource, Progress, run_plan
from samplers.grid import Grid
from samplers.grid_points import vector
from samplers.model import EpsModel
from samplers.plan import Plan
from samplers.program import START, Evaluate
from samplers.registry import Sampler, get_sampler, registered
from samplers.schedule import Schedule

Denoiser = Callable[..., Tensor]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]

# What each function of k-diffusion is called here, with its defaults where they are others.
K_DIFFUSION: dict[str, tuple[str, dict[str, Any]]] = {
    "sample_euler": ("euler", {}),
    "sample_euler_ancestral": ("euler-ancestral", {}),
    "sample_heun": ("edm", {}),
    "sample_dpm_2": ("dpm2", {}),
    "sample_dpm_2_ancestral": ("dpm2-ancestral", {}),
    "sample_lms": ("lms-4", {}),
    "sample_dpmpp_2s_ancestral": ("dpmpp-2s", {"eta": 1.0}),
    "sample_dpmpp_sde": ("dpmpp-sde", {}),
    "sample_dpmpp_2m": ("dpmpp-2m", {"lower_order_final": False}),
    "sample_dpmpp_2m_sde": ("dpmpp-2m-sde", {"lower_order_final": False}),
    "sample_dpmpp_3m_sde": ("dpmpp-3m-sde", {"lower_order_final": False}),
}
SCHEDULES = ("edm", "flow")
_DEPTH = 4  # of wrappers around a model
_ROOM = (1e-6, 2.0)  # beyond the sigmas: churn asks a denoiser above the first one, large eta below the last


def sampler_function(name: str, *, schedule: str | None = None, **options: Any) -> Callable[..., Tensor]:
    """A sampler as a function of k-diffusion's form, for k-diffusion itself, ComfyUI and A1111.

    The function is `(model, x, sigmas, extra_args=None, callback=None, disable=None, *, noise_sampler=None, **options)`:

    - model: `model(x, sigma, **extra_args)` gives the denoised x; sigma is (B,), of x's dtype.
    - x: (B, ...) the start, `sigmas[0]` times noise on top of the data.
    - sigmas: (N + 1,) decreasing, the last may be 0; fewer than two leave x as it is.
    - callback: told once a step, before the step is made, with a dict of `x`, `i`, `sigma`, `sigma_hat` and `denoised`; `x` is a
      copy, so keeping it is safe and writing to it has no effect.
    - disable: of the progress bar of tqdm, where that is installed; None: shown on a terminal only.
    - noise_sampler: `(sigma, sigma_next) -> Tensor` standard normal, such as a Brownian tree, which is asked for the stretches
      of a step one after the other. None is `torch.randn_like(x)` for each noise, in order. Noise that raises the level (churn,
      restarts) is always fresh. A sampler without noise takes none.
    - options: of the sampler, in place of those given here. Its signature names them, which is how A1111 finds `eta`.

    NaN passes through, as in k-diffusion; hosts look for it themselves.

    Args:
        name: a registered sampler; or a function of k-diffusion, such as "sample_dpmpp_2s_ancestral", for the same sampler with
            k-diffusion's defaults (eta = 1 here, no lowering of the last orders).
        schedule: "edm" for `x = x0 + sigma eps`, "flow" for `x = (1 - sigma) x0 + sigma eps`. None: "flow" where the model is
            one of ComfyUI's flow models (`model_sampling` of kind CONST), else "edm".
        options: the sampler's own.

    Raises:
        ValueError: an unknown name, option or schedule.
        TypeError: an option that should be a number and is not.
    """
    if name not in K_DIFFUSION and name not in registered():
        raise unknown("sampler", name, [*registered(), *K_DIFFUSION])
    _check_schedule(schedule)
    sampler, preset = K_DIFFUSION.get(name, (name, {}))
    entry, chosen = get_sampler(sampler), {**preset, **options}
    entry.check_options(chosen)

    def sample(
        model: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        disable: bool | None = None,
        *,
        noise_sampler: NoiseSampler | None = None,
        **more: Any,
    ) -> Tensor:
        settings, told = {**chosen, **more}, (extra_args or {}, callback, disable)
        return _sample(entry, settings, schedule, model, x, sigmas, *told, noise_sampler)

    sample.__name__ = sample.__qualname__ = name if name in K_DIFFUSION else f"sample_{_identifier(name)}"
    sample.__doc__ = (
        f"Sampler {entry.name!r} ({entry.reference}); see `samplers.adapters.k_diffusion.sampler_function`."
    )
    sample.__signature__ = _signature(sample, entry, chosen)  # type: ignore[attr-defined]
    return sample


def _sample(
    entry: Sampler,
    options: dict[str, Any],
    schedule: str | None,
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any],
    callback: Callable[[dict[str, Any]], Any] | None,
    disable: bool | None,
    noise_sampler: NoiseSampler | None,
) -> Tensor:
    """What a sampler's function does; its arguments are those of `sampler_function` and of the function."""
    entry.check_options(options)
    if noise_sampler is not None and entry.stochastic == "no":
        raise ValueError(f"sampler {entry.name!r} draws no noise and takes no noise_sampler")
    if len(sigmas) < 2:
        return x
    sigmas = torch.as_tensor(sigmas)
    grid = _grid(sigmas, schedule or _kind_of(model))
    with _progress_bar(grid.steps, disable) as advance:
        return _Host(_Hosted(model, sigmas, callback), grid, extra_args, advance).run(entry, x, noise_sampler, options)


def register(module: Any, names: Sequence[str] | None = None, prefix: str = "fewstep_") -> list[str]:
    """Put samplers into a module of `sample_*` functions, such as `k_diffusion.sampling` or `comfy.k_diffusion.sampling`.

    Args:
        module: gets `sample_{prefix}dpmpp_2m` and so on.
        names: registered samplers; None: all.
        prefix: keeps them apart from the module's own.

    Returns:
        What hosts call them: "fewstep_dpmpp_2m", ...
    """
    added = []
    for name in registered() if names is None else names:
        function = sampler_function(name)
        added.append(prefix + function.__name__.removeprefix("sample_"))
        setattr(module, f"sample_{added[-1]}", function)
    return added


def eps_model_from_denoiser(
    denoiser: Denoiser,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    *,
    schedule: str | None = None,
) -> EpsModel:
    """A denoiser of k-diffusion as an epsilon-model.

    Args:
        denoiser: `denoiser(x, sigma, **cond) -> x0` for `x = x0 + sigma eps`, with sigma (B,), such as k-diffusion's `Denoiser`
            and `CompVisDenoiser`. Further inputs go through `cond`.
        sigma_min, sigma_max: of its training; None: the denoiser's own, which those of discrete models have.
        schedule: as in `sampler_function`; a flow has no range to give.

    Returns:
        A model that predicts x0 on `edm(sigma_min, sigma_max)` or on `flow()`; its states are those of the denoiser.

    Raises:
        TypeError: a denoiser that cannot be called.
        ValueError: a range that is neither given nor known, or given for a flow; an unknown schedule.
    """
    if not callable(denoiser):
        raise TypeError(f"denoiser must be callable as denoiser(x, sigma, **cond), got {type(denoiser).__name__}")
    _check_schedule(schedule)
    given = {"sigma_min": sigma_min, "sigma_max": sigma_max}
    if (schedule or _kind_of(denoiser)) == "flow":
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} goes with schedule 'edm'; a flow's sigma ends at 1, got {value}")
        return EpsModel(denoiser, schedules.flow(), "x0")
    for name, value in given.items():
        own = next((getattr(part, name) for part in _parts(denoiser) if getattr(part, name, None) is not None), None)
        if value is None and own is None:
            raise ValueError(f"{name} must be given: {type(denoiser).__name__} has none of its own")
        given[name] = float(own if value is None else value)  # type: ignore[arg-type]
    return EpsModel(denoiser, schedules.edm(**given), "x0")  # type: ignore[arg-type]


def noise_spans(plan: Plan) -> list[tuple[float, float]]:
    """For each noise of a plan the times from and to which it acts, in order of first use.

    Within a step the first noise starts at the state's own time, and a further one where the noise before it ended, so that the
    noises of a step are increments of one path over stretches that do not overlap.
    """
    asked = {step.src: step.t for step in plan.instructions if isinstance(step, Evaluate)}
    at, spans = {START: plan.times[0]}, list[tuple[float, float]]()
    outputs: set[str] = set()
    for step in plan.instructions:
        if isinstance(step, Evaluate):
            at[step.dst] = step.t
            outputs.add(step.dst)
            continue
        names = [name for name, _ in step.terms]
        known = [name for name in names if name in at]
        states = [name for name in known if name not in outputs]  # states, and ends of earlier noises
        start = min(at[name] for name in states or known)
        end = plan.times[step.node] if step.node is not None else asked.get(step.dst)
        at[step.dst] = min(at[name] for name in known) if end is None else end
        for name in names:
            if name not in at:
                spans.append((start, at[step.dst]))
                at[name] = start = at[step.dst]
    return spans


class _Hosted:
    """A host's denoiser as a network, which tells the host at the first call of every step.

    Attributes:
        step: steps done; the caller counts.
    """

    def __init__(self, denoiser: Denoiser, sigmas: Tensor, callback: Callable[[dict[str, Any]], Any] | None) -> None:
        self.denoiser, self.sigmas, self.callback = denoiser, sigmas, callback
        self.step = self.told = 0

    def __call__(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        sigma = sigma.to(x.dtype)  # as theirs, or `x * c_in(sigma)` would not be of the network's dtype
        denoised = self.denoiser(x, sigma, **cond)
        if self.callback is not None and self.told == self.step:
            told = {"x": x.clone(), "i": self.step, "sigma": self.sigmas[self.step], "sigma_hat": sigma[0]}
            self.callback({**told, "denoised": denoised})
            self.told += 1
        return denoised


class _Host:
    """One run of a sampler for a host: its network, the nodes, what the network gets besides, and who counts the steps."""

    def __init__(self, network: _Hosted, grid: Grid, cond: Mapping[str, Any], advance: Callable[[], Any]) -> None:
        self.network, self.grid, self.cond, self.advance = network, grid, cond, advance
        self.model = EpsModel(network, grid.schedule, "x0")

    def run(self, entry: Sampler, x: Tensor, noise_sampler: NoiseSampler | None, options: Mapping[str, Any]) -> Tensor:
        if entry.integrate is not None:
            run = {"nfe": None, "callback": self.count, "cond": self.cond}
            return entry.integrate(self.model, self.grid, x, **run, **options)
        plan = entry.plan(self.grid, **options)
        draw = self.draw(plan, noise_sampler)
        return run_plan(plan, self.model, x, noise_source=draw, callback=self.count, cond=self.cond, check=False)

    def count(self, told: Progress) -> None:
        self.network.step = told.step
        self.advance()

    def draw(self, plan: Plan, noise_sampler: NoiseSampler | None) -> NoiseSource:
        """The noise source that asks a noise sampler, with the host's own sigmas where a stretch ends at them."""
        spans, sigmas = noise_spans(plan), self.network.sigmas
        own = dict(zip(sigmas.tolist(), sigmas, strict=True))

        def noise(k: int, like: Tensor) -> Tensor:
            start, end = spans[k]
            if noise_sampler is None or end > start:
                return torch.randn_like(like)
            return noise_sampler(*(own[t] if t in own else sigmas.new_tensor(t) for t in (start, end))).to(like)

        return noise


def _grid(sigmas: Tensor, kind: str) -> Grid:
    """The host's sigmas as nodes."""
    values = vector(sigmas, "sigmas")
    if not (values[:-1] > 0).all() or values[-1] < 0:
        raise ValueError(f"sigmas must be positive (only the last may be 0), got {values.tolist()}")
    if kind == "flow" and values.max() > 1:
        raise ValueError(f"sigmas of a flow lie in [0, 1], got {values.max():g}; other models take schedule='edm'")
    schedule: Schedule = schedules.flow()
    if kind == "edm":
        schedule = schedules.edm(float(values[values > 0].min()) * _ROOM[0], float(values.max()) * _ROOM[1])
    return Grid(schedule, values)


def _check_schedule(schedule: str | None) -> None:
    if schedule is not None and schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)


def _parts(model: Any) -> Iterator[Any]:
    """A model, the models that it wraps, and how ComfyUI says that they are sampled."""
    for _ in range(_DEPTH):
        yield model
        sampling = getattr(model, "model_sampling", None)
        if sampling is not None:
            yield sampling
        model = getattr(model, "inner_model", None)
        if model is None:
            return


def _kind_of(model: Any) -> str:
    return "flow" if any(c.__name__ == "CONST" for part in _parts(model) for c in type(part).__mro__) else "edm"


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _signature(sample: Callable[..., Tensor], entry: Sampler, chosen: Mapping[str, Any]) -> inspect.Signature:
    """With the sampler's options by name, and noise_sampler where there is noise."""
    signature = inspect.signature(sample)
    kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    if entry.stochastic == "no":
        kept = [p for p in kept if p.name != "noise_sampler"]
    options = {**entry.options, **chosen}
    kept += [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=value) for n, value in options.items()]
    return signature.replace(parameters=kept)


@contextmanager
def _progress_bar(total: int, disable: bool | None) -> Iterator[Callable[[], Any]]:
    """What to call after every step; tqdm's bar, where there is tqdm."""
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=total, disable=disable) as bar:
        yield bar.update
