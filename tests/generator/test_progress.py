from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from synthrep_generator.catalog import Catalog
from synthrep_generator.failure_reader import failure_views
from synthrep_generator.progress import DatasetIndex
from synthrep_generator.tally import batch_state
from synthrep_shared.commit_log import LogReader
from synthrep_shared.errors import CommitLogError
from synthrep_shared.messages import PromptCounts


def counts(queued=0, running=0, committed=0, failed=0, cancelled=0) -> PromptCounts:
    return PromptCounts(
        accepted=queued + running + committed + failed + cancelled,
        queued=queued,
        running=running,
        committed=committed,
        failed=failed,
        cancelled=cancelled,
    )


@pytest.fixture
def index(pets):
    """What the API knows of `pets`."""
    return DatasetIndex(pets.paths)


@pytest.mark.parametrize(
    ("where", "paused", "state"),
    [
        ({"queued": 3}, False, "queued"),
        ({"queued": 3}, True, "paused"),
        ({"queued": 2, "running": 1}, False, "running"),
        ({"queued": 2, "committed": 1}, False, "running"),
        ({"queued": 2, "failed": 1}, False, "running"),
        ({"queued": 2, "running": 1}, True, "paused"),
        ({"committed": 3}, False, "completed"),
        ({"committed": 3}, True, "completed"),
        ({"committed": 1, "failed": 2}, False, "completed"),
        ({"failed": 3}, False, "failed"),
        ({"committed": 1, "cancelled": 2}, False, "cancelled"),
        ({"cancelled": 3}, True, "cancelled"),
    ],
)
def test_state_follows_from_the_counts(where, paused, state):
    assert batch_state(counts(**where), paused=paused) == state


def test_view_follows_the_log_as_it_grows(pets, index):
    header = pets.accept(["a", "b", "c"])
    index.refresh()
    batch = index.batch(header.id)
    now = pets.created_at + timedelta(days=365)

    def seen():
        index.refresh()
        view = index.view(batch, running=1, now=now)
        return view.state, view.prompts.committed, view.prompts.failed, view.images_committed

    assert seen() == ("running", 0, 0, 0)
    pets.commit(header, {0: "a"})
    assert seen() == ("running", 1, 0, 2)
    pets.fail(header, {1: "b"})
    assert seen() == ("running", 1, 1, 2)
    pets.commit(header, {2: "c"})
    assert seen() == ("completed", 2, 1, 4)
    assert index.view(batch, running=0, now=now).eta_s == 0.0


def test_view_at_hand_is_as_fresh_as_any_other(pets, index):
    header = pets.accept(["a", "b"])
    index.refresh()
    batch, now = index.batch(header.id), pets.created_at
    assert index.view_at_hand(batch, running=1, now=now).prompts.committed == 0
    pets.commit(header, {0: "a"})
    index.pause(batch, True)
    view = index.view_at_hand(batch, running=0, now=now)
    assert (view.prompts.committed, view.state) == (1, "paused")
    assert view == index.view(batch, running=0, now=now)


def test_view_is_not_at_hand_while_much_is_read_or_to_be_read(pets, index, monkeypatch):
    header = pets.accept(["a", "b"])
    index.refresh()
    batch = index.batch(header.id)

    def at_hand():
        return index.view_at_hand(batch, running=0, now=pets.created_at)

    with ThreadPoolExecutor(1) as pool, index._lock:
        assert pool.submit(at_hand).result(timeout=10) is None, "it did not wait"
    pets.commit(header, {0: "a"})
    monkeypatch.setattr(index._index, "read_bytes", pets.paths.log.stat().st_size - 1)
    assert at_hand() is None
    assert batch.committed == 0, "nothing was read"
    index.refresh()
    assert at_hand().prompts.committed == 1


def test_eta_is_what_is_left_over_the_pace_and_unknown_while_paused(pets, index):
    header = pets.accept(["a", "b", "c"])
    record = pets.commit(header, {0: "a"})
    index.refresh()
    batch = index.batch(header.id)
    view = index.view(batch, running=0, now=record.created_at)
    assert view.images_per_s > 0
    assert view.eta_s == pytest.approx(4 / view.images_per_s)
    index.pause(batch, True)
    assert index.view(batch, running=0, now=record.created_at).eta_s is None


