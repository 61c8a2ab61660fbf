"""Sealed shards as local files: those of a local root as they are, all others as copies.

Copies lie in the spool of the root, shared by the processes of a machine, and are checked against
the commit log before they get their name. The ones used longest ago make room for new ones.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from synthrep_shared.errors import ShardContentError, StorageError
from synthrep_shared.storage import Location, StoredFile, list_files, spool_folder, temporary_path

COPY_BYTES = 16 << 30
"""Room for the copies of a root, unless a setting says otherwise."""
_READ_BYTES = 16 << 20  # of one request
_IN_USE_S = 60.0  # a copy handed out so recently may not be open yet
_ABANDONED_S = 3600.0


class DistantFile(Protocol):
    """A file that is read in pieces, as `ObjectPath` is."""

    def read_range(self, start: int, num_bytes: int, /) -> bytes:
        """Bytes from `start` on, fewer at the end; raises OSErrors as a file's."""
        ...


class DistantFolder(Protocol):
    """Opens its files by name."""

    def __truediv__(self, name: str, /) -> DistantFile: ...


class ShardPlace(Protocol):
    """A data set's shards and the root that they belong to; `DatasetPaths` is one."""

    @property
    def dataset(self) -> str: ...

    @property
    def root(self) -> Location | str:
        """A text is the address of a root that is neither folder nor store."""
        ...

    @property
    def shards(self) -> Path | DistantFolder: ...


class ShardCopies:
    """The shards of one data set; safe for several threads and processes."""

    def __init__(self, place: ShardPlace, *, max_bytes: int) -> None:
        """`max_bytes` is the disk space that the copies of the whole root may take."""
        self._place, self._max_bytes = place, max_bytes

    def path(self, name: str, *, sha256: str, num_bytes: int) -> Path:
        """The file of the shard that a record names; blocks while it is copied.

        Raises FileNotFoundError if there is no such shard far away, ShardContentError if it is
        not what the record says, and StorageError and other OSErrors where there is no place for
        the copy. A file of a local root is not looked at.
        """
        shard = self._place.shards / name
        if isinstance(shard, Path):
            return shard
        copy = self._copy_of(name)
        with suppress(FileNotFoundError):
            os.utime(copy)
            return copy
        copy.parent.mkdir(exist_ok=True)
        self._make_room(copy.parent, num_bytes)
        written = temporary_path(copy.parent, copy.name)
        try:
            if _copy(shard, written, num_bytes) != (num_bytes, sha256):
                raise ShardContentError(f"{shard} is not what its record says")
            if not written.exists():  # the clock jumped, and another process took it for old
                raise StorageError(f"{written} was removed while it was written")
            written.replace(copy)
        finally:
            written.unlink(missing_ok=True)
        return copy

    def drop(self, name: str) -> bool:
        """Remove the copy of a shard, if there is one; False for a local root, which has none."""
        is_far = not isinstance(self._place.shards, Path)
        if is_far:
            self._copy_of(name).unlink(missing_ok=True)
        return is_far

    def _copy_of(self, name: str) -> Path:
        return spool_folder(self._place.root) / "copies" / f"{self._place.dataset}.{name}"

    def _make_room(self, folder: Path, num_bytes: int) -> None:
        now = time.time()
        sizes: dict[StoredFile, int] = {}
        for file in list_files(folder):
            with suppress(FileNotFoundError):
                sizes[file] = file.path.stat().st_size
        excess = sum(sizes.values()) + num_bytes - self._max_bytes
        for file in sorted(sizes, key=lambda file: file.modified_s):
            age_s = now - file.modified_s
            is_abandoned = file.path.name.endswith(".part") and age_s > _ABANDONED_S
            if is_abandoned or (excess > 0 and age_s > _IN_USE_S):
                file.path.unlink(missing_ok=True)
                excess -= sizes[file]


def _copy(shard: DistantFile, written: Path, expected_bytes: int) -> tuple[int, str]:
    """Copy a shard to a new local file; returns its size in bytes and its sha256.

    Of one that is longer than it should be, no more is copied than shows that.
    """
    digest, num_bytes, piece = hashlib.sha256(), 0, bytes(_READ_BYTES)
    with written.open("xb") as target:
        while len(piece) == _READ_BYTES and num_bytes <= expected_bytes:
            piece = shard.read_range(num_bytes, _READ_BYTES)
            target.write(piece)
            digest.update(piece)
            num_bytes += len(piece)
    return num_bytes, digest.hexdigest()
