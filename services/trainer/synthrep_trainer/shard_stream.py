"""The endless stream of draws from a growing log: the same for a seed however often it is cut off.

A *window* is one pass over all groups that the log held when the window opened: each group that is
neither rejected nor used up comes once, in the order of `order.window_order(seed, window)`. Batches
are cut from window after window without a gap; a group that would come twice into a batch waits for
the next one. So a group that was admitted by window a has been used w - a times before window w,
and which of its images a use takes is arithmetic too: nothing is counted, nothing needs replaying.

What depends on the clock is how far the log had grown when a window opened. Rank 0 decides that,
once: it verifies the new shards, and writes (window, log position, step) durably to the run's
`admissions.jsonl` before it uses the first row. Every other rank, and every later attempt after a
kill, reads the line instead of deciding. Order is thereby a function of the seed and of the log up
to positions that are written down; the *cursor* (window, row in it, waiting draws) is all that a
checkpoint has to hold. Batches are cut alike on every rank, and rank r takes the captions r,
r + world, … of each, so the number of ranks may change at any checkpoint.

A window opens as soon as it can complete the batch in hand (the first one: `min_fill_groups`), and
until then the stream waits: for the first shards, or because every image is at its bound of uses. A
rejection takes effect with the next window. A shard that is not what the log says goes to the run's
`quarantine/` and its draws are passed over, which moves only what comes after them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from synthrep_shared.commit_log import CommitRecord, LogReader
from synthrep_shared.shard_copies import COPY_BYTES, ShardPlace
from synthrep_shared.storage import Location
from synthrep_trainer.admissions import AdmissionJournal
from synthrep_trainer.admitted_log import AdmittedLog
from synthrep_trainer.errors import LogChangedError
from synthrep_trainer.group_index import ShardRef
from synthrep_trainer.order import Integers, SamplingPlan, draw_images, window_order
from synthrep_trainer.shard_store import ShardStore


class LoggedPlace(ShardPlace, Protocol):
    """A data set's shards and its commit log; `DatasetPaths` is one."""

    @property
    def log(self) -> Location: ...


class Draw(NamedTuple):
    """One use of a group: its position in the log and how often it was used before."""

    group: int
    use: int


class Cursor(NamedTuple):
    """Where the next batch begins: at a row of a window, after draws that wait for it."""

    window: int = -1
    row: int = 0
    waiting: tuple[Draw, ...] = ()

    @classmethod
    def from_json(cls, fields: list[Any]) -> Self:
        """What JSON makes of a cursor, made a cursor again."""
        window, row, waiting = fields
        return cls(window, row, tuple(Draw(*draw) for draw in waiting))


class Pressure(NamedTuple):
    """Whether the generator is ahead of the training, or behind it."""

    images_untrained: int
    """Committed images of groups of which none was drawn yet."""
    is_waiting: bool
    """Whether the stream waits for new images."""


class DrawnGroup(NamedTuple):
    """A caption of a batch: its row among those of all ranks, and where its images are."""

    row: int
    group: int
    caption_id: int
    shard: ShardRef
    place: int
    images: list[int]


class DrawnBatch(NamedTuple):
    """The captions that this rank reads, and the cursor after the batch, equal on all ranks."""

    step: int
    groups: list[DrawnGroup]
    cursor: Cursor


