"""What the API knows of the work in hand: a snapshot of Redis that no request waits for long.

Redis may be gone or stalled; progress is answered from files all the same. One thread at a time
asks it, at most twice a second, and only while somebody wants to know.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from redis.exceptions import RedisError

from synthrep_generator.errors import BacklogUnknownError

logger = logging.getLogger(__name__)
_PATIENCE_S = 0.05  # what an answer from files waits for numbers, where the last ones are too old
_LONG_PATIENCE_S = 1.0  # what an answer about Redis itself waits
_MAX_AGE_S = 5.0
_IDLE_S = 5.0  # after which the thread ends that asks
_MAX_REFRESHES_BEHIND = 4  # numbers so old do beside an answer from files; new ones are on the way


class QueueState(Protocol):
    """Jobs that wait and jobs that a live worker holds; images refused so far, by check."""

    @property
    def depth(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def filtered(self) -> Mapping[str, int]: ...


class WorkerState(Protocol):
    """A live worker."""

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def images_per_s(self) -> float: ...


class Backlog(Protocol):
    """The queue as the API sees it; every method raises redis.RedisError without Redis."""

    def queue_view(self) -> QueueState:
        """Jobs waiting and running."""
        ...

    def running_prompts(self) -> Mapping[str, int]:
        """Prompts in leased jobs, by batch."""
        ...

    def workers(self) -> Sequence[WorkerState]:
        """The live workers."""
        ...

    def nudge(self) -> None:
        """Wake the reconciler."""
        ...


@dataclass(frozen=True)
class Snapshot:
    """The work in hand at `taken_at`, seconds of the monotonic clock."""

    queue: QueueState
    running: Mapping[str, int]
    workers: Sequence[WorkerState]
    taken_at: float


class LiveWork:
    """The latest snapshot of a backlog; safe for several threads."""

    def __init__(self, backlog: Backlog, *, refresh_s: float = 0.5) -> None:
        self._backlog = backlog
        self._refresh_s = refresh_s
        self._fresh_s = _MAX_REFRESHES_BEHIND * refresh_s
        self._changed = threading.Condition()
        self._asks: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_asking = self._has_thread = False
        self._snapshot: Snapshot | None = None
        self._due_at = 0.0
        self._is_up = True

    def running(self) -> Mapping[str, int]:
        """Prompts in leased jobs by batch; empty while Redis does not answer."""
        snapshot = self._latest(_PATIENCE_S, self._fresh_s)
        return {} if snapshot is None else snapshot.running

    def running_at_hand(self) -> Mapping[str, int] | None:
        """As `running`, without any wait; None where newer numbers may be had by waiting."""
        snapshot = self._latest(0.0, math.inf)
        return None if snapshot is None or self._age_s() > self._fresh_s else snapshot.running

    def workers(self) -> Sequence[WorkerState]:
        """The live workers; empty while Redis does not answer."""
        snapshot = self._latest(_PATIENCE_S, self._fresh_s)
        return () if snapshot is None else snapshot.workers

    def snapshot(self) -> Snapshot:
        """The work in hand; raises BacklogUnknownError while Redis does not answer."""
        snapshot = self._latest(_LONG_PATIENCE_S, 0.0)
        if snapshot is None:
            raise BacklogUnknownError("Redis does not answer; accepted work is safe meanwhile")
        return snapshot

    def nudge(self) -> None:
        """Wake the reconciler, which looks by itself anyhow."""
        try:
            self._backlog.nudge()
        except RedisError as error:
            self._note(error)
        else:
            self._note(None)

    def _latest(self, patience_s: float, fresh_s: float) -> Snapshot | None:
        """The last snapshot; waits for one that is due if the last is older than `fresh_s`."""
        with self._changed:
            if not self._is_asking and time.monotonic() >= self._due_at:
                self._ask()
            if self._age_s() > fresh_s:
                self._changed.wait_for(lambda: not self._is_asking, patience_s)
        return self._snapshot if self._age_s() <= _MAX_AGE_S else None

    def _age_s(self) -> float:
        snapshot = self._snapshot
        return math.inf if snapshot is None else time.monotonic() - snapshot.taken_at

    def _note(self, error: RedisError | None) -> None:
        """Log when Redis goes and when it comes back."""
        was_up, self._is_up = self._is_up, error is None
        if was_up and error is not None:
            logger.warning("redis was lost", extra={"error": str(error)})
        elif error is None and not was_up:
            logger.info("redis came back")

    def _ask(self) -> None:
        """Have a snapshot made, by a thread that is there already: a start waits for its turn."""
        self._is_asking = True
        self._asks.put(None)
        if not self._has_thread:
            self._has_thread = True
            threading.Thread(target=self._serve, name="live-work", daemon=True).start()

    def _serve(self) -> None:
        """Make snapshots when asked, until nobody asks for a while."""
        while True:
            try:
                self._asks.get(timeout=_IDLE_S)
            except queue.Empty:
                with self._changed:
                    if self._asks.empty():
                        self._has_thread = False
                        return
            else:
                self._refresh()

    def _refresh(self) -> None:
        snapshot = None
        try:
            snapshot = Snapshot(
                queue=self._backlog.queue_view(),
                running=self._backlog.running_prompts(),
                workers=self._backlog.workers(),
                taken_at=time.monotonic(),
            )
        except RedisError as error:
            self._note(error)
        else:
            self._note(None)
        finally:
            with self._changed:
                self._snapshot, self._is_asking = snapshot, False
                self._due_at = time.monotonic() + self._refresh_s
                self._changed.notify_all()
