"""Models with a UNet and CLIP: Stable Diffusion 1 and 2, XL, latent consistency models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from synthrep_generator.pipelines.family import Embeddings, Family, Text, rows
from synthrep_generator.synthesis import Recipe


class StableDiffusion(Family):
    """StableDiffusionPipeline: 1.x, 2.x with either prediction type, and their distillations."""

    def encode(self, texts: Sequence[Text]) -> list[Embeddings]:
        """See Family."""
        prompts = [text.text for text in texts]
        embeddings, _ = self.pipeline.encode_prompt(prompts, self.pipeline.device, 1, False)
        return rows(prompt_embeds=embeddings)


class LatentConsistency(StableDiffusion):
    """LatentConsistencyModelPipeline: guidance is an input of the network, in few steps."""


class StableDiffusionXL(Family):
    """StableDiffusionXLPipeline: base, Turbo, Lightning."""

    def encode(self, texts: Sequence[Text]) -> list[Embeddings]:
        """See Family. An empty negative prompt is zeros where the model was trained so."""
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=[text.text for text in texts],
            device=self.pipeline.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        found = rows(prompt_embeds=embeddings, pooled_prompt_embeds=pooled)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            found = [
                {key: torch.zeros_like(value) for key, value in bundle.items()}
                if text == Text("", is_negative=True)
                else bundle
                for text, bundle in zip(texts, found, strict=True)
            ]
        return found

    def windows(self) -> list[tuple[Any, int]]:
        """See Family."""
        tokenizers = (self.pipeline.tokenizer, self.pipeline.tokenizer_2)
        return [(each, each.model_max_length) for each in tokenizers if each is not None]

    def needs_negative(self, recipe: Recipe) -> bool:
        """See Family; a network that takes guidance as an input makes no second pass."""
        is_distilled = self.denoiser.config.time_cond_proj_dim is not None
        return super().needs_negative(recipe) and not is_distilled
