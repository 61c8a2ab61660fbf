"""What it costs to hand prompts in, and to bring them to a device that takes no time."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.datasets import accept_prompts, plain_settings, runs_done, wait_for_groups
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
    "queue, per prompt",
    unit="ms",
    peer="rq Worker (forks), an empty job a prompt",
    higher_is_better=False,
    min_ratio=100.0,
)
def overhead_per_prompt(dose: Dose) -> Measured:
    """By the clock, in the steady state: all the time in which the job itself does not run.

    The peer's job is empty. Ours makes a JPEG by a stub device of 0 ms, writes a shard and commits
    it; the figure with all of that is in the row's reason.
    """
    prompts, jobs = dose.size(16_000, 3200), dose.size(_PEER_JOBS, 40)
    with (
        tempfile.TemporaryDirectory() as folder,
        Services(Path(folder), workers=1, api=False, synthesizer="fake", device="cpu") as services,
    ):
        whole: list[float] = []
        found = interleave(
            partial(_ms_per_prompt, services, prompts, whole),
            lambda: 1e3 * in_process(rq_peer.seconds_a_job, port=services.redis_port, jobs=jobs),
            rounds=dose.rounds(3),
        )
    reason = f"{median(whole[1:]):.3f} ms with the job: image, shard and commit"
    return replace(found, reason=reason)


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


def _ms_per_prompt(services: Services, prompts: int, whole: list[float]) -> float:
    """What the queue took; adds to `whole` what queue and jobs took."""
    paths = DatasetPaths(services.settings.root, f"queue{len(whole)}")
    settings = plain_settings(services.settings.models["tiny"], images_per_prompt=1)
    accept_prompts(paths, list(captions(prompts)), settings)
    WorkQueue(services.settings).nudge()
    records = wait_for_groups(services, paths, prompts)
    runs = runs_done(services, paths.dataset, len(records))
    seconds = (records[-1].created_at - records[0].created_at).total_seconds()
    later_prompts = prompts - len(records[0].groups)
    whole.append(1e3 * seconds / later_prompts)
    in_jobs_s: float = sum(run["seconds"] for run in runs[1:])
    return whole[-1] - 1e3 * in_jobs_s / later_prompts


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