class ShardStream:
    """Cuts batches for one rank; one thread. `store` reads what was drawn, in any thread."""

    def __init__(
        self,
        place: LoggedPlace,
        run_folder: Path,
        plan: SamplingPlan,
        *,
        step: int = 0,
        cursor: Cursor | None = None,
        rank: int = 0,
        world_size: int = 1,
        poll_s: float = 0.05,
        verify_s: float = 10.0,
        copy_bytes: int = COPY_BYTES,
        reader: LogReader | None = None,
        on_shard: Callable[[CommitRecord], None] = lambda _: None,
    ) -> None:
        """Goes on after `step` batches, at `cursor`; `reader` reads the log of `place`.

        `on_shard` is told of every shard that is admitted.

        All ranks are to be made before any of them draws. Raises ValueError if the captions cannot
        be shared evenly, RunError if the run's journal or the log does not fit the cursor.
        """
        if plan.captions_per_batch % world_size:
            raise ValueError(
                f"{plan.captions_per_batch} captions cannot be shared evenly by {world_size} ranks"
            )
        self._plan, self._rank, self._world_size = plan, rank, world_size
        self._poll_s = poll_s
        self._pressure = Pressure(0, is_waiting=False)
        self.waiting_for = ""  # in words, on rank 0, from any thread; empty: for nothing
        self.ratio_waits, self.ratio_wait_s = 0, 0.0  # batches that waited for it, on rank 0
        self._journal = AdmissionJournal(run_folder / "admissions.jsonl", is_writer=rank == 0)
        self.store = ShardStore(place, run_folder, copy_bytes=copy_bytes)
        reader = reader or LogReader(place.log)
        self._log = AdmittedLog(
            reader, self._journal, self.store, plan, verify_s=verify_s, on_shard=on_shard
        )
        self._step = step
        self._cursor = cursor or Cursor()
        for window in range(self._cursor.window + 1):
            admission = self._journal.get(window)
            if admission is None:
                raise LogChangedError(f"{run_folder} has no admission of window {window}")
            self._log.admit(admission)
        self._order, self._unused = self._order_of(self._cursor.window)

    @property
    def images_committed(self) -> int:
        """Images of the log as far as this process has read it."""
        return self._log.images_committed

    @property
    def pressure(self) -> Pressure:
        """How the last batch left the stock; on rank 0, from any thread."""
        return self._pressure

    def next_batch(self, should_stop: Callable[[], bool]) -> DrawnBatch | None:
        """This rank's captions of the next batch; blocks until the log has enough for all ranks.

        None once `should_stop` says so while waiting, which ends the stream. Raises
        LogChangedError, CommitLogError and what the file system raises.
        """
        self._step += 1
        if self._rank == 0 and not self._wait_for_ratio(should_stop):
            return None
        draws: list[Draw] = []
        taken: set[int] = set()
        repeated: list[Draw] = []
        window, row = self._cursor.window, self._cursor.row
        waiting = iter(self._cursor.waiting)
        while len(draws) < self._plan.captions_per_batch:
            draw = next(waiting, None)
            if draw is None and row == len(self._order):
                if not self._open(window + 1, taken, should_stop):
                    return None
                window, row = window + 1, 0
                continue
            if draw is None:
                group = int(self._order[row])
                draw = Draw(group, self._log.index.use_of(group, window))
                row += 1
            if draw.group in taken:
                repeated.append(draw)
            elif not self._log.index.is_bad(draw.group):
                taken.add(draw.group)
                draws.append(draw)
        self._cursor = Cursor(window, row, (*repeated, *waiting))
        self.waiting_for = ""
        if self._rank == 0:
            self._log.scout()
            self._weigh(row, is_waiting=False)
        return DrawnBatch(self._step, list(self._share(draws)), self._cursor)

    def held_out(self, *, captions: int, images: int) -> list[DrawnGroup]:
        """This rank's share of the first held-out groups that the log had for the last batch.

        Groups have two images or more, of which the first `images` are given.
        """
        index = self._log.index
        groups = index.held_out()[:captions]
        found = []
        for row in range(self._rank, len(groups), self._world_size):
            group = int(groups[row])
            shard = index.shard_of(group)
            images_of_it = list(range(min(images, index.num_images(group))))
            place, caption_id = group - shard.first, index.caption_id(group)
            found.append(DrawnGroup(row, group, caption_id, shard, place, images_of_it))
        return found

    def verify(self, shard: ShardRef) -> None:
        """Check a shard unless this process has checked it; any thread, see `ShardStore.verify`."""
        self.store.verify(shard, self._log.index.keys_of(shard))

    def _open(self, window: int, taken: set[int], should_stop: Callable[[], bool]) -> bool:
        """Admit what `window` draws from, waiting for it; False if stopped before that."""
        missing = self._plan.captions_per_batch - len(taken)
        if window == 0:
            missing = max(missing, self._plan.min_fill_groups)
        while (admission := self._journal.get(window)) is None:
            if self._rank == 0 and self._log.decide(
                window, step=self._step, missing=missing, taken=taken
            ):
                continue
            if should_stop():
                return False
            if self._rank == 0:
                wanted, num_taken = missing + len(taken), len(taken)
                self.waiting_for = self._log.lack(wanted=wanted, num_taken=num_taken)
            self._weigh(len(self._order), is_waiting=True)
            self._log.wait(self._poll_s)
        self._log.admit(admission)
        self._order, self._unused = self._order_of(window)
        return True

    def _wait_for_ratio(self, should_stop: Callable[[], bool]) -> bool:
        """Wait until so many images are committed as the batch takes; False if stopped before."""
        plan = self._plan
        wanted = plan.min_generated_per_trained * self._step * plan.views_per_batch
        self.ratio_waits += self._log.images_committed < wanted
        while self._log.images_committed < wanted:
            began = time.monotonic()
            if should_stop():
                return False
            self._log.scout()
            self.waiting_for = (
                f"new images: {self._log.images_committed:,} of {ceil(wanted):,} are there"
            )
            self._weigh(self._cursor.row, is_waiting=True)
            self._log.wait(self._poll_s)
            self.ratio_wait_s += time.monotonic() - began
        return True

    def _weigh(self, row: int, *, is_waiting: bool) -> None:
        """Take stock of what a window has left from a row of its order on."""
        unused = int(self._unused[row])
        self._pressure = Pressure(unused + self._log.images_upcoming, is_waiting)

    def _order_of(self, window: int) -> tuple[Integers, Integers]:
        """The groups of a window in their order, and what is unused from each of them on."""
        order = window_order(self._plan.seed, max(window, 0), self._log.eligible(window))
        return order, self._log.index.images_unused(order, window)

    def _share(self, draws: list[Draw]) -> Iterator[DrawnGroup]:
        index = self._log.index
        for row in range(self._rank, len(draws), self._world_size):
            group, use = draws[row]
            shard = index.shard_of(group)
            images = draw_images(
                self._plan.seed, group, use,
                num_images=index.num_images(group), num_drawn=self._plan.images_per_caption,
            )  # fmt: skip
            place = group - shard.first
            yield DrawnGroup(row, group, index.caption_id(group), shard, place, images)
