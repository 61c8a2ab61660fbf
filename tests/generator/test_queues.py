"""The door to Redis, on an embedded Valkey."""

from __future__ import annotations

import json
import pickle
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from rq.exceptions import DequeueTimeout
from rq.job import Job
from rq.queue import Queue
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from synthrep_generator.chunks import Chunk, Place, chunk_from_places
from synthrep_generator.errors import QueueServerError
from synthrep_generator.queues import ChunkJob, ForeignJobError, WorkerView, WorkQueue

pytestmark = pytest.mark.redis


@pytest.fixture
def queue(generator_stack: Callable[..., Any]) -> WorkQueue:
    return WorkQueue(generator_stack().settings)


def chunk(first: int = 0, count: int = 3, batch: str = "a") -> Chunk:
    return chunk_from_places("birds", [Place(batch, i) for i in range(first, first + count)])


def take(queue: WorkQueue) -> ChunkJob | None:
    try:
        found = Queue.dequeue_any(
            [queue.rq], 1, connection=queue.redis, job_class=ChunkJob, serializer=JSONSerializer
        )
    except DequeueTimeout:
        return None
    return found[0] if found else None


def test_a_chunk_comes_out_as_it_went_in(queue: WorkQueue) -> None:
    assert queue.feed(chunk())
    job = take(queue)
    assert job is not None
    assert job.chunk == chunk()


def test_a_chunk_in_flight_is_not_fed_again(queue: WorkQueue) -> None:
    assert queue.feed(chunk())
    assert not queue.feed(chunk())
    assert queue.queue_view().depth == 1


def test_chunks_are_fed_together_but_for_those_in_flight(queue: WorkQueue) -> None:
    chunks = [chunk(10 * number) for number in range(600)]
    queue.feed(chunks[7])
    assert queue.feed_all(chunks) == 599
    assert queue.feed_all(chunks) == 0
    flight = queue.in_flight()
    assert set(flight.chunks) == flight.queued == {each.id for each in chunks}
    assert [job.chunk for job in (take(queue), take(queue)) if job] == [chunks[7], chunks[0]]


def test_a_chunk_is_forgotten_by_one_caller_only(queue: WorkQueue) -> None:
    queue.feed(chunk())
    assert [queue.forget(chunk().id) for _ in range(2)] == [True, False]


def test_the_register_tells_queued_from_leased_from_lost(queue: WorkQueue) -> None:
    chunks = [chunk(0), chunk(10), chunk(20)]
    for each in chunks:
        queue.feed(each)
    take(queue)
    take(queue)
    queue.redis.set(queue.lease_key(chunks[1].id), "somebody", px=60_000)
    flight = queue.in_flight()
    assert flight.queued == {chunks[2].id}
    assert flight.leased == {chunks[1].id}
    assert flight.lost() == {chunks[0].id}


def test_a_chunk_that_stays_in_flight_is_parsed_once(queue: WorkQueue) -> None:
    queue.feed(chunk())
    first, second = (queue.in_flight().chunks[chunk().id] for _ in range(2))
    assert first is second
    queue.forget(chunk().id)
    assert queue.in_flight().chunks == {}


def test_running_prompts_are_those_under_a_lease(queue: WorkQueue) -> None:
    mixed = chunk_from_places("birds", [Place("a", 0), Place("a", 1), Place("b", 7)])
    for each in (mixed, chunk(10)):
        queue.feed(each)
    queue.redis.set(queue.lease_key(mixed.id), "somebody", px=60_000)
    assert queue.running_prompts() == {"a": 2, "b": 1}
    assert queue.queue_view().running == 1
    assert queue.queue_view().depth == 1


def test_a_malformed_register_entry_is_dropped(queue: WorkQueue) -> None:
    queue.redis.hset(queue.register_key, "f" * 32, '{"dataset": "../x"}')
    assert queue.in_flight().chunks == {}
    assert queue.redis.hlen(queue.register_key) == 0


def test_a_worker_is_shown_until_it_falls_silent(queue: WorkQueue) -> None:
    view = WorkerView("w1", "cuda:0", "running", 12.5)
    queue.report_worker(view, ttl_s=60)
    queue.report_worker(WorkerView("w2", "cpu", "idle", 0.0), ttl_s=0.001)
    while len(queue.workers()) > 1:
        pass
    assert queue.workers() == [view]
    queue.retire_worker("w1")
    assert queue.workers() == []


