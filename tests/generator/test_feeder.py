"""Cutting chunks: complete, without overlap, in order, and the same on every stack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthrep_generator.chunks import Chunk, Place
from synthrep_generator.feeder import BatchFeed, DatasetFeed, cut_chunks
from synthrep_generator.intake import BatchHeader, set_paused, write_batch
from synthrep_shared.commit_log import CommitLog, GroupRef, Outcomes
from synthrep_shared.messages import GenerationSettings, MixtureComponent
from synthrep_shared.storage import DatasetPaths

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def header(
    batch: str,
    prompts: int,
    *,
    priority: int = 5,
    age_s: int = 0,
    images: int = 2,
    mixture: tuple[MixtureComponent, ...] = (),
) -> BatchHeader:
    return BatchHeader(
        id=batch,
        dataset="birds",
        owner="",
        priority=priority,
        num_prompts=prompts,
        settings=GenerationSettings(images_per_prompt=images, mixture=mixture),
        body_sha256="",
        created_at=NOON - timedelta(seconds=age_s),
    )


@pytest.fixture
def paths(tmp_path: Path) -> DatasetPaths:
    paths = DatasetPaths(tmp_path, "birds")
    paths.make_folders()
    return paths


def accept(paths: DatasetPaths, batch: str, prompts: int, **kwargs: Any) -> None:
    write_batch(paths, header(batch, prompts, **kwargs), [f"p{i}" for i in range(prompts)])


def feed(paths: DatasetPaths) -> DatasetFeed:
    """Jobs of four prompts of two images."""
    feed = DatasetFeed(paths, job_images=8)
    feed.refresh()
    return feed


def decide(paths: DatasetPaths, places: list[Place]) -> None:
    groups = tuple(
        GroupRef(gid=f"{p.batch}{p.index}", caption_id="0", batch=p.batch, index=p.index, images=2)
        for p in places
    )
    CommitLog(paths.log).append("shard", name=lambda seq: f"{seq}", groups=groups)


def texts(chunks: list[Chunk]) -> list[str]:
    return [" ".join(f"{p.batch}{p.start}+{p.count}" for p in chunk.parts) for chunk in chunks]


def test_a_batch_is_cut_into_blocks_from_its_start(paths: DatasetPaths) -> None:
    accept(paths, "a", 10)
    assert texts(cut_chunks([feed(paths)], frozenset(), room=9)) == ["a0+4", "a4+4", "a8+2"]


def test_chunks_do_not_depend_on_how_the_cutting_went(paths: DatasetPaths) -> None:
    accept(paths, "a", 22)
    at_once = cut_chunks([feed(paths)], frozenset(), room=99)
    one_by_one, slow = [], feed(paths)
    in_flight: set[Place] = set()
    while chunks := cut_chunks([slow], in_flight, room=1):
        one_by_one += chunks
        in_flight |= set(chunks[0].places())
    assert [chunk.id for chunk in one_by_one] == [chunk.id for chunk in at_once]


def test_small_batches_of_equal_settings_share_a_chunk(paths: DatasetPaths) -> None:
    for i, batch in enumerate("abcdef"):
        accept(paths, batch, 1, age_s=10 - i, images=1 if batch == "c" else 2)
    cut = texts(cut_chunks([feed(paths)], frozenset(), room=9))
    assert cut == ["a0+1 b0+1 d0+1 e0+1", "c0+1", "f0+1"]


MIXTURE = (
    MixtureComponent(guidance_scale=1.0, weight=1),
    MixtureComponent(guidance_scale=3.0, weight=3),
)


def test_a_chunk_of_a_mixture_is_made_in_one_way(paths: DatasetPaths) -> None:
    accept(paths, "a", 200, mixture=MIXTURE)
    made = header("a", 200, mixture=MIXTURE)
    chunks = cut_chunks([feed(paths)], frozenset(), room=99)
    scales = []
    for chunk in chunks:
        (scale,) = {made.settings_of(place.index).guidance_scale for place in chunk.places()}
        scales.append(scale)
    assert sorted(p.index for c in chunks for p in c.places()) == list(range(200))
    # Fifty prompts in 12 full chunks and one of two, 150 in 37 and one; turns of eight chunks.
    assert Counter(scales) == {1.0: 13, 3.0: 38}
    assert [len(list(run)) for _, run in groupby(scales)] == [8, 24, 5, 14]
    assert sum(chunk.num_prompts < 4 for chunk in chunks) == 2


def test_a_mixture_is_cut_the_same_after_a_restart(paths: DatasetPaths) -> None:
    accept(paths, "a", 50, mixture=MIXTURE)
    at_once = cut_chunks([feed(paths)], frozenset(), room=99)
    one_by_one = []
    while chunks := cut_chunks([feed(paths)], frozenset(), room=1):
        one_by_one += chunks
        decide(paths, list(chunks[0].places()))
    assert [chunk.id for chunk in one_by_one] == [chunk.id for chunk in at_once]


def test_remainders_of_mixtures_share_chunks_with_batches_of_their_kind(
    paths: DatasetPaths,
) -> None:
    accept(paths, "a", 4, mixture=MIXTURE, age_s=9)
    accept(paths, "b", 4, mixture=MIXTURE[:1])
    small, other, _ = cut_chunks([feed(paths)], frozenset(), room=9)
    assert (small.num_prompts, other.num_prompts) == (1, 3)
    accept(paths, "c", 3, mixture=MIXTURE[:1], age_s=5)
    shared, *_ = cut_chunks([feed(paths)], frozenset(), room=9)
    assert [part.batch for part in shared.parts] == ["a", "c"]


def test_priority_goes_before_age(paths: DatasetPaths) -> None:
    accept(paths, "a", 4, priority=5, age_s=9)
    accept(paths, "b", 4, priority=5, age_s=99)
    accept(paths, "c", 4, priority=0)
    assert texts(cut_chunks([feed(paths)], frozenset(), room=2)) == ["c0+4", "b0+4"]


def test_a_small_urgent_batch_is_not_passed_by_full_chunks(paths: DatasetPaths) -> None:
    accept(paths, "a", 1, priority=0, images=1)
    accept(paths, "b", 40)
    assert texts(cut_chunks([feed(paths)], frozenset(), room=1)) == ["a0+1"]


def test_what_is_decided_or_in_flight_is_left_out(paths: DatasetPaths) -> None:
    accept(paths, "a", 8)
    decide(paths, [Place("a", 0), Place("a", 2)])
    chunks = cut_chunks([feed(paths)], {Place("a", 5)}, room=9)
    assert texts(chunks) == ["a1+1 a3+1", "a4+1 a6+2"]


def test_a_paused_batch_waits_and_a_cancelled_one_is_dropped(paths: DatasetPaths) -> None:
    accept(paths, "a", 2)
    accept(paths, "b", 2)
    set_paused(paths, "a", True)
    CommitLog(paths.log).append("cancel", name=lambda _: "b")
    both = feed(paths)
    assert cut_chunks([both], frozenset(), room=9) == []
    set_paused(paths, "a", False)
    assert texts(cut_chunks([both], frozenset(), room=9)) == ["a0+2"]


def test_a_troubled_batch_comes_after_others_and_is_not_forgotten(paths: DatasetPaths) -> None:
    accept(paths, "a", 4)
    accept(paths, "b", 4)
    chunks = cut_chunks([feed(paths)], frozenset(), room=9, troubled={"a"})
    assert texts(chunks) == ["b0+4", "a0+4"]


def test_a_malformed_intake_file_is_passed_over(paths: DatasetPaths) -> None:
    accept(paths, "a", 2)
    (paths.intake / "b.jsonl").write_text("{}\n")
    assert texts(cut_chunks([feed(paths)], frozenset(), room=9)) == ["a0+2"]


class CountingOutcomes(Outcomes):
    looks = 0

    def is_decided(self, batch: str, index: int) -> bool:
        self.looks += 1
        return super().is_decided(batch, index)


def test_decided_blocks_are_not_looked_at_again() -> None:
    outcomes = CountingOutcomes()
    batch = BatchFeed(header("a", 4000), job_images=8)
    outcomes.cancelled = {"a"}
    assert list(batch.free_blocks(outcomes, frozenset())) == []
    looks = outcomes.looks
    assert list(batch.free_blocks(outcomes, frozenset())) == []
    assert batch.is_finished(outcomes)
    assert outcomes.looks == looks == 4000


sizes = st.lists(st.tuples(st.integers(1, 11), st.integers(1, 3)), min_size=1, max_size=6)


@given(sizes, st.data())
def test_sweeps_hand_out_every_prompt_once_whatever_happens_between(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]], data: st.DataObject
) -> None:
    paths = DatasetPaths(tmp_path_factory.mktemp("feed"), "birds")
    paths.make_folders()
    for i, (prompts, images) in enumerate(sizes):
        accept(paths, f"b{i}", prompts, images=images, priority=i % 2)
    everything = {Place(f"b{i}", k) for i, (prompts, _) in enumerate(sizes) for k in range(prompts)}
    images_of = {f"b{i}": images for i, (_, images) in enumerate(sizes)}
    cutter = feed(paths)
    in_flight: set[Place] = set()
    done: set[Place] = set()
    for chunk in _sweeps(cutter, in_flight, data):
        places = list(chunk.places())
        assert not set(places) & (in_flight | done)
        assert len({images_of[place.batch] for place in places}) == 1
        assert len(places) * images_of[places[0].batch] <= 8
        lost = data.draw(st.integers(0, len(places)))
        decided = places[lost:]
        if decided:
            decide(paths, decided)
            done |= set(decided)
        cutter.refresh()
    assert done == everything


def _sweeps(cutter: DatasetFeed, in_flight: set[Place], data: st.DataObject) -> Iterator[Chunk]:
    for _ in range(200):
        chunks = cut_chunks([cutter], in_flight, room=data.draw(st.integers(1, 3)))
        if not chunks:
            return
        places = [place for chunk in chunks for place in chunk.places()]
        assert len(set(places)) == len(places)
        yield from chunks
