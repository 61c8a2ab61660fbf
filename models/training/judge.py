"""Figures that judge `tiny`: are its images what their caption says, varied, and no copies?"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from models.training.captioner import COLOURS, attributes
from models.training.captioner import captions as full_captions
from models.training.classifier import SmallResNet, predict, tensor_from_images
from models.training.photos import CLASSES

logger = logging.getLogger(__name__)

_GUIDANCE = (1.0, 2.0, 3.0, 4.0, 5.0)
_SHEET_GUIDANCE = 3.0
_STEPS = 15
_CAPTIONS, _PER_CAPTION = 100, 10
_BATCH = 100


def load(folder: Path) -> StableDiffusionPipeline:
    """The pipeline with the sampler that the demo uses."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, local_files_only=True
    )
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    guidance: float,
    seed: int,
    steps: int = _STEPS,
) -> np.ndarray:
    """One uint8 image (32, 32, 3) per prompt, image i with seed `seed + i`."""
    pictures = []
    for start in range(0, len(prompts), _BATCH):
        part = prompts[start : start + _BATCH]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        result = pipeline(
            part, guidance_scale=guidance, num_inference_steps=steps, generator=generators,
            height=32, width=32, output_type="np",
        )  # fmt: skip
        pictures.append((result.images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


@torch.inference_mode()
def embed(network: SmallResNet, images: np.ndarray) -> Tensor:
    """Unit features (N, D)."""
    tensor = tensor_from_images(images)
    return F.normalize(torch.cat([network.embed(b) for b in tensor.split(500)]), dim=1)


def spread_within(features: Tensor, groups: np.ndarray) -> float:
    """Mean pairwise distance between features of the same group, over groups of at least two."""
    means = []
    for group in np.unique(groups):
        rows = features[torch.from_numpy(groups == group)]
        if len(rows) > 1:
            means.append(float(torch.pdist(rows).mean()))
    return float(np.mean(means))


def judge(
    folder: Path,
    network: SmallResNet,
    photos: np.ndarray,
    labels: np.ndarray,
    measured: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    captions: list[str],
) -> dict[str, object]:
    """All figures; also writes the sample sheet `sheet.png` beside the model."""
    pipeline = load(folder)
    rng = np.random.default_rng(0)
    chosen = [captions[i] for i in sorted(rng.choice(len(captions), _CAPTIONS, replace=False))]
    real_spread = _real_spread(
        network, photos, full_captions(CLASSES, labels, measured), chosen, rng
    )
    reconstructed = _reconstruct(pipeline, test)
    by_guidance = {}
    for guidance in _GUIDANCE:
        pictures = draw(pipeline, [t for t in chosen for _ in range(_PER_CAPTION)], guidance, 1000)
        row = _figures_of_pictures(network, pictures, chosen, real_spread)
        row |= nearest_photo(pictures, photos, test)
        logger.info("guidance %.1f: %s", guidance, row)
        by_guidance[str(guidance)] = row
    sheet(pipeline, _SHEET_GUIDANCE).save(folder / "sheet.png")
    return {
        "classifier_on_real_test": _accuracy(network, test, test_labels),
        "classifier_on_reconstructed_test": _accuracy(network, reconstructed, test_labels),
        "reconstruction_mse_0_1": float(
            np.square((reconstructed.astype(float) - test) / 255).mean()
        ),
        "captions": len(captions),
        "spread_within_caption_real": real_spread,
        "by_guidance": by_guidance,
    }


def _real_spread(
    network: SmallResNet,
    photos: np.ndarray,
    texts: list[str],
    chosen: list[str],
    rng: np.random.Generator,
) -> float:
    """`spread_within` of up to ten random photos of each chosen caption."""
    by_text: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        by_text.setdefault(text, []).append(i)
    rows = [rng.permutation(by_text[text])[:_PER_CAPTION] for text in chosen]
    groups = np.repeat(np.arange(len(chosen)), [len(r) for r in rows])
    return spread_within(embed(network, photos[np.concatenate(rows)]), groups)


def _figures_of_pictures(
    network: SmallResNet, pictures: np.ndarray, chosen: list[str], real_spread: float
) -> dict[str, float]:
    """Do pictures, ten of each chosen caption, show what it says, and differ from each other?"""
    prompts = [text for text in chosen for _ in range(_PER_CAPTION)]
    wanted = np.array([_class_of(text) for text in prompts])
    backgrounds = [f", {COLOURS[b]} background" for b in attributes(pictures)[:, 1]]
    groups = np.repeat(np.arange(len(chosen)), _PER_CAPTION)
    spread = spread_within(embed(network, pictures), groups)
    return {
        "class_accuracy": _accuracy(network, pictures, wanted),
        "background_accuracy": float(
            np.mean([p.endswith(b) for p, b in zip(prompts, backgrounds, strict=True)])
        ),
        "spread_within_caption": spread,
        "spread_ratio": spread / real_spread,
    }


def _accuracy(network: SmallResNet, images: np.ndarray, labels: np.ndarray) -> float:
    return float((predict(network, tensor_from_images(images)).numpy() == labels).mean())


def _class_of(text: str) -> int:
    words = text.replace(",", "").split()
    return next(i for i, name in enumerate(CLASSES) if name in words)


@torch.inference_mode()
def _reconstruct(pipeline: StableDiffusionPipeline, images: np.ndarray) -> np.ndarray:
    out = []
    for batch in tensor_from_images(images).split(250):
        decoded = pipeline.vae.decode(pipeline.vae.encode(batch).latent_dist.mean).sample
        out.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(out)


def nearest_photo(
    pictures: np.ndarray, photos: np.ndarray, held_out: np.ndarray
) -> dict[str, float]:
    """Copies? RMS pixel distance (0-1) to the nearest training photo, held-out photos beside.

    A model that copies lies much nearer to its training photos than other photos of the kind do.
    """

    def nearest(images: np.ndarray) -> Tensor:
        x = torch.from_numpy(images.reshape(len(images), -1)).float() / 255
        best = torch.full((len(x),), float("inf"))
        for start in range(0, len(photos), 5000):
            y = torch.from_numpy(photos[start : start + 5000].reshape(-1, x.shape[1])).float() / 255
            best = torch.minimum(best, torch.cdist(x, y).min(1).values)
        return best / x.shape[1] ** 0.5

    generated, real = nearest(pictures[:500]), nearest(held_out[:500])
    return {
        "nearest_photo_rms_median": float(generated.median()),
        "nearest_photo_rms_min": float(generated.min()),
        "held_out_nearest_rms_median": float(real.median()),
        "held_out_nearest_rms_min": float(real.min()),
    }


def sheet(pipeline: StableDiffusionPipeline, guidance: float, columns: int = 16) -> Image.Image:
    """One row per class, each a different caption for the left and the right half."""
    halves = (("brown", "green"), ("white", "blue"))
    rows = []
    for name in CLASSES:
        prompts = [
            f"a {subject} {name}, {background} background"
            for subject, background in (halves[2 * k // columns] for k in range(columns))
        ]
        rows.append(np.concatenate(list(draw(pipeline, prompts, guidance, seed=7)), axis=1))
    picture = Image.fromarray(np.concatenate(rows, axis=0))
    return picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)
