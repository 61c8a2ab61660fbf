"""Transformers that read captions by a language model alone: PixArt and Sana."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from synthrep_generator.pipelines.family import Embeddings, Family, Text, rows
from synthrep_generator.synthesis import CaptionFit, Recipe

_SANA_TOKENS = 300
# Captions, sizes and embeddings are taken as they come, nothing in their place.
_AS_GIVEN = {"use_resolution_binning": False, "clean_caption": False, "negative_prompt": None}


class PixArt(Family):
    """PixArtAlphaPipeline: T5 of 120 tokens."""

    texts_at_once = 16
    tokens: ClassVar[int] = 120
    least_dpm_steps: ClassVar[int] = 2
    step_argument = "callback"
    arguments: ClassVar[dict[str, Any]] = _AS_GIVEN

    def encode(self, texts: Sequence[Text]) -> list[Embeddings]:
        """See Family."""
        embeddings, mask, _, _ = self.pipeline.encode_prompt(
            [text.text for text in texts],
            do_classifier_free_guidance=False,
            device=self.pipeline.device,
            clean_caption=False,
            max_sequence_length=self.tokens,
        )
        return rows(prompt_embeds=embeddings, prompt_attention_mask=mask)

    def windows(self) -> list[tuple[Any, int]]:
        """See Family."""
        return [(self.pipeline.tokenizer, self.tokens)]

    def fit(self, prompt: str) -> CaptionFit:
        """See Family; the pipeline writes captions in small letters."""
        return super().fit(prompt.lower().strip())

    def refusal(self, recipe: Recipe) -> str | None:
        """See Family; of a single step the pipeline takes what dpm++ does not give."""
        if recipe.scheduler == "dpm++" and recipe.num_inference_steps < self.least_dpm_steps:
            return f"the scheduler dpm++ takes at least {self.least_dpm_steps} steps on this model"
        return super().refusal(recipe)


class PixArtSigma(PixArt):
    """PixArtSigmaPipeline: T5 of 300 tokens."""

    tokens = 300
    least_dpm_steps = 1


class Sana(Family):
    """SanaPipeline: Gemma, told to enrich the caption; latents of an AutoencoderDC."""

    texts_at_once = 16
    encodes_in_fp16 = False
    arguments: ClassVar[dict[str, Any]] = {**Family.arguments, **_AS_GIVEN}

    @property
    def noise_dtype(self) -> torch.dtype:
        """See Family; its pipeline keeps latents in fp32."""
        return torch.float32

    def encode(self, texts: Sequence[Text]) -> list[Embeddings]:
        """See Family; negative prompts go without the instruction."""
        found: dict[Text, Embeddings] = {}
        for is_negative in {text.is_negative for text in texts}:
            some = [text for text in texts if text.is_negative == is_negative]
            embeddings, mask, _, _ = self.pipeline.encode_prompt(
                [text.text for text in some],
                do_classifier_free_guidance=False,
                device=self.pipeline.device,
                max_sequence_length=_SANA_TOKENS,
                complex_human_instruction=None if is_negative else self._instruction(),
            )
            bundles = rows(prompt_embeds=embeddings, prompt_attention_mask=mask)
            found.update(zip(some, bundles, strict=True))
        return [found[text] for text in texts]

    def fit(self, prompt: str) -> CaptionFit:
        """See Family; the instruction before the caption has its own room."""
        instruction = "\n".join(self._instruction())
        tokenizer = self.pipeline.tokenizer
        both = len(tokenizer.encode(instruction + prompt.lower().strip()))
        alone = len(tokenizer.encode(instruction))
        marks = 2  # that the pipeline counts twice
        return CaptionFit(both - alone + marks, _SANA_TOKENS)

    def _instruction(self) -> list[str]:
        parameters = inspect.signature(type(self.pipeline).__call__).parameters
        instruction: list[str] = parameters["complex_human_instruction"].default
        return instruction
