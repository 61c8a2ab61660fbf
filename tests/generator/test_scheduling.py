"""Work does not interrupt answers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from synthrep_generator.scheduling import work_in_stretches

SHOW = "import os; print(os.sched_getscheduler(0))"


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has this")
def test_a_worker_and_what_it_starts_interrupt_nobody() -> None:
    lines = (
        "import subprocess, sys",
        "from synthrep_generator.scheduling import work_in_stretches",
        "work_in_stretches()",
        f"subprocess.run([sys.executable, '-c', {SHOW!r}], check=True)",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(os.SCHED_BATCH)]


def test_a_system_that_forbids_it_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("os.sched_setscheduler", refuse, raising=False)
    work_in_stretches()
