"""Fault campaigns: green as the code is, red with any one of its measures taken out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.redis]
ROOT = Path(__file__).parents[2]
LAST_LINE = re.compile(
    r"lost=(?P<lost>\d+) duplicated=(?P<duplicated>\d+) bad=(?P<bad>\d+) "
    r"innocent=(?P<innocent>\d+) "
    r"faults=(?P<faults>\d+) accepted=(?P<accepted>\d+) committed=(?P<committed>\d+) "
    r"failed=(?P<failed>\d+) poison=(?P<poison_failed>\d+)/(?P<poison>\d+) "
    r"failpoints=(?P<reached>\d+)/(?P<failpoints>\d+)"
)


def run(capsys: pytest.CaptureFixture[str], **environment: str) -> tuple[int, dict[str, int], str]:
    """Exit status, the numbers of the last line, and all output of a campaign."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.chaos"],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    last = result.stdout.splitlines()[-1]
    match = LAST_LINE.fullmatch(last)
    assert match is not None, result.stdout[-5000:]
    with capsys.disabled():
        sys.stdout.write(f"\nchaos {environment}: {last}\n")
    return result.returncode, {k: int(v) for k, v in match.groupdict().items()}, result.stdout


def check_green(capsys: pytest.CaptureFixture[str], faults: int, seed: int) -> None:
    status, counts, output = run(capsys, CHAOS_FAULTS=str(faults), CHAOS_SEED=str(seed))
    assert status == 0, output[-5000:]
    assert [counts[k] for k in ("lost", "duplicated", "bad", "innocent")] == [0, 0, 0, 0]
    assert counts["faults"] == faults
    assert counts["accepted"] == counts["committed"] + counts["failed"] >= 5 * faults
    assert counts["poison_failed"] == counts["poison"] >= 5
    assert counts["reached"] == counts["failpoints"] >= 20


@pytest.mark.timeout(600)
def test_a_small_campaign_keeps_every_promise(capsys: pytest.CaptureFixture[str]) -> None:
    check_green(capsys, faults=20, seed=1)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_large_campaign_keeps_every_promise(capsys: pytest.CaptureFixture[str]) -> None:
    check_green(capsys, faults=200, seed=2)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("mutation", "count", "kinds"),
    [
        ("forget-decided", "duplicated", "zombie-worker,flush-redis"),
        ("leave-lost-chunks", "lost", ""),
        ("write-in-place", "bad", ""),
    ],
)
def test_a_measure_taken_out_is_found_out(
    capsys: pytest.CaptureFixture[str], mutation: str, count: str, kinds: str
) -> None:
    asked = {"CHAOS_FAULTS": "25", "CHAOS_SEED": "3", "CHAOS_KINDS": kinds}
    status, counts, output = run(capsys, CHAOS_MUTATION=mutation, **asked)
    assert status == 1
    assert counts[count] > 0, output[-5000:]
