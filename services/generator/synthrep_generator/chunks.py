"""A chunk: the prompts of one job, named by their places in the intake files of one data set.

Its id is a function of its content, so that whoever cuts the same prompts gets the same chunk.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from synthrep_shared.samples import DATASET_PATTERN

_BATCH_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
_MAX_PROMPTS = 100_000


@dataclass(frozen=True, slots=True)
class Place:
    """Where a prompt stands: its batch and its position in it."""

    batch: str
    index: int


class Part(BaseModel):
    """A run of consecutive prompts of one batch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: str = Field(pattern=_BATCH_PATTERN)
    start: int = Field(ge=0)
    count: int = Field(ge=1, le=_MAX_PROMPTS)


class Chunk(BaseModel):
    """Prompts of one data set with equal generation settings; travels through Redis as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    dataset: str = Field(pattern=DATASET_PATTERN)
    parts: tuple[Part, ...] = Field(min_length=1, max_length=_MAX_PROMPTS)

    @cached_property
    def id(self) -> str:
        """Thirty-two hex digits."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:32]

    @property
    def names(self) -> dict[str, Any]:
        """What logs and traces call it: its id, its data set, its batches."""
        batches = list(dict.fromkeys(part.batch for part in self.parts))
        return {"chunk": self.id, "dataset": self.dataset, "batches": batches}

    @property
    def num_prompts(self) -> int:
        """Prompts in all parts."""
        return sum(part.count for part in self.parts)

    def places(self) -> Iterator[Place]:
        """The places of the prompts, in order."""
        for part in self.parts:
            for index in range(part.start, part.start + part.count):
                yield Place(part.batch, index)

    def isolate(self, suspects: Container[Place]) -> list[Chunk]:
        """The innocent prompts as one chunk, if there are any, then each suspect alone."""
        places = list(self.places())
        alone = [[place] for place in places if place in suspects]
        groups = [[place for place in places if place not in suspects], *alone]
        return [chunk_from_places(self.dataset, group) for group in groups if group]


class PlacesOf:
    """The places in many chunks, to be asked with `in`; a part is taken in at once."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._indices: defaultdict[str, set[int]] = defaultdict(set)
        for chunk in chunks:
            for part in chunk.parts:
                self._indices[part.batch].update(range(part.start, part.start + part.count))

    def __contains__(self, place: object) -> bool:
        return isinstance(place, Place) and place.index in self._indices.get(place.batch, ())


def chunk_from_places(dataset: str, places: Iterable[Place]) -> Chunk:
    """The chunk of these places, in this order; consecutive ones become one part."""
    runs: list[tuple[Place, int]] = []  # first place, length
    first, count = None, 0
    for place in places:
        if first and first.batch == place.batch and first.index + count == place.index:
            count += 1
            continue
        if first:
            runs.append((first, count))
        first, count = place, 1
    if first:
        runs.append((first, count))
    parts = tuple(Part(batch=p.batch, start=p.index, count=number) for p, number in runs)
    return Chunk(dataset=dataset, parts=parts)
