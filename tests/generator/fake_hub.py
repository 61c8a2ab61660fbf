"""A model hub on loopback: repositories as dicts of bytes, with the faults that a hub can have."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REVISION = "0123456789abcdef0123456789abcdef01234567"
_LARGE = (".safetensors", ".bin", ".ckpt")  # what a hub keeps in LFS


class FakeHub:
    """`repos[repo][file]` is what the metadata speak of, `served` what is sent in its place."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.served: dict[str, bytes] = {}
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str | None]] = []  # path and Range of each file request
        self.tokens: list[str | None] = []
        self.url = ""
        self.revision = REVISION

    def listing(self, repo: str) -> dict[str, Any]:
        siblings = []
        for name, data in self.repos[repo].items():
            blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            file: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
            if name.endswith(_LARGE):
                digest = hashlib.sha256(data).hexdigest()
                file["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
            siblings.append(file)
        return {"id": repo, "sha": self.revision, "siblings": siblings}


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            hub.tokens.append(self.headers.get("Authorization"))
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
                self._answer_listing(match[1])
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[0-9a-f]+/(.+)", path):
                self._answer_file(match[1], match[2])
            else:
                self._send(404, b"")

        def _answer_listing(self, repo: str) -> None:
            if repo in hub.gated and not self.headers.get("Authorization"):
                self._send(403, b"", {"X-Error-Code": "GatedRepo"})
            elif repo not in hub.repos:
                self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            else:
                self._send(200, json.dumps(hub.listing(repo)).encode())

        def _answer_file(self, repo: str, name: str) -> None:
            wanted = self.headers.get("Range")
            hub.requests.append((name, wanted))
            data = hub.served.get(name, hub.repos[repo][name])
            if wanted is None:
                self._send(200, data)
                return
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            content = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(206, data[start:], {"Content-Range": content})

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextmanager
def run_hub() -> Iterator[FakeHub]:
    """A hub that answers while the context lasts."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
