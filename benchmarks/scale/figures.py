"""The pictures of docs/scale.md: `python -m benchmarks.scale.figures` draws `results.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness import ROOT
from benchmarks.scale.__main__ import RESULTS

_IMAGES = ROOT / "docs" / "images"
_PACED = "20 s a job"
_FREE = "no device time"
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "scale", "font.size": 9, "axes.grid": True}
Rows = Mapping[str, Mapping[str, Any]]


def main() -> None:
    """Draw both."""
    import matplotlib

    matplotlib.use("svg")
    with matplotlib.rc_context(_STYLE):
        rows = json.loads(RESULTS.read_text())
        _draw_logs(rows)
        _draw_workers(rows)


def _draw_logs(rows: Rows) -> None:
    """What a process of each kind reads in when it starts, by length of the log."""
    logs = [row for name, row in rows.items() if name.startswith("log of ")]
    captions = [row["captions"] for row in logs]
    figure, (left, right) = _panels()
    for role in ("api", "reconciler", "worker"):
        left.loglog(captions, [row[role]["start_s"] for row in logs], "o-", label=role)
        right.loglog(captions, [row[role]["memory_mb"] for row in logs], "o-", label=role)
    left.loglog(captions, [row["folder"]["start_s"] for row in logs], "o:", label="shard folder")
    right.loglog(captions, [row["log_mb"] for row in logs], "o:", label="log on disk")
    _finish(left, "captions decided (10 images each)", "seconds until read in")
    _finish(right, "captions decided (10 images each)", "MB of memory")
    _save(figure, "scale-log")


def _draw_workers(rows: Rows) -> None:
    """How the middle of the system does with more workers, 100,000 captions."""
    figure, (left, right) = _panels()
    free = _fleets(rows, _FREE)
    paced = _fleets(rows, _PACED)
    for name, fleets, style in (("no device time", free, "o-"), (_PACED, paced, "s")):
        workers = [row["setup"]["workers"] for row in fleets]
        left.semilogx(workers, [row["commits_per_s"] for row in fleets], style, label=name)
        for kind, colour in (("submit", "C0"), ("status", "C1")):
            values = [row[kind]["p99_ms"] for row in fleets]
            right.semilogx(workers, values, style, color=colour, label=f"{kind}, {name}")
    _finish(left, "workers", "commits a second")
    _finish(right, "workers", "p99 of an answer, ms")
    right.axhline(250, color="grey", linestyle="--")
    left.set_ylim(bottom=0)
    right.set_ylim(bottom=0)
    _save(figure, "scale-workers")


def _fleets(rows: Rows, pace: str) -> Sequence[Mapping[str, Any]]:
    return [row for name, row in rows.items() if name.endswith(f" 100000 captions, {pace}")]


def _panels() -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    return figure, axes


def _finish(axes: Any, across: str, up: str) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.minorticks_off()
    axes.legend(fontsize=8)


def _save(figure: Any, name: str) -> None:
    figure.savefig(_IMAGES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
