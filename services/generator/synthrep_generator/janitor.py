"""Finds and removes what killed writers left: temporary files, and shards that no record names."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Set

from synthrep_shared.commit_log import LogReader
from synthrep_shared.errors import CommitLogError
from synthrep_shared.storage import (
    DatasetPaths,
    Location,
    StoredFile,
    drop_stale_uploads,
    list_files,
)

logger = logging.getLogger(__name__)

_DAY_S = 86_400.0
_NUMBERED = re.compile(r"^(\d{8,})-([0-9a-f]{12})\.(tar|json)$")
_COMMITTABLE = {"shards": ".tar", "failures": ".json"}


def list_stored(paths: DatasetPaths) -> list[StoredFile]:
    """The files of a data set but for its log."""
    folders = (paths.temporary, paths.intake, paths.control, paths.shards, paths.failures)
    return [file for folder in folders for file in list_files(folder)]


def find_leftovers(
    files: Iterable[StoredFile],
    committed: Set[str],
    log: LogReader,
    *,
    written_before_s: float,
    writers_wait: bool = False,
) -> list[Location]:
    """Temporary files last written before a moment, and files that can never be committed.

    `committed` holds the names in `log`, which was read to its end after `files` were listed. A
    young file of the next number may be on its way to its record, unless all writers wait.
    """

    def is_dead(file: StoredFile) -> bool:
        match, is_old = _NUMBERED.match(file.path.name), file.modified_s < written_before_s
        if match is not None and not log.can_be_committed(int(match[1])):
            return True
        return log.is_named_under_lock and (match is None or is_old or writers_wait)

    return [
        file.path
        for file in files
        if (_is_temporary(file) and file.modified_s < written_before_s)
        or (
            file.path.suffix == _COMMITTABLE.get(file.path.parent.name)
            and file.path.name not in committed
            and is_dead(file)
        )
    ]


def check_no_record_is_lost(files: Iterable[StoredFile], log: LogReader) -> None:
    """Raises CommitLogError where a file tells of records that the log does not have.

    A file is named for the record that comes next, so all those before were there. `log` was read
    to its end after `files` were listed.
    """
    found = [(file.path, _NUMBERED.match(file.path.name)) for file in files]
    numbered = [(int(match[1]), file.name) for file, match in found if match]
    number, name = max(numbered, default=(0, ""))
    if number > log.seq + 1:
        raise CommitLogError(
            f"{log.path}: ends with record {log.seq}, but {name} was written after record "
            f"{number - 1}; put the log back from a copy, or remove the files of later records"
        )


def digest_in_name(file: Location) -> str | None:
    """The start of the sha256 that the name of a published file promises."""
    match = _NUMBERED.match(file.name)
    return match[2] if match else None


def remove_leftovers(paths: DatasetPaths, *, now_s: float, min_age_s: float = _DAY_S) -> int:
    """Delete leftovers older than `min_age_s` while writers are at work; returns how many.

    A file of a sequence number that the log gave to another file can never be committed any more;
    one of a number still to come might be adopted, and stays.
    """
    log, committed = LogReader(paths.log), set[str]()
    while records := log.poll():
        committed.update(record.name for record in records)
    doomed = [
        file.path
        for file in list_stored(paths)
        if now_s - file.modified_s > min_age_s
        and (_is_temporary(file) or _is_orphan(file.path, log, committed))
    ]
    for file in doomed:
        file.unlink(missing_ok=True)
        logger.info("leftover removed", extra={"dataset": paths.dataset, "file": file.name})
    drop_stale_uploads(paths.folder, started_before_s=now_s - min_age_s)
    return len(doomed)


def remove_old_temporary(paths: DatasetPaths, *, now_s: float, min_age_s: float = _DAY_S) -> None:
    """Delete what killed writers left on this machine; a root in a store has others too."""
    for file in list_files(paths.temporary):
        if _is_temporary(file) and now_s - file.modified_s > min_age_s:
            file.path.unlink(missing_ok=True)
            facts = {"dataset": paths.dataset, "file": file.path.name}
            logger.info("leftover removed", extra=facts)


def _is_temporary(file: StoredFile) -> bool:
    """Whether it was written aside and never got its final name."""
    return file.path.name.endswith(".part")


def _is_orphan(file: Location, log: LogReader, committed: Set[str]) -> bool:
    match = _NUMBERED.match(file.name)
    is_named = file.name in committed
    return match is not None and not is_named and not log.can_be_committed(int(match[1]))
