"""The worker's side of the device process: starts it, watches it, replaces it.

The process outlives jobs, so that the model is loaded once, and dies alone: a crash or a hang in
native code costs one run. The clock here is a wall clock that no library can swallow.
"""

from __future__ import annotations

import enum
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from synthrep_generator.chunks import Chunk, Place
from synthrep_generator.pipe import (
    Beat,
    Channel,
    Finished,
    LoadModel,
    Message,
    Raised,
    Ready,
    RunChunk,
    StopChunk,
)
from synthrep_generator.settings import GeneratorSettings
from synthrep_generator.worker_figures import WorkerFigures
from synthrep_shared.tracing import make_tracer

logger = logging.getLogger(__name__)

_TICK_S = 0.25
_STOP_S = 15.0  # what a job gets to seal what it has
_EXIT_S = 2.0
_MAX_FAILED_STARTS = 3
_MAX_DEVICE_FAULTS = 3  # in a row, of chunks that are not to blame
_SLOWEST = 0.99
_PATIENCE = 3  # times the slowest usual pause between two signs of progress


class Wish(enum.Enum):
    """What the worker wants of the run at hand."""

    SEAL = "end and commit what is complete"
    DROP = "end and commit nothing"


@dataclass(frozen=True)
class Crashed:
    """The device process died or was killed; `active` prompts were in work, none if none can be."""

    reason: str
    active: frozenset[Place]


@dataclass(frozen=True)
class Stopped:
    """The run was ended on the worker's wish, with nothing committed."""


Outcome = Finished | Raised | Crashed | Stopped


@dataclass
class _Run:
    chunk_id: str
    started_at: float
    heard_at: float
    is_ready: bool = False
    active: frozenset[Place] = frozenset()
    stop_by: float | None = None


