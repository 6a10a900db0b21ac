"""Start a wider network from a trained narrower one (Net2WiderNet, Chen et al. 2016, arXiv:1511.05641, section 2.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.network import PatchUNet

_UP_BLOCK = re.compile(r"unet\.up_blocks\.(\d+)\.resnets\.(\d+)\.(norm1|conv1\.weight|conv_shortcut\.weight)")
_Parts = list[tuple[int, int]]  # (old, new) numbers of channels, one pair for each of the tensors that are concatenated


def widened(narrow: PatchUNet, widths: Sequence[int], seed: int = 0) -> PatchUNet:
    """A network of more channels that begins about where a trained one stands.

    Every new channel copies an old one, and whoever reads the copies divides the old weight among them in random parts, so
    that the copies learn different things. This changes nothing but the normalisations of the up path: where one of the two
    concatenated inputs grows and the other does not, their groups hold other channels than before.

    Args:
        narrow: the trained network.
        widths: channels of each level: the first as it was (it is also the width of the embedding of time), the others
            whole multiples of what they were.
        seed: of the random parts.

    Raises:
        ValueError: other widths, or such that a trained shortcut between two widths would be dropped, as they would be equal.
    """
    old, new = list(narrow.arguments["widths"]), list(widths)
    if len(new) != len(old) or new[0] != old[0] or any(n % o or n < o for n, o in zip(new, old, strict=True)):
        raise ValueError(f"widths must begin with {old[0]} and be whole multiples of {old}, got {new}")
    wide = PatchUNet(**narrow.arguments | {"widths": new})
    heads = [network.unet.config["attention_head_dim"] for network in (narrow, wide)]
    if heads[0] != heads[1]:
        raise ValueError(f"the last of widths must keep heads of {heads[0]} channels, got {new} with {heads[1]}")
    layout = _Layout(list(zip(old, new, strict=True)), narrow.arguments["layers"], heads[0])
    source, generator = narrow.state_dict(), torch.Generator().manual_seed(seed)
    dropped = sorted(set(source) - set(wide.state_dict()))
    if dropped:
        raise ValueError(f"widths must leave every layer a place, got {new}, which has none for {dropped[0]}")
    weights = {
        name: _grown(name, source.get(name), tensor.shape, layout, generator)
        for name, tensor in wide.state_dict().items()
    }
    wide.load_state_dict(weights)
    return wide


@dataclass(frozen=True)
class _Layout:
    """Of both networks: (old, new) widths of the levels, residual blocks a level, channels of an attention head."""

    widths: _Parts
    layers: int
    head_width: int


def _grown(name: str, old: Tensor | None, shape: torch.Size, layout: _Layout, generator: torch.Generator) -> Tensor:
    """The weights of this name and shape; `old` is None for a shortcut between widths that were equal."""
    if old is None:
        channels = min(shape[:2]) if len(shape) > 1 else 0
        old = torch.eye(channels)[..., None, None] if channels else torch.zeros(shape)
    inputs = _concatenated(name, layout)
    if inputs and old.dim() == 1:
        return old[_copied(inputs)]
    writes_heads = any(part in name for part in (".to_q.", ".to_k.", ".to_v."))
    rows = _copied([(old.shape[0], shape[0])], layout.head_width if writes_heads else 1)
    if old.dim() == 1:
        return old[rows]
    columns = _copied(inputs or [(old.shape[1], shape[1])], layout.head_width if ".to_out." in name else 1)
    return _divided(old[rows], columns, generator)


def _concatenated(name: str, layout: _Layout) -> _Parts | None:
    """The two inputs (from below, from the skip) of the tensor, or None where it has one input.

    The order of diffusers' `UpBlock2D`: the first block takes the width below, the last skip comes from the level above.
    """
    found = _UP_BLOCK.match(name)
    if not found:
        return None
    block, layer, upwards = int(found[1]), int(found[2]), layout.widths[::-1]
    own, above, below = upwards[block], upwards[min(block + 1, len(upwards) - 1)], upwards[max(block - 1, 0)]
    return [below if layer == 0 else own, above if layer == layout.layers else own]


def _copied(parts: _Parts, block: int = 1) -> Tensor:
    """The old channel that each new one copies; channels stay together in blocks."""
    starts = torch.tensor([0, *(old for old, _ in parts)]).cumsum(0)
    indices = []
    for start, (old, new) in zip(starts, parts, strict=False):
        blocks = torch.arange(new // block) * (old // block) // (new // block)
        indices.append(start + (blocks[:, None] * block + torch.arange(block)).flatten())
    return torch.cat(indices)


def _divided(weight: Tensor, columns: Tensor, generator: torch.Generator) -> Tensor:
    """`weight` (out, in, ...) for copied inputs: the copies of an input share its weight in random parts that sum to one."""
    share = 0.5 + torch.rand((len(weight), len(columns)), generator=generator)
    total = torch.zeros(weight.shape[:2]).index_add(1, columns, share)[:, columns]
    part = (share / total).view(*share.shape, *[1] * (weight.dim() - 2))
    return weight[:, columns] * part