def test_batches_written_by_other_processes_are_seen(pets, index):
    first = pets.accept(["a"], batch="1" * 32)
    index.refresh()
    second = pets.accept(["b"], batch="2" * 32)
    assert index.batch(second.id).num_prompts == 1  # by id, whenever the folder is scanned next
    fresh = DatasetIndex(pets.paths)
    fresh.refresh()
    assert {batch.id for batch in fresh.batches()} == {first.id, second.id}


def test_malformed_intake_file_is_passed_over_and_logged_once(pets, index, caplog):
    pets.accept(["a"])
    (pets.paths.intake / "bad.jsonl").write_text("{}\n")
    with caplog.at_level(logging.ERROR):
        index.refresh()
        assert index.batch("bad") is None
        assert index.batch("bad") is None
    assert len(index.batches()) == 1
    assert [record.message for record in caplog.records] == ["intake file was skipped"]


def test_groups_are_found_with_their_record(pets, index):
    header = pets.accept([f"p{i}" for i in range(40)])
    for i in range(0, 38, 2):
        pets.commit(header, {i: f"p{i}", i + 1: f"p{i + 1}"})
    pets.fail(header, {38: "p38"})
    index.refresh()
    for i in range(38):
        record, ref, is_rejected = index.group(header.gid(i, f"p{i}"))
        assert (record.kind, record.seq, ref.index) == ("shard", i // 2 + 1, i)
        assert not is_rejected
    assert index.group(header.gid(38, "p38"))[0].kind == "failure"
    assert index.group(header.gid(39, "p39")) is None


def test_shards_are_listed_in_order_after_a_position(pets, index):
    header = pets.accept([f"p{i}" for i in range(9)])
    for i in range(8):
        if i == 3:
            pets.fail(header, {i: f"p{i}"})
        else:
            pets.commit(header, {i: f"p{i}"})
    index.refresh()
    assert [s.seq for s in index.shards(0, 100)] == [1, 2, 3, 5, 6, 7, 8]
    assert [s.seq for s in index.shards(2, 2)] == [3, 5]
    assert index.shards(8, 100) == []
    shard = index.shards(7, 1)[0]
    assert (shard.groups, shard.images) == (1, 2)
    assert index.shard(shard.name) == (shard, pets.paths.shards / shard.name)
    assert index.shard("00000004-000000000000.tar") is None


class CountingLock:
    """A lock that knows how many asked for it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.asked = 0

    def __enter__(self) -> None:
        self.asked += 1
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_callers_that_wait_for_one_another_share_a_pass(pets, index, monkeypatch):
    lock, passes, release = CountingLock(), [], threading.Event()

    def slow_list(paths):
        passes.append(paths)
        assert release.wait(10)
        return frozenset()

    monkeypatch.setattr("synthrep_generator.progress.list_paused", slow_list)
    monkeypatch.setattr(index, "_lock", lock)
    with ThreadPoolExecutor(9) as pool:
        calls = [pool.submit(index.refresh)]
        while not passes:
            time.sleep(0.001)
        pets.accept(["late"])
        calls += [pool.submit(index.refresh) for _ in range(8)]
        while lock.asked < len(calls):
            time.sleep(0.001)
        release.set()
        for call in calls:
            call.result(10)
    assert len(passes) == 2
    assert len(index.batches()) == 1


def test_positions_hold_across_many_reads_of_a_long_log(pets, monkeypatch):
    monkeypatch.setattr("synthrep_generator.log_index.READ_BYTES", 700)
    index = DatasetIndex(pets.paths)
    header = pets.accept([f"p{i}" for i in range(60)], images=1)
    for i in range(60):
        pets.commit(header, {i: f"p{i}"})
        if i % 7 == 0:
            index.refresh()
    index.refresh()
    assert [s.seq for s in index.shards(17, 5)] == [18, 19, 20, 21, 22]
    assert [s.seq for s in index.shards(0, 1000)] == list(range(1, 61))
    for i in range(60):
        assert index.group(header.gid(i, f"p{i}"))[0].seq == i + 1


def test_failures_are_paged_over_records_and_batches(pets, index):
    one = pets.accept([f"p{i}" for i in range(6)], batch="1" * 32)
    two = pets.accept(["q0"], batch="2" * 32)
    pets.fail(one, {0: "p0", 1: "p1"}, "first")
    pets.commit(one, {2: "p2"})
    pets.fail(two, {0: "q0"}, "other batch")
    pets.fail(one, {3: "p3", 4: "p4", 5: "p5"}, "second")
    index.refresh()
    everything = failure_views(index, one.id, skip=0, limit=100)
    assert [(f.index, f.prompt, f.reason, f.attempts) for f in everything] == [
        (0, "p0", "first", 4),
        (1, "p1", "first", 4),
        (3, "p3", "second", 4),
        (4, "p4", "second", 4),
        (5, "p5", "second", 4),
    ]
    for skip in range(6):
        for limit in (1, 2, 3):
            page = failure_views(index, one.id, skip=skip, limit=limit)
            assert page == everything[skip : skip + limit]
    assert [f.prompt for f in failure_views(index, two.id, skip=0, limit=9)] == ["q0"]


def test_failure_without_its_file_is_still_told(pets, index):
    header = pets.accept(["a", "b"])
    pets.fail(header, {1: "b"})
    next(pets.paths.failures.iterdir()).write_text("[{]")
    index.refresh()
    (failure,) = failure_views(index, header.id, skip=0, limit=9)
    assert (failure.index, failure.prompt, failure.attempts) == (1, "b", 0)


def test_cancelling_decides_the_rest_once(pets, index):
    header = pets.accept(["a", "b", "c"])
    pets.commit(header, {0: "a"})
    index.refresh()
    batch = index.batch(header.id)
    index.cancel(batch)
    index.cancel(batch)
    assert batch.counts(running=2) == counts(committed=1, cancelled=2)
    assert index.last_seq == 2


def test_cancelling_a_finished_batch_changes_nothing(pets, index):
    header = pets.accept(["a"])
    index.refresh()
    pets.commit(header, {0: "a"})
    index.cancel(index.batch(header.id))
    assert index.last_seq == 1
    assert index.batch(header.id).counts(0) == counts(committed=1)


def test_rejecting_a_group_twice_writes_one_record(pets, index):
    header = pets.accept(["a"])
    pets.commit(header, {0: "a"})
    index.refresh()
    gid = header.gid(0, "a")
    _, ref, _ = index.group(gid)
    index.reject(ref)
    index.reject(ref)
    assert index.last_seq == 2
    assert index.group(gid)[2]
    assert index.dataset_view().rejected == 1
    assert pets.log.refresh() == 2


def test_malformed_log_of_one_data_set_hides_no_other(pets, root, caplog):
    catalog = Catalog(root)
    header = pets.accept(["a"])
    pets.commit(header, {0: "a"})
    broken = catalog.make("broken")
    broken.paths.log.write_text("{}\n")
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert [index.name for index in catalog.datasets()] == ["broken", "pets"]
    assert len(caplog.records) == 1
    with pytest.raises(CommitLogError):
        catalog.dataset("broken")


def test_log_of_somebody_else_hides_no_other_data_set(pets, root, caplog, monkeypatch):
    catalog = Catalog(root)
    pets.accept(["a", "b"])
    closed, poll = catalog.make("closed").paths.log, LogReader.poll

    def refuse(reader, *given):
        if reader.path == closed:
            raise PermissionError(13, "Permission denied")
        return poll(reader, *given)

    monkeypatch.setattr(LogReader, "poll", refuse)
    assert [index.name for index in catalog.datasets()] == ["closed", "pets"]
    assert catalog.unfinished().prompts == 2
    assert len(caplog.records) == 1


def test_catalog_sums_unfinished_work_without_paused_images(pets, root):
    catalog = Catalog(root)
    one = pets.accept(["a", "b", "c"], batch="1" * 32, images=2)
    two = pets.accept(["d", "e"], batch="2" * 32, images=5)
    pets.commit(one, {0: "a"})
    unfinished = catalog.unfinished()
    assert (unfinished.prompts, unfinished.images) == (4, 2 * 2 + 2 * 5)
    index, batch = catalog.batch(two.id)
    index.pause(batch, True)
    unfinished = catalog.unfinished()
    assert (unfinished.prompts, unfinished.images) == (4, 4)


@pytest.mark.parametrize("batch_id", ["../../etc/passwd", "a/b", "", ".", "b\0", "é", "x" * 65])
def test_ids_that_are_no_file_names_find_nothing(pets, root, batch_id):
    pets.accept(["a"])
    assert Catalog(root).batch(batch_id) is None
