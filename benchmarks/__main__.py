"""`python -m benchmarks`: runs the cases, keeps their rows, prints their ratios.

A run that was cut off goes on where it stopped: `runs/bench/done.json` names the cases that it has.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import sys
import time
from pathlib import Path

from benchmarks.harness import AREAS, CASES, ROOT, Case, Dose, Results, Row, write_json

_DONE = ROOT / "runs" / "bench" / "done.json"
_RESULTS = ROOT / "benchmarks" / "results.json"


def main() -> int:
    """Run what the command line asks for; 1 if time ran out before every case had its turn."""
    options = _options()
    _import_cases()
    chosen = [c for c in CASES if options.area in (None, c.area) and (options.case or "") in c.name]
    results = Results(Path(options.output))
    deadline = time.monotonic() + 60 * options.minutes
    done = set() if options.fresh else _read_done()
    for number, item in enumerate(chosen, 1):
        if f"{item.area}/{item.name}" in done:
            continue
        if time.monotonic() > deadline:
            print(f"{options.minutes} minutes are over; run this again for the rest")
            return 1
        started = time.monotonic()
        row = item.run(Dose(is_quick=options.quick))
        results.put(row)
        done.add(f"{item.area}/{item.name}")
        _write_done(done)
        _show(f"{number}/{len(chosen)}", item, row, time.monotonic() - started)
    _DONE.unlink(missing_ok=True)
    return 0


def _import_cases() -> None:
    for area in AREAS:
        for module in pkgutil.iter_modules([str(ROOT / "benchmarks" / area)]):
            importlib.import_module(f"benchmarks.{area}.{module.name}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--area", choices=AREAS)
    parser.add_argument("--case", help="part of a case's name")
    parser.add_argument("--quick", action="store_true", help="two rounds, small sizes")
    parser.add_argument("--fresh", action="store_true", help="also what a run before has done")
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--output", default=str(_RESULTS))
    return parser.parse_args()


def _read_done() -> set[str]:
    return set(json.loads(_DONE.read_text())) if _DONE.exists() else set()


def _write_done(done: set[str]) -> None:
    _DONE.parent.mkdir(parents=True, exist_ok=True)
    write_json(_DONE, sorted(done))


def _show(position: str, item: Case, row: Row, seconds: float) -> None:
    if row.ours is None:
        figures = "not measured"
    elif row.ratio is None:
        figures = f"{row.ours:g} {row.unit}"
    else:
        figures = f"{row.ratio:.3g}x: {row.ours:g} against {row.peer:g} {row.unit}"
    print(f"[{position}] {row.area}: {item.name}, {figures}  ({row.peer_name})", flush=True)
    notes = [item.verdict(row), row.reason, f"load {os.getloadavg()[0]:.1f}, {seconds:.0f} s"]
    print("    " + "; ".join(filter(None, notes)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
