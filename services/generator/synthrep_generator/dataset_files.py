"""The open files of the data sets that a process works on, so that a job reads only what is new."""

from __future__ import annotations

import time
from contextlib import suppress

from synthrep_generator.chunks import Chunk
from synthrep_generator.intake import IntakeReader, list_paused
from synthrep_generator.janitor import remove_old_temporary
from synthrep_shared.commit_log import CommitLog
from synthrep_shared.errors import StorageError
from synthrep_shared.storage import DatasetPaths, Location, free_bytes

_MAX_READERS = 64


class DatasetFiles:
    """One data set: its paths, its log, and readers of the batches asked for last."""

    def __init__(self, paths: DatasetPaths) -> None:
        self.paths = paths
        self.log = CommitLog(paths.log)
        self._readers: dict[str, IntakeReader] = {}

    def reader(self, batch: str) -> IntakeReader:
        """The reader of a batch; raises OSError or IntakeError."""
        reader = self._readers.pop(batch, None) or IntakeReader(self.paths, batch)
        self._readers[batch] = reader
        while len(self._readers) > _MAX_READERS:
            del self._readers[next(iter(self._readers))]
        return reader


class OpenDatasets:
    """The data sets under a root, opened at first use."""

    def __init__(self, root: Location) -> None:
        self._root = root
        self._open: dict[str, DatasetFiles] = {}

    def __getitem__(self, dataset: str) -> DatasetFiles:
        """Raises StorageError if nothing was ever accepted for such a data set."""
        if dataset not in self._open:
            paths = DatasetPaths(self._root, dataset)
            if not paths.intake.is_dir():
                raise StorageError(f"no data set {dataset!r} under {self._root}")
            remove_old_temporary(paths, now_s=time.time())
            self._open[dataset] = DatasetFiles(paths)
        files = self._open[dataset]
        files.paths.make_folders()  # a system may clean an idle one away that lies in its /tmp
        return files


def is_held_back(root: Location, chunk: Chunk) -> bool:
    """Whether a batch of the chunk is paused; no, where the storage does not answer."""
    with suppress(OSError):
        paused = list_paused(DatasetPaths(root, chunk.dataset))
        return any(part.batch in paused for part in chunk.parts)
    return False


def is_disk_full(root: Location, reserve_bytes: int) -> bool:
    """Whether less than the reserve is free; no, where nothing was accepted yet."""
    with suppress(FileNotFoundError):
        return free_bytes(root) < reserve_bytes
    return False
