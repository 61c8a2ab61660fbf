"""Routes of batches: hand prompts in, see how far they are, stop them."""

from __future__ import annotations

import heapq
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import (
    APIRouter,
    BackgroundTasks,
    Depends,
    Header,
    HTTPException,
    Query,
    Request,
    Response,
)
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from synthrep_generator.admission import Order, digest_prompts
from synthrep_generator.context import (
    BatchId,
    CallerDep,
    Context,
    ContextDep,
    Limit,
    Position,
    may_handle,
)
from synthrep_generator.failure_reader import failure_views
from synthrep_generator.intake import BatchHeader
from synthrep_generator.tally import Batch
from synthrep_shared.asgi import needs, problem_answers
from synthrep_shared.keys import Principal
from synthrep_shared.messages import (
    BatchAccepted,
    BatchRequest,
    BatchView,
    FailureView,
    GenerationSettings,
    Page,
)
from synthrep_shared.samples import DATASET_PATTERN

router = APIRouter(prefix="/v1/batches", tags=["batches"])
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="Makes a request safe to repeat: the same key and body get the same answer",
    ),
]
BatchCursor = Annotated[
    str | None,
    Query(
        pattern=r"^[0-9]{1,18}-[A-Za-z0-9_-]{1,64}$",
        description="`next_cursor` of the answer before",
    ),
]
_JSON_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/BatchRequest"}}},
    }
}


def accepted_fields(header: BatchHeader) -> dict[str, Any]:
    """The fields of the answer 202 that follow from what was made durable."""
    batch, dataset = f"/v1/batches/{header.id}", f"/v1/datasets/{header.dataset}"
    links = {
        "self": batch,
        "failures": f"{batch}/failures",
        "dataset": dataset,
        "shards": f"{dataset}/shards",
    }
    return {
        "id": header.id,
        "dataset": header.dataset,
        "prompts_accepted": header.num_prompts,
        "links": links,
    }


def generation_settings(asked: GenerationSettings) -> GenerationSettings:
    """The settings of a larger request, alone."""
    fields = {name: getattr(asked, name) for name in GenerationSettings.model_fields}
    return GenerationSettings(**fields)


async def _json_body(request: Request) -> bytes:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise HTTPException(415, "send application/json")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise HTTPException(415, "send the body without a Content-Encoding")
    return await request.body()


