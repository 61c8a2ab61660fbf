"""Processor time on one thread and peak memory of a step, each in a fresh process, 256 dimensions.

The published form is written from the paper's equations, as lean as it can be while it holds the
matrix of pairs; the public code takes more of both. The time holds the system's share, which for
whoever asks for large memory is much of it. NT-Xent is another loss, there for its cost alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import PEER_PYTHON, Dose, Measured, case, in_process, interleave
from benchmarks.loss.steps import Name, step_megabytes, step_s

_PUBLISHED = "softmax and soft-label cross-entropy of all pairs"
_METRIC_LEARNING = "pytorch-metric-learning SupConLoss"
_LIGHTLY = "lightly NTXentLoss"

_SMALL, _MEDIUM, _LARGE, _HUGE = 1024, 4096, 8192, 16_384


def _compare(
    dose: Dose,
    measure: Callable[..., float],
    rows: int,
    peer: Name,
    *,
    python: Path | None = None,
    rounds: int = 3,
    ours: Name = "ours",
    **given: Any,
) -> Measured:
    size = dose.size(rows, rows // 4)
    return interleave(
        lambda: in_process(measure, name=ours, rows=size, **given),
        lambda: in_process(measure, python=python, name=peer, rows=size, **given),
        rounds=dose.rounds(rounds),
    )


@case("step of 1,024 rows", unit="s", peer=_PUBLISHED, higher_is_better=False)
def small_step(dose: Dose) -> Measured:
    return _compare(dose, step_s, _SMALL, "published", steps=9)


@case("step of 4,096 rows", unit="s", peer=_PUBLISHED, higher_is_better=False, min_ratio=4.0)
def medium_step(dose: Dose) -> Measured:
    return _compare(dose, step_s, _MEDIUM, "published", steps=3)


@case("step of 8,192 rows", unit="s", peer=_PUBLISHED, higher_is_better=False, min_ratio=5.0)
def large_step(dose: Dose) -> Measured:
    return _compare(dose, step_s, _LARGE, "published", rounds=5)


@case("step of 16,384 rows", unit="s", peer="", higher_is_better=False)
def huge_step(dose: Dose) -> Measured:
    size = dose.size(_HUGE, _LARGE)
    return Measured(in_process(step_s, name="ours", rows=size, steps=3), None, 1)


@case("SupCon, 4,096 rows", unit="s", peer=_METRIC_LEARNING, higher_is_better=False)
def medium_step_of_metric_learning(dose: Dose) -> Measured:
    return _compare(dose, step_s, _MEDIUM, "metric_learning", python=PEER_PYTHON)


@case("SupCon, 8,192 rows", unit="s", peer=_METRIC_LEARNING, higher_is_better=False)
def large_step_of_metric_learning(dose: Dose) -> Measured:
    return _compare(dose, step_s, _LARGE, "metric_learning", python=PEER_PYTHON)


@case("NT-Xent, 4,096 rows", unit="s", peer=_LIGHTLY, higher_is_better=False, min_ratio=3.0)
def medium_step_of_lightly(dose: Dose) -> Measured:
    return _compare(dose, step_s, _MEDIUM, "lightly", python=PEER_PYTHON)


@case("NT-Xent, 8,192 rows", unit="s", peer=_LIGHTLY, higher_is_better=False, min_ratio=3.0)
def large_step_of_lightly(dose: Dose) -> Measured:
    return _compare(dose, step_s, _LARGE, "lightly", python=PEER_PYTHON)


@case("tile of 1 of 2 ranks, 8,192 rows", unit="s", peer=_PUBLISHED, higher_is_better=False,
      min_ratio=2.0)  # fmt: skip
def tile_of_two_ranks(dose: Dose) -> Measured:
    return _compare(dose, step_s, _LARGE, "published_tile", ours="our_tile", ranks=2)


@case("tile of 1 of 4 ranks, 8,192 rows", unit="s", peer=_PUBLISHED, higher_is_better=False,
      min_ratio=2.0)  # fmt: skip
def tile_of_four_ranks(dose: Dose) -> Measured:
    return _compare(dose, step_s, _LARGE, "published_tile", ours="our_tile", ranks=4)


@case("memory of 4,096 rows", unit="MB", peer=_PUBLISHED, higher_is_better=False)
def medium_memory(dose: Dose) -> Measured:
    return _compare(dose, step_megabytes, _MEDIUM, "published", rounds=2)


@case("memory of 8,192 rows", unit="MB", peer=_PUBLISHED, higher_is_better=False, min_ratio=10.0)
def large_memory(dose: Dose) -> Measured:
    return _compare(dose, step_megabytes, _LARGE, "published", rounds=2)


@case("memory of 8,192 rows, SupCon", unit="MB", peer=_METRIC_LEARNING, higher_is_better=False)
def large_memory_of_metric_learning(dose: Dose) -> Measured:
    return _compare(dose, step_megabytes, _LARGE, "metric_learning", python=PEER_PYTHON, rounds=1)


@case("memory of 8,192 rows, NT-Xent", unit="MB", peer=_LIGHTLY, higher_is_better=False)
def large_memory_of_lightly(dose: Dose) -> Measured:
    return _compare(dose, step_megabytes, _LARGE, "lightly", python=PEER_PYTHON, rounds=1)


@case("memory of 16,384 rows", unit="MB", peer="", higher_is_better=False, max_value=1000.0)
def huge_memory(dose: Dose) -> Measured:
    size = dose.size(_HUGE, _LARGE)
    return Measured(in_process(step_megabytes, name="ours", rows=size), None, 1)
