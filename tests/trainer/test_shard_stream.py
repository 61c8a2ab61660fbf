"""The order of training: the same for a seed and a log, whatever is killed, whatever comes when."""

from __future__ import annotations

import os
import random
import shutil
import tarfile
import threading
import time
from collections import Counter, deque

import pytest

from synthrep_trainer.errors import BadShardError, LogChangedError, RunError
from synthrep_trainer.group_index import GroupIndex
from synthrep_trainer.order import SamplingPlan
from synthrep_trainer.shard_stream import Cursor, Draw, DrawnBatch, ShardStream

NEVER = lambda: False  # noqa: E731
AT_ONCE = lambda: True  # noqa: E731


def plan(**changes: float | None) -> SamplingPlan:
    values = {
        "seed": 7, "captions_per_batch": 6, "images_per_caption": 2,
        "min_fill_groups": 6, "max_uses_per_image": 100,
    }  # fmt: skip
    return SamplingPlan(**(values | changes))


def rows(batch: DrawnBatch) -> list[tuple]:
    return [(g.row, g.group, g.caption_id, g.place, tuple(g.images)) for g in batch.groups]


class Ranks:
    """All ranks of one attempt, drawing in step."""

    def __init__(self, maker, run, sampling, *, world_size=1, step=0, cursor=None) -> None:
        self.streams = [
            ShardStream(
                maker.paths, run, sampling, step=step, cursor=cursor, rank=rank,
                world_size=world_size, poll_s=0.001, verify_s=0.05,
            )
            for rank in range(world_size)
        ]  # fmt: skip

    def draw(self):
        """(step, rows of all ranks, cursor), or None where the log has not enough."""
        batches = [stream.next_batch(AT_ONCE) for stream in self.streams]
        if batches[0] is None:
            return None
        assert len({batch.cursor for batch in batches}) == 1
        assert len({len(batch.groups) for batch in batches}) == 1
        return batches[0].step, sorted(row for b in batches for row in rows(b)), batches[0].cursor


@pytest.mark.parametrize("case", range(int(os.environ.get("PROPERTY_CASES") or 20)))
def test_order_survives_kills_changes_of_world_and_late_shards(shard_maker, tmp_path, case):
    dice = random.Random(case)
    run, steps = tmp_path / "run", 40
    sampling = plan(
        seed=case,
        images_per_caption=dice.randint(1, 4),
        min_fill_groups=dice.randint(1, 12),
        max_uses_per_image=dice.choice([6, 100]),
        max_age_groups=dice.choice([None, 15]),
    )
    seen: dict[int, list] = {}
    saved = (0, None)
    first, last = None, None
    attempt = Ranks(shard_maker, run, sampling)
    while len(seen) < steps:
        if dice.random() < 0.3:
            last = shard_maker.commit(dice.randint(1, 9), images=dice.randint(1, 5))
            first = first or last
        if first and dice.random() < 0.05:
            shard_maker.reject(dice.choice(first.groups))
        drawn = attempt.draw()
        if drawn is None:  # a stream that was stopped is at its end
            last = shard_maker.commit(dice.randint(1, 9), images=3)
            first = first or last
        else:
            step, batch, cursor = drawn
            assert seen.setdefault(step, batch) == batch, "a repeated step saw something else"
            if dice.random() < 0.3:
                saved = (step, cursor)
        if drawn is None or dice.random() < 0.2:
            step, cursor = saved
            attempt = Ranks(
                shard_maker, run, sampling,
                world_size=dice.choice([1, 2, 3]), step=step, cursor=cursor,
            )  # fmt: skip
    whole = Ranks(shard_maker, run, sampling)
    assert [whole.draw()[1] for _ in range(steps)] == [seen[step] for step in range(1, steps + 1)]


def test_each_window_uses_each_group_once(shard_maker, tmp_path):
    shard_maker.commit(17)
    stream = ShardStream(shard_maker.paths, tmp_path, plan())
    drawn = Counter(g.group for _ in range(17) for g in stream.next_batch(NEVER).groups)
    assert drawn == dict.fromkeys(range(17), 6)


