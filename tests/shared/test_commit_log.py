import errno
import json
import os
import threading
import time

import pytest

from synthrep_shared.commit_log import CommitLog, GroupRef, LogReader, Outcomes, read_log
from synthrep_shared.errors import AlreadyDecidedError, CommitLogError


def ref(index: int, batch: str = "b", images: int = 2) -> GroupRef:
    return GroupRef(gid=f"{index:032x}", caption_id="0", batch=batch, index=index, images=images)


@pytest.fixture
def log(tmp_path):
    return CommitLog(tmp_path / "log" / "commits.jsonl")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log" / "commits.jsonl"


def shard(log: CommitLog, *refs: GroupRef):
    return log.append("shard", name=lambda seq: f"{seq}.tar", groups=refs)


def test_sequence_starts_at_one_and_has_no_holes(log, path):
    for i in range(5):
        shard(log, ref(i))
    assert [r.seq for r in read_log(path)] == [1, 2, 3, 4, 5]
    assert [r.seq for r in read_log(path, after=3)] == [4, 5]


def test_group_is_committed_only_once_and_nothing_is_published(log, path):
    shard(log, ref(0), ref(1))
    published = []
    with pytest.raises(AlreadyDecidedError) as caught:
        log.append("shard", name=lambda seq: published.append(seq) or "x", groups=(ref(1), ref(2)))
    assert caught.value.gids == {ref(1).gid}
    assert published == []
    assert len(list(read_log(path))) == 1


def test_another_process_sees_the_commit(log, path):
    other = CommitLog(path)
    other.refresh()
    shard(log, ref(0))
    with pytest.raises(AlreadyDecidedError):
        shard(other, ref(0))


def test_what_others_appended_is_read_before_the_lock_is_taken(path, monkeypatch):
    late, others = CommitLog(path), CommitLog(path)
    for i in range(3):
        shard(others, ref(i))
    read_before, exclusive = [], late.exclusive

    def look():
        read_before.append(late._reader.seq)
        return exclusive()

    monkeypatch.setattr(late, "exclusive", look)
    assert shard(late, ref(9)).seq == 4
    assert read_before == [3]


def test_a_long_log_is_read_a_little_at_a_time(log, path, monkeypatch):
    for i in range(8):
        shard(log, *(ref(600 * i + j) for j in range(600)))
    found, poll = [], LogReader.poll
    monkeypatch.setattr(LogReader, "poll", lambda *given: found.append(poll(*given)) or found[-1])
    assert CommitLog(path).refresh() == 8
    assert max(map(len, found)) < 8


def test_cancelled_batch_accepts_no_more_groups(log):
    shard(log, ref(0))
    log.append("cancel", name=lambda seq: "b")
    with pytest.raises(AlreadyDecidedError):
        shard(log, ref(1))
    assert log.outcomes.committed("b") == 1


def test_torn_last_line_is_no_line_and_the_next_writer_cuts_it(log, path):
    shard(log, ref(0))
    whole = path.read_bytes()
    with path.open("ab") as stream:
        stream.write(b'{"version":1,"seq":2,"ki')
    reader = LogReader(path)
    assert [r.seq for r in reader.poll()] == [1]
    assert reader.poll() == []
    assert shard(CommitLog(path), ref(1)).seq == 2
    assert path.read_bytes().startswith(whole)
    assert [r.seq for r in reader.poll()] == [2]


def test_a_reader_goes_on_where_a_malformed_line_was_mended(log, path):
    shard(log, ref(0))
    shard(log, ref(1))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"seq":2', b'"seq":]'))
    reader = LogReader(path)
    with pytest.raises(CommitLogError, match="malformed"):
        reader.poll()
    path.write_bytes(whole)
    assert [r.seq for r in reader.poll()] == [1, 2]


def test_a_writer_begins_anew_where_the_log_is_gone(log, path):
    for i in range(2):
        shard(log, ref(i))
    path.unlink()
    with pytest.raises(CommitLogError, match="shorter"):
        shard(log, ref(1))
    assert shard(log, ref(1)).seq == 1
    assert [r.seq for r in read_log(path)] == [1]