class _Process:
    """A started device process and the channel to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "synthrep_generator.device_process",
                 str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        self.channel = Channel(ours)

    @property
    def is_alive(self) -> bool:
        return self._popen.poll() is None

    def end(self, *, grace_s: float = 0.0) -> int:
        """Close the channel, wait, kill what is left; returns the exit status."""
        self.channel.close()
        try:
            return self._popen.wait(grace_s)
        except subprocess.TimeoutExpired:
            os.killpg(self._popen.pid, signal.SIGKILL)
            return self._popen.wait()


class Supervisor:
    """Keeps one device process and runs chunks on it, one at a time; for one thread."""

    def __init__(
        self, settings: GeneratorSettings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings, self._clock = settings, clock
        self._process: _Process | None = None
        self._was_ready = False
        self._started_at, self._has_answered = 0.0, False
        self._failed_starts = 0
        self._faulty_chunk, self._device_faults = "", 0
        self._pauses: deque[float] = deque(maxlen=512)
        self.device = ""
        self.figures, self._tracer = WorkerFigures(), make_tracer("generator-worker")

    @property
    def is_broken(self) -> bool:
        """Whether several processes in a row died, or met faults, whatever they were to do."""
        is_faulty = self._device_faults >= _MAX_DEVICE_FAULTS
        return is_faulty or self._failed_starts >= _MAX_FAILED_STARTS

    def tend(self) -> bool:
        """Between runs: start a process if there is none, and have it load the first model.

        Returns whether the process has said that it is ready, or why it is not.
        """
        try:
            if self._process is None and not self.is_broken:
                self._start().channel.send(LoadModel(alias=next(iter(self._settings.models))))
            while self._process and (message := self._process.channel.receive(0)):
                self._note(message)
        except (EOFError, OSError):
            self._bury()
        if not self._has_answered and self._clock() - self._started_at > self._settings.job_limit_s:
            self._bury()
        return self._has_answered

    def run(self, chunk: Chunk, attend: Callable[[], Wish | None]) -> Outcome:
        """Run a chunk and wait for its end; `attend` is called several times a second."""
        started_at = self._clock()
        with self.figures.leases_held.track_inprogress():
            outcome = self._run(chunk, attend)
        seconds = self._clock() - started_at
        self.figures.ran(outcome, seconds)
        self._trace(chunk, outcome, seconds)
        return outcome

    def _trace(self, chunk: Chunk, outcome: Outcome, seconds: float) -> None:
        facts = chunk.names | {"end": type(outcome).__name__.lower()}
        if isinstance(outcome, Finished):
            facts |= outcome.model_dump(include={"committed", "failed", "images"})
        first, *others = facts.pop("batches")
        self._tracer.record("run chunk", about=first, seconds=seconds, links=others, **facts)

    def _run(self, chunk: Chunk, attend: Callable[[], Wish | None]) -> Outcome:
        process = self._process or self._start()
        now = self._clock()
        run = _Run(chunk.id, started_at=now, heard_at=now)
        try:
            process.channel.send(RunChunk(chunk=chunk))
            while True:
                message = process.channel.receive(_TICK_S)
                outcome = self._hear(run, message) or self._watch(run) or self._heed(run, attend())
                if outcome is not None:
                    return outcome
        except (EOFError, OSError):
            return Crashed(f"the device process ended with status {self._bury()}", run.active)

    def close(self) -> None:
        """End the process; it commits nothing that it has not committed."""
        if self._process is not None:
            self._process.end(grace_s=_EXIT_S)
            self._process = None

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.end()
            self._process, self._has_answered = None, False

    def _start(self) -> _Process:
        self._was_ready = self._has_answered = False
        self._started_at = self._clock()
        self._process = _Process()
        self.figures.count("device_starts")
        return self._process

    def _bury(self) -> int:
        """Forget a process that is gone or beyond help; returns its exit status."""
        if self._process is None:
            return 0
        status = self._process.end()
        self._process, self._has_answered = None, False
        self._failed_starts = 0 if self._was_ready else self._failed_starts + 1
        self.figures.count("device_losses")
        logger.warning("device process ended", extra={"status": status})
        return status

    def _note(self, message: Message) -> None:
        self._has_answered = True
        if isinstance(message, Ready):
            self._was_ready, self.device = True, message.device
        elif isinstance(message, Raised):
            logger.error("device process reported", extra={"reason": message.reason})

    def _hear(self, run: _Run, message: Message | None) -> Outcome | None:
        if message is None:
            return None
        self._note(message)
        now = self._clock()
        if isinstance(message, Beat):
            self._pauses.append(now - run.heard_at)
            run.active = frozenset(Place(batch, index) for batch, index in message.active)
        elif isinstance(message, Ready):
            run.is_ready = run.is_ready or message.chunk_id == run.chunk_id
        elif isinstance(message, Finished) and message.chunk_id == run.chunk_id:
            self._replace_if_grown(message)
            if message.images:
                self._faulty_chunk, self._device_faults = "", 0
            return message
        elif isinstance(message, Raised) and message.chunk_id == run.chunk_id:
            if message.is_out_of_memory:
                self.figures.count("out_of_memory")
            if message.retryable:
                return message
            self._bury()
            return Crashed(message.reason, self._suspects(run, message))
        run.heard_at = now
        return None

    def _replace_if_grown(self, message: Finished) -> None:
        if message.grown_bytes > self._settings.max_growth_bytes:
            logger.warning("device process grew", extra={"grown_bytes": message.grown_bytes})
            self.close()
            self._has_answered = False

    def _suspects(self, run: _Run, message: Raised) -> frozenset[Place]:
        """The prompts that may be to blame for an error that ended the process.

        None for a fault of the device that follows on one of another chunk, with no image made in
        between. One that a chunk meets again and again is held against it: each new process has
        made an image before.
        """
        if not message.is_device_fault:
            return run.active
        is_suspect = self._faulty_chunk in ("", run.chunk_id)
        self._faulty_chunk = run.chunk_id
        if is_suspect:
            return run.active
        self._device_faults += 1
        return frozenset()

    def _watch(self, run: _Run) -> Outcome | None:
        """Kill a process that takes too long, for one of three reasons."""
        now = self._clock()
        limit_s = self._settings.job_limit_s
        if now - run.started_at > limit_s:
            reason = f"the job took longer than {limit_s:g} s"
        elif run.is_ready and now - run.heard_at > self._hang_limit_s():
            reason = f"no progress for {now - run.heard_at:.0f} s"
        elif run.stop_by is not None and now > run.stop_by:
            self.kill()
            return Stopped()
        else:
            return None
        self._bury()
        return Crashed(reason, run.active)

    def _hang_limit_s(self) -> float:
        pauses = sorted(self._pauses)
        usual_s = pauses[int(_SLOWEST * len(pauses))] if pauses else 0.0
        return max(self._settings.hang_s, _PATIENCE * usual_s)

    def _heed(self, run: _Run, wish: Wish | None) -> Outcome | None:
        if wish is None or run.stop_by is not None or self._process is None:
            return None
        if not run.is_ready:
            self.kill()  # it is loading the model and would not hear
            return Stopped()
        run.stop_by = self._clock() + _STOP_S
        stop = StopChunk(chunk_id=run.chunk_id, discard=wish is Wish.DROP)
        self._process.channel.send(stop)
        return None
