"""What it costs to hand prompts in, and to bring them to a device that takes no time."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.datasets import accept_prompts, plain_settings, wait_for_groups
from benchmarks.generator import rq_peer
from benchmarks.harness import Dose, Measured, case, in_process, interleave
from benchmarks.services import Services
from benchmarks.uploads import body, captions, upload
from synthrep_generator.queues import WorkQueue
from synthrep_shared.storage import DatasetPaths

_PEER_JOBS = 150
_PEER_ENQUEUED = 4000
_AT_ONCE = 500
_LIMIT_S = 120.0


@case(
    "from the queue to a sealed shard, per prompt",
    unit="ms",
    peer="rq Worker (forks), an empty job a prompt",
    higher_is_better=False,
    min_ratio=100.0,
)
def overhead_per_prompt(dose: Dose) -> Measured:
    """A stub device of 0 ms: ours still writes a JPEG, a shard and the log; the peer does nothing.

    Both by the clock in the steady state: ours between the first commit and the last.
    """
    prompts, jobs = dose.size(16_000, 3200), dose.size(_PEER_JOBS, 40)
    with (
        tempfile.TemporaryDirectory() as folder,
        Services(Path(folder), workers=1, api=False, synthesizer="fake", device="cpu") as services,
    ):
        return interleave(
            partial(_ms_per_prompt, services, prompts),
            lambda: 1e3 * in_process(rq_peer.seconds_a_job, port=services.redis_port, jobs=jobs),
            rounds=dose.rounds(3),
        )


@case("enqueue, 1 image a prompt", unit="prompts/s", peer="rq enqueue_many (500)", min_ratio=20.0)
def enqueue(dose: Dose) -> Measured:
    """From the first byte of a streamed upload until every chunk waits in the queue."""
    return _enqueue(dose, images_per_prompt=1)


@case("enqueue, 10 images a prompt", unit="prompts/s", peer="rq enqueue_many (500)")
def enqueue_groups(dose: Dose) -> Measured:
    """The same where a job holds a tenth of the prompts."""
    return _enqueue(dose, images_per_prompt=10)


def _enqueue(dose: Dose, *, images_per_prompt: int) -> Measured:
    prompts = dose.size(120_000, 16_000) // images_per_prompt
    jobs = dose.size(_PEER_ENQUEUED, 1000)
    with (
        tempfile.TemporaryDirectory() as folder,
        Services(Path(folder), workers=0, jobs_ahead=1000) as services,
    ):
        return interleave(
            partial(_prompts_per_s, services, prompts, images_per_prompt),
            lambda: in_process(
                rq_peer.jobs_enqueued_per_s, port=services.redis_port, jobs=jobs, at_once=_AT_ONCE
            ),
            rounds=dose.rounds(5),
        )


def _ms_per_prompt(services: Services, prompts: int) -> float:
    settings = plain_settings(services.settings.models["tiny"], images_per_prompt=1)
    paths = DatasetPaths(services.settings.root, f"queue{time.monotonic_ns()}")
    accept_prompts(paths, list(captions(prompts)), settings)
    WorkQueue(services.settings).nudge()
    records = wait_for_groups(services, paths, prompts)
    seconds = (records[-1].created_at - records[0].created_at).total_seconds()
    return 1e3 * seconds / (prompts - len(records[0].groups))


def _prompts_per_s(services: Services, prompts: int, images_per_prompt: int) -> float:
    queue = WorkQueue(services.settings)
    chunks = -(-prompts * images_per_prompt // services.settings.job_images)
    blocks = list(body(prompts))
    started = time.perf_counter()
    batch = upload(
        services.url, blocks, prompts=prompts, dataset="enqueue",
        images_per_prompt=images_per_prompt,
    )  # fmt: skip
    while queue.rq.count < chunks:
        services.check()
        if time.perf_counter() - started > _LIMIT_S:
            raise RuntimeError(f"{queue.rq.count} of {chunks} chunks after {_LIMIT_S:.0f} s")
        time.sleep(0.002)
    seconds = time.perf_counter() - started
    services.cancel(batch)
    queue.redis.delete(queue.register_key)
    queue.rq.delete(delete_jobs=True)
    return prompts / seconds
