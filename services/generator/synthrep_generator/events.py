"""The live view: what changed since the last look, as server-sent events.

Events are hints; the lists say what is there. They start when the connection does, or where the
listener's `Last-Event-ID` says that it was cut off.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import islice
from typing import Annotated

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Header, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel

from synthrep_generator.context import CallerDep, Context, ContextDep, may_handle, may_reach
from synthrep_generator.errors import HighWaterError
from synthrep_generator.progress import DatasetIndex
from synthrep_generator.tally import Batch
from synthrep_shared.asgi import needs, problem_answers
from synthrep_shared.keys import Principal
from synthrep_shared.messages import ShardEvent, WorkerView

router = APIRouter(prefix="/v1", tags=["service"])
_PAUSE_S = 1.0
_MAX_SHARDS_AT_ONCE = 500
_MAX_BATCHES_AT_ONCE = 500
_MAX_LISTENERS = 64
_MAX_ID = 4096  # characters
_ID = r"^[0-9a-f]{8}(,[a-z0-9][a-z0-9_-]{0,63}=[0-9]{1,15}\.[0-9]{1,15})*$"
Event = tuple[str, BaseModel]
"""`batch`, `shard` or `worker`, and what it is now."""


class EventFeed:
    """Remembers what one listener has been told; goes on from `last_event_id` if one is given."""

    def __init__(
        self, context: Context, caller: Principal, last_event_id: str | None = None
    ) -> None:
        self._context, self._caller = context, caller
        self._positions: dict[str, tuple[int, int]] = {}
        self._reached: set[str] = set()
        self._running: dict[str, int] = {}
        self._workers: dict[str, WorkerView] = {}
        told = None if last_event_id is None else _positions(last_event_id, context.epoch)
        for index in context.catalog.datasets():
            now = (index.last_seq, index.tick)
            self._positions[index.name] = now if told is None else told.get(index.name, (0, 0))
            if may_reach(caller, index):
                self._reached.add(index.name)

    @property
    def last_event_id(self) -> str | None:
        """What has been told so far, for a header `Last-Event-ID`; None if it would be long.

        Of data sets beyond the caller's reach it tells nothing.
        """
        positions = "".join(
            f",{name}={seq}.{tick}"
            for name, (seq, tick) in self._positions.items()
            if name in self._reached and (seq or tick)
        )
        return f"{self._context.epoch}{positions}" if len(positions) < _MAX_ID else None

    def poll(self) -> list[Event]:
        """What changed since the last call."""
        running = dict(self._context.live.running())
        moved = {b for b in running | self._running if running.get(b) != self._running.get(b)}
        self._running = running
        events: list[Event] = []
        for index in self._context.catalog.datasets():
            seq, tick = self._positions.get(index.name, (0, 0))
            last_seq, last_tick = index.last_seq, index.tick
            if may_reach(self._caller, index):
                self._reached.add(index.name)
                shards = index.shards(seq, _MAX_SHARDS_AT_ONCE)
                if len(shards) == _MAX_SHARDS_AT_ONCE:
                    last_seq = shards[-1].seq
                shards = [shard for shard in shards if shard.seq <= last_seq]
                events += [("shard", ShardEvent(dataset=index.name, **dict(s))) for s in shards]
            self._positions[index.name] = (last_seq, last_tick)
            for batch in self._changed_batches(index, tick, moved):
                events.append(("batch", self._context.batch_view(index, batch)))
        return events + self._changed_workers()

    def _changed_batches(self, index: DatasetIndex, tick: int, moved: set[str]) -> list[Batch]:
        changed = {batch.id: batch for batch in index.changed_since(tick)}
        for batch_id in moved - changed.keys():
            batch = index.batch(batch_id)
            if batch is not None:
                changed[batch_id] = batch
        own = (batch for batch in changed.values() if may_handle(self._caller, batch))
        return list(islice(own, _MAX_BATCHES_AT_ONCE))

    def _changed_workers(self) -> list[Event]:
        before = self._workers
        live = (WorkerView.model_validate(w, from_attributes=True)
                for w in self._context.live.workers())  # fmt: skip
        self._workers = {worker.name: worker for worker in live}
        gone = [worker for name, worker in before.items() if name not in self._workers]
        changed = [w for name, w in self._workers.items() if before.get(name) != w]
        changed += [worker.model_copy(update={"state": "gone"}) for worker in gone]
        return [("worker", worker) for worker in changed]


def _positions(last_event_id: str, epoch: str) -> dict[str, tuple[int, int]]:
    """Log positions by data set; ticks that another process counted say nothing here."""
    told_by, *places = last_event_id.split(",")
    positions = {}
    for place in places:
        name, _, numbers = place.partition("=")
        seq, _, tick = numbers.partition(".")
        positions[name] = (int(seq), int(tick) if told_by == epoch else 0)
    return positions


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
async def events(
    context: ContextDep,
    caller: CallerDep,
    last_event_id: Annotated[
        str | None, Header(max_length=2 * _MAX_ID, pattern=_ID, description="Where to go on")
    ] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Events `batch`, `shard` and `worker`, each with the thing as its list shows it.

    With the `Last-Event-ID` that a browser sends by itself, a listener that comes back is told
    the shards that it missed, and batches that changed; some things perhaps twice.
    """
    feed = await run_sync(EventFeed, context, caller, last_event_id)
    yield ServerSentEvent(comment="connected")
    while True:
        told = await run_sync(feed.poll)
        for i, (name, thing) in enumerate(told, start=1):
            # An id stands for all that was told with it, so only the last one has one.
            event_id = feed.last_event_id if i == len(told) else None
            yield ServerSentEvent(event=name, data=thing, id=event_id)
        await anyio.sleep(_PAUSE_S)
