from __future__ import annotations

import asyncio
import json

import pytest

from synthrep_generator.admission import Admission
from synthrep_generator.api import create_app
from synthrep_generator.backlog import LiveWork
from synthrep_generator.catalog import Catalog
from synthrep_generator.context import Context
from synthrep_generator.events import EventFeed
from synthrep_generator.queues import WorkerView


@pytest.fixture
def context(settings, backlog):
    """What the routes share, with a backlog that is asked every time."""
    catalog = Catalog(settings.root)
    live = LiveWork(backlog, refresh_s=0)
    return Context(settings, catalog, live, Admission(settings, catalog, live))


def told(feed):
    """(event, what identifies it, what it says) of one poll."""
    return [
        (name, getattr(thing, "id", None) or thing.name, getattr(thing, "state", None))
        for name, thing in feed.poll()
    ]


def test_feed_tells_changes_once_and_nothing_of_before(pets, context, backlog):
    header = pets.accept(["a", "b"], batch="1" * 32)
    pets.commit(header, {0: "a"})
    feed = EventFeed(context)
    assert told(feed) == []
    shard = pets.commit(header, {1: "b"})
    assert told(feed) == [("shard", shard.name, None), ("batch", header.id, "completed")]
    assert told(feed) == []


def test_feed_tells_batches_as_they_come_run_pause_and_end(pets, context, backlog):
    feed = EventFeed(context)
    header = pets.accept(["a", "b"])
    context.catalog.batch(header.id)
    assert told(feed) == [("batch", header.id, "queued")]
    backlog.prompts = {header.id: 1}
    assert told(feed) == [("batch", header.id, "running")]
    index, batch = context.catalog.batch(header.id)
    index.pause(batch, True)
    assert told(feed) == [("batch", header.id, "paused")]
    index.cancel(batch)
    assert told(feed) == [("batch", header.id, "cancelled")]
    backlog.prompts = {"unknown": 3}
    assert told(feed) == [("batch", header.id, "cancelled")]


def test_feed_tells_workers_that_come_change_and_go(context, backlog):
    feed = EventFeed(context)
    backlog.live = [WorkerView("w1", "cpu", "idle", 0.0)]
    assert told(feed) == [("worker", "w1", "idle")]
    backlog.live = [WorkerView("w1", "cpu", "busy", 2.0)]
    assert told(feed) == [("worker", "w1", "busy")]
    backlog.live = []
    assert told(feed) == [("worker", "w1", "gone")]
    assert told(feed) == []


def test_feed_of_many_shards_loses_none(pets, context, monkeypatch):
    monkeypatch.setattr("synthrep_generator.events._MAX_SHARDS_AT_ONCE", 3)
    feed = EventFeed(context)
    header = pets.accept([f"p{i}" for i in range(9)])
    names = []
    for i in range(8):
        names.append(pets.commit(header, {i: f"p{i}"}).name)
    pets.fail(header, {8: "p8"})
    seen = [name for _ in range(4) for event, name, _ in told(feed) if event == "shard"]
    assert seen == names


def test_feed_goes_on_without_redis(pets, context, backlog):
    backlog.is_up = False
    feed = EventFeed(context)
    header = pets.accept(["a"])
    shard = pets.commit(header, {0: "a"})
    assert ("shard", shard.name, None) in told(feed)


async def listen(app, until, act):
    """The text of `GET /v1/events` up to `until`; `act` runs once the stream is open."""
    received, opened, done = bytearray(), asyncio.Event(), asyncio.Event()

    async def receive():
        await done.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.start":
            assert message["status"] == 200
            assert (b"content-type", b"text/event-stream; charset=utf-8") in message["headers"]
        received.extend(message.get("body", b""))
        if b": connected" in received:
            opened.set()
        if until in received:
            done.set()

    scope = {
        "type": "http", "method": "GET", "path": "/v1/events", "raw_path": b"/v1/events",
        "query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http",
        "server": ("test", 80), "client": ("test", 1), "asgi": {"version": "3.0"},
    }  # fmt: skip
    task = asyncio.create_task(app(scope, receive, send))
    await opened.wait()
    act()
    await asyncio.wait_for(task, timeout=20)
    return received.decode()


def test_events_are_streamed_until_the_listener_goes(pets, settings, backlog):
    header = pets.accept(["a"])
    app = create_app(settings, backlog)
    text = asyncio.run(listen(app, b"event: batch", lambda: pets.commit(header, {0: "a"})))
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    (shard,) = [lines for lines in blocks if lines[0] == "event: shard"]
    data = json.loads(shard[1].removeprefix("data: "))
    assert (data["dataset"], data["seq"]) == ("pets", 1)
    (batch,) = [lines for lines in blocks if lines[0] == "event: batch"]
    assert json.loads(batch[1].removeprefix("data: "))["state"] == "completed"