def test_a_batch_holds_no_group_twice(shard_maker, tmp_path):
    shard_maker.commit(7)
    stream = ShardStream(shard_maker.paths, tmp_path, plan())
    for _ in range(30):
        assert len({g.group for g in stream.next_batch(NEVER).groups}) == 6


def test_images_of_a_draw_differ_and_are_used_evenly(shard_maker, tmp_path):
    shard_maker.commit(6, images=5)
    stream = ShardStream(shard_maker.paths, tmp_path, plan(images_per_caption=3))
    uses: Counter = Counter()
    for _ in range(10):
        for g in stream.next_batch(NEVER).groups:
            assert len(set(g.images)) == 3
            uses.update((g.group, k) for k in g.images)
    assert set(uses.values()) == {6}


def test_a_small_group_gives_its_images_more_than_once(shard_maker, tmp_path):
    shard_maker.commit(6, images=2)
    stream = ShardStream(shard_maker.paths, tmp_path, plan(images_per_caption=4))
    assert all(sorted(g.images) == [0, 0, 1, 1] for g in stream.next_batch(NEVER).groups)


def test_every_image_is_drawn_up_to_the_bound_and_not_beyond(shard_maker, tmp_path):
    shard_maker.commit(8, images=3)
    sampling = plan(max_uses_per_image=4, images_per_caption=2)
    stream = ShardStream(shard_maker.paths, tmp_path, sampling)
    uses: Counter = Counter()
    for number in range(17):  # 17 groups of 3 images, 4 uses each, 2 a draw, 6 draws a batch
        if number == 2:
            shard_maker.commit(9, images=3)
        for g in stream.next_batch(NEVER).groups:
            uses.update((g.group, k) for k in g.images)
    assert len(uses) == 17 * 3
    assert set(uses.values()) == {4}
    assert stream.next_batch(AT_ONCE) is None


def test_new_images_end_the_wait_at_the_bound(shard_maker, tmp_path):
    shard_maker.commit(6, images=2)
    stream = ShardStream(shard_maker.paths, tmp_path, plan(max_uses_per_image=1), poll_s=0.01)
    stream.next_batch(NEVER)
    threading.Timer(0.2, lambda: shard_maker.commit(6, images=2)).start()
    assert {g.group for g in stream.next_batch(NEVER).groups} == set(range(6, 12))


def test_the_first_batch_waits_for_the_minimum_fill(shard_maker, tmp_path):
    shard_maker.commit(7)
    assert (
        ShardStream(shard_maker.paths, tmp_path, plan(min_fill_groups=8)).next_batch(AT_ONCE)
        is None
    )
    shard_maker.commit(1)
    assert ShardStream(shard_maker.paths, tmp_path, plan(min_fill_groups=8)).next_batch(AT_ONCE)


def test_a_wait_for_captions_says_how_many_are_there(shard_maker, tmp_path):
    shard_maker.commit(7)
    stream = ShardStream(shard_maker.paths, tmp_path, plan(min_fill_groups=8), poll_s=0.01)
    assert stream.waiting_for == ""
    words = []
    stream.next_batch(lambda: words.append(stream.waiting_for) or len(words) > 1)
    assert words == ["", "captions: 7 of 8 are there"]


def test_a_wait_at_the_bound_of_uses_is_not_one_for_captions(shard_maker, tmp_path):
    shard_maker.commit(6, images=2)
    stream = ShardStream(shard_maker.paths, tmp_path, plan(max_uses_per_image=1), poll_s=0.01)
    stream.next_batch(NEVER)
    words = []
    stream.next_batch(lambda: words.append(stream.waiting_for) or len(words) > 1)
    assert words[-1] == "new images: those there were used once each"
    fewer = ShardStream(shard_maker.paths, tmp_path / "fewer", plan(captions_per_batch=7))
    fewer.next_batch(lambda: words.append(fewer.waiting_for) or len(words) > 3)
    assert words[-1] == "captions: 6 of 7 are there"


