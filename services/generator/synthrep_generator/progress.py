"""How far a data set is: read from its intake files and its commit log, and from nothing else.

`DatasetIndex` follows the log's tail and the intake folder, so that an answer costs the records
that were added since the last one. Redis only says how many prompts are in hand; without it the
others still add up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from synthrep_generator.intake import (
    BatchHeader,
    list_batches,
    list_paused,
    read_headers,
    set_paused,
)
from synthrep_generator.log_index import LogIndex, shard_view
from synthrep_generator.tally import Batch, Tally, Totals, batch_state
from synthrep_shared.commit_log import CommitLog, CommitRecord, GroupRef, LogReader
from synthrep_shared.messages import BatchView, DatasetView, ShardView
from synthrep_shared.shard_copies import COPY_BYTES, ShardCopies
from synthrep_shared.storage import DatasetPaths, folder_changed_ns

_MTIME_STEP_NS = 2_000_000_000  # the coarsest time stamps of a file system
_SCAN_SHARE = 20  # a scan of the intake folder may take one part in so many of the time


class DatasetIndex:
    """One data set's batches, groups and shards; safe for several threads."""

    def __init__(self, paths: DatasetPaths, *, copy_bytes: int = COPY_BYTES) -> None:
        """`copy_bytes` is the room for local copies of shards that are in an object store."""
        self.paths = paths
        self._copies = ShardCopies(paths, max_bytes=copy_bytes)
        self._lock = threading.RLock()
        self._reader = LogReader(paths.log)
        self._index = LogIndex(paths.log)
        self._tally = Tally()
        self._unreadable: set[str] = set()
        self._paused: frozenset[str] = frozenset()
        self._intake_mtime_ns = -1
        self._next_scan = self._refreshed_at = 0.0
        self._writing = threading.Lock()
        self._writer: CommitLog | None = None

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.paths.dataset

    @property
    def owner(self) -> str | None:
        """Owner of the first batch, and thereby of the data set; None without one."""
        with self._lock:
            return self._tally.first.owner if self._tally.first else None

    @property
    def last_seq(self) -> int:
        """Last sequence number that was read."""
        return self._reader.seq

    @property
    def tick(self) -> int:
        """Grows whenever a batch changes, see `changed_since`."""
        return self._tally.tick

    def refresh(self) -> None:
        """Take in what the log and the intake folder gained; raises CommitLogError.

        Callers that wait for one another share the next pass.
        """
        called_at = time.monotonic()
        with self._lock:
            if self._refreshed_at >= called_at:
                return
            started_at = time.monotonic()
            # The log first: a batch in it has its intake file already.
            self._read_on()
            if started_at >= self._next_scan:
                self.scan_intake()
            self._refreshed_at = started_at

    def _read_on(self) -> None:
        while records := self._reader.poll(self._index.read_bytes):
            end = {"end_seq": self._reader.seq, "end_offset": self._reader.offset}
            self._index.add(records, **end)
            for record in records:
                self._tally.apply(record)
        self._paused = list_paused(self.paths)

    def scan_intake(self) -> None:
        """Take in what the intake folder gained; `refresh` does so now and then."""
        with self._lock:
            started = time.monotonic()
            try:
                mtime_ns = folder_changed_ns(self.paths.intake)
            except FileNotFoundError:
                return
            if mtime_ns == self._intake_mtime_ns:
                return
            self._read_headers(list_batches(self.paths))
            # A file added within one step of the clock leaves the folder's time as it was.
            if time.time_ns() - mtime_ns > _MTIME_STEP_NS:
                self._intake_mtime_ns = mtime_ns
            now = time.monotonic()
            self._next_scan = now + _SCAN_SHARE * (now - started)

    def _read_headers(self, batches: Sequence[str]) -> None:
        known, bad = self._tally.batches, self._unreadable
        new = [batch for batch in batches if batch not in known and batch not in bad]
        for batch, header in read_headers(self.paths, new):
            if header is None:
                self._unreadable.add(batch)
            else:
                self._tally.register(header)

    def register(self, header: BatchHeader) -> None:
        """Take in a batch that was just made durable."""
        with self._lock:
            self._tally.register(header)

    def known_batch(self, batch_id: str) -> Batch | None:
        """The batch, if it is known without a look at the intake folder; takes no lock."""
        return self._tally.batches.get(batch_id)

    def batch(self, batch_id: str) -> Batch | None:
        """The batch with this id, which must be a file name's part; None if there is none."""
        with self._lock:
            if batch_id not in self._tally.batches:
                if not (self.paths.intake / f"{batch_id}.jsonl").is_file():
                    return None
                self._read_headers([batch_id])
            return self._tally.batches.get(batch_id)

    def batches(self) -> list[Batch]:
        """The accepted batches, in no order."""
        with self._lock:
            return list(self._tally.batches.values())

    def changed_since(self, tick: int) -> list[Batch]:
        """Batches that changed after `tick`."""
        with self._lock:
            return self._tally.changed_since(tick)

    def totals(self) -> Totals:
        """Sums over the data set."""
        with self._lock:
            return replace(self._tally.totals)

    def unfinished_paused(self) -> list[Batch]:
        """The unfinished batches that are paused."""
        found = filter(None, map(self._tally.batches.get, self._paused))
        return [batch for batch in found if batch.unfinished]

    def view(self, batch: Batch, *, running: int, now: datetime) -> BatchView:
        """State and progress of a batch of this data set, `running` prompts of it being in hand."""
        with self._lock:
            counts = batch.counts(running)
            images_per_s = self._tally.images_per_s(batch, now.timestamp())
            images = self._tally.outcomes.images[batch.id]
        state = batch_state(counts, paused=batch.id in self._paused)
        unfinished_images = (counts.queued + counts.running) * batch.images_per_prompt
        eta_s = 0.0 if unfinished_images == 0 else None
        if unfinished_images and images_per_s and state != "paused":
            eta_s = unfinished_images / images_per_s
        return BatchView(
            id=batch.id,
            dataset=batch.dataset,
            state=state,
            prompts=counts,
            images_committed=images,
            images_per_s=images_per_s,
            eta_s=eta_s,
            created_at=batch.created_at,
        )

    def view_at_hand(self, batch: Batch, *, running: int, now: datetime) -> BatchView | None:
        """As `refresh` and `view`, or None where that would take waiting or much reading."""
        if self._reader.is_seekable or not self._lock.acquire(blocking=False):
            return None
        try:
            if self._reader.torn_bytes > self._index.read_bytes:
                return None
            self._read_on()
            return self.view(batch, running=running, now=now)
        finally:
            self._lock.release()

    def dataset_view(self) -> DatasetView:
        """Counts of the data set."""
        with self._lock:
            totals = self._tally.totals
            return DatasetView(
                name=self.name,
                shards=totals.shards,
                groups=totals.groups,
                images=totals.images,
                bytes=totals.bytes,
                last_seq=self._reader.seq,
                rejected=self._index.rejected_groups,
            )

    def shards(self, after: int, limit: int) -> list[ShardView]:
        """Up to `limit` sealed shards with a sequence number above `after`, in order."""
        if after >= self.last_seq:
            return []
        sealed = (r for r in self._index.records(after) if r.kind == "shard")
        return [shard_view(record) for record in islice(sealed, limit)]

    def records(self, after: int, limit: int) -> list[CommitRecord]:
        """Up to `limit` records with a sequence number above `after`, in order."""
        if after >= self.last_seq:
            return []
        return list(islice(self._index.records(after), limit))

    def shard(self, name: str) -> tuple[ShardView, Path] | None:
        """The sealed shard of this name and its file; None if the log does not name it.

        Raises as `shard_file` does.
        """
        with self._lock:
            seq = self._index.shard(name)
        if seq is None:
            return None
        record = self._index.record(seq)
        return shard_view(record), self.shard_file(record)

    def shard_file(self, record: CommitRecord) -> Path:
        """A local file of the shard that a record names; raises OSError, StorageError."""
        return self._copies.path(record.name, sha256=record.sha256, num_bytes=record.bytes)

    def group(self, gid: str) -> tuple[CommitRecord, GroupRef, bool] | None:
        """The record that decided a group, its place in it, and whether it was rejected since."""
        with self._lock:
            place = self._index.group(gid)
        if place is None:
            return None
        record = self._index.record(place.seq)
        ref = next(group for group in record.groups if group.gid == gid)
        return record, ref, place.is_rejected

    def failures(self, batch_id: str, skip: int) -> Iterator[tuple[CommitRecord, list[GroupRef]]]:
        """The records of the batch's failures and its places in them, but for the first `skip`."""
        with self._lock:
            found = self._index.failures(batch_id)
        for seq, count in found:
            if skip >= count:
                skip -= count
                continue
            record = self._index.record(seq)
            yield record, [g for g in record.groups if g.batch == batch_id][skip:]
            skip = 0

    def cancel(self, batch: Batch) -> None:
        """Decide all undecided prompts of the batch; no effect where there are none."""
        with self._writing:
            self.refresh()
            if batch.unfinished:
                self._log().append("cancel", name=lambda _: batch.id)
        self.refresh()

    def reject(self, ref: GroupRef) -> None:
        """Take a committed group back; no effect on a group that was taken back before."""
        with self._writing:
            self.refresh()
            with self._lock:
                place = self._index.group(ref.gid)
            if place is not None and not place.is_rejected:
                self._log().append("reject", name=lambda _: ref.gid, groups=(ref,))
        self.refresh()

    def pause(self, batch: Batch, paused: bool) -> None:
        """Pause or resume an unfinished batch."""
        if batch.unfinished:
            set_paused(self.paths, batch.id, paused)
        with self._lock:
            self._paused = list_paused(self.paths)
            self._tally.touch(batch.id)

    def _log(self) -> CommitLog:
        """The writing side, caught up, so that the file lock is held for the last line only."""
        if self._writer is None:
            self._writer = CommitLog(self.paths.log)
        self._writer.refresh()
        return self._writer


def utc_now() -> datetime:
    """The time now."""
    return datetime.now(UTC)
