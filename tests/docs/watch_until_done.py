"""`synthrep watch` on a terminal, left with Ctrl-C once no batch and no run is under way."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

from synthrep_shared.client import SynthRep

_UNDER_WAY = ("queued", "running")
_POLL_S = 0.2
_PROGRESS = b" captions"  # of a batch; at 80 columns a table leaves others out
_INTERRUPTED = 130


def read(terminal: int) -> bytes:
    """What is there now, after a short wait for it; nothing where the other end is closed."""
    if not select.select([terminal], [], [], _POLL_S)[0]:
        return b""
    try:
        return os.read(terminal, 65536)
    except OSError:  # how a terminal ends on Linux
        return b""


def main() -> int:
    """Status 0 if the command showed a batch and ended as an interrupted one does."""
    terminal, other_end = pty.openpty()
    command = [str(Path(sys.executable).parent / "synthrep"), "watch"]
    shown = b""
    with SynthRep() as client, subprocess.Popen(command, stdout=other_end) as watch:
        os.close(other_end)
        while watch.poll() is None and (_PROGRESS not in shown or is_under_way(client)):
            shown += read(terminal)
        watch.send_signal(signal.SIGINT)
        while watch.poll() is None:
            shown += read(terminal)
    os.close(terminal)
    return 0 if watch.returncode == _INTERRUPTED and _PROGRESS in shown else 1


def is_under_way(client: SynthRep) -> bool:
    """Whether a batch or a run is not at its end."""
    return any(view.state in _UNDER_WAY for view in (*client.batches(), *client.runs()))


if __name__ == "__main__":
    sys.exit(main())
