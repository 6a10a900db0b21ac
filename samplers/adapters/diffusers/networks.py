"""How networks of diffusers are called: one signature, `net(x, t, **cond)`, around the conventions in which they differ.

Nothing of diffusers is imported here: a network is known by its class's name, its config and the parameters of its `forward`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from samplers.adapters.variance import split
from samplers.errors import unknown

_TIMES_STEPS, _UNIT = "num_train_timesteps t", "t"  # what a network takes as the time t in [0, 1] of a flow
_FLOW_TIME = {
    "UNet2DModel": _TIMES_STEPS,
    "UNet2DConditionModel": _TIMES_STEPS,
    "DiTTransformer2DModel": _TIMES_STEPS,
    "PixArtTransformer2DModel": _TIMES_STEPS,
    "SD3Transformer2DModel": _TIMES_STEPS,
    "SanaTransformer2DModel": _TIMES_STEPS,
    "WanTransformer3DModel": _TIMES_STEPS,
    "FluxTransformer2DModel": _UNIT,
    "AuraFlowTransformer2DModel": _UNIT,
}
_ADDED = ("text_embeds", "time_ids", "image_embeds", "resolution", "aspect_ratio")  # parts of `added_cond_kwargs`
_FLUX_TEXT_AXES = 3


class DiffusersNet:
    """`net(x, t, **cond) -> prediction` around a network of diffusers; arguments as in `eps_model_from_diffusers`.

    What the network takes as `added_cond_kwargs` may be given flat (`text_embeds`, `time_ids`, ...), and floating-point
    conditions are taken in x's dtype. A `FluxTransformer2DModel` works on latents (B, C, H, W) like any other: its patches of
    2 x 2 are packed and unpacked here, and its `img_ids` and `txt_ids` are made.

    Args:
        network: of diffusers.
        sign: of the prediction.
    """

    def __init__(self, network: nn.Module, sign: float = 1.0) -> None:
        self.network, self.sign = network, sign
        self._kind = kind_of(network)
        forward = inspect.signature(getattr(network, "_orig_mod", network).forward).parameters  # torch.compile wraps it
        self._by_name = "hidden_states" in forward and "timestep" in forward
        state = {"hidden_states", "timestep"} if self._by_name else set(list(forward)[:2])
        self._takes = None if any(p.kind is p.VAR_KEYWORD for p in forward.values()) else set(forward) - state
        self._needs = {
            name for name, p in forward.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        }
        self._needs -= state

    def parameters(self) -> Any:
        """Of the network."""
        return self.network.parameters()

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The prediction for states x (B, C, ...) and times t (B,), in x's shape and dtype.

        Raises:
            ValueError: a condition that is missing, that the network does not take, or that is on another device than x.
        """
        return self.halves(x, t, **cond)[0]

    def halves(self, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor | None]:
        """The prediction, and the second half of the channels where the network learned a variance too; else None."""
        cond = self._conditions(x, cond)
        if self._kind == "FluxTransformer2DModel":
            out = self._packed(x, t, cond)
        elif self._by_name:
            out = _tensor(self.network(hidden_states=x, timestep=t, **cond))
        else:
            out = _tensor(self.network(x, t, **cond))
        prediction, variance = split(out, x)
        return prediction if self.sign > 0 else -prediction, variance

    def _conditions(self, x: Tensor, cond: Mapping[str, Any]) -> dict[str, Any]:
        """The conditions as the network takes them."""
        given = {name: _like(name, value, x) for name, value in cond.items()}
        if self._takes is not None and "added_cond_kwargs" in self._takes:
            added = {name: given.pop(name) for name in _ADDED if name in given and name not in self._takes}
            if self._kind == "PixArtTransformer2DModel":  # which wants to see them even where it has no use for them
                added = {"resolution": None, "aspect_ratio": None} | added
            if added:
                given["added_cond_kwargs"] = {**added, **(given.get("added_cond_kwargs") or {})}
        for name in given:
            if self._takes is not None and name not in self._takes:
                raise unknown(f"cond of {self._kind}", name, self._takes)
        missing = sorted(self._needs - set(given))
        if missing:
            raise ValueError(f"cond must have {missing[0]!r}, without which {self._kind} cannot be called")
        return given

    def _packed(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        """Flux on latents (B, C, H, W): patches of 2 x 2 as tokens of 4 C numbers, with their places as `img_ids`."""
        config: Any = getattr(self.network, "config", None)
        channels = int(config.in_channels) // 4
        if x.dim() != 4 or x.shape[1] != channels or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(
                f"x must be latents (B, {channels}, H, W) with even H and W for Flux, got {tuple(x.shape)}"
            )
        if bool(config.guidance_embeds) != (cond.get("guidance") is not None):
            takes = "must have 'guidance' (B,), such as 3.5," if config.guidance_embeds else "must not have 'guidance'"
            raise ValueError(
                f"cond {takes} for this network, whose config has guidance_embeds={config.guidance_embeds}"
            )
        text = cond.get("encoder_hidden_states")
        if not isinstance(text, Tensor):
            raise ValueError("cond must have 'encoder_hidden_states' (B, L, D), without which Flux cannot be called")
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        places = {"img_ids": image_ids(rows, columns, x), "txt_ids": x.new_zeros(text.shape[1], _FLUX_TEXT_AXES)}
        tokens = nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
        out = _tensor(self.network(hidden_states=tokens, timestep=t, **{**places, **cond}))
        return nn.functional.pixel_shuffle(out.transpose(1, 2).unflatten(2, (rows, columns)), 2)


def image_ids(rows: int, columns: int, like: Tensor) -> Tensor:
    """The places (rows * columns, 3) of Flux's tokens: 0, row and column of each."""
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    return torch.stack([torch.zeros_like(row), row, column], 1).to(like)


def flow_time(network: nn.Module, steps: float) -> float:
    """The factor between the time t in [0, 1] of a flow and what a network takes.

    Args:
        network: of diffusers, or of one's own, which takes what most do.
        steps: `num_train_timesteps` of the scheduler.

    Raises:
        ValueError: a transformer of diffusers whose convention is not known here, as several are.
    """
    kind = kind_of(network)
    if kind not in _FLOW_TIME and type(_bare(network)).__module__.startswith("diffusers."):
        raise ValueError(
            f"network of class {kind} matches flows in a convention that is not known here ({', '.join(_FLOW_TIME)} are): wrap "
            "it yourself, EpsModel(lambda x, t, **cond: ..., schedules.flow(), 'flow', time_input=...), and try it with "
            "`bench.check.check_model`"
        )
    scale = getattr(getattr(_bare(network), "config", None), "timestep_scale", None) or 1.0  # of Sana
    return 1.0 if _FLOW_TIME.get(kind) == _UNIT else steps * scale


def kind_of(network: nn.Module) -> str:
    """The name of a network's class, also where torch.compile has wrapped it."""
    return type(_bare(network)).__name__


def _bare(network: nn.Module) -> Any:
    return getattr(network, "_orig_mod", network)


def _tensor(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found[0] if isinstance(found, tuple) else found.sample


def _like(name: str, value: Any, x: Tensor) -> Any:
    """A condition on x's device, or an error; in x's dtype where it is of floating point."""
    if not isinstance(value, Tensor):
        return value
    if value.device != x.device:
        raise ValueError(f"cond[{name!r}] is on {value.device}, x on {x.device}; move one of them")
    return value.to(x.dtype) if value.is_floating_point() else value