def test_another_seed_gives_another_order(shard_maker, tmp_path):
    shard_maker.commit(40)
    orders = [
        rows(ShardStream(shard_maker.paths, tmp_path / str(s), plan(seed=s)).next_batch(NEVER))
        for s in range(2)
    ]
    assert orders[0] != orders[1]


def test_rejected_groups_are_left_out_of_later_windows(shard_maker, tmp_path):
    record = shard_maker.commit(7)
    stream = ShardStream(shard_maker.paths, tmp_path, plan())
    stream.next_batch(NEVER)
    shard_maker.reject(record.groups[3])
    while '"seq":2' not in (tmp_path / "admissions.jsonl").read_text().replace(" ", ""):
        stream.next_batch(NEVER)  # how soon the log is read again depends on the clock
    later = {g.group for _ in range(10) for g in stream.next_batch(NEVER).groups}
    assert later == {0, 1, 2, 4, 5, 6}


def test_equal_captions_share_an_id(shard_maker, tmp_path):
    shard_maker.commit(6, captions=["a robin", "a  robin ", "a wren", "a tit", "a jay", "a rook"])
    ids = [
        g.caption_id
        for g in ShardStream(shard_maker.paths, tmp_path, plan()).next_batch(NEVER).groups
    ]
    assert sorted(Counter(ids).values()) == [1, 1, 1, 1, 2]


def test_an_early_quarantine_passes_over_the_shard_on_every_attempt(shard_maker, tmp_path):
    good = shard_maker.commit(6)
    shard_maker.commit(6, break_file=lambda data: data[:-1] + b"x")
    shard_maker.commit(6)
    orders = []
    for world_size in (1, 2):
        ranks = Ranks(shard_maker, tmp_path, plan(), world_size=world_size)
        orders.append([ranks.draw()[1] for _ in range(8)])
        assert ranks.streams[0].store.num_quarantined == 1
    assert orders[0] == orders[1]
    groups = {row[1] for batch in orders[0] for row in batch}
    assert groups == {*range(6), *range(12, 18)}
    assert (tmp_path / "quarantine" / f"{good.seq + 1}.json").exists()


def test_ranks_agree_on_a_shard_that_is_bad_when_it_comes(shard_maker, tmp_path):
    ranks = Ranks(shard_maker, tmp_path, plan(), world_size=2)
    shard_maker.commit(6)
    shard_maker.commit(6, break_file=lambda data: data[:-1] + b"x")
    assert {row[1] for _ in range(4) for row in ranks.draw()[1]} == set(range(6))


def test_ranks_agree_on_a_shard_that_turned_bad_before_they_read_it(shard_maker, tmp_path):
    shard_maker.commit(6)
    first = Ranks(shard_maker, tmp_path, plan())
    first.draw()
    record = shard_maker.commit(6)
    expected = [first.draw()[1] for _ in range(4)]
    (shard_maker.paths.shards / record.name).write_bytes(b"\0" * record.bytes)
    again = Ranks(shard_maker, tmp_path, plan(), world_size=2)
    assert [again.draw()[1] for _ in range(5)][1:] == expected


def test_draws_that_wait_are_not_lost_however_many_they_are(shard_maker, tmp_path):
    shard_maker.commit(20)
    ShardStream(shard_maker.paths, tmp_path, plan()).next_batch(NEVER)
    waiting = tuple(Draw(group, 0) for group in range(8))
    stream = ShardStream(shard_maker.paths, tmp_path, plan(), step=1, cursor=Cursor(0, 20, waiting))
    groups = [[g.group for g in stream.next_batch(NEVER).groups] for _ in range(2)]
    assert groups[0] == list(range(6))
    assert groups[1][:2] == [6, 7]


