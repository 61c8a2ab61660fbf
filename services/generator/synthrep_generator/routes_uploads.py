"""The route of large batches: the body goes to disk as it comes and is read from there.

A slow client holds a temporary file and no thread, and is given up below a least speed. The file
has no name, so that nothing is left behind whatever happens to this process.
"""

from __future__ import annotations

import tempfile
from typing import IO, Annotated, Any

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, BackgroundTasks, HTTPException, Query, Request, Response
from pydantic import ConfigDict, Field, Json

from synthrep_generator.admission import Order
from synthrep_generator.context import CallerDep, Context, ContextDep
from synthrep_generator.errors import HighWaterError, UploadError
from synthrep_generator.routes_batches import IdempotencyKey, accepted_fields, generation_settings
from synthrep_generator.uploads import FORMATS, read_spool, spool_prompts
from synthrep_shared.asgi import needs, problem_answers
from synthrep_shared.bodies import MIN_BYTES_PER_S, spool_body
from synthrep_shared.keys import Principal
from synthrep_shared.messages import (
    DatasetName,
    GenerationSettings,
    MixtureComponent,
    QualityGate,
    UploadAccepted,
)
from synthrep_shared.storage import spool_folder

router = APIRouter(prefix="/v1/batches", tags=["batches"])
_MAX_UPLOADS = 4
_SILENCE_S = 60.0
_CHARSETS = ("utf-8", "utf8", "us-ascii")
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {name: {"schema": {"type": "string", "minLength": 1}} for name in FORMATS},
    }
}


class UploadQuery(GenerationSettings):
    """The fields of `POST /v1/batches` but for the prompts, as query parameters."""

    model_config = ConfigDict(strict=False)

    quality_gate: Json[QualityGate] | None = None
    """The object in JSON."""
    mixture: Json[tuple[MixtureComponent, ...]] = Field(default_factory=tuple, max_length=16)
    """The list in JSON."""

    dataset: DatasetName
    """Data set that the groups are committed to; made if absent."""
    priority: int = Field(default=5, ge=0, le=9)
    """0 is served first, 9 last."""


@router.post(
    "/upload",
    status_code=202,
    response_model=UploadAccepted,
    summary="Hand in a file of up to a million prompts",
    responses=problem_answers(408, 409, 413, 415, 429, 503, 507),
    openapi_extra=needs("submit") | _BODY,
)
async def upload(
    context: ContextDep,
    caller: CallerDep,
    request: Request,
    response: Response,
    tasks: BackgroundTasks,
    query: Annotated[UploadQuery, Query()],
    idempotency_key: IdempotencyKey = None,
) -> UploadAccepted:
    """At most 1,000,000 lines and 1 GiB unpacked; `Content-Encoding: gzip` is taken.

    CSV and TSV: the column that the first row calls `caption` or `prompt`; where it names neither,
    the first column from the first row on. NDJSON: strings, or objects with a `caption` or
    `prompt`. Lines without a prompt are left out and listed under `rejected`.
    """
    media_type, is_gzip = _content(request)
    uploads: anyio.CapacityLimiter = request.app.state.uploads
    try:
        uploads.acquire_on_behalf_of_nowait(request)
    except anyio.WouldBlock:
        raise HighWaterError(f"{_MAX_UPLOADS} uploads are coming in; send this one later") from None
    try:
        await run_sync(_check_early, context, caller, query, idempotency_key)
        with tempfile.TemporaryFile(dir=spool_folder(context.catalog.root)) as raw:
            try:
                await spool_body(request.stream(), raw, silence_s=_SILENCE_S)
            except TimeoutError:
                least = f"{MIN_BYTES_PER_S} bytes a second, with pauses of {_SILENCE_S:.0f} s"
                raise HTTPException(408, f"the body came too slowly; send {least}") from None
            answer = await run_sync(
                _accept, context, query, raw, media_type, is_gzip, caller, idempotency_key
            )
    finally:
        uploads.release_on_behalf_of(request)
    tasks.add_task(context.live.nudge)
    response.headers["location"] = answer.links["self"]
    return answer


def make_upload_limiter() -> anyio.CapacityLimiter:
    """How many uploads may come in at once."""
    return anyio.CapacityLimiter(_MAX_UPLOADS)


def _content(request: Request) -> tuple[str, bool]:
    """The body's media type, and whether it is packed; raises 415."""
    media_type, _, parameters = request.headers.get("content-type", "").partition(";")
    media_type = media_type.strip().lower()
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset" and value.strip(' "').lower() not in _CHARSETS:
            raise HTTPException(415, "send UTF-8")
    if media_type not in FORMATS:
        raise HTTPException(415, f"send one of {', '.join(FORMATS)}")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip"):
        raise HTTPException(415, "send the body as it is or with Content-Encoding: gzip")
    return media_type, encoding == "gzip"


def _check_early(
    context: Context, caller: Principal, query: UploadQuery, idempotency_key: str | None
) -> None:
    """Refuse before the body comes what would be refused after it."""
    context.admission.complete(generation_settings(query))
    context.admission.check_room(caller, query.dataset, idempotency_key)


def _accept(
    context: Context,
    query: UploadQuery,
    raw: IO[bytes],
    media_type: str,
    is_gzip: bool,
    caller: Principal,
    idempotency_key: str | None,
) -> UploadAccepted:
    with tempfile.TemporaryFile(dir=spool_folder(context.catalog.root)) as spool:
        summary = spool_prompts(raw, spool, media_type=media_type, is_gzip=is_gzip)
        if summary.num_prompts == 0:
            reasons = {line.reason for line in summary.rejected.first[:5]}
            raise UploadError("; ".join(["the upload holds no prompt", *sorted(reasons)]))
        order = Order(
            dataset=query.dataset,
            settings=generation_settings(query),
            priority=query.priority,
            num_prompts=summary.num_prompts,
            prompts_digest=summary.prompts_digest,
            caller=caller,
            idempotency_key=idempotency_key,
        )
        header = context.admission.accept(order, read_spool(spool))
    return UploadAccepted(**accepted_fields(header), rejected=summary.rejected)
