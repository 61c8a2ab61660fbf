"""The part of the commit log that a run has admitted, window by window.

Rank 0 decides how far the log counts for a window, after it has verified the shards up to there;
all ranks, and all later attempts, then admit the same records. `shard_stream` says why.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable

from synthrep_shared.commit_log import CommitRecord, LogReader
from synthrep_shared.errors import CommitLogError
from synthrep_trainer.admissions import Admission, AdmissionJournal
from synthrep_trainer.errors import LogChangedError
from synthrep_trainer.group_index import GroupIndex
from synthrep_trainer.order import Integers, SamplingPlan
from synthrep_trainer.shard_store import ShardStore

_log = logging.getLogger(__name__)
_POLL_SHARE = 20  # polls that find nothing may take one part in so many of the time
_LOG_BEHIND_S = 30.0  # a shared file system may show a rank the log later than rank 0


class AdmittedLog:
    """Follows one dataset's log for one run; one thread."""

    def __init__(
        self,
        reader: LogReader,
        journal: AdmissionJournal,
        store: ShardStore,
        plan: SamplingPlan,
        *,
        verify_s: float,
        on_shard: Callable[[CommitRecord], None] = lambda _: None,
    ) -> None:
        """`on_shard` is told of every shard that is admitted."""
        self._on_shard = on_shard
        self.index = GroupIndex(held_out=plan.held_out)
        self.images_committed = 0
        self._journal, self._store, self._plan = journal, store, plan
        self._verify_s = verify_s
        self._reader = reader
        self._next_poll = 0.0
        self._unseen: deque[CommitRecord] = deque()  # read from the file
        self._scouted: deque[CommitRecord] = deque()  # and verified, on rank 0
        self._upcoming: dict[int, int] = {}  # images in these, by shard
        self._digest = hashlib.sha256()
        self._seq = 0
        self._journaled_seq = journal.last_seq
        self._usable = 0  # groups, when a window was last decided

    @property
    def images_upcoming(self) -> int:
        """Images that were read from the log and that no window has admitted."""
        return sum(self._upcoming.values())

    def eligible(self, window: int) -> Integers:
        """The groups that `window` uses, by their positions in the log."""
        return self.index.eligible(window, self._plan)

    def admit(self, admission: Admission) -> None:
        """Take in what a window admits.

        Raises LogChangedError if these are not the records that were admitted at first, and
        CommitLogError if they do not appear within half a minute.
        """
        if self._seq < admission.seq > self._journaled_seq:
            span = {"first_seq": self._seq + 1, "last_seq": admission.seq}
            _log.info("records_admitted", extra={"window": admission.window, **span})
        rejected: list[str] = []
        while self._seq < admission.seq:
            record = self._scouted.popleft() if self._scouted else self._next(admission)
            _identify(self._digest, [record])
            self._seq = record.seq
            self._upcoming.pop(record.seq, None)
            if record.kind == "shard":
                if record.seq > self._journaled_seq:
                    self._store.learn(record.seq)
                is_bad = self._store.is_bad(record.seq)
                self.index.add_shard(record, window=admission.window, is_bad=is_bad)
                self._on_shard(record)
            elif record.kind == "reject":
                rejected += (group.gid for group in record.groups)
        self.index.reject(rejected)
        if self._digest.hexdigest() != admission.log:
            raise LogChangedError(
                f"{self._reader.path} is not the log that window {admission.window} of this run "
                "was drawn from; a run can only go on with the dataset that it began with"
            )

    def decide(self, window: int, *, step: int, missing: int, taken: set[int]) -> bool:
        """Journal how far the log counts for `window` if that gives `missing` groups; rank 0 only.

        `taken` are groups that do not count, because the batch in hand has them already.
        """
        deadline = time.monotonic() + self._verify_s
        while True:
            more = self.scout(limit_s=deadline - time.monotonic())
            self._usable = self._count_usable(window, taken)
            if self._usable >= missing:
                break
            if not more:
                return False
        digest = self._digest.copy()
        _identify(digest, self._scouted)
        seq = self._scouted[-1].seq if self._scouted else self._seq
        self._journal.append(Admission(window=window, seq=seq, step=step, log=digest.hexdigest()))
        return True

    def lack(self, *, wanted: int, num_taken: int) -> str:
        """What `decide` found too few of, in words, for a batch of `wanted` groups; rank 0 only."""
        if self.index.num_trainable + self._count_fresh() < wanted:
            return f"captions: {num_taken + self._usable:,} of {wanted:,} are there"
        uses = self._plan.max_uses_per_image
        return (
            f"new images: those there were used {'once' if uses == 1 else f'{uses:,} times'} each"
        )

    def _count_usable(self, window: int, taken: set[int]) -> int:
        """Groups that `window` would have if it admitted what was scouted.

        With an age limit it may have fewer, as some get too old by that: the next window then
        completes the batch.
        """
        return self.index.count_usable(self.eligible(window), taken) + self._count_fresh()

    def _count_fresh(self) -> int:
        return sum(
            self.index.count_trainable(record)
            for record in self._scouted
            if record.kind == "shard" and not self._store.is_bad(record.seq)
        )

    def scout(self, *, limit_s: float = 0.0) -> bool:
        """Verify shards that the log has and no window admitted, one at least, until `limit_s`.

        True if more are left. Rank 0 does it before every batch, so that windows seldom wait.
        """
        deadline = time.monotonic() + limit_s
        self._poll()
        while self._unseen:
            record = self._unseen.popleft()
            self._scouted.append(record)
            # What was admitted once is verified when it is read; a bad one ends the process there.
            if record.kind == "shard" and record.seq > self._journaled_seq:
                self._store.scout(record)
                if self._store.is_bad(record.seq):
                    self._upcoming.pop(record.seq, None)
                if time.monotonic() >= deadline:
                    break
        return bool(self._unseen)

    def wait(self, timeout_s: float) -> None:
        """Block until the log has more, where that is cheap to see, or for `timeout_s`."""
        self._reader.wait(timeout_s)

    def _next(self, admission: Admission) -> CommitRecord:
        deadline = time.monotonic() + _LOG_BEHIND_S
        self._poll()
        while not self._unseen:
            if time.monotonic() > deadline:
                raise CommitLogError(
                    f"{self._reader.path} ends at {self._reader.seq}, but window "
                    f"{admission.window} of this run was drawn from {admission.seq} records"
                )
            time.sleep(0.1)
            self._poll()
        return self._unseen.popleft()

    def _poll(self) -> None:
        started = time.monotonic()
        if not self._unseen and started >= self._next_poll:
            self._unseen.extend(self._reader.poll())
            now = time.monotonic()
            self._next_poll = now if self._unseen else now + _POLL_SHARE * (now - started)
            for record in self._unseen:
                if record.kind == "shard":
                    self.images_committed += sum(group.images for group in record.groups)
                    if not self._store.is_bad(record.seq):
                        images = self.index.num_images_trainable(record)
                        self._upcoming[record.seq] = images


def _identify(digest: hashlib._Hash, records: Iterable[CommitRecord]) -> None:
    for record in records:
        digest.update(f"{record.seq} {record.kind} {record.name} {record.sha256}\n".encode())
