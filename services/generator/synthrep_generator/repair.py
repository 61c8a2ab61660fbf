"""Brings a data set in order: what no record names goes, what is committed stays as it is."""

from __future__ import annotations

import logging

from pydantic import BaseModel

from synthrep_generator.janitor import check_no_record_is_lost, find_leftovers, list_stored
from synthrep_shared.commit_log import CommitLog, LogReader
from synthrep_shared.errors import StorageError
from synthrep_shared.storage import DatasetPaths

logger = logging.getLogger(__name__)


class Repairs(BaseModel):
    """What was done."""

    dataset: str
    removed: list[str]
    """Orphans and temporary files, relative to the data set's folder."""
    cut_bytes: int
    """Length of the torn last line that was cut off the log."""


def repair_dataset(paths: DatasetPaths, *, now_s: float, min_age_s: float) -> Repairs:
    """Remove orphans and temporary files older than `min_age_s`, and cut a torn last line.

    Writers of a local root wait meanwhile. Raises StorageError if there is no such data set, and
    CommitLogError, with nothing removed, if the log does not say what is committed.
    """
    if not paths.folder.is_dir():
        raise StorageError(f"no data set {paths.dataset!r} under {paths.root}")
    log, reader, committed = CommitLog(paths.log), LogReader(paths.log), set[str]()
    log.refresh()
    with log.exclusive() as cut_bytes:
        files = list_stored(paths)
        while records := reader.poll():
            committed.update(record.name for record in records)
        check_no_record_is_lost(files, reader)
        before_s = now_s - min_age_s
        leftovers = find_leftovers(
            files, committed, reader, written_before_s=before_s, writers_wait=True
        )
        for file in leftovers:
            file.unlink(missing_ok=True)
            logger.info("leftover removed", extra={"dataset": paths.dataset, "file": file.name})
    removed = sorted(map(paths.relative_name, leftovers))
    return Repairs(dataset=paths.dataset, removed=removed, cut_bytes=cut_bytes)
