"""What a probe costs the run that it looks at: views a second with and without one beside it.

Both are the processes that the launcher starts, with one thread each. The run goes on all the time
(the demo's setting, `benchmarks.train.runs`); stretches with probes of its newest checkpoint, none
of them answered from the cache, take turns with stretches without.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness import Dose, Measured, case, interleave
from benchmarks.train.runs import commit_images, demo_request
from synthrep_shared.messages import ProbeRequest
from synthrep_shared.storage import DatasetPaths
from synthrep_trainer.runs import RunFolder, Workplace

_DATASET, _PROBE_SET = "demo", "digits"
_STRETCH_S = 12.0
_START_S = 120.0


@case(
    "views of a run beside probes of it",
    unit="views/s",
    peer="the same run alone",
    min_ratio=0.9,
)
def beside(dose: Dose) -> Measured:
    """Needs a core for each of the two; the run must outlive every probe."""
    with tempfile.TemporaryDirectory() as folder, _run(Path(folder)) as (run, place, environment):
        ended = itertools.count()

        def with_probes() -> float:
            with _probes(run, place, environment, ended):
                return _views_per_s(run)

        cores = len(os.sched_getaffinity(0))
        found = interleave(with_probes, lambda: _views_per_s(run), rounds=dose.rounds(5))
        reason = f"{next(ended)} probes ended meanwhile; {cores} cores"
        return Measured(found.ours, found.peer, found.rounds, reason)


@contextmanager
def _run(root: Path) -> Iterator[tuple[RunFolder, Workplace, dict[str, str]]]:
    """A run in progress, past its first checkpoint."""
    commit_images(DatasetPaths(root / "data", _DATASET))
    place = Workplace(root / "trainer")
    request = demo_request(_DATASET, max_steps=1_000_000)
    run = place.submit_run(request.model_copy(update={"checkpoint_every": 10}))
    environment = os.environ | {
        "SYNTHREP_TRAINER_ROOT": str(root / "data"),
        "SYNTHREP_TRAINER_RUNS": str(place.root),
        "SYNTHREP_TRAINER_DEVICE": "cpu",
        "SYNTHREP_TRAINER_THREADS": "1",
        "SYNTHREP_TRAINER_PROBE_CACHE_BYTES": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "synthrep_trainer.train", "--run", str(run.path)]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        deadline = time.monotonic() + _START_S
        while _steps(run) < 12:
            if child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the run did not start: status {child.poll()}")
            time.sleep(0.2)
        yield run, place, environment
        if child.poll() is not None:
            raise RuntimeError(f"the run ended with status {child.poll()} beside a probe")
    finally:
        child.kill()
        child.wait()


@contextmanager
def _probes(
    run: RunFolder, place: Workplace, environment: dict[str, str], ended: Iterator[int]
) -> Iterator[None]:
    """One probe after the other, from one child that is ended with the block."""
    request = ProbeRequest(run_id=run.id, dataset=_PROBE_SET)
    folders = [place.submit_probe(request) for _ in range(8)]
    each = [f"{sys.executable} -m synthrep_trainer.probes --probe {f.path}" for f in folders]
    with subprocess.Popen(["sh", "-c", " && ".join(each)], env=environment,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                          start_new_session=True) as child:  # fmt: skip
        try:
            time.sleep(3.0)  # its imports
            yield
            if child.poll() is not None:
                raise RuntimeError(f"a probe failed: status {child.poll()}")
        finally:
            os.killpg(child.pid, 9)
    for folder in folders:
        if folder.result.exists():
            next(ended)


def _views_per_s(run: RunFolder) -> float:
    """Over whole steps by the clock, data and checkpoints included."""
    first, started = _steps(run), time.monotonic()
    while _steps(run) == first:
        time.sleep(0.01)
    first, started = _steps(run), time.monotonic()
    last = first
    ended = started
    while ended - started < _STRETCH_S:
        time.sleep(0.01)
        if (now := _steps(run)) != last:
            last, ended = now, time.monotonic()
    views = [json.loads(line)["images_seen"] for line in run.metrics.read_text().splitlines()]
    return float((views[last - 1] - views[first - 1]) / (ended - started))


def _steps(run: RunFolder) -> int:
    return run.metrics.read_bytes().count(b"\n") if run.metrics.exists() else 0
