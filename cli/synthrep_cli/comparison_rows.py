"""Results of runs as lines of a file that grows: what is there is not done again.

A line is one row, seed and set. The lines of a run are appended in one write, so that a run is
there whole or, where the write was cut off, not at all for those sets that are missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

METRICS = ("accuracy", "mean_per_class")
"""Those that are means of hits."""


class Cost(BaseModel):
    """What a run took."""

    model_config = ConfigDict(frozen=True)

    views: int
    train_s: float
    """Time of its steps, by the clock."""
    device: str


class ResultRow(BaseModel):
    """One row, seed and set; `key` says which run with which settings it comes from."""

    model_config = ConfigDict(frozen=True)

    key: str
    row: str
    seed: int
    dataset: str
    protocol: str
    metric: Literal["accuracy", "mean_per_class"]
    value: float
    ci95: tuple[float, float]
    """Over test images."""
    n_test: int
    class_sizes: tuple[int, ...]
    """Test images of each class."""
    hits: str
    """As a probe has them: a bit an image, in the order of classes, hex."""
    cost: Cost | None = None
    """Of the training run; None for baselines."""


def read_rows(path: Path) -> list[ResultRow]:
    """The lines that are whole, the last of a key, row and set; a torn line is skipped."""
    if not path.exists():
        return []
    rows: dict[tuple[str, str, str], ResultRow] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = ResultRow.model_validate(json.loads(line))
        except (ValueError, ValidationError):
            continue
        rows[row.key, row.row, row.dataset] = row
    return list(rows.values())


def append_rows(path: Path, rows: Iterable[ResultRow]) -> None:
    """Append in one write that is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(row.model_dump_json() + "\n" for row in rows)
    with path.open("a+b") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":  # the line before was torn; it must not take ours with it
                text = "\n" + text
        stream.write(text.encode())
        stream.flush()
        os.fsync(stream.fileno())


def missing_sets(rows: Sequence[ResultRow], key: str, row: str, sets: Sequence[str]) -> list[str]:
    """The sets that a run has no line of."""
    there = {r.dataset for r in rows if r.key == key and r.row == row}
    return [name for name in sets if name not in there]
