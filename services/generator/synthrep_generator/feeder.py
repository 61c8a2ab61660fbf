"""What is left to do: intake minus outcomes minus in flight, cut into chunks.

A batch is cut into blocks of equal size from its start, whatever was done of it and when; a block
with fewer free prompts than that shares a chunk with others of equal settings. So a batch alone
gives the same chunks on every stack, and many small batches still fill the device. A block of a
mixture holds prompts of one component; components take turns of several blocks, in step with their
shares, so that models change seldom and groups of all of them come all along.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from synthrep_generator.chunks import Chunk, Place, chunk_from_places
from synthrep_generator.intake import BatchHeader, list_batches, list_paused, read_headers
from synthrep_shared.commit_log import CommitLog, Outcomes
from synthrep_shared.storage import DatasetPaths

_TURN_BLOCKS = 8


@dataclass(frozen=True)
class Cut:
    """Prompts of one batch that may share a chunk with others of the same kind."""

    kind: tuple[str, str]
    """Data set and settings."""
    places: list[Place]


class BatchFeed:
    """The unfinished blocks of one batch; blocks found decided are not looked at again."""

    def __init__(self, header: BatchHeader, *, job_images: int) -> None:
        self.header = header
        self.block_prompts = max(1, job_images // header.settings.images_per_prompt)
        self._kinds = [(header.dataset, v.model_dump_json()) for v in header.variants]
        self._unfinished: list[int] = []
        self._next_block = 0

    @property
    def urgency(self) -> tuple[int, datetime, str]:
        """Sorts batches by priority, then age."""
        return self.header.priority, self.header.created_at, self.header.id

    def is_finished(self, outcomes: Outcomes) -> bool:
        """Whether every prompt is decided, as far as the last `free_blocks` saw."""
        if self.header.id in outcomes.cancelled:
            return True
        return self._next_block == len(self._blocks) and not self._unfinished

    def free_blocks(self, outcomes: Outcomes, in_flight: Container[Place]) -> Iterator[Cut]:
        """The prompts, block by block, that are neither decided nor in flight."""
        for block in list(self._unfinished):
            undecided = self._undecided(block, outcomes)
            if not undecided:
                self._unfinished.remove(block)
            elif free := [place for place in undecided if place not in in_flight]:
                yield Cut(self._kinds[self._blocks[block][0]], free)
        while self._next_block < len(self._blocks):
            block = self._next_block
            undecided = self._undecided(block, outcomes)
            if undecided:
                self._unfinished.append(block)
            self._next_block += 1
            if free := [place for place in undecided if place not in in_flight]:
                yield Cut(self._kinds[self._blocks[block][0]], free)

    @cached_property
    def _blocks(self) -> list[tuple[int, int]]:
        """(component, block of it), in the order in which they are fed."""
        deal, size = self.header.deal, self.block_prompts
        counts = [-(-deal.count(c) // size) for c in range(len(self._kinds))]
        blocks = [(c, block) for c, count in enumerate(counts) for block in range(count)]

        def due(place: tuple[int, int]) -> float:
            component, block = place
            return block // _TURN_BLOCKS * _TURN_BLOCKS / counts[component]

        return sorted(blocks, key=due) if len(counts) > 1 else blocks

    def _undecided(self, block: int, outcomes: Outcomes) -> list[Place]:
        component, number = self._blocks[block]
        start = number * self.block_prompts
        indices = self.header.deal.indices(component, start, start + self.block_prompts)
        batch = self.header.id
        return [Place(batch, i) for i in indices if not outcomes.is_decided(batch, i)]


class DatasetFeed:
    """The unfinished batches of one data set and what its log says of them."""

    def __init__(self, paths: DatasetPaths, *, job_images: int) -> None:
        self.paths = paths
        self._job_images = job_images
        self._log = CommitLog(paths.log)
        self._batches: dict[str, BatchFeed] = {}
        self._known: set[str] = set()

    @property
    def outcomes(self) -> Outcomes:
        """What the log said at the last `refresh`."""
        return self._log.outcomes

    def refresh(self) -> None:
        """Read new log lines and new intake files; raises CommitLogError on a malformed log.

        A malformed intake file is passed over; OSError is raised, and the next call tries again.
        """
        self._log.refresh()
        new = set(list_batches(self.paths)) - self._known
        for batch, header in read_headers(self.paths, new):
            self._known.add(batch)
            if header is not None:
                self._batches[batch] = BatchFeed(header, job_images=self._job_images)

    def batches(self) -> list[BatchFeed]:
        """The batches with something left to do, paused ones too."""
        for batch in [b for b, feed in self._batches.items() if feed.is_finished(self.outcomes)]:
            del self._batches[batch]
        return list(self._batches.values())

    def undecided(self, chunk: Chunk) -> list[Place]:
        """The prompts of a chunk without an outcome."""
        decided = self.outcomes.is_decided
        return [place for place in chunk.places() if not decided(place.batch, place.index)]


def cut_chunks(
    feeds: Sequence[DatasetFeed],
    in_flight: Container[Place],
    *,
    room: int,
    troubled: Set[str] = frozenset(),
) -> list[Chunk]:
    """At most `room` chunks of free prompts, most urgent first, of `troubled` batches last.

    `in_flight` holds the places of every data set; batch ids are unique over all of them.
    """
    if not room:
        return []
    cuts: list[tuple[str, list[Place]]] = []
    shared: dict[tuple[str, str], list[Place]] = {}
    batches = [(batch, feed) for feed in feeds for batch in feed.batches()]
    paused = {batch for feed in feeds for batch in list_paused(feed.paths)}
    batches.sort(key=lambda pair: (pair[0].header.id in troubled, pair[0].urgency))
    for batch, feed in batches:
        if batch.header.id in paused:
            continue
        for cut in batch.free_blocks(feed.outcomes, in_flight):
            partial = shared.get(cut.kind)
            if partial is not None and len(partial) + len(cut.places) <= batch.block_prompts:
                partial += cut.places
                continue
            if len(cuts) == room:
                return _chunks(cuts)
            cuts.append((batch.header.dataset, cut.places))
            if len(cut.places) < batch.block_prompts:
                shared[cut.kind] = cut.places
    return _chunks(cuts)


def _chunks(cuts: list[tuple[str, list[Place]]]) -> list[Chunk]:
    return [chunk_from_places(dataset, places) for dataset, places in cuts]
