"""`python -m benchmarks.scale`: measures the points that `results.json` lacks, one line each."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Any

from benchmarks.harness import ROOT, write_json
from benchmarks.scale.fleet import Setup, measure
from benchmarks.scale.log_costs import measure_log
from benchmarks.scale.page import measure_page

RESULTS = ROOT / "benchmarks" / "scale" / "results.json"
_JOB_S = 20.0  # of device work; jobs are cut for 5 to 30 s
_SETUPS = [
    *(Setup(w, n, 16, 0.0) for n in (10_000, 100_000) for w in (1, 10, 100, 1000)),
    *(Setup(1000, n, 16, _JOB_S) for n in (10_000, 100_000)),
    *(Setup(1000, n, 160, _JOB_S) for n in (500_000, 1_000_000)),
]
_LOGS = (10_000, 100_000, 1_000_000, 10_000_000)
_PAGES, _VIEWERS = (1_000_000,), 10


def main() -> int:
    """Measure in order; a point that is there is left as it is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--point", default="", help="part of points' names; measures them again")
    options = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, work in _points().items():
        if options.point not in name or (name in kept and not options.point):
            continue
        kept[name] = {"measured_at": f"{datetime.now(UTC):%Y-%m-%d %H:%M}", **work()}
        write_json(RESULTS, kept)
        print(f"{name}: {json.dumps(kept[name])}", flush=True)
    return 0


def _points() -> dict[str, Callable[[], dict[str, Any]]]:
    fleets = {setup.name: partial(_measure, setup) for setup in _SETUPS}
    return {
        **fleets,
        **{f"log of {n} captions": partial(measure_log, n) for n in _LOGS},
        **{f"page over {n} captions": partial(measure_page, n, _VIEWERS) for n in _PAGES},
    }


def _measure(setup: Setup) -> dict[str, Any]:
    return asdict(measure(setup))


if __name__ == "__main__":
    sys.exit(main())
