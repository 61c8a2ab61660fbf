"""Checkpoint folders without their tensors: which are complete, which is newest, which may go.

A checkpoint is a folder `step-<9 digits>` whose `manifest.json` has every other file with its size
and sha256. It is written aside, flushed to disk, and renamed when whole; the manifest is its last
file. Needs no torch, so the API lists checkpoints too.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from synthrep_shared.failpoints import failpoint
from synthrep_shared.storage import sync_folder, temporary_path
from synthrep_trainer.errors import NoCheckpointError

VERSION = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"^step-([0-9]{9})$")


class FileEntry(BaseModel):
    """Size and hex sha256 of one file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a complete checkpoint holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = VERSION
    step: int
    created_at: datetime
    files: dict[str, FileEntry]
    knn_accuracy: float | None = None
    """Of held-out captions, 0 to 1, as last looked at since the checkpoint before; None: never."""


@dataclass(frozen=True)
class CheckpointFolder:
    """A folder with a manifest; `sha256` is the manifest's, and so stands for all its files."""

    path: Path
    manifest: Manifest
    sha256: str

    @property
    def step(self) -> int:
        return self.manifest.step

    def read_verified(self) -> dict[str, bytes]:
        """The files by name; raises NoCheckpointError if one is not what the manifest says."""
        files = {}
        for name, entry in self.manifest.files.items():
            try:
                data = (self.path / name).read_bytes()
            except FileNotFoundError:
                raise NoCheckpointError(f"{self.path}: {name} is missing") from None
            if hashlib.sha256(data).hexdigest() != entry.sha256:
                raise NoCheckpointError(f"{self.path}: the sha256 of {name} is wrong")
            files[name] = data
        return files


def open_checkpoint(path: Path) -> CheckpointFolder:
    """The checkpoint at `path`; raises NoCheckpointError if it has no valid manifest.

    Other OSErrors come as they are: a disk that cannot be read says nothing about the checkpoint.
    """
    try:
        data = (path / MANIFEST).read_bytes()
        manifest = Manifest.model_validate_json(data)
    except (FileNotFoundError, NotADirectoryError, ValidationError) as error:
        raise NoCheckpointError(f"{path} has no readable manifest") from error
    if manifest.version != VERSION:
        raise NoCheckpointError(f"{path}: version {manifest.version} is not {VERSION}")
    if any("/" in name or name.startswith(".") for name in manifest.files):
        raise NoCheckpointError(f"{path}: the manifest names files outside of the folder")
    return CheckpointFolder(path, manifest, hashlib.sha256(data).hexdigest())


def list_checkpoints(folder: Path) -> list[CheckpointFolder]:
    """The checkpoints in `folder` by step, oldest first; their files are not verified."""
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.iterdir()):
        if _NAME.match(path.name):
            try:
                found.append(open_checkpoint(path))
            except NoCheckpointError:
                continue
    return found


def publish_checkpoint(folder: Path, files: dict[str, bytes], manifest: Manifest) -> Path:
    """Write a checkpoint so that it is whole and durable under its name, or absent."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{manifest.step:09d}"
    final, written = folder / name, temporary_path(folder, name)
    written.mkdir()
    description = manifest.model_dump_json(exclude_none=True).encode()
    try:
        for file, data in [*files.items(), (MANIFEST, description)]:
            with (written / file).open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            failpoint("checkpoint-half-written")
        sync_folder(written)
        failpoint("checkpoint-written")
        _remove(final)  # a broken one: its step was trained again
        written.rename(final)
        failpoint("checkpoint-renamed")
        sync_folder(folder)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return final


def retire_checkpoints(folder: Path, *, step: int, keep: int, keep_every: int) -> None:
    """Delete all but the newest `keep`, those at multiples of `keep_every` (0: none) and the best.

    The best has the highest `knn_accuracy`, and of equals is the newest; without any there is none.
    The newest is that of `step`: later ones were passed over when the run went on from before them,
    and stay until their step is taken again. What a killed process left half written or half
    deleted goes too.
    """
    for path in folder.glob(".*.part"):
        shutil.rmtree(path, ignore_errors=True)
    checkpoints = [c for c in list_checkpoints(folder) if c.step <= step]
    best = max(checkpoints, key=_merit, default=None)
    for checkpoint in checkpoints[:-keep]:
        is_best = checkpoint is best and checkpoint.manifest.knn_accuracy is not None
        is_due = keep_every > 0 and checkpoint.step % keep_every == 0
        if not is_best and not is_due:
            _remove(checkpoint.path)


def _merit(checkpoint: CheckpointFolder) -> tuple[float, int]:
    accuracy = checkpoint.manifest.knn_accuracy
    return (-1.0 if accuracy is None else accuracy, checkpoint.step)


def _remove(path: Path) -> None:
    """Take a checkpoint's name away before its files, so that no reader meets half of one."""
    if path.exists():
        aside = temporary_path(path.parent, path.name)
        path.rename(aside)
        shutil.rmtree(aside)
