"""Probes of one run to charts: a score over checkpoints, and bars against what it has to beat.

A completed probe never changes, so each is read once; its result may hold a bit a test image.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from synthrep_trainer.runs import ProbeFolder
from synthrep_trainer.views import probe_view

_log = logging.getLogger(__name__)
_BASELINES = {"random_init": "untrained encoder", "pixels": "raw pixels"}
_MAX_RIVALS = 4
_PAD = 0.08  # of the range, above and below


@dataclass(frozen=True)
class Bar:
    """A score from 0 to 1 with its interval."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Judged:
    """What a completed probe found."""

    run: str
    step: int
    dataset: str
    protocol: str
    metric: str
    num_test: int
    score: Bar
    baselines: Mapping[str, Bar]
    majority: float | None


@dataclass(frozen=True)
class Mark:
    """A judged checkpoint in a drawing of 100 × 100, y downwards."""

    step: int
    value: float
    x: float
    y: float
    top: float
    bottom: float


@dataclass(frozen=True)
class Level:
    """A baseline in the same drawing; `kind` is its name."""

    kind: str
    y: float
    top: float
    height: float


@dataclass(frozen=True)
class Chart:
    """A run on one labelled set by one protocol; the first bar is its newest checkpoint."""

    dataset: str
    protocol: str
    metric: str
    num_test: int
    bars: tuple[Bar, ...]
    marks: tuple[Mark, ...]
    levels: tuple[Level, ...]
    low: float
    high: float
    majority: float | None

    @property
    def verdict(self) -> str:
        """What the intervals say of training, in words."""
        trained, untrained = self.bars[:2]
        if trained.low > untrained.high:
            return "better than untrained, intervals apart"
        if trained.high < untrained.low:
            return "worse than untrained, intervals apart"
        return "intervals of trained and untrained overlap"


def judged_by(folders: Iterable[ProbeFolder]) -> tuple[list[Judged], list[ProbeFolder]]:
    """What the completed ones found, and the others; one that cannot be read is logged."""
    found, others = [], []
    for folder in folders:
        if not folder.result.is_file():
            others.append(folder)
            continue
        try:
            found.append(_judged(folder.path))
        except LookupError:
            others.append(folder)
        except (OSError, ValueError):
            _log.exception("file_unreadable", extra={"id": folder.id})
    return found, others


@lru_cache(maxsize=2048)
def _judged(path: Path) -> Judged:
    """Raises LookupError where the result is not final yet."""
    view = probe_view(ProbeFolder(path))
    if view.value is None or view.ci95 is None or view.checkpoint is None:
        raise LookupError(view.id)
    baselines = view.baselines or {}
    majority = baselines.get("majority")
    checkpoint = Path(view.checkpoint)
    return Judged(
        run=checkpoint.parent.parent.name,
        step=int(checkpoint.name.removeprefix("step-")),
        dataset=view.dataset,
        protocol=view.protocol,
        metric=view.metric or "score",
        num_test=view.n_test or 0,
        score=Bar("", view.value, *view.ci95),
        baselines={
            name: _bar(title, baselines[name])
            for name, title in _BASELINES.items()
            if name in baselines
        },
        majority=majority and majority["value"],
    )


def _bar(name: str, score: Mapping[str, Any]) -> Bar:
    value = score["value"]
    return Bar(name, value, *(score.get("ci95") or (value, value)))


def charts(run: str, judged: Sequence[Judged], objectives: Mapping[str, str]) -> list[Chart]:
    """A run's charts, the newest probe's first; `judged` comes newest first.

    `objectives` names the runs that count as rivals, by their ids.
    """
    kinds = dict.fromkeys((j.dataset, j.protocol) for j in judged if j.run == run)
    return [
        _chart(run, [j for j in judged if (j.dataset, j.protocol) == kind], objectives)
        for kind in kinds
    ]


def _chart(run: str, judged: Sequence[Judged], objectives: Mapping[str, str]) -> Chart:
    newest_by_step: dict[int, Judged] = {}
    rivals: dict[str, Bar] = {}
    for one in judged:
        if one.run == run:
            newest_by_step.setdefault(one.step, one)
        elif one.run in objectives and len(rivals) < _MAX_RIVALS:
            score = one.score
            title = f"{objectives[one.run]}, run {one.run[:15]}, step {one.step}"
            rivals.setdefault(one.run, Bar(title, score.value, score.low, score.high))
    own = [newest_by_step[step] for step in sorted(newest_by_step)]
    newest = own[-1]
    baselines = newest.baselines
    score = newest.score
    trained = Bar(f"trained, step {newest.step}", score.value, score.low, score.high)
    bounds = [j.score for j in own] + list(baselines.values())
    least, most = min(bar.low for bar in bounds), max(bar.high for bar in bounds)
    pad = _PAD * (most - least or 1)
    low, high = max(0.0, least - pad), min(1.0, most + pad)

    def y(value: float) -> float:
        return round(4 + 92 * (high - value) / (high - low), 2)

    first, width = own[0].step, newest.step - own[0].step or 1
    marks = tuple(
        Mark(
            j.step, j.score.value, round(100 * (j.step - first) / width, 2),
            y(j.score.value), y(j.score.high), y(j.score.low),
        )
        for j in own
    )  # fmt: skip
    levels = tuple(
        Level(kind, y(bar.value), y(bar.high), round(y(bar.low) - y(bar.high), 2))
        for kind, bar in baselines.items()
    )
    return Chart(
        newest.dataset, newest.protocol, newest.metric, newest.num_test,
        (trained, *baselines.values(), *rivals.values()), marks, levels, low, high,
        newest.majority,
    )  # fmt: skip
