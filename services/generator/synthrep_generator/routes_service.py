"""Routes of the service itself: models, workers, queue, scale, health."""

from __future__ import annotations

import math

from fastapi import APIRouter, HTTPException

from synthrep_generator.context import Context, ContextDep, Cursor, Limit, cut_page
from synthrep_generator.model_files import usable_models
from synthrep_generator.problems import RETRY_AFTER_S
from synthrep_shared.asgi import NEEDS_NO_KEY, needs, problem_answers
from synthrep_shared.messages import (
    HealthView,
    ModelView,
    Page,
    QueueView,
    ScaleView,
    WorkerView,
)
from synthrep_shared.storage import is_writable

router = APIRouter(tags=["service"])


@router.get(
    "/v1/models",
    response_model=Page[ModelView],
    summary="Models that batches may name",
    responses=problem_answers(),
    openapi_extra=needs("read"),
)
def list_models(context: ContextDep, cursor: Cursor = None, limit: Limit = 100) -> Page[ModelView]:
    """By alias, each with what it does unless a batch says otherwise."""
    found = usable_models(context.settings)
    aliases = sorted(found)
    shown, next_cursor = cut_page(aliases, aliases, cursor, limit)
    models = [
        ModelView.model_validate({"alias": alias, **found[alias].model_dump(mode="json")})
        for alias in shown
    ]
    return Page[ModelView](items=models, next_cursor=next_cursor)


@router.get(
    "/v1/workers",
    response_model=Page[WorkerView],
    summary="Live workers",
    responses=problem_answers(503),
    openapi_extra=needs("read"),
)
def list_workers(
    context: ContextDep, cursor: Cursor = None, limit: Limit = 100
) -> Page[WorkerView]:
    """By name; `images_per_s` is that of the worker's last job."""
    live = sorted(context.live.snapshot().workers, key=lambda worker: worker.name)
    workers = [WorkerView.model_validate(worker, from_attributes=True) for worker in live]
    shown, next_cursor = cut_page(workers, [w.name for w in workers], cursor, limit)
    return Page[WorkerView](items=shown, next_cursor=next_cursor)


@router.get(
    "/v1/queue",
    response_model=QueueView,
    summary="Work in hand",
    responses=problem_answers(503),
    openapi_extra=needs("read"),
)
def get_queue(context: ContextDep) -> QueueView:
    """`backlog_s` is what all accepted images take at the speed of the live workers."""
    snapshot = context.live.snapshot()
    images_per_s = sum(worker.images_per_s or 0.0 for worker in snapshot.workers)
    images = context.catalog.unfinished().images
    return QueueView(
        depth=snapshot.queue.depth,
        running=snapshot.queue.running,
        backlog_s=images / images_per_s if images_per_s > 0 else (None if images else 0.0),
    )


def workers_wanted(context: Context) -> int:
    """Workers that the unfinished work keeps busy: `jobs_ahead` jobs for each, running ones too."""
    jobs = math.ceil(context.catalog.unfinished().images / context.settings.job_images)
    return math.ceil(jobs / context.settings.jobs_ahead)


@router.get(
    "/v1/scale",
    response_model=ScaleView,
    summary="Workers wanted, for an autoscaler",
    responses=problem_answers(),
    openapi_extra=needs("read"),
)
def get_scale(context: ContextDep) -> ScaleView:
    """From files, so that it holds without Redis; 0 only when nothing waits and nothing runs."""
    return ScaleView(value=workers_wanted(context))


@router.get(
    "/healthz",
    response_model=HealthView,
    summary="The process lives",
    openapi_extra=NEEDS_NO_KEY,
)
async def healthz() -> HealthView:
    """Touches neither disk nor Redis."""
    return HealthView(status="ok")


@router.get(
    "/readyz",
    response_model=HealthView,
    summary="Disk and Redis answer",
    responses={503: problem_answers(503)[503]},
    openapi_extra=NEEDS_NO_KEY,
)
def readyz(context: ContextDep) -> HealthView:
    """503 while Redis is gone; batches are taken in all the same."""
    if not is_writable(context.settings.root):
        headers = {"retry-after": str(RETRY_AFTER_S)}
        raise HTTPException(503, "the root of the data sets cannot be written", headers=headers)
    context.live.snapshot()
    return HealthView(status="ok")
