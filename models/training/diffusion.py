"""The text-conditioned UNet of `tiny`: v-prediction on 8x8 latents, text encoder trained along.

The result is a `StableDiffusionPipeline` folder, so that it runs through the same lines as any
Stable Diffusion model.
"""

from __future__ import annotations

import json
import logging
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.training.autoencoder import LATENT_CHANNELS
from models.training.budget import Budget

logger = logging.getLogger(__name__)

MAX_TOKENS = 24
_TEXT_WIDTH = 96
_CAPTION_DROPOUT = 0.1
_EMA_DECAY = 0.9995
_EMPTY = 0  # row of the empty caption
_LOG_STEPS = 200


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


class CaptionTokens(NamedTuple):
    """The captions of a training set as rows of `tokens`."""

    tokens: Tensor
    """(K, 24), the distinct captions; the first is the empty one."""
    choices: Tensor
    """(N, choices) of rows: any of them may stand for the image."""


def caption_tokens(captions: list[list[str]], tokenizer: CLIPTokenizer) -> CaptionTokens:
    """Tokens of the captions, of which image i has `captions[i]`; shorter lists are repeated."""
    texts = sorted({text for choices in captions for text in choices} | {""})
    row = {text: i for i, text in enumerate(texts)}
    width = max(map(len, captions))
    rows = [[row[choices[k % len(choices)]] for k in range(width)] for choices in captions]
    return CaptionTokens(tokenize(tokenizer, texts), torch.tensor(rows))


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
    budget = Budget(out / "diffusion.json", minutes=minutes, max_steps=max_steps)
    if budget.steps:
        _resume(model, average, optimizer, out, budget.steps)
    generator = torch.Generator().manual_seed(seed + budget.steps)
    texts, scheduler = caption_tokens(captions, tokenizer), make_scheduler()
    recent: list[float] = []
    while budget.spent < 1:
        budget.set_lr(optimizer, lr, warmup_steps=300, floor=0.01)
        loss = diffusion_loss(model, scheduler, latents, texts, batch_size, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        budget.steps += 1
        _update_average(average, model, budget.steps)
        recent.append(loss.item())
        if len(recent) == _LOG_STEPS:
            logger.info(
                "diffusion step %d (%.1f min, %d images): loss %.4f",
                budget.steps, budget.seconds / 60, budget.steps * batch_size, np.mean(recent),
            )  # fmt: skip
            recent.clear()
        if budget.is_save_due():
            _save(model, average, optimizer, out, budget)
    _save(model, average, optimizer, out, budget)
    return average.eval()


def diffusion_loss(
    model: TextToLatents,
    scheduler: DDIMScheduler,
    latents: Tensor,
    texts: CaptionTokens,
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
    columns = torch.randint(texts.choices.shape[1], (batch_size,), generator=generator)
    picked = texts.choices[rows, columns]
    picked[torch.rand(batch_size, generator=generator) < _CAPTION_DROPOUT] = _EMPTY
    distinct, back = picked.unique(return_inverse=True)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    wanted = scheduler.get_velocity(clean, noise, timesteps)
    return F.mse_loss(model(noisy, timesteps, texts.tokens[distinct], back), wanted)


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, steps: int) -> None:
    decay = min(_EMA_DECAY, steps / (steps + 19))
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


def _resume(
    model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, out: Path, steps: int
) -> None:
    model.load_state_dict(load_file(out / "diffusion.safetensors"))
    average.load_state_dict(load_file(out / "diffusion_ema.safetensors"))
    moments = load_file(out / "diffusion_moments.safetensors")
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(steps)),
            "exp_avg": moments[f"{name}.exp_avg"],
            "exp_avg_sq": moments[f"{name}.exp_avg_sq"],
        }


def _save(
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    out: Path,
    budget: Budget,
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
    budget.save()


def start_from(weights: dict[str, Tensor], out: Path) -> None:
    """Write a checkpoint of one step with these weights and no momentum, for `train_diffusion`."""
    for name in ("diffusion", "diffusion_ema"):
        save_file(weights, out / f"{name}.safetensors")
    moments = {
        f"{name}.{key}": torch.zeros_like(tensor)
        for name, tensor in weights.items()
        for key in ("exp_avg", "exp_avg_sq")
    }
    save_file(moments, out / "diffusion_moments.safetensors")
    (out / "diffusion.json").write_text(json.dumps({"steps": 1, "seconds": 0.0}))


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
