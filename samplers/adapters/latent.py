"""Latent spaces: between the latents that a model works on and pixels, with a VAE's own scaling and shift."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_PROBE = 4  # height and width of the latents that tell what a decoder makes of them


@dataclass(frozen=True)
class LatentSpace:
    """The space a latent model works in: `latents = (z - shift) * scale` for a VAE's own z.

    Make one with `LatentSpace.of(vae)`.

    Attributes:
        vae: `decode(z)` and `encode(x)` as of diffusers' AutoencoderKL, AutoencoderTiny, AutoencoderDC or VQModel.
        scale, shift: numbers (1 or C, 1, 1), float32.
        channels: of latents.
        pixel_channels: of images.
        factor: pixels for each latent number, along a side.
        slices: samples for each call of the VAE.
    """

    vae: Any
    scale: Tensor
    shift: Tensor
    channels: int
    pixel_channels: int
    factor: int
    slices: int = 1

    @classmethod
    def of(cls, vae: Any, *, slices: int = 1, tiles: bool = False, channels: int | None = None) -> LatentSpace:
        """The latent space of a VAE, with the `scaling_factor`, `shift_factor`, `latents_mean` and `latents_std` of its config.

        Args:
            vae: of diffusers; its weights stay in their dtype.
            slices: samples for each call of the VAE, which bounds its memory.
            tiles: whether large images are made tile by tile, which bounds it further; seams are blended.
            channels: of the network's latents, which must be the VAE's; None = not checked.

        Raises:
            TypeError: not a module with `decode` and a config.
            ValueError: slices below 1, tiles of a VAE that has none, or channels that do not fit.
        """
        config, decode = getattr(vae, "config", None), getattr(vae, "decode", None)
        if not isinstance(vae, nn.Module) or not callable(decode) or not isinstance(config, Mapping):
            raise TypeError(f"vae must be a module with decode and a config, as of diffusers, got {type(vae).__name__}")
        if slices < 1:
            raise ValueError(f"slices must be at least 1, got {slices}")
        own = config.get("latent_channels") or config.get("vq_embed_dim")
        if channels is not None and own and int(own) != channels:
            raise ValueError(
                f"vae works on latents of {own} channels, the network on {channels}; give the VAE it was trained with"
            )
        _tile(vae, tiles)
        scale, shift = _scale_and_shift(config)
        like = next(vae.parameters())
        channels = int(own or channels or 0)
        if not channels:
            raise ValueError(f"vae of class {type(vae).__name__} does not say its channels; give channels")
        with torch.no_grad():
            probe = _sample(decode(like.new_zeros(1, channels, _PROBE, _PROBE)))
        return cls(vae, scale, shift, channels, probe.shape[1], probe.shape[-1] // _PROBE, slices)

    def pixel_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """The shape of an image from that of its latents (C, h, w)."""
        return (self.pixel_channels, shape[-2] * self.factor, shape[-1] * self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, C', H, W), float32, in about [-1, 1], from latents (B, C, h, w).

        Raises:
            ValueError: latents of other channels, or on another device than the VAE.
        """
        x = self._checked("latents", latents, self.channels).float()
        return self._sliced(
            lambda z: _sample(self.vae.decode(z)), x / self.scale.to(x.device) + self.shift.to(x.device)
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents (B, C, h, w), float32, from pixels (B, C', H, W) in [-1, 1]: the mean of the posterior where there is one.

        Raises:
            ValueError: pixels of other channels, on another device than the VAE, or of sides that the factor does not divide.
        """
        x = self._checked("pixels", pixels, self.pixel_channels).float()
        if any(side % self.factor for side in x.shape[-2:]):
            raise ValueError(f"pixels must have sides that {self.factor} divides, got {tuple(x.shape[-2:])}")
        z = self._sliced(lambda part: _latents(self.vae.encode(part)), x)
        return (z - self.shift.to(z.device)) * self.scale.to(z.device)

    def _checked(self, name: str, x: Tensor, channels: int) -> Tensor:
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"{name} must be (B, {channels}, height, width) for this VAE, got {tuple(x.shape)}")
        device = next(self.vae.parameters()).device
        if x.device != device:
            raise ValueError(f"{name} are on {x.device}, the vae on {device}; move one of them")
        return x

    @torch.no_grad()
    def _sliced(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Work on `slices` samples at a time, in the VAE's dtype."""
        dtype = next(self.vae.parameters()).dtype
        if not len(x):
            return work(x.new_zeros(1, *x.shape[1:], dtype=dtype))[:0].float()
        return torch.cat([work(part.to(dtype)).float() for part in x.split(self.slices)])


def _scale_and_shift(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """`(z - shift) * scale` of a config: factors, or a mean and a standard deviation for each channel."""
    factor, shift = config.get("scaling_factor"), config.get("shift_factor")
    scale = torch.tensor(1.0 if factor is None else float(factor)).view(1, 1, 1)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return scale, torch.tensor(0.0 if shift is None else float(shift)).view(1, 1, 1)
    return scale / torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), torch.tensor(mean).float().view(-1, 1, 1)


def _tile(vae: Any, tiles: bool) -> None:
    if tiles and not hasattr(vae, "enable_tiling"):
        raise ValueError(f"tiles=True: a VAE of class {type(vae).__name__} does not decode in tiles")
    if hasattr(vae, "enable_tiling"):
        vae.enable_tiling() if tiles else vae.disable_tiling()


def _sample(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found[0] if isinstance(found, tuple) else found.sample


def _latents(found: Any) -> Tensor:
    """Of what a VAE's `encode` returns."""
    if isinstance(found, Tensor):
        return found
    posterior = getattr(found, "latent_dist", None)
    if posterior is not None:
        return posterior.mode()
    return found.latents if hasattr(found, "latents") else found.latent
