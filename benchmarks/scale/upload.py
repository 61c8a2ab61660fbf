"""Many captions in one streamed upload: memory, answers and time.

`python -m benchmarks.scale.upload [PROMPTS]` prints a line for each number of workers. Every prompt
is one image; the device is a stub of 0 ms that writes a real JPEG. The client and all services
share the machine's cores with whatever else runs; how much that was is measured too.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

import httpx

from benchmarks.scale.status_polls import start_polls, take_polls
from benchmarks.services import Services
from benchmarks.uploads import body, upload
from synthrep_shared.commit_log import LogReader
from synthrep_shared.storage import DatasetPaths

DATASET = "upload"
_POLL_S = 0.05
_LIMIT_S = 1200.0


@dataclass(frozen=True)
class UploadFigures:
    """What one run showed; MB are 10^6 bytes, times of an answer milliseconds."""

    prompts: int
    workers: int
    accepted_s: float
    committed_s: float
    api_growth_mb: float
    redis_peak_mb: float
    status_p50_ms: float
    status_p95_ms: float
    status_p99_ms: float
    status_max_ms: float
    polls: int
    other_load_cores: float
    store_px: int = 32

    def __str__(self) -> str:
        return (
            f"{self.prompts} prompts, {self.workers} worker(s), {self.store_px} px JPEG: "
            f"accepted after {self.accepted_s:.1f} s, "
            f"all committed after {self.committed_s:.1f} s; "
            f"API grew by {self.api_growth_mb:.1f} MB, Redis' peak {self.redis_peak_mb:.1f} MB; "
            f"status p50 {self.status_p50_ms:.1f} p95 {self.status_p95_ms:.1f} "
            f"p99 {self.status_p99_ms:.1f} max {self.status_max_ms:.1f} ms, {self.polls} polls; "
            f"others used {self.other_load_cores:.2f} cores"
        )


def measure_upload(prompts: int, *, workers: int, folder: Path) -> UploadFigures:
    """Upload `prompts` captions and wait until each has its group; raises if one has not."""
    with Services(folder, workers=workers, synthesizer="fake", device="cpu") as services:
        busy = BusyClock()
        started = time.monotonic()
        monitor = _Monitor(services)
        threading.Thread(target=monitor.watch_memory, daemon=True).start()
        batch = upload(
            services.url, body(prompts), prompts=prompts, dataset=DATASET, images_per_prompt=1
        )
        accepted_s = time.monotonic() - started
        with start_polls(services.api_port, batch) as client:
            try:
                _wait_for_groups(services, prompts)
                committed_s = time.monotonic() - started
                status_ms = take_polls(client)
            finally:
                client.kill()
        monitor.stopped.set()
        peak: int = services.redis.info("memory")["used_memory_peak"]
        state = httpx.get(f"{services.url}/v1/batches/{batch}").json()
    if state["prompts"]["committed"] != prompts:
        raise RuntimeError(f"the API says {state}")
    centiles = quantiles(status_ms, n=100, method="inclusive")
    return UploadFigures(
        prompts=prompts,
        workers=workers,
        accepted_s=accepted_s,
        committed_s=committed_s,
        api_growth_mb=monitor.growth_bytes / 1e6,
        redis_peak_mb=peak / 1e6,
        status_p50_ms=centiles[49],
        status_p95_ms=centiles[94],
        status_p99_ms=centiles[98],
        status_max_ms=max(status_ms),
        polls=len(status_ms),
        other_load_cores=busy.others_cores(),
    )


def _wait_for_groups(services: Services, prompts: int) -> None:
    """Follow the log itself until it has every prompt once."""
    paths = DatasetPaths(services.settings.root, DATASET)
    reader, seen = LogReader(paths.log), set[int]()
    deadline = time.monotonic() + _LIMIT_S
    while len(seen) < prompts:
        for record in reader.poll():
            indices = {group.index for group in record.groups}
            if record.kind != "shard" or indices & seen:
                raise RuntimeError(f"record {record.seq} repeats or fails prompts")
            seen |= indices
        services.check()
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(seen)} of {prompts} after {_LIMIT_S:.0f} s")
        time.sleep(0.25)


@dataclass
class _Monitor:
    """Watches the API from outside."""

    services: Services
    stopped: threading.Event = field(default_factory=threading.Event)
    growth_bytes: int = 0

    def watch_memory(self) -> None:
        """Until stopped, note how far the API's resident memory is above its start."""
        pid = self.services.pid("api")
        before = resident_bytes(pid)
        while not self.stopped.wait(_POLL_S):
            self.growth_bytes = max(self.growth_bytes, resident_bytes(pid) - before)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class BusyClock:
    """How much of the cores went to processes that are not this one or its children."""

    def __init__(self) -> None:
        self._started = (time.monotonic(), _machine_cpu_s(), _own_cpu_s())

    def others_cores(self) -> float:
        """Cores, on average; call when this process's children have ended and been waited for."""
        wall, machine, own = self._started
        spent = _machine_cpu_s() - machine - (_own_cpu_s() - own)
        return max(0.0, spent / (time.monotonic() - wall))


def _machine_cpu_s() -> float:
    user, nice, system = Path("/proc/stat").read_text().split(maxsplit=4)[1:4]
    return (int(user) + int(nice) + int(system)) / 100


def _own_cpu_s() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def main() -> None:
    """Measure once for each number of workers, one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", type=int, nargs="?", default=270_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--keep", type=Path, help="an absent folder to keep logs and shards in")
    options = parser.parse_args()
    for workers in options.workers:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (options.keep or Path(temporary)) / f"workers-{workers}"
            folder.mkdir(parents=True)
            print(measure_upload(options.prompts, workers=workers, folder=folder), flush=True)


if __name__ == "__main__":
    main()
