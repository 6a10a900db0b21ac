"""Prompts of a pipeline as conditions of its network."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samplers.errors import unknown

# what each network takes, and where it stands in what the pipeline's `encode_prompt` returns
_TAKES: Mapping[str, Mapping[str, int]] = {
    "UNet2DConditionModel": {"encoder_hidden_states": 0},
    "PixArtTransformer2DModel": {"encoder_hidden_states": 0, "encoder_attention_mask": 1},
    "SanaTransformer2DModel": {"encoder_hidden_states": 0, "encoder_attention_mask": 1},
    "AuraFlowTransformer2DModel": {"encoder_hidden_states": 0},
    "SD3Transformer2DModel": {"encoder_hidden_states": 0, "pooled_projections": 2},
    "FluxTransformer2DModel": {"encoder_hidden_states": 0, "pooled_projections": 1},
}
_XL = {"encoder_hidden_states": 0, "text_embeds": 2}
_FLUX_GUIDANCE = 3.5  # the weight that FLUX.1-dev's own pipeline gives its network
_PIXART_SIZED = 128  # sample_size of PixArt's networks that are told the size of the image
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


@dataclass(frozen=True)
class PromptEncoder:
    """Turns prompts into the conditions of a pipeline's network, with the pipeline's own encoders.

    Attributes:
        pipeline: of diffusers, with text encoders.
        network: its denoiser.
        size: (height, width) of the images, which some networks are told.
        device: on which prompts are encoded; the encoders leave it again.
    """

    pipeline: Any
    network: Any
    size: tuple[int, int]
    device: str

    def __post_init__(self) -> None:
        """Check that the network is one whose conditions are known.

        Raises:
            ValueError: it is not.
        """
        kind = type(self.network).__name__
        if kind not in _TAKES:
            raise unknown("kind of network for prompts", kind, _TAKES)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The conditions, with a row for each prompt.

        Raises:
            ValueError: no prompt, or something else than texts.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"prompts must be texts, at least one, got {prompts!r}")
        takes = _XL if self._is_xl else _TAKES[type(self.network).__name__]
        found = self._encoded(texts)
        cond: dict[str, Tensor] = {name: found[place] for name, place in takes.items()}
        return cond | self._sizes(len(texts), cond["encoder_hidden_states"])

    def null(self) -> dict[str, Tensor]:
        """The conditions of no prompt, one row: of the empty one, or zeros where the pipeline says so."""
        cond = self([""])
        if self.pipeline.config.get("force_zeros_for_empty_prompt"):
            zero = {name: torch.zeros_like(cond[name]) for name in _XL if name in cond}
            return cond | zero
        return cond

    @property
    def _is_xl(self) -> bool:
        return self.network.config.get("addition_embed_type") == "text_time"

    def _encoded(self, texts: list[str]) -> Sequence[Any]:
        encode = self.pipeline.encode_prompt
        given = {
            "prompt": texts,
            "device": self.device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
        }
        accepted = inspect.signature(encode).parameters
        given |= {name: None for name in ("prompt_2", "prompt_3") if name in accepted}
        encoders = [part for name in _ENCODERS if (part := getattr(self.pipeline, name, None)) is not None]
        homes = [next(part.parameters()).device for part in encoders]
        try:
            for part in encoders:
                part.to(self.device)
            return encode(**{name: value for name, value in given.items() if name in accepted})
        finally:
            for part, home in zip(encoders, homes, strict=True):
                part.to(home)

    def _sizes(self, count: int, like: Tensor) -> dict[str, Tensor]:
        """What some networks are told beside the text, as their pipelines do by default."""
        config, (height, width) = self.network.config, self.size
        if self._is_xl:
            return {"time_ids": like.new_tensor([[height, width, 0, 0, height, width]]).repeat(count, 1)}
        if config.get("guidance_embeds"):
            return {"guidance": torch.full((count,), _FLUX_GUIDANCE, device=like.device)}
        if type(self.network).__name__ == "PixArtTransformer2DModel" and config.get("sample_size") == _PIXART_SIZED:
            sizes = {"resolution": [[height, width]], "aspect_ratio": [[height / width]]}
            return {name: like.new_tensor(value).repeat(count, 1) for name, value in sizes.items()}
        return {}


def has_prompts(pipeline: Any) -> bool:
    """Whether a pipeline takes prompts."""
    return callable(getattr(pipeline, "encode_prompt", None))


def prompts_in(given: str | Sequence[str]) -> tuple[str, ...]:
    """Prompts from a file with one a line, or as they are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file without a prompt.
    """
    if not isinstance(given, str):
        return tuple(given)
    path = Path(given)
    if not path.is_file():
        raise FileNotFoundError(
            f"prompts {given!r}: there is no such file; give a text file with one prompt a line, or a list"
        )
    lines = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    if not lines:
        raise ValueError(f"prompts {given!r}: the file has no line with a prompt")
    return lines
