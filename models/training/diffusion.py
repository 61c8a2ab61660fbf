"""The text-conditioned UNet of `tiny`: v-prediction on 8x8 latents, text encoder trained along.

The result is a `StableDiffusionPipeline` folder, so that it runs through the same lines as any
Stable Diffusion model.
"""

from __future__ import annotations

import json
import logging
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.training.autoencoder import LATENT_CHANNELS

logger = logging.getLogger(__name__)

MAX_TOKENS = 24
_TEXT_WIDTH = 96
_CAPTION_DROPOUT = 0.1
_CHECKPOINT_S = 300.0


def make_scheduler() -> DDIMScheduler:
    """Cosine noise schedule with v-prediction (Salimans & Ho 2022, arXiv 2202.00512)."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        steps_offset=1,  # the pipeline insists; trailing spacing does not read it
    )


class TextToLatents(nn.Module):
    """UNet and CLIP text encoder; forward predicts v for noisy latents."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=_TEXT_WIDTH,
                intermediate_size=4 * _TEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(80, 144),
            layers_per_block=1,
            norm_num_groups=16,
            attention_head_dim=4,
            cross_attention_dim=_TEXT_WIDTH,
        )

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        """v (B, C, 8, 8); `tokens` (K, 24) are distinct captions, `rows` (B,) picks one each."""
        text = self.text_encoder(tokens).last_hidden_state[rows]
        return self.unet(noisy, timesteps, encoder_hidden_states=text).sample


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids (N, 24), padded and cut as the pipeline does."""
    ids: Tensor = tokenizer(
        texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def train_diffusion(
    latents: Tensor,
    captions: list[list[str]],
    tokenizer: CLIPTokenizer,
    out: Path,
    *,
    minutes: float,
    max_steps: int | None = None,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
) -> TextToLatents:
    """Train on latents (2 flips, 2, N, C, 8, 8); `captions[i]` are the likely texts of image i.

    Returns the model with EMA weights. A budget of minutes (or steps) sets the cosine schedule;
    resumes from `out` with weights, EMA and moments, and writes there every five minutes.
    """
    torch.manual_seed(seed)
    model = TextToLatents(tokenizer)
    average = deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    progress = _resume(model, average, optimizer, out)
    generator = torch.Generator().manual_seed(seed + int(progress["steps"]))
    texts = sorted({t for choices in captions for t in choices} | {""})
    index = {t: i for i, t in enumerate(texts)}
    choice = torch.full((len(captions), max(map(len, captions))), -1)
    for i, choices in enumerate(captions):
        for k in range(choice.shape[1]):
            choice[i, k] = index[choices[k % len(choices)]]
    tokens = tokenize(tokenizer, texts)
    scheduler = make_scheduler()
    started = last_saved = time.monotonic()
    before_s, recent = progress["seconds"], []
    while True:
        now_s = before_s + time.monotonic() - started
        done = now_s / (60 * minutes) if max_steps is None else progress["steps"] / max_steps
        if done >= 1:
            break
        step = int(progress["steps"])
        for group in optimizer.param_groups:
            group["lr"] = (
                lr * min(1.0, (step + 1) / 300) * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * done)))
            )
        loss = diffusion_loss(
            model, scheduler, latents, choice, tokens, index[""], batch_size, generator
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress["steps"] += 1
        decay = min(0.9995, (step + 1) / (step + 20))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        recent.append(loss.item())
        if len(recent) == 200:
            seen = int(progress["steps"]) * batch_size
            logger.info(
                "diffusion step %d (%.1f min, %d images): loss %.4f",
                step + 1,
                now_s / 60,
                seen,
                np.mean(recent),
            )
            recent.clear()
        if time.monotonic() - last_saved > _CHECKPOINT_S:
            last_saved = time.monotonic()
            _save(model, average, optimizer, out, progress | {"seconds": now_s})
    _save(
        model,
        average,
        optimizer,
        out,
        progress | {"seconds": before_s + time.monotonic() - started},
    )
    return average.eval()


def diffusion_loss(
    model: TextToLatents,
    scheduler: DDIMScheduler,
    latents: Tensor,
    choice: Tensor,
    tokens: Tensor,
    empty: int,
    batch_size: int,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of v on a random batch, a tenth of the captions left empty."""
    rows = torch.randint(latents.shape[2], (batch_size,), generator=generator)
    flips = torch.randint(2, (batch_size,), generator=generator)
    mean, deviation = latents[flips, 0, rows], latents[flips, 1, rows]
    clean = mean + deviation * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    # Stratified over the batch, for a less noisy loss.
    spread = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
    timesteps = (spread * scheduler.config.num_train_timesteps).long()
    picked = choice[rows, torch.randint(choice.shape[1], (batch_size,), generator=generator)]
    picked[torch.rand(batch_size, generator=generator) < _CAPTION_DROPOUT] = empty
    distinct, back = picked.unique(return_inverse=True)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    wanted = scheduler.get_velocity(clean, noise, timesteps)
    return F.mse_loss(model(noisy, timesteps, tokens[distinct], back), wanted)


def _resume(
    model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, out: Path
) -> dict[str, float]:
    if not (out / "diffusion.json").exists():
        return {"steps": 0, "seconds": 0.0}
    model.load_state_dict(load_file(out / "diffusion.safetensors"))
    average.load_state_dict(load_file(out / "diffusion_ema.safetensors"))
    moments = load_file(out / "diffusion_moments.safetensors")
    progress: dict[str, float] = json.loads((out / "diffusion.json").read_text())
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(progress["steps"])),
            "exp_avg": moments[f"{name}.exp_avg"],
            "exp_avg_sq": moments[f"{name}.exp_avg_sq"],
        }
    return progress


def _save(
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    out: Path,
    progress: dict[str, float],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    moments = {
        f"{name}.{key}": optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()
        for key in ("exp_avg", "exp_avg_sq")
        if parameter in optimizer.state
    }
    for tensors, name in (
        (model.state_dict(), "diffusion"),
        (average.state_dict(), "diffusion_ema"),
        (moments, "diffusion_moments"),
    ):
        save_file(tensors, out / f"{name}.safetensors.part")
        (out / f"{name}.safetensors.part").rename(out / f"{name}.safetensors")
    (out / "diffusion.json").write_text(json.dumps(progress))


def make_pipeline(
    autoencoder: AutoencoderKL, model: TextToLatents, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The four parts as a `StableDiffusionPipeline` without a safety checker."""
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
