"""Where a commit log is kept: the lines of one file, or one object a record.

In a file the commit point is a flushed line, appended under a file lock; it gets its end, which
shows it to readers, when the rest is on disk. In an object store it is the conditional PUT of
`log/<seq>.json`: whoever comes second is refused, reads on and tries the next number.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from synthrep_shared.errors import CommitLogError
from synthrep_shared.failpoints import failpoint
from synthrep_shared.object_store import MAX_PAGE, ObjectPath, list_objects
from synthrep_shared.storage import Location, map_files, sync_folder

_SEQ_DIGITS = 12  # keeps the order of names that of numbers
_LEAST_RECORD_BYTES = 256
_NUMBERED = re.compile(rf"^([0-9]{{{_SEQ_DIGITS}}})\.json$")


class LogMedium(Protocol):
    """Lines by position: the last sequence number read, and the byte offset behind its line."""

    numbers_per_name: int
    """A file named for a number is committed under that one or one of the next so many, or never.
    With 1, naming and committing are one step under the lock."""
    is_seekable: bool
    """Whether a line is found by its sequence number alone."""

    def read(self, seq: int, offset: int, max_bytes: int) -> tuple[list[bytes], int]:
        """Whole lines after a position, about `max_bytes` of them, and the offset behind them."""
        ...

    def write(self, seq: int, line: bytes) -> bool:
        """Make the line number `seq` durable; False if another writer took the number."""
        ...

    @contextmanager
    def locked(self, caught_up: Callable[[], int]) -> Iterator[int]:
        """Keep other writers out, where that is possible; gives the bytes of a torn line cut off.

        `caught_up` reads the log to its end and returns the offset there.
        """
        ...

    def torn_bytes(self, offset: int) -> int:
        """Length of what follows the whole lines that end at `offset`; below 0, they are gone."""
        ...


def open_medium(location: Location) -> LogMedium:
    """The log at a place, which may be empty."""
    return LogFile(location) if isinstance(location, Path) else LogObjects(location)


class LogFile:
    """A file of lines; a torn last one (its writer died) is no line: the next writer cuts it."""

    numbers_per_name = 1
    is_seekable = False

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, seq: int, offset: int, max_bytes: int) -> tuple[list[bytes], int]:
        """See LogMedium; a line longer than `max_bytes` is read all the same."""
        # One system call, lest a torn line is read and then the end of the line in its place.
        try:
            with self._path.open("rb", buffering=0) as stream:
                data = os.pread(stream.fileno(), max_bytes, offset)
                while len(data) == max_bytes and b"\n" not in data:
                    max_bytes *= 2
                    data = os.pread(stream.fileno(), max_bytes, offset)
        except FileNotFoundError:
            return [], offset
        whole = data[: data.rfind(b"\n") + 1]
        return whole.splitlines(), offset + len(whole)

    def write(self, seq: int, line: bytes) -> bool:
        """See LogMedium; call under the lock."""
        is_new = not self._path.exists()
        # Unbuffered, so that nothing is written after the truncation of a failed append.
        with self._path.open("ab", buffering=0) as stream:
            before = stream.tell()
            try:
                _write_all(stream, line)
                failpoint("line-half-written")
                os.fsync(stream.fileno())
                _write_all(stream, b"\n")
            except OSError:
                os.truncate(self._path, before)
                raise
            # Readers take it from here on, so it stays, also where its end cannot be flushed.
            failpoint("line-written")
            os.fsync(stream.fileno())
        if is_new:
            sync_folder(self._path.parent)
        return True

    @contextmanager
    def locked(self, caught_up: Callable[[], int]) -> Iterator[int]:
        """See LogMedium; for processes and hosts of one POSIX file system."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with (self._path.parent / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            offset = caught_up()
            torn_bytes = self.torn_bytes(offset)
            if torn_bytes > 0:
                os.truncate(self._path, offset)
            yield torn_bytes

    def torn_bytes(self, offset: int) -> int:
        """See LogMedium."""
        try:
            return self._path.stat().st_size - offset
        except FileNotFoundError:
            return -offset


def _write_all(stream: io.FileIO, data: bytes) -> None:
    if stream.write(data) != len(data):
        raise OSError(errno.ENOSPC, "short write to the commit log")


class LogObjects:
    """`log/<seq>.json`, each written once; offsets are not used."""

    numbers_per_name = 16
    is_seekable = True

    def __init__(self, folder: ObjectPath) -> None:
        self._folder = folder

    def read(self, seq: int, offset: int, max_bytes: int) -> tuple[list[bytes], int]:
        """See LogMedium; raises CommitLogError if a number is missing before a later one."""
        found, next_listed = self._list(seq, max_bytes)
        if not found and next_listed:  # a list may show a new record without the one before it
            found, next_listed = self._list(seq, max_bytes)
        if not found and next_listed:
            raise CommitLogError(f"{self._folder}: expected seq {seq + 1}, got {next_listed}")
        if len(found) == 1:
            return [found[0].read_bytes()], offset
        return list(map_files(ObjectPath.read_bytes, found, folder=self._folder)), offset

    def _list(self, seq: int, max_bytes: int) -> tuple[list[ObjectPath], int]:
        """The records after `seq` up to a missing one, and the number behind that, or 0."""
        found: list[ObjectPath] = []
        num_bytes = 0
        page_size = max(2, min(max_bytes // _LEAST_RECORD_BYTES, MAX_PAGE))
        for entry in list_objects(self._folder, after=_name(seq), page_size=page_size):
            match = _NUMBERED.match(entry.path.name)
            if match is None:
                continue
            if int(match[1]) != seq + len(found) + 1:
                return found, int(match[1])
            if num_bytes >= max_bytes:
                break
            num_bytes += entry.num_bytes
            found.append(entry.path)
        return found, 0

    def write(self, seq: int, line: bytes) -> bool:
        """See LogMedium."""
        is_ours = (self._folder / _name(seq)).create(line)
        failpoint("line-written")
        return is_ours

    @contextmanager
    def locked(self, caught_up: Callable[[], int]) -> Iterator[int]:
        """Nobody is kept out, and there are no torn lines."""
        yield 0

    def torn_bytes(self, offset: int) -> int:
        """See LogMedium."""
        return 0


def _name(seq: int) -> str:
    return f"{seq:0{_SEQ_DIGITS}d}.json"
