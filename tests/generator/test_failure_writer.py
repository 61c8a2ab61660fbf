"""Recorded failures: one outcome, durable before the log names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from synthrep_generator.failure_writer import Failure, record_failures
from synthrep_shared.commit_log import CommitLog, GroupRef, read_log
from synthrep_shared.storage import DatasetPaths, sha256_file


def failure(index: int) -> Failure:
    return Failure(
        gid=f"{index:032x}", batch="a", index=index, prompt=f"p{index}", reason="no", attempts=4
    )


@pytest.fixture
def paths(tmp_path: Path) -> DatasetPaths:
    paths = DatasetPaths(tmp_path, "birds")
    paths.make_folders()
    return paths


def test_the_record_names_a_file_with_the_details(paths: DatasetPaths) -> None:
    assert record_failures(paths, CommitLog(paths.log), [failure(0), failure(3)]) == 2
    (record,) = read_log(paths.log)
    file = paths.failures / record.name
    assert record.kind == "failure"
    assert record.name == f"00000001-{record.sha256[:12]}.json"
    assert record.sha256 == sha256_file(file)
    assert record.bytes == file.stat().st_size
    assert json.loads(file.read_text()) == [failure(0).model_dump(), failure(3).model_dump()]
    assert [(g.index, g.images) for g in record.groups] == [(0, 0), (3, 0)]


def test_what_has_an_outcome_keeps_it(paths: DatasetPaths) -> None:
    log = CommitLog(paths.log)
    done = GroupRef(gid=failure(0).gid, caption_id="0", batch="a", index=0, images=2)
    log.append("shard", name=str, groups=(done,))
    assert record_failures(paths, CommitLog(paths.log), [failure(0), failure(1)]) == 1
    assert record_failures(paths, CommitLog(paths.log), [failure(0), failure(1)]) == 0
    assert [r.kind for r in read_log(paths.log)] == ["shard", "failure"]


def test_nothing_to_record_writes_nothing(paths: DatasetPaths) -> None:
    assert record_failures(paths, CommitLog(paths.log), []) == 0
    assert list(read_log(paths.log)) == []
