"""What the page's routes share: who looks at what, and answers that are HTML, refusals too."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from functools import partial, wraps
from http import HTTPStatus
from inspect import isasyncgenfunction, iscoroutinefunction
from typing import Annotated, Any, TypeVar

from anyio import CapacityLimiter
from anyio.lowlevel import RunVar
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute
from pydantic import ValidationError

from synthrep_shared.errors import ServiceError, SynthRepError
from synthrep_shared.samples import DATASET_PATTERN
from synthrep_trainer.context import CallerDep, ContextDep
from synthrep_trainer.page.door import keys_of
from synthrep_trainer.page.forms import problems
from synthrep_trainer.page.generator import Place
from synthrep_trainer.page.refusals import html, refusal
from synthrep_trainer.page.rendering import render
from synthrep_trainer.page.sections import Choice, Viewer
from synthrep_trainer.routes_comparisons import NAME_PATTERN

_log = logging.getLogger(__name__)
T = TypeVar("T")
_MAX_THREADS = 32
_threads: RunVar[CapacityLimiter] = RunVar("page_threads")
_PLACE = r"^[0-9]{1,15}\.[0-9]{1,9}$"


def done(sentence: str, call: str = "") -> HTMLResponse:
    """What a form is answered when it worked, with the command that does the same."""
    return html(render("notice.html", sentences=[sentence], call=call, is_problem=False))


async def in_page_thread(work: Callable[..., T], *args: Any) -> T:
    """Work in a thread of the page's: those who wait for the generator take none of the API's."""
    try:
        limiter = _threads.get()
    except LookupError:
        limiter = CapacityLimiter(_MAX_THREADS)
        _threads.set(limiter)
    return await run_sync(work, *args, limiter=limiter)


def _awaited(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    if iscoroutinefunction(endpoint) or isasyncgenfunction(endpoint):
        return endpoint

    @wraps(endpoint)
    async def called(**fields: Any) -> Any:
        return await in_page_thread(partial(endpoint, **fields))

    return called


class _HtmlRoute(APIRoute):
    """A route whose refusals are a sentence in HTML, with the status that the API gives.

    What blocks has the page's threads.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **settings: Any) -> None:
        super().__init__(path, _awaited(endpoint), **settings)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, guarded."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                return await handle(request)
            except HTTPException as error:
                return refusal(request.headers, error.status_code, [str(error.detail)])
            except ServiceError as error:
                if error.status == HTTPStatus.UNAUTHORIZED:  # the generator's word, not ours
                    return refusal(request.headers, 403, ["the generator does not know this key"])
                status = error.status if error.status >= HTTPStatus.BAD_REQUEST else 502
                return refusal(request.headers, status, [error.detail or error.title])
            except (RequestValidationError, ValidationError) as error:
                return refusal(request.headers, 422, problems(error.errors()))
            except SynthRepError as error:
                return refusal(request.headers, 422, [str(error)])
            except OSError as error:
                _log.error("storage_failed", exc_info=error)
                return refusal(request.headers, 503, ["the storage does not answer"])

        return guarded


async def _sent_by_the_page(request: Request) -> None:
    """Refuses what another site made a browser send: only a script of this origin sets a header."""
    if request.method == "POST" and request.headers.get("hx-request") != "true":
        raise HTTPException(403, "only the page itself sends this")


async def _viewer(request: Request, context: ContextDep, caller: CallerDep) -> Viewer:
    return Viewer(context, request.app.state.generator, caller, keys_of(request))


async def _choice(
    run: Annotated[str | None, Query(max_length=128)] = None,
    dataset: Annotated[str | None, Query(pattern=DATASET_PATTERN)] = None,
    before: Annotated[str | None, Query(pattern=_PLACE)] = None,
    older_runs: Annotated[str | None, Query(max_length=128)] = None,
    comparison: Annotated[str | None, Query(pattern=NAME_PATTERN)] = None,
) -> Choice:
    place = Place(*map(int, before.split("."))) if before else None
    return Choice(run, dataset, place, older_runs, comparison)


async def _form(request: Request) -> bytes:
    return await request.body()


ViewerDep = Annotated[Viewer, Depends(_viewer)]
ChoiceDep = Annotated[Choice, Depends(_choice)]
FormDep = Annotated[bytes, Depends(_form)]


def make_router() -> APIRouter:
    """For routes that are no part of the API and answer with HTML."""
    return APIRouter(
        route_class=_HtmlRoute,
        include_in_schema=False,
        default_response_class=HTMLResponse,
        dependencies=[Depends(_sent_by_the_page)],
    )