def test_a_shard_that_turns_bad_ends_the_process_and_is_passed_over_afterwards(
    shard_maker, tmp_path
):
    shard_maker.commit(9)
    record = shard_maker.commit(3)
    ShardStream(shard_maker.paths, tmp_path, plan()).next_batch(NEVER)
    file = shard_maker.paths.shards / record.name
    file.write_bytes(b"\0" * record.bytes)
    again = ShardStream(shard_maker.paths, tmp_path, plan())
    drawn = [g.shard for _ in range(2) for g in again.next_batch(NEVER).groups]
    with pytest.raises(BadShardError, match="sha256"):
        deque(map(again.verify, drawn))
    after = ShardStream(shard_maker.paths, tmp_path, plan())
    groups = Counter(g.group for _ in range(6) for g in after.next_batch(NEVER).groups)
    assert groups == dict.fromkeys(range(9), 4)


def test_another_log_is_refused(shard_maker, tmp_path):
    shard_maker.commit(6)
    stream = ShardStream(shard_maker.paths, tmp_path / "run", plan())
    batch = stream.next_batch(NEVER)
    shutil.rmtree(shard_maker.paths.folder)
    other = type(shard_maker)(shard_maker.paths.root)
    other.commit(5)
    with pytest.raises(LogChangedError, match="not the log"):
        ShardStream(shard_maker.paths, tmp_path / "run", plan(), step=1, cursor=batch.cursor)


def test_a_torn_admission_is_cut_off_and_a_malformed_one_refused(shard_maker, tmp_path):
    shard_maker.commit(6)
    expected = rows(ShardStream(shard_maker.paths, tmp_path, plan()).next_batch(NEVER))
    journal = tmp_path / "admissions.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole[:20])
    assert rows(ShardStream(shard_maker.paths, tmp_path, plan()).next_batch(NEVER)) == expected
    assert journal.read_bytes() == whole
    journal.write_bytes(b"{}\n" + whole)
    with pytest.raises(RunError, match="malformed"):
        ShardStream(shard_maker.paths, tmp_path, plan())


def test_captions_must_be_shared_evenly(shard_maker, tmp_path):
    with pytest.raises(ValueError, match="cannot be shared evenly"):
        ShardStream(shard_maker.paths, tmp_path, plan(captions_per_batch=5), world_size=2)


def test_held_out_captions_are_never_drawn_and_listed_for_every_rank(shard_maker, tmp_path):
    for _ in range(3):
        shard_maker.commit(30)
    sampling = plan(held_out=0.3)
    streams = [
        ShardStream(shard_maker.paths, tmp_path, sampling, rank=rank, world_size=2)
        for rank in range(2)
    ]
    drawn = {g.group for _ in range(40) for s in streams for g in s.next_batch(NEVER).groups}
    listed = [stream.held_out(captions=1000, images=2) for stream in streams]
    held_out = {g.group for groups in listed for g in groups}
    assert drawn | held_out == set(range(90))
    assert not drawn & held_out
    assert 10 < len(held_out) < 45
    assert all(g.images == [0, 1] for groups in listed for g in groups)
    some = [g for s in streams for g in s.held_out(captions=5, images=2)]
    assert sorted(g.group for g in some) == sorted(held_out)[:5]


def test_held_out_groups_do_not_count_for_the_minimum_fill(shard_maker, tmp_path):
    shard_maker.commit(12)
    sampling = plan(min_fill_groups=12, held_out=0.5)
    assert ShardStream(shard_maker.paths, tmp_path, sampling).next_batch(AT_ONCE) is None
    shard_maker.commit(20)
    assert ShardStream(shard_maker.paths, tmp_path, sampling).next_batch(AT_ONCE) is not None


def test_held_out_groups_are_those_of_the_last_batch_without_rejected_ones(shard_maker, tmp_path):
    records = [shard_maker.commit(20, images=1), shard_maker.commit(20)]
    stream = ShardStream(shard_maker.paths, tmp_path, plan(held_out=0.4))
    stream.next_batch(NEVER)
    before = [g.group for g in stream.held_out(captions=99, images=4)]
    assert all(group >= 20 for group in before)  # one image says nothing
    shard_maker.reject(records[1].groups[before[0] - 20])
    shard_maker.commit(20)
    assert [g.group for g in stream.held_out(captions=99, images=4)] == before
    for _ in range(20):
        stream.next_batch(NEVER)
    after = [g.group for g in stream.held_out(captions=99, images=4)]
    assert after[: len(before) - 1] == before[1:]
    assert len(after) > len(before)


