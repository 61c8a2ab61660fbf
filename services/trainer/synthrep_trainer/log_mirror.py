"""A generator's commit log as a local file, kept up to date over its HTTP API.

    GET /v1/datasets/{d}/records  ->  source.jsonl in the run's folder  ->  LogReader

Everything that follows a log then follows this one: it grows by whole lines, it is the same for all
ranks that see the run's folder, and what a killed process had read is there when the run goes on.
Events only wake the mirror early; it asks again on its own as well.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Self

import httpx
from pydantic import ValidationError

from synthrep_shared.client import SynthRep
from synthrep_shared.commit_log import CommitRecord, LogReader
from synthrep_shared.errors import CommitLogError, ServiceError, ServiceUnavailableError
from synthrep_trainer.errors import LogChangedError, RunError

_log = logging.getLogger(__name__)
_RECORDS_AT_ONCE = 100
_REFUSED = (401, 403)


class LogMirror:
    """Follows one data set in a thread of its own; use as a context manager.

    Only one process writes a file: rank 0 of a run.
    """

    def __init__(
        self,
        client: SynthRep,
        dataset: str,
        path: Path,
        *,
        poll_s: float,
        events: Callable[[], Iterable[str]],
    ) -> None:
        """`poll_s` is the pause between two looks unless one of `events`, by name, is a shard.

        Raises CommitLogError if what is in the file is malformed.
        """
        self._client, self._dataset, self._path, self._poll_s = client, dataset, path, poll_s
        self._events = events
        self._seq, self._last = self._read_file()
        self._error: Exception | None = None
        self._is_absent = False
        self._stop, self._wake = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for run, name in ((self._follow, "log-mirror"), (self._listen, "log-events"))
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._wake.set()
        self._threads[0].join()

    def reader(self) -> LogReader:
        """Reads the file, and raises from `poll` what ended the mirror."""
        return _MirrorReader(self, self._path)

    def check(self) -> None:
        """Raise what ended the mirror: LogChangedError, CommitLogError or RunError."""
        if self._error is not None:
            raise self._error

    def pull(self) -> int:
        """Append what the generator has and the file has not; how many records that were.

        Raises as `check`, and ServiceError.
        """
        count = 0
        records = self._records(max(self._seq - 1, 0))
        if self._last is not None and next(records, None) != self._last:
            raise LogChangedError(
                f"the generator has another log of {self._dataset} than this run was drawn from"
            )
        while page := list(islice(records, _RECORDS_AT_ONCE)):
            self._append(page)
            count += len(page)
        return count

    def _records(self, after: int) -> Iterator[CommitRecord]:
        for seq, item in enumerate(self._client.records(self._dataset, after=after), after + 1):
            try:
                record = CommitRecord.model_validate(item)
            except ValidationError as error:
                raise CommitLogError(f"the generator sent a malformed record {seq}") from error
            if record.seq != seq:
                raise CommitLogError(f"the generator sent record {record.seq} for {seq}")
            yield record

    def _append(self, records: list[CommitRecord]) -> None:
        data = b"".join(record.model_dump_json().encode() + b"\n" for record in records)
        with self._path.open("ab", buffering=0) as stream:
            before = stream.tell()
            try:
                while data:
                    data = data[stream.write(data) :]
                os.fsync(stream.fileno())
            except OSError:
                os.truncate(self._path, before)
                raise
        self._seq, self._last = records[-1].seq, records[-1]

    def _read_file(self) -> tuple[int, CommitRecord | None]:
        reader, last = LogReader(self._path), None
        while records := reader.poll():
            last = records[-1]
        if reader.torn_bytes > 0:
            os.truncate(self._path, reader.offset)
        return reader.seq, last

    def _follow(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            try:
                self.pull()
                self._is_absent = False
            except ServiceUnavailableError as error:
                _log.warning("source_unavailable", extra={"reason": str(error)})
            except ServiceError as error:
                if error.status in _REFUSED:
                    self._error = RunError(f"the generator refuses this trainer: {error}")
                    return
                if not self._is_absent:  # it is made by its first batch
                    _log.warning("source_not_readable", extra={"reason": str(error)})
                self._is_absent = True
            except (LogChangedError, CommitLogError) as error:
                self._error = error
                return
            except Exception as error:  # no disk space, say, or the page of a proxy for an answer
                if not self._stop.is_set():
                    reason = f"{type(error).__name__}: {error}"
                    _log.warning("source_not_mirrored", extra={"reason": reason})
            self._wake.wait(self._poll_s)

    def _listen(self) -> None:
        """Wake the mirror at each event of a shard; whatever fails is tried again later."""
        while not self._stop.is_set():
            with contextlib.suppress(httpx.HTTPError, OSError):
                for name in self._events():
                    if self._stop.is_set():
                        return
                    if name == "shard":
                        self._wake.set()
            self._stop.wait(self._poll_s)


class _MirrorReader(LogReader):
    def __init__(self, mirror: LogMirror, path: Path) -> None:
        super().__init__(path)
        self._mirror = mirror

    def poll(self, max_bytes: int = 16 << 20) -> list[CommitRecord]:
        records = super().poll(max_bytes)
        if not records:
            self._mirror.check()
        return records
