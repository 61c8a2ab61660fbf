"""What both services put around their routes: problem details, size limit, bearer keys, headers.

Plain ASGI, so that it needs no web framework and sees a request before any of it is parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, MutableMapping
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any

from synthrep_shared.keys import ApiKey, KeyRing, KeyScope, Principal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
_MAX_FIELD_ERRORS = 5
_MAX_LENGTH_DIGITS = 19
_PRINCIPAL = "principal"
_SCHEME = "key"
_ELSEWHERE = (b"cross-site", b"same-site")  # not this origin, says the browser
_SAFE_METHODS = ("GET", "HEAD")
_OPEN_PATHS = frozenset({"/healthz", "/readyz"})
_PORT = re.compile(r":[0-9]*$")
_NOT_OURS = (
    "without API keys the service answers as localhost, by its IP address, and under the names in "
    "SYNTHREP_GENERATOR_ALLOWED_HOSTS or SYNTHREP_TRAINER_ALLOWED_HOSTS"
)


class ProblemResponse:
    """An answer of type `application/problem+json` (RFC 9457), usable wherever an ASGI app is."""

    media_type = "application/problem+json"

    def __init__(self, status: int, detail: str = "", *, retry_after_s: int | None = None,
                 errors: list[dict[str, str]] | None = None,
                 headers: Mapping[str, str] | None = None) -> None:  # fmt: skip
        self.status_code = status
        body: dict[str, Any] = {
            "type": "about:blank", "title": HTTPStatus(status).phrase, "status": status,
        }  # fmt: skip
        if detail:
            body["detail"] = detail[:1000]
        if errors:
            body["errors"] = errors
        self._body = json.dumps(body).encode()  # ASCII, so that any detail can be encoded
        self._headers = [(b"content-type", self.media_type.encode())]
        self._headers.append((b"content-length", str(len(self._body)).encode()))
        for name, value in (headers or {}).items():
            self._headers.append((name.lower().encode(), value.encode("latin-1")))
        if retry_after_s is not None:
            self._headers.append((b"retry-after", str(retry_after_s).encode()))
        if status == HTTPStatus.UNAUTHORIZED:
            self._headers.append((b"www-authenticate", b"Bearer"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self._headers}
        )
        await send({"type": "http.response.body", "body": self._body})


def validation_problem(errors: Iterable[MutableMapping[str, Any]]) -> ProblemResponse:
    """422 from pydantic's error list; names places and rules, never echoes the input."""
    shown = []
    for error in list(errors)[:_MAX_FIELD_ERRORS]:
        place = list(error.get("loc", ()))[:6]
        if error.get("type") == "extra_forbidden" and place:
            place[-1] = "?"  # the sender chose this name
        field = ".".join(str(part)[:64] for part in place)
        message = str(error.get("msg", "")).removeprefix("Value error, ")
        shown.append({"field": field, "message": message[:200]})
    return ProblemResponse(422, "the request does not fit the schema", errors=shown)


