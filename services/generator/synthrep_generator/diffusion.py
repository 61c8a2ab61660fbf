"""DiffusersSynthesizer: a Stable Diffusion pipeline folder on a device; sole importer of diffusers.

Batches hold images of several prompts. A caption is encoded once, not once per image; noise comes
from one seeded generator per image, on the CPU, so that pixels depend on their batch mates by
rounding only. Nothing is fetched and no code is taken from the model's folder.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor
from torch.nn import functional as F

from synthrep_generator.errors import ModelFilesMissingError, PermanentPromptError
from synthrep_generator.settings import ModelConfig
from synthrep_generator.synthesis import CaptionFit, ImageTask, Pixels, Recipe

_SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}
_TRUSTED_LIBRARIES = {"diffusers", "transformers", None}  # None: the part is absent
_UNUSED_PARTS = ("safety_checker", "feature_extractor")
_MAX_CACHED_CAPTIONS = 1024
_DECODE_PIXELS = 8 * 512 * 512  # per call of the decoder, whose activations are large


def load_synthesizer(model: ModelConfig, *, device: str, threads: int = 0) -> DiffusersSynthesizer:
    """The model on `device` (`auto` takes CUDA where there is one), `threads` on the CPU (0: all).

    Raises ModelFilesMissingError if its folder is not a StableDiffusionPipeline of safetensors.
    """
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(name)
    if threads:
        torch.set_num_threads(threads)
    _quieten()
    unused: dict[str, Any] = dict.fromkeys(_read_parts(model.path))
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            model.path,
            local_files_only=True,
            use_safetensors=True,
            dtype=_dtype(chosen),
            **unused,
        )
    except (OSError, ValueError) as error:
        raise ModelFilesMissingError(f"cannot load {model.path}: {error}") from error
    return DiffusersSynthesizer(pipeline.to(chosen), model)


class DiffusersSynthesizer:
    """See synthesis.Synthesizer."""

    def __init__(self, pipeline: StableDiffusionPipeline, model: ModelConfig) -> None:
        self._pipeline, self._model = pipeline, model
        self._device: torch.device = pipeline.device
        # Decoding in half precision shows as bands; it is a small part of the work.
        pipeline.vae.to(dtype=torch.float32).eval()
        pipeline.set_progress_bar_config(disable=True)
        self._scheduler_config = pipeline.scheduler.config
        self._captions: OrderedDict[str, Tensor] = OrderedDict()
        self._max_batch = 40 if model.device_batch_images == "auto" else model.device_batch_images

    @property
    def device(self) -> str:
        """See synthesis.Synthesizer."""
        if self._device.type != "cuda":
            return str(self._device)
        return f"{self._device} {torch.cuda.get_device_name(self._device)}"

    @property
    def revision(self) -> str:
        """See synthesis.Synthesizer."""
        return self._model.revision

    @property
    def dtype(self) -> str:
        """See synthesis.Synthesizer."""
        return str(self._pipeline.unet.dtype).removeprefix("torch.")

    @property
    def batch_images(self) -> int:
        """See synthesis.Synthesizer."""
        return self._max_batch

    def caption_fit(self, prompt: str) -> CaptionFit:
        """See synthesis.Synthesizer."""
        tokenizer = self._pipeline.tokenizer
        return CaptionFit(len(tokenizer(prompt).input_ids), tokenizer.model_max_length)

    @torch.inference_mode()
    def generate(
        self, tasks: Sequence[ImageTask], recipe: Recipe, on_step: Callable[[], None]
    ) -> list[Pixels | PermanentPromptError]:
        """See synthesis.Synthesizer. Out of device memory, it goes on with half as many at once.

        Raises torch.OutOfMemoryError if not even one image fits.
        """
        self._use_scheduler(recipe.scheduler)
        results: list[Pixels | PermanentPromptError] = []
        while len(results) < len(tasks):
            part = tasks[len(results) : len(results) + self._max_batch]
            try:
                results += self._decode(self._denoise(part, recipe, on_step), on_step)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self._max_batch = len(part) // 2
            # Outside of the handler, whose traceback holds the tensors of the failed attempt.
            if len(part) > self._max_batch:
                torch.cuda.empty_cache()
        return results

    def _use_scheduler(self, name: str) -> None:
        # Afresh each time: a run that was stopped half way leaves state behind.
        self._pipeline.scheduler = _SCHEDULERS[name].from_config(self._scheduler_config)

    def _denoise(
        self, tasks: Sequence[ImageTask], recipe: Recipe, on_step: Callable[[], None]
    ) -> Tensor:
        """Latents (B, C, h, w) of the tasks."""

        def report(*_: Any) -> dict[str, Any]:
            on_step()
            return {}

        side_px = self._model.generate_px
        prompts = [task.prompt for task in tasks]
        captions = self._encode([*prompts, recipe.negative_prompt])
        latents: Tensor
        latents, _ = self._pipeline(
            prompt_embeds=torch.stack(captions[:-1]),
            negative_prompt_embeds=captions[-1].expand(len(tasks), -1, -1),
            latents=self._noise([task.seed for task in tasks]),
            guidance_scale=recipe.guidance_scale,
            num_inference_steps=recipe.num_inference_steps,
            height=side_px,
            width=side_px,
            output_type="latent",
            callback_on_step_end=report,
            callback_on_step_end_tensor_inputs=[],
            return_dict=False,
        )
        return latents

    def _encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Embeddings (tokens, width) of the texts; those seen lately are not encoded again."""
        unseen = [text for text in dict.fromkeys(texts) if text not in self._captions]
        if unseen:
            embeddings, _ = self._pipeline.encode_prompt(unseen, self._device, 1, False)
            self._captions.update(zip(unseen, embeddings, strict=True))
        for text in texts:
            self._captions.move_to_end(text)
        found = [self._captions[text] for text in texts]
        while len(self._captions) > _MAX_CACHED_CAPTIONS:
            self._captions.popitem(last=False)
        return found

    def _noise(self, seeds: Sequence[int]) -> Tensor:
        side = self._model.generate_px // self._pipeline.vae_scale_factor
        shape = (self._pipeline.unet.config.in_channels, side, side)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(noise).to(self._device, self._pipeline.unet.dtype)

    def _decode(
        self, latents: Tensor, on_step: Callable[[], None]
    ) -> list[Pixels | PermanentPromptError]:
        vae = self._pipeline.vae
        at_once = max(1, _DECODE_PIXELS // self._model.generate_px**2)
        results: list[Pixels | PermanentPromptError] = []
        for part in latents.split(at_once):
            decoded = vae.decode(part.float() / vae.config.scaling_factor, return_dict=False)[0]
            finite = decoded.isfinite().flatten(1).all(1).tolist()
            pixels = pixels_from_decoded(decoded, self._model.store_px).cpu().numpy()
            for is_finite, image in zip(finite, pixels, strict=True):
                error = PermanentPromptError("the model made pixels that are no numbers")
                results.append(image if is_finite else error)
            on_step()
        return results


def pixels_from_decoded(decoded: Tensor, side_px: int) -> Tensor:
    """Bytes (B, side, side, 3) of images (B, 3, h, w) in -1..1, resized with antialiasing."""
    images = decoded.nan_to_num() / 2 + 0.5
    if images.shape[-1] != side_px:
        size = (side_px, side_px)
        images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def _read_parts(folder: Path) -> list[str]:
    """The parts of the pipeline to leave out; checks that the others are of trusted classes."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelFilesMissingError(f"no readable model_index.json in {folder}") from error
    if index.get("_class_name") != StableDiffusionPipeline.__name__:
        raise ModelFilesMissingError(
            f"{folder} holds a {index.get('_class_name')}; expected a StableDiffusionPipeline"
        )
    parts = {name: value for name, value in index.items() if isinstance(value, list)}
    for name, (library, _) in parts.items():
        if library not in _TRUSTED_LIBRARIES and name not in _UNUSED_PARTS:
            raise ModelFilesMissingError(f"{folder}: part {name} comes from {library!r}")
    return [name for name in _UNUSED_PARTS if name in parts]


def _dtype(device: torch.device) -> torch.dtype:
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _quieten() -> None:
    """Prompts do not belong in logs, nor progress bars."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
