"""The simulated fleet, and what judges it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scale.clients import latency
from benchmarks.scale.fleet import SMALL_BATCH, Setup, audit, measure
from benchmarks.scale.log_costs import HeldLog
from benchmarks.scale.made_logs import JOB_CAPTIONS, make_dataset, next_record
from synthrep_generator.progress import DatasetIndex, utc_now
from synthrep_shared.commit_log import read_log
from synthrep_shared.storage import DatasetPaths


@pytest.fixture
def paths(tmp_path: Path) -> DatasetPaths:
    return DatasetPaths(tmp_path, "made")


@pytest.mark.e2e
@pytest.mark.redis
def test_a_simulated_fleet_decides_every_caption_once() -> None:
    point = measure(Setup(workers=3, captions=64, job_captions=16, device_s=0.0))
    assert (point.lost, point.duplicated, point.damaged) == (0, 0, 0)
    assert point.accepted == 64 + SMALL_BATCH * point.submit.answers
    assert point.commits >= 4
    assert point.commit.answers == point.commits
    assert point.signal_last == 0


def test_a_made_log_decides_what_was_accepted(paths: DatasetPaths) -> None:
    (batch,) = make_dataset(paths, 2 * JOB_CAPTIONS + 8, has_files=True)
    index = DatasetIndex(paths)
    index.refresh()
    view = index.view(index.batches()[0], running=0, now=utc_now())
    assert (view.id, view.state) == (batch, "completed")
    assert [len(record.groups) for record in read_log(paths.log)] == [16, 16, 8]
    assert len(list(paths.shards.iterdir())) == 3


def test_the_audit_finds_what_is_lost_doubled_and_damaged(paths: DatasetPaths) -> None:
    (batch,) = make_dataset(paths, JOB_CAPTIONS, has_files=False)
    with Path(str(paths.log)).open("ab") as log:
        log.write(next_record(2, batch, 0, JOB_CAPTIONS).model_dump_json().encode() + b"\n")
    found = audit(paths, promised=JOB_CAPTIONS + 1)
    assert (found["lost"], found["duplicated"]) == (1, JOB_CAPTIONS)
    assert found["damaged"] > 0


def test_the_time_under_the_lock_is_kept(paths: DatasetPaths) -> None:
    paths.make_folders()
    log = HeldLog(paths.log)
    log.append("cancel", name=lambda _: "b")
    assert log.held_s > 0


def test_the_slowest_of_a_few_answers_is_their_p99() -> None:
    found = latency([3.0, 1.0, 2.0])
    assert (found.answers, found.p50_ms, found.p99_ms, found.max_ms) == (3, 2.0, 3.0, 3.0)
    assert latency(list(map(float, range(1, 201)))).p99_ms == 198.0
