"""Models that judge images on the device: a safety checker, and CLIP for image and caption.

Loaded once by the device process. They work in float32, on the bytes that are stored, in passes as
the images were made, so that a job that runs again gets the same verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

from synthrep_generator.errors import ModelFilesMissingError
from synthrep_generator.judge_files import SafetyFiles
from synthrep_generator.pipelines.parts import knows_words, load_network
from synthrep_generator.synthesis import Pixels


class SafetyChecker:
    """See quality_gate.SafetyJudge."""

    def __init__(self, files: SafetyFiles, *, device: str) -> None:
        """Raises ModelFilesMissingError."""
        self._device = _device(device)
        self._processor = _load(CLIPImageProcessor, files.processor)
        self._model = load_network(StableDiffusionSafetyChecker, files.checker, dtype=torch.float32)
        self._model.to(self._device).eval()

    @torch.inference_mode()
    def are_unsafe(self, images: Sequence[Pixels]) -> list[bool]:
        """See quality_gate.SafetyJudge."""
        inputs = self._processor(list(images), return_tensors="pt").to(self._device)
        # The second argument is what the checker blackens; it needs no more than the number.
        _, marks = self._model(clip_input=inputs.pixel_values, images=[*images])
        return [bool(mark) for mark in marks]


class ClipScorer:
    """See quality_gate.CaptionJudge; a caption is cut to the text encoder's window."""

    def __init__(self, folder: Path, *, device: str) -> None:
        """Raises ModelFilesMissingError."""
        self._device = _device(device)
        self._processor = _load(CLIPImageProcessor, folder)
        self._tokenizer = _load(CLIPTokenizerFast, folder)
        if not knows_words(self._tokenizer):
            raise ModelFilesMissingError(f"the tokenizer of {folder} knows no words")
        self._model = load_network(CLIPModel, folder, dtype=torch.float32)
        self._model.to(self._device).eval()

    @torch.inference_mode()
    def scores(self, images: Sequence[Pixels], captions: Sequence[str]) -> list[float]:
        """See quality_gate.CaptionJudge."""
        pixels = self._processor(list(images), return_tensors="pt").to(self._device)
        texts = list(dict.fromkeys(captions))
        tokens = self._tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        of_images = self._model.get_image_features(**pixels).pooler_output
        of_texts = self._model.get_text_features(**tokens).pooler_output
        rows = torch.tensor([texts.index(caption) for caption in captions], device=self._device)
        cosines: list[float] = F.cosine_similarity(of_images, of_texts[rows]).tolist()
        return cosines


def _load(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what a damaged file leads to is any error
        raise ModelFilesMissingError(f"cannot load {folder}: {error}") from error


def _device(name: str) -> torch.device:
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