@router.post(
    "",
    status_code=202,
    response_model=BatchAccepted,
    summary="Hand in up to 1,000 prompts",
    responses=problem_answers(408, 409, 413, 415, 429, 503, 507),
    openapi_extra=needs("submit") | _JSON_BODY,
)
def submit(
    context: ContextDep,
    caller: CallerDep,
    tasks: BackgroundTasks,
    body: Annotated[bytes, Depends(_json_body)],
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """The prompts are durable when the answer is 202; one bad prompt refuses all of them."""
    try:
        asked = BatchRequest.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError(
            error.errors(include_url=False, include_context=False, include_input=False)
        ) from error
    order = Order(
        dataset=asked.dataset,
        settings=generation_settings(asked),
        priority=asked.priority,
        num_prompts=len(asked.prompts),
        prompts_digest=digest_prompts(asked.prompts),
        caller=caller,
        idempotency_key=idempotency_key,
    )
    header = context.admission.accept(order, asked.prompts)
    tasks.add_task(context.live.nudge)
    answer = BatchAccepted(**accepted_fields(header))
    location = {"location": answer.links["self"]}
    # As text: the framework would have another thread check what is right by construction.
    return Response(answer.model_dump_json(), 202, location, media_type="application/json")


@router.get(
    "",
    response_model=Page[BatchView],
    summary="Batches, the newest first",
    responses=problem_answers(),
    openapi_extra=needs("read"),
)
def list_all(
    context: ContextDep,
    caller: CallerDep,
    dataset: Annotated[str | None, Query(pattern=DATASET_PATTERN)] = None,
    cursor: BatchCursor = None,
    limit: Limit = 100,
) -> Page[BatchView]:
    """The caller's, of one data set or of all."""
    indexes = context.catalog.datasets()
    entries = [
        (index, batch)
        for index in indexes
        if dataset in (None, index.name)
        for batch in index.batches()
        if may_handle(caller, batch)
    ]

    if cursor is not None:
        microseconds, _, batch_id = cursor.partition("-")
        last = (-int(microseconds), batch_id)
        entries = [entry for entry in entries if _age(entry[1]) > last]
    newest = heapq.nsmallest(limit + 1, entries, key=lambda entry: _age(entry[1]))
    items = [context.batch_view(*entry) for entry in newest[:limit]]
    next_cursor = None
    if len(newest) > limit:
        microseconds_ago, batch_id = _age(newest[limit - 1][1])
        next_cursor = f"{-microseconds_ago}-{batch_id}"
    return Page[BatchView](items=items, next_cursor=next_cursor)


def _age(batch: Batch) -> tuple[int, str]:
    """Sorts batches, the newest first: microseconds before 1970, id."""
    return -int(batch.created_at.timestamp() * 1e6), batch.id


@router.get(
    "/{batch_id}",
    response_model=BatchView,
    summary="How far a batch is",
    responses=problem_answers(404),
    openapi_extra=needs("read"),
)
async def get(context: ContextDep, caller: CallerDep, batch_id: BatchId) -> BatchView:
    """`accepted` is the sum of the other five counts, always."""
    # Many clients ask this all the time, and each change of threads waits for a processor.
    view = context.view_at_hand(caller, batch_id)
    return await run_sync(_view, context, caller, batch_id) if view is None else view


def _view(context: Context, caller: Principal, batch_id: str) -> BatchView:
    return context.batch_view(*context.batch(caller, batch_id))


@router.get(
    "/{batch_id}/failures",
    response_model=Page[FailureView],
    summary="Prompts that ended as failures",
    responses=problem_answers(404),
    openapi_extra=needs("read"),
)
def list_failures(
    context: ContextDep,
    caller: CallerDep,
    batch_id: BatchId,
    cursor: Position = None,
    limit: Limit = 100,
) -> Page[FailureView]:
    """In the order in which they were recorded, each with its reason."""
    index, batch = context.batch(caller, batch_id)
    skip = int(cursor or 0)
    shown = failure_views(index, batch.id, skip=skip, limit=limit)
    has_more = skip + len(shown) < batch.failed
    next_cursor = str(skip + len(shown)) if has_more and shown else None
    return Page[FailureView](items=shown, next_cursor=next_cursor)


@router.post(
    "/{batch_id}/cancel",
    response_model=BatchView,
    summary="Give up what is not done yet",
    responses=problem_answers(404, 503, 507),
    openapi_extra=needs("submit"),
)
def cancel(
    context: ContextDep, caller: CallerDep, batch_id: BatchId, tasks: BackgroundTasks
) -> BatchView:
    """Decides every undecided prompt as cancelled, for good; done images stay."""
    index, batch = context.batch(caller, batch_id)
    index.cancel(batch)
    tasks.add_task(context.live.nudge)
    return context.batch_view(index, batch)


@router.post(
    "/{batch_id}/pause",
    response_model=BatchView,
    summary="Hold a batch back",
    responses=problem_answers(404, 503, 507),
    openapi_extra=needs("submit"),
)
def pause(
    context: ContextDep, caller: CallerDep, batch_id: BatchId, tasks: BackgroundTasks
) -> BatchView:
    """Jobs that run already end; no new ones start until the batch is resumed."""
    return _set_paused(context, caller, batch_id, tasks, paused=True)


@router.post(
    "/{batch_id}/resume",
    response_model=BatchView,
    summary="Let a paused batch go on",
    responses=problem_answers(404, 503, 507),
    openapi_extra=needs("submit"),
)
def resume(
    context: ContextDep, caller: CallerDep, batch_id: BatchId, tasks: BackgroundTasks
) -> BatchView:
    """No effect on a batch that is not paused."""
    return _set_paused(context, caller, batch_id, tasks, paused=False)


def _set_paused(
    context: Context, caller: Principal, batch_id: str, tasks: BackgroundTasks, *, paused: bool
) -> BatchView:
    index, batch = context.batch(caller, batch_id)
    index.pause(batch, paused)
    tasks.add_task(context.live.nudge)
    return context.batch_view(index, batch)
