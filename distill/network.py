"""The network of the shipped models: diffusers' `UNet2DModel` behind a space-to-depth layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_NORM_GROUPS = 8
_HEAD_WIDTH = 32


class PatchUNet(nn.Module):
    """A class-conditional U-Net that works on `patch` x `patch` blocks of pixels as channels.

    Space-to-depth makes every convolution of a small image 2 to 4 times faster on a CPU at equal parameters, because the
    first level of a U-Net is bound by memory and not by arithmetic.

    Args:
        channels: of the image.
        size: height and width of the image in pixels.
        patch: side of a block in pixels; `size` is a multiple of `patch * 2 ** (len(widths) - 1)`.
        widths: channels of each level of the U-Net, each a multiple of 8 and at least 16 (with one channel in each of the 8
            groups that are normalised, time and label would be divided out again); the last one, where attention is, either
            at most 32 or a multiple of 32.
        layers: residual blocks a level.
        classes: number of labels; one more, the null class with the number `classes`, stands for "no label".
        time_scale: factor on t before the sinusoidal embedding, which is made for 0 .. 1000.
        scalars: names of further inputs, a number for each image, such as a guidance weight; what they add to the embedding
            of time is zero in a fresh network.

    Attributes:
        arguments: what the network was built with, JSON-ready.
        shape: (channels, size, size), of one image.

    Raises:
        ValueError: arguments that do not fit each other.
    """

    def __init__(
        self,
        channels: int = 1,
        size: int = 28,
        patch: int = 2,
        widths: Sequence[int] = (64, 64),
        layers: int = 1,
        classes: int = 10,
        time_scale: float = 1000.0,
        scalars: Sequence[str] = (),
    ) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.arguments: dict[str, Any] = {
            "channels": channels,
            "size": size,
            "patch": patch,
            "widths": list(widths),
            "layers": layers,
            "classes": classes,
            "time_scale": time_scale,
        }
        _check_arguments(**self.arguments)
        if scalars:
            self.arguments["scalars"] = list(scalars)
        self.patch, self.classes, self.time_scale, self.scalars = patch, classes, time_scale, tuple(scalars)
        self.shape = (channels, size, size)
        self.unet = UNet2DModel(
            sample_size=size // patch,
            in_channels=channels * patch**2,
            out_channels=channels * patch**2,
            layers_per_block=layers,
            block_out_channels=tuple(widths),
            down_block_types=("DownBlock2D",) * len(widths),
            up_block_types=("UpBlock2D",) * len(widths),
            norm_num_groups=_NORM_GROUPS,
            attention_head_dim=min(_HEAD_WIDTH, widths[-1]),
            num_class_embeds=classes + 1,
        )
        if scalars:
            self.unet.class_embedding = _LabelsAndScalars(classes + 1, 4 * widths[0], scalars)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, **scalars: Tensor) -> Tensor:
        """The prediction, of the shape of x.

        Args:
            x: states (B, channels, size, size), float32 or what autocast makes of it.
            t: times (B,), in the schedule's own unit.
            class_labels: (B,) integers in 0 .. classes, or None for the null class.
            **scalars: (B,) floats, one for each of the network's `scalars`.

        Raises:
            TypeError: other scalars than the network has.
        """
        if class_labels is None:
            class_labels = torch.full((len(x),), self.classes, device=x.device)
        if scalars.keys() != set(self.scalars):
            raise TypeError(f"the network takes the scalars {list(self.scalars)}, got {sorted(scalars)}")
        blocks = F.pixel_unshuffle(x, self.patch)
        condition = (class_labels, scalars) if scalars else class_labels
        return F.pixel_shuffle(self.unet(blocks, t * self.time_scale, condition).sample, self.patch)


def with_scalars(network: PatchUNet, names: Sequence[str]) -> PatchUNet:
    """A copy of a network that takes further scalars, which have no effect yet."""
    wider = type(network)(**network.arguments | {"scalars": [*network.scalars, *names]})
    wider.load_state_dict({**wider.state_dict(), **network.state_dict()})
    return wider


class _LabelsAndScalars(nn.Embedding):
    """The embedding of labels, under the name it has without scalars, plus that of each scalar.

    diffusers hands what it calls class labels to this module as they are.
    """

    def __init__(self, count: int, width: int, scalars: Sequence[str]) -> None:
        super().__init__(count, width)
        self.scalars = nn.ModuleDict({name: _scalar_embedding(width) for name in scalars})

    def forward(self, condition: tuple[Tensor, dict[str, Tensor]]) -> Tensor:  # type: ignore[override]
        labels, scalars = condition
        total = super().forward(labels)
        for name, embed in self.scalars.items():
            total = total + embed(scalars[name].to(total.dtype)[:, None])
        return total


def _scalar_embedding(width: int) -> nn.Sequential:
    last = nn.Linear(width, width)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(1, width), nn.SiLU(), last)


def _check_arguments(size: int, patch: int, widths: list[int], classes: int, **others: float) -> None:
    if not widths:
        raise ValueError("widths must name at least one level")
    for name, value in {
        "size": size,
        "patch": patch,
        "widths": min(widths),
        "classes + 1": classes + 1,
        **others,
    }.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    multiple = patch * 2 ** (len(widths) - 1)
    if size % multiple:
        raise ValueError(
            f"size must be a multiple of patch * 2 ** (levels - 1) = {multiple}, got size={size}, patch={patch} and "
            f"{len(widths)} levels"
        )
    narrow = min(widths) < 2 * _NORM_GROUPS
    if narrow or any(width % _NORM_GROUPS for width in widths) or widths[-1] % min(_HEAD_WIDTH, widths[-1]):
        raise ValueError(
            f"widths must be multiples of {_NORM_GROUPS} from {2 * _NORM_GROUPS} on, the last at most {_HEAD_WIDTH} or a "
            f"multiple of it, got {widths}"
        )
