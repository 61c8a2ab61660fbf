from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthrep_generator.intake import BatchHeader
from synthrep_generator.tally import Pace, Tally
from synthrep_shared.commit_log import CommitRecord, GroupRef
from synthrep_shared.messages import GenerationSettings

START = datetime(2026, 1, 1, tzinfo=UTC)


def header_of(batch: str, num_prompts: int, images: int = 3) -> BatchHeader:
    return BatchHeader(
        id=batch,
        dataset="pets",
        owner="",
        priority=5,
        num_prompts=num_prompts,
        settings=GenerationSettings(images_per_prompt=images),
        body_sha256="",
        created_at=START,
    )


def record_of(kind: str, seq: int, places: list[tuple[str, int]], *, at_s: float = 0.0):
    images = 3 if kind == "shard" else 0
    groups = tuple(
        GroupRef(gid=f"{seq:016x}{i:016x}", caption_id="c", batch=b, index=n, images=images)
        for i, (b, n) in enumerate(places)
    )
    name = places[0][0] if kind == "cancel" else f"{seq}"
    return CommitRecord(
        seq=seq,
        kind=kind,
        name=name,
        groups=() if kind == "cancel" else groups,
        bytes=10,
        created_at=START + timedelta(seconds=at_s),
    )


@st.composite
def histories(draw):
    """Headers of some batches and a valid log over them, in an order of arrival."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    sizes = {f"b{i}": draw(st.integers(1, 8)) for i in range(draw(st.integers(1, 4)))}
    headers = [header_of(batch, size) for batch, size in sizes.items()]
    open_places = [(batch, i) for batch, size in sizes.items() for i in range(size)]
    rng.shuffle(open_places)
    records, cancelled = [], set()
    while open_places and rng.random() < 0.85:
        seq = len(records) + 1
        if rng.random() < 0.15:
            batch = rng.choice(list(sizes))
            cancelled.add(batch)
            records.append(record_of("cancel", seq, [(batch, 0)]))
            open_places = [place for place in open_places if place[0] not in cancelled]
        else:
            taken = [open_places.pop() for _ in range(min(rng.randint(1, 4), len(open_places)))]
            records.append(record_of(rng.choice(["shard", "failure"]), seq, taken))
    events = [*headers, *records]
    late = rng.sample(range(len(headers)), rng.randint(0, len(headers)))
    order = [e for i, e in enumerate(events) if i not in late]
    for i in late:  # a header may be read after records of its batch
        order.insert(rng.randint(0, len(order)), events[i])
    return headers, order


def expected_counts(header: BatchHeader, seen: list) -> tuple[int, int, int]:
    """(committed, failed, cancelled) by looking at every prompt."""
    state = ["open"] * header.num_prompts
    for event in seen:
        if isinstance(event, BatchHeader):
            continue
        if event.kind == "cancel" and event.name == header.id:
            state = ["cancelled" if s == "open" else s for s in state]
        for group in event.groups:
            if group.batch == header.id:
                state[group.index] = event.kind
    return state.count("shard"), state.count("failure"), state.count("cancelled")


@given(histories(), st.integers(-5, 20))
def test_counts_equal_those_of_every_prompt_at_every_moment(history, running):
    headers, order = history
    tally = Tally()
    for step, event in enumerate(order, start=1):
        if isinstance(event, BatchHeader):
            tally.register(event)
        else:
            tally.apply(event)
        known = [h for h in headers if h.id in tally.batches]
        expected = {h.id: expected_counts(h, order[:step]) for h in known}
        for header in known:
            batch = tally.batches[header.id]
            assert (batch.committed, batch.failed, batch.cancelled) == expected[header.id]
            counts = batch.counts(running)
            parts = (counts.queued, counts.running, counts.committed, counts.failed)
            assert min(parts) >= 0
            assert sum(parts) + counts.cancelled == counts.accepted == header.num_prompts
        totals = tally.totals
        assert totals.accepted == sum(h.num_prompts for h in known)
        assert totals.unfinished == totals.accepted - sum(sum(e) for e in expected.values())
        assert totals.unfinished_images == 3 * totals.unfinished


def test_running_prompts_that_were_decided_meanwhile_are_not_counted_twice():
    tally = Tally()
    tally.register(header_of("b", 3))
    tally.apply(record_of("shard", 1, [("b", 0), ("b", 1)]))
    counts = tally.batches["b"].counts(running=3)
    assert (counts.running, counts.queued, counts.committed) == (1, 0, 2)


def test_registering_twice_counts_once():
    tally = Tally()
    tally.register(header_of("b", 3))
    tally.register(header_of("b", 3))
    assert tally.totals.accepted == 3


def test_changes_are_told_once_and_last_first():
    tally = Tally()
    tally.register(header_of("a", 3))
    tally.register(header_of("b", 3))
    tick = tally.tick
    assert tally.changed_since(tick) == []
    tally.apply(record_of("shard", 1, [("b", 0)]))
    tally.apply(record_of("shard", 2, [("a", 0)]))
    tally.apply(record_of("shard", 3, [("a", 1)]))
    assert [batch.id for batch in tally.changed_since(tick)] == ["a", "b"]


def test_pace_equals_the_weighted_mean_of_all_commits():
    rng = random.Random(1)
    pace, now, commits = Pace(100.0, 100.0), 100.0, []
    for _ in range(50):
        now += rng.uniform(0.0, 9.0)
        images = rng.randint(1, 40)
        pace.add(now, images)
        commits.append((now, images))
    now += 3.0
    weighted = sum(images * math.exp((at - now) / 60) for at, images in commits)
    window = 60 * (1 - math.exp((100.0 - now) / 60))
    assert pace.images_per_s(now) == pytest.approx(weighted / window)


def test_pace_of_a_steady_stream_is_its_rate_and_fades_when_it_stops():
    pace = Pace(0.0, 0.0)
    for second in range(1, 400):
        pace.add(float(second), 7)
    assert pace.images_per_s(399.0) == pytest.approx(7.0, rel=0.01)
    assert pace.images_per_s(399.0 + 600.0) < 0.01


def test_pace_is_unknown_before_a_second_moment_and_never_infinite():
    pace = Pace(5.0, 5.0)
    pace.add(5.0, 10)
    assert pace.images_per_s(5.0) is None
    pace.add(4.0, 10)  # clocks of two hosts
    assert pace.images_per_s(3.0) is None
    pace.add(5.000001, 10)
    assert math.isfinite(pace.images_per_s(5.000001))


def test_finished_batch_keeps_its_mean_rate_for_ever():
    tally = Tally()
    tally.register(header_of("b", 2))
    tally.apply(record_of("shard", 1, [("b", 0), ("b", 1)], at_s=4.0))
    batch = tally.batches["b"]
    for now_s in (4.0, 1e6):
        now = START.timestamp() + now_s
        assert tally.images_per_s(batch, now) == pytest.approx(6 / 4.0)
