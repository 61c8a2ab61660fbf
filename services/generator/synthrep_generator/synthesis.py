"""What makes images of prompts: the protocol, and a fake of it for tests.

A synthesizer gets the images of one pass through the device and gives them back in order. An
image that can never be made comes back as the error in its place, so that its neighbours live.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from synthrep_generator.errors import PermanentPromptError
from synthrep_shared.messages import GenerationSettings

Pixels = NDArray[np.uint8]  # (height, width, 3), RGB
_NAP_S = 0.02
_FOREVER_S = 1e9
_PATCH_PX = 4
_LEAK_BYTES = 16 << 20
_FAKE_WINDOW = 77


@dataclass(frozen=True)
class ImageTask:
    """One image to make; equal tasks give equal pixels, whatever is made beside them."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Recipe:
    """How all images of a job are made."""

    guidance_scale: float
    num_inference_steps: int
    scheduler: str
    negative_prompt: str
    long_captions: str = "truncate"


@dataclass(frozen=True)
class CaptionFit:
    """How many tokens a caption has, marks of start and end included, and how many are taken."""

    tokens: int
    window: int

    @property
    def is_truncated(self) -> bool:
        """Whether the end of the caption is lost on the model."""
        return self.tokens > self.window


def refuse_long(fit: CaptionFit, recipe: Recipe) -> PermanentPromptError | None:
    """The failure of a caption that is longer than its request wants taken; None if it may pass."""
    if recipe.long_captions != "refuse" or not fit.is_truncated:
        return None
    return PermanentPromptError(
        f"the caption has {fit.tokens} tokens; the model's text encoder takes {fit.window}"
    )


def recipe_from_settings(settings: GenerationSettings) -> Recipe:
    """The recipe of settings whose defaults were filled in; raises ValueError for open ones."""
    scale, steps, scheduler = (
        settings.guidance_scale,
        settings.num_inference_steps,
        settings.scheduler,
    )
    if scale is None or steps is None or scheduler is None:
        raise ValueError("the settings of a batch must have every default of the model filled in")
    return Recipe(scale, steps, scheduler, settings.negative_prompt, settings.long_captions)


class PendingImages(Protocol):
    """The images of a pass, some of which the device may still be at work on."""

    @property
    def is_ready(self) -> bool:
        """Whether `results` would not wait."""
        ...

    @property
    def shared_by(self) -> list[int]:
        """For each task, how many images were in the device at once; 0 where none was made."""
        ...

    def results(self) -> list[Pixels | PermanentPromptError]:
        """One result per task, in order."""
        ...


@dataclass(frozen=True)
class ReadyImages:
    """See PendingImages; they are all there, made so many at once."""

    made: list[Pixels | PermanentPromptError]
    batch_images: int
    is_ready = True

    @property
    def shared_by(self) -> list[int]:
        """See PendingImages; what is refused takes no place."""
        is_made = [not isinstance(result, PermanentPromptError) for result in self.made]
        left, sizes = sum(is_made), list[int]()
        while left:
            sizes += [min(left, self.batch_images)] * min(left, self.batch_images)
            left -= min(left, self.batch_images)
        places = iter(sizes)
        return [next(places) if each else 0 for each in is_made]

    def results(self) -> list[Pixels | PermanentPromptError]:
        """See PendingImages."""
        return self.made


@dataclass(frozen=True)
class DeviceUse:
    """Seconds by the clock of denoising, and of decoding that was waited for; passes too large."""

    denoise_s: float = 0.0
    decode_s: float = 0.0
    out_of_memory: int = 0

    def since(self, before: DeviceUse) -> DeviceUse:
        """The part of it that came after `before`."""
        return DeviceUse(
            self.denoise_s - before.denoise_s,
            self.decode_s - before.decode_s,
            self.out_of_memory - before.out_of_memory,
        )


