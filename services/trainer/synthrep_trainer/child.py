"""A child process: in a session of its own, stopped with patience, quoted when it dies."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

DISK_FULL = os.EX_CANTCREAT
"""Exit status of a process that found no room: to be started again until there is some."""
_PR_SET_PDEATHSIG = 1
_TAIL_BYTES = 2000
_TAIL_LINES = 12


class Child:
    """A running process whose output goes to a file; it gets SIGTERM if its parent dies."""

    def __init__(self, command: Sequence[str], log_file: Path) -> None:
        with log_file.open("ab") as log:
            self._log_begin = log.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self._log_file = log_file
        self._kill_at: float | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._kill_at is not None

    def poll(self) -> int | None:
        """Its exit status, negative for a signal, None while it runs; kills it past its grace."""
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            self.kill()
        return self._process.poll()

    def stop(self, *, grace_s: float) -> None:
        """Ask it to end, and let `poll` kill it if it has not after `grace_s`."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + grace_s
            self._process.terminate()

    def kill(self) -> None:
        """End its whole session at once, and wait for that."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def last_words(self) -> str:
        """How it ended and the end of its output."""
        status = self._process.returncode
        how = f"exit status {status}"
        if status < 0:
            with contextlib.suppress(ValueError):
                how = f"killed by {signal.Signals(-status).name}"
        with self._log_file.open("rb") as log:
            size = os.fstat(log.fileno()).st_size
            log.seek(max(self._log_begin, size - _TAIL_BYTES))
            tail = log.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
        return "; last words:\n".join(filter(None, [how, "\n".join(tail)]))


def exit_status_after(error: Exception) -> int:
    """The exit status of a process that such an error ends."""
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return DISK_FULL if is_full else 1


def die_with_parent() -> None:
    """Have this process get SIGTERM when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