def test_only_the_newest_groups_are_drawn_within_the_age_limit(shard_maker, tmp_path):
    sampling = plan(max_age_groups=10)
    shard_maker.commit(6)
    stream = ShardStream(shard_maker.paths, tmp_path, sampling)
    stream.next_batch(NEVER)
    shard_maker.commit(7)
    stream.next_batch(NEVER)  # may begin in the window before
    later = {g.group for _ in range(10) for g in stream.next_batch(NEVER).groups}
    assert later == set(range(3, 13))
    shard_maker.commit(14)
    for _ in range(4):
        stream.next_batch(NEVER)
    later = {g.group for _ in range(10) for g in stream.next_batch(NEVER).groups}
    assert later == set(range(17, 27))
    again = ShardStream(shard_maker.paths, tmp_path, sampling)
    first = [g.group for g in again.next_batch(NEVER).groups]
    assert sorted(first) == list(range(6))


def test_a_window_that_ages_as_it_opens_is_completed_by_the_next(shard_maker, tmp_path):
    sampling = plan(max_age_groups=6)
    shard_maker.commit(6)
    stream = ShardStream(shard_maker.paths, tmp_path, sampling)
    stream.next_batch(NEVER)
    shard_maker.commit(4, break_file=lambda data: data[1:])  # two good ones stay young enough
    assert stream.next_batch(AT_ONCE) is None
    shard_maker.commit(6)
    again = ShardStream(shard_maker.paths, tmp_path, sampling, step=1, cursor=Cursor(0, 6))
    batches = [{g.group for g in again.next_batch(NEVER).groups} for _ in range(3)]
    assert batches[-1] == set(range(10, 16))
    assert all(len(groups) == 6 for groups in batches)


def test_training_waits_for_its_ratio(shard_maker, tmp_path):
    shard_maker.commit(6, images=2)
    sampling = plan(min_generated_per_trained=0.25, views_per_batch=12)
    stream = ShardStream(shard_maker.paths, tmp_path, sampling, poll_s=0.01)
    for _ in range(4):
        assert stream.next_batch(NEVER) is not None
    threading.Timer(0.2, lambda: shard_maker.commit(2, images=2)).start()
    seen = []
    waits, wait_s = stream.ratio_waits, stream.ratio_wait_s
    stream.next_batch(lambda: seen.append(stream.pressure.is_waiting))
    assert stream.images_committed == 16
    assert seen
    assert stream.ratio_waits == waits + 1
    assert stream.ratio_wait_s > wait_s
    assert not stream.pressure.is_waiting


def test_a_wait_for_the_ratio_says_how_many_images_are_there(shard_maker, tmp_path):
    shard_maker.commit(6, images=2)
    sampling = plan(min_generated_per_trained=0.7, views_per_batch=12)
    stream = ShardStream(shard_maker.paths, tmp_path, sampling, poll_s=0.01)
    words = []
    assert stream.next_batch(NEVER) is not None
    stream.next_batch(lambda: words.append(stream.waiting_for) or len(words) > 1)
    assert words == ["", "new images: 12 of 17 are there"]


def test_pressure_counts_the_images_of_groups_that_were_never_drawn(shard_maker, tmp_path):
    shard_maker.commit(9, images=3)
    stream = ShardStream(shard_maker.paths, tmp_path, plan())
    stream.next_batch(NEVER)
    assert stream.pressure == (3 * 3, False)
    shard_maker.commit(5, images=2)
    shard_maker.commit(7, images=2, break_file=lambda data: data[1:])
    for _ in range(20):
        stream.next_batch(NEVER)
    assert stream.pressure == (0, False)


