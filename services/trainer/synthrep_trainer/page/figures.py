"""Numbers over steps to what a drawing of them needs. Pure but for reading.

Coordinates are percent of the drawing, y downwards; text stands beside a drawing, never in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from synthrep_trainer.metrics import last_metrics, read_metrics

_MAX_POINTS = 200
_JUDGED_EVERY = 10  # steps between effective ranks, so that thinned curves keep them


@dataclass(frozen=True)
class Curve:
    """One number over steps."""

    title: str
    points: str
    """`x,y x,y …`."""
    newest: float
    low: float
    high: float
    first_step: int
    last_step: int


def curve(title: str, lines: Sequence[dict[str, Any]], name: str) -> Curve | None:
    """The curve of one metric, None where nothing was measured."""
    measured = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    if not measured:
        return None
    steps, values = [step for step, _ in measured], [value for _, value in measured]
    low, high = min(values), max(values)
    width, height = steps[-1] - steps[0] or 1, high - low or 1.0
    points = " ".join(
        f"{100 * (step - steps[0]) / width:.2f},{4 + 92 * (high - value) / height:.2f}"
        for step, value in measured
    )
    return Curve(title, points, values[-1], low, high, steps[0], steps[-1])


def thinned_metrics(path: Path) -> list[dict[str, Any]]:
    """A run's numbers at evenly spaced steps and at the newest, at most about 200."""
    newest = last_metrics(path)
    if newest is None:
        return []
    last = newest["step"]
    if last <= _MAX_POINTS:
        return read_metrics(path, after=-1, limit=_MAX_POINTS)
    tens = -(-last // (_MAX_POINTS * _JUDGED_EVERY))
    stride = tens * _JUDGED_EVERY
    return [*_every(path, stride, last // stride), newest]


@lru_cache(maxsize=64)
def _every(path: Path, stride: int, count: int) -> tuple[dict[str, Any], ...]:
    """The numbers of `count` steps, each found by bisection; steps that are done do not change."""
    found = (read_metrics(path, after=i * stride - 1, limit=1) for i in range(1, count + 1))
    return tuple(line for lines in found for line in lines)
