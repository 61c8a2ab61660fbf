"""Routes of training runs: start one, watch it, stop it, go on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Header, HTTPException, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from synthrep_shared.asgi import needs, problem_answers
from synthrep_shared.keys import Principal
from synthrep_shared.messages import CheckpointView, Page, RunRequest, RunView
from synthrep_trainer.checkpoint_folders import list_checkpoints
from synthrep_trainer.context import (
    CallerDep,
    Context,
    ContextDep,
    Cursor,
    IdempotencyKey,
    JsonBody,
    Limit,
    RunId,
    newest_first,
    number_from_cursor,
    parse_body,
    readable,
)
from synthrep_trainer.errors import RunError
from synthrep_trainer.metrics import StepMetrics, read_metrics
from synthrep_trainer.probe_data import known_datasets
from synthrep_trainer.problems import too_many
from synthrep_trainer.records import Wanted
from synthrep_trainer.runs import RunFolder
from synthrep_trainer.sources import check_source, generator_of
from synthrep_trainer.views import checkpoint_view, run_view

router = APIRouter(prefix="/v1/runs", tags=["runs"])
_PAUSE_S = 0.5
_MAX_LISTENERS = 64
_MAX_STEPS_AT_ONCE = 500
_RUN_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/RunRequest"}}},
    }
}
After = Annotated[int, Query(ge=-1, lt=2**53, description="Steps after this one")]


@router.post(
    "",
    status_code=202,
    response_model=RunView,
    summary="Start a training run",
    responses=problem_answers(409, 413, 415, 429, 503),
    openapi_extra=needs("submit") | _RUN_BODY,
)
def submit(
    context: ContextDep,
    caller: CallerDep,
    response: Response,
    body: JsonBody,
    idempotency_key: IdempotencyKey = None,
) -> RunView:
    """The run is durable when the answer is 202; a launcher takes it up in its turn."""
    request = parse_body(RunRequest, body)
    folder = context.earlier_run(caller, idempotency_key, request)
    if folder is None:
        _check(context, caller, request)
        folder = context.place.submit_run(request, owner=caller.owner, key=idempotency_key)
    response.headers["location"] = f"/v1/runs/{folder.id}"
    return run_view(folder)


def _check(context: Context, caller: Principal, request: RunRequest) -> None:
    """Raises what becomes 403, 422 or 429."""
    if caller.datasets is not None and not caller.lists(request.dataset_name):
        raise HTTPException(403, "the key does not reach this data set")
    if request.source_url is not None or request.pause_generation_above is not None:
        try:
            check_source(generator_of(request, context.settings), context.settings)
        except RunError as error:
            raise HTTPException(422, str(error)) from error
    known = known_datasets(context.settings) if request.probe_datasets else {}
    if not known.keys() >= set(request.probe_datasets):
        raise HTTPException(422, "there is no such labelled set, see GET /v1/probe-datasets")
    processes = context.settings.processes_per_run
    if request.captions_per_batch % processes:
        raise HTTPException(422, f"captions_per_batch must be a multiple of {processes}")
    if context.num_queued(context.place.runs()) >= context.settings.max_queued:
        raise too_many("too many runs are queued")


@router.get(
    "",
    response_model=Page[RunView],
    summary="Runs, the newest first",
    responses=problem_answers(),
    openapi_extra=needs("read"),
)
def list_all(
    context: ContextDep, caller: CallerDep, cursor: Cursor = None, limit: Limit = 100
) -> Page[RunView]:
    """Each as `GET /v1/runs/{id}` has it."""
    shown, next_cursor = newest_first(context.owned(caller, context.place.runs()), cursor, limit)
    return Page[RunView](items=readable(run_view, shown), next_cursor=next_cursor)


@router.get(
    "/{run_id}",
    response_model=RunView,
    summary="One run",
    responses=problem_answers(404),
    openapi_extra=needs("read"),
)
def get(context: ContextDep, caller: CallerDep, run_id: RunId) -> RunView:
    """State, and the numbers of its newest step."""
    return run_view(context.run(caller, run_id))


@router.post(
    "/{run_id}/stop",
    response_model=RunView,
    summary="Stop a run at a checkpoint",
    responses=problem_answers(404, 409, 503),
    openapi_extra=needs("submit"),
)
def stop(context: ContextDep, caller: CallerDep, run_id: RunId) -> RunView:
    """It is `paused` once its checkpoint is written, and can be resumed."""
    folder = context.run(caller, run_id)
    if folder.state not in ("queued", "running", "paused"):
        raise HTTPException(409, f"the run is {folder.state}")
    folder.write_wanted(folder.wanted.model_copy(update={"verb": "stop"}))
    return run_view(folder)


@router.post(
    "/{run_id}/resume",
    response_model=RunView,
    summary="Go on with a run that was stopped or failed",
    responses=problem_answers(404, 409, 503),
    openapi_extra=needs("submit"),
)
def resume(context: ContextDep, caller: CallerDep, run_id: RunId) -> RunView:
    """From its newest checkpoint, in the order that it would have had."""
    folder = context.run(caller, run_id)
    if folder.state == "completed":
        raise HTTPException(409, "the run is completed")
    attempt = folder.wanted.attempt + (folder.state in ("paused", "failed", "cancelled"))
    folder.write_wanted(Wanted(verb="run", attempt=attempt))
    return run_view(folder)


@router.get(
    "/{run_id}/metrics",
    response_model=Page[StepMetrics],
    summary="Numbers over steps",
    responses=problem_answers(404),
    openapi_extra=needs("read"),
)
def metrics(
    context: ContextDep,
    caller: CallerDep,
    run_id: RunId,
    after: After = -1,
    cursor: Cursor = None,
    limit: Limit = 100,
) -> Page[StepMetrics]:
    """In order of steps, each step once; `cursor` goes before `after`."""
    path = context.run(caller, run_id).metrics
    found = read_metrics(path, after=number_from_cursor(cursor, after), limit=limit + 1)
    items = [StepMetrics.model_validate(line) for line in found[:limit]]
    next_cursor = str(items[-1].step) if len(found) > limit else None
    return Page[StepMetrics](items=items, next_cursor=next_cursor)


@router.get(
    "/{run_id}/checkpoints",
    response_model=Page[CheckpointView],
    summary="Complete checkpoints of a run",
    responses=problem_answers(404),
    openapi_extra=needs("read"),
)
def checkpoints(
    context: ContextDep, caller: CallerDep, run_id: RunId, cursor: Cursor = None, limit: Limit = 100
) -> Page[CheckpointView]:
    """By step; `path` is what a probe takes, below the trainer's folder of runs."""
    after = number_from_cursor(cursor, -1)
    found = [c for c in list_checkpoints(context.run(caller, run_id).checkpoints) if c.step > after]
    items = [checkpoint_view(checkpoint, context.place.root) for checkpoint in found[:limit]]
    next_cursor = str(items[-1].step) if len(found) > limit else None
    return Page[CheckpointView](items=items, next_cursor=next_cursor)


