"""Models that judge images on the device: a safety checker, and CLIP for image and caption.

Loaded once by the device process. They work in float32, on the bytes that are stored, in passes as
the images were made, so that a job that runs again gets the same verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

from synthrep_generator.errors import ModelFilesMissingError
from synthrep_generator.judge_files import SafetyFiles
from synthrep_generator.synthesis import Pixels


class SafetyChecker:
    """See quality_gate.SafetyJudge."""

    def __init__(self, files: SafetyFiles, *, device: str) -> None:
        """Raises ModelFilesMissingError."""
        self._device = _device(device)
        try:
            self._processor = CLIPImageProcessor.from_pretrained(
                files.processor, local_files_only=True
            )
            self._model = StableDiffusionSafetyChecker.from_pretrained(
                files.checker, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise ModelFilesMissingError(f"cannot load {files.checker}: {error}") from error
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
        try:
            self._processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
            self._tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
            self._model = CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise ModelFilesMissingError(f"cannot load {folder}: {error}") from error
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


def _device(name: str) -> torch.device:
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
