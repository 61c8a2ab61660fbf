"""One point of the simulation: so many workers, so many captions, on real services.

API, reconciler and Redis are the real processes; captions come in by a streamed upload while other
clients submit small batches, ask for states, pages and the autoscaler's signal. A point ends when
every caption that was answered 202 has its outcome, and the data set is then audited.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.scale.clients import Client, Latency, latency
from benchmarks.scale.upload import BusyClock
from benchmarks.scale.usage import Usage, short
from benchmarks.services import Services
from benchmarks.uploads import body, upload
from synthrep_generator.verify import verify_dataset
from synthrep_shared.commit_log import LogReader
from synthrep_shared.storage import DatasetPaths

DATASET = "scale"
_PROCESSES = 4
_LIMIT_S = 600.0
_POLL_S = 0.25
_FOREVER_S = 1e9
SMALL_BATCH = 16


@dataclass(frozen=True)
class Setup:
    """What a point is: `device_s` is the time that the simulated device takes for a full job."""

    workers: int
    captions: int
    job_captions: int
    device_s: float

    @property
    def name(self) -> str:
        """Tells points apart."""
        pace = f"{self.device_s:g} s a job" if self.device_s else "no device time"
        return f"{self.workers} workers, {self.captions} captions, {pace}"


@dataclass(frozen=True)
class Point:
    """What was seen; MB are 10^6 bytes, cores are processor seconds a second.

    `seconds` and all cores are of the time from the start of the upload to the last outcome.
    """

    setup: Setup
    accepted_s: float
    seconds: float
    commits: int
    commits_per_s: float
    captions_per_s: float
    commit: Latency
    redis_idle_mb: float
    redis_peak_mb: float
    redis_clients: int
    redis_cores: float
    redis_commands_per_s: float
    api_cores: float
    api_growth_mb: float
    reconciler_cores: float
    workers_cores: float
    submit: Latency
    submit_after_upload: Latency
    status: Latency
    signal: Latency
    listing: Latency
    signal_first: int
    signal_expected: int
    signal_last: int
    accepted: int
    lost: int
    duplicated: int
    damaged: int
    others_cores: float


class Fleet(Services):
    """The services with simulated workers, whose processes leave the times of their commits."""

    def __init__(self, folder: Path, setup: Setup) -> None:
        super().__init__(
            folder,
            workers=0,
            synthesizer="fake",
            job_images=setup.job_captions,
            models={"tiny": {"path": "absent"}},
        )
        self._setup = setup

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            for number, count in enumerate(self._shares()):
                arguments = (str(count), str(self._setup.device_s), str(self._times(number)))
                module = "benchmarks.scale.simulated_workers"
                self._start(f"fleet-{number}", module, *arguments)
            self._workers = self._setup.workers
            self._wait(self._are_all_ready)
        except BaseException:
            self._stop()
            raise
        return self

    def fleet_pids(self) -> list[int]:
        """The processes of the workers."""
        return [self.pid(f"fleet-{number}") for number, _ in enumerate(self._shares())]

    def commit_s(self) -> list[float]:
        """Seconds of every commit; call when the services have ended."""
        paths = [self._times(number) for number, _ in enumerate(self._shares())]
        return [seconds for path in paths for seconds in json.loads(path.read_text())]

    def _shares(self) -> list[int]:
        processes = min(_PROCESSES, self._setup.workers)
        return [len(range(n, self._setup.workers, processes)) for n in range(processes)]

    def _times(self, number: int) -> Path:
        return self.folder / f"commits-{number}.json"


def measure(setup: Setup) -> Point:
    """Run one point in a temporary folder; raises RuntimeError after ten minutes."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, busy = Path(temporary), BusyClock()
        with Fleet(folder, setup) as fleet:
            seen = _Run(fleet, setup).measure()
        seen |= audit(DatasetPaths(fleet.settings.root, DATASET), promised=seen.pop("promised"))
        return Point(
            setup=setup,
            commit=latency([1e3 * seconds for seconds in fleet.commit_s()]),
            others_cores=short(busy.others_cores()),
            **seen,
        )


