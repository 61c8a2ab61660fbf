"""The training loop: wait for a batch, take a step, write it down, checkpoint now and then.

    batches -> learner -> metrics, checkpoints

Every rank runs it in step. Whether to go on is asked of all of them before each step, so a rank
that waits for shards, or has been told to stop, holds the others without leaving them in the lurch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from synthrep_trainer import distributed
from synthrep_trainer.batches import BatchLoader
from synthrep_trainer.learner import Learner, StepResult
from synthrep_trainer.schedules import Rates
from synthrep_trainer.shard_stream import Cursor

_log = logging.getLogger(__name__)
_WAIT_S = 0.5  # between two questions to all ranks
_SAY_AFTER_S = 1.0
_NOTE_EVERY_S = 30.0


class Recorder(Protocol):
    """Where steps and checkpoints go."""

    def record_wait(self) -> None: ...

    def record_step(self, step: int, result: StepResult, *, wait_s: float) -> None: ...

    def save(self, step: int, cursor: Cursor) -> None: ...


class Plan(NamedTuple):
    """From which step to which, and what changes on the way."""

    first_step: int
    last_step: int
    checkpoint_every: int
    rates_at: Callable[[int], Rates]


def train(
    learner: Learner,
    loader: BatchLoader,
    recorder: Recorder,
    plan: Plan,
    *,
    should_stop: Callable[[], bool],
) -> bool:
    """Take the steps of `plan`; False if stopped before the last, with a checkpoint either way.

    Raises TrainingStoppedError before the optimizer moves on a number that is none, and
    BadShardError for a shard that has changed: the run goes on without it when it is resumed.
    """
    step, saved, cursor = plan.first_step - 1, plan.first_step - 1, None
    while step < plan.last_step:
        wait_s = _wait_for_all(loader, recorder, should_stop)
        if wait_s is None:
            break
        loaded = loader.take()
        step, cursor = loaded.step, loaded.cursor
        result = learner.step(loaded.batch, step=step, rates=plan.rates_at(step))
        if loaded.held_out is not None:
            accuracy = learner.neighbour_accuracy(loaded.held_out)
            result = result._replace(knn_accuracy=accuracy)
        recorder.record_step(step, result, wait_s=wait_s)
        if step % plan.checkpoint_every == 0:
            recorder.save(step, cursor)
            saved = step
    if cursor is not None and saved < step:
        recorder.save(step, cursor)
    return step >= plan.last_step


def _wait_for_all(
    loader: BatchLoader, recorder: Recorder, should_stop: Callable[[], bool]
) -> float | None:
    """Seconds until every rank had its batch, None if one of them is to stop."""
    started = noted = time.monotonic()
    while True:
        is_ready = loader.is_ready(_WAIT_S)
        flags = distributed.gather(torch.tensor([[should_stop(), is_ready]]).int())
        if flags[:, 0].any():
            return None
        now = time.monotonic()
        if flags[:, 1].all():
            return now - started
        if now - started > _SAY_AFTER_S:
            recorder.record_wait()
        if now - noted > _NOTE_EVERY_S:
            noted = now
            _log.info("waiting_for_images", extra={"waited_s": round(now - started)})
