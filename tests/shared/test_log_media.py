"""The commit log in an object store: no number is lost, doubled or believed too early."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from synthrep_shared import log_media, object_client
from synthrep_shared.commit_log import CommitLog, CommitRecord, GroupRef, LogReader, read_log
from synthrep_shared.errors import AlreadyDecidedError, CommitLogError
from synthrep_shared.object_store import ObjectPath, list_objects
from synthrep_shared.storage import DatasetPaths, publish_bytes

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.s3


def ref(index: int, batch: str = "b") -> GroupRef:
    return GroupRef(gid=f"{index:032x}", caption_id="0", batch=batch, index=index, images=2)


def shard(
    log: CommitLog, *refs: GroupRef, name: Callable[[int], str] = lambda seq: f"{seq}.tar"
) -> CommitRecord:
    return log.append("shard", name=name, groups=refs)


@pytest.fixture
def place(store_root: ObjectPath) -> ObjectPath:
    """Where the log of the data set `pets` is."""
    place = DatasetPaths(store_root, "pets").log
    assert isinstance(place, ObjectPath)
    return place


def test_a_record_is_an_object_named_by_its_number(place: ObjectPath) -> None:
    log = CommitLog(place)
    assert [shard(log, ref(i)).seq for i in range(3)] == [1, 2, 3]
    names = [int(entry.path.stem) for entry in list_objects(place)]
    assert names == [1, 2, 3]
    stored = json.loads((place / f"{2:012d}.json").read_bytes())
    assert (stored["seq"], stored["groups"][0]["gid"]) == (2, ref(1).gid)


def test_a_reader_goes_on_from_any_number(place: ObjectPath) -> None:
    log = CommitLog(place)
    reader = LogReader(place)
    assert reader.poll() == []
    for i in range(5):
        shard(log, ref(i))
    assert [r.seq for r in reader.poll()] == [1, 2, 3, 4, 5]
    assert reader.poll() == []
    assert [r.seq for r in read_log(place, after=3)] == [4, 5]
    assert reader.seek(1)
    assert [[r.seq for r in reader.poll(1)] for _ in range(2)] == [[2], [3]]
    assert reader.torn_bytes == 0


def test_a_missing_number_is_an_error_for_readers_and_writers(place: ObjectPath) -> None:
    log = CommitLog(place)
    for i in range(4):
        shard(log, ref(i))
    (place / f"{2:012d}.json").unlink()
    with pytest.raises(CommitLogError, match="expected seq 2, got 3"):
        list(read_log(place))
    with pytest.raises(CommitLogError, match="expected seq 2, got 3"):
        shard(CommitLog(place), ref(9))
    assert not (place / f"{2:012d}.json").exists()


@pytest.mark.parametrize("read", [0, 1])
def test_a_list_that_shows_a_record_before_the_one_before_it_is_no_hole(
    place: ObjectPath, monkeypatch: pytest.MonkeyPatch, read: int
) -> None:
    log, reader = CommitLog(place), LogReader(place)
    for i in range(read):
        shard(log, ref(i))
    reader.poll()
    for i in range(read, 4):
        shard(log, ref(i))
    hidden = [f"{2:012d}.json"]

    def list_early(*given: Any, **options: Any) -> Any:
        late = hidden.pop() if hidden else ""
        return (entry for entry in list_objects(*given, **options) if entry.path.name != late)

    monkeypatch.setattr(log_media, "list_objects", list_early)
    found = [record.seq for _ in range(3) for record in reader.poll()]
    assert [*range(1, read + 1), *found] == [1, 2, 3, 4]


def test_a_record_under_another_number_is_an_error(place: ObjectPath) -> None:
    shard(CommitLog(place), ref(0))
    (place / f"{2:012d}.json").create((place / f"{1:012d}.json").read_bytes())
    with pytest.raises(CommitLogError, match="expected seq 2, got 1"):
        list(read_log(place))


def test_what_another_writer_decided_is_decided(place: ObjectPath) -> None:
    log, other = CommitLog(place), CommitLog(place)
    other.refresh()
    shard(log, ref(0), ref(1))
    published: list[int] = []
    with pytest.raises(AlreadyDecidedError) as caught:
        shard(other, ref(1), ref(2), name=lambda seq: str(published.append(seq)))
    assert caught.value.gids == {ref(1).gid}
    assert published == []
    log.append("cancel", name=lambda _: "b")
    with pytest.raises(AlreadyDecidedError):
        shard(other, ref(3))


def overtaken(place: ObjectPath, *others: GroupRef) -> Callable[[int], str]:
    """A publication during which another writer commits each of some groups in a record."""
    other = CommitLog(place)

    def publish(seq: int) -> str:
        for group in others:
            shard(other, group)
        return f"named-{seq}"

    return publish


def test_a_writer_that_is_overtaken_takes_the_next_number_and_keeps_its_file(
    place: ObjectPath,
) -> None:
    record = shard(CommitLog(place), ref(0), name=overtaken(place, ref(1), ref(2)))
    assert (record.seq, record.name) == (3, "named-1")
    assert [g.index for r in read_log(place) for g in r.groups] == [1, 2, 0]


def test_a_writer_that_is_overtaken_in_its_own_groups_commits_nothing(place: ObjectPath) -> None:
    with pytest.raises(AlreadyDecidedError) as caught:
        shard(CommitLog(place), ref(0), ref(1), name=overtaken(place, ref(1)))
    assert caught.value.gids == {ref(1).gid}
    assert [g.index for r in read_log(place) for g in r.groups] == [1]


def test_a_file_is_named_anew_when_its_numbers_have_passed(place: ObjectPath) -> None:
    others = iter([[ref(i) for i in range(1, 18)], []])
    other, names = CommitLog(place), []

    def publish(seq: int) -> str:
        for group in next(others):
            shard(other, group)
        names.append(f"named-{seq}")
        return names[-1]

    record = shard(CommitLog(place), ref(0), name=publish)
    assert (record.seq, record.name) == (18, "named-18")
    assert names == ["named-1", "named-18"]


def test_only_files_of_passed_numbers_can_never_be_committed(place: ObjectPath) -> None:
    log, reader = CommitLog(place), LogReader(place)
    for i in range(20):
        shard(log, ref(i))
    while reader.poll():
        pass
    # The next record, 21, may be the last of the sixteen that a file named for 6 can have.
    assert [n for n in range(1, 25) if reader.can_be_committed(n)] == list(range(6, 25))
    assert not reader.is_named_under_lock


def test_a_commit_whose_answer_was_lost_is_one_commit(store: Any, place: ObjectPath) -> None:
    log = CommitLog(place)
    shard(log, ref(0))
    store.lost_answers = 2
    assert shard(log, ref(1)).seq == 2
    store.conflicts = 2
    assert shard(log, ref(2)).seq == 3
    assert [r.seq for r in read_log(place)] == [1, 2, 3]


def write_many(place: ObjectPath, worker: int, count: int) -> None:
    log = CommitLog(place)
    for i in range(count):
        shard(log, ref(worker * 1000 + i))


def judge(place: ObjectPath, workers: int, count: int) -> None:
    """Every group is in one record, and the numbers have no hole."""
    records = list(read_log(place))
    assert [r.seq for r in records] == list(range(1, workers * count + 1))
    indices = sorted(g.index for r in records for g in r.groups)
    assert indices == sorted(w * 1000 + i for w in range(workers) for i in range(count))


def test_threads_that_write_at_once_lose_nothing(place: ObjectPath) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda worker: write_many(place, worker, 8), range(4)))
    judge(place, 4, 8)


_WRITER = """
import sys
from synthrep_shared.object_store import ObjectPath
from tests.shared.test_log_media import write_many
write_many(ObjectPath.from_url(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
"""


def test_processes_that_write_at_once_lose_nothing(place: ObjectPath) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(place), str(worker), "12"], cwd=ROOT)
        for worker in range(2)
    ]
    assert [process.wait(60) for process in processes] == [0, 0]
    judge(place, 2, 12)


def test_without_conditional_writes_an_overtaken_writer_would_lose_a_record(
    store: Any, place: ObjectPath
) -> None:
    """What the probe at start-up is for, and that these tests would see it."""
    store.is_conditional = False
    shard(CommitLog(place), ref(0), name=overtaken(place, ref(1)))
    with pytest.raises(AssertionError):
        judge(place, 2, 1)


@pytest.fixture
def hasty_client(store: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The client of this process waits a short time for answers."""
    monkeypatch.setattr(object_client, "READ_TIMEOUT_S", 0.25)
    object_client.s3_client.cache_clear()
    yield
    object_client.s3_client.cache_clear()


@pytest.mark.parametrize(
    ("workers", "count", "least_requests"),
    [(4, 6, 100), pytest.param(12, 12, 1000, marks=pytest.mark.long)],
)
def test_requests_of_which_a_tenth_fails_lose_nothing(
    store: Any,
    hasty_client: Any,
    store_root: ObjectPath,
    workers: int,
    count: int,
    least_requests: int,
) -> None:
    paths = DatasetPaths(store_root, "pets")
    store.error_rate = 0.1

    def work(worker: int) -> None:
        log = CommitLog(paths.log)
        for i in range(count):
            data = json.dumps([worker, i]).encode()

            def publish(seq: int, data: bytes = data) -> str:
                name = f"{seq}-{json.loads(data)[0]}-{json.loads(data)[1]}.tar"
                assert publish_bytes(data, paths.shards / name)
                return name

            shard(log, ref(worker * 1000 + i), name=publish)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    requests, faults = sum(store.requests.values()), store.faults.copy()
    store.heal()
    judge(paths.log, workers, count)
    for record in read_log(paths.log):
        (group,) = record.groups
        wanted = [group.index // 1000, group.index % 1000]
        assert json.loads((paths.shards / record.name).read_bytes()) == wanted
    assert requests >= least_requests
    assert sum(faults.values()) >= 0.05 * requests
    if least_requests >= 1000:
        assert set(faults) == {"error", "lost", "hang", "broken", "conflict"}
