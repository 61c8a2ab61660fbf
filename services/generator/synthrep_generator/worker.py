"""The worker: takes chunks off the queue and has its device process run them.

`python -m synthrep_generator.worker`. An RQ worker in RQ's eyes; what RQ keeps about a job is a
ticket and nothing more. Neither a crash of the device process nor the absence of Redis ends it:
outcomes are in the log before anything is acknowledged, and what is not acknowledged comes back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from redis import RedisError
from rq.exceptions import DequeueTimeout, InvalidJobOperation
from rq.job import JobStatus
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.worker import Worker

from synthrep_generator.chunks import Chunk
from synthrep_generator.dataset_files import OpenDatasets, is_disk_full, is_held_back
from synthrep_generator.errors import LeaseLostError, QueueServerError
from synthrep_generator.failure_writer import Failure, record_failures
from synthrep_generator.leases import Lease
from synthrep_generator.pipe import Finished, Raised
from synthrep_generator.queues import SOCKET_TIMEOUT_S, ChunkJob, WorkerView, WorkQueue
from synthrep_generator.scheduling import give_way
from synthrep_generator.settings import GeneratorSettings
from synthrep_generator.supervisor import Crashed, Outcome, Supervisor, Wish
from synthrep_shared.exposition import exposed
from synthrep_shared.failpoints import failpoint
from synthrep_shared.heartbeat import Heartbeat
from synthrep_shared.logs import configure_logging
from synthrep_shared.storage import prepare_root

logger = logging.getLogger(__name__)

EXIT_BROKEN = 70  # the device process cannot start: a fresh machine or container may help
_DEQUEUE_S = 1
_WAIT_S = 0.5
_START_WAIT_S = 0.05
_MAX_BACKOFF_S = 30.0
_MAX_LOST_RUNS = 2  # of a chunk of several prompts, before each of them runs alone
_SECOND_SIGNAL_S = 1.0  # a terminal and a supervisor may both pass on the same wish


class ChunkWorker(Worker):
    """Serves one queue with one device."""

    def __init__(
        self, settings: GeneratorSettings, queue: WorkQueue, supervisor: Supervisor
    ) -> None:
        super().__init__(
            [queue.rq],
            name=f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}",
            connection=queue.redis,
            job_class=ChunkJob,
            serializer=JSONSerializer,
            worker_ttl=60,
            job_monitoring_interval=10,
            maintenance_interval=30,
            prepare_for_work=False,  # Redis may be absent now
        )
        self.hostname, self.pid = socket.gethostname(), os.getpid()
        self._settings, self._queue, self._supervisor = settings, queue, supervisor
        self._datasets = OpenDatasets(settings.root)
        self._stop_asked_at: float | None = None
        self._reported, self._report_at = "", 0.0
        self._images_per_s, self._backoff_s, self._rest_until = 0.0, 0.0, 0.0
        self._heartbeat, self._busy_at = Heartbeat(settings.heartbeat), time.monotonic()

    @property
    def connection_timeout(self) -> float:
        """RQ would raise the socket's timeout to this."""
        return SOCKET_TIMEOUT_S

    def serve(self) -> int:
        """Work until a signal or until the device is broken; returns the exit status.

        Raises QueueServerError if Redis is set up so that it would lose work.
        """
        is_checked = False
        while not (self._stop_asked_at or self._supervisor.is_broken or self._is_superfluous()):
            self._heartbeat.beat(self._reported or "starting")
            try:
                if not is_checked:
                    self._queue.check_server()
                    is_checked = True
                self._serve_next()
            except QueueServerError:
                raise
            except Exception as error:
                expected = isinstance(error, RedisError)
                level = logging.WARNING if expected else logging.ERROR
                logger.log(
                    level, "worker waits", extra={"error": str(error)}, exc_info=not expected
                )
                is_checked = False
                self._pause(_WAIT_S)
        with contextlib.suppress(RedisError):
            self._queue.retire_worker(self.name)
            self.register_death()
        self._supervisor.close()
        return EXIT_BROKEN if self._supervisor.is_broken else 0

    def ask_to_stop(self, number: int, _frame: object) -> None:
        """Signal handler: the first one seals or gives back the job at hand, a second one kills."""
        now = time.monotonic()
        if self._stop_asked_at is None:
            self._stop_asked_at = now
        elif now - self._stop_asked_at > _SECOND_SIGNAL_S:
            self._supervisor.kill()
            os._exit(128 + number)

    def _serve_next(self) -> None:
        is_ready = self._supervisor.tend()
        is_full = is_disk_full(self._settings.root, self._settings.reserve_bytes)
        must_wait = time.monotonic() < self._rest_until or is_full
        state = "waiting" if must_wait else "idle" if is_ready else "starting"
        if state != self._reported or time.monotonic() >= self._report_at:
            self._report(state)
        if state != "idle":
            self._pause(_WAIT_S if must_wait else _START_WAIT_S)
            return
        if self.should_run_maintenance_tasks:
            self.clean_registries()
        with contextlib.suppress(DequeueTimeout):
            found = Queue.dequeue_any(
                self.queues,
                _DEQUEUE_S,
                connection=self.connection,
                job_class=ChunkJob,
                serializer=JSONSerializer,
            )
            if found is not None:
                self.execute_job(*found)

    def execute_job(self, job: ChunkJob, queue: Queue) -> None:
        """Run the chunk that a job asks for, unless another worker does."""
        failpoint("chunk-popped")
        lease = Lease(self._queue, job.chunk, self.name)
        try:
            strikes = lease.acquire()
        except LeaseLostError as error:
            logger.info("chunk passed over", extra={"reason": str(error)})
            with self._ticket(job, queue):
                return
        with self._ticket(job, queue) as execution:
            self._report_at = 0.0
            if self._is_settled(job.chunk, lease, strikes):
                return
            started = time.monotonic()
            outcome = self._supervisor.run(job.chunk, lambda: self._attend(lease, job, execution))
            self._settle(job.chunk, lease, strikes, outcome, time.monotonic() - started)

    @contextlib.contextmanager
    def _ticket(self, job: ChunkJob, queue: Queue) -> Iterator[Any]:
        """What RQ and its tools see of a run. Nothing depends on it: Redis may fail meanwhile."""
        execution = None
        with contextlib.suppress(RedisError):
            execution = self.prepare_execution(job)
            self.prepare_job_execution(job, remove_from_intermediate_queue=True)
        yield execution
        if execution is not None:
            # After a loss of Redis' data RQ does not know the job any more.
            with contextlib.suppress(RedisError, InvalidJobOperation):
                job._status = JobStatus.FINISHED
                self._finalize_success(job, queue, execution, None)

    def _attend(self, lease: Lease, job: ChunkJob, execution: Any) -> Wish | None:
        """Between two looks at the device: show life, and say if the run is to end."""
        self._heartbeat.beat("running")
        try:
            if time.monotonic() >= self._report_at:
                lease.renew()
                self._report("running")
                if execution is not None:
                    self.maintain_heartbeats(job, execution)
        except LeaseLostError as error:
            logger.warning("run dropped", extra={"reason": str(error)})
            self._supervisor.figures.count("leases_lost")
            return Wish.DROP
        except RedisError as error:
            # From the end of the attempt: a Redis that hangs must not take all of the time.
            self._report_at = time.monotonic() + self._settings.lease_s / 3
            logger.debug("heartbeat failed", extra={"error": str(error)})
        return None if self._stop_asked_at is None else Wish.SEAL

    def _is_settled(self, chunk: Chunk, lease: Lease, strikes: int) -> bool:
        """Deal with a chunk that is not to run, or whose runs killed workers; was that all."""
        if is_held_back(self._settings.root, chunk):
            lease.give_back()
            return True
        if chunk.num_prompts > 1 and strikes >= _MAX_LOST_RUNS:
            lease.replace(chunk.isolate(frozenset(chunk.places())))
            return True
        if chunk.num_prompts == 1 and strikes >= self._settings.max_strikes:
            self._record_failure(chunk, strikes, "the worker died")
            lease.acknowledge()
            return True
        return False

    def _settle(
        self, chunk: Chunk, lease: Lease, strikes: int, outcome: Outcome, seconds: float
    ) -> None:
        facts = {**chunk.names, "seconds": round(seconds, 3)}
        if isinstance(outcome, Crashed) and outcome.active:
            logger.error("device process lost", extra=facts | {"reason": outcome.reason})
            self._punish(chunk, lease, strikes + 1, outcome)
        elif isinstance(outcome, Finished) and not outcome.stopped:
            self._backoff_s = 0.0
            self._images_per_s = outcome.images / seconds or self._images_per_s
            facts |= outcome.model_dump(exclude={"kind", "chunk_id", "stopped"})
            logger.info("chunk done", extra=facts)
            lease.acknowledge()
            self._queue.count_filtered(outcome.filtered)
        else:
            logger.info("chunk given back", extra=facts | {"outcome": repr(outcome)})
            has_trouble = isinstance(outcome, Raised | Crashed)
            if has_trouble:
                self._rest()
            lease.give_back(has_trouble=has_trouble)

    def _punish(self, chunk: Chunk, lease: Lease, strikes: int, crash: Crashed) -> None:
        """Isolate the prompts that were in work, or record the failure of one that was alone."""
        if chunk.num_prompts > 1:
            lease.replace(chunk.isolate(crash.active))
        elif strikes < self._settings.max_strikes:
            lease.run_again()
        else:
            self._record_failure(chunk, strikes, crash.reason)
            lease.acknowledge()

    def _record_failure(self, chunk: Chunk, attempts: int, reason: str) -> None:
        """Record that the lone prompt of a chunk fails; raises OSError or SynthRepError."""
        (place,) = chunk.places()
        files = self._datasets[chunk.dataset]
        reader = files.reader(place.batch)
        (prompt,) = reader.prompts(place.index, 1)
        failure = Failure(
            gid=reader.header.gid(place.index, prompt),
            batch=place.batch,
            index=place.index,
            prompt=prompt,
            reason=f"{reason}; {attempts} runs of this prompt alone ended so",
            attempts=attempts,
        )
        record_failures(files.paths, files.log, [failure])

    def _rest(self) -> None:
        self._backoff_s = min(2 * self._backoff_s or _WAIT_S, _MAX_BACKOFF_S)
        self._rest_until = time.monotonic() + self._backoff_s

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._stop_asked_at is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def _is_superfluous(self) -> bool:
        self._busy_at = self._busy_at if self._reported == "idle" else time.monotonic()
        return 0 < self._settings.idle_exit_s < time.monotonic() - self._busy_at

    def _report(self, state: str) -> None:
        """Show this worker as live in a state; call a few times per lease and at its changes."""
        self._supervisor.figures.be(state)
        if not self.connection.exists(self.key):
            self.register_birth()
        self.heartbeat()
        view = WorkerView(self.name, self._supervisor.device, state, self._images_per_s)
        self._queue.report_worker(view, ttl_s=self._settings.lease_s)
        self._reported, self._report_at = state, time.monotonic() + self._settings.lease_s / 3


def main() -> int:
    """Serve until SIGTERM or SIGINT."""
    settings = GeneratorSettings()
    give_way()
    configure_logging("generator-worker", settings.log_level)
    logging.getLogger("rq.worker").setLevel(logging.WARNING)
    prepare_root(settings.root)
    worker = ChunkWorker(settings, WorkQueue(settings), supervisor := Supervisor(settings))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, worker.ask_to_stop)
    logger.info("worker started", extra={"worker": worker.name, "queue": settings.queue})
    with exposed(supervisor.figures.registry, settings.host, settings.metrics_ports()):
        return worker.serve()


if __name__ == "__main__":
    sys.exit(main())
