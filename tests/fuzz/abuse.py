"""What no schema leads to: a table by hand, then mixtures of its entries, over bare sockets."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import random
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.fuzz.verdict import Verdict

MARKER = "Planted-7f3a"
_PATIENCE_S = 20.0
_MANY = 100_000
_NOT_HTTP = b"Invalid HTTP request received."  # the server's words, before any of ours
PROBLEM = "application/problem+json"
JSON, TEXT = "application/json", "text/plain"

PIECES = [
    "", ".", "..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "%00", "a%00b", "%ff%fe", "%ed%a0%80", "%0a",
    "%0d%0aset-cookie:%20a=b", "é", "％２ｅ", "con", "a:b", "file:%2f%2f%2fetc", "pipe:ls", "~root",
    "-1", "1e9", "9" * 400, "nan", "0x10", "null", "true", "[]", "{}", "'", '"', "`id`", "$(id)",
    "<script>", "%25%25%73", "\\\\host\\share", MARKER, "x" * 3000, "pets", "0" * 32,
]  # fmt: skip
BODIES = [
    b"", b"null", b"[]", b"{}", b'""', b"0", b"NaN", b"{" * _MANY, b"[" * _MANY, b'{"a":' * 9999,
    b"\xff\xfe{}", json.dumps({MARKER: MARKER}).encode("utf-16"), bytes(1000),
    b"[1" + b",1" * _MANY,
    b'{"dataset": "pets", "prompts": ["a"], "seed": ' + b"9" * 5000 + b"}",
    b'{"dataset": "pets", "prompts": ["a"], "guidance_scale": 1e999}',
    b'{"dataset": "pets", "prompts": ["\\ud800"]}', b'{"dataset": "pets", "prompts": ["\\u0000"]}',
    b'{"dataset": "pets", "prompts": ["\\u001b[31m\\n"]}', b'{"\\ud800": 1}',
    b'{"dataset": "../pets", "prompts": ["a"]}',
    b'{"dataset": "pets", "model": "../a", "prompts": ["a"]}',
    b'{"dataset": "pets", "prompts": ["' + b"x" * 1_000_000 + b'"]}',
    json.dumps({"dataset": "pets", "prompts": [MARKER] * 1001}).encode(),
    json.dumps({"dataset": "pets", "prompts": [1] * 9999}).encode(),
    b'{"dataset": "pets", "dataset": "birds", "prompts": ["a"]}',
    b'{"dataset": "birds", "max_steps": 1e400}',
    b'{"dataset": "birds", "max_steps": 99999999999999}',
    b'{"dataset": "birds", "max_steps": 1, "lr": NaN}', b'{"run_id": "..", "dataset": "digits"}',
    b'{"checkpoint": "runs/../../etc", "dataset": "digits"}',
    b'{"checkpoint": "\\u0000", "dataset": "x"}',
    b'{"run_id": "' + b"9" * 90 + b'", "dataset": "digits"}', b"x" * (3 << 20), b"\n" * 200_000,
    b'caption\n"unclosed' + b" quote" * 999, b"a,b,c\n" * 999, gzip.compress(b"a\n" * _MANY),
    gzip.compress(bytes(32 << 20)), gzip.compress(b"a")[:-4], MARKER.encode() + b"\x1b[31m\n\r\x00",
]  # fmt: skip
HEADERS: list[tuple[str, str]] = [
    ("content-type", JSON), ("content-type", JSON), ("content-type", JSON), ("content-type", TEXT),
    ("content-type", "text/csv"), ("content-type", "application/x-ndjson"), ("content-type", ""),
    ("content-type", "text/tab-separated-values"), ("content-type", "multipart/form-data"),
    ("content-type", f"{TEXT}; charset={MARKER}"), ("content-type", "x" * 3000),
    ("content-encoding", "gzip"), ("content-encoding", "br"), ("content-encoding", "gzip, gzip"),
    ("idempotency-key", ""), ("idempotency-key", "k"), ("idempotency-key", "x" * 300),
    ("idempotency-key", "../../a"), ("range", "bytes=0-"), ("range", "bytes=9-1"), ("range", "x"),
    ("range", "bytes=" + "0-1," * 500), ("range", "bytes=-99999999999999999999"),
    ("last-event-id", MARKER), ("last-event-id", "9" * 50), ("accept", "x/y"), ("accept", ""),
    ("if-range", MARKER), ("host", ""), ("host", MARKER), ("x-forwarded-for", "' OR 1=1 --"),
    ("cookie", "a" * 3000), ("expect", "100-continue"), ("upgrade", "websocket"),
    ("transfer-encoding", "identity"), ("x-http-method-override", "DELETE"),
]  # fmt: skip
QUERIES = [
    "cursor",
    "limit",
    "after",
    "dataset",
    "seed",
    "model",
    "priority",
    "guidance_scale",
    "x",
]
METHODS = [
    "GET",
    "GET",
    "POST",
    "POST",
    "POST",
    "HEAD",
    "PUT",
    "DELETE",
    "OPTIONS",
    "PATCH",
    MARKER,
]
# Not HTTP at all, or just barely; the server may close the connection without a word.
PROTOCOL = [
    b"\x00" * 64, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nhost: a\r\n" + b"a: b\r\n" * 5000 + b"\r\n",
    b"GET /healthz HTTP/1.1\r\nhost: a\r\nx: " + b"b" * 90_000 + b"\r\n\r\n",
    b"GET /v1/batches HTTP/1.1\r\nhost: a\r\nbad header\r\n\r\n",
    b"GET /v1/batches HTTP/1.1\r\nhost: a\r\nx\x00y: z\r\n\r\n",
    b"POST /v1/batches HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
    b"POST /v1/batches HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcdef",
    b"POST /v1/runs HTTP/1.1\r\nhost:a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
    b"POST /v1/runs HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n"
    b"\r\n0\r\n\r\n",
    b"GET http://169.254.169.254/latest HTTP/1.1\r\nhost: a\r\n\r\n",
    b"CONNECT 127.0.0.1:6379 HTTP/1.1\r\nhost: a\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /healthz HTTP/1.1\nhost: a\n\n", b"GET /../../etc/passwd HTTP/1.1\r\nhost: a\r\n\r\n",
]  # fmt: skip


@dataclass(frozen=True)
class Service:
    """Where a service listens, and the paths of its document with values to fill in."""

    port: int
    key: str
    paths: Sequence[str]
    ids: Mapping[str, Sequence[str]]


def abuse(service: Service, verdict: Verdict, cases: int, seed: int) -> None:
    """Send so many: the whole table first, as far as it goes, then mixtures."""
    rng = random.Random(seed)
    goal = verdict.cases + cases
    for raw in PROTOCOL[: max(0, goal - verdict.cases)]:
        status, _, body = _exchange(service.port, raw)
        # Refused in the server's own words, which are few, or by a closed connection.
        verdict.judge("protocol", repr(raw[:60]), status or 400, PROBLEM, body)
    for method, path, headers, content in _requests(service, rng):
        if verdict.cases >= goal:
            return
        raw = _request(service, method, path, headers, content)
        status, content_type, body = _exchange(service.port, raw, method)
        if body == _NOT_HTTP:
            content_type = PROBLEM
        what = f"{method} {path[:100]} {headers} {content[:60]!r}"
        verdict.judge("abuse", what, status, content_type, body)
        if 400 <= status < 500 and MARKER.encode().lower() in body.lower():
            verdict.accuse(f"{what}: {status} repeats what was sent")


def _requests(
    service: Service, rng: random.Random
) -> Iterator[tuple[str, str, list[tuple[str, str]], bytes]]:
    """Every body to every path that takes one, then whatever comes."""
    posts = [path for path in service.paths if "{" not in path]
    for content in BODIES:
        for path in posts:
            yield "POST", path, [rng.choice(HEADERS[:4])], content
    while True:
        path = rng.choice(service.paths)
        for name, values in service.ids.items():
            value = rng.choice(values) if rng.random() < 0.4 else rng.choice(PIECES)
            path = path.replace("{" + name + "}", value)
        query = "&".join(
            f"{rng.choice(QUERIES)}={rng.choice(PIECES)}" for _ in range(rng.randint(0, 3))
        )
        headers = rng.sample(HEADERS, rng.randint(0, 4))
        content = rng.choice(BODIES) if rng.random() < 0.5 else b""
        yield rng.choice(METHODS), f"{path}?{query}" if query else path, headers, content


def _request(
    service: Service, method: str, path: str, headers: list[tuple[str, str]], content: bytes
) -> bytes:
    fields = {"host": "127.0.0.1", "authorization": f"Bearer {service.key}"} | dict(headers)
    fields |= {"content-length": str(len(content)), "connection": "close"}
    lines = [f"{method.upper()} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def _exchange(port: int, raw: bytes, method: str = "GET") -> tuple[int, str, bytes]:
    """Status (0: no answer), content type and body of an answer; of a stream only its start."""
    with socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE_S) as connection:
        with contextlib.suppress(OSError):  # refused before all was sent: the answer may be there
            connection.sendall(raw)
        try:
            answer = http.client.HTTPResponse(connection, method=method)
            answer.begin()
            content_type = answer.headers.get("content-type", "")
            body = b"" if content_type.startswith("text/event-stream") else answer.read()
        except (OSError, http.client.HTTPException):
            return 0, "", b""
        return answer.status, content_type, body


def hold_open(port: int, connections: int) -> list[socket.socket]:
    """Connections that each sent half a header and will never send the rest."""
    held = []
    for _ in range(connections):
        connection = socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE_S)
        connection.sendall(b"POST /v1/batches HTTP/1.1\r\nhost: a\r\nx-slow: ")
        held.append(connection)
    return held
