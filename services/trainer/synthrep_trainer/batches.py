"""From drawn captions to batches of pixels: read, decode, augment, ahead of their step.

One thread cuts batches from the stream and hands their captions to loader threads. Reading, JPEG
decoding and OpenCV leave the interpreter lock, so threads scale and nothing is copied between
processes. Every view is seeded by (seed, step, row, view): it depends neither on threads nor on
ranks. Pixels stay uint8 until they are on the device.
"""

from __future__ import annotations

import contextlib
import io
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Self

import numpy as np
import PIL.Image
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthrep_trainer.augment import AugmentConfig, augment, use_one_thread
from synthrep_trainer.shard_files import Image
from synthrep_trainer.shard_stream import Cursor, DrawnBatch, DrawnGroup, ShardStream
from synthrep_trainer.text_tokens import encode_captions

MAX_PIXELS = 4096 * 4096
_PILLOW_FORMATS = {"png": "PNG", "webp": "WEBP"}
UNDECODABLE: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    SyntaxError,
    PIL.Image.DecompressionBombError,
    PIL.Image.DecompressionBombWarning,
)
"""What decoders raise on damaged or hostile bytes; SyntaxError is Pillow's for a broken PNG."""
_PAUSE_S = 0.2  # between two looks at the stop flag


class ViewPlan(NamedTuple):
    """How the drawn images of a caption become rows of a batch."""

    seed: int
    images_per_caption: int
    views_per_image: int
    """2 for SimCLR: the crops of an image are positives, under an id of their own."""
    augmentation: AugmentConfig
    odd_augmentation: AugmentConfig | None = None
    """Of every second image of a caption, where those differ."""
    crops_per_image: int = 0
    crop_augmentation: AugmentConfig | None = None
    """Of the small crops, beside the views."""
    text_context: int = 0
    """Tokens a caption, 0 for an objective that reads none."""


class HeldOutPlan(NamedTuple):
    """When and how held-out captions are looked at."""

    every: int
    """Steps between two looks."""
    captions: int
    images_per_caption: int
    view: AugmentConfig
    """The whole image, in the size of the views."""


class Batch(NamedTuple):
    """This rank's rows of a batch; those of a caption are adjacent."""

    images: Tensor
    """(B, size, size, 3) uint8"""
    caption_ids: Tensor
    """(B,) int64"""
    tokens: Tensor | None = None
    """(captions, context) int64, see `text_tokens`"""
    crops: Tensor | None = None
    """(B * crops an image, crop size, crop size, 3) uint8"""


class LoadedBatch(NamedTuple):
    """A batch, the number of its step, and the cursor that a checkpoint after it holds."""

    step: int
    batch: Batch
    cursor: Cursor
    held_out: Batch | None = None
    """This rank's share of the held-out images, where the step is one that looks at them."""


