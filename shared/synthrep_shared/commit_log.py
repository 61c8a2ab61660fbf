"""The commit log of a dataset: a shard exists once a line here names it.

One JSON object per line, numbered from 1 without holes; `log_media` says where the lines are and
what the commit point is. Readers take whole lines only and never lock.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from synthrep_shared.errors import AlreadyDecidedError, CommitLogError
from synthrep_shared.log_media import open_medium
from synthrep_shared.storage import Location

VERSION = 1
_READ_BYTES = 256 << 10  # at a time; of many megabytes of records the garbage collector makes work
_STORE_READ_BYTES = 16 << 20
_LOOK_S = 0.002  # between two looks at the size of a file, a few microseconds each
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

    def __init__(self, path: Location, *, seq: int = 0, offset: int = 0) -> None:
        self.path = path
        self._medium = open_medium(path)
        self._offset = offset
        self._left_bytes = 0  # of a line without an end that the last poll left there
        self.seq = seq

    @property
    def offset(self) -> int:
        """Byte offset of the first line that was not read yet, where the log is one file."""
        return self._offset

    @property
    def torn_bytes(self) -> int:
        """After a poll that gave nothing: length of a last line whose writer did not end it."""
        return self._medium.torn_bytes(self._offset)

    def poll(self, max_bytes: int = 16 << 20) -> list[CommitRecord]:
        """New records, oldest first, or none; raises CommitLogError on a bad line, OSError."""
        lines, offset = self._medium.read(self.seq, self._offset, max_bytes)
        records = [self._parse(line, seq) for seq, line in enumerate(lines, self.seq + 1)]
        self.seq += len(records)
        self._offset = offset
        self._left_bytes = 0 if records else self.torn_bytes
        return records

    def wait(self, timeout_s: float) -> None:
        """Block for `timeout_s`, or less where the log is a file and something was added to it."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            time.sleep(min(left_s, _LOOK_S))
            if self.torn_bytes > max(self._left_bytes, 0):
                return

    @property
    def is_seekable(self) -> bool:
        """Whether a record is found by its number alone."""
        return self._medium.is_seekable

    def seek(self, seq: int) -> bool:
        """Go on after `seq`; False, without effect, where that takes an offset."""
        if self.is_seekable:
            self.seq = seq
        return self.is_seekable

    def can_be_committed(self, number: int) -> bool:
        """Whether a file named for this number, and by no record yet, may still be committed."""
        return number > self.seq + 1 - self._medium.numbers_per_name

    @property
    def is_named_under_lock(self) -> bool:
        """Whether writers name a file and commit it in one step that keeps all others out."""
        return self._medium.numbers_per_name == 1

    def _parse(self, line: bytes, seq: int) -> CommitRecord:
        try:
            record = CommitRecord.model_validate_json(line)
        except ValidationError as error:
            raise CommitLogError(f"{self.path}: malformed line after seq {seq - 1}") from error
        if record.version != VERSION:
            raise CommitLogError(f"{self.path}: version {record.version} is not {VERSION}")
        if record.seq != seq:
            raise CommitLogError(f"{self.path}: expected seq {seq}, got {record.seq}")
        return record


def read_log(path: Location, after: int = 0) -> Iterator[CommitRecord]:
    """The records present now with seq > `after`, oldest first."""
    reader = LogReader(path)
    reader.seek(after)
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
    """The writing side; safe for several threads, processes and hosts that see the same log."""

    def __init__(self, path: Location) -> None:
        self._path, self._medium = path, open_medium(path)
        self._thread_lock = threading.RLock()
        self._start_over()
        self._read_bytes = _STORE_READ_BYTES if self._reader.is_seekable else _READ_BYTES

    def _start_over(self) -> None:
        self._reader, self.outcomes = LogReader(self._path), Outcomes()

    def refresh(self) -> int:
        """Read what others appended; returns the last sequence number.

        Raises CommitLogError on a bad line, and where a file was cut or put back from a copy: a
        line behind what was read of it would make a hole. The next call reads it from its start.
        """
        with self._thread_lock:
            try:
                while records := self._reader.poll(self._read_bytes):
                    for record in records:
                        self.outcomes.apply(record)
                if self._reader.torn_bytes < 0:
                    raise CommitLogError(f"{self._path}: shorter than what was read of it")
            except CommitLogError:
                if not self._reader.is_seekable:
                    self._start_over()
                raise
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

        Raises AlreadyDecidedError if a group of a shard or failure has an outcome already: before
        `name` is called, unless another writer took the number meanwhile. The published file keeps
        its name for the next numbers then, see `LogMedium.numbers_per_name`.
        """
        if self._reader.is_named_under_lock:
            self.refresh()  # all writers would wait while what others appended is read under it
        with self.exclusive():
            named, named_for = "", 0
            while True:
                seq = self.refresh() + 1
                if kind in ("shard", "failure"):
                    decided = [g.gid for g in groups if self.outcomes.is_decided(g.batch, g.index)]
                    if decided:
                        raise AlreadyDecidedError(decided)
                if not named or seq >= named_for + self._medium.numbers_per_name:
                    named, named_for = name(seq), seq
                record = CommitRecord(
                    seq=seq, kind=kind, name=named, sha256=sha256, bytes=num_bytes,
                    groups=groups, created_at=datetime.now(UTC),
                )  # fmt: skip
                if self._medium.write(seq, record.model_dump_json().encode()):
                    break
            if self._reader.seek(seq):
                self.outcomes.apply(record)
            else:
                self.refresh()
            return record

    @contextmanager
    def exclusive(self) -> Iterator[int]:
        """Keep all writers out of a log that is a file; gives the bytes of a torn line cut off."""
        with self._thread_lock, self._medium.locked(self._catch_up) as torn_bytes:
            yield torn_bytes

    def _catch_up(self) -> int:
        self.refresh()
        return self._reader.offset
