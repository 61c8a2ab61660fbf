"""How a browser shows its keys: in cookies that no script can read and no other site can use.

An `EventSource` and an `<img>` cannot send the header `Authorization`, so the page's own paths,
and no others, take the key from a cookie. The API below `/v1` never does, so a page elsewhere
cannot act for its reader.
"""

from __future__ import annotations

import base64
import binascii
from http import HTTPStatus
from typing import NamedTuple

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from synthrep_shared.asgi import App, Message, Receive, Scope, Send

PREFIX = "/page"
_TRAINER_COOKIE, _GENERATOR_COOKIE = "synthrep_key", "synthrep_generator_key"
_MAX_AGE_S = 12 * 3600


class Keys(NamedTuple):
    """A viewer's keys; empty: none."""

    trainer: str
    generator: str
    """For the generator, where it takes another."""


class Door:
    """Wraps the service: requests for the page get the header that their cookie stands for."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_of_page(scope):
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        key = _decoded(connection.cookies.get(_TRAINER_COOKIE, ""))
        if key and "authorization" not in connection.headers:
            header = (b"authorization", b"Bearer " + key.encode())
            scope = {**scope, "headers": [*scope["headers"], header]}

        async def send_on(message: Message) -> None:
            if message.get("status") == HTTPStatus.UNAUTHORIZED:  # htmx then asks for the key
                message = {**message, "headers": [*message["headers"], (b"hx-redirect", b"/")]}
            await send(message)

        await self._app(scope, receive, send_on)


def keys_of(request: Request) -> Keys:
    """The keys that a request came with; the trainer's is the generator's, unless told apart."""
    header = request.headers.get("authorization", "").encode("latin-1").decode(errors="replace")
    trainer = header.partition(" ")[2].strip()
    return Keys(trainer, _decoded(request.cookies.get(_GENERATOR_COOKIE, "")) or trainer)


def remember(response: Response, request: Request, keys: Keys) -> None:
    """Keep the keys in the browser, for half a day; empty ones are forgotten."""
    is_secure = request.url.scheme == "https"
    for name, key in zip((_TRAINER_COOKIE, _GENERATOR_COOKIE), keys, strict=True):
        response.set_cookie(
            name, _encoded(key), max_age=_MAX_AGE_S if key else 0,
            httponly=True, samesite="strict", secure=is_secure,
        )  # fmt: skip


def is_of_page(scope: Scope) -> bool:
    """Whether it is a request for the page, and for no part of the API."""
    if scope["type"] != "http":
        return False
    path: str = scope["path"]
    return path == "/" or path.startswith(PREFIX + "/")


def _encoded(key: str) -> str:
    return base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


def _decoded(value: str) -> str:
    """The key in a cookie; empty for what no cookie of ours holds."""
    try:
        padded = value + "=" * (-len(value) % 4)
        key = base64.b64decode(padded, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return ""
    return key if key.isprintable() else ""