def make_listener_limiter() -> anyio.CapacityLimiter:
    """How many listeners may be connected at once."""
    return anyio.CapacityLimiter(_MAX_LISTENERS)


async def _listener(request: Request) -> AsyncIterator[None]:
    """Holds one of the places for listeners; raises 429 where all are taken."""
    listeners: anyio.CapacityLimiter = request.app.state.listeners
    try:
        listeners.acquire_on_behalf_of_nowait(request)
    except anyio.WouldBlock:
        raise too_many("too many listeners are connected") from None
    try:
        yield
    finally:
        listeners.release_on_behalf_of(request)


async def _followed_run(context: ContextDep, caller: CallerDep, run_id: RunId) -> RunFolder:
    return context.run(caller, run_id)  # before the stream begins, so that 404 is an answer


@router.get(
    "/{run_id}/events",
    response_class=EventSourceResponse,
    summary="Numbers and state as they come",
    responses=problem_answers(404, 429),
    openapi_extra=needs("read"),
    dependencies=[Depends(_listener)],
)
async def events(
    context: ContextDep,
    folder: Annotated[RunFolder, Depends(_followed_run)],
    after: After = -1,
    last_event_id: Annotated[int | None, Header(ge=-1, lt=2**53)] = None,
) -> AsyncIterator[ServerSentEvent]:
    """`metrics` for each step, whose id is the step, `run` when its state changes, or what it waits
    for; then the end.
    """
    step, told = after if last_event_id is None else last_event_id, None
    while not context.is_ending():
        view = await run_sync(run_view, folder)
        lines = await run_sync(_metrics_after, folder, step)
        for line in lines:
            step = line["step"]
            yield ServerSentEvent(event="metrics", data=line, id=str(step))
        if (view.state, view.waiting_for) != told and len(lines) < _MAX_STEPS_AT_ONCE:
            told = view.state, view.waiting_for
            yield ServerSentEvent(event="run", data=view)
            if view.state not in ("queued", "running"):
                return
        await anyio.sleep(_PAUSE_S)


def _metrics_after(folder: RunFolder, step: int) -> list[dict[str, Any]]:
    return read_metrics(folder.metrics, after=step, limit=_MAX_STEPS_AT_ONCE)
