"""A sign of life for health checks: a file whose age and content say how a main loop is doing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_PERIOD_S = 1.0


class Heartbeat:
    """Keeps a file young while `beat` is called; does nothing without a path, never raises."""

    def __init__(self, path: Path | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._state, self._due_at = "", 0.0

    def beat(self, state: str) -> None:
        """Touch the file, once a second at most; a change of state is written at once."""
        now = self._clock()
        if self._path is None or (state == self._state and now < self._due_at):
            return
        with suppress(OSError):
            if state == self._state:
                os.utime(self._path)
            else:
                self._path.write_text(state)
            self._state, self._due_at = state, now + _PERIOD_S
