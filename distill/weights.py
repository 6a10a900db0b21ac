"""The weights of a run: trained, averaged, and the optimiser's moments, whole or divided among processes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict as distributed
from torch.distributed.tensor import DTensor

from distill.checkpoint import CheckpointError, load_weights
from distill.network import PatchUNet

_WHOLE = distributed.StateDictOptions(full_state_dict=True, cpu_offload=True)
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def ema_decay(half_life: float, batch_size: int, step: int) -> float:
    """The weight of the old average after `step` steps of a phase, at least 1.

    The half-life is a twentieth of the images seen until that exceeds `half_life`, so the first weights, which are noise,
    are forgotten at once (the ramp of Karras et al. 2022, arXiv:2206.00364, in their published code).
    """
    return 0.5 ** (batch_size / min(half_life, 0.05 * step * batch_size))


class Weights:
    """The network being trained with its optimiser, and averages of its weights.

    Args:
        network: as training begins, on the CPU.
        accelerator: of accelerate; places the network, or divides it among processes.
        half_lives: of the averages, in images.
        weight_decay: of AdamW; each step sets the learning rate.
        compiles: whether `torch.compile` compiles the network.

    Attributes:
        network: as it is trained, without the wrapper of several processes.
        model: with it; what a loss calls.
        optimizer: prepared by accelerate.
        averages: for each half-life, the averaged weights in the order of the network's parameters.
    """

    def __init__(
        self, network: PatchUNet, accelerator: Any, half_lives: Sequence[int], weight_decay: float, compiles: bool
    ) -> None:
        self._bare = copy.deepcopy(network).eval()  # on the CPU and whole
        self.half_lives = tuple(half_lives)
        network.train()
        if compiles:
            network.compile()
        optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
        self.model, self.optimizer = accelerator.prepare(network, optimizer)
        self.network: PatchUNet = accelerator.unwrap_model(self.model)
        self.averages = [self._current() for _ in self.half_lives]

    @torch.no_grad()
    def average(self, batch_size: int, step: int) -> None:
        """Move the averages towards the weights after `step` steps of a phase."""
        current = [_local(p) for p in self.network.parameters()]
        for average, half_life in zip(self.averages, self.half_lives, strict=True):
            torch._foreach_lerp_(average, current, 1.0 - ema_decay(half_life, batch_size, step))

    def begin(self, weights: dict[str, Tensor]) -> None:
        """Start anew from the state of a whole network: fresh averages, no moments."""
        self._set(weights)
        self.optimizer.state.clear()
        self.averages = [self._current() for _ in self.half_lives]

    def averaged(self, place: int = 0) -> PatchUNet:
        """A copy of the network on the CPU, in evaluation mode, with an average; of several processes, on the main one."""
        network, whole = copy.deepcopy(self._bare), self._whole(self.averages[place])
        if whole:
            network.load_state_dict(whole)
        return network

    def finite(self) -> bool:
        """Whether every weight in this process's share is a finite number."""
        return bool(torch.stack([_local(p).isfinite().all() for p in self.network.parameters()]).all())

    def state(self) -> dict[str, dict[str, Tensor]]:
        """All of it as {"network", "optimizer", "average-<half-life>"}, whole, on the CPU."""
        averages = zip(self.half_lives, self.averages, strict=True)
        return {
            "network": self._whole(self._current()),
            "optimizer": self._moments(),
            **{f"average-{half_life}": self._whole(average) for half_life, average in averages},
        }

    def restore(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take over what `state` gave.

        Raises:
            CheckpointError: it is of another network.
        """
        for name in state.keys() - {"optimizer"}:
            load_weights(copy.deepcopy(self._bare), state[name], Path(f"{name}.safetensors"))
        self.optimizer.state.clear()
        if state["optimizer"]:
            self._set_moments(state["optimizer"])
        for place, half_life in enumerate(self.half_lives):
            self._set(state[f"average-{half_life}"])
            self.averages[place] = self._current()
        self._set(state["network"])

    def _moments(self) -> dict[str, Tensor]:
        """Nothing before the first step, which `get_optimizer_state_dict` would otherwise count as done."""
        if not self.optimizer.state:
            return {}
        state = distributed.get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=_WHOLE)
        moments = cast(dict[str, dict[str, Tensor]], state.get("state", {}))
        return {f"{name}.{part}": value for name, parts in moments.items() for part, value in parts.items()}

    def _set_moments(self, moments: dict[str, Tensor]) -> None:
        names, optimizer = [name for name, _ in self.network.named_parameters()], self.optimizer.optimizer
        different = {f"{name}.{part}" for name in names for part in _MOMENTS} ^ moments.keys()
        if different:
            raise CheckpointError(f"optimizer.safetensors is of another network: only one has {min(different)!r}")
        state = {name: {part: moments[f"{name}.{part}"] for part in _MOMENTS} for name in names}
        groups = [{**optimizer.param_groups[0], "params": names}]
        whole: Any = {"state": state, "param_groups": groups}
        distributed.set_optimizer_state_dict(self.model, optimizer, optim_state_dict=whole, options=_WHOLE)

    @torch.no_grad()
    def _current(self) -> list[Tensor]:
        """A copy of this process's share of the weights."""
        return [_local(p).clone() for p in self.network.parameters()]

    @torch.no_grad()
    def _whole(self, weights: list[Tensor]) -> dict[str, Tensor]:
        """The state of a whole network with these weights, on the CPU; of several processes, on the main one."""
        own = self._current()
        self._put(weights)
        whole = cast(dict[str, Tensor], distributed.get_model_state_dict(self.model, options=_WHOLE))
        copied = {name: value.clone() for name, value in whole.items()}
        self._put(own)
        return copied

    def _put(self, weights: list[Tensor]) -> None:
        torch._foreach_copy_([_local(p) for p in self.network.parameters()], weights)

    def _set(self, whole: dict[str, Tensor]) -> None:
        """Give the network the state of a whole network."""
        distributed.set_model_state_dict(self.model, cast(dict[str, Any], dict(whole)), options=_WHOLE)


def _local(weight: Tensor) -> Tensor:
    """This process's share of a weight that FSDP has divided, else the weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight.detach()
