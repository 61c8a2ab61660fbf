"""Runs and probes as files: what was asked for, what is wanted, how it stands, what came out.

    runs/<id>/request.json      what was asked for; written once, by the API
              wanted.json       run or stop, and how often a run was resumed; the API's
              status.json       how far the launcher came with that; the launcher's
              lease, train.lock flock of the launcher, of rank 0 of the train process
              failure.json      last words of a train process that failed
              waiting.txt  what it waits for, while it does; rank 0's
              map.json          its images as a checkpoint sees them; a probe's
              admissions.jsonl  metrics.jsonl  quarantine/  checkpoints/  log.txt
    claims/{runs,probes}/     which id an Idempotency-Key was given; the API's
    probes/<id>/request.json  status.json  result.json  head.safetensors
                          failure.json  lease  log.txt

Each file has one writer and is replaced whole, so no reader ever waits. Needs no torch.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from synthrep_shared.keys import ANONYMOUS
from synthrep_shared.messages import ProbeRequest, RunRequest, State
from synthrep_shared.storage import publish_bytes, sync_folder
from synthrep_trainer.checkpoint_folders import MANIFEST
from synthrep_trainer.claims import Claims
from synthrep_trainer.records import Failure, ProbeRecord, RunRecord, Status, Wanted

_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9]{6}-[0-9a-f]{12}")
_CHECKPOINT = re.compile(rf"runs/({_ID.pattern})/checkpoints/(step-[0-9]{{9}})")
_MAX_ERROR_CHARACTERS = 2000

M = TypeVar("M", bound=BaseModel)


class WorkFolder:
    """What a run's and a probe's folder have in common."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.name
        self.log_file = path / "log.txt"

    @property
    def status(self) -> Status | None:
        """None until a launcher claimed the request."""
        return _read(self.path / "status.json", Status)

    def write_status(self, status: Status) -> None:
        """Replace the status; only the holder of the lease may."""
        error = status.error and status.error[:_MAX_ERROR_CHARACTERS]
        _write(self.path / "status.json", status.model_copy(update={"error": error}))

    @property
    def failure(self) -> Failure | None:
        """None unless the newest process left last words."""
        return _read(self.path / "failure.json", Failure)

    def write_failure(self, failure: Failure) -> None:
        """Leave last words; the first ones since `clear_failure` stand, of several processes."""
        publish_bytes(failure.model_dump_json().encode(), self.path / "failure.json")

    def clear_failure(self) -> None:
        """Forget the last words of an earlier process."""
        (self.path / "failure.json").unlink(missing_ok=True)

    @property
    def lease(self) -> Path:
        """The file whose lock the launcher holds that works on the request."""
        return self.path / "lease"

    def _is_waiting(self, status: Status) -> bool:
        """Queued, or claimed by a launcher that died: the next one goes on with it.

        Or put down just when its user wanted it to go on.
        """
        is_orphan = status.state == "running" and not is_locked(self.lease)
        return status.state in ("queued", "paused") or is_orphan


class RunFolder(WorkFolder):
    """A training run."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.waiting = path / "waiting.txt"

    @property
    def record(self) -> RunRecord:
        """What was asked for; raises FileNotFoundError for a folder that is no run."""
        return RunRecord.model_validate_json((self.path / "request.json").read_bytes())

    @property
    def num_quarantined(self) -> int:
        """Shards that the run does not use because they are not what the log says."""
        return sum(1 for _ in (self.path / "quarantine").glob("[0-9]*.json"))

    @property
    def wanted(self) -> Wanted:
        """What the user wants."""
        return _read(self.path / "wanted.json", Wanted) or Wanted()

    def write_wanted(self, wanted: Wanted) -> None:
        """Replace what is wanted; a launcher sees it at its next sweep."""
        _write(self.path / "wanted.json", wanted)

    @property
    def state(self) -> State:
        """How the run stands, for its user."""
        wanted, status = self.wanted, self.status
        if status is None or status.attempt < wanted.attempt or self._is_waiting(status):
            return "queued" if wanted.verb == "run" else "paused"
        return status.state


class ProbeFolder(WorkFolder):
    """A probe of a checkpoint."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.result = path / "result.json"
        self.head = path / "head.safetensors"

    @property
    def record(self) -> ProbeRecord:
        """What was asked for; raises FileNotFoundError for a folder that is no probe."""
        return ProbeRecord.model_validate_json((self.path / "request.json").read_bytes())

    @property
    def state(self) -> State:
        """How the probe stands."""
        status = self.status
        return "queued" if status is None or self._is_waiting(status) else status.state


