"""Feeds the queue from intake minus log minus in flight: `python -m synthrep_generator.reconciler`.

It decides nothing that the log has not decided, so two at once, a restart or the loss of all of
Redis cost some work done twice at most. Only a few jobs a worker wait in Redis at any time.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

from prometheus_client import Counter
from redis import RedisError

from synthrep_generator.chunks import Chunk, Place, PlacesOf, chunk_from_places
from synthrep_generator.feeder import DatasetFeed, cut_chunks
from synthrep_generator.intake import is_paused
from synthrep_generator.janitor import remove_leftovers
from synthrep_generator.queues import InFlight, WorkQueue
from synthrep_generator.settings import GeneratorSettings
from synthrep_shared.errors import CommitLogError
from synthrep_shared.exposition import exposed, make_registry
from synthrep_shared.failpoints import failpoint
from synthrep_shared.heartbeat import Heartbeat
from synthrep_shared.logs import configure_logging
from synthrep_shared.storage import DatasetPaths, list_datasets, prepare_root

logger = logging.getLogger(__name__)

_GRACE = 1 / 6  # of a lease: time between the queue and the lease in which a chunk is not lost
_JANITOR_S = 86_400.0
_REST = 4  # times as long as a pass took: every job that ends asks for one, on any worker
_SKIP_S = 60.0
_MAX_BACKOFF_S = 5.0
_PREFIX = "synthrep_generator_reconciler_"


class SweepFigures:
    """What a reconciler has done, as series of Prometheus."""

    def __init__(self) -> None:
        self.registry = make_registry()
        count = partial(Counter, registry=self.registry)
        self.sweeps = count(_PREFIX + "sweeps", "Passes over all data sets.")
        self.failed_sweeps = count(_PREFIX + "failed_sweeps", "Passes that storage or Redis ended.")
        self.fed_chunks = count(_PREFIX + "fed_chunks", "Chunks put into the queue.")
        self.lost_chunks = count(_PREFIX + "lost_chunks", "Chunks whose worker was lost.")


class Reconciler:
    """Keeps the queue filled and brings lost chunks back."""

    def __init__(
        self,
        settings: GeneratorSettings,
        queue: WorkQueue,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._queue, self._clock = settings, queue, clock
        self._feeds: dict[str, DatasetFeed] = {}
        self._lost_since: dict[str, float] = {}
        self._skipped_until: dict[str, float] = {}
        self._cleaned_at: float | None = None
        self.figures = SweepFigures()

    def run(self, stop: threading.Event) -> None:
        """Sweep until `stop`; raises QueueServerError if Redis would lose work, and only that."""
        checked, backoff_s = False, 0.1
        heartbeat = Heartbeat(self._settings.heartbeat)
        while not stop.is_set():
            heartbeat.beat("up")
            try:
                if not checked:
                    self._queue.check_server()
                    checked = True
                started = self._clock()
                self.sweep()
                self.figures.sweeps.inc()
                self.clean()
                self._wait(stop, rest_s=_REST * (self._clock() - started))
                backoff_s = 0.1
            except (RedisError, OSError) as error:
                self.figures.failed_sweeps.inc()
                if checked or backoff_s < _MAX_BACKOFF_S:
                    logger.warning("sweep failed", extra={"error": str(error)})
                checked = False
                stop.wait(backoff_s)
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    def sweep(self) -> int:
        """One pass; returns the number of chunks put into the queue."""
        self._refresh()
        flight = self._queue.in_flight()
        fed = self._return_lost(flight)
        waiting = len(flight.queued) + fed
        workers = max(1, len(self._queue.workers()))
        room = max(0, self._settings.jobs_ahead * workers - waiting)
        in_flight = PlacesOf(flight.chunks.values())
        feeds, troubled = list(self._feeds.values()), self._queue.troubled()
        fed += self._queue.feed_all(cut_chunks(feeds, in_flight, room=room, troubled=troubled))
        self.figures.fed_chunks.inc(fed)
        if fed:
            logger.info("chunks fed", extra={"chunks": fed, "waiting": waiting})
        return fed

    def clean(self) -> None:
        """Once a day, remove what killed writers left."""
        now = self._clock()
        if self._cleaned_at is not None and now - self._cleaned_at < _JANITOR_S:
            return
        self._cleaned_at = now
        for dataset, feed in self._feeds.items():
            try:
                remove_leftovers(feed.paths, now_s=time.time())
            except CommitLogError:  # in a part that was read long ago
                logger.exception("leftovers stay", extra={"dataset": dataset})

    def _refresh(self) -> None:
        for dataset in list_datasets(self._settings.root):
            if self._clock() < self._skipped_until.get(dataset, 0.0):
                continue
            if dataset not in self._feeds:
                paths = DatasetPaths(self._settings.root, dataset)
                job_images = self._settings.job_images
                self._feeds[dataset] = DatasetFeed(paths, job_images=job_images)
            try:
                self._feeds[dataset].refresh()
            except (CommitLogError, PermissionError):
                # Without its log a data set's prompts look undecided: it waits for a repair.
                logger.exception("data set skipped", extra={"dataset": dataset})
                del self._feeds[dataset]
                self._skipped_until[dataset] = self._clock() + _SKIP_S

    def _return_lost(self, flight: InFlight) -> int:
        """Re-enqueue what has been lost for longer than the grace; returns how many chunks."""
        now = self._clock()
        self._lost_since = {i: self._lost_since.get(i, now) for i in flight.lost()}
        grace_s = _GRACE * self._settings.lease_s
        expired = [i for i, since in self._lost_since.items() if now - since >= grace_s]
        return sum(self._return(flight.chunks[chunk_id]) for chunk_id in expired)

    def _return(self, chunk: Chunk) -> bool:
        # A chunk keeps its prompts together, so that one that was isolated stays so.
        places = self._left_to_do(chunk)
        if not self._queue.forget(chunk.id) or not places:
            return False
        failpoint("lost-chunk-forgotten")
        self.figures.lost_chunks.inc()
        logger.info("lost chunk returned", extra={"chunk": chunk.id, "prompts": len(places)})
        return self._queue.feed(chunk_from_places(chunk.dataset, places), at_front=True)

    def _left_to_do(self, chunk: Chunk) -> list[Place]:
        feed = self._feeds.get(chunk.dataset)
        if feed is None or any(is_paused(feed.paths, part.batch) for part in chunk.parts):
            return []
        return feed.undecided(chunk)

    def _wait(self, stop: threading.Event, *, rest_s: float) -> None:
        """Until the next pass is due, or a nudge comes after `rest_s`."""
        deadline = self._clock() + self._settings.sweep_s
        stop.wait(min(rest_s, self._settings.sweep_s))
        while not stop.is_set() and (left := deadline - self._clock()) > 0:
            if self._queue.wait_for_nudge(left):
                return


def main() -> int:
    """Run until SIGTERM or SIGINT."""
    settings = GeneratorSettings()
    configure_logging("generator-reconciler", settings.log_level)
    prepare_root(settings.root)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    logger.info("reconciler started", extra={"root": str(settings.root), "queue": settings.queue})
    reconciler = Reconciler(settings, WorkQueue(settings))
    with exposed(reconciler.figures.registry, settings.host, settings.metrics_ports()):
        reconciler.run(stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
