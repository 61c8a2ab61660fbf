"""A remote object as a file that reads ahead."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

_FIRST_READ_BYTES, _MAX_READ_BYTES = 64 << 10, 4 << 20


class ObjectStream(io.RawIOBase):
    """Reads by range, twice as far ahead each time while it is read in order."""

    def __init__(self, read_range: Callable[[int, int], bytes]) -> None:
        """`read_range` gives so many bytes from a position on, fewer at the end; it is called now.

        Whatever it raises comes from here and from reading.
        """
        self._read_range = read_range
        self._position = 0
        self._fetch(_FIRST_READ_BYTES)

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can be read from anywhere."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go on at a byte, counted from the start or from here."""
        if whence == os.SEEK_END:
            raise io.UnsupportedOperation("the end of an object is found by reading")
        self._position = offset + (self._position if whence == os.SEEK_CUR else 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read at most as much as the buffer takes, nothing at the end."""
        place = self._position - self._start
        if not 0 <= place < len(self._ahead):
            if place == len(self._ahead) < self._step:
                return 0
            in_order = place == len(self._ahead)
            self._fetch(min(2 * self._step, _MAX_READ_BYTES) if in_order else _FIRST_READ_BYTES)
            place = 0
        piece = self._ahead[place : place + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def _fetch(self, num_bytes: int) -> None:
        self._start, self._step = self._position, num_bytes
        self._ahead = self._read_range(self._position, num_bytes)
