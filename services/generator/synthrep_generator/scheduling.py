"""How the operating system is to deal out the processor between work and answers."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

_NICE = 5  # a third of the share of others, where there is not enough for all
_AUTOGROUP = Path("/proc/self/autogroup")
_TRIES = 20
_BETWEEN_TRIES_S = 0.1


def give_way() -> None:
    """Have this process, and those it starts, give way to services that answer.

    They interrupt none that wakes up, and get the smaller share while there is too little for all.
    A session that this process leads counts as a whole, where Linux deals out by sessions; one
    that a child makes for itself asks again. What the system lacks or forbids is left as it is.
    """
    with suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, max(_NICE, os.getpriority(os.PRIO_PROCESS, 0)))
    if os.getsid(0) == os.getpid():
        _lower_session()


def _lower_session() -> None:
    """Between sessions the priority of a process counts nothing, that of its session does."""
    for _ in range(_TRIES):
        try:
            _AUTOGROUP.write_text(str(_NICE))
        except BlockingIOError:  # one such change every tenth of a second, for all of the machine
            time.sleep(_BETWEEN_TRIES_S)
        except OSError:
            return
        else:
            return
