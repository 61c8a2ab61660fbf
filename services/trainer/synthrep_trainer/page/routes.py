"""The page's routes: the sheet, its parts, and the stream that keeps them fresh.

None of them is part of the API. Answers are HTML, errors too. What changes anything takes a header
that no other site can send.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from typing import get_args

import anyio
from fastapi import Depends, HTTPException, Request, Response
from fastapi.responses import HTMLResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from prometheus_client import CollectorRegistry, Gauge

from synthrep_shared.asgi import NEEDS_NO_KEY, needs
from synthrep_shared.errors import SynthRepError
from synthrep_shared.keys import Principal
from synthrep_shared.messages import ProbeRequest, RunRequest
from synthrep_trainer.context import Context, ContextDep
from synthrep_trainer.page.answers import ChoiceDep, ViewerDep, in_page_thread, make_router
from synthrep_trainer.page.door import PREFIX, Keys, keys_of, remember
from synthrep_trainer.page.forms import fields_of
from synthrep_trainer.page.refusals import UNKNOWN_KEY, html
from synthrep_trainer.page.rendering import clock, render
from synthrep_trainer.page.sections import PARTS, Choice, Viewer, picked_dataset
from synthrep_trainer.probe_data import known_datasets
from synthrep_trainer.problems import too_many

STATIC: Mapping[str, str] = {
    "page.css": "text/css",
    "icon.svg": "image/svg+xml",
    "htmx.min.js": "text/javascript",
    "htmx-ext-sse.min.js": "text/javascript",
    "idiomorph-ext.min.js": "text/javascript",
}
"""What the browser loads beside the page, by name with its type."""
OPEN_PATHS = ("/", f"{PREFIX}/session", *(f"{PREFIX}/static/{name}" for name in STATIC))
"""What is there without a key: the sheet, which asks for one, and its looks."""
_PAUSE_S = 1.0
_MAX_VIEWERS = 64
router = make_router()


@router.get("/", openapi_extra=NEEDS_NO_KEY)
async def sheet(request: Request, context: ContextDep, choice: ChoiceDep) -> HTMLResponse:
    """The page, with everything that it shows now; without a key, a form that asks for one."""
    caller = request.scope["state"]["principal"]
    if caller is None or not caller.has("read"):
        return _sign_in_form(context, _why_not(request, caller))
    viewer = Viewer(context, request.app.state.generator, caller, keys_of(request))
    return await in_page_thread(_sheet, viewer, choice)


def _sign_in_form(context: Context, problem: str = "") -> HTMLResponse:
    needs_key = bool(context.settings.api_keys)
    return html(render("sign_in.html", problem=problem, needs_key=needs_key))


def _why_not(request: Request, caller: Principal | None) -> str:
    """What is wrong with the key that came, if one did."""
    if caller is not None:
        return "This key may not look: it lacks the scope read."
    return UNKNOWN_KEY if keys_of(request).trainer else ""


def _sheet(viewer: Viewer, choice: Choice) -> HTMLResponse:
    runs, _ = viewer.runs()
    run = viewer.picked_run(choice)
    generation, _ = viewer.generation()
    dataset = picked_dataset(generation, choice, run)
    return html(
        render(
            "sheet.html",
            parts={name: make(viewer, choice) for name, make in PARTS.items()},
            choice=choice,
            datasets=[known.name for known in generation.datasets] if generation else [],
            dataset=dataset.name if dataset else "",
            objectives=get_args(RunRequest.model_fields["objective"].annotation),
            protocols=get_args(ProbeRequest.model_fields["protocol"].annotation),
            probe_sets=sorted(known_datasets(viewer.context.settings)),
            runs=runs,
            run_id=run.id if run else "",
            has_keys=any(viewer.keys),
            caller=viewer.caller,
            now=datetime.now(UTC),
        )
    )


@router.get(PREFIX + "/static/{name}", openapi_extra=NEEDS_NO_KEY)
async def static(request: Request, name: str) -> Response:
    """The style, the icon and the scripts that travel with the package."""
    if name not in STATIC:
        raise HTTPException(404, "there is no such file")
    data, tag = _static_file(name)
    headers = {"cache-control": "no-cache", "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=STATIC[name], headers=headers)


@cache
def _static_file(name: str) -> tuple[bytes, str]:
    data = (resources.files(__package__) / "static" / name).read_bytes()
    return data, f'"{hashlib.sha256(data).hexdigest()[:16]}"'


@router.get(PREFIX + "/session", openapi_extra=NEEDS_NO_KEY)
async def session(context: ContextDep) -> HTMLResponse:
    """A form that asks for the keys."""
    return _sign_in_form(context)


@router.post(PREFIX + "/session", openapi_extra=NEEDS_NO_KEY)
async def sign_in(request: Request) -> Response:
    """Keeps the keys of the form in the browser; an empty form forgets them."""
    fields = fields_of(await request.body())
    keys = Keys(*(fields.get(name, [""])[-1].strip() for name in ("key", "generator_key")))
    response = Response(headers={"hx-redirect": "/"})
    remember(response, request, keys)
    return response


@router.get(PREFIX + "/parts/{name}", openapi_extra=needs("read"))
def part(viewer: ViewerDep, choice: ChoiceDep, name: str) -> HTMLResponse:
    """One part of the page as it is now."""
    if name not in PARTS:
        raise HTTPException(404, "there is no such part")
    return html(PARTS[name](viewer, choice))


async def _seat(request: Request) -> AsyncIterator[None]:
    """Holds one of the places for open pages; raises 429 where all are taken."""
    seats: anyio.CapacityLimiter = request.app.state.viewers
    try:
        seats.acquire_on_behalf_of_nowait(request)
    except anyio.WouldBlock:
        raise too_many("too many pages are open") from None
    try:
        yield
    finally:
        seats.release_on_behalf_of(request)


def make_viewer_limiter(registry: CollectorRegistry) -> anyio.CapacityLimiter:
    """How many pages may be open at once; how many are, `registry` is told."""
    limiter = anyio.CapacityLimiter(_MAX_VIEWERS)
    gauge = Gauge("synthrep_trainer_open_pages", "Pages that are kept fresh.", registry=registry)
    gauge.set_function(lambda: limiter.borrowed_tokens)
    return limiter


@router.get(
    PREFIX + "/events",
    response_class=EventSourceResponse,
    openapi_extra=needs("read"),
    dependencies=[Depends(_seat)],
)
async def events(viewer: ViewerDep, choice: ChoiceDep) -> AsyncIterator[ServerSentEvent]:
    """Each part whenever it looks different, under its name; the time, so that a halt is seen."""
    shown: dict[str, str] = {}
    while not viewer.context.is_ending():
        yield ServerSentEvent(event="clock", raw_data=clock(datetime.now(UTC)))
        now = viewer.again()
        for name, make in PARTS.items():
            html = await in_page_thread(_made, make, now, choice)
            if html is not None and html != shown.get(name):
                shown[name] = html
                yield ServerSentEvent(event=name, raw_data=html)
        await anyio.sleep(_PAUSE_S)


def _made(make: Callable[[Viewer, Choice], str], viewer: Viewer, choice: Choice) -> str | None:
    """The part, or None where a file or a run has gone, or is damaged: the next look tells more."""
    try:
        return make(viewer, choice)
    except (HTTPException, OSError, SynthRepError, ValueError):
        return None
