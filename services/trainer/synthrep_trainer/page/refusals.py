"""Refusals that a browser shows, in HTML: those of the page's routes and those around them."""

from __future__ import annotations

import json
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse

from synthrep_shared.asgi import App, Message, ProblemResponse, Receive, Scope, Send
from synthrep_trainer.page.door import is_of_page
from synthrep_trainer.page.rendering import render

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
}
UNKNOWN_KEY = "This key is not one of the service’s."
_OF_THE_BODY = (b"content-type", b"content-length")


def html(body: str, status: int = 200) -> HTMLResponse:
    """HTML that may load nothing from elsewhere."""
    return HTMLResponse(body, status, headers=_HEADERS)


def refusal(headers: Headers, status: int, sentences: list[str]) -> HTMLResponse:
    """A refusal: for its place on the page, or as a page where the browser went there.

    `headers` are the request's. Who went there without an accepted key is asked for one.
    """
    is_fragment = "hx-request" in headers
    if status == HTTPStatus.UNAUTHORIZED and not is_fragment:
        problem = UNKNOWN_KEY if "authorization" in headers else ""
        return html(render("sign_in.html", problem=problem, needs_key=True), status)
    template = "notice.html" if is_fragment else "refusal.html"
    return html(render(template, sentences=sentences, call="", is_problem=True), status)


class HtmlProblems:
    """Wraps the guarded service: what a browser is refused at the page's paths, it gets as HTML."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_of_page(scope):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if "hx-request" not in headers and "text/html" not in headers.get("accept", ""):
            await self._app(scope, receive, send)
            return
        problem: Message | None = None
        body = b""

        async def send_html(message: Message) -> None:
            nonlocal problem, body
            if message["type"] == "http.response.start" and _is_problem(message):
                problem = message
            elif problem is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    await _as_html(headers, problem, body)(scope, receive, send)

        await self._app(scope, receive, send_html)


def _is_problem(start: Message) -> bool:
    kind = dict(start.get("headers", ())).get(b"content-type")
    return kind == ProblemResponse.media_type.encode()


def _as_html(headers: Headers, start: Message, body: bytes) -> HTMLResponse:
    told = json.loads(body)
    answer = refusal(headers, start["status"], [told.get("detail", told["title"])])
    answer.raw_headers += [pair for pair in start["headers"] if pair[0] not in _OF_THE_BODY]
    return answer
