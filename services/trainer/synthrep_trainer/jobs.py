"""What the launcher does for one request: its process from the claim to the last status."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from abc import ABC, abstractmethod

from synthrep_shared.messages import ProbeRequest, State
from synthrep_trainer.checkpoint_folders import list_checkpoints
from synthrep_trainer.child import DISK_FULL, Child
from synthrep_trainer.records import Status
from synthrep_trainer.runs import ProbeFolder, RunFolder, Workplace, locked
from synthrep_trainer.settings import TrainerSettings

_log = logging.getLogger(__name__)
_ROOM_S = 20.0  # between two looks whether there is room again


class Job(ABC):
    """A request whose lease this process holds, and the child that works on it, if one runs."""

    folder: RunFolder | ProbeFolder
    attempt = 1

    def __init__(self, settings: TrainerSettings) -> None:
        self._settings = settings
        self._lease = contextlib.ExitStack()
        self._child: Child | None = None
        self._is_to_stop = False
        self._progress: tuple[int, ...] = ()
        self._restarts = 0
        self._start_at = 0.0

    def claim(self) -> bool:
        """Take the lease and say so in the status; False if another process has it."""
        with contextlib.ExitStack() as lease:
            if not lease.enter_context(locked(self.folder.lease)):
                return False
            self.folder.write_status(Status(state="running", attempt=self.attempt))
            self._progress = self._measure_progress()
            self._lease = lease.pop_all()
        _log.info("request_claimed", extra={"id": self.folder.id, "attempt": self.attempt})
        return True

    def stop(self) -> None:
        """End the child, to leave the request to another launcher."""
        self._is_to_stop = True

    def look_after(self) -> bool:
        """Start, watch or stop the child; False once the request's last status is written, or
        somebody deleted its folder."""
        if not self.folder.lease.exists():
            return self._abandon()
        is_wanted = self._is_wanted() and not self._is_to_stop
        if self._child is None:
            if not is_wanted:
                return self._end("queued" if self._is_wanted() else "paused")
            if time.monotonic() >= self._start_at:
                self._start()
            return True
        status = self._child.poll()
        if status is None:
            if not is_wanted:
                self._child.stop(grace_s=self._settings.grace_s)
            return True
        return self._after_exit(self._child, status)

    def _start(self) -> None:
        self.folder.clear_failure()
        self._child = Child(self._command(), self.folder.log_file)
        _log.info("child_started", extra={"id": self.folder.id, "pid": self._child.pid})

    def _after_exit(self, child: Child, status: int) -> bool:
        if self._is_completed(status):
            return self._end("completed")
        if child.is_stopping:
            return self._end("queued" if self._is_wanted() else "paused")
        if status == DISK_FULL:
            return self._start_again(_ROOM_S)
        failure = self.folder.failure
        error = failure.error if failure else child.last_words()
        progress = self._measure_progress()
        if progress != self._progress:
            self._progress, self._restarts = progress, 0
        _log.error("child_failed", extra={"id": self.folder.id, "error": error})
        if (failure and failure.is_permanent) or self._restarts >= self._settings.max_restarts:
            return self._end("failed", error)
        self._restarts += 1
        return self._start_again(self._settings.sweep_s * 2 ** (self._restarts - 1))

    def _start_again(self, pause_s: float) -> bool:
        self._start_at = time.monotonic() + pause_s
        self._child = None
        return True

    def _end(self, state: State, error: str | None = None) -> bool:
        self.folder.write_status(Status(state=state, attempt=self.attempt, error=error))
        self._lease.close()
        _log.info("request_ended", extra={"id": self.folder.id, "state": state})
        return False

    def _abandon(self) -> bool:
        if self._child is not None:
            self._child.kill()
        self._lease.close()
        _log.error("request_deleted", extra={"id": self.folder.id})
        return False

    def _is_wanted(self) -> bool:
        return True

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    def _is_completed(self, status: int) -> bool: ...

    @abstractmethod
    def _measure_progress(self) -> tuple[int, ...]:
        """Differs from before if starting again is getting somewhere."""


class RunJob(Job):
    """A training run."""

    folder: RunFolder

    def __init__(self, folder: RunFolder, settings: TrainerSettings, place: Workplace) -> None:
        super().__init__(settings)
        self.folder = folder
        self.attempt = folder.wanted.attempt
        self._place = place
        self._record = folder.record
        self._probed_step = self._newest_step()

    def _command(self) -> list[str]:
        module = ["synthrep_trainer.train", "--run", str(self.folder.path)]
        processes = self._settings.processes_per_run
        if processes == 1:
            return [sys.executable, "-m", *module]
        # Without the --, torchrun takes --run for a short form of its own --run-path.
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return [sys.executable, "-m", *torchrun, "--module", "--", *module]

    def _is_wanted(self) -> bool:
        return self.folder.wanted.verb == "run"

    def _is_completed(self, status: int) -> bool:
        return status == 0 and self._newest_step() >= self._record.max_steps

    def _measure_progress(self) -> tuple[int, ...]:
        return self._newest_step(), self.folder.num_quarantined

    def look_after(self) -> bool:
        """As of any request; asks for the probes that a new checkpoint calls for, too."""
        self._ask_for_probes()
        return super().look_after()

    def _ask_for_probes(self) -> None:
        every = self._record.request.probe_every
        if every is None:
            return
        step = self._newest_step()
        if step // every > self._probed_step // every:
            for dataset in self._record.request.probe_datasets:
                request = ProbeRequest(run_id=self.folder.id, dataset=dataset)
                key = f"{self.folder.id} {step} {dataset}"  # if storage ends this half-way
                self._place.submit_probe(request, owner=self._record.owner, key=key)
        self._probed_step = max(step, self._probed_step)

    def _newest_step(self) -> int:
        return max((c.step for c in list_checkpoints(self.folder.checkpoints)), default=0)


class ProbeJob(Job):
    """A probe of a checkpoint."""

    folder: ProbeFolder

    def __init__(self, folder: ProbeFolder, settings: TrainerSettings) -> None:
        super().__init__(settings)
        self.folder = folder

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "synthrep_trainer.probes", "--probe", str(self.folder.path)]

    def _is_completed(self, status: int) -> bool:
        return status == 0 and self.folder.result.exists()

    def _measure_progress(self) -> tuple[int, ...]:
        return ()
