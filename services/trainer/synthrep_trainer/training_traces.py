"""Traces of a run: each training batch with links to the batches of prompts that it came from."""

from __future__ import annotations

from synthrep_shared.commit_log import CommitRecord
from synthrep_shared.tracing import Tracer
from synthrep_trainer.shard_stream import DrawnBatch


class TrainingTraces:
    """What one rank of a run tells a tracer; for the one thread that cuts batches."""

    def __init__(self, tracer: Tracer, run: str) -> None:
        self._tracer, self._run = tracer, run
        self._batches: dict[int, tuple[str, ...]] = {}  # of prompts, by shard

    def admit(self, shard: CommitRecord) -> None:
        """The run draws from this shard from now on."""
        if not self._tracer.is_on:
            return
        batches = self._batches[shard.seq] = tuple(dict.fromkeys(g.batch for g in shard.groups))
        for batch in batches:
            self._tracer.record(
                "admit shard", about=batch, seconds=0.0, run=self._run, seq=shard.seq,
                shard=shard.name,
            )  # fmt: skip

    def make(self, drawn: DrawnBatch, seconds: float) -> None:
        """A batch of pixels was made in so many seconds."""
        if not self._tracer.is_on:
            return
        shards = {group.shard.seq for group in drawn.groups}
        batches = dict.fromkeys(b for seq in sorted(shards) for b in self._batches.get(seq, ()))
        self._tracer.record(
            "make training batch", about=f"{self._run} {drawn.step}", seconds=seconds,
            is_root=True, links=batches, run=self._run, step=drawn.step,
            captions=len(drawn.groups), shards=len(shards),
        )  # fmt: skip
