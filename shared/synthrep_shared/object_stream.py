"""A remote object as a file that reads ahead."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

_FIRST_READ_BYTES, _MAX_READ_BYTES = 64 << 10, 4 << 20


class ObjectStream(io.RawIOBase):
    """Reads by range, twice as far ahead each time while it is read in order."""

    def __init__(self, read_range: Callable[[int, int], bytes], size: int) -> None:
        """`read_range` gives so many bytes from a position on, fewer at the end."""
        self._read_range, self._size = read_range, size
        self._position = self._start = 0
        self._ahead = b""
        self._step = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        place = self._position - self._start
        if not 0 <= place < len(self._ahead):
            if self._position >= self._size:
                return 0
            step = 2 * self._step if place == len(self._ahead) else 0
            self._step = min(max(step, _FIRST_READ_BYTES), _MAX_READ_BYTES)
            self._ahead = self._read_range(self._position, self._step)
            self._start, place = self._position, 0
        piece = self._ahead[place : place + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)
