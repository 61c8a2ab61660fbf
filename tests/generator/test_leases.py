"""Leases and strikes, on an embedded Valkey."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from synthrep_generator.chunks import Place, chunk_from_places
from synthrep_generator.errors import LeaseLostError
from synthrep_generator.leases import Lease
from synthrep_generator.queues import WorkQueue

pytestmark = pytest.mark.redis
CHUNK = chunk_from_places("birds", [Place("a", 0), Place("a", 1), Place("a", 2)])


@pytest.fixture
def queue(generator_stack: Callable[..., Any]) -> WorkQueue:
    queue = WorkQueue(generator_stack(lease_s=60.0).settings)
    queue.feed(CHUNK)
    return queue


def test_a_chunk_is_held_by_one_worker(queue: WorkQueue) -> None:
    Lease(queue, CHUNK, "w1").acquire()
    with pytest.raises(LeaseLostError):
        Lease(queue, CHUNK, "w2").acquire()
    assert queue.in_flight().leased == {CHUNK.id}


def test_renewal_after_redis_forgot_registers_the_chunk_again(queue: WorkQueue) -> None:
    lease = Lease(queue, CHUNK, "w1")
    lease.acquire()
    queue.redis.flushall()
    lease.renew()
    flight = queue.in_flight()
    assert flight.leased == flight.chunks.keys() == {CHUNK.id}


def test_renewal_tells_when_another_took_over(queue: WorkQueue) -> None:
    lease = Lease(queue, CHUNK, "w1")
    lease.acquire()
    queue.redis.delete(queue.lease_key(CHUNK.id))
    Lease(queue, CHUNK, "w2").acquire()
    with pytest.raises(LeaseLostError):
        lease.renew()


def test_a_worker_that_lost_its_lease_does_not_end_that_of_another(queue: WorkQueue) -> None:
    lease = Lease(queue, CHUNK, "w1")
    lease.acquire()
    queue.redis.delete(queue.lease_key(CHUNK.id))
    Lease(queue, CHUNK, "w2").acquire()
    lease.acknowledge()
    with pytest.raises(LeaseLostError):
        Lease(queue, CHUNK, "w3").acquire()


@pytest.mark.parametrize("end", ["acknowledge", "give_back"])
def test_a_good_end_empties_register_and_wakes_the_reconciler(queue: WorkQueue, end: str) -> None:
    lease = Lease(queue, CHUNK, "w1")
    lease.acquire()
    getattr(lease, end)()
    assert queue.in_flight().chunks == {}
    assert queue.wait_for_nudge(0.01)
    assert Lease(queue, CHUNK, "w1").acquire() == 0


def test_runs_that_never_ended_are_strikes(queue: WorkQueue) -> None:
    found = []
    for _ in range(3):
        found.append(Lease(queue, CHUNK, "w1").acquire())
        queue.redis.delete(queue.lease_key(CHUNK.id))
    assert found == [0, 1, 2]


def test_a_run_that_is_given_back_keeps_earlier_strikes(queue: WorkQueue) -> None:
    Lease(queue, CHUNK, "w1").acquire()
    queue.redis.delete(queue.lease_key(CHUNK.id))
    second = Lease(queue, CHUNK, "w2")
    assert second.acquire() == 1
    second.give_back()
    assert Lease(queue, CHUNK, "w1").acquire() == 1


def test_a_chunk_run_again_is_queued_and_keeps_its_strike(queue: WorkQueue) -> None:
    queue.redis.delete(queue.rq.key)
    lease = Lease(queue, CHUNK, "w1")
    lease.acquire()
    lease.run_again()
    assert queue.in_flight().queued == {CHUNK.id}
    assert Lease(queue, CHUNK, "w2").acquire() == 1


def test_a_replaced_chunk_is_in_flight_as_its_pieces(queue: WorkQueue) -> None:
    lease = Lease(queue, CHUNK, "w1")
    lease.acquire()
    pieces = CHUNK.isolate({Place("a", 1)})
    lease.replace(pieces)
    assert queue.in_flight().chunks == {piece.id: piece for piece in pieces}
    assert [piece.num_prompts for piece in pieces] == [2, 1]
