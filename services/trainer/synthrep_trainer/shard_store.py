"""The shards of a dataset as one run sees them: verified before first use, or in quarantine.

`quarantine/<seq>.json` in the run's folder says which shard and why. The set of bad shards must be
the same on every rank at every batch, so a process knows those that were there when it began, and
those that rank 0 finds before it admits them. One that turns bad later ends the process: it is in
quarantine when the run goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from synthrep_shared.commit_log import CommitRecord
from synthrep_shared.errors import ShardContentError
from synthrep_shared.shard_copies import COPY_BYTES, ShardCopies, ShardPlace
from synthrep_shared.storage import publish_bytes
from synthrep_trainer.errors import BadShardError
from synthrep_trainer.group_index import ShardRef
from synthrep_trainer.shard_files import (
    GroupKey,
    Image,
    ShardLayout,
    ShardMismatchError,
    read_caption,
    read_images,
    verify_shard,
)

_log = logging.getLogger(__name__)


class ShardStore:
    """Reads the shards of one dataset for one run; `verify` and `read` may run in any thread."""

    def __init__(
        self, place: ShardPlace, run_folder: Path, *, copy_bytes: int = COPY_BYTES
    ) -> None:
        """`copy_bytes` is the room for local copies of shards that are on no local disk."""
        self._copies = ShardCopies(place, max_bytes=copy_bytes)
        self._quarantine = run_folder / "quarantine"
        self._quarantine.mkdir(parents=True, exist_ok=True)
        self._bad = {int(path.stem) for path in self._quarantine.glob("[0-9]*.json")}
        self._layouts: dict[int, ShardLayout] = {}

    @property
    def num_quarantined(self) -> int:
        """Shards in quarantine that this process knows of."""
        return len(self._bad)

    @property
    def num_verified(self) -> int:
        """Shards that this process found to be what the log says."""
        return len(self._layouts)

    def is_bad(self, seq: int) -> bool:
        """Whether the shard is known to be in quarantine."""
        return seq in self._bad

    def learn(self, seq: int) -> None:
        """Look whether rank 0 put a shard in quarantine before it admitted it."""
        if (self._quarantine / f"{seq}.json").exists():
            self._bad.add(seq)

    def scout(self, record: CommitRecord) -> None:
        """Verify a shard that was not admitted yet; a bad one goes to quarantine."""
        keys = [GroupKey(g.gid, g.caption_id, g.images) for g in record.groups]
        try:
            self._layouts[record.seq] = self._verify(
                record.name, sha256=record.sha256, num_bytes=record.bytes, groups=keys
            )
        except ShardMismatchError as error:
            self.quarantine(record.seq, record.name, str(error))
            self._bad.add(record.seq)

    def verify(self, shard: ShardRef, keys: Sequence[GroupKey]) -> None:
        """Check an admitted shard unless this process has; BadShardError, after quarantine."""
        if shard.seq in self._layouts:
            return
        try:
            self._layouts[shard.seq] = self._verify(
                shard.name, sha256=shard.sha256, num_bytes=shard.num_bytes, groups=keys
            )
        except ShardMismatchError as error:
            raise self.quarantine(shard.seq, shard.name, str(error)) from error

    def read(self, shard: ShardRef, place: int, images: Sequence[int]) -> list[Image]:
        """Images of the group at `place` in a verified shard, by their positions in the group."""
        return read_images(self._file(shard), self._layouts[shard.seq], place, images)

    def caption(self, shard: ShardRef, place: int) -> str:
        """The caption of the group at `place` in a verified shard."""
        return read_caption(self._file(shard), self._layouts[shard.seq], place)

    def _file(self, shard: ShardRef) -> Path:
        return self._copies.path(shard.name, sha256=shard.sha256, num_bytes=shard.num_bytes)

    def _verify(
        self, name: str, *, sha256: str, num_bytes: int, groups: Sequence[GroupKey]
    ) -> ShardLayout:
        """See `verify_shard`; a shard that is far away gets a second copy before it counts as bad:
        the first may have been damaged on the way here, or since.
        """
        verify = partial(self._verify_once, name, sha256=sha256, num_bytes=num_bytes, groups=groups)
        try:
            return verify()
        except ShardMismatchError:
            if not self._copies.drop(name):
                raise
        return verify()

    def _verify_once(
        self, name: str, *, sha256: str, num_bytes: int, groups: Sequence[GroupKey]
    ) -> ShardLayout:
        try:
            path = self._copies.path(name, sha256=sha256, num_bytes=num_bytes)
        except FileNotFoundError:
            raise ShardMismatchError("the file is missing") from None
        except ShardContentError as error:
            raise ShardMismatchError(str(error)) from error
        return verify_shard(path, sha256=sha256, num_bytes=num_bytes, groups=groups)

    def quarantine(self, seq: int, name: str, reason: str) -> BadShardError:
        """Record durably that the run does not use a shard; gives the error to raise."""
        note = {"seq": seq, "name": name, "reason": reason, "found_at": str(datetime.now(UTC))}
        publish_bytes(json.dumps(note).encode(), self._quarantine / f"{seq}.json")
        _log.error("shard_quarantined", extra={"shard": name, "seq": seq, "reason": reason})
        return BadShardError(seq, reason)
