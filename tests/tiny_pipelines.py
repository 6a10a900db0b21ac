"""diffusers pipelines with tiny configurations and random weights, saved as folders that `from_pretrained` loads.

Every builder takes an empty folder, writes a pipeline into it with `save_pretrained` and returns the folder; a seed fixes the
weights. The components are the real ones (diffusers' networks and AutoencoderKL, transformers' CLIP and T5), small enough for
a step to take milliseconds: latents of 8 x 8, images of 16 x 16 pixels. In a test, the fixture `tiny_folder` builds each once.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

SIZE = 16  # pixels of an image; latents have half of it
WIDTH = 32  # of the text embeddings
_LETTERS = [chr(c) for c in range(33, 127)]
_START, _END = "<|startoftext|>", "<|endoftext|>"
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def ddpm(folder: Path) -> Path:
    """`DDPMPipeline`: an unconditional network on pixels, 3 x 16 x 16, with a DDPM scheduler."""
    unet = _made(
        lambda: diffusers.UNet2DModel(
            sample_size=SIZE,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )
    return _saved(diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(clip_sample=False)), folder)


def stable_diffusion(folder: Path) -> Path:
    """`StableDiffusionPipeline` as version 1.5 has it: CLIP, AutoencoderKL, scaled-linear betas, PNDM."""
    return _saved(diffusers.StableDiffusionPipeline(**_sd_parts(), requires_safety_checker=False), folder)


def inpaint(folder: Path) -> Path:
    """`StableDiffusionInpaintPipeline` with a network for it: 9 channels in, the mask and the masked image beside the latents.

    The 4-channel kind is `stable_diffusion`, loaded as this pipeline.
    """
    return _saved(
        diffusers.StableDiffusionInpaintPipeline(**_sd_parts(in_channels=9), requires_safety_checker=False), folder
    )


def upscale(folder: Path) -> Path:
    """`StableDiffusionUpscalePipeline`: v-prediction, a 16 x 16 image beside the latents, its noise level as a class."""
    parts = _sd_parts(in_channels=7, num_class_embeds=50)
    parts["vae"].register_to_config(scaling_factor=0.08333)  # which the pipeline insists on
    parts["scheduler"] = diffusers.DDIMScheduler(
        **_BETAS, steps_offset=1, clip_sample=False, prediction_type="v_prediction"
    )
    low = diffusers.DDPMScheduler(**_BETAS)
    for absent in ("safety_checker", "feature_extractor"):
        parts.pop(absent)
    return _saved(diffusers.StableDiffusionUpscalePipeline(**parts, low_res_scheduler=low, max_noise_level=49), folder)


def controlnet(folder: Path) -> Path:
    """`StableDiffusionControlNetPipeline`: the controlling image is 3 x 16 x 16 and its residuals are not zero."""
    parts = _sd_parts()
    net = _made(
        lambda: diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 8)), seed=1
    )
    return _saved(
        diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=net, requires_safety_checker=False), folder
    )


def stable_diffusion_xl(folder: Path) -> Path:
    """`StableDiffusionXLPipeline`: two text encoders, pooled embeddings and sizes as added conditions, Euler."""
    unet = _unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
    )
    return _saved(
        diffusers.StableDiffusionXLPipeline(
            vae=_vae(),
            unet=unet,
            text_encoder=_clip(),
            text_encoder_2=_clip(projected=True),
            tokenizer=_clip_tokenizer(),
            tokenizer_2=_clip_tokenizer(),
            scheduler=diffusers.EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading", steps_offset=1),
            add_watermarker=False,
        ),
        folder,
    )


def stable_diffusion_xl_refiner(folder: Path) -> Path:
    """`StableDiffusionXLImg2ImgPipeline` as the refiner of SDXL: the second encoder alone, an aesthetic score among the sizes."""
    unet = _unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + WIDTH,
        use_linear_projection=True,
        seed=2,
    )
    return _saved(
        diffusers.StableDiffusionXLImg2ImgPipeline(
            vae=_vae(),
            unet=unet,
            text_encoder=None,
            text_encoder_2=_clip(projected=True),
            tokenizer=None,
            tokenizer_2=_clip_tokenizer(),
            scheduler=diffusers.EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading", steps_offset=1),
            requires_aesthetics_score=True,
            add_watermarker=False,
        ),
        folder,
    )


def dit(folder: Path) -> Path:
    """`DiTPipeline`: class-conditional, 1000 classes, learned variance (8 channels out), DDIM on linear betas."""
    net = _made(
        lambda: diffusers.DiTTransformer2DModel(
            sample_size=SIZE // 2,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            num_embeds_ada_norm=1000,
        )
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, steps_offset=0)
    return _saved(diffusers.DiTPipeline(net, _vae(), scheduler), folder)


def sd3(folder: Path) -> Path:
    """`StableDiffusion3Pipeline`: flow matching with shift 3, two CLIP encoders and a T5."""
    net = _made(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=SIZE // 2,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=2 * WIDTH,
        )
    )
    return _saved(
        diffusers.StableDiffusion3Pipeline(
            transformer=net,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(shift_factor=0.06),
            text_encoder=_clip(projected=True),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_clip(projected=True, seed=3),
            tokenizer_2=_clip_tokenizer(),
            text_encoder_3=_t5(2 * WIDTH),
            tokenizer_3=_t5_tokenizer(),
        ),
        folder,
    )


def flux(folder: Path) -> Path:
    """`FluxPipeline`: flow matching on packed latents, dynamic shift, embedded guidance, CLIP and a T5 encoder."""
    net = _made(
        lambda: diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        )
    )
    return _saved(
        diffusers.FluxPipeline(
            transformer=net,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
                shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
            ),
            vae=_vae(shift_factor=0.06),
            text_encoder=_clip(),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_t5(WIDTH),
            tokenizer_2=_t5_tokenizer(),
        ),
        folder,
    )


def pixart(folder: Path) -> Path:
    """`PixArtSigmaPipeline`: cross-attention to a T5's embeddings under a mask, learned variance, linear betas."""
    net = _made(
        lambda: diffusers.PixArtTransformer2DModel(
            sample_size=SIZE // 2,
            patch_size=2,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
        )
    )
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return _saved(diffusers.PixArtSigmaPipeline(_t5_tokenizer(), _t5(WIDTH), _vae(), net, scheduler), folder)


