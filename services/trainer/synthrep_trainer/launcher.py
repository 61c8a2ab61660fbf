"""The launcher: claims runs and probes by lease and spawns a process for each.

    python -m synthrep_trainer.launcher

Any number of launchers may share one folder: the flock of a request's `lease` says whose it is, and
ends with its holder. A process that dies is started again, a bounded number of times in a row
without progress, unless it said itself that trying again cannot help. SIGTERM stops the children,
which write their checkpoints first, and leaves their requests to the next launcher.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from functools import partial
from pathlib import Path

from prometheus_client import Counter, Gauge
from pydantic import ValidationError

from synthrep_shared.exposition import exposed, make_registry
from synthrep_shared.heartbeat import Heartbeat
from synthrep_shared.logs import configure_logging
from synthrep_trainer.jobs import Job, ProbeJob, RunJob
from synthrep_trainer.runs import ProbeFolder, RunFolder, Workplace
from synthrep_trainer.settings import TrainerSettings

_log = logging.getLogger(__name__)
_PREFIX = "synthrep_trainer_launcher_"
_PARTING_S = 2.0  # past the grace of the children


class Launcher:
    """Works on the requests of one folder; `sweep` is one look at everything."""

    def __init__(self, settings: TrainerSettings) -> None:
        self._settings = settings
        self._place = Workplace(settings.runs)
        self._place.make_folders()
        self._jobs: list[Job] = []
        self._over: set[Path] = set()  # completed for good, or of another version
        self.registry = make_registry()
        count = partial(Counter, registry=self.registry)
        self.sweeps = count(_PREFIX + "sweeps", "Looks at requests and children.")
        self.failed_sweeps = count(
            _PREFIX + "failed_sweeps", "Looks at all requests, or at one, that storage ended."
        )
        children = Gauge(_PREFIX + "jobs", "Requests in hand.", ["kind"], registry=self.registry)
        for kind, job_type in (("run", RunJob), ("probe", ProbeJob)):
            children.labels(kind).set_function(partial(self._count, job_type))

    def sweep(self) -> None:
        """Look after the children, then claim what is queued; never waits for a child."""
        self._look_after()
        room = self._settings.max_runs - self._count(RunJob)
        for run in self._place.runs():
            if room > 0 and self._claim(run):
                room -= 1
        room = self._settings.max_probes - self._count(ProbeJob)
        for probe in self._place.probes():
            if room > 0 and self._claim(probe):
                room -= 1

    def close(self) -> None:
        """Stop the children and give the leases back; takes up to the grace period."""
        for job in self._jobs:
            job.stop()
        deadline = time.monotonic() + self._settings.grace_s + _PARTING_S
        while self._jobs and time.monotonic() < deadline:
            self._look_after()
            time.sleep(0.02)

    def _count(self, job_type: type[Job]) -> int:
        return sum(isinstance(job, job_type) for job in list(self._jobs))

    def _look_after(self) -> None:
        for job in list(self._jobs):
            try:
                is_done = not job.look_after()
            except (OSError, ValidationError):
                self._note_failure("request_not_looked_after", job.folder)
                continue
            if is_done:
                self._jobs.remove(job)

    def _claim(self, folder: RunFolder | ProbeFolder) -> bool:
        if folder.path in self._over:
            return False
        job: Job
        try:
            state = folder.state
            if state == "completed":
                self._over.add(folder.path)
            if state != "queued":
                return False
            if isinstance(folder, RunFolder):
                job = RunJob(folder, self._settings, self._place)
            else:
                job = ProbeJob(folder, self._settings)
            is_ours = job.claim()
        except ValidationError:
            self._over.add(folder.path)
            _log.exception("request_unreadable", extra={"id": folder.id})
            return False
        except OSError:
            self._note_failure("request_not_claimed", folder)
            return False
        if is_ours:
            self._jobs.append(job)
        return is_ours

    def _note_failure(self, what: str, folder: RunFolder | ProbeFolder) -> None:
        """One request keeps no other one waiting; the next sweep looks again."""
        self.failed_sweeps.inc()
        _log.exception(what, extra={"id": folder.id})


def main() -> None:
    """Sweep until SIGTERM or SIGINT."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    settings = TrainerSettings()
    configure_logging("trainer", settings.log_level)
    _log.info("launcher_started", extra={"settings": settings.model_dump(mode="json")})
    launcher, heartbeat = Launcher(settings), Heartbeat(settings.heartbeat)
    with exposed(launcher.registry, settings.host, settings.metrics_ports()):
        while not stop.is_set():
            heartbeat.beat("up")
            try:
                launcher.sweep()
                launcher.sweeps.inc()
            except OSError:
                launcher.failed_sweeps.inc()
                _log.exception("sweep_failed")  # no folder of requests, say
            stop.wait(settings.sweep_s)
        launcher.close()
    _log.info("launcher_stopped")


if __name__ == "__main__":
    main()
