"""Clients of the API that ask at a fixed rate and note how long each answer takes."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_JOIN_S = 60.0


@dataclass(frozen=True)
class Latency:
    """Times of the answers of one kind, in milliseconds."""

    answers: int
    p50_ms: float
    p99_ms: float
    max_ms: float


def latency(milliseconds: Sequence[float]) -> Latency:
    """By the nearest rank: of fewer than a hundred answers, p99 is the slowest."""
    found = sorted(milliseconds)
    p50, p99 = (found[math.ceil(share * len(found)) - 1] for share in (0.50, 0.99))
    return Latency(len(found), round(p50, 2), round(p99, 2), round(found[-1], 2))


@dataclass
class Client(threading.Thread):
    """Sends what `request` gives (method, path, body), at least once, `rate` times a second.

    A request is due by the clock, whatever the one before took, and its time counts from when it
    was due: a server that stalls is charged with the requests that queue up meanwhile.
    """

    port: int
    rate: float
    request: Callable[[], tuple[str, str, Any]]
    timeout_s: float = 60.0
    answers: list[Any] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    error: str = ""

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self._stopped = threading.Event()

    __hash__ = threading.Thread.__hash__

    def stop(self) -> None:
        """End after the answer at hand; raises RuntimeError if an answer was not a success."""
        self._stopped.set()
        self.join(_JOIN_S)
        if self.error:
            raise RuntimeError(self.error)

    def ask_once(self) -> None:
        """Send one more from this thread, untimed; raises RuntimeError, OSError."""
        with contextlib.closing(self._connect()) as connection:
            self.answers.append(self._ask(connection))

    def run(self) -> None:
        """The thread: see the class."""
        try:
            with contextlib.closing(self._connect()) as connection:
                due_at = time.perf_counter()
                while True:
                    self.answers.append(self._ask(connection))
                    self.milliseconds.append(1e3 * (time.perf_counter() - due_at))
                    due_at += 1 / self.rate
                    if self._stopped.wait(max(0.0, due_at - time.perf_counter())):
                        return
        except (OSError, http.client.HTTPException, RuntimeError) as error:
            self.error = repr(error)

    def latency(self) -> Latency:
        """Of all answers of the thread so far, which are one at least."""
        return latency(self.milliseconds)

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout_s)

    def _ask(self, connection: http.client.HTTPConnection) -> Any:
        method, path, body = self.request()
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"content-type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {content[:300]!r}")
        return json.loads(content)