def auraflow(folder: Path) -> Path:
    """`AuraFlowPipeline`: flow matching with a shift, joint attention to the embeddings of a UMT5."""
    net = _made(
        lambda: diffusers.AuraFlowTransformer2DModel(
            sample_size=SIZE // 2,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=16,
            pos_embed_max_size=64,
        )
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    encoder = _t5(WIDTH, transformers.UMT5EncoderModel, transformers.UMT5Config)
    return _saved(diffusers.AuraFlowPipeline(_t5_tokenizer(), encoder, _vae(), net, scheduler), folder)


def animatediff(folder: Path) -> Path:
    """`AnimateDiffPipeline`: a Stable Diffusion network with a motion adapter, on latents (B, 4, frames, 8, 8)."""
    motion = _made(
        lambda: diffusers.MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_norm_num_groups=4,
            motion_num_attention_heads=2,
            motion_max_seq_length=8,
            use_motion_mid_block=False,
        )
    )
    parts = _sd_parts()
    parts["scheduler"] = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1)
    parts.pop("safety_checker")
    return _saved(diffusers.AnimateDiffPipeline(**parts, motion_adapter=motion), folder)


def _sd_parts(**unet: Any) -> dict[str, Any]:
    scheduler = diffusers.PNDMScheduler(**_BETAS, skip_prk_steps=True, steps_offset=1)
    return {
        "vae": _vae(),
        "unet": _unet(**unet),
        "text_encoder": _clip(),
        "tokenizer": _clip_tokenizer(),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
    }


def _unet(seed: int = 0, **options: Any) -> UNet2DConditionModel:
    usual: dict[str, Any] = {
        "sample_size": SIZE // 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
    }
    return _made(lambda: UNet2DConditionModel(**{**usual, **options}), seed)


def _vae(**options: Any) -> AutoencoderKL:
    return _made(
        lambda: AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
            sample_size=SIZE,
            **options,
        )
    )


def _clip(projected: bool = False, seed: int = 0) -> nn.Module:
    words = _vocabulary()
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=37,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=words[_START],
        eos_token_id=words[_END],
        pad_token_id=words[_END],
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return _made(lambda: kind(config), seed)


def _vocabulary() -> dict[str, int]:
    words = [*_LETTERS, *(letter + "</w>" for letter in _LETTERS), "ca", "cat</w>", _START, _END]
    return {word: number for number, word in enumerate(words)}


def _clip_tokenizer() -> Any:
    """A byte-level BPE tokenizer of printable ASCII that knows one word, "cat", read from files as a published one is."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "vocab.json").write_text(json.dumps(_vocabulary()))
        (Path(name) / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
        return transformers.CLIPTokenizer.from_pretrained(name, model_max_length=77, local_files_only=True)


def _t5(width: int, kind: Any = transformers.T5EncoderModel, settings: Any = transformers.T5Config) -> nn.Module:
    config = settings(vocab_size=128, d_model=width, d_kv=8, d_ff=37, num_layers=1, num_heads=2, dropout_rate=0.0)
    return _made(lambda: kind(config))


def _t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(letter, -3.0) for letter in _LETTERS if letter not in "<>"]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=77)


def _made(build: Callable[[], nn.Module], seed: int = 0) -> Any:
    """A module with the weights of a seed, in which layers that start at zero (those of residual branches) have weights too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build()
        for weight in module.parameters():
            if weight.ndim > 1 and not weight.any():
                nn.init.normal_(weight, std=0.2)
    return module.eval()


def _saved(pipeline: diffusers.DiffusionPipeline, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder
