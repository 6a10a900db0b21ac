"""What sampling costs, counted where it happens: a model whose networks are metered."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplers.execute import Loop
from samplers.guidance.wrapped import Wrapped
from samplers.model import EpsModel, Scalar, require_model
from samplers.plan import Plan

Net = Callable[..., Tensor]


class Meter:
    """A network that counts what it is asked.

    Args:
        net: `net(x, t, **cond) -> output`.

    Attributes:
        calls: of the network.
        evaluations: rows of the batches it was called with: two for each sample where guidance doubles the batch.
    """

    def __init__(self, net: Net) -> None:
        self.net, self.calls, self.evaluations = net, 0, 0

    def reset(self) -> None:
        """Count from 0."""
        self.calls = self.evaluations = 0

    def parameters(self) -> Any:
        """Of the network: an epsilon-model reads dtype and device off the first one."""
        found = getattr(self.net, "parameters", None)
        return found() if callable(found) else iter(())

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The network's output for states x (B, ...) and times t (B,)."""
        self.calls += 1
        self.evaluations += len(x)
        return self.net(x, t, **cond)


@dataclass(frozen=True)
class Counts:
    """What a model was asked.

    Attributes:
        calls: of networks.
        evaluations: rows of all those calls, which for a batch of B samples is B times the evaluations of a sample.
        depth: points at which the answer of networks was needed to go on; calls at one point do not wait for each other, as
            the two of classifier-free guidance.
    """

    calls: int = 0
    evaluations: int = 0
    depth: int = 0


def metered(model: EpsModel) -> Metered:
    """The model, with every network in it counted, whatever wraps it; the model itself stays as it is.

    Args:
        model: the outermost one, which is given to a sampler: `metered(guidance.classifier_free(...))`.

    Returns:
        A model with `counts` (a `Counts`, of all networks together), `networks` (a `Meter` for each) and `reset()`. Under
        `compile=` Python does not see the calls of a loop; they are then those of the same loop, run beforehand with networks
        that answer zero, as nothing in a loop depends on what a network answers.

    Raises:
        TypeError: not a model.
    """
    return Metered(model)


class Metered(Wrapped):
    """See `metered`."""

    def __init__(self, model: EpsModel) -> None:
        require_model("model", model)
        meters: dict[int, Meter] = {}
        super().__init__(model.with_networks(lambda net: meters.setdefault(id(net), Meter(net))))
        self.networks = tuple(meters.values())
        self.bare = model.with_networks(_bare)  # what is compiled
        self.compiled = self.bare.compiled
        self._points = [0]  # in a list, because what is made for a run counts here too
        self._known: dict[tuple[Plan, int], list[Counts]] = {}

    @property
    def counts(self) -> Counts:
        """Since the model was made, or `reset`."""
        calls = sum(meter.calls for meter in self.networks)
        return Counts(calls, sum(meter.evaluations for meter in self.networks), self._points[0])

    def reset(self) -> None:
        """Count from 0."""
        self._points[0] = 0
        for meter in self.networks:
            meter.reset()

    def output(self, x: Tensor, times: Tensor, alpha: Scalar, sigma: Scalar, cond: Mapping[str, Any]) -> Tensor:
        """The output of the model inside, counted; a point at which no network was called is none."""
        before = self.counts.calls
        out = self.model.output(x, times, alpha, sigma, cond)
        self._points[0] += self.counts.calls > before
        return out

    def count(self, plan: Plan, x_T: Tensor, cond: Mapping[str, Any]) -> None:
        """Count what a run of a plan asks, without asking it: every network answers zero. Known from then on.

        Args:
            plan: what to run.
            x_T: start state (B, ...), for its shape.
            cond: passed to every call.
        """
        key = plan, len(x_T)
        if key not in self._known:
            before, points = [(meter.calls, meter.evaluations) for meter in self.networks], self._points[0]
            silent = copy.copy(self)
            silent.model = self.model.with_networks(_Silent)
            Loop.of(plan, silent, x_T).run(x_T, lambda k, like: torch.zeros_like(like), cond)
            after = [(meter.calls, meter.evaluations) for meter in self.networks]
            asked = [Counts(b - a, d - c) for (a, c), (b, d) in zip(before, after, strict=True)]
            self._known[key] = [*asked, Counts(depth=self._points[0] - points)]
            return
        *asked, points_of = self._known[key]
        self._points[0] += points_of.depth
        for meter, counts in zip(self.networks, asked, strict=True):
            meter.calls += counts.calls
            meter.evaluations += counts.evaluations


class _Silent(Meter):
    """A meter's network that is counted there and answers zero."""

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        meter = self.net
        assert isinstance(meter, Meter), "only what is metered is silenced"
        meter.calls += 1
        meter.evaluations += len(x)
        return torch.zeros_like(x)


def _bare(net: Net) -> Net:
    return _bare(net.net) if isinstance(net, Meter) else net
