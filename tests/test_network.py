"""Further scalar inputs of the network, such as a guidance weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from distill.network import PatchUNet
from samplers import schedules


def network(*scalars: str) -> PatchUNet:
    torch.manual_seed(0)
    return PatchUNet(size=8, widths=[16, 16], classes=3, scalars=scalars).eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn((4, 1, 8, 8), generator=generator), torch.rand(4, generator=generator)
    return x, t, torch.tensor([0, 1, 2, 3])


def trained(*scalars: str) -> PatchUNet:
    """With scalars that have an effect."""
    wide = network(*scalars)
    for embed in wide.unet.class_embedding.scalars.values():
        torch.nn.init.normal_(embed[-1].weight)
    return wide


@torch.no_grad()
def test_a_fresh_scalar_has_no_effect_and_the_rest_keeps_its_names() -> None:
    plain, wide = network(), network("guidance", "step")
    new = wide.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() < wide.state_dict().keys()
    assert {name.split(".")[3] for name in new} == {"guidance", "step"}
    assert all(name.startswith("unet.class_embedding.scalars.") for name in new)
    wide.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(wide(*inputs(), guidance=torch.arange(4.0), step=torch.ones(4)), plain(*inputs()))


@torch.no_grad()
def test_each_row_has_its_own_scalar() -> None:
    wide, x = trained("guidance"), inputs()
    weights = torch.tensor([0.0, 1.0, 2.0, 4.0])
    together = wide(*x, guidance=weights)
    for i in range(4):
        alone = wide(*(part[i : i + 1] for part in x), guidance=weights[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)
    assert not torch.allclose(together[1], wide(*x, guidance=weights.flip(0))[1])


def test_a_scalar_learns_although_it_begins_at_zero() -> None:
    wide = network("guidance")
    wide(*inputs(), guidance=torch.ones(4)).square().mean().backward()
    last = wide.unet.class_embedding.scalars["guidance"][-1]
    assert last.weight.grad.any()


@pytest.mark.parametrize(
    ("has", "given", "message"),
    [
        ((), ("guidance",), r"takes the scalars \[\], got \['guidance'\]"),
        (("guidance",), (), r"takes the scalars \['guidance'\], got \[\]"),
        (("guidance",), ("guidence",), r"takes the scalars \['guidance'\], got \['guidence'\]"),
        (("guidance", "step"), ("guidance",), r"takes the scalars \['guidance', 'step'\], got \['guidance'\]"),
    ],
)
def test_other_scalars_than_the_network_has_are_refused(
    has: tuple[str, ...], given: tuple[str, ...], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        network(*has)(*inputs(), **{name: torch.zeros(4) for name in given})


@torch.no_grad()
def test_a_network_with_scalars_is_saved_and_loaded(tmp_path: Path) -> None:
    wide, guidance = trained("guidance"), torch.arange(4.0)
    save_checkpoint(tmp_path, Checkpoint(wide, schedules.cosine(), "v", {}))
    loaded = load_checkpoint(tmp_path).network
    assert loaded.arguments == wide.arguments | {"scalars": ["guidance"]}
    assert torch.equal(loaded(*inputs(), guidance=guidance), wide(*inputs(), guidance=guidance))
    assert "scalars" not in network().arguments
