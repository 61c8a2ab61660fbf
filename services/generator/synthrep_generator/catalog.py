"""All data sets under the root: finds batches and groups by id alone, and sums them up."""

from __future__ import annotations

import logging
import re
import threading
from dataclasses import dataclass

from synthrep_generator.progress import DatasetIndex
from synthrep_generator.tally import Batch
from synthrep_shared.commit_log import CommitRecord, GroupRef
from synthrep_shared.errors import CommitLogError
from synthrep_shared.samples import GID_PATTERN
from synthrep_shared.shard_copies import COPY_BYTES
from synthrep_shared.storage import DatasetPaths, Location, list_datasets, map_files

logger = logging.getLogger(__name__)
_BATCH_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_GID = re.compile(GID_PATTERN)


@dataclass(frozen=True)
class FoundGroup:
    """A group, the record that decided it, and whether it was rejected since."""

    index: DatasetIndex
    record: CommitRecord
    ref: GroupRef
    is_rejected: bool


@dataclass(frozen=True)
class Unfinished:
    """Accepted work without an outcome; the images leave paused batches out."""

    prompts: int
    images: int


class Catalog:
    """The data sets of one root; safe for several threads."""

    def __init__(self, root: Location, *, copy_bytes: int = COPY_BYTES) -> None:
        """`copy_bytes` is the room for local copies of shards that are in an object store."""
        self.root, self._copy_bytes = root, copy_bytes
        self._lock = threading.Lock()
        self._indexes: dict[str, DatasetIndex] = {}
        self._unreadable: set[str] = set()

    def make(self, name: str) -> DatasetIndex:
        """The data set of this name, made if absent; raises OSError, StorageError."""
        paths = DatasetPaths(self.root, name)
        paths.make_folders()
        return self._index(paths)

    def dataset(self, name: str) -> DatasetIndex | None:
        """The data set of this name, up to date; None if it was never made."""
        paths = DatasetPaths(self.root, name)
        if not paths.intake.is_dir() and not paths.log.is_file():
            return None
        index = self._index(paths)
        index.refresh()
        return index

    def datasets(self) -> list[DatasetIndex]:
        """All data sets by name, up to date but for one whose files cannot be read on."""
        names = list_datasets(self.root)
        found = map_files(self._readable_part, names, folder=self.root)
        return [index for index in found if index is not None]

    def _readable_part(self, name: str) -> DatasetIndex | None:
        try:
            return self.dataset(name)
        except (CommitLogError, PermissionError):
            if name not in self._unreadable:
                self._unreadable.add(name)
                logger.exception("commit log cannot be read on", extra={"dataset": name})
            return self._index(DatasetPaths(self.root, name))

    def batch(self, batch_id: str) -> tuple[DatasetIndex, Batch] | None:
        """The batch with this id and its data set, up to date."""
        if not _BATCH_ID.fullmatch(batch_id):
            return None
        names = list_datasets(self.root)
        indexes = [self._index(DatasetPaths(self.root, name)) for name in names]
        for index in sorted(indexes, key=lambda index: index.known_batch(batch_id) is None):
            batch = index.batch(batch_id)
            if batch is not None:
                index.refresh()
                return index, batch
        return None

    def known_batch(self, batch_id: str) -> tuple[DatasetIndex, Batch] | None:
        """As `batch`, by what this process knows already: no file is looked at, no lock taken."""
        for index in tuple(self._indexes.values()):
            batch = index.known_batch(batch_id)
            if batch is not None:
                return index, batch
        return None

    def group(self, gid: str) -> FoundGroup | None:
        """The group with this id."""
        if not _GID.fullmatch(gid):
            return None
        for index in self.datasets():
            found = index.group(gid)
            if found is not None:
                return FoundGroup(index, *found)
        return None

    def unfinished(self) -> Unfinished:
        """What all data sets have left to do."""
        prompts = images = 0
        for index in self.datasets():
            totals = index.totals()
            prompts += totals.unfinished
            images += totals.unfinished_images
            images -= sum(b.unfinished * b.images_per_prompt for b in index.unfinished_paused())
        return Unfinished(prompts, images)

    def _index(self, paths: DatasetPaths) -> DatasetIndex:
        with self._lock:
            if paths.dataset not in self._indexes:
                index = DatasetIndex(paths, copy_bytes=self._copy_bytes)
                self._indexes[paths.dataset] = index
            return self._indexes[paths.dataset]
