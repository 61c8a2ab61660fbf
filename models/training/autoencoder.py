"""The KL autoencoder of `tiny`: 32 px photos to 8x8 latents of near unit variance, and back."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from models.training.budget import Budget
from models.training.classifier import SmallResNet, tensor_from_images

logger = logging.getLogger(__name__)

LATENT_CHANNELS = 6
_KL_WEIGHT = 1e-5
_PERCEPTUAL_WEIGHT = 0.25
_LOG_STEPS = 200


def make_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder, about 1 M parameters, downsampling by 4."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
    )


def perceptual_distance(network: SmallResNet, images: Tensor, reference: Tensor) -> Tensor:
    """LPIPS-like distance: squared difference of channel-normalised maps, mean over stages."""
    with torch.no_grad():
        wanted = network.features(reference)
    got = network.features(images)
    return torch.stack(
        [
            (F.normalize(g, dim=1) - F.normalize(w, dim=1)).square().sum(1).mean()
            for g, w in zip(got, wanted, strict=True)
        ]
    ).mean()


def train_autoencoder(
    images: np.ndarray,
    network: SmallResNet,
    out: Path,
    *,
    minutes: float,
    max_steps: int | None = None,
    batch_size: int = 64,
    lr: float = 1.5e-3,
    seed: int = 0,
) -> AutoencoderKL:
    """Train for a budget of minutes (or steps) with L1, perceptual and KL terms, from `out` on.

    The learning rate follows a cosine over the budget. The weights are written every five minutes;
    the optimizer's moments are not, a resumed training gathers them anew.
    """
    torch.manual_seed(seed)
    model = make_autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    network = network.eval().requires_grad_(False)
    budget = Budget(out / "autoencoder.json", minutes=minutes, max_steps=max_steps)
    if budget.steps:
        model.load_state_dict(load_file(out / "autoencoder.safetensors"))
    generator = torch.Generator().manual_seed(seed + budget.steps)
    recent: list[Tensor] = []
    while budget.spent < 1:
        budget.set_lr(optimizer, lr, warmup_steps=200, floor=0.02)
        rows = torch.randint(len(images), (batch_size,), generator=generator).numpy()
        batch = tensor_from_images(images[rows])
        terms = _loss_terms(model, network, batch.flip(3) if budget.steps % 2 else batch, generator)
        optimizer.zero_grad()
        (terms * torch.tensor([1.0, _PERCEPTUAL_WEIGHT, _KL_WEIGHT])).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        budget.steps += 1
        recent.append(terms.detach())
        if len(recent) == _LOG_STEPS:
            logger.info(
                "autoencoder step %d (%.1f min): l1 %.4f perceptual %.4f kl %.1f",
                budget.steps,
                budget.seconds / 60,
                *torch.stack(recent).mean(0).tolist(),
            )
            recent.clear()
        if budget.is_save_due():
            _save(model, out, budget)
    _save(model, out, budget)
    return model.eval()


def _loss_terms(
    model: AutoencoderKL, network: SmallResNet, batch: Tensor, generator: torch.Generator
) -> Tensor:
    """L1, perceptual distance and KL of a batch (B, 3, 32, 32), as one tensor (3,)."""
    posterior = model.encode(batch).latent_dist
    decoded = model.decode(posterior.sample(generator=generator)).sample
    l1 = (decoded - batch).abs().mean()
    return torch.stack([l1, perceptual_distance(network, decoded, batch), posterior.kl().mean()])


def _save(model: AutoencoderKL, out: Path, budget: Budget) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), out / "autoencoder.safetensors.part")
    (out / "autoencoder.safetensors.part").rename(out / "autoencoder.safetensors")
    budget.save()


@torch.inference_mode()
def encode_all(model: AutoencoderKL, images: np.ndarray, batch_size: int = 500) -> Tensor:
    """Posterior mean and deviation of every image and its mirror: (2 flips, 2, N, C, 8, 8)."""
    flips = []
    for flip in (False, True):
        means, deviations = [], []
        for start in range(0, len(images), batch_size):
            batch = tensor_from_images(images[start : start + batch_size])
            posterior = model.encode(batch.flip(3) if flip else batch).latent_dist
            means.append(posterior.mean)
            deviations.append(posterior.std)
        flips.append(torch.stack([torch.cat(means), torch.cat(deviations)]))
    return torch.stack(flips)


@torch.no_grad()
def normalise_latents(model: AutoencoderKL, latents: Tensor) -> Tensor:
    """Fold an affine map per channel into the model, for latents of zero mean and unit variance.

    `latents` are those of `encode_all`; returns them mapped. The encoder's 1x1 `quant_conv` gives
    (mean, log variance) and the decoder's 1x1 `post_quant_conv` reads the sample, so
    z -> (z - mu) / sigma is exact in both: Stable Diffusion's layout has one scaling factor only.
    """
    mu = latents[0, 0].mean((0, 2, 3))
    sigma = (latents[0, 0].var((0, 2, 3)) + latents[0, 1].square().mean((0, 2, 3))).sqrt()
    channels = len(mu)
    quant, post = model.quant_conv, model.post_quant_conv
    quant.weight[:channels] /= sigma[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mu) / sigma
    quant.bias[channels:] -= 2 * sigma.log()
    post.bias += (post.weight[:, :, 0, 0] * mu).sum(1)
    post.weight *= sigma[None, :, None, None]
    shape = (1, channels, 1, 1)
    return torch.stack(
        [
            torch.stack([(f[0] - mu.view(shape)) / sigma.view(shape), f[1] / sigma.view(shape)])
            for f in latents
        ]
    )
