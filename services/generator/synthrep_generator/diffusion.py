"""DiffusersSynthesizer: a text-to-image pipeline on a device, kept full.

Batches hold images of several prompts. A caption is encoded once, not once per image; noise comes
from one seeded generator per image, on the CPU, so that pixels depend on their batch mates by
rounding only. While one batch is denoised the last one is decoded beside it, where the device can.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from synthrep_generator.batch_size import BatchSizes, search_batch_size
from synthrep_generator.decoding import Decoder, Decoding, pixels_from_decoded
from synthrep_generator.errors import PermanentPromptError
from synthrep_generator.model_files import read_manifest
from synthrep_generator.pipelines.caption_cache import CaptionCache
from synthrep_generator.pipelines.family import Family, Text
from synthrep_generator.pipelines.loading import load_family
from synthrep_generator.settings import ModelConfig
from synthrep_generator.synthesis import (
    CaptionFit,
    DeviceUse,
    ImageTask,
    PendingImages,
    Pixels,
    ReadyImages,
    Recipe,
    refuse_long,
)

__all__ = ["DiffusersSynthesizer", "load_synthesizer", "pixels_from_decoded"]

logger = logging.getLogger(__name__)

_CAPTION_BYTES = 256 << 20  # of embeddings kept on the device
_MAX_FITS = 4096
_TIMED_STEPS = 3
_BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def load_synthesizer(
    model: ModelConfig, *, device: str, threads: int = 0, batch_sizes: Path | None = None
) -> DiffusersSynthesizer:
    """The model on `device` (`auto` takes CUDA where there is one), `threads` on the CPU (0: all).

    A batch size that is searched is remembered in the file `batch_sizes`. Raises
    ModelFilesMissingError and ModelConfigError as `pipelines.loading.load_family` does.
    """
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if threads:
        torch.set_num_threads(threads)
    family = load_family(model, torch.device(name))
    return DiffusersSynthesizer(family, model, BatchSizes(batch_sizes))


class DiffusersSynthesizer:
    """See synthesis.Synthesizer."""

    def __init__(self, family: Family, model: ModelConfig, sizes: BatchSizes) -> None:
        self._family, self._pipeline, self._model = family, family.pipeline, model
        self._device: torch.device = family.pipeline.device
        manifest = read_manifest(model.path)
        self._revision = model.revision if manifest is None else manifest.revision
        self._captions = CaptionCache(family, max_bytes=_CAPTION_BYTES)
        self._decoder = Decoder(family, model)
        self._tokenizing = threading.Lock()  # tokenizers are for one thread at a time
        self._fit = functools.lru_cache(_MAX_FITS)(family.fit)
        self._sizes = sizes
        self._use = DeviceUse()
        self._max_batch = self._first_batch_size()

    @property
    def device(self) -> str:
        """See synthesis.Synthesizer."""
        if self._device.type != "cuda":
            return str(self._device)
        return f"{self._device} {torch.cuda.get_device_name(self._device)}"

    @property
    def revision(self) -> str:
        """See synthesis.Synthesizer."""
        return self._revision

    @property
    def dtype(self) -> str:
        """See synthesis.Synthesizer."""
        return str(self._family.denoiser.dtype).removeprefix("torch.")

    @property
    def batch_images(self) -> int:
        """See synthesis.Synthesizer."""
        return self._max_batch

    @property
    def use(self) -> DeviceUse:
        """See synthesis.Synthesizer."""
        return self._use

    def caption_fit(self, prompt: str) -> CaptionFit:
        """See synthesis.Synthesizer."""
        with self._tokenizing:
            return self._fit(prompt)

    def generate(
        self, tasks: Sequence[ImageTask], recipe: Recipe, on_step: Callable[[], None]
    ) -> list[Pixels | PermanentPromptError]:
        """See synthesis.Synthesizer."""
        return self.start(tasks, recipe, on_step).results()

    @torch.inference_mode()
    def start(
        self, tasks: Sequence[ImageTask], recipe: Recipe, on_step: Callable[[], None]
    ) -> PendingImages:
        """See synthesis.Synthesizer. Out of device memory, it goes on with half as many at once.

        Raises torch.OutOfMemoryError if not even one image fits.
        """
        if reason := self._family.refusal(recipe):
            return ReadyImages([PermanentPromptError(reason) for _ in tasks], self._max_batch)
        refusals = [refuse_long(self.caption_fit(task.prompt), recipe) for task in tasks]
        wanted = [task for task, no in zip(tasks, refusals, strict=True) if no is None]
        return _Pending(refusals, self._make(wanted, recipe, on_step), self._decoding)

    def _make(
        self, tasks: Sequence[ImageTask], recipe: Recipe, on_step: Callable[[], None]
    ) -> list[Decoding]:
        """Begins to decode each part of the tasks that fits the device."""
        decodings: list[Decoding] = []
        done = 0
        while done < len(tasks):
            part = tasks[done : done + self._max_batch]
            started: Decoding | None = None
            try:
                latents = self._denoise(part, recipe, on_step)
                with self._decoding():
                    started = self._decoder.start(latents, on_step)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
            if started is None:
                # Outside of the handler, whose traceback holds the tensors of the failed attempt.
                self._back_off(len(part) // 2)
                continue
            decodings.append(started)
            done += len(part)
        return decodings

    @contextlib.contextmanager
    def _denoising(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent_s = self._use.denoise_s + time.perf_counter() - started
            self._use = replace(self._use, denoise_s=spent_s)

    @contextlib.contextmanager
    def _decoding(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent_s = self._use.decode_s + time.perf_counter() - started
            self._use = replace(self._use, decode_s=spent_s)

    def _denoise(
        self, tasks: Sequence[ImageTask], recipe: Recipe, on_step: Callable[[], None]
    ) -> Tensor:
        """Latents of the tasks, as the pipeline gives them."""
        texts = [Text(task.prompt) for task in tasks]
        if needs_negative := self._family.needs_negative(recipe):
            texts.append(Text(recipe.negative_prompt, is_negative=True))
        with self._tokenizing:
            captions = self._captions.encode(texts)
        negative = captions.pop() if needs_negative else None
        generators = [torch.Generator().manual_seed(task.seed) for task in tasks]
        shape = self._family.noise_shape(self._model.generate_px)
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        with self._attention(), self._denoising():
            return self._family.denoise(
                captions,
                negative,
                noise.to(self._device, self._family.noise_dtype),
                generators,
                recipe,
                side_px=self._model.generate_px,
                options=self._model.scheduler_options,
                on_step=on_step,
            )

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        if self._model.attention == "sdpa":
            return contextlib.nullcontext()
        return sdpa_kernel(_BACKENDS[self._model.attention])

    def _first_batch_size(self) -> int:
        if self._model.device_batch_images != "auto":
            return self._model.device_batch_images
        found = self._sizes.get(self._size_key)
        if found is None:
            found = search_batch_size(self._seconds_of)
            self._sizes.put(self._size_key, found)
            logger.info("batch size found", extra={"images": found, "device": self.device})
        return found

    def _back_off(self, images: int) -> None:
        torch.cuda.empty_cache()
        self._max_batch = images
        self._use = replace(self._use, out_of_memory=self._use.out_of_memory + 1)
        if self._model.device_batch_images == "auto":
            self._sizes.put(self._size_key, images)
        logger.warning("out of device memory", extra={"batch_images": images})

    @property
    def _size_key(self) -> str:
        model = self._model
        name = self._device.type
        if name == "cuda":
            name = torch.cuda.get_device_name(self._device)
        marks = [str(model.path.absolute()), self._revision, name]
        marks += [f"{model.generate_px}px", self.dtype]
        marks += [model.attention, "compiled"] if model.compile else [model.attention]
        return " ".join(marks)

    @torch.inference_mode()
    def _seconds_of(self, images: int) -> float:
        """Time of a batch by the model's defaults, from that of its first steps."""
        model = self._model
        steps = min(model.num_inference_steps, _TIMED_STEPS)
        recipe = Recipe(model.guidance_scale, steps, model.scheduler, "")
        tasks = [ImageTask("a photograph", seed) for seed in range(images)]
        began = self._now()
        latents = self._denoise(tasks, recipe, lambda: None)
        denoised = self._now()
        self._decoder.start(latents, lambda: None).results()
        return (denoised - began) * model.num_inference_steps / steps + self._now() - denoised

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclass(frozen=True)
class _Pending:
    """See synthesis.PendingImages; a refusal stands in the place of what was not made."""

    refusals: list[PermanentPromptError | None]
    decodings: list[Decoding]
    decoding: Callable[[], contextlib.AbstractContextManager[None]]

    @property
    def is_ready(self) -> bool:
        return all(decoding.is_ready for decoding in self.decodings)

    @property
    def shared_by(self) -> list[int]:
        sizes = [len(decoding.finite) for decoding in self.decodings]
        places = iter([size for size in sizes for _ in range(size)])
        return [next(places) if no is None else 0 for no in self.refusals]

    def results(self) -> list[Pixels | PermanentPromptError]:
        with self.decoding():
            made = iter([result for each in self.decodings for result in each.results()])
        return [next(made) if no is None else no for no in self.refusals]