W = TypeVar("W", RunFolder, ProbeFolder)


class Workplace:
    """The folder of all runs and probes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._runs, self._probes = root / "runs", root / "probes"
        self.run_claims = Claims(root / "claims" / "runs")
        self.probe_claims = Claims(root / "claims" / "probes")

    def make_folders(self) -> None:
        """Create the folders where they are absent."""
        self._runs.mkdir(parents=True, exist_ok=True)
        self._probes.mkdir(parents=True, exist_ok=True)
        self.run_claims.make_folder()
        self.probe_claims.make_folder()

    def submit_run(
        self, request: RunRequest, *, owner: str = ANONYMOUS, key: str | None = None
    ) -> RunFolder:
        """Make a run durable, once for each key of an owner; it is queued from here on.

        Raises IdempotencyConflictError.
        """
        run_id = new_id()
        if key is not None:
            run_id = self.run_claims.take(owner, key, request, run_id)
        record = RunRecord(id=run_id, request=request, owner=owner, created_at=datetime.now(UTC))
        return RunFolder(_submit(self._runs, record))

    def adopt_run(self, request: RunRequest, fill: Callable[[RunFolder], object]) -> RunFolder:
        """Make a run that was trained elsewhere; it appears when `fill` has put its files there."""
        record = RunRecord(id=new_id(), request=request, created_at=datetime.now(UTC))
        folder = RunFolder(self._runs / record.id)
        try:
            fill(folder)
            folder.write_status(Status(state="completed"))
        except BaseException:
            shutil.rmtree(folder.path, ignore_errors=True)
            raise
        return RunFolder(_submit(self._runs, record))

    def submit_probe(
        self, request: ProbeRequest, *, owner: str = ANONYMOUS, key: str | None = None
    ) -> ProbeFolder:
        """Make a probe durable, once for each key of an owner; it is queued from here on.

        Raises IdempotencyConflictError.
        """
        probe_id = new_id()
        if key is not None:
            probe_id = self.probe_claims.take(owner, key, request, probe_id)
        now = datetime.now(UTC)
        record = ProbeRecord(id=probe_id, request=request, owner=owner, created_at=now)
        return ProbeFolder(_submit(self._probes, record))

    def run(self, run_id: str) -> RunFolder | None:
        """The run of that id, None if there is none."""
        return _find(self._runs, run_id, RunFolder)

    def probe(self, probe_id: str) -> ProbeFolder | None:
        """The probe of that id, None if there is none."""
        return _find(self._probes, probe_id, ProbeFolder)

    def checkpoint(self, path: str) -> Path | None:
        """The checkpoint that the API calls `path`, None if there is none."""
        match = _CHECKPOINT.fullmatch(path)
        found = self._runs / match[1] / "checkpoints" / match[2] if match else None
        return found if found and (found / MANIFEST).exists() else None

    def runs(self) -> list[RunFolder]:
        """All runs, oldest first."""
        return _list(self._runs, RunFolder)

    def probes(self) -> list[ProbeFolder]:
        """All probes, oldest first."""
        return _list(self._probes, ProbeFolder)


def is_id(text: str) -> bool:
    """Whether an id could look like this."""
    return _ID.fullmatch(text) is not None


def new_id() -> str:
    """An id that sorts by time and cannot be guessed."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{secrets.token_hex(6)}"


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a file's lock for the block, or give False if another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether some process holds a file's lock."""
    if not path.exists():
        return False
    with path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _read(path: Path, model: type[M]) -> M | None:
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None


def _write(path: Path, record: BaseModel) -> None:
    publish_bytes(record.model_dump_json().encode(), path, replace=True)


def _submit(folder: Path, record: RunRecord | ProbeRecord) -> Path:
    path = folder / record.id
    path.mkdir(parents=True, exist_ok=True)
    publish_bytes(record.model_dump_json().encode(), path / "request.json")
    sync_folder(folder)
    return path


def _find(folder: Path, name: str, kind: type[W]) -> W | None:
    path = folder / name
    return kind(path) if is_id(name) and (path / "request.json").exists() else None


def _list(folder: Path, kind: type[W]) -> list[W]:
    if not folder.is_dir():
        return []
    entries = (entry for entry in os.scandir(folder) if is_id(entry.name))
    names = sorted(e.name for e in entries if os.path.exists(f"{e.path}/request.json"))
    return [kind(folder / name) for name in names]
