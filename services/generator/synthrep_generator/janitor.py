"""Finds and removes what killed writers left: temporary files, and shards that no record names."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from synthrep_shared.commit_log import read_log
from synthrep_shared.storage import DatasetPaths

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"^(\d{8,})-([0-9a-f]{12})\.(tar|json)$")


@dataclass(frozen=True)
class StoredFile:
    """A file of a data set and when it was last written, seconds since the epoch."""

    path: Path
    modified_s: float

    @property
    def is_temporary(self) -> bool:
        """Whether it was written aside and never got its final name."""
        return self.path.name.endswith(".part")

    @property
    def is_committable(self) -> bool:
        """Whether it is of the kind that a record names."""
        kinds = {"shards": ".tar", "failures": ".json"}
        return self.path.suffix == kinds.get(self.path.parent.name)


def list_files(paths: DatasetPaths) -> list[StoredFile]:
    """The files of a data set but for its log."""
    found = []
    for folder in (paths.temporary, paths.intake, paths.control, paths.shards, paths.failures):
        for entry in _scan(folder):
            with suppress(FileNotFoundError):
                found.append(StoredFile(Path(entry.path), entry.stat().st_mtime))
    return found


def find_leftovers(
    files: Iterable[StoredFile], committed: Set[str], *, written_before_s: float
) -> list[Path]:
    """Temporary files last written before a moment, and files that none of `committed` names.

    A writer names a file and then commits it: `committed` must be newer than `files`, or no
    writer at work.
    """
    return [
        file.path
        for file in files
        if (file.is_temporary and file.modified_s < written_before_s)
        or (file.is_committable and file.path.name not in committed)
    ]


def digest_in_name(file: Path) -> str | None:
    """The start of the sha256 that the name of a published file promises."""
    match = _NUMBERED.match(file.name)
    return match[2] if match else None


def remove_leftovers(paths: DatasetPaths, *, now_s: float, min_age_s: float = 86_400.0) -> int:
    """Delete leftovers older than `min_age_s` while writers are at work; returns how many.

    A file of a sequence number that the log gave to another file can never be committed any more;
    one of a number still to come might be adopted, and stays.
    """
    last_seq, committed = 0, set()
    for record in read_log(paths.log):
        last_seq = record.seq
        committed.add(record.name)
    doomed = [
        file.path
        for file in list_files(paths)
        if now_s - file.modified_s > min_age_s
        and (file.is_temporary or _is_orphan(file.path, last_seq, committed))
    ]
    for file in doomed:
        file.unlink(missing_ok=True)
        logger.info("leftover removed", extra={"dataset": paths.dataset, "file": file.name})
    return len(doomed)


def _is_orphan(file: Path, last_seq: int, committed: Set[str]) -> bool:
    match = _NUMBERED.match(file.name)
    return match is not None and int(match[1]) <= last_seq and file.name not in committed


def _scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    if folder.is_dir():
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if entry.is_file())
