"""Tiny random pipelines of every class that the generator runs, built with no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

CLIP_TOKENS, WIDTH, LATENTS = 12, 32, 4
SIDE_PX = 32
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def clip_tokenizer(folder: Path) -> Any:
    """A byte-level CLIP tokenizer that knows letters and no merges."""
    tokens = [*_LETTERS, *(f"{c}</w>" for c in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=CLIP_TOKENS
    )


def t5_tokenizer() -> Any:
    """A unigram tokenizer of letters, kept as tokenizer.json."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in _LETTERS]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def gemma_tokenizer() -> Any:
    """A BPE tokenizer of letters with Gemma's special tokens."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "\n", *_LETTERS, *".,:-'>A"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return transformers.GemmaTokenizer(vocab=vocabulary, merges=[])


def _clip(tokenizer: Any, kind: type = transformers.CLIPTextModel, **changes: Any) -> Any:
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": CLIP_TOKENS,
        "projection_dim": WIDTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return kind(transformers.CLIPTextConfig(**values | changes))


def _t5(tokenizer: Any) -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2
        )
    )


def _unet(**changes: Any) -> Any:
    values = {
        "sample_size": 8,
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": WIDTH,
    }
    return diffusers.UNet2DConditionModel(**values | changes)


def _vae(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 8),
        "latent_channels": LATENTS,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "sample_size": SIDE_PX,
    }
    return diffusers.AutoencoderKL(**values | changes)


def _stable_diffusion(folder: Path, **scheduler: Any) -> Any:
    tokenizer = clip_tokenizer(folder / "source")
    return diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_2(folder: Path) -> Any:
    return _stable_diffusion(folder, prediction_type="v_prediction", timestep_spacing="trailing")


def _stable_diffusion_xl(folder: Path) -> Any:
    tokenizer = clip_tokenizer(folder / "source")
    second = transformers.CLIPTextModelWithProjection
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(latents_mean=[-4.0, 2.0, 0.0, 6.0], latents_std=[0.1, 3.0, 2.0, 0.5]),
        text_encoder=_clip(tokenizer),
        text_encoder_2=_clip(tokenizer, second),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(folder / "source"),
        unet=_unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def _latent_consistency(folder: Path) -> Any:
    tokenizer = clip_tokenizer(folder / "source")
    return diffusers.LatentConsistencyModelPipeline(
        vae=_vae(),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(time_cond_proj_dim=16),
        scheduler=diffusers.LCMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_3(folder: Path) -> Any:
    tokenizer, third = clip_tokenizer(folder / "source"), t5_tokenizer()
    clip = transformers.CLIPTextModelWithProjection
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=LATENTS,
            out_channels=LATENTS,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH * 2,
            caption_projection_dim=16,
            pooled_projection_dim=WIDTH * 2,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=_clip(tokenizer, clip),
        tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, clip),
        tokenizer_2=clip_tokenizer(folder / "source"),
        text_encoder_3=transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=len(third), d_model=2 * WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=2
            )
        ),
        tokenizer_3=third,
    )


def _flux(folder: Path, *, guidance_embeds: bool = False) -> Any:
    tokenizer, second = clip_tokenizer(folder / "source"), t5_tokenizer()
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=1.0, use_dynamic_shifting=guidance_embeds
        ),
        vae=_vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_t5(second),
        tokenizer_2=second,
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * LATENTS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance_embeds,
        ),
    )


def _flux_dev(folder: Path) -> Any:
    return _flux(folder, guidance_embeds=True)


def _pixart(folder: Path, kind: type = diffusers.PixArtAlphaPipeline) -> Any:
    tokenizer = t5_tokenizer()
    return kind(
        tokenizer=tokenizer,
        text_encoder=_t5(tokenizer),
        vae=_vae(),
        transformer=diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=LATENTS,
            out_channels=2 * LATENTS,
            num_layers=1,
            cross_attention_dim=16,
            sample_size=8,
            patch_size=2,
            caption_channels=WIDTH,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def _pixart_sigma(folder: Path) -> Any:
    return _pixart(folder, diffusers.PixArtSigmaPipeline)


def _sana(folder: Path) -> Any:
    tokenizer = gemma_tokenizer()
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.Gemma2Model(
            transformers.Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                max_position_embeddings=8192,
            )
        ),
        vae=diffusers.AutoencoderDC(
            in_channels=3,
            latent_channels=LATENTS,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "ResBlock"),
            decoder_block_types=("ResBlock", "ResBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            upsample_block_type="interpolate",
            downsample_block_type="stride_conv",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=LATENTS,
            out_channels=LATENTS,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            mlp_ratio=1.0,
            sample_size=16,
            patch_size=1,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


BUILDERS = {
    "sd15": _stable_diffusion,
    "sd21": _stable_diffusion_2,
    "sdxl": _stable_diffusion_xl,
    "lcm": _latent_consistency,
    "sd3": _stable_diffusion_3,
    "flux-schnell": _flux,
    "flux-dev": _flux_dev,
    "pixart": _pixart,
    "pixart-sigma": _pixart_sigma,
    "sana": _sana,
}


def save(kind: str, folder: Path) -> Path:
    """A random pipeline of the kind, saved as safetensors in `folder / kind`."""
    torch.manual_seed(0)
    target = folder / kind
    BUILDERS[kind](folder / f"{kind}-parts").save_pretrained(target)
    return target