class Synthesizer(Protocol):
    """A loaded text-to-image model on a device."""

    @property
    def device(self) -> str:
        """Where the work is done, for people to read."""
        ...

    @property
    def revision(self) -> str:
        """What samples record as the model's revision."""
        ...

    @property
    def dtype(self) -> str:
        """Number format of the work, as samples record it."""
        ...

    @property
    def batch_images(self) -> int:
        """Images that one pass takes now; may shrink from one pass to the next."""
        ...

    @property
    def use(self) -> DeviceUse:
        """What the device was used for so far."""
        ...

    def caption_fit(self, prompt: str) -> CaptionFit:
        """Whether the text encoder takes all of a caption; any thread may ask."""
        ...

    def generate(
        self, tasks: Sequence[ImageTask], recipe: Recipe, on_step: Callable[[], None]
    ) -> list[Pixels | PermanentPromptError]:
        """One result per task, in order. Calls `on_step` often; what it raises ends the work."""
        ...

    def start(
        self, tasks: Sequence[ImageTask], recipe: Recipe, on_step: Callable[[], None]
    ) -> PendingImages:
        """As `generate`, but back as soon as the device can be given its next pass."""
        ...


class FakeSynthesizer:
    """Paints patches of colour that are a function of prompt and seed; needs no model.

    Prompts that contain one of these marks go wrong in its way, at every run:
    `[fake:refuse]` no image can be made, `[fake:blank]` a black image, `[fake:raise]` an exception,
    `[fake:crash]` the process is gone, `[fake:hang]` the call never returns. At even seeds only,
    `[fake:dim]` gives an image of next to one colour and `[fake:same]` that of seed 0.
    `[fake:fault]` is an error of the device, `[fake:leak]` costs memory for good. A word is a
    token.
    """

    device = "fake"
    revision = "fake"
    dtype = "fake"

    def __init__(self, *, store_px: int, delay_s: float = 0.0, batch_images: int = 40) -> None:
        self._store_px, self._delay_s = store_px, delay_s
        self.batch_images = batch_images
        self.use = DeviceUse()
        self._leaked: list[bytes] = []

    def caption_fit(self, prompt: str) -> CaptionFit:
        """See Synthesizer."""
        return CaptionFit(len(prompt.split()) + 2, _FAKE_WINDOW)

    def generate(
        self, tasks: Sequence[ImageTask], recipe: Recipe, on_step: Callable[[], None]
    ) -> list[Pixels | PermanentPromptError]:
        """See Synthesizer."""
        results: list[Pixels | PermanentPromptError] = []
        for task in tasks:
            self._sleep(self._delay_s, on_step)
            self.use = replace(self.use, denoise_s=self.use.denoise_s + self._delay_s)
            refused = refuse_long(self.caption_fit(task.prompt), recipe)
            results.append(refused or self._make(task))
        return results

    def start(
        self, tasks: Sequence[ImageTask], recipe: Recipe, on_step: Callable[[], None]
    ) -> ReadyImages:
        """See Synthesizer."""
        made = self.generate(tasks, recipe, on_step)
        return ReadyImages(made, self.batch_images)

    def _make(self, task: ImageTask) -> Pixels | PermanentPromptError:
        if "[fake:refuse]" in task.prompt:
            return PermanentPromptError("the fake refuses this prompt")
        if "[fake:blank]" in task.prompt:
            return np.zeros((self._store_px, self._store_px, 3), np.uint8)
        if "[fake:raise]" in task.prompt:
            raise RuntimeError("the fake raises on this prompt")
        if "[fake:fault]" in task.prompt:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if "[fake:leak]" in task.prompt:
            self._leaked.append(b"\x01" * _LEAK_BYTES)
        if "[fake:crash]" in task.prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        if "[fake:hang]" in task.prompt:
            time.sleep(_FOREVER_S)
        if "[fake:dim]" in task.prompt and task.seed % 2 == 0:
            return paint(task, self._store_px) // 64 + 100
        if "[fake:same]" in task.prompt and task.seed % 2 == 0:
            return paint(replace(task, seed=0), self._store_px)
        return paint(task, self._store_px)

    def _sleep(self, seconds: float, on_step: Callable[[], None]) -> None:
        on_step()
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _NAP_S))
            on_step()


def paint(task: ImageTask, side_px: int) -> Pixels:
    """A square of random patches of colour, a function of the task alone."""
    digest = hashlib.sha256(f"{task.seed}:{task.prompt}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
    patches = -(-side_px // _PATCH_PX)
    colours = generator.integers(0, 256, (patches, patches, 3), np.uint8)
    grown: NDArray[Any] = colours.repeat(_PATCH_PX, 0).repeat(_PATCH_PX, 1)
    return grown[:side_px, :side_px]
