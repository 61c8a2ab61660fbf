"""A worker's hold on a chunk: others leave it alone while the lease lives.

The lease saves device time and nothing else. Safety is the commit log's, so a zombie, a clock or
a lost Redis can make work be done twice, never be counted twice.
"""

from __future__ import annotations

from typing import cast

from synthrep_generator.chunks import Chunk
from synthrep_generator.errors import LeaseLostError
from synthrep_generator.queues import WorkQueue
from synthrep_shared.failpoints import failpoint

_STRIKES_TTL_S = 86_400


class Lease:
    """One chunk in the hands of one worker. Every method raises redis.RedisError without Redis.

    A strike is set before the run and taken back when the run ends well, so that a chunk whose
    runs take the whole worker down is noticed too.
    """

    def __init__(self, queue: WorkQueue, chunk: Chunk, holder: str) -> None:
        self._queue, self._redis = queue, queue.redis
        self._chunk, self._holder = chunk, holder.encode()
        self._key = queue.lease_key(chunk.id)
        self._strikes_key = queue.strikes_key(chunk.id)
        self._earlier_strikes = 0

    def acquire(self) -> int:
        """Strikes of earlier runs; raises LeaseLostError if another worker holds the chunk."""
        if not self._redis.set(self._key, self._holder, nx=True, px=self._queue.lease_ms):
            raise LeaseLostError(f"chunk {self._chunk.id} is held by another worker")
        failpoint("chunk-leased")
        with self._redis.pipeline() as pipeline:
            pipeline.incr(self._strikes_key)
            pipeline.expire(self._strikes_key, _STRIKES_TTL_S)
            strikes, _ = pipeline.execute()
        self._earlier_strikes = cast(int, strikes) - 1
        return self._earlier_strikes

    def renew(self) -> None:
        """Hold on for another term, also after Redis forgot; LeaseLostError if another took it."""
        holder = self._redis.get(self._key)
        if holder == self._holder:
            self._redis.pexpire(self._key, self._queue.lease_ms)
        elif holder is not None or not self._redis.set(
            self._key, self._holder, nx=True, px=self._queue.lease_ms
        ):
            raise LeaseLostError(f"chunk {self._chunk.id} went to another worker")
        self._redis.hsetnx(self._queue.register_key, self._chunk.id, self._chunk.model_dump_json())

    def give_back(self, *, has_trouble: bool = False) -> None:
        """End the run without a verdict: what is undecided goes back to the pool, no strike.

        After trouble that is not the prompts' it comes after other work.
        """
        if has_trouble:
            self._queue.note_trouble(self._chunk)
        if self._earlier_strikes:
            self._redis.set(self._strikes_key, self._earlier_strikes, ex=_STRIKES_TTL_S)
        else:
            self._redis.delete(self._strikes_key)
        self._end()

    def acknowledge(self) -> None:
        """End the run of a chunk whose prompts are decided."""
        failpoint("chunk-acknowledged")
        self._redis.delete(self._strikes_key)
        self._end()

    def run_again(self) -> None:
        """End the run of a chunk that crashed its process; the strike stays."""
        self._drop()
        failpoint("chunk-dropped")
        self._queue.enqueue(self._chunk)

    def replace(self, chunks: list[Chunk]) -> None:
        """End the run and put `chunks`, the same prompts cut otherwise, in this chunk's place."""
        self._redis.delete(self._strikes_key)
        self._queue.forget(self._chunk.id)
        self._drop()
        for chunk in chunks:
            self._queue.feed(chunk)
            failpoint("chunk-split")

    def _end(self) -> None:
        self._queue.forget(self._chunk.id)
        failpoint("chunk-forgotten")
        self._drop()
        self._queue.nudge()

    def _drop(self) -> None:
        if self._redis.get(self._key) == self._holder:
            self._redis.delete(self._key)
