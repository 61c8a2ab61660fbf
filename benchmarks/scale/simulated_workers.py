"""Many workers in one process: `python -m benchmarks.scale.simulated_workers COUNT DEVICE_S OUT`.

Each is the real `ChunkWorker` in a thread of its own, with its own connections to Redis: it takes
jobs off RQ, leases, renews, reports, runs the real `generate_shard` and commits. Two things stand
for others: the device waits about DEVICE_S for a full job and gives one picture of 8 px for every
image, and no child process is around it. The workers of a process share one view of the commit log
and of the intake, which in a real fleet every worker has for itself.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from synthrep_generator.chunks import Chunk, Place
from synthrep_generator.dataset_files import DatasetFiles, OpenDatasets
from synthrep_generator.jobs import (
    Bench,
    JobResult,
    JobStoppedError,
    ShardRequest,
    generate_shard,
    make_request,
)
from synthrep_generator.model_files import find_model
from synthrep_generator.pipe import Finished, Raised
from synthrep_generator.queues import WorkQueue
from synthrep_generator.scheduling import work_in_stretches
from synthrep_generator.settings import GeneratorSettings
from synthrep_generator.supervisor import Outcome, Supervisor, Wish
from synthrep_generator.synthesis import FakeSynthesizer, ImageTask, Pixels, Recipe
from synthrep_generator.worker import ChunkWorker
from synthrep_shared.commit_log import CommitLog, CommitRecord
from synthrep_shared.errors import SynthRepError
from synthrep_shared.logs import configure_logging

STORE_PX = 8
_TICK_S = 1.0  # between two looks at the device; a real worker takes four times as many
_PIXELS = np.arange(STORE_PX * STORE_PX * 3, dtype=np.uint8).reshape(STORE_PX, STORE_PX, 3)


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


class WaitingSynthesizer(FakeSynthesizer):
    """Takes from half to one and a half of its time, and gives the same picture for everything."""

    def __init__(self, *, image_s: float, batch_images: int, seed: int) -> None:
        super().__init__(store_px=STORE_PX, batch_images=batch_images)
        self._image_s, self._random = image_s, random.Random(seed)

    def generate(
        self, tasks: Sequence[ImageTask], recipe: Recipe, on_step: Callable[[], None]
    ) -> list[Any]:
        """See Synthesizer."""
        end = time.monotonic() + self._image_s * len(tasks) * self._random.uniform(0.5, 1.5)
        on_step()
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _TICK_S))
            on_step()
        pictures: list[Pixels] = [_PIXELS] * len(tasks)
        return pictures


class _Watch:
    """Passes a job's progress on to its worker, and the worker's wish to the job."""

    def __init__(self, attend: Callable[[], Wish | None]) -> None:
        self._attend = attend
        self.is_stopped = False

    def begin(self, places: Sequence[Place]) -> None:
        """See jobs.Watch."""

    def step(self) -> None:
        """See jobs.Watch."""
        wish = self._attend()
        if wish is not None:
            self.is_stopped = True
            raise JobStoppedError(discard=wish is Wish.DROP)


class SimulatedDevice(Supervisor):
    """Runs chunks in the thread of the worker; there is no process to watch."""

    def __init__(
        self, settings: GeneratorSettings, datasets: SharedDatasets, *, device_s: float, seed: int
    ) -> None:
        super().__init__(settings)
        self.device = "simulated"
        self._datasets = datasets
        self._model = next(iter(settings.models))
        self._synthesizer = WaitingSynthesizer(
            image_s=device_s / settings.job_images, batch_images=settings.job_images, seed=seed
        )

    def tend(self) -> bool:
        """See Supervisor."""
        return True

    def run(self, chunk: Chunk, attend: Callable[[], Wish | None]) -> Outcome:
        """See Supervisor."""
        watch, result = _Watch(attend), JobResult()
        bench = Bench(
            synthesizer=self._synthesizer,
            model=find_model(self._settings, self._model),
            image_format=self._settings.image_format,
            quality=self._settings.jpeg_quality,
            watch=watch,
        )
        try:
            request = self._datasets.request(chunk)
            if request is not None:
                result = generate_shard(request, bench)
        except (OSError, SynthRepError) as error:
            return Raised(chunk_id=chunk.id, reason=repr(error), retryable=True)
        return Finished(
            chunk_id=chunk.id,
            stopped=watch.is_stopped,
            device_s=0.0,
            grown_bytes=0,
            **result.model_dump(),
        )


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
    work_in_stretches()  # as real ones do
    configure_logging("simulated-workers", "WARNING")
    append_s = serve(settings, count=int(sys.argv[1]), device_s=float(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(append_s))


if __name__ == "__main__":
    main()
