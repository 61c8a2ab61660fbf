"""Every group of the part of the log that a run has admitted, as columns: about 60 bytes a group.

A group's position here is its position among all groups of the log, which nothing ever changes. How
often it was used follows from the window that admitted it, because each window uses each of its
groups once.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from synthrep_shared.commit_log import CommitRecord
from synthrep_trainer.order import Integers, SamplingPlan, is_held_out, uses_allowed
from synthrep_trainer.shard_files import GroupKey

_GROUP = np.dtype(
    [("gid", "S32"), ("caption_id", "i8"), ("shard", "i4"), ("images", "i4"),
     ("admitted", "i4"), ("rejected", "?"), ("bad", "?"), ("held_out", "?")]
)  # fmt: skip


class ShardRef(NamedTuple):
    """A committed shard as the log has it; its groups are `first` to `first + num_groups`."""

    seq: int
    name: str
    sha256: str
    num_bytes: int
    first: int
    num_groups: int


class GroupIndex:
    """Grows by whole log records; see the module."""

    def __init__(self, *, held_out: float = 0.0) -> None:
        """`held_out` is the share of captions that no window uses."""
        self._share = held_out
        self._rows: NDArray[np.void] = np.zeros(0, dtype=_GROUP)
        self._count = 0
        self._shards: list[ShardRef] = []

    def __len__(self) -> int:
        return self._count

    def add_shard(self, record: CommitRecord, *, window: int, is_bad: bool) -> None:
        """Take in the groups of a shard, usable from `window` on unless the shard is bad.

        Raises ValueError if a caption id is not hexadecimal.
        """
        first, count = self._count, len(record.groups)
        if first + count > len(self._rows):
            grown = np.zeros(max(1024, 2 * (first + count)), dtype=_GROUP)
            grown[:first] = self._rows[:first]
            self._rows = grown
        number = len(self._shards)
        self._rows[first : first + count] = [
            (g.gid, int(g.caption_id, 16), number, g.images, window, False, is_bad, out)
            for g, out in zip(record.groups, self._held_out_of(record), strict=True)
        ]
        self._count += count
        self._shards.append(
            ShardRef(record.seq, record.name, record.sha256, record.bytes, first, count)
        )

    def reject(self, gids: Collection[str]) -> None:
        """Leave these groups out of all windows that open from here on; one pass over all."""
        if gids:
            wanted = np.array(sorted(gid.encode() for gid in gids), dtype=_GROUP["gid"])
            found = np.searchsorted(wanted, self._live["gid"])
            nearest = wanted[np.minimum(found, len(wanted) - 1)]
            self._live["rejected"] |= nearest == self._live["gid"]

    def eligible(self, window: int, plan: SamplingPlan) -> Integers:
        """The groups that `window` uses: not held out, rejected or too old, below the bound on
        their uses.

        Groups of bad shards are among them: a shard may turn bad after the window has opened.
        """
        rows = self._live
        allowed = uses_allowed(plan, rows["images"].astype(np.int64))
        is_in = ~(rows["rejected"] | rows["held_out"])
        is_usable = is_in & (window - rows["admitted"] < allowed)
        if plan.max_age_groups is not None:
            is_usable[np.flatnonzero(is_in)[: -plan.max_age_groups]] = False
        return np.flatnonzero(is_usable)

    def images_unused(self, order: Integers, window: int) -> Integers:
        """For each place of a window's order, and its end: the stored images, of all groups from
        there on, that no window before `window` used.
        """
        rows = self._live
        is_unused = (rows["admitted"][order] == window) & ~rows["bad"][order]
        images = np.where(is_unused, rows["images"][order], 0)
        return np.append(np.cumsum(images[::-1], dtype=np.int64)[::-1], 0)

    def held_out(self) -> Integers:
        """The usable groups of held-out captions that have two images or more, in log order."""
        rows = self._live
        is_usable = rows["held_out"] & ~rows["rejected"] & ~rows["bad"]
        return np.flatnonzero(is_usable & (rows["images"] > 1))

    @property
    def num_trainable(self) -> int:
        """Groups that are not held out, rejected or in a bad shard, used up or not."""
        rows = self._live
        return int((~(rows["rejected"] | rows["held_out"] | rows["bad"])).sum())

    def num_images_trainable(self, record: CommitRecord) -> int:
        """Stored images of the groups that `count_trainable` counts."""
        is_in = ~self._held_out_of(record)
        return sum(g.images for g, kept in zip(record.groups, is_in, strict=True) if kept)

    def count_trainable(self, record: CommitRecord) -> int:
        """How many groups of a shard's record are of captions that are not held out."""
        return len(record.groups) - int(self._held_out_of(record).sum())

    def count_usable(self, groups: Integers, taken: set[int]) -> int:
        """How many of `groups` lie in good shards and are not `taken`."""
        usable = groups[~self._live["bad"][groups]]
        return len(usable) - int(np.isin(usable, np.array(sorted(taken), dtype=np.int64)).sum())

    def use_of(self, group: int, window: int) -> int:
        """How often the group was used before `window`."""
        return window - int(self._rows["admitted"][group])

    def is_bad(self, group: int) -> bool:
        """Whether the group's shard was bad when it was taken in."""
        return bool(self._rows["bad"][group])

    def num_images(self, group: int) -> int:
        """Stored images of the group."""
        return int(self._rows["images"][group])

    def caption_id(self, group: int) -> int:
        """The group's caption id as an integer."""
        return int(self._rows["caption_id"][group])

    def shard_of(self, group: int) -> ShardRef:
        """The shard that holds the group."""
        return self._shards[self._rows["shard"][group]]

    def keys_of(self, shard: ShardRef) -> list[GroupKey]:
        """What the log says of the groups of a shard, in its order."""
        rows = self._rows[shard.first : shard.first + shard.num_groups]
        return [
            GroupKey(row["gid"].decode(), f"{row['caption_id']:015x}", int(row["images"]))
            for row in rows
        ]

    def _held_out_of(self, record: CommitRecord) -> NDArray[np.bool_]:
        if not self._share:
            return np.zeros(len(record.groups), dtype=bool)
        ids = np.array([int(group.caption_id, 16) for group in record.groups], dtype=np.int64)
        return is_held_out(ids, self._share)

    @property
    def _live(self) -> NDArray[np.void]:
        return self._rows[: self._count]
