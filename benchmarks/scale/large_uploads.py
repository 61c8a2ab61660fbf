"""270,000 captions in one request, one worker and ten, against the limits set for them."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from benchmarks.harness import Dose, Measured, case
from benchmarks.scale.upload import UploadFigures, measure_upload

_PROMPTS = 270_000
_COMMITTED_S = 600.0
_MEGABYTES = 100.0
_STATUS_MS = 50.0
_LIMIT = "the limit itself"


@case(
    "270,000 captions, 1 worker, to the last commit",
    unit="s",
    peer=_LIMIT,
    higher_is_better=False,
    max_value=_COMMITTED_S,
)
def one_worker(dose: Dose) -> Measured:
    """One of the two cores goes to the device process."""
    return _against(_run(dose, 1).committed_s, _COMMITTED_S, _run(dose, 1))


@case(
    "270,000 captions, 10 workers, to the last commit",
    unit="s",
    peer=_LIMIT,
    higher_is_better=False,
    max_value=_COMMITTED_S,
)
def ten_workers(dose: Dose) -> Measured:
    """Ten device processes share two cores with the API."""
    return _against(_run(dose, 10).committed_s, _COMMITTED_S, _run(dose, 10))


@case(
    "270,000 captions, growth of the API's memory",
    unit="MB",
    peer=_LIMIT,
    higher_is_better=False,
    max_value=_MEGABYTES,
)
def api_memory(dose: Dose) -> Measured:
    """Resident memory, upload included, at ten workers."""
    return _against(_run(dose, 10).api_growth_mb, _MEGABYTES, _run(dose, 10))


@case(
    "270,000 captions, peak of Redis",
    unit="MB",
    peer=_LIMIT,
    higher_is_better=False,
    max_value=_MEGABYTES,
)
def redis_memory(dose: Dose) -> Measured:
    """`used_memory_peak` at ten workers."""
    return _against(_run(dose, 10).redis_peak_mb, _MEGABYTES, _run(dose, 10))


@case(
    "270,000 captions, status with 1 worker, p99",
    unit="ms",
    peer=_LIMIT,
    higher_is_better=False,
    max_value=_STATUS_MS,
)
def status_one_worker(dose: Dose) -> Measured:
    """`GET /v1/batches/{id}` while the batch runs."""
    return _against(_run(dose, 1).status_p99_ms, _STATUS_MS, _run(dose, 1))


@case(
    "270,000 captions, status with 10 workers, p99",
    unit="ms",
    peer=_LIMIT,
    higher_is_better=False,
    max_value=_STATUS_MS,
)
def status_ten_workers(dose: Dose) -> Measured:
    """The same where a dozen processes want the cores."""
    return _against(_run(dose, 10).status_p99_ms, _STATUS_MS, _run(dose, 10))


@cache
def _run(dose: Dose, workers: int) -> UploadFigures:
    with tempfile.TemporaryDirectory() as folder:
        return measure_upload(
            dose.size(_PROMPTS, _PROMPTS // 10), workers=workers, folder=Path(folder)
        )


def _against(value: float, limit: float, figures: UploadFigures) -> Measured:
    return Measured(value, limit, 1, str(figures))