@dataclass
class _Run:
    """The part of a point in which the services are up."""

    fleet: Fleet
    setup: Setup
    batch: str = ""
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def measure(self) -> dict[str, Any]:
        """Fields of the point by name, and `promised`, the captions that were answered 202."""
        clients = self._clients()
        usage = Usage(self.fleet, self.fleet.fleet_pids())
        clients["submit"].start()
        started = time.monotonic()
        self.batch = self._upload()
        accepted_s = time.monotonic() - started
        beside_upload = len(clients["submit"].milliseconds) + 1  # one may be under way
        for name in ("status", "signal", "listing"):
            clients[name].start()
        log = _Log(self.fleet)
        log.wait_for(lambda: log.committed_of(self.batch) >= self.setup.captions)
        clients["submit"].stop()
        answers = clients["submit"].answers
        promised = self.setup.captions + sum(answer["prompts_accepted"] for answer in answers)
        log.wait_for(lambda: log.outcomes >= promised)
        seconds = time.monotonic() - started
        seen = usage.end()
        for name in ("status", "signal", "listing"):
            clients[name].stop()
        clients["signal"].ask_once()  # with nothing left to do
        submits = clients["submit"].milliseconds
        signals = [answer["value"] for answer in clients["signal"].answers]
        jobs = math.ceil(self.setup.captions / self.setup.job_captions)
        return seen | {
            **{name: client.latency() for name, client in clients.items()},
            "submit_after_upload": latency(submits[min(beside_upload, len(submits) - 1) :]),
            "accepted_s": short(accepted_s),
            "seconds": short(seconds),
            "commits": log.records,
            "commits_per_s": short(log.records / (seconds - accepted_s)),
            "captions_per_s": short(log.outcomes / (seconds - accepted_s)),
            "signal_first": signals[0],
            "signal_expected": math.ceil(jobs / self.fleet.settings.jobs_ahead),
            "signal_last": signals[-1],
            "promised": promised,
        }

    def _upload(self) -> str:
        captions = self.setup.captions
        return upload(
            self.fleet.url, body(captions), prompts=captions, dataset=DATASET, images_per_prompt=1
        )

    def _clients(self) -> dict[str, Client]:
        port = self.fleet.api_port
        pages = itertools.cycle(
            [f"/v1/datasets/{DATASET}/shards?limit=100", "/v1/batches?limit=100"]
        )
        return {
            "submit": Client(port, 5.0, self._small_batch),
            "status": Client(port, 10.0, lambda: ("GET", f"/v1/batches/{self.batch}", None)),
            "signal": Client(port, 2.0, lambda: ("GET", "/v1/scale", None)),
            "listing": Client(port, 2.0, lambda: ("GET", next(pages), None)),
        }

    def _small_batch(self) -> tuple[str, str, Any]:
        number = next(self.numbers)
        prompts = [f"a photo of request {number}, line {line}" for line in range(SMALL_BATCH)]
        asked = {"dataset": DATASET, "images_per_prompt": 1, "prompts": prompts}
        return "POST", "/v1/batches", asked


class _Log:
    """Follows the commit log of a fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._reader = LogReader(DatasetPaths(fleet.settings.root, DATASET).log)
        self._by_batch: dict[str, int] = {}
        self._deadline = time.monotonic() + _LIMIT_S
        self.outcomes = self.records = 0

    def committed_of(self, batch: str) -> int:
        """Captions of the batch that have an outcome."""
        return self._by_batch.get(batch, 0)

    def wait_for(self, is_reached: Callable[[], bool]) -> None:
        """Read on until the condition holds; raises RuntimeError when the point's time is over."""
        while not is_reached():
            for record in self._reader.poll():
                self.records += 1
                self.outcomes += len(record.groups)
                for group in record.groups:
                    self._by_batch[group.batch] = self._by_batch.get(group.batch, 0) + 1
            self._fleet.check()
            if time.monotonic() > self._deadline:
                raise RuntimeError(f"{self.outcomes} outcomes after {_LIMIT_S:.0f} s")
            time.sleep(_POLL_S)


def audit(paths: DatasetPaths, *, promised: int) -> dict[str, int]:
    """Read every shard, record and caption again, and compare them with what was promised.

    Shards must be as they were committed, without a member in them.
    """
    report = verify_dataset(paths, now_s=time.time(), min_age_s=_FOREVER_S)
    damage = [found for found in report.damage if not found.detail.startswith("0 members for ")]
    return {
        "accepted": report.accepted,
        "lost": promised - report.committed,
        "duplicated": report.duplicated + max(0, report.accepted - promised),
        "damaged": len(damage),
    }
