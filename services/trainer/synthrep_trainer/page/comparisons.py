"""Reports of `synthrep compare` to tables: rows by labelled sets, a mean and its interval a cell.

A report is replaced whole by the next one of its name, so each is parsed once.
"""

from __future__ import annotations

import heapq
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from synthrep_shared.messages import ComparisonCell, ComparisonView
from synthrep_trainer.routes_comparisons import NAME_PATTERN, SUFFIX

_log = logging.getLogger(__name__)
_MAX_BYTES = 8 << 20
_MAX_ROWS, _MAX_SETS, _MAX_SENTENCES = 24, 24, 40
_NAME = re.compile(NAME_PATTERN)


@dataclass(frozen=True)
class Cell:
    """A row on a set, as fractions, and its place on the scale of the set, in percent."""

    mean: float
    low: float
    high: float
    is_best: bool
    """Whether it is significantly best."""
    x: float
    left: float
    right: float


@dataclass(frozen=True)
class Row:
    """What was trained one way, or a baseline; a cell for each set, None where it has no result."""

    name: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Table:
    """A comparison, or as much of it as a page shows; the row of the highest average first."""

    sets: tuple[tuple[str, bool | None], ...]
    """Each with whether it counts; None where no trained row has a result on it."""
    rows: tuple[Row, ...]
    is_whole: bool
    statement: Sequence[str]
    failures: Sequence[str]


def newest_names(folder: Path, limit: int) -> list[str]:
    """Names of the comparisons in a folder, that with the newest report first."""
    try:
        entries = [entry for entry in os.scandir(folder) if entry.name.endswith(SUFFIX)]
    except FileNotFoundError:
        return []
    reports = [(e.stat().st_mtime_ns, e.name.removesuffix(SUFFIX)) for e in entries]
    return [name for _, name in heapq.nlargest(limit, reports) if _NAME.match(name)]


def read_table(path: Path) -> Table | None:
    """The table in a report, None if it is damaged; raises FileNotFoundError."""
    status = path.stat()
    return _parsed(path, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=16)
def _parsed(path: Path, num_bytes: int, *_identity: int) -> Table | None:
    try:
        if num_bytes > _MAX_BYTES:
            raise ValueError("a report is not so large")
        return _table(ComparisonView.model_validate_json(path.read_bytes()))
    except ValueError:
        _log.warning("comparison_unreadable", extra={"path": str(path)})
        return None


def _table(view: ComparisonView) -> Table:
    by_set: dict[str, dict[str, ComparisonCell]] = {}
    for cell in view.summary:
        by_set.setdefault(cell.dataset, {})[cell.row] = cell
    sets = list(by_set)[:_MAX_SETS]
    scales = [_scale(by_set[name].values()) for name in sets]
    rows = [
        Row(
            name,
            tuple(
                _cell(by_set[dataset][name], *scale) if name in by_set[dataset] else None
                for dataset, scale in zip(sets, scales, strict=True)
            ),
        )
        for name in dict.fromkeys(cell.row for cell in view.summary)
    ]
    return Table(
        sets=tuple((name, view.counted.get(name)) for name in sets),
        rows=tuple(sorted(rows, key=_rank)[:_MAX_ROWS]),
        is_whole=len(by_set) <= _MAX_SETS and len(rows) <= _MAX_ROWS,
        statement=view.statement[:_MAX_SENTENCES],
        failures=view.failures[:_MAX_SENTENCES],
    )


def _scale(cells: Iterable[ComparisonCell]) -> tuple[float, float]:
    """Where the lowest interval of a set begins, and how far it is to the end of the highest."""
    lows, highs = zip(*(cell.ci95 for cell in cells), strict=True)
    return min(lows), max(highs) - min(lows) or 1.0


def _cell(cell: ComparisonCell, start: float, width: float) -> Cell:
    low, high = cell.ci95
    places = [round(100 * (value - start) / width, 2) for value in (cell.mean, low, high)]
    return Cell(cell.mean, low, high, cell.significant, *places)


def _rank(row: Row) -> tuple[int, float]:
    means = [cell.mean for cell in row.cells if cell is not None]
    return len(row.cells) - len(means), -sum(means) / max(1, len(means))
