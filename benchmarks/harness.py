"""What the benchmarks share: a case is one function, its rounds are interleaved, its row is kept.

    @case("images a second", unit="images/s", peer="diffusers, one prompt a call", min_ratio=1.45)
    def images(dose: Dose) -> Measured:
        return interleave(ours, peer, rounds=dose.rounds(5))

The area is the package that the function lies in. A case that raises `PeerAbsentError` becomes a
row without a ratio that says why.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from synthrep_shared.storage import temporary_path

ROOT = Path(__file__).parents[1]
PEER_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
AREAS = ("generator", "data", "loss", "train", "probe", "scale")
_SIDE_LIMIT_S = 600.0

T = TypeVar("T")


class PeerAbsentError(RuntimeError):
    """The peer is not installed here; the message says why, as far as that is known."""


@dataclass(frozen=True)
class Dose:
    """How much of everything a run of the benchmarks takes."""

    is_quick: bool = False

    def rounds(self, full: int) -> int:
        """Rounds of a case that takes `full` of them in a full run."""
        return 2 if self.is_quick else full

    def size(self, full: int, quick: int) -> int:
        """How many of something."""
        return quick if self.is_quick else full


@dataclass(frozen=True)
class Measured:
    """What a case found; `peer` is None where there is nothing to compare with."""

    ours: float
    peer: float | None
    rounds: int
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """One row of results.json; `ratio` is above 1 where ours is better."""

    area: str
    case: str
    ours: float | None
    peer: float | None
    peer_name: str
    ratio: float | None
    unit: str
    higher_is_better: bool
    rounds: int
    reason: str


@dataclass(frozen=True)
class Case:
    """A comparison, and the goal that it has: at least a ratio, or at most a value of ours."""

    area: str
    name: str
    unit: str
    peer_name: str
    higher_is_better: bool
    min_ratio: float | None
    max_value: float | None
    measure: Callable[[Dose], Measured]

    def run(self, dose: Dose) -> Row:
        """Measure; a peer that is absent is no error."""
        try:
            found = self.measure(dose)
        except PeerAbsentError as error:
            return self._row(None, None, 0, str(error))
        return self._row(found.ours, found.peer, found.rounds, found.reason)

    def verdict(self, row: Row) -> str:
        """Whether the row reaches the goal, in words."""
        if self.min_ratio is not None:
            return f"goal: ratio of at least {self.min_ratio:g}, " + _said(
                None if row.ratio is None else row.ratio >= self.min_ratio
            )
        if self.max_value is not None:
            return f"goal: at most {self.max_value:g} {self.unit}, " + _said(
                None if row.ours is None else row.ours <= self.max_value
            )
        return "no goal"

    def _row(self, ours: float | None, peer: float | None, rounds: int, reason: str) -> Row:
        ratio = None
        if ours and peer:
            ratio = _rounded(ours / peer if self.higher_is_better else peer / ours)
        return Row(
            area=self.area,
            case=self.name,
            ours=_rounded(ours),
            peer=_rounded(peer),
            peer_name=self.peer_name,
            ratio=ratio,
            unit=self.unit,
            higher_is_better=self.higher_is_better,
            rounds=rounds,
            reason=reason,
        )


CASES: list[Case] = []


def case(
    name: str,
    *,
    unit: str,
    peer: str,
    higher_is_better: bool = True,
    min_ratio: float | None = None,
    max_value: float | None = None,
) -> Callable[[Callable[[Dose], Measured]], Callable[[Dose], Measured]]:
    """Register a function as a case of the area that it lies in."""

    def register(measure: Callable[[Dose], Measured]) -> Callable[[Dose], Measured]:
        area = measure.__module__.split(".")[1]
        CASES.append(Case(area, name, unit, peer, higher_is_better, min_ratio, max_value, measure))
        return measure

    return register


def interleave(
    ours: Callable[[], float], peer: Callable[[], float], *, rounds: int, reason: str = ""
) -> Measured:
    """Medians of both sides, measured in turns after one round that is dropped.

    Which side goes first changes from round to round, so that neither always has the warmer cache.
    """
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for side in (0, 1) if number % 2 else (1, 0):
            value = (ours, peer)[side]()
            if number:
                found[side].append(value)
    return Measured(median(found[0]), median(found[1]), rounds, reason)


def cpu_s(work: Callable[[], object]) -> float:
    """Processor seconds that this process spends on `work`, over all threads."""
    started = time.process_time()
    work()
    return time.process_time() - started


def wall_s(work: Callable[[], object]) -> float:
    """Seconds by the clock that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_process(
    function: Callable[..., float], *, python: Path | None = None, **given: Any
) -> float:
    """What `function(**given)` gives in a fresh process; `given` and the value travel as JSON.

    `python` is `PEER_PYTHON` for peers that live in an environment of their own; raises
    PeerAbsentError if that cannot import what the function needs.
    """
    interpreter = python or Path(sys.executable)
    if not interpreter.exists():
        raise PeerAbsentError(
            f"no environment {interpreter.parents[1].name}; `make bench` makes it"
        )
    name = f"{function.__module__}:{function.__qualname__}"
    done = subprocess.run(
        [str(interpreter), "-m", "benchmarks.side", name, json.dumps(given)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=_SIDE_LIMIT_S,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        if last.startswith(("ModuleNotFoundError", "ImportError")):
            raise PeerAbsentError(last)
        raise RuntimeError(f"{name} failed: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


class Results:
    """The rows of results.json by area and case; every change is written at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        kept = json.loads(path.read_text()) if path.exists() else []
        self._rows = {(row["area"], row["case"]): Row(**row) for row in kept}

    def put(self, row: Row) -> None:
        """Replace the row of the same case, and write the file anew under its name."""
        self._rows[row.area, row.case] = row
        write_json(self._path, [asdict(row) for row in self._sorted()])

    def _sorted(self) -> Iterable[Row]:
        return sorted(self._rows.values(), key=lambda row: (AREAS.index(row.area), row.case))


def write_json(path: Path, value: object) -> None:
    """Write a file of JSON, whole or not at all."""
    written = temporary_path(path.parent, path.name)
    written.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(written, path)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _said(is_reached: bool | None) -> str:
    return "not measured" if is_reached is None else "reached" if is_reached else "MISSED"
