"""Signals between a stack and its child processes: no child is lost, none outlives its parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1


def prepare_child() -> None:
    """Between fork and exec: the child dies with its parent, and can be told to stop again."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)


def signal_group(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal the child's whole session; after SIGKILL nothing that it started is left."""
    with contextlib.suppress(ProcessLookupError):
        if number == signal.SIGKILL:
            os.killpg(child.pid, number)
        elif child.poll() is None:
            child.send_signal(number)


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Amid a fork a Ctrl-C would be lost, or the child with it; afterwards it still comes."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


@contextlib.contextmanager
def interrupts_ignored() -> Iterator[None]:
    """A second Ctrl-C must not leave children behind; stopping is bounded in time anyway."""
    former = [signal.signal(number, signal.SIG_IGN) for number in INTERRUPTS]
    try:
        yield
    finally:
        for number, handler in zip(INTERRUPTS, former, strict=True):
            signal.signal(number, handler)
