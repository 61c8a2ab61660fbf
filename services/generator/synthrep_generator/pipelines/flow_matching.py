"""Transformers trained by flow matching, with CLIP and T5: Stable Diffusion 3 and FLUX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from synthrep_generator.pipelines.family import Embeddings, Family, Text, rows

_SD3_TOKENS = 256
_FLUX_TOKENS, _FLUX_DISTILLED_TOKENS = 512, 256


class StableDiffusion3(Family):
    """StableDiffusion3Pipeline: 3 and 3.5, with or without T5."""

    texts_at_once = 16

    def encode(self, texts: Sequence[Text]) -> list[Embeddings]:
        """See Family."""
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=[text.text for text in texts],
            prompt_2=None,
            prompt_3=None,
            device=self.pipeline.device,
            do_classifier_free_guidance=False,
            max_sequence_length=_SD3_TOKENS,
        )
        return rows(prompt_embeds=embeddings, pooled_prompt_embeds=pooled)

    def windows(self) -> list[tuple[Any, int]]:
        """See Family; where there is a T5, it is the one to take the whole caption."""
        if self.pipeline.text_encoder_3 is not None:
            return [(self.pipeline.tokenizer_3, _SD3_TOKENS)]
        return super().windows()


class Flux(Family):
    """FluxPipeline: schnell, and dev, which takes guidance as an input; neither steers away."""

    texts_at_once = 16

    @property
    def _tokens(self) -> int:
        has_guidance = self.denoiser.config.guidance_embeds
        return _FLUX_TOKENS if has_guidance else _FLUX_DISTILLED_TOKENS

    @property
    def step_px(self) -> int:
        """See Family; the pipeline makes the patches, so that the network's are of one."""
        return int(2 * self.pipeline.vae_scale_factor)

    def encode(self, texts: Sequence[Text]) -> list[Embeddings]:
        """See Family."""
        embeddings, pooled, _ = self.pipeline.encode_prompt(
            prompt=[text.text for text in texts],
            prompt_2=None,
            device=self.pipeline.device,
            max_sequence_length=self._tokens,
        )
        return rows(prompt_embeds=embeddings, pooled_prompt_embeds=pooled)

    def windows(self) -> list[tuple[Any, int]]:
        """See Family; CLIP gives a summary only, T5 takes the whole caption."""
        return [(self.pipeline.tokenizer_2, self._tokens)]

    def noise_shape(self, side_px: int) -> tuple[int, ...]:
        """See Family; the network sees patches of two by two."""
        channels, h, w = super().noise_shape(side_px)
        return (channels // 4, h, w)

    def latents_from_noise(self, noise: Tensor) -> Tensor:
        """(B, C, h, w) to (B, patches, 4 C)."""
        packed: Tensor = self.pipeline._pack_latents(noise, *noise.shape)
        return packed

    def grid_from_latents(self, latents: Tensor, side_px: int) -> Tensor:
        """(B, patches, 4 C) to (B, C, h, w)."""
        scale = self.pipeline.vae_scale_factor
        grid: Tensor = self.pipeline._unpack_latents(latents, side_px, side_px, scale)
        return grid
