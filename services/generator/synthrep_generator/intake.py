"""Intake files: what was accepted, durable before the caller hears of it.

`intake/<batch>.jsonl`: line 1 is the `BatchHeader`, then one `{"index", "prompt"}` a line. Written
once, never changed. A batch that is paused has the marker `control/<batch>.paused`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from functools import cached_property

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from synthrep_generator.errors import IntakeError
from synthrep_generator.mixture import Deal
from synthrep_shared.failpoints import failpoint
from synthrep_shared.messages import GenerationSettings
from synthrep_shared.samples import group_id
from synthrep_shared.storage import (
    DatasetPaths,
    Location,
    list_names,
    map_files,
    publish_bytes,
    publish_file,
    temporary_path,
)

logger = logging.getLogger(__name__)
_MARK_EVERY = 256  # lines between remembered byte offsets


class BatchHeader(BaseModel):
    """First line of an intake file; `settings` has every default of the model filled in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    dataset: str
    owner: str
    priority: int
    num_prompts: int = Field(ge=1)
    settings: GenerationSettings
    body_sha256: str
    created_at: datetime

    def gid(self, index: int, prompt: str) -> str:
        """Group id of prompt `index`; settings that a later version adds leave it as it is."""
        settings = self.settings.model_dump(mode="json", exclude_defaults=True)
        return group_id(self.dataset, self.id, index, prompt, settings)

    @cached_property
    def variants(self) -> tuple[GenerationSettings, ...]:
        """What prompts are made with: one each for the components of the mixture, else one."""
        return self.settings.variants()

    @cached_property
    def deal(self) -> Deal:
        """Which variant makes which prompt."""
        return Deal(self.num_prompts, [c.weight for c in self.settings.mixture] or [1.0])

    def settings_of(self, index: int) -> GenerationSettings:
        """What prompt `index` is made with."""
        return self.variants[self.deal.component(index)]


def batch_id_from_key(owner: str, dataset: str, key: str) -> str:
    """The batch id that an `Idempotency-Key` stands for."""
    what = json.dumps([owner, dataset, key]).encode()
    return hashlib.blake2b(what, digest_size=16, person=b"synthrep-batch").hexdigest()


def write_batch(
    paths: DatasetPaths,
    header: BatchHeader,
    prompts: Iterable[str],
    gate: AbstractContextManager[object] | None = None,
) -> bool:
    """Make the batch durable; False if its id is taken (the first writer won).

    It becomes visible inside `gate`, which may raise to prevent that.
    """
    written = temporary_path(paths.temporary, header.id)
    try:
        with written.open("x", encoding="utf-8") as stream:
            stream.write(header.model_dump_json() + "\n")
            for index, prompt in enumerate(prompts):
                stream.write(f'{{"index": {index}, "prompt": {json.dumps(prompt)}}}\n')
            stream.flush()
            os.fsync(stream.fileno())
        failpoint("batch-written")
        with gate or nullcontext():
            is_first = publish_file(written, _path(paths, header.id))
        failpoint("batch-published")
        return is_first
    finally:
        written.unlink(missing_ok=True)


def has_batch(paths: DatasetPaths, batch: str) -> bool:
    """Whether a batch of this id was accepted."""
    return _path(paths, batch).exists()


def list_batches(paths: DatasetPaths) -> list[str]:
    """Ids of the accepted batches, in no order."""
    return _stems(paths.intake, ".jsonl")


def read_headers(
    paths: DatasetPaths, batches: Iterable[str]
) -> Iterator[tuple[str, BatchHeader | None]]:
    """Each batch with its header, or None, after a word in the log, for a malformed file.

    Raises OSError.
    """

    def read(batch: str) -> tuple[str, BatchHeader | None]:
        try:
            return batch, IntakeReader(paths, batch).header
        except IntakeError:
            logger.exception("intake file was skipped", extra={"batch": batch})
            return batch, None

    return map_files(read, batches, folder=paths.intake)


class IntakeReader:
    """Reads one batch; prompts by position without reading from the start each time."""

    def __init__(self, paths: DatasetPaths, batch: str) -> None:
        self._file = _path(paths, batch)
        with self._file.open("rb") as stream:
            try:
                self.header = BatchHeader.model_validate_json(stream.readline())
            except ValidationError as error:
                raise IntakeError(f"{self._file.name}: malformed header") from error
            self._marks = [stream.tell()]

    def prompts(self, start: int, count: int) -> list[str]:
        """Prompts `start` to `start + count`, fewer at the end."""
        mark = min(start // _MARK_EVERY, len(self._marks) - 1)
        found: list[str] = []
        with self._file.open("rb") as stream:
            stream.seek(self._marks[mark])
            index = mark * _MARK_EVERY
            while len(found) < count:
                if index % _MARK_EVERY == 0 and index // _MARK_EVERY == len(self._marks):
                    self._marks.append(stream.tell())
                line = stream.readline()
                if not line:
                    break
                if index >= start:
                    found.append(json.loads(line)["prompt"])
                index += 1
        return found


def set_paused(paths: DatasetPaths, batch: str, paused: bool) -> None:
    """Pause or resume the feeding of a batch; takes effect at the reconciler's next pass."""
    marker = paths.control / f"{batch}.paused"
    if paused:
        publish_bytes(b"", marker)
    else:
        marker.unlink(missing_ok=True)


def is_paused(paths: DatasetPaths, batch: str) -> bool:
    """Whether the batch is paused."""
    return (paths.control / f"{batch}.paused").exists()


def list_paused(paths: DatasetPaths) -> frozenset[str]:
    """Ids of the paused batches."""
    return frozenset(_stems(paths.control, ".paused"))


def _stems(folder: Location, suffix: str) -> list[str]:
    return [
        name[: -len(suffix)]
        for name in list_names(folder)
        if name.endswith(suffix) and not name.startswith(".")
    ]


def _path(paths: DatasetPaths, batch: str) -> Location:
    return paths.intake / f"{batch}.jsonl"
