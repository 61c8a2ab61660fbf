"""One streamed upload through the real processes: all committed, in little memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.scale.upload import measure_upload

pytestmark = [pytest.mark.e2e, pytest.mark.redis]

MEGABYTES = 100.0
COMMITTED_S = 600.0
STATUS_MS = 50.0


@pytest.mark.parametrize(
    ("prompts", "workers"),
    [
        (2_700, 2),
        pytest.param(270_000, 1, marks=[pytest.mark.long, pytest.mark.timeout(900)]),
        pytest.param(270_000, 10, marks=[pytest.mark.long, pytest.mark.timeout(900)]),
    ],
)
def test_a_large_upload_is_committed_in_little_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prompts: int, workers: int
) -> None:
    figures = measure_upload(prompts, workers=workers, folder=tmp_path)
    with capsys.disabled():
        print(f"\n{figures}")  # noqa: T201
    assert figures.api_growth_mb < MEGABYTES
    assert figures.redis_peak_mb < MEGABYTES
    assert figures.committed_s < COMMITTED_S
    # With more workers than cores, or others on them, the slowest answers measure the scheduler.
    cores = os.cpu_count() or 1
    has_room = workers <= cores and figures.other_load_cores < 0.1 * cores
    assert (figures.status_p99_ms if has_room else figures.status_p50_ms) < STATUS_MS
