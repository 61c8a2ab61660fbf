"""Which window of a run saw how much of the commit log: the one thing that order cannot compute.

How far the log had grown when a window opened depends on the clock. It is written down, flushed to
disk, before the first row of the window is used, and read back by every later attempt and by every
other rank, which thereby need no talk among themselves. One JSON object a line, in order of
windows; a torn last line (its writer died) is no line and is cut off by the next writer.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from synthrep_shared.storage import sync_folder
from synthrep_trainer.errors import RunError


class Admission(BaseModel):
    """Window `window` opened at step `step` and draws from the log up to position `seq`.

    `log` identifies the lines up to there, so that another log is not mistaken for this one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    window: int
    seq: int
    step: int
    log: str


class AdmissionJournal:
    """Appended by the one writer of a run (rank 0), followed by its other ranks."""

    def __init__(self, path: Path, *, is_writer: bool) -> None:
        """Raises RunError if the file is malformed before its last line."""
        self._path = path
        self._offset = 0
        self._admissions: list[Admission] = []
        self._read()
        if is_writer and path.exists() and path.stat().st_size > self._offset:
            os.truncate(path, self._offset)

    @property
    def last_seq(self) -> int:
        """Log position of the newest window that was read or written here, 0 without one."""
        return self._admissions[-1].seq if self._admissions else 0

    def get(self, window: int) -> Admission | None:
        """The admission of a window, None as long as it was not written."""
        if window >= len(self._admissions):
            self._read()
        return self._admissions[window] if window < len(self._admissions) else None

    def append(self, admission: Admission) -> None:
        """Write the next window's admission; it is on disk when this returns."""
        assert admission.window == len(self._admissions)
        is_new = not self._path.exists()
        line = admission.model_dump_json().encode() + b"\n"
        with self._path.open("ab", buffering=0) as stream:
            if stream.write(line) != len(line):
                os.truncate(self._path, self._offset)
                raise OSError(errno.ENOSPC, f"short write to {self._path}")
            os.fsync(stream.fileno())
        if is_new:
            sync_folder(self._path.parent)
        self._admissions.append(admission)
        self._offset += len(line)

    def _read(self) -> None:
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                admission = Admission.model_validate_json(line)
            except ValidationError as error:
                raise RunError(f"{self._path}: malformed line") from error
            if admission.window != len(self._admissions):
                raise RunError(f"{self._path}: expected window {len(self._admissions)}")
            self._admissions.append(admission)
        self._offset += len(whole)
