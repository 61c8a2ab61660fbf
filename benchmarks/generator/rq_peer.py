"""RQ as its documentation shows it: one job a prompt, a worker that forks for each."""

from __future__ import annotations

import secrets
import time

from redis import Redis
from rq import Queue, Worker
from rq.serializers import JSONSerializer


def nothing(prompt: str) -> None:
    """A job that takes no time."""


def seconds_a_job(port: int, jobs: int) -> float:
    """Time that the forking worker needs for a job that does nothing, start-up left out."""
    redis = Redis(port=port)
    queue = Queue(f"peer{secrets.token_hex(4)}", connection=redis, serializer=JSONSerializer)
    spent = []
    for number in (1, jobs + 1):
        for index in range(number):
            queue.enqueue(nothing, f"prompt {index}")
        worker = Worker([queue], connection=redis, serializer=JSONSerializer)
        started = time.perf_counter()
        worker.work(burst=True, logging_level="ERROR")
        spent.append(time.perf_counter() - started)
    return (spent[1] - spent[0]) / jobs


def jobs_enqueued_per_s(port: int, jobs: int, at_once: int) -> float:
    """Rate of `enqueue_many`, one job a prompt, so many in a call."""
    redis = Redis(port=port)
    queue = Queue(f"peer{secrets.token_hex(4)}", connection=redis, serializer=JSONSerializer)
    prompts = [f"a photo of a dog, number {index}" for index in range(jobs)]
    started = time.perf_counter()
    for start in range(0, jobs, at_once):
        queue.enqueue_many(
            [Queue.prepare_data(nothing, args=[p]) for p in prompts[start : start + at_once]]
        )
    seconds = time.perf_counter() - started
    queue.delete(delete_jobs=True)
    return jobs / seconds
