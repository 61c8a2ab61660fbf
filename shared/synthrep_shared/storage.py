"""Paths under the shard root, and publishing: a file is whole under its name, or absent.

Publishing writes aside, flushes the file to disk, hard-links it to its final name (which fails if
the name exists: the first writer wins) and flushes the folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from synthrep_shared.errors import StorageError
from synthrep_shared.failpoints import failpoint
from synthrep_shared.samples import DATASET_PATTERN

_DATASET = re.compile(DATASET_PATTERN)
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class DatasetPaths:
    """Where the parts of one dataset lie."""

    root: Path
    dataset: str

    def __post_init__(self) -> None:
        if not _DATASET.fullmatch(self.dataset):
            raise StorageError(f"dataset name must match {DATASET_PATTERN}")

    @property
    def folder(self) -> Path:
        return self.root / self.dataset

    @property
    def intake(self) -> Path:
        return self.folder / "intake"

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def failures(self) -> Path:
        return self.folder / "failures"

    @property
    def control(self) -> Path:
        return self.folder / "control"

    @property
    def log(self) -> Path:
        return self.folder / "log" / "commits.jsonl"

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    def make_folders(self) -> None:
        """Create the folders of the dataset where they are absent, durably."""
        folders = (self.intake, self.shards, self.failures, self.control, self.log.parent)
        absent = [folder for folder in (*folders, self.temporary) if not folder.is_dir()]
        for folder in absent:
            folder.mkdir(parents=True, exist_ok=True)
        if absent:
            sync_folder(self.folder)
            sync_folder(self.root)


def list_datasets(root: Path) -> list[str]:
    """Names of the datasets under `root`, sorted."""
    if not root.is_dir():
        return []
    return sorted(p.name for p in root.iterdir() if _DATASET.fullmatch(p.name) and p.is_dir())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_path(folder: Path, stem: str) -> Path:
    """A fresh name for writing aside, in `folder`, on the file system of the final name."""
    return folder / f".{stem}.{os.getpid()}.{secrets.token_hex(4)}.part"


def publish_file(written: Path, final: Path) -> bool:
    """Give the flushed file `written` its final name and remove it; False if that name exists."""
    try:
        os.link(written, final)
        failpoint("file-linked")
    except FileExistsError:
        return False
    finally:
        written.unlink(missing_ok=True)
    sync_folder(final.parent)
    return True


def publish_bytes(data: bytes, final: Path, *, replace: bool = False) -> bool:
    """Write `data` durably under `final`; False if the name exists and may not be replaced."""
    written = temporary_path(final.parent, final.name)
    try:
        with written.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if not replace:
            return publish_file(written, final)
        written.replace(final)
        sync_folder(final.parent)
        return True
    finally:
        written.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def adopt_file(final: Path, sha256: str) -> None:
    """Make sure of a file that a writer published and never committed; StorageError if it differs.

    For a name that holds the content's digest and no record names: the content is what this
    writer would publish too.
    """
    if sha256_file(final) != sha256:
        raise StorageError(f"{final} has other content than its name says; remove it")
    sync_folder(final.parent)
