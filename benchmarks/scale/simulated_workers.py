"""Many workers in one process: `python -m benchmarks.scale.simulated_workers COUNT DEVICE_S OUT`.

Each is the real `ChunkWorker` in a thread of its own, with its own connections to Redis: it takes
jobs off RQ, leases, renews, reports, reads the captions, flushes a shard and commits it. Two things
stand for others: the device waits about DEVICE_S for a full job and makes no image, so that shards
are tar files without members, and no child process is around it. The workers of a process share one
view of the commit log and of the intake, which in a real fleet every worker has for itself.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from synthrep_generator.chunks import Chunk
from synthrep_generator.dataset_files import DatasetFiles, OpenDatasets
from synthrep_generator.jobs import JobResult, ShardRequest, make_request, seal
from synthrep_generator.pipe import Finished, Raised
from synthrep_generator.queues import WorkQueue
from synthrep_generator.scheduling import give_way
from synthrep_generator.settings import GeneratorSettings
from synthrep_generator.shard_writer import ShardWriter
from synthrep_generator.supervisor import Outcome, Stopped, Supervisor, Wish
from synthrep_generator.worker import ChunkWorker
from synthrep_shared.commit_log import CommitLog, CommitRecord
from synthrep_shared.errors import SynthRepError
from synthrep_shared.logs import configure_logging

_TICK_S = 1.0  # between two looks at the device; a real worker takes four times as many


class TimedLog(CommitLog):
    """A commit log that keeps how long each append took, its wait for the lock included."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.append_s: list[float] = []

    def append(self, *args: Any, **kwargs: Any) -> CommitRecord:
        """See CommitLog."""
        started = time.perf_counter()
        record = super().append(*args, **kwargs)
        self.append_s.append(time.perf_counter() - started)
        return record


class SharedDatasets:
    """What the workers of this process know of intake and log."""

    def __init__(self, settings: GeneratorSettings) -> None:
        self._open = OpenDatasets(settings.root)
        self._lock = threading.Lock()
        self._logs: dict[str, TimedLog] = {}

    def request(self, chunk: Chunk) -> ShardRequest | None:
        """See make_request; one thread at a time, as intake readers are not for several."""
        with self._lock:
            return make_request(chunk, self._files(chunk.dataset))

    def append_s(self) -> list[float]:
        """Seconds of every commit so far."""
        return [seconds for log in self._logs.values() for seconds in log.append_s]

    def _files(self, dataset: str) -> DatasetFiles:
        files = self._open[dataset]
        if dataset not in self._logs:
            assert isinstance(files.paths.log, Path)
            files.log = self._logs[dataset] = TimedLog(files.paths.log)
        return files


class SimulatedDevice(Supervisor):
    """Waits from half to one and a half of its time in the thread of the worker, makes nothing."""

    def __init__(
        self, settings: GeneratorSettings, datasets: SharedDatasets, *, device_s: float, seed: int
    ) -> None:
        super().__init__(settings)
        self.device = "simulated"
        self._datasets, self._random = datasets, random.Random(seed)
        self._image_s = device_s / settings.job_images

    def tend(self) -> bool:
        """See Supervisor."""
        return True

    def run(self, chunk: Chunk, attend: Callable[[], Wish | None]) -> Outcome:
        """See Supervisor; a wish ends a job with nothing committed."""
        result = JobResult()
        try:
            request = self._datasets.request(chunk)
            if request is not None:
                seconds = self._image_s * sum(group.num_images for group in request.groups)
                if _wait(seconds * self._random.uniform(0.5, 1.5), attend) is not None:
                    return Stopped()
                result = seal_empty(request)
        except (OSError, SynthRepError) as error:
            return Raised(chunk_id=chunk.id, reason=repr(error), retryable=True)
        return Finished(
            chunk_id=chunk.id, stopped=False, device_s=0.0, grown_bytes=0, **result.model_dump()
        )


def _wait(seconds: float, attend: Callable[[], Wish | None]) -> Wish | None:
    """Show life until the time is over or a wish is there, and return that."""
    end = time.monotonic() + seconds
    wish = attend()
    while wish is None and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _TICK_S))
        wish = attend()
    return wish


def seal_empty(request: ShardRequest) -> JobResult:
    """Commit the groups with a shard that has no images, else in the way of a real one."""
    with ShardWriter(request.files.paths.temporary) as writer:
        for group in request.groups:
            writer.add_group(group.gid, ())
        sealed = len(seal(request, writer))
    return JobResult(committed=sealed, images=sealed * request.settings.images_per_prompt)


def serve(settings: GeneratorSettings, *, count: int, device_s: float) -> list[float]:
    """Work with so many workers until SIGTERM; returns the seconds of every commit."""
    datasets = SharedDatasets(settings)
    workers = []
    for number in range(count):
        device = SimulatedDevice(settings, datasets, device_s=device_s, seed=number)
        worker = ChunkWorker(settings, WorkQueue(settings), device)
        worker.name = f"simulated-{os.getpid()}-{number}"  # random ones repeat within a process
        workers.append(worker)
    threads = [threading.Thread(target=worker.serve) for worker in workers]

    def stop(signum: int, frame: object) -> None:
        for worker in workers:
            worker.ask_to_stop(signum, frame)

    signal.signal(signal.SIGTERM, stop)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return datasets.append_s()


def main() -> None:
    """Serve, then leave the times of the commits in the file OUT."""
    settings = GeneratorSettings()
    give_way()  # as real ones do
    configure_logging("simulated-workers", "WARNING")
    append_s = serve(settings, count=int(sys.argv[1]), device_s=float(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(append_s))


if __name__ == "__main__":
    main()
