"""Removes what killed writers left behind: temporary files, and shards that no record names."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from synthrep_shared.commit_log import read_log
from synthrep_shared.storage import DatasetPaths

logger = logging.getLogger(__name__)

_SEQUENCE = re.compile(r"^(\d{8,})-[0-9a-f]{12}\.(tar|json)$")


def remove_leftovers(paths: DatasetPaths, *, now_s: float, min_age_s: float = 86_400.0) -> int:
    """Delete leftovers older than `min_age_s`; returns how many.

    A file of a sequence number that the log gave to another file can never be committed any more;
    one of a number still to come might be adopted, and stays.
    """
    last_seq, committed = 0, set()
    for record in read_log(paths.log):
        last_seq = record.seq
        committed.add(record.name)
    doomed = [
        file
        for file in _files(paths)
        if now_s - file.stat().st_mtime > min_age_s
        and (file.name.endswith(".part") or _is_orphan(file, last_seq, committed))
    ]
    for file in doomed:
        file.unlink(missing_ok=True)
        logger.info("leftover removed", extra={"dataset": paths.dataset, "file": file.name})
    return len(doomed)


def _is_orphan(file: Path, last_seq: int, committed: set[str]) -> bool:
    match = _SEQUENCE.match(file.name)
    return match is not None and int(match[1]) <= last_seq and file.name not in committed


def _files(paths: DatasetPaths) -> Iterator[Path]:
    for folder in (paths.temporary, paths.intake, paths.control, paths.shards, paths.failures):
        if folder.is_dir():
            with os.scandir(folder) as entries:
                yield from (Path(entry.path) for entry in entries if entry.is_file())
