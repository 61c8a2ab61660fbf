"""An object store for tests: moto's S3 behind a door that can be made to fail.

moto looks whether a name is free and writes a moment later; the door lets one write in at a time,
so that a conditional PUT is what it is in a real store.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

REGION = "us-east-1"
_ERRORS = ("500 Internal Server Error", "503 Slow Down")
_CONFLICT = "409 Conflict"
_WRITES = ("PUT", "POST", "DELETE")


class _QuietHandler(WSGIRequestHandler):
    def log(self, *arguments: Any) -> None:
        pass


class StoreServer:
    """Serves until `close`; what goes wrong is in the attributes, which `heal` sets back."""

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._writing = threading.Lock()
        self._counting = threading.Lock()
        self._server = make_server(
            "127.0.0.1", 0, self._serve, threaded=True, request_handler=_QuietHandler
        )
        self._server.daemon_threads = True  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.heal()

    def heal(self) -> None:
        """Let everything go well again, and forget what was counted."""
        self.error_rate, self.hang_s = 0.0, 0.5
        self.rng = random.Random(0)
        self.conflicts = self.lost_answers = self.broken_answers = 0
        self.is_conditional = True
        self.requests: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()

    def environment(self) -> dict[str, str]:
        """Variables that lead a client here."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _serve(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        fault = self._next_fault(method, "HTTP_IF_NONE_MATCH" in environ)
        if fault == "error":
            return self._refuse(start, self.rng.choice(_ERRORS))
        if fault == "conflict":
            return self._refuse(start, _CONFLICT)
        if not self.is_conditional:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        answer: list[Any] = []

        def note(status: str, headers: list[tuple[str, str]], *_: Any) -> None:
            answer[:] = [status, headers]

        if method in _WRITES:
            with self._writing:
                body = b"".join(self._moto(environ, note))
        else:
            body = b"".join(self._moto(environ, note))
        if fault == "lost":
            return self._refuse(start, self.rng.choice(_ERRORS))
        if fault == "hang":
            time.sleep(self.hang_s)
        start(*answer)
        return [body[: len(body) // 2]] if fault == "broken" else [body]

    def _next_fault(self, method: str, is_conditional: bool) -> str | None:
        with self._counting:
            self.requests[method] += 1
            fault = None
            if is_conditional and self.conflicts:
                self.conflicts -= 1
                fault = "conflict"
            elif is_conditional and self.lost_answers:
                self.lost_answers -= 1
                fault = "lost"
            elif method == "GET" and self.broken_answers:
                self.broken_answers -= 1
                fault = "broken"
            elif self.rng.random() < self.error_rate:
                kinds = ["error", "lost", "hang"]
                kinds += ["broken"] if method == "GET" else ["conflict"] if is_conditional else []
                fault = self.rng.choice(kinds)
            if fault:
                self.faults[fault] += 1
            return fault

    @staticmethod
    def _refuse(start: Callable[..., Any], status: str) -> Iterable[bytes]:
        code = {"409": "ConditionalRequestConflict", "503": "SlowDown"}.get(status[:3], "Internal")
        body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]