class BatchLoader:
    """Makes batches ready in the background; use as a context manager, from one thread."""

    def __init__(
        self,
        stream: ShardStream,
        views: ViewPlan,
        *,
        last_step: int,
        threads: int,
        prefetch: int,
        pin: bool,
        held_out: HeldOutPlan | None = None,
        on_batch: Callable[[DrawnBatch, float], None] = lambda *_: None,
    ) -> None:
        """`on_batch` is told of every batch that was made, and how many seconds that took."""
        self._on_batch = on_batch
        self._stream, self._views, self._held_out = stream, views, held_out
        self._last_step, self._pin = last_step, pin
        self._stop = threading.Event()
        self._queue: queue.Queue[LoadedBatch | BaseException] = queue.Queue(prefetch)
        self._next: LoadedBatch | BaseException | None = None
        self._pool = ThreadPoolExecutor(threads, "loader", initializer=use_one_thread)
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._pool.shutdown()

    def is_ready(self, timeout_s: float) -> bool:
        """Whether `take` has something to give, after waiting for it up to `timeout_s`."""
        if self._next is None:
            with contextlib.suppress(queue.Empty):
                self._next = self._queue.get(timeout=timeout_s)
        return self._next is not None

    def take(self) -> LoadedBatch:
        """The next batch, which is ready; raises what went wrong in making it."""
        found, self._next = self._next, None
        if isinstance(found, BaseException):
            raise found
        assert found is not None, "take comes after is_ready"
        return found

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                drawn = self._stream.next_batch(self._stop.is_set)
                if drawn is None:
                    return
                began = time.monotonic()
                batch, held_out = self._load(drawn), self._load_held_out(drawn.step)
                self._on_batch(drawn, time.monotonic() - began)
                self._put(LoadedBatch(drawn.step, batch, drawn.cursor, held_out))
                if drawn.step == self._last_step:
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: LoadedBatch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_PAUSE_S)
            except queue.Full:
                continue
            break

    def _load_held_out(self, step: int) -> Batch | None:
        plan = self._held_out
        if plan is None or step % plan.every:
            return None
        groups = self._stream.held_out(captions=plan.captions, images=plan.images_per_caption)
        self._verify(groups)

        def views(group: DrawnGroup) -> list[NDArray[np.uint8]]:
            return [augment(image, plan.view, seed=0) for image in self._decoded(group)]

        found = list(self._pool.map(views, groups))
        size = plan.view.image_size_px
        pixels = [view for group in found for view in group]
        ids = [group.caption_id for group, views in zip(groups, found, strict=True) for _ in views]
        images = np.stack(pixels) if pixels else np.empty((0, size, size, 3), dtype=np.uint8)
        return Batch(torch.from_numpy(images), torch.tensor(ids, dtype=torch.int64))

    def _verify(self, groups: list[DrawnGroup]) -> None:
        shards = {group.shard.seq: group.shard for group in groups}
        list(self._pool.map(self._stream.verify, shards.values()))

    def _load(self, drawn: DrawnBatch) -> Batch:
        groups, views = drawn.groups, self._views
        self._verify(groups)
        rows = views.images_per_caption * views.views_per_image
        pixels = _pixels(len(groups), rows, views.augmentation)
        ids = np.empty((len(groups), rows), dtype=np.int64)
        crops = None
        if views.crop_augmentation is not None:
            num_crops = views.images_per_caption * views.crops_per_image
            crops = _pixels(len(groups), num_crops, views.crop_augmentation)

        def fill(place: int) -> None:
            group = groups[place]
            for k, image in enumerate(self._decoded(group)):
                row = group.row * views.images_per_caption + k
                first = k * views.views_per_image
                for view in range(views.views_per_image):
                    seed = (views.seed, drawn.step, row, view)
                    pixels[place, first + view] = augment(image, _recipe(views, k), seed=seed)
                    ids[place, first + view] = (
                        group.caption_id if views.views_per_image == 1 else row
                    )
                if crops is None or views.crop_augmentation is None:
                    continue
                for crop in range(views.crops_per_image):
                    seed = (views.seed, drawn.step, row, views.views_per_image + crop)
                    crops[place, k * views.crops_per_image + crop] = augment(
                        image, views.crop_augmentation, seed=seed
                    )

        list(self._pool.map(fill, range(len(groups))))
        batch = Batch(
            torch.from_numpy(pixels.reshape(-1, *pixels.shape[2:])),
            torch.from_numpy(ids.reshape(-1)),
            self._tokens(groups) if views.text_context else None,
            None if crops is None else torch.from_numpy(crops.reshape(-1, *crops.shape[2:])),
        )
        return _pinned(batch) if self._pin else batch

    def _tokens(self, groups: list[DrawnGroup]) -> Tensor:
        captions = [self._stream.store.caption(group.shard, group.place) for group in groups]
        return encode_captions(captions, self._views.text_context)

    def _decoded(self, group: DrawnGroup) -> Iterator[NDArray[np.uint8]]:
        """The drawn images; raises BadShardError, after quarantine, for one that is none."""
        for stored in self._stream.store.read(group.shard, group.place, group.images):
            try:
                image = decode(stored)
            except UNDECODABLE as error:
                reason = f"an image cannot be decoded: {error}"
                raise self._stream.store.quarantine(
                    group.shard.seq, group.shard.name, reason
                ) from error
            yield image


def _pixels(groups: int, rows: int, config: AugmentConfig) -> NDArray[np.uint8]:
    size = config.image_size_px
    return np.empty((groups, rows, size, size, 3), dtype=np.uint8)


def _recipe(views: ViewPlan, image: int) -> AugmentConfig:
    is_odd = image % 2 == 1 and views.odd_augmentation is not None
    return views.odd_augmentation or views.augmentation if is_odd else views.augmentation


def _pinned(batch: Batch) -> Batch:
    return Batch._make(None if tensor is None else tensor.pin_memory() for tensor in batch)


def decode(image: Image) -> NDArray[np.uint8]:
    """The pixels, (height, width, 3) RGB; raises one of UNDECODABLE if there are none.

    Nothing larger than MAX_PIXELS is decoded, whatever a header promises.
    """
    if image.suffix == "jpg":
        height, width, *_ = simplejpeg.decode_jpeg_header(image.data)
        _check_size(height, width)
        decoded: NDArray[np.uint8] = simplejpeg.decode_jpeg(image.data, colorspace="RGB")
        return decoded
    with PIL.Image.open(io.BytesIO(image.data), formats=[_PILLOW_FORMATS[image.suffix]]) as opened:
        _check_size(opened.height, opened.width)
        return np.asarray(opened.convert("RGB"))


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, at most {MAX_PIXELS} are decoded")
