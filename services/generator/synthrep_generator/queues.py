"""The door to Redis: one RQ queue of chunks, the register of those in flight, leases, workers.

Redis holds nothing that cannot be rebuilt. RQ hands chunks to workers; which prompts are in flight
is the register's word, and whether they are done is the commit log's. Nothing written to Redis by
others is run: jobs travel as JSON, and one that is not exactly ours counts as absent.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pydantic import ValidationError
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.queue import Queue
from rq.serializers import JSONSerializer

from synthrep_generator.chunks import Chunk
from synthrep_generator.errors import QueueServerError
from synthrep_generator.settings import GeneratorSettings
from synthrep_shared.failpoints import failpoint

FUNCTION = "synthrep_generator.jobs.generate_shard"
ALLOWED_FUNCTIONS = frozenset({FUNCTION})
SOCKET_TIMEOUT_S = 5.0
_ABANDONED_TTL_S = 3600  # how long RQ remembers the ticket of a worker that was killed
_FEED_AT_ONCE = 256  # keeps a transaction short
_TROUBLE_LEASES = 2  # for which a batch whose chunk could not be run comes after others
_NUDGE_WAIT_S = 2.0  # one blocking call; below the socket's timeout


class ForeignJobError(NoSuchJobError):
    """A job that this service did not enqueue; RQ passes over it as over one that is gone."""


class ChunkJob(Job):
    """A job that asks for one chunk; restoring any other is refused before anything is imported."""

    def restore(self, raw_data: Any) -> None:
        """Take over what Redis holds; raises ForeignJobError unless it is a plain chunk job."""
        try:
            super().restore(raw_data)
            self._refuse_what_is_not_ours()
        except NoSuchJobError:
            raise
        except Exception as error:
            raise ForeignJobError(f"job {self.id} cannot be read") from error

    def _refuse_what_is_not_ours(self) -> None:
        callbacks = (
            self._success_callback_name,
            self._failure_callback_name,
            self._stopped_callback_name,
        )
        if self.func_name not in ALLOWED_FUNCTIONS or self.instance is not None:
            raise ForeignJobError(f"job {self.id} asks for a function that is not allowed")
        if any(callbacks) or self.webhooks or self.repeats_left or self._dependency_ids:
            raise ForeignJobError(f"job {self.id} carries callbacks")
        if self.kwargs or not self.id.startswith(f"{self.chunk.id}-"):
            raise ForeignJobError(f"job {self.id} is malformed")

    @cached_property
    def chunk(self) -> Chunk:
        """The chunk that is asked for."""
        (payload,) = self.args
        return Chunk.model_validate_json(payload)


@dataclass(frozen=True)
class QueueView:
    """Jobs that wait and jobs that a live worker holds; images refused so far, by check."""

    depth: int
    running: int
    filtered: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerView:
    """A live worker; `images_per_s` is that of its last job, 0 before the first."""

    name: str
    device: str
    state: str
    images_per_s: float


@dataclass(frozen=True)
class InFlight:
    """The register at one moment: chunks by id, and which of them wait or are held."""

    chunks: dict[str, Chunk]
    queued: frozenset[str]
    leased: frozenset[str]

    def lost(self) -> set[str]:
        """Chunks that nobody waits to run and nobody runs."""
        return set(self.chunks) - self.queued - self.leased


class WorkQueue:
    """What the API, the reconciler and the workers do with Redis; safe for several threads.

    Connects at first use. Every method raises redis.RedisError while Redis cannot be reached.
    """

    def __init__(self, settings: GeneratorSettings) -> None:
        self.redis = Redis.from_url(
            settings.redis_url.get_secret_value(),
            socket_timeout=SOCKET_TIMEOUT_S,
            socket_connect_timeout=SOCKET_TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),
        )
        self.lease_ms = int(settings.lease_s * 1000)
        self.rq = Queue(
            settings.queue, connection=self.redis, job_class=ChunkJob, serializer=JSONSerializer
        )
        self._prefix, self._parsed = f"synthrep:{settings.queue}", dict[bytes, Chunk]()
        self.register_key = f"{self._prefix}:chunks"
        self._troubled_key = f"{self._prefix}:troubled"
        self._filtered_key = f"{self._prefix}:filtered"

    def lease_key(self, chunk_id: str) -> str:
        """Key that exists while a worker holds the chunk."""
        return f"{self._prefix}:lease:{chunk_id}"

    def strikes_key(self, chunk_id: str) -> str:
        """Key that counts the runs of a chunk that did not end well."""
        return f"{self._prefix}:strikes:{chunk_id}"

    def check_server(self) -> None:
        """Raises QueueServerError if Redis would evict keys when its memory is full."""
        policy = self.redis.info("memory").get("maxmemory_policy")
        if policy != "noeviction":
            raise QueueServerError(
                f"Redis has maxmemory-policy {policy!r}, which drops queued work; set noeviction"
            )

    def feed(self, chunk: Chunk, *, at_front: bool = False) -> bool:
        """Register and enqueue a chunk; False if it is in flight already."""
        if not self.redis.hsetnx(self.register_key, chunk.id, chunk.model_dump_json()):
            return False
        failpoint("chunk-registered")
        self.enqueue(chunk, at_front=at_front)
        failpoint("chunk-enqueued")
        return True

    def feed_all(self, chunks: Sequence[Chunk]) -> int:
        """As `feed`, in few round trips; returns how many were not in flight already."""
        fed = 0
        for start in range(0, len(chunks), _FEED_AT_ONCE):
            some = chunks[start : start + _FEED_AT_ONCE]
            with self.redis.pipeline() as pipeline:
                for chunk in some:
                    pipeline.hsetnx(self.register_key, chunk.id, chunk.model_dump_json())
                fresh = [c for c, is_new in zip(some, pipeline.execute(), strict=True) if is_new]
            failpoint("chunk-registered")
            self.rq.enqueue_many([Queue.prepare_data(**self._job(chunk)) for chunk in fresh])
            failpoint("chunk-enqueued")
            fed += len(fresh)
        return fed

    def enqueue(self, chunk: Chunk, *, at_front: bool = False) -> None:
        """Ask for a run of a registered chunk."""
        self.rq.enqueue_call(**self._job(chunk), at_front=at_front)

    @staticmethod
    def _job(chunk: Chunk) -> dict[str, Any]:
        """What RQ is to keep of a chunk. The job's id is fresh: RQ runs equal ids twice."""
        return {
            "func": FUNCTION,
            "args": (chunk.model_dump_json(),),
            "job_id": f"{chunk.id}-{secrets.token_hex(8)}",
            "timeout": -1,  # the supervisor's clock is the one that counts
            "result_ttl": 0,
            "failure_ttl": _ABANDONED_TTL_S,
            "description": f"{chunk.num_prompts} prompts of {chunk.dataset}",
        }

    def forget(self, chunk_id: str) -> bool:
        """Take a chunk out of the register; True for the one caller that did it."""
        return bool(self.redis.hdel(self.register_key, chunk_id))

    def note_trouble(self, chunk: Chunk) -> None:
        """Have the batches of a chunk that could not be run come after others for a while."""
        with self.redis.pipeline() as pipeline:
            pipeline.sadd(self._troubled_key, *{part.batch for part in chunk.parts})
            pipeline.pexpire(self._troubled_key, _TROUBLE_LEASES * self.lease_ms)
            pipeline.execute()

    def troubled(self) -> frozenset[str]:
        """The batches that `note_trouble` spoke of lately."""
        members: set[Any] = self.redis.smembers(self._troubled_key)
        return frozenset(member.decode(errors="replace") for member in members)

    def in_flight(self) -> InFlight:
        """The register, read without locks: what looks lost may have ended in between."""
        with self.redis.pipeline() as pipeline:
            pipeline.hgetall(self.register_key)
            pipeline.lrange(self.rq.key, 0, -1)
            registered, waiting = pipeline.execute()
        parsed: dict[bytes, Chunk] = {}
        for key, payload in registered.items():
            try:
                parsed[payload] = self._parsed.get(payload) or Chunk.model_validate_json(payload)
            except ValidationError:
                self.redis.hdel(self.register_key, key)
        self._parsed = parsed  # most are in flight at the next look too
        chunks = {chunk.id: chunk for chunk in parsed.values()}
        queued = {job_id.decode(errors="replace").split("-")[0] for job_id in waiting}
        return InFlight(chunks, frozenset(queued & chunks.keys()), self._leased(list(chunks)))

    def _leased(self, ids: list[str]) -> frozenset[str]:
        if not ids:
            return frozenset()
        holders = self.redis.mget([self.lease_key(chunk_id) for chunk_id in ids])
        return frozenset(i for i, holder in zip(ids, holders, strict=True) if holder)

    def queue_view(self) -> QueueView:
        """Jobs waiting and running, and what quality gates refused since Redis was empty."""
        flight = self.in_flight()
        filtered: dict[Any, Any] = self.redis.hgetall(self._filtered_key)
        return QueueView(
            depth=len(flight.queued - flight.leased),
            running=len(flight.leased),
            filtered={check.decode(): int(images) for check, images in filtered.items()},
        )

    def count_filtered(self, images: Mapping[str, int]) -> None:
        """Add to what quality gates refused, by check."""
        for check, number in images.items():
            self.redis.hincrby(self._filtered_key, check, number)

    def running_prompts(self) -> dict[str, int]:
        """Prompts in the hands of live workers, by batch; some of them may be decided already."""
        flight = self.in_flight()
        counts: Counter[str] = Counter()
        for chunk_id in flight.leased:
            for part in flight.chunks[chunk_id].parts:
                counts[part.batch] += part.count
        return dict(counts)

    def nudge(self) -> None:
        """Wake a reconciler."""
        key = f"{self._prefix}:nudges"
        with self.redis.pipeline() as pipeline:
            pipeline.lpush(key, 1)
            pipeline.ltrim(key, 0, 0)
            pipeline.execute()

    def wait_for_nudge(self, timeout_s: float) -> bool:
        """Block until a nudge or for `timeout_s`, 2 s at most; whether there was a nudge."""
        timeout_s = min(timeout_s, _NUDGE_WAIT_S)
        return self.redis.blpop([f"{self._prefix}:nudges"], timeout=timeout_s) is not None

    def report_worker(self, worker: WorkerView, *, ttl_s: float) -> None:
        """Show a worker as live for `ttl_s`."""
        key = f"{self._prefix}:worker:{worker.name}"
        fields: dict[Any, Any] = {
            "device": worker.device,
            "state": worker.state,
            "images_per_s": f"{worker.images_per_s:.6g}",
        }
        with self.redis.pipeline() as pipeline:
            pipeline.sadd(f"{self._prefix}:workers", worker.name)
            pipeline.hset(key, mapping=fields)
            pipeline.pexpire(key, int(ttl_s * 1000))
            pipeline.execute()

    def retire_worker(self, name: str) -> None:
        """Show a worker no longer."""
        self.redis.srem(f"{self._prefix}:workers", name)
        self.redis.delete(f"{self._prefix}:worker:{name}")

    def workers(self) -> list[WorkerView]:
        """The live workers by name; forgets those that fell silent."""
        members: set[Any] = self.redis.smembers(f"{self._prefix}:workers")
        names = sorted(name.decode() for name in members)
        with self.redis.pipeline() as pipeline:
            for name in names:
                pipeline.hgetall(f"{self._prefix}:worker:{name}")
            reports = pipeline.execute()
        views = []
        for name, report in zip(names, reports, strict=True):
            fields = {key.decode(): value.decode() for key, value in report.items()}
            if not fields:
                self.redis.srem(f"{self._prefix}:workers", name)
                continue
            speed = float(fields["images_per_s"])
            views.append(WorkerView(name, fields["device"], fields["state"], speed))
        return views
