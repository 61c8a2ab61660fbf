"""Family: one kind of text-to-image pipeline, from captions and noise to images.

Captions become embeddings once and are kept by the caller; noise comes from the caller, one
generator for each image, so that pixels depend on their batch mates by rounding only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from synthrep_generator.pipeline_kinds import KINDS
from synthrep_generator.pipelines.samplers import make_scheduler, max_steps
from synthrep_generator.synthesis import CaptionFit, Recipe

Embeddings = dict[str, Tensor]  # arguments of the pipeline for one caption, without a batch axis


class Text(NamedTuple):
    """What is encoded: a caption, or the text to steer away from."""

    text: str
    is_negative: bool = False


class Family(ABC):
    """Base of the adapters; what it does fits a latent diffusion model with a UNet or transformer.

    Legend: `B` images, `C` channels, `h`, `w` sides of latents.
    """

    texts_at_once: ClassVar[int] = 256
    encodes_in_fp16: ClassVar[bool] = True  # or its numbers grow too large for that
    step_argument: ClassVar[str] = "callback_on_step_end"
    arguments: ClassVar[dict[str, Any]] = {"callback_on_step_end_tensor_inputs": []}

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.kind = KINDS[type(pipeline).__name__]
        self._scheduler_config = pipeline.scheduler.config

    @property
    def denoiser(self) -> Any:
        """The network that is called at each step."""
        return getattr(self.pipeline, "unet", None) or self.pipeline.transformer

    @property
    def noise_dtype(self) -> torch.dtype:
        """Number format of noise and latents."""
        dtype: torch.dtype = self.denoiser.dtype
        return dtype

    @property
    def step_px(self) -> int:
        """What the side of an image must be a multiple of: a patch of latents."""
        patch: int = self.denoiser.config.get("patch_size") or 1
        return int(self.pipeline.vae_scale_factor * patch)

    @abstractmethod
    def encode(self, texts: Sequence[Text]) -> list[Embeddings]:
        """Embeddings of the texts, in order."""

    def windows(self) -> list[tuple[Any, int]]:
        """(tokenizer, tokens that it may give) of each encoder that must take the whole caption."""
        return [(self.pipeline.tokenizer, self.pipeline.tokenizer.model_max_length)]

    def fit(self, prompt: str) -> CaptionFit:
        """The caption's length in the encoder that takes least of it."""
        fits = [
            CaptionFit(len(tokenizer(prompt).input_ids), window)
            for tokenizer, window in self.windows()
        ]
        return max(fits, key=lambda fit: fit.tokens - fit.window)

    def noise_shape(self, side_px: int) -> tuple[int, ...]:
        """(C, h, w) of the noise of one image."""
        side = side_px // self.pipeline.vae_scale_factor
        return (self.denoiser.config.in_channels, side, side)

    def latents_from_noise(self, noise: Tensor) -> Tensor:
        """Noise (B, C, h, w) as the pipeline takes it."""
        return noise

    def grid_from_latents(self, latents: Tensor, side_px: int) -> Tensor:
        """Latents as the pipeline gives them, as (B, C, h, w)."""
        return latents

    def refusal(self, recipe: Recipe) -> str | None:
        """Why the model cannot follow the recipe; None if it can."""
        if reason := self.kind.refusal(recipe.scheduler, recipe.negative_prompt):
            return reason
        most = max_steps(recipe.scheduler, self._scheduler_config)
        if most is not None and recipe.num_inference_steps > most:
            return f"the scheduler {recipe.scheduler} takes at most {most} steps on this model"
        return None

    def needs_negative(self, recipe: Recipe) -> bool:
        """Whether a recipe makes use of the embeddings of the negative prompt."""
        return self.kind.takes_negative and recipe.guidance_scale > 1

    def denoise(
        self,
        captions: Sequence[Embeddings],
        negative: Embeddings | None,
        noise: Tensor,
        generators: list[torch.Generator],
        recipe: Recipe,
        *,
        side_px: int,
        options: dict[str, Any],
        on_step: Callable[[], None],
    ) -> Tensor:
        """Latents, as the pipeline gives them, of one image for each caption."""
        # Afresh each time: a run that was stopped half way leaves state behind.
        self.pipeline.scheduler = make_scheduler(
            recipe.scheduler, self._scheduler_config, options, generators
        )
        conditions = {key: torch.stack([c[key] for c in captions]) for key in captions[0]}
        for key, value in (negative or {}).items():
            conditions[f"negative_{key}"] = value.expand(len(captions), *value.shape)

        def report(*_: Any) -> dict[str, Any]:
            on_step()
            return {}

        latents: Tensor
        latents, *_ = self.pipeline(
            **conditions,
            **self.arguments,
            **{self.step_argument: report},
            latents=self.latents_from_noise(noise),
            generator=generators,
            guidance_scale=recipe.guidance_scale,
            num_inference_steps=recipe.num_inference_steps,
            height=side_px,
            width=side_px,
            output_type="latent",
            return_dict=False,
        )
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in -1..1 of latents (B, C, h, w)."""
        vae, config = self.pipeline.vae, self.pipeline.vae.config
        latents = latents.to(vae.dtype) / config.scaling_factor
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            shape = (1, -1, 1, 1)
            latents = latents * latents.new_tensor(std).view(shape)
            latents = latents + latents.new_tensor(mean).view(shape)
        if shift := config.get("shift_factor"):
            latents = latents + shift
        images: Tensor = vae.decode(latents, return_dict=False)[0]
        return images


def rows(**batches: Tensor) -> list[Embeddings]:
    """The embeddings of each text of a batch."""
    keys = list(batches)
    return [dict(zip(keys, values, strict=True)) for values in zip(*batches.values(), strict=True)]
