"""Where things are in a commit log: the position of a group, of a shard, of a batch's failures.

One commit log may name a million groups, so they are kept as 16 bytes and a number each in a
table of SQLite that lives in memory, and records are read again from the file when asked for.
Not safe for several threads while `add` runs; its owner holds a lock.
"""

from __future__ import annotations

import sqlite3
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from synthrep_shared.commit_log import CommitRecord, LogReader
from synthrep_shared.errors import CommitLogError
from synthrep_shared.messages import ShardView
from synthrep_shared.storage import Location

READ_BYTES = 64 << 10
_STORE_READ_BYTES = 4 << 20
_TABLES = """
    CREATE TABLE groups (gid BLOB PRIMARY KEY, seq INTEGER, rejected INTEGER) WITHOUT ROWID;
    CREATE TABLE shards (name TEXT PRIMARY KEY, seq INTEGER) WITHOUT ROWID;
"""
_GID_BYTES = 16
# All groups of a record in one step: each step gives the interpreter to another thread and waits
# for it again, and a thousand of them are seconds beside a busy one.
_PLACE = f"""
    WITH RECURSIVE place(start) AS (
        SELECT 1 UNION ALL SELECT start + {_GID_BYTES} FROM place
        WHERE start + {_GID_BYTES} <= length(:gids)
    )
    INSERT OR IGNORE INTO groups SELECT substr(:gids, start, {_GID_BYTES}), :seq, 0 FROM place
"""
_REJECT = "UPDATE groups SET rejected = 1 WHERE gid = ? AND rejected = 0"


@dataclass(frozen=True)
class GroupPlace:
    """The record that decided a group, and whether a later one took it back."""

    seq: int
    is_rejected: bool


class LogIndex:
    """Grows with the log; answers where a record is and reads it there."""

    def __init__(self, path: Location) -> None:
        self._path = path
        self.read_bytes = READ_BYTES if not LogReader(path).is_seekable else _STORE_READ_BYTES
        """How much of the log to take in at a time."""
        self._table = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        weakref.finalize(self, self._table.close)
        self._table.executescript(_TABLES)
        self._mark_seqs = array("Q", [0])
        self._mark_offsets = array("Q", [0])
        self._failures: dict[str, list[tuple[int, int]]] = {}
        self.rejected_groups = 0

    def add(self, records: Iterable[CommitRecord], *, end_seq: int, end_offset: int) -> None:
        """Take the next records into account; the log goes on at `end_offset` after `end_seq`."""
        with self._table:
            self._table.execute("BEGIN")
            for record in records:
                self._add(record)
        self._mark_seqs.append(end_seq)
        self._mark_offsets.append(end_offset)

    def _add(self, record: CommitRecord) -> None:
        if record.kind in ("shard", "failure") and record.groups:
            gids = bytes.fromhex("".join([group.gid for group in record.groups]))
            self._table.execute(_PLACE, {"gids": gids, "seq": record.seq})
        if record.kind == "shard":
            shard = (record.name, record.seq)
            self._table.execute("INSERT OR IGNORE INTO shards VALUES (?, ?)", shard)
        elif record.kind == "failure":
            self._add_failure(record)
        elif record.kind == "reject":
            taken_back = ((bytes.fromhex(g.gid),) for g in record.groups)
            self.rejected_groups += self._table.executemany(_REJECT, taken_back).rowcount

    def _add_failure(self, record: CommitRecord) -> None:
        for batch in {group.batch for group in record.groups}:
            count = sum(group.batch == batch for group in record.groups)
            self._failures.setdefault(batch, []).append((record.seq, count))

    def group(self, gid: str) -> GroupPlace | None:
        """Where the group was decided; None if the log does not name it."""
        query = "SELECT seq, rejected FROM groups WHERE gid = ?"
        row = self._table.execute(query, (bytes.fromhex(gid),)).fetchone()
        return None if row is None else GroupPlace(row[0], bool(row[1]))

    def shard(self, name: str) -> int | None:
        """Sequence number of the record that commits the shard; None if no record does."""
        row = self._table.execute("SELECT seq FROM shards WHERE name = ?", (name,)).fetchone()
        return None if row is None else int(row[0])

    def failures(self, batch: str) -> list[tuple[int, int]]:
        """(sequence number, prompts of this batch) of the failure records that name the batch."""
        return list(self._failures.get(batch, ()))

    def records(self, after: int) -> Iterator[CommitRecord]:
        """The records with a sequence number above `after`, oldest first, up to the log's end."""
        reader = self._reader(after)
        while records := reader.poll(READ_BYTES):
            yield from (record for record in records if record.seq > after)

    def record(self, seq: int) -> CommitRecord:
        """The record with this sequence number, which must be in the log."""
        reader = self._reader(seq - 1)
        is_next = reader.seq == seq - 1
        while records := reader.poll(1 if is_next else READ_BYTES):
            if records[-1].seq >= seq:
                return next(record for record in records if record.seq == seq)
        raise CommitLogError(f"{self._path}: record {seq} is gone")

    def _reader(self, after: int) -> LogReader:
        """A reader at or not far before the record that follows `after`."""
        mark = bisect_right(self._mark_seqs, after) - 1
        reader = LogReader(self._path, seq=self._mark_seqs[mark], offset=self._mark_offsets[mark])
        reader.seek(after)
        return reader


def shard_view(record: CommitRecord) -> ShardView:
    """The answer about a sealed shard."""
    return ShardView(
        seq=record.seq,
        name=record.name,
        sha256=record.sha256,
        bytes=record.bytes,
        groups=len(record.groups),
        images=sum(group.images for group in record.groups),
        created_at=record.created_at,
    )
