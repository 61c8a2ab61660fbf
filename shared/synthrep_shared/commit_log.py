"""The commit log of a dataset: a shard exists once a line here names it.

One JSON object per line, numbered from 1 without holes. A line is appended under a file lock and
flushed to disk: that is the commit point. A torn last line (a writer died in it) is no line; the
next writer cuts it off. Readers take whole lines only and never lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from synthrep_shared.errors import AlreadyDecidedError, CommitLogError
from synthrep_shared.failpoints import failpoint
from synthrep_shared.storage import sync_folder

VERSION = 1
Kind = Literal["shard", "failure", "reject", "cancel"]


class GroupRef(BaseModel):
    """One prompt's place: its group, caption and position in its batch; a failure has 0 images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gid: str
    caption_id: str
    batch: str
    index: int
    images: int


class CommitRecord(BaseModel):
    """One line of the log.

    `name` is the file that the record commits, relative to its folder (`shards/`, `failures/`);
    for a cancellation it is the batch, all of whose undecided prompts it decides; a rejection
    takes back the groups it lists.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = VERSION
    seq: int
    kind: Kind
    name: str
    sha256: str = ""
    bytes: int = 0
    groups: tuple[GroupRef, ...] = ()
    created_at: datetime


class LogReader:
    """Reads a log from a position onwards; each `poll` gives the whole lines added since the last.

    A position is the `seq` and `offset` that a reader of the same log had after a poll.
    """

    def __init__(self, path: Path, *, seq: int = 0, offset: int = 0) -> None:
        self._path = path
        self._offset = offset
        self.seq = seq

    @property
    def offset(self) -> int:
        """Byte offset of the first line that was not read yet."""
        return self._offset

    def poll(self, max_bytes: int = 16 << 20) -> list[CommitRecord]:
        """New records, oldest first, or none; raises CommitLogError on a bad line."""
        data = self._read(max_bytes)
        whole = data[: data.rfind(b"\n") + 1]
        records = [
            self._parse(line, seq) for seq, line in enumerate(whole.splitlines(), self.seq + 1)
        ]
        self.seq += len(records)
        self._offset += len(whole)
        return records

    def _read(self, max_bytes: int) -> bytes:
        # One system call, lest a torn line is read and then the end of the line in its place.
        try:
            with self._path.open("rb", buffering=0) as stream:
                data = os.pread(stream.fileno(), max_bytes, self._offset)
                while len(data) == max_bytes and b"\n" not in data:
                    max_bytes *= 2
                    data = os.pread(stream.fileno(), max_bytes, self._offset)
        except FileNotFoundError:
            return b""
        return data

    def _parse(self, line: bytes, seq: int) -> CommitRecord:
        try:
            record = CommitRecord.model_validate_json(line)
        except ValidationError as error:
            raise CommitLogError(f"{self._path}: malformed line after seq {seq - 1}") from error
        if record.version != VERSION:
            raise CommitLogError(f"{self._path}: version {record.version} is not {VERSION}")
        if record.seq != seq:
            raise CommitLogError(f"{self._path}: expected seq {seq}, got {record.seq}")
        return record


def read_log(path: Path, after: int = 0) -> Iterator[CommitRecord]:
    """The records present now with seq > `after`, oldest first."""
    reader = LogReader(path)
    while records := reader.poll():
        yield from (r for r in records if r.seq > after)


class Outcomes:
    """What the log says of every prompt, by batch and index. Constant work per group."""

    UNDECIDED, COMMITTED, FAILED = range(3)

    def __init__(self) -> None:
        self._codes: dict[str, bytearray] = {}
        self._counts: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self.images: Counter[str] = Counter()
        self.cancelled: set[str] = set()

    def apply(self, record: CommitRecord) -> None:
        """Take the next record into account."""
        if record.kind == "cancel":
            self.cancelled.add(record.name)
        elif record.kind in ("shard", "failure"):
            code = self.COMMITTED if record.kind == "shard" else self.FAILED
            for group in record.groups:
                codes = self._codes.setdefault(group.batch, bytearray())
                if len(codes) <= group.index:
                    codes.extend(bytes(group.index + 1 - len(codes)))
                codes[group.index] = code
                self._counts[group.batch][code] += 1
                self.images[group.batch] += group.images

    def code(self, batch: str, index: int) -> int:
        """UNDECIDED, COMMITTED or FAILED; a cancellation leaves prompts UNDECIDED here."""
        codes = self._codes.get(batch, b"")
        return codes[index] if index < len(codes) else self.UNDECIDED

    def is_decided(self, batch: str, index: int) -> bool:
        """Whether the prompt is committed, failed or cancelled."""
        return batch in self.cancelled or self.code(batch, index) != self.UNDECIDED

    def committed(self, batch: str) -> int:
        """Number of the batch's prompts with a committed group."""
        return self._counts.get(batch, Counter())[self.COMMITTED]

    def failed(self, batch: str) -> int:
        """Number of the batch's prompts with a recorded failure."""
        return self._counts.get(batch, Counter())[self.FAILED]


class CommitLog:
    """The writing side; safe for several threads, processes and hosts of one POSIX file system."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader = LogReader(path)
        self._thread_lock = threading.RLock()
        self.outcomes = Outcomes()

    def refresh(self) -> int:
        """Read what others appended; returns the last sequence number."""
        with self._thread_lock:
            while records := self._reader.poll():
                for record in records:
                    self.outcomes.apply(record)
            return self._reader.seq

    def append(
        self,
        kind: Kind,
        *,
        name: Callable[[int], str],
        sha256: str = "",
        num_bytes: int = 0,
        groups: tuple[GroupRef, ...] = (),
    ) -> CommitRecord:
        """Decide `groups` by one line. `name` gets the sequence number and publishes the file.

        Raises AlreadyDecidedError, before `name` is called, if a group of a shard or failure has
        an outcome already.
        """
        with self.exclusive():
            seq = self.refresh() + 1
            if kind in ("shard", "failure"):
                decided = [g.gid for g in groups if self.outcomes.is_decided(g.batch, g.index)]
                if decided:
                    raise AlreadyDecidedError(decided)
            record = CommitRecord(
                seq=seq, kind=kind, name=name(seq), sha256=sha256, bytes=num_bytes,
                groups=groups, created_at=datetime.now(UTC),
            )  # fmt: skip
            self._write_line(record.model_dump_json().encode() + b"\n")
            self.refresh()
            return record

    @contextmanager
    def exclusive(self) -> Iterator[int]:
        """Keep all writers out; cuts a torn last line off and gives the bytes that it had."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._thread_lock, (self._path.parent / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield self._cut_torn_line()

    def _cut_torn_line(self) -> int:
        if not self._path.exists():
            return 0
        self.refresh()
        torn_bytes = self._path.stat().st_size - self._reader.offset
        if torn_bytes > 0:
            os.truncate(self._path, self._reader.offset)
        return torn_bytes

    def _write_line(self, line: bytes) -> None:
        is_new = not self._path.exists()
        # Unbuffered, so that nothing is written after the truncation of a failed append.
        with self._path.open("ab", buffering=0) as stream:
            before = stream.tell()
            try:
                if stream.write(line) != len(line):
                    raise OSError(errno.ENOSPC, "short write to the commit log")
                failpoint("line-written")
                os.fsync(stream.fileno())
            except OSError:
                os.truncate(self._path, before)
                raise
        if is_new:
            sync_folder(self._path.parent)
