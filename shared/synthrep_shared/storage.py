"""The data sets under a root, local folder or `s3://bucket/prefix`, and publishing into them.

A published file is whole under its name, or absent. On a local disk publishing writes aside,
flushes the file, hard-links it to its final name (which fails if the name exists: the first writer
wins) and flushes the folder. In an object store it is one conditional PUT. This module and
`log_media` know the difference; a `Location` is read in the same way on both.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from synthrep_shared.errors import StorageError
from synthrep_shared.failpoints import failpoint
from synthrep_shared.object_store import (
    ObjectPath,
    abort_uploads,
    list_folders,
    list_objects,
    probe_store,
)
from synthrep_shared.private_folder import make_private_folder
from synthrep_shared.samples import DATASET_PATTERN, DATASET_RULE

_DATASET = re.compile(DATASET_PATTERN)
_READ_BYTES = 1 << 20
_REQUESTS = 16  # to a store at once
S = TypeVar("S")
T = TypeVar("T")

Location = Path | ObjectPath
"""A file or folder, or an object or the common start of the names of some."""


def parse_root(value: Any) -> Location:
    """The folder, or the place in an object store, that a setting names; StorageError if neither.

    `s3://bucket/prefix` is in a store, anything else is a path.
    """
    text = str(value)
    return ObjectPath.from_url(text) if "://" in text else Path(text)


Root = Annotated[
    Location,
    PlainValidator(parse_root),
    PlainSerializer(str),
    WithJsonSchema({"type": "string"}),
]


@dataclass(frozen=True)
class DatasetPaths:
    """Where the parts of one dataset lie."""

    root: Location
    dataset: str

    def __post_init__(self) -> None:
        if not _DATASET.fullmatch(self.dataset):
            raise StorageError(DATASET_RULE)

    @property
    def folder(self) -> Location:
        return self.root / self.dataset

    @property
    def intake(self) -> Location:
        return self.folder / "intake"

    @property
    def shards(self) -> Location:
        return self.folder / "shards"

    @property
    def failures(self) -> Location:
        return self.folder / "failures"

    @property
    def control(self) -> Location:
        return self.folder / "control"

    @property
    def log(self) -> Location:
        """A file of lines, or in a store what the names of the records begin with."""
        folder = self.folder / "log"
        return folder / "commits.jsonl" if isinstance(folder, Path) else folder

    @property
    def temporary(self) -> Path:
        """Where files are in the making: always on this machine."""
        return spool_folder(self.root) / self.dataset / "tmp"

    def relative_name(self, file: Location) -> str:
        """A file's name below the dataset's folder; one in the making may lie elsewhere."""
        return str(file).removeprefix(f"{self.folder}/")

    def make_folders(self) -> None:
        """Create the folders of the dataset where they are absent, durably."""
        folders = [self.temporary]
        if isinstance(self.root, Path):
            names = ("intake", "shards", "failures", "control", "log")
            folders += [self.root / self.dataset / name for name in names]
        absent = [folder for folder in folders if not folder.is_dir()]
        for folder in absent:
            folder.mkdir(parents=True, exist_ok=True)
        if absent and isinstance(self.root, Path):
            sync_folder(self.root / self.dataset)
            sync_folder(self.root)


class StoredFile(NamedTuple):
    """A file or object and when it was last written, seconds since the epoch."""

    path: Location
    modified_s: float


def prepare_root(root: Location) -> None:
    """Make the folder; or raise StorageError unless the store can keep the project's promises."""
    if isinstance(root, Path):
        root.mkdir(parents=True, exist_ok=True)
    else:
        probe_store(root)


def is_writable(root: Location) -> bool:
    """Whether the folder may be written or the store answers."""
    if isinstance(root, Path):
        return os.access(root, os.W_OK)
    try:
        root.is_dir()
    except OSError:
        return False
    return True


def spool_folder(root: Location | str) -> Path:
    """The local folder for files in the making: the root itself, or a private one in `TMPDIR`."""
    if isinstance(root, Path):
        return root
    digest = hashlib.sha256(str(root).encode()).hexdigest()[:12]
    own = make_private_folder(Path(tempfile.gettempdir()) / f"synthrep-{os.getuid()}")
    return make_private_folder(own / digest)


def free_bytes(root: Location) -> int:
    """Free space of the disk that files in the making take, for those without privileges."""
    return shutil.disk_usage(spool_folder(root)).free


def list_datasets(root: Location) -> list[str]:
    """Names of the datasets under `root`, sorted."""
    if not isinstance(root, Path):
        return sorted(name for name in list_folders(root) if _DATASET.fullmatch(name))
    if not root.is_dir():
        return []
    return sorted(p.name for p in root.iterdir() if _DATASET.fullmatch(p.name) and p.is_dir())


def list_names(folder: Location) -> list[str]:
    """Names of the files right under a folder, in no order; none if there is no such folder."""
    if not isinstance(folder, Path):
        return [found.path.name for found in list_objects(folder)]
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries]
    except FileNotFoundError:
        return []


def list_files(folder: Location) -> Iterator[StoredFile]:
    """The files right under a folder, but for those that go meanwhile."""
    if not isinstance(folder, Path):
        yield from (StoredFile(found.path, found.modified_s) for found in list_objects(folder))
    elif folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.is_file():
                        yield StoredFile(Path(entry.path), entry.stat().st_mtime)


def map_files(function: Callable[[S], T], items: Iterable[S], *, folder: Location) -> Iterator[T]:
    """The results in order, for items that each cost one access to `folder`.

    A disk is asked for one after the other, a store for several at once. Raises what `function`
    raises.
    """
    if isinstance(folder, Path):
        yield from map(function, items)
    else:
        with ThreadPoolExecutor(_REQUESTS) as pool:
            yield from pool.map(function, items)


def folder_changed_ns(folder: Location) -> int:
    """When an entry was last added to a folder, ns since the epoch; now, where nobody knows.

    Raises FileNotFoundError if there is no such folder.
    """
    return folder.stat().st_mtime_ns if isinstance(folder, Path) else time.time_ns()


def drop_stale_uploads(folder: Location, *, started_before_s: float) -> None:
    """Give back what uploads in parts took that were never completed."""
    if not isinstance(folder, Path):
        abort_uploads(folder, started_before_s=started_before_s)


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


def publish_file(written: Path, final: Location) -> bool:
    """Give the flushed file `written` its final name; False if that name exists.

    On a local disk `written` is gone then; a store has a copy of it.
    """
    if not isinstance(final, Path):
        is_first = final.create(written)
        failpoint("file-linked")
        return is_first
    try:
        os.link(written, final)
        failpoint("file-linked")
    except FileExistsError:
        return False
    finally:
        written.unlink(missing_ok=True)
    sync_folder(final.parent)
    return True


def publish_bytes(data: bytes, final: Location, *, replace: bool = False) -> bool:
    """Write `data` durably under `final`; False if the name exists and may not be replaced."""
    if not isinstance(final, Path):
        if replace:
            final.replace_with(data)
            return True
        return final.create(data)
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


def sha256_file(path: Location) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def adopt_file(final: Location, sha256: str) -> None:
    """Make sure of a file that a writer published and never committed; StorageError if it differs.

    For a name that holds the content's digest and no record names: the content is what this
    writer would publish too.
    """
    if sha256_file(final) != sha256:
        raise StorageError(f"{final} has other content than its name says; remove it")
    if isinstance(final, Path):
        sync_folder(final.parent)
