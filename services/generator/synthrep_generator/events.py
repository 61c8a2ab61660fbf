"""The live view: what changed since the last look, as server-sent events.

Events are hints. They start when the connection does and may be lost with it; the lists say what
is there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel

from synthrep_generator.context import Context, ContextDep
from synthrep_generator.errors import HighWaterError
from synthrep_generator.progress import DatasetIndex
from synthrep_generator.tally import Batch
from synthrep_shared.asgi import needs, problem_answers
from synthrep_shared.messages import ShardEvent, WorkerView

router = APIRouter(prefix="/v1", tags=["service"])
_PAUSE_S = 1.0
_MAX_SHARDS_AT_ONCE = 500
_MAX_LISTENERS = 64
Event = tuple[str, BaseModel]
"""`batch`, `shard` or `worker`, and what it is now."""


class EventFeed:
    """Remembers what one listener has been told."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._positions: dict[str, tuple[int, int]] = {}
        self._running: dict[str, int] = {}
        self._workers: dict[str, WorkerView] = {}
        for index in context.catalog.datasets():
            self._positions[index.name] = (index.last_seq, index.tick)

    def poll(self) -> list[Event]:
        """What changed since the last call."""
        running = dict(self._context.live.running())
        moved = {b for b in running | self._running if running.get(b) != self._running.get(b)}
        self._running = running
        events: list[Event] = []
        for index in self._context.catalog.datasets():
            seq, tick = self._positions.get(index.name, (0, 0))
            last_seq, last_tick = index.last_seq, index.tick
            shards = index.shards(seq, _MAX_SHARDS_AT_ONCE)
            if len(shards) == _MAX_SHARDS_AT_ONCE:
                last_seq = shards[-1].seq
            shards = [shard for shard in shards if shard.seq <= last_seq]
            self._positions[index.name] = (last_seq, last_tick)
            events += [("shard", ShardEvent(dataset=index.name, **dict(s))) for s in shards]
            for batch in self._changed_batches(index, tick, moved):
                events.append(("batch", self._context.batch_view(index, batch)))
        return events + self._changed_workers()

    def _changed_batches(self, index: DatasetIndex, tick: int, moved: set[str]) -> list[Batch]:
        changed = {batch.id: batch for batch in index.changed_since(tick)}
        for batch_id in moved - changed.keys():
            batch = index.batch(batch_id)
            if batch is not None:
                changed[batch_id] = batch
        return list(changed.values())

    def _changed_workers(self) -> list[Event]:
        before = self._workers
        live = (WorkerView.model_validate(w, from_attributes=True)
                for w in self._context.live.workers())  # fmt: skip
        self._workers = {worker.name: worker for worker in live}
        gone = [worker for name, worker in before.items() if name not in self._workers]
        changed = [w for name, w in self._workers.items() if before.get(name) != w]
        changed += [worker.model_copy(update={"state": "gone"}) for worker in gone]
        return [("worker", worker) for worker in changed]


async def _listener(request: Request) -> AsyncIterator[None]:
    """Holds one of the places for listeners; raises HighWaterError where all are taken."""
    listeners: anyio.CapacityLimiter = request.app.state.listeners
    try:
        listeners.acquire_on_behalf_of_nowait(request)
    except anyio.WouldBlock:
        raise HighWaterError(f"{_MAX_LISTENERS} listeners are connected already") from None
    try:
        yield
    finally:
        listeners.release_on_behalf_of(request)


def make_listener_limiter() -> anyio.CapacityLimiter:
    """How many listeners may be connected at once."""
    return anyio.CapacityLimiter(_MAX_LISTENERS)


@router.get(
    "/events",
    response_class=EventSourceResponse,
    summary="Changes of batches, shards and workers as they happen",
    responses=problem_answers(429),
    openapi_extra=needs("read"),
    dependencies=[Depends(_listener)],
)
async def events(context: ContextDep) -> AsyncIterator[ServerSentEvent]:
    """Events `batch`, `shard` and `worker`, each with the thing as its list shows it."""
    feed = await run_sync(EventFeed, context)
    yield ServerSentEvent(comment="connected")
    while True:
        for name, thing in await run_sync(feed.poll):
            yield ServerSentEvent(event=name, data=thing)
        await anyio.sleep(_PAUSE_S)
