"""A wider network that starts from a trained one: the same function where it can be, close to it elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distill.network import PatchUNet
from distill.widen import widened


def inputs(size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((6, 1, size, size), generator=generator)
    return x, torch.rand(6, generator=generator), torch.arange(6) % 4


def narrow(**arguments: object) -> PatchUNet:
    torch.manual_seed(0)
    network = PatchUNet(size=16, classes=3, **arguments).eval()  # type: ignore[arg-type]
    with torch.no_grad():  # scales and shifts away from one and zero, or a wrong order of them would go unnoticed
        for module in network.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.add_(0.3 * torch.randn_like(module.weight))
                module.bias.add_(0.3 * torch.randn_like(module.bias))
    return network


def without_norm_groups(network: PatchUNet) -> PatchUNet:
    """One scale for all channels is blind to which channels share a group."""

    class OneScale(nn.Module):
        def __init__(self, norm: nn.GroupNorm) -> None:
            super().__init__()
            self.weight, self.bias = norm.weight, norm.bias

        def forward(self, x: Tensor) -> Tensor:
            shape = (-1, *[1] * (x.dim() - 2))
            return x / 3.0 * self.weight.view(shape) + self.bias.view(shape)

    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(parent, name, OneScale(child))
    return network


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    ("old", "new"), [([16, 64], [16, 128]), ([16, 32, 64], [16, 96, 64]), ([16, 16, 32], [16, 16, 96])]
)
@torch.no_grad()
def test_every_layer_but_the_normalisation_of_two_inputs_keeps_its_function(
    old: list[int], new: list[int], layers: int
) -> None:
    first = narrow(widths=old, layers=layers)
    second = widened(first, new).eval()
    assert second.arguments == first.arguments | {"widths": new}
    x, t, labels = inputs(16)
    before, after = (without_norm_groups(n.double())(x.double(), t.double(), labels) for n in (first, second))
    torch.testing.assert_close(after, before, rtol=0.0, atol=1e-6 * float(before.abs().max()))


@torch.no_grad()
def test_the_whole_network_begins_close_to_the_narrow_one() -> None:
    first = narrow(widths=[16, 64])
    x, t, labels = inputs(16)
    before, after = first(x, t, labels), widened(first, [16, 128]).eval()(x, t, labels)
    fresh = PatchUNet(size=16, classes=3, widths=[16, 128]).eval()(x, t, labels)
    assert (after - before).square().mean() < 0.1 * (fresh - before).square().mean()


@torch.no_grad()
def test_copies_are_read_in_unequal_parts_so_that_they_can_part() -> None:
    wide = widened(narrow(widths=[16, 64]), [16, 128])
    weight = wide.state_dict()["unet.mid_block.resnets.0.conv1.weight"]
    assert not torch.allclose(weight[:, 0::2], weight[:, 1::2])
    again, other = (widened(narrow(widths=[16, 64]), [16, 128], seed).state_dict() for seed in (0, 1))
    assert all(torch.equal(value, again[name]) for name, value in wide.state_dict().items())
    assert not torch.equal(weight, other["unet.mid_block.resnets.0.conv1.weight"])


@pytest.mark.parametrize("widths", [[32, 64], [16, 32], [16, 96], [16], [16, 64, 64]])
def test_widths_that_do_not_follow_from_the_old_ones_are_refused(widths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"widths must begin with 16 and be whole multiples of \[16, 64\], got"):
        widened(narrow(widths=[16, 64]), widths)


def test_widths_that_would_drop_a_trained_shortcut_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"widths must leave every layer a place, got \[64, 64\], which has none for unet\.down"
    ):
        widened(narrow(widths=[64, 32]), [64, 64])


def test_heads_that_would_grow_are_refused() -> None:
    with pytest.raises(ValueError, match="the last of widths must keep heads of 16 channels"):
        widened(narrow(widths=[16, 16]), [16, 32])