@pytest.mark.parametrize("appended", [0, 1, 2])
def test_a_writer_goes_by_the_log_as_it_is_after_a_copy_was_put_back(log, path, appended):
    shard(log, ref(0))
    copy = path.read_bytes()
    shard(log, ref(1), ref(2))
    shard(log, ref(3))
    path.write_bytes(copy)
    for i in range(appended):
        shard(CommitLog(path), *(ref(100 * i + j) for j in range(10, 50)))
    with pytest.raises(CommitLogError):
        shard(log, ref(1))
    assert shard(log, ref(1)).seq == appended + 2
    assert not log.outcomes.is_decided("b", 3)
    assert [r.seq for r in read_log(path)] == list(range(1, appended + 3))


def test_writers_wait_while_one_process_has_the_log_for_itself(log, path):
    shard(log, ref(0))
    with path.open("ab") as stream:
        stream.write(b"torn")
    writer = threading.Thread(target=lambda: shard(CommitLog(path), ref(1)))
    with log.exclusive() as cut_bytes:
        assert cut_bytes == 4
        writer.start()
        writer.join(0.1)
        assert log.refresh() == 1
    writer.join()
    assert log.refresh() == 2


def test_hole_in_the_sequence_is_an_error(log, path):
    shard(log, ref(0))
    line = json.loads(path.read_text())
    path.write_text(json.dumps(line) + "\n" + json.dumps(line | {"seq": 3}) + "\n")
    with pytest.raises(CommitLogError, match="expected seq 2"):
        list(read_log(path))


def test_line_written_twice_is_an_error(log, path):
    shard(log, ref(0))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(CommitLogError, match="expected seq 2, got 1"):
        list(read_log(path))


def test_unknown_version_is_refused(log, path):
    shard(log, ref(0))
    path.write_text(path.read_text().replace('"version":1', '"version":2'))
    with pytest.raises(CommitLogError, match="version 2"):
        list(read_log(path))


def test_failed_publication_leaves_no_line(log, path):
    shard(log, ref(0))

    def full_disk(seq: int) -> str:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        log.append("shard", name=full_disk, groups=(ref(1),))
    assert [r.seq for r in read_log(path)] == [1]
    assert shard(log, ref(1)).seq == 2


@pytest.mark.parametrize("refused", [1, 2])
def test_nobody_reads_a_line_that_goes_again(log, path, monkeypatch, refused):
    shard(log, ref(0))
    readers, flush, calls = [LogReader(path), CommitLog(path)], os.fsync, []

    def look_and_fail(descriptor):
        calls.append(descriptor)
        readers[0].poll()
        readers[1].refresh()
        if len(calls) == refused:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", look_and_fail)
        with pytest.raises(OSError, match="quota"):
            shard(log, ref(1))
    log.refresh()
    assert log.outcomes.is_decided("b", 1) == readers[1].outcomes.is_decided("b", 1)
    record = shard(readers[1], ref(2))
    assert readers[0].poll()[-1] == record
    assert [r.seq for r in read_log(path)] == list(range(1, record.seq + 1))


def test_concurrent_writers_lose_nothing(path):
    def write(worker: int) -> None:
        own = CommitLog(path)
        for i in range(20):
            shard(own, ref(worker * 100 + i))

    threads = [threading.Thread(target=write, args=(w,)) for w in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = list(read_log(path))
    assert [r.seq for r in records] == list(range(1, 81))
    assert len({g.gid for r in records for g in r.groups}) == 80


def test_outcomes_count_by_batch():
    outcomes = Outcomes()
    assert not outcomes.is_decided("b", 7)
    assert outcomes.committed("b") == outcomes.failed("b") == 0


def test_reader_takes_lines_longer_than_its_buffer(log, path):
    shard(log, *(ref(i) for i in range(50)))
    shard(log, ref(50))
    reader = LogReader(path)
    seen = [r.seq for _ in range(3) for r in reader.poll(max_bytes=100)]
    assert seen == [1, 2]


def test_a_reader_that_waits_wakes_when_the_log_grows(log, path):
    shard(log, ref(0))
    reader = LogReader(path)
    reader.poll()
    writer = threading.Timer(0.05, shard, (log, ref(1)))
    started = time.monotonic()
    writer.start()
    reader.wait(30)
    assert 0.04 < time.monotonic() - started < 10
    writer.join()
    assert [r.seq for r in reader.poll()] == [2]
    reader.wait(0.01)
    assert reader.poll() == []