def test_pressure_is_what_the_log_has_less_what_was_drawn(shard_maker, tmp_path):
    dice, drawn, images = random.Random(4), set(), []
    stream = ShardStream(shard_maker.paths, tmp_path, plan(), verify_s=60)
    for _ in range(40):
        for _ in range(dice.randint(0, 2) if images else 2):
            count = dice.randint(1, 3)
            images += [count] * len(shard_maker.commit(3, images=count).groups)
        drawn |= {g.group for g in stream.next_batch(NEVER).groups}
        if stream.images_committed == sum(images):  # else the log is read again somewhat later
            left = sum(images) - sum(images[group] for group in drawn)
            assert stream.pressure == (left, False)


def test_waiting_behind_a_line_that_its_writer_did_not_end_is_no_busy_loop(shard_maker, tmp_path):
    shard_maker.commit(3)
    with shard_maker.paths.log.open("ab") as log:
        log.write(b'{"version": 1, "se')
    stream = ShardStream(shard_maker.paths, tmp_path, plan(), poll_s=0.2)
    looks = iter(range(1000))
    began = time.monotonic()
    assert stream.next_batch(lambda: next(looks) == 3 or time.monotonic() > began + 60) is None
    assert time.monotonic() > began + 2 * 0.2


def test_a_batch_costs_no_look_at_all_groups(shard_maker, tmp_path, monkeypatch):
    calls = Counter()
    for name in ("num_images_trainable", "images_unused", "reject", "eligible"):
        method = getattr(GroupIndex, name)

        def counted(self, *args, name=name, method=method):
            calls[name] += 1
            return method(self, *args)

        monkeypatch.setattr(GroupIndex, name, counted)
    for _ in range(5):
        record = shard_maker.commit(60, images=1)
        for group in record.groups[:9]:
            shard_maker.reject(group)
    stream = ShardStream(shard_maker.paths, tmp_path, plan(min_fill_groups=200), verify_s=60)
    for _ in range(30):
        stream.next_batch(NEVER)
    assert calls["num_images_trainable"] == 5
    assert max(calls[name] for name in ("images_unused", "reject", "eligible")) <= 4


def test_every_committed_shard_is_verified_or_in_quarantine(shard_maker, tmp_path):
    dice = random.Random(3)
    num_bad = 0
    for _ in range(30):
        is_bad = dice.random() < 0.3
        num_bad += is_bad
        cut = (lambda data: data[:-512]) if is_bad else (lambda data: data)
        shard_maker.commit(dice.randint(1, 4), images=1, break_file=cut)
    stream = ShardStream(shard_maker.paths, tmp_path, plan(min_fill_groups=20))
    stream.next_batch(NEVER)
    assert stream.store.num_quarantined == num_bad > 0
    assert stream.store.num_verified + stream.store.num_quarantined == 30


def test_every_damage_is_found_before_use_and_training_goes_on(shard_maker, tmp_path, caplog):
    """50 random bytes changed, 50 random cuts, and a change and a cut at every header."""
    good = shard_maker.commit(7, images=2)
    size, dice = good.bytes, random.Random(5)
    with tarfile.open(shard_maker.paths.shards / good.name) as tar:
        headers = [member.offset for member in tar]
    places = [dice.randrange(size) for _ in range(50)] + headers
    damages = [lambda data, at=at: data[:at] for at in places] + [
        lambda data, at=at: data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :]
        for at in places
    ]
    for damage in damages:
        shard_maker.commit(7, images=2, break_file=damage)
    shard_maker.commit(7, images=2)
    stream = ShardStream(shard_maker.paths, tmp_path, plan(min_fill_groups=14), verify_s=60.0)
    drawn = {g.shard.seq for _ in range(20) for g in stream.next_batch(NEVER).groups}
    count = 2 * (50 + 28)
    assert drawn == {1, count + 2}
    assert stream.store.num_quarantined == count == len(list((tmp_path / "quarantine").iterdir()))
    assert stream.store.num_verified + stream.store.num_quarantined == count + 2
    assert sum(record.message == "shard_quarantined" for record in caplog.records) == count
