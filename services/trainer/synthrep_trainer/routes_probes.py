"""Routes of probes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Response
from fastapi.responses import FileResponse

from synthrep_shared.asgi import needs, problem_answers
from synthrep_shared.keys import Principal
from synthrep_shared.messages import Page, ProbeRequest, ProbeView
from synthrep_trainer.context import (
    CallerDep,
    Context,
    ContextDep,
    Cursor,
    IdempotencyKey,
    JsonBody,
    Limit,
    ProbeId,
    newest_first,
    parse_body,
    readable,
)
from synthrep_trainer.probe_data import known_datasets
from synthrep_trainer.problems import not_found, too_many
from synthrep_trainer.views import probe_view

router = APIRouter(prefix="/v1", tags=["probes"])
_PROBE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ProbeRequest"}}},
    }
}


@router.post(
    "/probes",
    status_code=202,
    response_model=ProbeView,
    summary="Judge a run's newest checkpoint, or a checkpoint",
    responses=problem_answers(409, 413, 415, 429, 503),
    openapi_extra=needs("probe") | _PROBE_BODY,
)
def submit(
    context: ContextDep,
    caller: CallerDep,
    response: Response,
    body: JsonBody,
    idempotency_key: IdempotencyKey = None,
) -> ProbeView:
    """The probe is durable when the answer is 202; training goes on meanwhile."""
    request = parse_body(ProbeRequest, body)
    folder = context.earlier_probe(caller, idempotency_key, request)
    if folder is None:
        _check(context, caller, request)
        folder = context.place.submit_probe(request, owner=caller.owner, key=idempotency_key)
    response.headers["location"] = f"/v1/probes/{folder.id}"
    return probe_view(folder)


def _check(context: Context, caller: Principal, request: ProbeRequest) -> None:
    """Raises what becomes 422 or 429; another owner's run is none."""
    if request.dataset not in known_datasets(context.settings):
        raise HTTPException(422, "there is no such labelled set, see GET /v1/probe-datasets")
    if request.run_id is not None and not context.may_probe(caller, request.run_id):
        raise HTTPException(422, "there is no such run")
    if request.checkpoint is not None:
        checkpoint = context.place.checkpoint(request.checkpoint)
        if checkpoint is None or not context.may_probe(caller, checkpoint.parents[1].name):
            raise HTTPException(
                422, "there is no such checkpoint, see GET /v1/runs/{id}/checkpoints"
            )
    if context.num_queued(context.place.probes()) >= context.settings.max_queued:
        raise too_many("too many probes are queued")


@router.get(
    "/probes",
    response_model=Page[ProbeView],
    summary="Probes, the newest first",
    responses=problem_answers(),
    openapi_extra=needs("read"),
)
def list_all(
    context: ContextDep, caller: CallerDep, cursor: Cursor = None, limit: Limit = 100
) -> Page[ProbeView]:
    """Each as `GET /v1/probes/{id}` has it."""
    shown, next_cursor = newest_first(context.owned(caller, context.place.probes()), cursor, limit)
    return Page[ProbeView](items=readable(probe_view, shown), next_cursor=next_cursor)


@router.get(
    "/probes/{probe_id}",
    response_model=ProbeView,
    summary="One probe",
    responses=problem_answers(404),
    openapi_extra=needs("read"),
)
def get(context: ContextDep, caller: CallerDep, probe_id: ProbeId) -> ProbeView:
    """State, and the result once it is completed."""
    return probe_view(context.probe(caller, probe_id))


@router.get(
    "/probes/{probe_id}/head",
    response_class=FileResponse,
    summary="The fitted classifier of a completed probe, as safetensors",
    responses=problem_answers(404),
    openapi_extra=needs("read"),
)
def head(context: ContextDep, caller: CallerDep, probe_id: ProbeId) -> FileResponse:
    """logits = (features - mean) / deviation @ weights + intercepts; class names in the metadata.

    404 also where the protocol makes no classifier.
    """
    folder = context.probe(caller, probe_id)
    if folder.state != "completed" or not folder.head.exists():
        raise not_found("classifier of this probe")
    return FileResponse(folder.head, media_type="application/octet-stream")
