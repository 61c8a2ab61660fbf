"""Work does not interrupt answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from synthrep_generator import scheduling

AUTOGROUP = Path("/proc/self/autogroup")
LOWERED = str(max(5, os.getpriority(os.PRIO_PROCESS, 0)))
SHOW = (
    "import os; from pathlib import Path; group = Path('/proc/self/autogroup'); "
    "print(os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), "
    "group.read_text().split()[-1] if group.exists() else 5)"
)


def run(*lines: str, **options: Any) -> list[str]:
    """Words that a process prints which runs these lines."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(("import subprocess, sys", *lines))],
        check=True, capture_output=True, text=True, **options,
    )  # fmt: skip
    return done.stdout.split()


GIVE_WAY = (
    "from synthrep_generator.scheduling import give_way",
    "give_way()",
)


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has this")
def test_a_worker_and_what_it_starts_give_way() -> None:
    lines = (*GIVE_WAY, f"subprocess.run([sys.executable, '-c', {SHOW!r}], check=True)")
    assert run(*lines, start_new_session=True) == [str(os.SCHED_BATCH), LOWERED, "5"]


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="sessions are not told apart here")
def test_the_session_of_somebody_else_is_left_alone() -> None:
    start = f"subprocess.run([sys.executable, '-c', {'; '.join((*GIVE_WAY, SHOW))!r}], check=True)"
    assert run(start, start_new_session=True) == [str(os.SCHED_BATCH), LOWERED, "0"]


def test_a_lower_priority_is_kept() -> None:
    lines = ("import os", "os.nice(9)", *GIVE_WAY, "print(os.getpriority(os.PRIO_PROCESS, 0))")
    assert int(run(*lines)[0]) >= 9


def test_a_system_that_is_busy_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter((BlockingIOError, BlockingIOError, None))
    asked: list[str] = []

    class Group:
        def write_text(self, text: str) -> None:
            asked.append(text)
            if (error := next(answers)) is not None:
                raise error

    monkeypatch.setattr(scheduling, "_AUTOGROUP", Group())
    monkeypatch.setattr(scheduling, "_BETWEEN_TRIES_S", 0.0)
    scheduling._lower_session()
    assert asked == ["5", "5", "5"]


def test_a_system_that_forbids_it_is_taken_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("os.sched_setscheduler", refuse, raising=False)
    monkeypatch.setattr("os.setpriority", refuse)
    monkeypatch.setattr("os.getsid", lambda _: os.getpid())
    monkeypatch.setattr(scheduling, "_AUTOGROUP", tmp_path / "absent" / "autogroup")
    scheduling.give_way()
