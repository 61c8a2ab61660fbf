"""How long something still takes, in words, by its speed so far."""

from __future__ import annotations

import time
from collections.abc import Callable

_MINUTE_S = 60.0


class TimeLeft:
    """Told how much is done; what was done before it was first told counts as no speed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: tuple[float, int] | None = None

    def __call__(self, done: int, total: int) -> str:
        """`about 3 minutes left`; empty while that is unknown, and at the end."""
        now = self._clock()
        if self._began is None:
            self._began = now, done
        began_s, first = self._began
        if now <= began_s or not first < done < total:
            return ""
        left_s = (total - done) * (now - began_s) / (done - first)
        minutes = round(left_s / _MINUTE_S)
        if left_s < _MINUTE_S:
            return "less than a minute left"
        return f"about {minutes} minute{'s' if minutes > 1 else ''} left"
