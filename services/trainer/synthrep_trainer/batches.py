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

MAX_PIXELS = 4096 * 4096
_PILLOW_FORMATS = {"png": "PNG", "webp": "WEBP"}
# What decoders raise on damaged or hostile bytes; SyntaxError is Pillow's for a broken PNG chunk.
_UNDECODABLE: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    SyntaxError,
    PIL.Image.DecompressionBombError,
    PIL.Image.DecompressionBombWarning,
)
_PAUSE_S = 0.2  # between two looks at the stop flag


class ViewPlan(NamedTuple):
    """How the drawn images of a caption become rows of a batch."""

    seed: int
    images_per_caption: int
    views_per_image: int
    """2 for SimCLR: the crops of an image are positives, under an id of their own."""
    augmentation: AugmentConfig


class Batch(NamedTuple):
    """This rank's rows of a batch: (B, size, size, 3) uint8 and (B,) int64."""

    images: Tensor
    caption_ids: Tensor


class LoadedBatch(NamedTuple):
    """A batch, the number of its step, and the cursor that a checkpoint after it holds."""

    step: int
    batch: Batch
    cursor: Cursor


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
    ) -> None:
        self._stream, self._views = stream, views
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
                self._put(LoadedBatch(drawn.step, self._load(drawn), drawn.cursor))
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

    def _load(self, drawn: DrawnBatch) -> Batch:
        shards = {group.shard.seq: group.shard for group in drawn.groups}
        list(self._pool.map(self._stream.verify, shards.values()))
        views, size = self._views, self._views.augmentation.image_size_px
        rows_per_caption = views.images_per_caption * views.views_per_image
        pixels = np.empty((len(drawn.groups), rows_per_caption, size, size, 3), dtype=np.uint8)
        ids = np.empty((len(drawn.groups), rows_per_caption), dtype=np.int64)

        def fill(place: int) -> None:
            self._fill(drawn.step, drawn.groups[place], pixels[place], ids[place])

        list(self._pool.map(fill, range(len(drawn.groups))))
        images = torch.from_numpy(pixels.reshape(-1, size, size, 3))
        batch = Batch(images, torch.from_numpy(ids.reshape(-1)))
        return Batch(*(tensor.pin_memory() for tensor in batch)) if self._pin else batch

    def _fill(
        self, step: int, group: DrawnGroup, pixels: NDArray[np.uint8], ids: NDArray[np.int64]
    ) -> None:
        views = self._views
        images = self._stream.store.read(group.shard, group.place, group.images)
        for k, stored in enumerate(images):
            try:
                image = decode(stored)
            except _UNDECODABLE as error:
                reason = f"an image cannot be decoded: {error}"
                raise self._stream.store.quarantine(
                    group.shard.seq, group.shard.name, reason
                ) from error
            image_row = group.row * views.images_per_caption + k
            for view in range(views.views_per_image):
                row = k * views.views_per_image + view
                seed = (views.seed, step, image_row, view)
                pixels[row] = augment(image, views.augmentation, seed=seed)
                ids[row] = group.caption_id if views.views_per_image == 1 else image_row


def decode(image: Image) -> NDArray[np.uint8]:
    """The pixels, (height, width, 3) RGB; raises one of _UNDECODABLE if there are none.

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
