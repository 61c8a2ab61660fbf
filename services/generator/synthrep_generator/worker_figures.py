"""What a worker has done, for Prometheus: its runs, its device process, its leases.

The supervisor and the worker count here as things happen; `exposition` shows it. Nothing waits for
a scrape. What the whole service has committed is the API's to tell, from files.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from synthrep_generator.pipe import Finished
from synthrep_shared.exposition import make_registry

_PREFIX = "synthrep_generator_worker_"
STATES = ("starting", "idle", "waiting", "running")
_TOTALS = {
    "images": "Images committed.",
    "groups": "Groups committed.",
    "failed_prompts": "Prompts whose failure was recorded.",
    "denoise_seconds": "Time spent on denoising.",
    "decode_seconds": "Time spent on decoding that denoising did not hide.",
    "write_seconds": "Time from the last image of a run to its commit.",
    "out_of_memory": "Passes through the device that its memory was too small for.",
    "device_starts": "Starts of the device process, the first one included.",
    "device_losses": "Device processes that died or were given up.",
    "leases_lost": "Runs dropped because another worker had taken the lease.",
}


class WorkerFigures:
    """The series of one worker, in a registry of their own; for any thread."""

    def __init__(self) -> None:
        self.registry = make_registry()
        self._totals = {
            name: Counter(_PREFIX + name, text, registry=self.registry)
            for name, text in _TOTALS.items()
        }
        self._filtered = Counter(
            _PREFIX + "filtered_images",
            "Images that a quality gate refused.",
            ["check"],
            registry=self.registry,
        )
        self._runs = Counter(
            _PREFIX + "runs", "Runs of chunks by how they ended.", ["end"], registry=self.registry
        )
        self._run_s = Counter(
            _PREFIX + "run_seconds", "Time spent on runs.", registry=self.registry
        )
        self._batch_images = Gauge(
            _PREFIX + "batch_images", "Images in one pass of the device.", registry=self.registry
        )
        self.leases_held = Gauge(
            _PREFIX + "leases_held", "Chunks in this worker's hands.", registry=self.registry
        )
        self._state = Gauge(
            _PREFIX + "state", "1 for the worker's state.", ["state"], registry=self.registry
        )
        self.be("starting")

    def be(self, state: str) -> None:
        """Show the worker in one of STATES."""
        for name in STATES:
            self._state.labels(name).set(name == state)

    def count(self, name: str) -> None:
        """One more of a total."""
        self._totals[name].inc()

    def ran(self, outcome: object, seconds: float) -> None:
        """Count a run by how it ended, with what the device process says of it."""
        end = type(outcome).__name__.lower()
        if isinstance(outcome, Finished):
            self._add(outcome)
            end = "stopped" if outcome.stopped else end
        self._runs.labels(end).inc()
        self._run_s.inc(max(0.0, seconds))

    def _add(self, run: Finished) -> None:
        figures = {
            "images": run.images,
            "groups": run.committed,
            "failed_prompts": run.failed,
            "denoise_seconds": max(0.0, run.device_s - run.decode_s),
            "decode_seconds": run.decode_s,
            "write_seconds": run.write_s,
            "out_of_memory": run.out_of_memory,
        }
        for name, value in figures.items():
            self._totals[name].inc(value)
        for check, images in run.filtered.items():
            self._filtered.labels(check).inc(images)
        if run.batch_images:
            self._batch_images.set(run.batch_images)
