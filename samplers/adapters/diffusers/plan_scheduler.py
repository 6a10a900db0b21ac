"""Every sampler of the registry as a scheduler of diffusers' pipelines.

A plan is a list of network calls with sums between them. A pipeline owns the loop and calls the network itself, so each call of
the plan is one entry of `timesteps`, and `step` takes a call's output and runs the sums up to the next call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput, logging
from torch import Tensor

from samplers.adapters.diffusers import keys
from samplers.adapters.diffusers.nodes import grid_at, grid_of, grid_through, part
from samplers.adapters.diffusers.noising import Noising
from samplers.adapters.diffusers.states import (
    Generators,
    evaluated,
    from_generator,
    halves_of,
    wide,
)
from samplers.adapters.diffusers.timeline import Order, Planner, Timeline, as_timesteps, number, place
from samplers.adapters.diffusers.training import training_of
from samplers.adapters.variance import scale_of
from samplers.execute import NoiseSource, draw_noise
from samplers.grid import Nodes
from samplers.plan import Plan
from samplers.stepwise import Stepwise

logger = logging.get_logger(f"diffusers.{__name__}")  # under diffusers' own, whose verbosity is the users' to set


@dataclass
class PlanSchedulerOutput(BaseOutput):
    """What `step` returns.

    Attributes:
        prev_sample: (B, ...) the state of the next network call; after the last one the sample.
        pred_original_sample: (B, ...) the clean data that the network's output stands for, at this call.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class PlanScheduler(Noising, SchedulerMixin, ConfigMixin):
    """A scheduler for any diffusers pipeline, which samples with any sampler that has a plan.

    Use `PlanScheduler.from_config(pipe.scheduler.config, sampler="unipc-3")`. States are in x coordinates, `alpha x0 + sigma
    eps`, whatever the sampler; what `sample()` gives on the network's epsilon-model, this gives in a pipeline.

    Args:
        sampler: a registered name with a plan, see `samplers.list_samplers()`.
        grid: where steps begin and end: a grid's name; None is the sampler's recommended grid, as in `sample()`; "config" is what
            the config's other keys describe (`timestep_spacing`, `steps_offset`, `use_karras_sigmas`, `final_sigmas_type`, ...).
            On a flow the config's shift moves the nodes of every grid.
        final: "t_min", "zero" or "denoise", see `grids.make_grid`; None is the grid's own.
        afs: analytical first step; needs a pipeline that calls `scale_model_input`.
        options: the sampler's own, such as `{"eta": 0.5}`; `eta` of a pipeline's call reaches diffusers' DDIM alone.
        config: keys of diffusers' schedulers: how the network was trained. None of them is DDPM's: 1000 steps, linear betas.

    Raises:
        ValueError, TypeError: an unknown sampler, option, grid or key; an error-controlled sampler, which has no plan; a noise
            schedule, prediction or key that cannot be honoured.
    """

    _compatibles = [entry.name for entry in KarrasDiffusionSchedulers]  # noqa: RUF012  the form diffusers reads
    ignore_for_config = ["config"]  # noqa: RUF012  whose keys are registered one by one

    @register_to_config
    def __init__(
        self,
        sampler: str = keys.DEFAULT_SAMPLER,
        grid: str | None = None,
        final: str | None = None,
        afs: bool = False,
        options: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> None:
        reports, options = keys.check_keys(config, sampler), dict(options or {})
        self._entry = keys.with_plan(sampler)
        self._entry.check_options(options)
        keys.check_own(grid, final, afs)
        self.register_to_config(options=options, **keys.with_defaults(config))
        self._training = training_of(self.config)
        self._set_tables()
        chosen = keys.chosen_spacing(self.config)
        if chosen and grid is None:
            reports.append(
                f"{chosen} of the scheduler's config is not used: the grid is the one recommended for {sampler!r}; "
                f"grid={keys.CONFIG!r} keeps the config's"
            )
        for report in reports:
            logger.warning(report)
        self._timeline: Timeline | None = None
        self._places: list[int] = []  # where a pipeline's steps begin
        self._walk: Stepwise | None = None
        self._first = 0  # the place of the walk's first call
        self._moved = False  # whether scale_model_input has moved the state to it, where it must
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self.num_inference_steps: int | None = None
        self.timesteps = as_timesteps(self._training, self._trained_times)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler for the network that another scheduler's config describes.

        Args:
            config: `scheduler.config` of any diffusers scheduler, or of a PlanScheduler.
            return_unused_kwargs: return `(scheduler, {})`, as diffusers' loaders ask for.
            kwargs: `sampler`, `grid`, `final`, `afs`; options of the sampler; keys of a scheduler's config, which override the
                config's. Keys that say where nodes lie (`timestep_spacing="trailing"`, `use_karras_sigmas=True`) mean
                `grid="config"`. Options of another sampler than the config's are not taken over.

        Raises:
            TypeError: config is not a mapping.
            ValueError: see `PlanScheduler`; also a keyword that is neither an option nor a key.
        """
        if not isinstance(config, Mapping):
            raise TypeError(
                f"config must be a mapping such as pipe.scheduler.config, got {type(config).__name__}; a folder is read by "
                "PlanScheduler.from_pretrained(folder)"
            )
        own, found = keys.settled(config, kwargs)
        scheduler = cls(**own, **found)
        if "_class_name" in config:  # a saved one, whose version of diffusers is kept too, as by theirs
            saved = {key: config[key] for key in ("_class_name", "_diffusers_version") if key in config}
            scheduler.register_to_config(**{**saved, "_class_name": cls.__name__})
        return (scheduler, {}) if return_unused_kwargs else scheduler

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        return [cls, *super()._get_compatibles()]

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    @property
    def order(self) -> int:
        """Network calls of a full step: a pipeline's step i begins at `timesteps[i * order]`, see `Order`."""
        return Order(self._entry.calls_with(self.config.options), self._places)

    @property
    def _trained_times(self) -> Tensor:
        """The schedule's times of the training steps, (T,) in float64, from noise to data."""
        schedule = self._training.schedule
        return torch.linspace(schedule.t_max, schedule.t_min, len(self), dtype=torch.float64)

    @property
    def plan(self) -> Plan | None:
        """The plan of the last `set_timesteps`; None before it."""
        return None if self._timeline is None else self._timeline.plan

    def _calls(self) -> Timeline:
        if self._timeline is None:
            raise ValueError("call set_timesteps() first: there are no steps yet")
        return self._timeline

    @property
    def init_noise_sigma(self) -> float:
        """What standard-normal noise is multiplied with to be the state that the loop begins with."""
        if self._timeline is None:
            return float(self._training.schedule.sigma(self._training.schedule.t_max))
        plan = self._timeline.plan
        return plan.calls[0].sigma if Stepwise(plan).draws_first else plan.sigma_T

    @property
    def sigmas(self) -> Tensor:
        """(calls + 1,) noise level at each call and at the end, `sigma / alpha`, on a flow its time; float32, on the CPU.

        Before `set_timesteps` those of `timesteps`, the network's training, and clean data's.
        """
        if self._timeline is None:
            t = torch.cat([self._trained_times, torch.tensor([self._training.schedule.t_zero], dtype=torch.float64)])
            alpha, sigma = self._training.schedule.alpha(t), self._training.schedule.sigma(t)
        else:
            grid, calls = self._timeline.grid, self._timeline.plan.calls
            levels = [*((call.alpha, call.sigma) for call in calls), (float(grid.alpha[-1]), float(grid.sigma[-1]))]
            alpha, sigma = torch.tensor(levels, dtype=torch.float64).unbind(1)
        return (sigma if self._training.takes == "flow" else sigma / alpha).float()

    @property
    def step_index(self) -> int | None:
        """The place of the next call in `timesteps`; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """What `set_begin_index` said."""
        return self._begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Nodes | None = None,
        sigmas: Nodes | None = None,
        mu: float | None = None,
        original_inference_steps: int | None = None,
        strength: float = 1.0,
    ) -> None:
        """Decide on the steps, before the loop.

        Args:
            num_inference_steps: steps of the grid; a step of some samplers takes several calls, see `order`.
            device: of `timesteps`.
            timesteps: instead, the network's times at which steps begin; the end is added.
            sigmas: instead, noise levels: on a flow its times (before the shift, the 0 at the end is added), on other schedules
                `sigma / alpha`, end included. With timesteps too, on a flow, the network is told those times.
            mu: of a flow with dynamic shifting.
            original_inference_steps: of a latent consistency model, instead of the config's; read under `grid="config"`.
            strength: in (0, 1], the part of the steps to take; latent consistency pipelines give it, others `set_begin_index`.

        Raises:
            ValueError: none of the three, two that do not go together, a value out of range, or a prediction that does not
                give what the sampler needs where the grid begins (epsilon at alpha = 0).
        """
        count = num_inference_steps
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"num_inference_steps must be an integer of at least 1, got {count!r}")
        training, config = self._training, dict(self.config)
        if original_inference_steps is not None:
            config["original_inference_steps"] = original_inference_steps
        if sigmas is not None:
            grid = part(grid_through(training, config, sigmas, mu), strength)
        elif timesteps is not None:
            grid = part(grid_at(training, config, timesteps), strength)
        elif count is not None:
            grid = grid_of(training, config, self._entry, count, mu, strength)
        else:
            raise ValueError("give num_inference_steps, timesteps or sigmas, got none of them")
        given = "sigmas" if sigmas is not None else "timesteps" if timesteps is not None else ""
        if given and count not in (None, grid.steps):
            raise ValueError(f"num_inference_steps={count} and {given} that make {grid.steps} steps: give one of them")
        planner = Planner(self._entry, config["options"], config["afs"])
        told = None if sigmas is None else timesteps
        timeline = Timeline.of(planner, training, grid, device, told)
        model = training.model(_no_network)
        for call in timeline.plan.calls:  # better an error here than in the loop
            model.affine(call.kind, call.t, call.alpha, call.sigma)
        self._timeline, self.timesteps, self.num_inference_steps = timeline, timeline.timesteps, count or grid.steps
        self._places = timeline.places(by_calls=bool(given))
        self._walk = self._step_index = self._begin_index = None
        self._moved = False

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The place of a time in `timesteps`; of two places the second, where a step of a two-call method begins.

        Raises:
            ValueError: it is not there.
        """
        times = self._calls().times if schedule_timesteps is None else tuple(schedule_timesteps.tolist())
        return place(number(timestep), times)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the loop at an entry of `timesteps`, as image-to-image pipelines do.

        The rest of the grid becomes a plan of its own: a multistep method has no history there.

        Raises:
            ValueError: no step begins there, or the rest of the steps takes other calls than are listed.
        """
        self._walk, self._first = self._calls().walk_from(int(begin_index))
        self._begin_index, self._step_index, self._moved = int(begin_index), None, False

    def _begin(self, timestep: float | Tensor | None) -> int:
        """The place of the coming call, which is looked for by its time where nobody said it."""
        if self._step_index is None:
            calls = self._calls()
            if self._walk is None:
                index = calls.index_of(timestep)
                self._walk, self._first = calls.walk_from(index)
                self._step_index = index
            else:
                self._step_index = self._begin_index
        return int(self._step_index or 0)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What the network takes for a state: EDM's `c_in x`, otherwise the state itself.

        Under afs the first call is at the second node, and this moves the state there.
        """
        if self._training.takes in ("step", "flow") and not self.config.afs:
            return sample
        index = self._begin(timestep)
        self._check_turn(index, timestep)
        if self._moves(index):
            self._moved = True
            sample = self._walk.start(wide(sample), _no_noise).to(sample.dtype)  # type: ignore[union-attr]
        if self._training.predicts != "edm":
            return sample
        call = self._calls().plan.calls[index]
        return sample * (call.sigma**2 + (self._training.sigma_data * call.alpha) ** 2) ** -0.5

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        noise_source: NoiseSource | None = None,
        prev_timestep: int | None = None,
    ) -> PlanSchedulerOutput | tuple[Tensor, Tensor]:
        """Take the network's output at one call, and go on to the next.

        Args:
            model_output: (B, C, ...) of the network, after guidance; or 2 C channels, of which the second half is a learned
                variance: "ddpm" takes it where the config's variance_type is "learned_range", as diffusers' does.
            timestep: of this call, the entries of `timesteps` in order. The first may be any at which a step begins.
            sample: (B, C, ...) the state the network was called at; it replaces what the last `step` returned.
            generator: of a stochastic sampler's noise, or a list with one for each sample.
            return_dict: False returns `(prev_sample, pred_original_sample)`.
            noise_source: `(k, like) -> Tensor` of like's shape, instead of the generator; as in `sample()`.
            prev_timestep: of no use, where the step goes is in the plan; unCLIP's pipelines give it.

        Raises:
            ValueError: no `set_timesteps`, a time that is not the next one, more steps than there are, shapes or devices that
                do not fit.
        """
        output, variance = halves_of(model_output, sample)
        index = self._begin(timestep)
        self._check_turn(index, timestep)
        call, x, walk = self._calls().plan.calls[index], wide(sample), self._walk
        assert walk is not None  # since _begin
        draw = noise_source if noise_source is not None else from_generator(generator, len(sample))
        at_start = self._moves(index)
        if at_start:
            if not self._moved:
                raise ValueError(
                    "afs=True makes the first step without the network, in scale_model_input, which was not called; set "
                    "afs=False for a pipeline that does not call it"
                )
            x = walk.start(x, _no_noise)
        value, x0 = evaluated(self._training, self.config, call, x, output.to(x.dtype))
        if index < self._first:  # passed over, see Timeline.walk_from
            following = x
        else:
            by = 1.0 if variance is None else self._scale_of_noise(variance.to(x.dtype), index)
            following = walk.feed(value, lambda k, like: by * draw_noise(draw, k, like), None if at_start else x)
        self._step_index = index + 1
        result = following.to(sample.dtype), x0.to(sample.dtype)
        return PlanSchedulerOutput(*result) if return_dict else result

    def _scale_of_noise(self, variance: Tensor, index: int) -> Tensor | float:
        """What the noise of a step is multiplied with to be that of the learned variance, under "ddpm"; 1 otherwise.

        Where the option `variance` is given it counts, and the learned one does not.
        """
        config, sigma = self.config, self._calls().grid.sigma
        mine = config.sampler == "ddpm" and "variance" not in config.options
        if not mine or config.get("variance_type") != "learned_range" or sigma[index + 1] == 0:
            return 1.0
        return scale_of(variance, float(sigma[index]), float(sigma[index + 1]))

    def _check_turn(self, index: int, timestep: float | Tensor | None) -> None:
        """Whether this call is the next one; on an accelerator only the first is looked at, which waits for the device."""
        times = self._calls().times
        if index >= len(times):
            raise ValueError(
                f"all {len(times)} calls are done; call set_timesteps() or set_begin_index() to begin anew"
            )
        if timestep is None or (isinstance(timestep, Tensor) and timestep.device.type != "cpu"):
            return
        if number(timestep) != times[index]:
            raise ValueError(
                f"timestep {number(timestep):g} is not the next one: call {index + 1} of {len(times)} is at {times[index]:g}; "
                "call set_timesteps() or set_begin_index() to begin anew"
            )

    def _moves(self, index: int) -> bool:
        """Whether the plan changes the state before this call, its first: an analytical first step."""
        walk = self._walk
        return walk is not None and index == self._first and not walk.starts_at_once and not walk.draws_first


def _no_noise(k: int, like: Tensor) -> Tensor:
    raise AssertionError("a plan that draws noise before its first call is not started, see Stepwise.draws_first")


def _no_network(*args: Any, **cond: Any) -> Tensor:
    raise AssertionError("the pipeline calls the network")