def test_refused_images_add_up_over_workers(queue: WorkQueue) -> None:
    assert queue.queue_view().filtered == {}
    queue.count_filtered({"blank": 2, "caption": 1})
    queue.count_filtered({"blank": 3})
    queue.count_filtered({})
    assert queue.queue_view().filtered == {"blank": 5, "caption": 1}


def test_a_nudge_wakes_once(queue: WorkQueue) -> None:
    queue.nudge()
    queue.nudge()
    assert queue.wait_for_nudge(0.05)
    assert not queue.wait_for_nudge(0.05)


@pytest.fixture
def evicting_queue(queue: WorkQueue) -> Iterator[WorkQueue]:
    queue.redis.config_set("maxmemory-policy", "allkeys-lru")
    yield queue
    queue.redis.config_set("maxmemory-policy", "noeviction")


def test_a_server_that_evicts_is_refused(evicting_queue: WorkQueue) -> None:
    with pytest.raises(QueueServerError, match="noeviction"):
        evicting_queue.check_server()


def test_without_redis_a_redis_error_is_raised_soon(generator_stack: Callable[..., Any]) -> None:
    queue = WorkQueue(generator_stack(redis_url="redis://127.0.0.1:1/0").settings)
    with pytest.raises(redis.RedisError):
        queue.queue_view()


def plant(queue: WorkQueue, data: bytes, **fields: Any) -> str:
    """Write a job as somebody with access to Redis could."""
    job_id = f"{chunk().id}-{'0' * 16}"
    mapping: dict[Any, Any] = {
        "data": zlib.compress(data),
        "created_at": "2026-01-01T00:00:00.000000Z",
        "origin": queue.rq.name,
        "status": "queued",
        **fields,
    }
    queue.redis.hset(Job.key_for(job_id), mapping=mapping)
    queue.redis.rpush(queue.rq.key, job_id)
    return job_id


def payload(function: str = "synthrep_generator.jobs.generate_shard", **changes: Any) -> bytes:
    parts = {"instance": None, "args": [chunk().model_dump_json()], "kwargs": {}} | changes
    return json.dumps([function, parts["instance"], parts["args"], parts["kwargs"]]).encode()


HOSTILE = {
    "another function": (payload("os.system", args=["touch {marker}"]), {}),
    "a pickle": (pickle.dumps(("os.system", None, ["touch {marker}"], {})), {}),
    "an instance": (payload(instance="x"), {}),
    "keywords": (payload(kwargs={"shell": "x"}), {}),
    "no chunk": (payload(args=["touch {marker}"]), {}),
    "a success callback": (payload(), {"success_callback_name": "os.system"}),
    "a failure callback": (payload(), {"failure_callback_name": "os.system"}),
    "a stopped callback": (payload(), {"stopped_callback_name": "os.system"}),
    "a webhook": (payload(), {"webhooks": '[{"url": "http://127.0.0.1:1/", "events": []}]'}),
    "an unknown status": (payload(), {"status": "owned"}),
}


def test_a_planted_job_of_our_own_kind_is_accepted(queue: WorkQueue) -> None:
    plant(queue, payload())
    job = take(queue)
    assert job is not None
    assert job.chunk == chunk()


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_job_counts_as_absent(queue: WorkQueue, kind: str) -> None:
    data, fields = HOSTILE[kind]
    job_id = plant(queue, data, **fields)
    with pytest.raises(ForeignJobError):
        ChunkJob.fetch(job_id, connection=queue.redis, serializer=JSONSerializer)


def test_neither_a_worker_nor_its_maintenance_runs_a_hostile_job(
    queue: WorkQueue, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    command = f"touch {marker}"
    ids = [
        plant(queue, payload("os.system", args=[command])),
        plant(queue, payload(args=[command]), status="started", failure_callback_name="os.system"),
    ]
    assert take(queue) is None
    registry = StartedJobRegistry(
        queue.rq.name, connection=queue.redis, job_class=ChunkJob, serializer=JSONSerializer
    )
    queue.redis.zadd(registry.key, {f"{job_id}:1": 1 for job_id in ids})
    registry.cleanup()
    assert not marker.exists()
