"""What the intake and the commit log of one data set amount to, kept up to date record by record.

Pure: the caller reads the files. Accepted prompts are always the sum of queued, running,
committed, failed and cancelled ones, whatever order headers and records arrive in.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from synthrep_generator.intake import BatchHeader
from synthrep_shared.commit_log import CommitRecord, Outcomes
from synthrep_shared.messages import PromptCounts, State

_RATE_WINDOW_S = 60.0


def batch_state(counts: PromptCounts, *, paused: bool) -> State:
    """The state that the counts of a batch amount to."""
    if counts.queued + counts.running == 0:
        if counts.cancelled:
            return "cancelled"
        return "completed" if counts.committed else "failed"
    if paused:
        return "paused"
    return "running" if counts.running or counts.committed or counts.failed else "queued"


@dataclass(slots=True)
class Pace:
    """Images per second, mostly of the last minute; the first commit only starts the clock."""

    first_at: float
    last_at: float
    weight: float = 0.0

    def add(self, at: float, images: int) -> None:
        """Count `images` that were committed at `at`, seconds since the epoch."""
        at = max(at, self.last_at)
        self.weight = self._decayed(at) + images
        self.last_at = at

    def images_per_s(self, now: float) -> float | None:
        """The pace at `now`; None before a second commit at another time."""
        now = max(now, self.last_at)
        if self.last_at <= self.first_at:
            return None
        window = _RATE_WINDOW_S * -math.expm1((self.first_at - now) / _RATE_WINDOW_S)
        return self._decayed(now) / window

    def _decayed(self, at: float) -> float:
        return self.weight * math.exp((self.last_at - at) / _RATE_WINDOW_S)


@dataclass(slots=True)
class Batch:
    """One accepted batch and how far it is."""

    id: str
    dataset: str
    owner: str
    num_prompts: int
    images_per_prompt: int
    created_at: datetime
    committed: int = 0
    failed: int = 0
    cancelled: int = 0

    @property
    def unfinished(self) -> int:
        """Prompts without an outcome."""
        return self.num_prompts - self.committed - self.failed - self.cancelled

    def counts(self, running: int) -> PromptCounts:
        """Where the prompts are, if `running` of them are said to be in a leased job."""
        running = max(0, min(running, self.unfinished))
        return PromptCounts(
            accepted=self.num_prompts,
            queued=self.unfinished - running,
            running=running,
            committed=self.committed,
            failed=self.failed,
            cancelled=self.cancelled,
        )


@dataclass(slots=True)
class Totals:
    """Sums over a data set. Prompts first; `unfinished_images` are those still to be made."""

    accepted: int = 0
    committed: int = 0
    failed: int = 0
    cancelled: int = 0
    unfinished_images: int = 0
    shards: int = 0
    groups: int = 0
    images: int = 0
    bytes: int = 0

    @property
    def unfinished(self) -> int:
        """Prompts without an outcome."""
        return self.accepted - self.committed - self.failed - self.cancelled


@dataclass(slots=True)
class Tally:
    """Batches, totals, the first batch of all, and which batches changed since when."""

    outcomes: Outcomes = field(default_factory=Outcomes)
    totals: Totals = field(default_factory=Totals)
    batches: dict[str, Batch] = field(default_factory=dict)
    first: Batch | None = None
    tick: int = 0
    _paces: dict[str, Pace] = field(default_factory=dict)
    _changed: OrderedDict[str, int] = field(default_factory=OrderedDict)

    def register(self, header: BatchHeader) -> None:
        """Take an accepted batch into account, once."""
        if header.id in self.batches:
            return
        batch = Batch(
            header.id,
            header.dataset,
            header.owner,
            header.num_prompts,
            header.settings.images_per_prompt,
            header.created_at,
        )
        self.batches[batch.id] = batch
        self.first = min(self.first or batch, batch, key=lambda b: (b.created_at, b.id))
        self.totals.accepted += batch.num_prompts
        self.totals.unfinished_images += batch.num_prompts * batch.images_per_prompt
        self._settle(batch.id)

    def apply(self, record: CommitRecord) -> None:
        """Take the next record of the log into account."""
        self.outcomes.apply(record)
        if record.kind == "cancel":
            self._settle(record.name)
            return
        images: dict[str, int] = {}
        for group in record.groups:
            images[group.batch] = images.get(group.batch, 0) + group.images
        if record.kind == "shard":
            self.totals.shards += 1
            self.totals.groups += len(record.groups)
            self.totals.images += sum(images.values())
            self.totals.bytes += record.bytes
            at = record.created_at.timestamp()
            for batch, count in images.items():
                if (pace := self._paces.get(batch)) is None:
                    self._paces[batch] = Pace(at, at)
                else:
                    pace.add(at, count)
        for batch in images:
            self._settle(batch)

    def touch(self, batch: str) -> None:
        """Note that something about the batch changed."""
        self.tick += 1
        self._changed[batch] = self.tick
        self._changed.move_to_end(batch)

    def changed_since(self, tick: int) -> list[Batch]:
        """The batches that changed after `tick`, the one that changed last first."""
        return list(self._changed_since(tick))

    def _changed_since(self, tick: int) -> Iterator[Batch]:
        for batch, changed_at in reversed(self._changed.items()):
            if changed_at <= tick:
                return
            if batch in self.batches:
                yield self.batches[batch]

    def images_per_s(self, batch: Batch, now: float) -> float | None:
        """Images per second of the batch: lately while it is unfinished, over all else."""
        pace = self._paces.get(batch.id)
        if pace is None:
            return None
        recent = pace.images_per_s(now if batch.unfinished else pace.last_at)
        if recent is not None and batch.unfinished:
            return recent
        seconds = pace.last_at - batch.created_at.timestamp()
        return self.outcomes.images[batch.id] / seconds if seconds > 0 else recent

    def _settle(self, batch_id: str) -> None:
        """Bring the batch's numbers and the totals in line with the outcomes."""
        self.touch(batch_id)
        batch = self.batches.get(batch_id)
        if batch is None:
            return
        before = (batch.committed, batch.failed, batch.cancelled)
        batch.committed = min(self.outcomes.committed(batch_id), batch.num_prompts)
        batch.failed = min(self.outcomes.failed(batch_id), batch.num_prompts - batch.committed)
        rest = batch.num_prompts - batch.committed - batch.failed
        batch.cancelled = rest if batch_id in self.outcomes.cancelled else 0
        after = (batch.committed, batch.failed, batch.cancelled)
        committed, failed, cancelled = (b - a for a, b in zip(before, after, strict=True))
        self.totals.committed += committed
        self.totals.failed += failed
        self.totals.cancelled += cancelled
        decided = committed + failed + cancelled
        self.totals.unfinished_images -= decided * batch.images_per_prompt
