"""Routes of the labelled sets that probes are made on."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Annotated, Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, HTTPException, Query, Request, Response

from synthrep_shared.asgi import needs, problem_answers
from synthrep_shared.bodies import spool_body
from synthrep_shared.messages import Page, ProbeSetRequest, ProbeSetView
from synthrep_shared.messages.fields import ProbeSetName
from synthrep_trainer.context import Context, ContextDep, Cursor, Limit, parse_body
from synthrep_trainer.probe_data import ProbeDataError, ProbeDataset, known_datasets, uploads_of
from synthrep_trainer.probe_uploads import NameTakenError, accept_folder, accept_zip
from synthrep_trainer.problems import too_many

_log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/probe-datasets", tags=["probes"])
_MAX_UPLOADS = 2
_SILENCE_S = 30.0
_UNPACKED_PER_BYTE = 4  # images hardly shrink in a zip; what grows more is a bomb
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/ProbeSetRequest"}},
            "application/zip": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


def make_upload_limiter() -> anyio.CapacityLimiter:
    """How many uploads may come in at once."""
    return anyio.CapacityLimiter(_MAX_UPLOADS)


@router.get(
    "",
    response_model=Page[ProbeSetView],
    summary="Labelled sets by name",
    responses=problem_answers(503),
    openapi_extra=needs("read"),
)
def list_sets(context: ContextDep, cursor: Cursor = None, limit: Limit = 100) -> Page[ProbeSetView]:
    """Those that travel with the service, published ones, uploaded ones, and the folder's tars."""
    try:
        sets = known_datasets(context.settings)
    except ProbeDataError as error:
        raise HTTPException(503, "the folder of labelled sets cannot be read") from error
    names = sorted(name for name in sets if cursor is None or name > cursor)
    items = [_set_view(sets[name]) for name in names[:limit]]
    next_cursor = names[limit - 1] if len(names) > limit else None
    return Page[ProbeSetView](items=items, next_cursor=next_cursor)


@router.post(
    "",
    status_code=201,
    response_model=ProbeSetView,
    summary="Add a labelled set: a folder of the server, or a zip of class/image files",
    responses=problem_answers(408, 409, 413, 415, 422, 429, 503),
    openapi_extra=needs("probe") | _BODY,
)
async def add(
    context: ContextDep,
    request: Request,
    response: Response,
    name: Annotated[ProbeSetName | None, Query(description="Name of the set, for a zip")] = None,
) -> ProbeSetView:
    """The zip holds `class/image`, of which a fifth is for test, or `train|val|test/class/image`.

    A folder lies under one of the service's allowed roots, with `train` and `test`.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in ("application/json", "application/zip"):
        raise HTTPException(415, "send application/json or application/zip")
    if media_type == "application/zip" and name is None:
        raise HTTPException(422, "give the name of the set as ?name=")
    uploads: anyio.CapacityLimiter = request.app.state.probe_uploads
    try:
        uploads.acquire_on_behalf_of_nowait(request)
    except anyio.WouldBlock:
        raise too_many(f"{_MAX_UPLOADS} uploads are coming in; send this one later") from None
    try:
        with tempfile.TemporaryFile(dir=context.place.root) as body:
            is_zip = media_type == "application/zip"
            settings = context.settings
            limit = settings.probe_upload_bytes if is_zip else settings.max_body_bytes
            try:
                await spool_body(_capped(request.stream(), limit), body, silence_s=_SILENCE_S)
            except TimeoutError:
                raise HTTPException(408, "the body came too slowly") from None
            accept = _accept_zip if is_zip else _accept_folder
            dataset = await anyio.to_thread.run_sync(accept, context, body, name)
    finally:
        uploads.release_on_behalf_of(request)
    _log.info("probe_set_added", extra={"set": dataset.name, "folder": str(dataset.folder)})
    response.headers["location"] = "/v1/probe-datasets"
    return _set_view(dataset)


async def _capped(chunks: AsyncIterator[bytes], limit: int) -> AsyncIterator[bytes]:
    """The chunks as they come; raises 413 beyond the limit, which depends on the body's type."""
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise HTTPException(413, f"the body may hold at most {limit} bytes")
        yield chunk


def _accept_zip(context: Context, body: IO[bytes], name: str | None) -> ProbeDataset:
    assert name is not None, "checked before the body came"
    _require_new(context, name)
    max_bytes = _UNPACKED_PER_BYTE * context.settings.probe_upload_bytes
    try:
        return accept_zip(body, name, sets=uploads_of(context.settings), max_bytes=max_bytes)
    except ProbeDataError as error:
        raise _refusal(error) from error


def _accept_folder(context: Context, body: IO[bytes], _: str | None) -> ProbeDataset:
    asked = parse_body(ProbeSetRequest, body.read())
    _require_new(context, asked.name)
    try:
        return accept_folder(
            Path(asked.folder),
            asked.name,
            sets=uploads_of(context.settings),
            allowed_roots=context.settings.probe_folder_roots,
        )
    except ProbeDataError as error:
        raise _refusal(error) from error


def _require_new(context: Context, name: str) -> None:
    """Raises 409 for the name of any set, lest one hides another."""
    if name in known_datasets(context.settings):
        raise HTTPException(409, "there is a labelled set of this name; choose another")


def _refusal(error: ProbeDataError) -> HTTPException:
    return HTTPException(409 if isinstance(error, NameTakenError) else 422, str(error))


def _set_view(dataset: ProbeDataset) -> ProbeSetView:
    try:
        classes = dataset.class_names
        return ProbeSetView(
            name=dataset.name,
            classes=None if classes is None else list(classes),
            splits=list(dataset.splits),
            metric=dataset.metric,
        )
    except ProbeDataError as error:
        return ProbeSetView(
            name=dataset.name, classes=None, splits=[], metric=None, error=str(error)
        )
