"""270,000 captions in one request, one worker and ten, against the limits set for them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from benchmarks.harness import Dose, Measured, case
from benchmarks.scale.upload import UploadFigures, measure_upload

_PROMPTS = 270_000
# Name, unit, workers, figure of `UploadFigures`, limit. Workers and API share two cores.
_CASES = (
    ("1 worker, to the last commit", "s", 1, "committed_s", 600.0),
    ("10 workers, to the last commit", "s", 10, "committed_s", 600.0),
    ("growth of the API's memory", "MB", 10, "api_growth_mb", 100.0),
    ("peak of Redis", "MB", 10, "redis_peak_mb", 100.0),
    ("status with 1 worker, p99", "ms", 1, "status_p99_ms", 50.0),
    ("status with 10 workers, p99", "ms", 10, "status_p99_ms", 50.0),
)


def _measure(workers: int, figure: str, limit: float) -> Callable[[Dose], Measured]:
    def measure(dose: Dose) -> Measured:
        figures = _run(dose, workers)
        return Measured(getattr(figures, figure), limit, 1, str(figures))

    return measure


@cache
def _run(dose: Dose, workers: int) -> UploadFigures:
    with tempfile.TemporaryDirectory() as folder:
        return measure_upload(
            dose.size(_PROMPTS, _PROMPTS // 10), workers=workers, folder=Path(folder)
        )


for _name, _unit, _workers, _figure, _limit in _CASES:
    case(
        f"270,000 captions, {_name}",
        unit=_unit,
        peer="the limit itself",
        higher_is_better=False,
        max_value=_limit,
    )(_measure(_workers, _figure, _limit))