class Guard:
    """Wraps an app: bearer keys, a cap on the body, security headers, no unhandled body.

    What a browser sends for a page of another site changes nothing, key or not.
    `keys` are the accepted bearer keys (none: open); whose request it is, `principal_of` tells the
    app. Paths in `large_paths` have their own cap; `open_paths` need no key, as health checks do.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: Iterable[ApiKey],
        max_body_bytes: int,
        large_paths: Mapping[str, int] | None = None,
        open_paths: Iterable[str] = (),
    ) -> None:
        self._app = app
        self._open_paths = _OPEN_PATHS | set(open_paths)
        self._keys = KeyRing(keys)
        self._max_body_bytes = max_body_bytes
        self._large_paths = large_paths or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        answered = False

        async def send_with_headers(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                present = {name for name, _ in message.get("headers", ())}
                extra = [h for h in _SECURITY_HEADERS if h[0] not in present]
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        principal = self._keys.find(headers.get(b"authorization", b""))
        if principal is None and scope["path"] not in self._open_paths:
            problem = ProblemResponse(401, "send the header 'Authorization: Bearer <key>'")
            await problem(scope, receive, send_with_headers)
            return
        if headers.get(b"sec-fetch-site") in _ELSEWHERE and scope["method"] not in _SAFE_METHODS:
            problem = ProblemResponse(403, "a page of another site may not send this")
            await problem(scope, receive, send_with_headers)
            return
        scope.setdefault("state", {})[_PRINCIPAL] = principal
        limit = self._large_paths.get(scope["path"], self._max_body_bytes)
        too_large = ProblemResponse(413, f"the body may hold at most {limit} bytes")
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or len(declared) > _MAX_LENGTH_DIGITS or int(declared) > limit:
            await too_large(scope, receive, send_with_headers)
            return
        try:
            await self._app(scope, _capped(receive, limit), send_with_headers)
        except BodyTooLargeError:
            if answered:
                raise
            await too_large(scope, receive, send_with_headers)


class OwnNames:
    """Wraps a service: without `keys` it answers only under names that no other site can have.

    A page elsewhere may have its own name point to this machine, and a browser then takes the
    service for a part of that page (DNS rebinding). What it cannot have is an IP address, localhost
    and the `names` of this machine; others are answered 421. With keys every name will do, because
    no browser gives the key of one name to another.
    """

    def __init__(self, app: App, *, keys: Collection[ApiKey], names: Iterable[str]) -> None:
        self._app = app
        self._is_open = not keys
        self._names = {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_open and scope["type"] == "http":
            sent = dict(scope["headers"]).get(b"host", b"localhost").decode("latin-1").lower()
            if not self._is_own(_PORT.sub("", sent)):
                headers = {name.decode(): value.decode() for name, value in _SECURITY_HEADERS}
                problem = ProblemResponse(421, _NOT_OURS, headers=headers)
                await problem(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_own(self, name: str) -> bool:
        try:
            ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return name in self._names
        return True


def principal_of(scope: Scope) -> Principal:
    """Who sent the request; for paths that need a key."""
    principal = scope["state"][_PRINCIPAL]
    assert isinstance(principal, Principal)
    return principal


def needs(scope: KeyScope) -> dict[str, Any]:
    """What a route adds to its OpenAPI operation to let in keys of this scope."""
    return {"security": [{_SCHEME: [scope]}]}


NEEDS_NO_KEY: dict[str, Any] = {"security": []}


def may_enter(principal: Principal, operation: Mapping[str, Any] | None) -> bool:
    """Whether the route with these additions `needs` a scope that the caller has; default: no."""
    wanted = [s for option in (operation or {}).get("security", ()) for s in option[_SCHEME]]
    return bool(wanted) and all(principal.has(scope) for scope in wanted)


def describe_keys(document: dict[str, Any], *, has_keys: bool) -> None:
    """Complete an OpenAPI document whose routes say what they need."""
    if has_keys:
        document["components"]["securitySchemes"] = {_SCHEME: {"type": "http", "scheme": "bearer"}}
        return
    for operations in document["paths"].values():
        for operation in operations.values():
            operation.pop("security", None)


class BodyTooLargeError(BaseException):
    """Ends a request whose body grew past the cap.

    Not an Exception: frameworks turn those raised while a body is read into a 400 of their own.
    """


def _capped(receive: Receive, limit: int) -> Receive:
    received = 0

    async def receive_capped() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise BodyTooLargeError
        return message

    return receive_capped


_REASONS = {
    400: "The body ended early",
    401: "No accepted bearer key was sent",
    403: "The key may not do this",
    404: "There is no such thing",
    405: "The path does not take this method",
    408: "The body stopped coming",
    409: "It conflicts with what is there",
    413: "The body is too large",
    415: "The body is of another type than is taken",
    416: "The range is malformed or outside the file",
    422: "The request does not fit the schema",
    429: "Too much work is waiting; see Retry-After",
    503: "What the service needs does not answer; see Retry-After",
    507: "The disk is nearly full; see Retry-After",
}


def problem_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI `responses` of a route that may answer with these problems, besides 401, 403 and 422.

    The document has to define the schema `Problem` (`messages.Problem`).
    """
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {
            "description": _REASONS[status],
            "content": {ProblemResponse.media_type: {"schema": schema}},
        }
        for status in sorted({401, 403, 422, *statuses})
    }
