"""Make the `tiny` text-to-image model: `python -m models.training.train_tiny --data FOLDER`.

Stages, each skipped when its result lies in `--out` already: perceptual network, autoencoder,
latents and captions, diffusion, pipeline folder, judgement. Every stage resumes.

    perceptual 2 min, autoencoder 35 min, diffusion 90 min, judge 5 min, on one core

`--data` is a folder with `generator/cifar10_train.tar.xz` and `probe/cifar10/test.tar.xz`;
`--bpe` is CLIP's `bpe_simple_vocab_16e6.txt.gz` as the package open-clip-torch carries it.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.training.autoencoder import (
    encode_all,
    make_autoencoder,
    normalise_latents,
    train_autoencoder,
)
from models.training.captioner import COLOURS, attributes, caption, captions
from models.training.classifier import SmallResNet, train_classifier
from models.training.diffusion import (
    MAX_TOKENS,
    TextToLatents,
    make_pipeline,
    start_from,
    train_diffusion,
)
from models.training.judge import judge
from models.training.photos import CLASSES, load_photos
from models.training.vocabulary import make_tokenizer

logger = logging.getLogger(__name__)

_WORDS = (
    *CLASSES, *COLOURS, "a", "an", "close", "up", "of", "background", "photo", "the", "in", "on",
    "with", "-", ",",
)  # fmt: skip
_RARE = 20  # captions of fewer photos lose their attributes one by one
_PERCEPTUAL_WIDTH, _JUDGE_WIDTH = 16, 24


def caption_choices(labels: np.ndarray, measured: np.ndarray) -> list[list[str]]:
    """Four texts of each photo: three times its full caption, once one with attributes left out.

    A full caption that fewer than 20 photos have is left to the shorter ones.
    """
    keys = [(int(label), *map(int, row)) for label, row in zip(labels, measured, strict=True)]
    full = Counter(keys)
    choices: list[list[str]] = []
    for key in keys:
        label, subject, background, close = key
        name = CLASSES[label]
        shorter = [
            caption(name),
            caption(name, subject),
            caption(name, None, background),
            caption(name, subject, background),
        ][len(choices) % 4]
        whole = caption(name, subject, background, bool(close))
        choices.append([whole] * 3 + [shorter] if full[key] >= _RARE else [shorter] * 4)
    return choices


def common_captions(labels: np.ndarray, measured: np.ndarray) -> list[tuple[str, int]]:
    """Distinct full captions of at least 20 photos, with their number, most frequent first."""
    counts = Counter(captions(CLASSES, labels, measured))
    return [(text, count) for text, count in counts.most_common() if count >= _RARE]


def _network(
    path: Path, images: np.ndarray, labels: np.ndarray, width: int, epochs: int, seed: int
) -> SmallResNet:
    if not path.exists():
        save_file(
            train_classifier(images, labels, width=width, epochs=epochs, seed=seed).state_dict(),
            path,
        )
    model = SmallResNet(len(CLASSES), width)
    model.load_state_dict(load_file(path))
    return model.eval()


def _normalised(
    images: np.ndarray, network: SmallResNet, out: Path, minutes: float
) -> tuple[AutoencoderKL, Tensor]:
    """The trained autoencoder with unit-variance latents, and the latents of all photos."""
    done = out / "autoencoder_normalised.safetensors"
    model = make_autoencoder()
    if not done.exists():
        model = train_autoencoder(images, network, out / "autoencoder", minutes=minutes)
        latents = normalise_latents(model, encode_all(model, images))
        save_file(model.state_dict(), done)
        return model, latents
    model.load_state_dict(load_file(done))
    return model.eval(), encode_all(model, images)


def main() -> None:
    """Run the stages that are missing."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    options.model.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    images, labels = load_photos(options.data / "generator" / "cifar10_train.tar.xz", len(CLASSES))
    measured = attributes(images)
    if options.stage in ("all", "train"):
        if options.continue_from:
            _seed(options.continue_from, options.out)
        _train(options, images, labels, measured)
    if options.stage in ("all", "judge"):
        _judge(options, images, labels, measured)


def _train(
    options: argparse.Namespace, images: np.ndarray, labels: np.ndarray, measured: np.ndarray
) -> None:
    perceptual = options.out / "perceptual.safetensors"
    network = _network(perceptual, images, labels, _PERCEPTUAL_WIDTH, epochs=5, seed=1)
    autoencoder, latents = _normalised(images, network, options.out, options.autoencoder_minutes)
    tokenizer = make_tokenizer(options.bpe, list(_WORDS), MAX_TOKENS, options.out / "tokenizer")
    model: TextToLatents = train_diffusion(
        latents,
        caption_choices(labels, measured),
        tokenizer,
        options.out / "diffusion",
        minutes=options.diffusion_minutes,
    )
    lines = [f"{text}\t{count}\n" for text, count in common_captions(labels, measured)]
    (options.model / "captions.tsv").write_text("".join(lines))
    make_pipeline(autoencoder, model, tokenizer).save_pretrained(options.model, variant=None)
    _halve(options.model)


def _judge(
    options: argparse.Namespace, images: np.ndarray, labels: np.ndarray, measured: np.ndarray
) -> None:
    test, test_labels = load_photos(options.data / "probe/cifar10/test.tar.xz", len(CLASSES))
    examiner_file = options.out / "judge.safetensors"
    examiner = _network(examiner_file, images, labels, _JUDGE_WIDTH, epochs=4, seed=2)
    common = [text for text, _ in common_captions(labels, measured)]
    figures = judge(options.model, examiner, images, labels, measured, test, test_labels, common)
    (options.model / "judgement.json").write_text(json.dumps(figures, indent=1) + "\n")


def _seed(model: Path, out: Path) -> None:
    """Start from the weights of a pipeline folder where `out` has none of its own."""
    if (out / "diffusion" / "diffusion.json").exists():
        return
    (out / "diffusion").mkdir(parents=True, exist_ok=True)
    vae = load_file(model / "vae" / "diffusion_pytorch_model.safetensors")
    save_file({k: v.float() for k, v in vae.items()}, out / "autoencoder_normalised.safetensors")
    parts = {"text_encoder": "model", "unet": "diffusion_pytorch_model"}
    weights = {
        f"{part}.{name}": tensor.float()
        for part, file in parts.items()
        for name, tensor in load_file(model / part / f"{file}.safetensors").items()
    }
    start_from(weights, out / "diffusion")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bpe", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--model", type=Path, default=Path("models/tiny"))
    parser.add_argument("--autoencoder-minutes", type=float, default=35)
    parser.add_argument("--diffusion-minutes", type=float, default=90)
    parser.add_argument("--stage", choices=("all", "train", "judge"), default="all")
    parser.add_argument(
        "--continue-from", type=Path, help="pipeline folder whose weights to start from"
    )
    return parser.parse_args()


def _halve(folder: Path) -> None:
    """Store the weights of a pipeline folder as fp16."""
    for path in folder.glob("*/*.safetensors"):
        save_file(
            {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()},
            path,
            metadata={"format": "pt"},
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
