"""The reconciler's sweeps, on an embedded Valkey, with a clock of our own."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from synthrep_generator.chunks import Chunk, Place, chunk_from_places
from synthrep_generator.intake import set_paused
from synthrep_generator.leases import Lease
from synthrep_generator.queues import WorkerView, WorkQueue
from synthrep_generator.reconciler import Reconciler
from synthrep_shared.commit_log import CommitLog, CommitRecord, GroupRef, LogReader
from synthrep_shared.storage import DatasetPaths

pytestmark = pytest.mark.redis


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Scene:
    """A stack without workers: the test takes chunks off the queue itself."""

    def __init__(self, stack: Any) -> None:
        self.stack, self.clock = stack, Clock()
        self.queue = WorkQueue(stack.settings)
        self.reconciler = self.another()

    def another(self) -> Reconciler:
        return Reconciler(self.stack.settings, self.queue, clock=self.clock)

    def queued(self) -> list[Chunk]:
        """The chunks in the queue, first out first."""
        flight = self.queue.in_flight()
        return [flight.chunks[job_id.split("-")[0]] for job_id in self.queue.rq.get_job_ids()]

    def pop(self) -> Chunk:
        """Take a chunk as a worker does that dies before it has a lease."""
        chunk = self.queued()[0]
        self.queue.redis.lpop(self.queue.rq.key)
        return chunk

    def decide(self, chunk: Chunk, count: int | None = None) -> None:
        groups = tuple(
            GroupRef(
                gid=f"{p.batch}{p.index}", caption_id="0", batch=p.batch, index=p.index, images=2
            )
            for p in list(chunk.places())[:count]
        )
        CommitLog(self.stack.paths.log).append("shard", name=str, groups=groups)


@pytest.fixture
def scene(generator_stack: Callable[..., Any]) -> Scene:
    """Jobs of four prompts; at most three wait per worker; leases of 60 s, a grace of 10 s."""
    return Scene(generator_stack(lease_s=60.0))


def prompts(count: int) -> list[str]:
    return [f"p{i}" for i in range(count)]


def places(batch: str, first: int, count: int) -> Chunk:
    return chunk_from_places("birds", [Place(batch, i) for i in range(first, first + count)])


def test_a_few_jobs_for_each_worker_wait_in_redis(scene: Scene) -> None:
    scene.stack.accept(prompts(400))
    assert scene.reconciler.sweep() == 3
    assert scene.reconciler.sweep() == 0
    for name in ("w1", "w2"):
        scene.queue.report_worker(WorkerView(name, "cpu", "idle", 0.0), ttl_s=60)
    assert scene.reconciler.sweep() == 3
    assert scene.queued() == [places("b0", 4 * i, 4) for i in range(6)]


def test_a_lost_chunk_returns_to_the_front_after_the_grace(scene: Scene) -> None:
    scene.stack.accept(prompts(12))
    scene.reconciler.sweep()
    lost = scene.pop()
    for now, expected in [(0.0, 2), (9.0, 2), (10.1, 3)]:
        scene.clock.now = now
        scene.reconciler.sweep()
        assert len(scene.queued()) == expected
    assert scene.queued()[0] == lost


def test_a_chunk_under_a_lease_is_not_lost(scene: Scene) -> None:
    scene.stack.accept(prompts(4))
    scene.reconciler.sweep()
    Lease(scene.queue, scene.pop(), "w1").acquire()
    for now in (0.0, 100.0):
        scene.clock.now = now
        assert scene.reconciler.sweep() == 0


def test_what_a_lost_chunk_decided_is_not_asked_again(scene: Scene) -> None:
    scene.stack.accept(prompts(4))
    scene.reconciler.sweep()
    scene.decide(scene.pop(), 3)
    scene.reconciler.sweep()
    scene.clock.now = 11.0
    scene.reconciler.sweep()
    assert scene.queued() == [places("b0", 3, 1)]
    scene.decide(scene.pop())
    scene.reconciler.sweep()
    scene.clock.now = 22.0
    assert scene.reconciler.sweep() == 0
    assert scene.queue.in_flight().chunks == {}


def test_what_was_given_back_is_fed_again(scene: Scene) -> None:
    scene.stack.accept(prompts(4))
    scene.reconciler.sweep()
    chunk = scene.pop()
    lease = Lease(scene.queue, chunk, "w1")
    lease.acquire()
    scene.decide(chunk, 1)
    lease.give_back()
    assert scene.reconciler.sweep() == 1
    assert scene.queued() == [places("b0", 1, 3)]


def test_the_loss_of_all_of_redis_is_made_good(scene: Scene) -> None:
    scene.stack.accept(prompts(12))
    scene.reconciler.sweep()
    before = scene.queued()
    scene.queue.redis.flushall()
    assert scene.reconciler.sweep() == 3
    assert scene.queued() == before


def test_two_reconcilers_feed_each_chunk_once(scene: Scene) -> None:
    scene.stack.accept(prompts(12))
    other = scene.another()
    assert [scene.reconciler.sweep(), other.sweep()] == [3, 0]
    scene.pop()
    for now in (0.0, 10.1):
        scene.clock.now = now
        fed = [scene.reconciler.sweep(), other.sweep()]
    assert fed == [1, 0]
    assert len(scene.queued()) == 3


def test_a_new_reconciler_goes_on_from_the_files(scene: Scene) -> None:
    scene.stack.accept(prompts(8))
    scene.decide(places("b0", 0, 5))
    assert scene.another().sweep() == 1
    assert scene.queued() == [places("b0", 5, 3)]


def test_a_pass_is_followed_by_a_rest_in_step_with_its_length(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []

    class Stop:
        passes = 0

        def is_set(self) -> bool:
            self.passes += 1
            return self.passes > 1

        def wait(self, seconds: float) -> None:
            rests.append(seconds)

    def sweep() -> None:
        scene.clock.now += 0.01

    monkeypatch.setattr(scene.reconciler, "sweep", sweep)
    scene.reconciler.run(Stop())  # type: ignore[arg-type]
    assert rests == [pytest.approx(0.04)]


def test_a_lost_chunk_of_a_paused_batch_waits(scene: Scene) -> None:
    scene.stack.accept(prompts(4))
    scene.reconciler.sweep()
    scene.pop()
    set_paused(scene.stack.paths, "b0", True)
    for now in (0.0, 10.1, 10.2):
        scene.clock.now = now
        assert scene.reconciler.sweep() == 0
    set_paused(scene.stack.paths, "b0", False)
    assert scene.reconciler.sweep() == 1


def test_a_malformed_log_stops_its_data_set_only(scene: Scene) -> None:
    scene.stack.accept(prompts(4))
    scene.stack.accept(prompts(4), batch="b1", dataset="bees")
    scene.stack.paths.log.write_text("no record\n")
    scene.reconciler.sweep()
    assert [chunk.dataset for chunk in scene.queued()] == ["bees"]
    scene.stack.paths.log.unlink()
    scene.clock.now = 61.0
    scene.reconciler.sweep()
    assert [chunk.dataset for chunk in scene.queued()] == ["bees", "birds"]


def test_a_log_of_somebody_else_stops_its_data_set_only(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.stack.accept(prompts(4))
    scene.stack.accept(prompts(4), batch="b1", dataset="bees")
    poll = LogReader.poll

    def refuse(reader: LogReader, *given: int) -> list[CommitRecord]:
        if reader.path == scene.stack.paths.log:
            raise PermissionError(13, "Permission denied")
        return poll(reader, *given)

    with monkeypatch.context() as patch:
        patch.setattr(LogReader, "poll", refuse)
        scene.reconciler.sweep()
    assert [chunk.dataset for chunk in scene.queued()] == ["bees"]
    scene.clock.now = 61.0
    scene.reconciler.sweep()
    assert [chunk.dataset for chunk in scene.queued()] == ["bees", "birds"]


def test_a_log_that_goes_bad_where_it_was_read_keeps_its_leftovers_only(scene: Scene) -> None:
    old = 1.0  # seconds since the epoch
    leftovers = []
    for batch, dataset in (("b0", "birds"), ("b1", "bees")):
        scene.stack.accept(prompts(4), batch=batch, dataset=dataset)
        paths = DatasetPaths(scene.stack.settings.root, dataset)
        leftovers.append(paths.temporary / ".shard.tar.1.00.part")
        leftovers[-1].touch()
        os.utime(leftovers[-1], (old, old))
    scene.decide(places("b0", 0, 4))
    scene.reconciler.sweep()
    log = scene.stack.paths.log
    log.write_bytes(b"x" * (log.stat().st_size - 1) + b"\n")
    scene.reconciler.sweep()
    scene.reconciler.clean()
    assert [file.exists() for file in leftovers] == [True, False]


def test_an_empty_root_is_no_error(scene: Scene) -> None:
    assert scene.reconciler.sweep() == 0
