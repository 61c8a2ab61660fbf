"""From latents to bytes: decoded, resized and brought to the CPU beside the next batch's work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from synthrep_generator.errors import PermanentPromptError
from synthrep_generator.pipelines.family import Family
from synthrep_generator.settings import ModelConfig
from synthrep_generator.synthesis import Pixels

_DECODE_PIXELS = 8 * 512 * 512  # per call of the decoder, whose activations are large


@dataclass(frozen=True)
class Decoding:
    """Images that are being decoded; `pixels` (B, side, side, 3) and `finite` (B,) on the CPU."""

    pixels: Tensor
    finite: Tensor
    ready: torch.cuda.Event | None

    @property
    def is_ready(self) -> bool:
        """Whether `results` would not wait."""
        return self.ready is None or self.ready.query()

    def results(self) -> list[Pixels | PermanentPromptError]:
        """The images, once they are all there."""
        if self.ready is not None:
            self.ready.synchronize()
        return [
            image
            if is_finite
            else PermanentPromptError("the model made pixels that are no numbers")
            for is_finite, image in zip(self.finite.tolist(), self.pixels.numpy(), strict=True)
        ]


class Decoder:
    """Decodes at once, on CUDA on a stream of its own so that the next batch need not wait."""

    def __init__(self, family: Family, model: ModelConfig) -> None:
        self._family, self._model = family, model
        device = family.pipeline.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, latents: Tensor, on_step: Callable[[], None]) -> Decoding:
        """Begin to decode latents that the pipeline gave; torch.OutOfMemoryError as they do."""
        side_px = self._model.generate_px
        at_once = max(1, _DECODE_PIXELS // side_px**2)
        pixels, finite = [], []
        with self._beside(latents):
            grid = self._family.grid_from_latents(latents, side_px)
            for part in grid.split(at_once):
                decoded = self._family.decode(part)
                finite.append(decoded.isfinite().flatten(1).all(1))
                pixels.append(pixels_from_decoded(decoded, self._model.store_px))
                on_step()
            return self._collect(torch.cat(pixels), torch.cat(finite))

    @contextlib.contextmanager
    def _beside(self, latents: Tensor) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(latents.device))
        latents.record_stream(self._stream)  # its memory may not be reused before
        with torch.cuda.stream(self._stream):
            yield

    def _collect(self, pixels: Tensor, finite: Tensor) -> Decoding:
        if self._stream is None:
            return Decoding(pixels.contiguous(), finite, None)
        on_cpu = [
            torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
            for t in (pixels.contiguous(), finite)
        ]
        return Decoding(on_cpu[0], on_cpu[1], self._stream.record_event())


def pixels_from_decoded(decoded: Tensor, side_px: int) -> Tensor:
    """Bytes (B, side, side, 3) of images (B, 3, h, w) in -1..1, resized with antialiasing."""
    images = decoded.nan_to_num() / 2 + 0.5
    if images.shape[-1] != side_px:
        size = (side_px, side_px)
        images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
