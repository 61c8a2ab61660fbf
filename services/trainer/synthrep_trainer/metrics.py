"""The numbers of a run by step: `metrics.jsonl`, one object a line, every step once, in order.

Needs no torch: the train process writes, the API reads while it does.
"""

from __future__ import annotations

import errno
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict

_TAIL_BYTES = 16 << 10  # longer than any line


class StepMetrics(BaseModel):
    """One step's numbers, of all ranks together; rates are per second of wall clock."""

    model_config = ConfigDict(frozen=True)

    step: int
    time: datetime
    loss: float | None
    """None where it is no number, in a step that was skipped."""
    lr: float
    gradient_norm: float | None
    """Before it is clipped; None as for the loss."""
    terms: dict[str, float] = {}
    """Parts of the loss and the like, by the objective."""
    is_skipped: bool = False
    effective_rank: float | None
    """Of the features of a step's images on rank 0, 1 to their width; None where not measured."""
    alignment: float | None = None
    """Mean squared distance of positives, 0-4, of the embeddings on rank 0."""
    uniformity: float | None = None
    """log of the mean of exp(-2 squared distance) of their pairs, 0 (all equal) down to -4."""
    knn_accuracy: float | None = None
    """Share of held-out images whose nearest neighbour is of the same caption."""
    images_seen: int
    """Views trained on since the run began."""
    images_per_s: float
    """Views a second in this step, waiting included."""
    wait_s: float
    """Time that the step waited for its batch."""
    images_committed: int
    """Images in the commit log as far as it was read."""
    generated_per_trained: float
    """images_committed / images_seen."""
    shards_quarantined: int

    def numbers(self) -> dict[str, float]:
        """What has a value, by name; terms as `terms/NAME`."""
        fields = self.model_dump(exclude={"step", "time", "terms"}, exclude_none=True)
        return fields | {f"terms/{name}": value for name, value in self.terms.items()}


class MetricsWriter:
    """Appends to `metrics.jsonl`, after dropping what it has of steps after `step`."""

    def __init__(self, path: Path, *, step: int) -> None:
        if path.exists():
            with path.open("rb") as stream:
                os.truncate(path, _offset_after(stream, step))
        self._stream = path.open("ab", buffering=0)

    def write(self, metrics: StepMetrics) -> None:
        """Append one line, or nothing and raise OSError; a reader sees it at once."""
        line = metrics.model_dump_json().encode() + b"\n"
        before = self._stream.tell()
        if self._stream.write(line) != len(line):
            self._stream.truncate(before)
            raise OSError(errno.ENOSPC, "short write to the metrics")

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_metrics(path: Path, *, after: int, limit: int) -> list[dict[str, Any]]:
    """Up to `limit` steps' numbers from step `after` + 1 on, empty if there are none."""
    if not path.exists():
        return []
    found: list[dict[str, Any]] = []
    with path.open("rb") as stream:
        stream.seek(_offset_after(stream, after))
        while len(found) < limit:
            line = stream.readline()
            if not line.endswith(b"\n"):
                break
            found.append(json.loads(line))
    return found


def last_metrics(path: Path) -> dict[str, Any] | None:
    """The newest step's numbers, None before the first step."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
            tail = stream.read()
    except FileNotFoundError:
        return None
    lines = tail[: tail.rfind(b"\n") + 1].splitlines()
    return dict(json.loads(lines[-1])) if lines else None


def _offset_after(stream: BinaryIO, step: int) -> int:
    """Byte offset of the first line of a later step, by bisection: steps only rise."""
    low, high = 0, os.fstat(stream.fileno()).st_size  # the line wanted begins in [low, high]
    while low < high:
        middle = (low + high) // 2
        stream.seek(middle)
        if middle:
            stream.seek(middle - 1)
            stream.readline()  # to the first line that begins at or after middle
        begin = stream.tell()
        line = stream.readline()
        if line.endswith(b"\n") and begin < high and json.loads(line)["step"] <= step:
            low = begin + len(line)
        else:
            high = middle
    return low
