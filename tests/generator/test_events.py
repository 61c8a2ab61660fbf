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
from synthrep_shared.keys import OPEN, Principal


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
    feed = EventFeed(context, OPEN)
    assert told(feed) == []
    shard = pets.commit(header, {1: "b"})
    assert told(feed) == [("shard", shard.name, None), ("batch", header.id, "completed")]
    assert told(feed) == []


def test_feed_tells_batches_as_they_come_run_pause_and_end(pets, context, backlog):
    feed = EventFeed(context, OPEN)
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
    feed = EventFeed(context, OPEN)
    backlog.live = [WorkerView("w1", "cpu", "idle", 0.0)]
    assert told(feed) == [("worker", "w1", "idle")]
    backlog.live = [WorkerView("w1", "cpu", "busy", 2.0)]
    assert told(feed) == [("worker", "w1", "busy")]
    backlog.live = []
    assert told(feed) == [("worker", "w1", "gone")]
    assert told(feed) == []


def test_feed_of_many_shards_loses_none(pets, context, monkeypatch):
    monkeypatch.setattr("synthrep_generator.events._MAX_SHARDS_AT_ONCE", 3)
    feed = EventFeed(context, OPEN)
    header = pets.accept([f"p{i}" for i in range(9)])
    names = []
    for i in range(8):
        names.append(pets.commit(header, {i: f"p{i}"}).name)
    pets.fail(header, {8: "p8"})
    seen = [name for _ in range(4) for event, name, _ in told(feed) if event == "shard"]
    assert seen == names


def test_feed_goes_on_without_redis(pets, context, backlog):
    backlog.is_up = False
    feed = EventFeed(context, OPEN)
    header = pets.accept(["a"])
    shard = pets.commit(header, {0: "a"})
    assert ("shard", shard.name, None) in told(feed)


def test_a_listener_that_comes_back_is_told_what_it_missed(pets, context):
    feed = EventFeed(context, OPEN)
    header = pets.accept(["a", "b", "c"])
    pets.commit(header, {0: "a"})
    feed.poll()
    told_until = feed.last_event_id
    missed = pets.commit(header, {1: "b"})
    again = EventFeed(context, OPEN, told_until)
    assert told(again) == [("shard", missed.name, None), ("batch", header.id, "running")]
    assert told(again) == []
    assert told(EventFeed(context, OPEN, again.last_event_id)) == []


def test_a_listener_that_comes_back_to_another_process_misses_nothing(pets, settings, backlog):
    def process():
        live, catalog = LiveWork(backlog, refresh_s=0), Catalog(settings.root)
        return Context(settings, catalog, live, Admission(settings, catalog, live))

    feed = EventFeed(process(), OPEN)
    header = pets.accept(["a", "b"])
    pets.commit(header, {0: "a"})
    feed.poll()
    missed = pets.commit(header, {1: "b"})
    again = EventFeed(process(), OPEN, feed.last_event_id)
    assert told(again) == [("shard", missed.name, None), ("batch", header.id, "completed")]


def test_a_feed_tells_the_work_of_its_caller_only(pets, context, backlog):
    ann = Principal("ann", frozenset({"read"}))
    reader = Principal("reader", frozenset({"read"}), datasets=("*",))
    feeds = {who: EventFeed(context, who) for who in (ann, reader, OPEN)}
    header = pets.accept(["a"])  # somebody else's
    pets.commit(header, {0: "a"})
    backlog.live = [WorkerView("w1", "cpu", "idle", 0.0)]
    kinds = {who.owner: [kind for kind, *_ in told(feed)] for who, feed in feeds.items()}
    assert kinds == {
        "ann": ["worker"],
        "reader": ["shard", "worker"],
        "anonymous": ["shard", "batch", "worker"],
    }


def test_an_event_s_id_names_no_data_set_beyond_reach(pets, context):
    ann = Principal("ann", frozenset({"read"}))
    feed = EventFeed(context, ann)
    header = pets.accept(["a"])  # somebody else's
    pets.commit(header, {0: "a"})
    feed.poll()
    assert "pets" not in feed.last_event_id
    assert "pets" in EventFeed(context, OPEN).last_event_id
    assert told(EventFeed(context, ann, feed.last_event_id)) == []


async def listen(app, until, act, headers=()):
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
        "query_string": b"", "headers": list(headers), "http_version": "1.1", "scheme": "http",
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
    (told_until,) = [line for line in batch if line.startswith("id: ")]
    other = pets.commit(pets.accept(["b"], batch="2" * 32), {0: "b"})
    headers = [(b"last-event-id", told_until.removeprefix("id: ").encode())]
    text = asyncio.run(listen(app, b"event: batch", lambda: None, headers))
    assert [line for line in text.split("\n") if other.name in line]
    assert data["name"] not in text
