"""How the operating system is to deal out the processor between work and answers."""

from __future__ import annotations

import os
from contextlib import suppress


def work_in_stretches() -> None:
    """Have this process, and those it starts, interrupt no other when it wakes up.

    Its share of the processor stays the same; services beside it answer sooner. Only Linux has
    this, and where it is forbidden nothing changes.
    """
    with suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
