"""Failpoints end one process, once, and every name that is listed is a place in the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from synthrep_shared.failpoints import EXIT_STATUS, NAMES, TRAINER_NAMES, failpoint

ROOT = Path(__file__).parents[2]


def test_the_process_ends_at_the_named_place_once(tmp_path: Path) -> None:
    code = "from synthrep_shared.failpoints import failpoint as f; f('other'); f('here'); f('here')"
    environment = {
        "SYNTHREP_FAILPOINT": "here",
        "SYNTHREP_FAILPOINT_MARKER": str(tmp_path / "marker"),
    }
    found = [subprocess.run([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.returncode for process in found] == [EXIT_STATUS, 0]


def test_nothing_happens_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SYNTHREP_FAILPOINT", raising=False)
    failpoint("shard-written")


def test_the_listed_names_are_those_in_the_code() -> None:
    files = [*ROOT.glob("services/*/synthrep_*/*.py"), *ROOT.glob("shared/synthrep_shared/*.py")]
    used = {
        name for file in files for name in re.findall(r'\bfailpoint\("([^"]+)"\)', file.read_text())
    }
    assert used == NAMES | TRAINER_NAMES
