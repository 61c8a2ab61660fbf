"""The best number of images in one pass through a device: searched once, then remembered on disk.

Images a second grow with the batch until the device is full, then hardly; memory ends it sooner.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_GAIN = 1.05  # a doubling that makes less of it does not pay for slower answers to a stop
_MOST_IMAGES = 256
_PATIENCE_S = 90.0
_REPEATS = 2  # of a size that seems to gain nothing


def search_batch_size(
    seconds_of: Callable[[int], float],
    *,
    most: int = _MOST_IMAGES,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """The size past which doubling gains little, `seconds_of` a batch being given.

    Ends early where the device has no memory for more or the search takes too long. Raises
    torch.OutOfMemoryError if not even one image fits.
    """
    seconds_of(1)  # first kernels, buffers and embeddings
    began, lost_s = clock(), 0.0
    best, rate = 1, 1 / seconds_of(1)
    while 2 * best <= most and clock() - began - lost_s < _PATIENCE_S:
        tried_at = clock()
        try:
            seconds = seconds_of(2 * best)
            for _ in range(_REPEATS):
                if 2 * best / seconds >= _GAIN * rate:
                    break
                # There may have been kernels to choose or to compile, or another at work.
                lost_s += clock() - tried_at
                tried_at = clock()
                seconds = min(seconds, seconds_of(2 * best))
        except torch.OutOfMemoryError:
            break
        if 2 * best / seconds < _GAIN * rate:
            break
        best, rate = 2 * best, 2 * best / seconds
        if clock() - tried_at > _PATIENCE_S / 3:
            break
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return best


class BatchSizes:
    """Sizes by key in a JSON file; without a file, or with a broken one, nothing is remembered."""

    def __init__(self, file: Path | None) -> None:
        self._file = None if file is None else file.expanduser()

    def get(self, key: str) -> int | None:
        """The remembered size."""
        return self._read().get(key)

    def put(self, key: str, images: int) -> None:
        """Remember a size; a file that cannot be written is worth a warning, no more."""
        if self._file is None:
            return
        sizes = self._read() | {key: images}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            number, name = tempfile.mkstemp(dir=self._file.parent)
            try:
                with os.fdopen(number, "w") as stream:
                    json.dump(sizes, stream, indent=1, sort_keys=True)
                Path(name).replace(self._file)
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("batch size not remembered", extra={"error": str(error)})

    def _read(self) -> dict[str, int]:
        if self._file is None:
            return {}
        try:
            sizes = json.loads(self._file.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(sizes, dict):
            return {}
        # Others were not found by a search: a pass of thousands may end a process on a CPU.
        return {k: v for k, v in sizes.items() if type(v) is int and 0 < v <= _MOST_IMAGES}
