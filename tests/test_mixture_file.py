"""Mixtures that went to disk and back, whole and damaged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.mixture import GaussianMixture
from bench.mixture_file import load_mixture, save_mixture
from bench.spectral import SpectralMixture
from distill.checkpoint import CheckpointError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spectral() -> SpectralMixture:
    inside = GaussianMixture(
        torch.tensor([0.5, 0.3, 0.2]),
        normal(3, 90, seed=2),
        torch.tensor([0.04, 0.1, 0.02]),
        torch.linalg.qr(normal(3, 90, 40, seed=1))[0],
        normal(3, 40, seed=3) ** 2,
    )
    order = torch.randperm(3 * 8 * 8, generator=torch.Generator().manual_seed(4))
    return SpectralMixture(inside, normal(3, 8, 8, seed=5), order, normal(3, 7, seed=6) ** 2)


MIXTURES = {
    "round": GaussianMixture.isotropic(normal(4, 3), 0.3),
    "full": GaussianMixture.random(5, 4),
    "spectral": spectral(),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_returns_to_rounding(name, tmp_path):
    mixture = MIXTURES[name]
    digest = save_mixture(tmp_path / "m", mixture, {"made": "here"})
    loaded = load_mixture(tmp_path / "m")
    x = normal(5, *mixture.shape, seed=9)
    torch.testing.assert_close(loaded.mixture.eps(x, 0.8, 0.6), mixture.eps(x, 0.8, 0.6), rtol=1e-13, atol=1e-13)
    assert type(loaded.mixture) is type(mixture)
    assert (loaded.hash, loaded.info) == (digest, {"made": "here"})
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("name", MIXTURES)
def test_half_precision_is_a_mixture_beside_and_as_exact(name, tmp_path):
    mixture = MIXTURES[name]
    save_mixture(tmp_path / "m", mixture, {}, half=True)
    loaded = load_mixture(tmp_path / "m").mixture
    basis = getattr(loaded, "inside", loaded).basis
    if basis is not None:
        error = basis.mT @ basis - torch.eye(basis.shape[-1], dtype=torch.float64)
        assert error.abs().max() < 1e-14
    x = normal(5, *mixture.shape, seed=9)
    torch.testing.assert_close(loaded.eps(x, 0.8, 0.6), mixture.eps(x, 0.8, 0.6), rtol=0.02, atol=0.02)
    assert not torch.equal(loaded.eps(x, 0.8, 0.6), mixture.eps(x, 0.8, 0.6))


def test_half_precision_halves_the_file_and_keeps_its_hash(tmp_path):
    sizes = {}
    for half in (False, True):
        digest = save_mixture(tmp_path / "m", spectral(), {}, half=half)
        sizes[half] = (tmp_path / "m" / "mixture.safetensors").stat().st_size
        assert load_mixture(tmp_path / "m").hash == digest
    assert sizes[True] < sizes[False] / 3


def test_the_hash_knows_every_number(tmp_path):
    mixture = spectral()
    digests = {save_mixture(tmp_path / "m", mixture, {})}
    for change in ("outside", "centre"):
        values = {name: getattr(mixture, name).clone() for name in ("centre", "order", "outside")}
        values[change].view(-1)[0] += 1e-9
        digests.add(save_mixture(tmp_path / "m", SpectralMixture(mixture.inside, **values), {}))
    assert len(digests) == 3


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def rewrite(folder, **changes):
    tensors = load_file(folder / "mixture.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "mixture.safetensors")


def rehashed(folder, **changes):
    """A change that the hash was made to agree with."""
    from distill.checkpoint import content_hash

    rewrite(folder, **changes)
    edit(folder, hash=content_hash(load_file(folder / "mixture.safetensors")))


def cut(folder):
    file = folder / "mixture.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"config\.json does not exist"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "format must be 1, got 'list'"),
        (lambda f: edit(f, format=2), "format must be 1, got 2"),
        (lambda f: edit(f, kind="Forest"), "kind must be one of GaussianMixture, SpectralMixture, got 'Forest'"),
        (lambda f: edit(f, kind=None), "'kind' is missing"),
        (lambda f: edit(f, shape=[3, 8, 9]), "is not a usable mixture.*192"),
        (lambda f: edit(f, shape=3), "is not a usable mixture"),
        (lambda f: edit(f, kind="GaussianMixture"), "the configuration says"),
        (lambda f: (f / "mixture.safetensors").unlink(), r"mixture\.safetensors does not exist"),
        (lambda f: rehashed(f, order=torch.zeros(192)), "order must be a permutation"),
        (cut, "truncated or not safetensors"),
        (lambda f: rewrite(f, outside=torch.zeros(3, 7)), r"the numbers have the hash \w+, config\.json says"),
        (lambda f: rehashed(f, outside=None), "'outside' is missing"),
        (lambda f: rehashed(f, weights=torch.zeros(3)), "weights must be positive"),
        (lambda f: rehashed(f, basis=torch.ones(3, 90, 40)), "orthonormal columns"),
        (lambda f: rehashed(f, basis=torch.ones(3, 90, 40).half()), "not a usable mixture"),
    ],
)
def test_damage_is_named(damage, message, tmp_path):
    folder = tmp_path / "m"
    save_mixture(folder, spectral(), {})
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_mixture(folder)


def test_nothing_is_saved_that_half_precision_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="means has numbers too large"):
        save_mixture(tmp_path / "m", GaussianMixture.isotropic([[1e300]], 1.0), {}, half=True)
    assert not (tmp_path / "m").exists()
