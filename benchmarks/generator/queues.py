"""What it costs to hand prompts in, and to bring them to a device that takes no time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
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
from synthrep_shared.commit_log import CommitLog
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


@case("enqueue", unit="prompts/s", peer="rq enqueue_many (500)", min_ratio=20.0)
def enqueue(dose: Dose) -> Measured:
    """From prompts in memory to the queue: ours by way of a durable intake file and the reconciler.

    One image a prompt, so that a job holds 160 prompts; the peer has one job a prompt.
    """
    return _compare_enqueuing(dose, _prompts_per_s, api=False)


@case("upload and enqueue", unit="prompts/s", peer="rq enqueue_many (500)")
def upload_and_enqueue(dose: Dose) -> Measured:
    """From the first byte of a request: ours also parses and checks every line."""
    return _compare_enqueuing(dose, _uploaded_prompts_per_s, api=True)


def _compare_enqueuing(
    dose: Dose, measure: Callable[[Services, int], float], *, api: bool
) -> Measured:
    prompts, jobs = dose.size(120_000, 16_000), dose.size(_PEER_ENQUEUED, 1000)
    with (
        tempfile.TemporaryDirectory() as folder,
        Services(Path(folder), workers=0, api=api, jobs_ahead=1000) as services,
    ):
        return interleave(
            partial(measure, services, prompts),
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


def _prompts_per_s(services: Services, num_prompts: int) -> float:
    queue, prompts = WorkQueue(services.settings), list(captions(num_prompts))
    paths = DatasetPaths(services.settings.root, "enqueue")
    settings = plain_settings(services.settings.models["tiny"], images_per_prompt=1)
    _let_rest(services)
    started = time.perf_counter()
    batch = accept_prompts(paths, prompts, settings).id
    queue.nudge()
    _wait_for_jobs(services, queue, num_prompts)
    seconds = time.perf_counter() - started
    CommitLog(paths.log).append("cancel", name=lambda _: batch)
    _empty(queue)
    return num_prompts / seconds


def _uploaded_prompts_per_s(services: Services, num_prompts: int) -> float:
    queue, blocks = WorkQueue(services.settings), list(body(num_prompts))
    _let_rest(services)
    started = time.perf_counter()
    batch = upload(services.url, blocks, prompts=num_prompts, dataset="upload", images_per_prompt=1)
    _wait_for_jobs(services, queue, num_prompts)
    seconds = time.perf_counter() - started
    services.cancel(batch)
    _empty(queue)
    return num_prompts / seconds


def _let_rest(services: Services) -> None:
    """Until the reconciler has rested from the round before: it does so for a sweep at most."""
    time.sleep(services.settings.sweep_s)


def _wait_for_jobs(services: Services, queue: WorkQueue, num_prompts: int) -> None:
    jobs = -(-num_prompts // services.settings.job_images)
    deadline = time.monotonic() + _LIMIT_S
    while queue.rq.count < jobs:
        services.check()
        if time.monotonic() > deadline:
            raise RuntimeError(f"{queue.rq.count} of {jobs} chunks after {_LIMIT_S:.0f} s")
        time.sleep(0.002)


def _empty(queue: WorkQueue) -> None:
    queue.redis.delete(queue.register_key)
    queue.rq.delete(delete_jobs=True)
