"""A repair removes what no record names, and touches nothing that one does."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from synthrep_generator.repair import repair_dataset
from synthrep_generator.verify import verify_dataset
from synthrep_shared.commit_log import CommitLog
from synthrep_shared.errors import CommitLogError, StorageError
from synthrep_shared.storage import DatasetPaths

NOW_S = 2_000_000_000.0
AGE_S = 3600.0


@pytest.fixture
def messy(pets: Any) -> Any:
    """A data set in use, with everything that killed writers can leave."""
    header = pets.accept(["a dog", "a cat", "a hen"])
    pets.commit(header, {0: "a dog"})
    pets.fail(header, {1: "a cat"})
    for file in (
        pets.paths.shards / f"00000001-{'b' * 12}.tar",
        pets.paths.shards / f"00000003-{'c' * 12}.tar",
        pets.paths.failures / f"00000002-{'d' * 12}.json",
        pets.paths.temporary / ".shard.tar.1.00.part",
        pets.paths.intake / ".b.jsonl.1.00.part",
    ):
        file.touch()
        os.utime(file, (NOW_S - 2 * AGE_S, NOW_S - 2 * AGE_S))
    with pets.paths.log.open("a") as log:
        log.write('{"version"')
    return pets


def committed_files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_leftovers_go_and_committed_data_stays(messy: Any) -> None:
    before = committed_files(messy.paths.folder)
    repairs = repair_dataset(messy.paths, now_s=NOW_S, min_age_s=AGE_S)
    after = committed_files(messy.paths.folder)
    assert repairs.cut_bytes == 10
    assert len(repairs.removed) == 5
    assert before.keys() - after.keys() == set(repairs.removed)
    log = str(messy.paths.log.relative_to(messy.paths.folder))
    assert after.pop(log) + b'{"version"' == before.pop(log)
    assert all(before[name] == data for name, data in after.items())
    assert verify_dataset(messy.paths, now_s=NOW_S, min_age_s=AGE_S).is_clean


def test_a_second_repair_finds_nothing(messy: Any) -> None:
    repair_dataset(messy.paths, now_s=NOW_S, min_age_s=AGE_S)
    repairs = repair_dataset(messy.paths, now_s=NOW_S, min_age_s=AGE_S)
    assert (repairs.removed, repairs.cut_bytes) == ([], 0)


def test_what_a_job_is_writing_stays(messy: Any) -> None:
    writing = messy.paths.temporary / ".shard.tar.2.00.part"
    writing.touch()
    os.utime(writing, (NOW_S - 60, NOW_S - 60))
    repair_dataset(messy.paths, now_s=NOW_S, min_age_s=AGE_S)
    assert writing.exists()


def test_a_shard_on_its_way_to_its_record_stays(messy: Any) -> None:
    named, go_on = threading.Event(), threading.Event()
    shard = messy.paths.shards / f"00000003-{'e' * 12}.tar"

    def name(_: int) -> str:
        shard.touch()
        named.set()
        assert go_on.wait(10)
        return shard.name

    writer = threading.Thread(target=lambda: CommitLog(messy.paths.log).append("shard", name=name))
    writer.start()
    assert named.wait(10)
    repair = threading.Thread(
        target=lambda: repair_dataset(messy.paths, now_s=NOW_S, min_age_s=AGE_S)
    )
    repair.start()
    repair.join(0.1)
    go_on.set()
    writer.join()
    repair.join()
    assert shard.exists()


def test_nothing_is_removed_where_the_log_cannot_be_read(messy: Any) -> None:
    messy.paths.log.write_bytes(b"nonsense\n" + messy.paths.log.read_bytes())
    before = committed_files(messy.paths.folder)
    with pytest.raises(CommitLogError):
        repair_dataset(messy.paths, now_s=NOW_S, min_age_s=AGE_S)
    assert committed_files(messy.paths.folder) == before


@pytest.mark.parametrize("kept_lines", [0, 1])
def test_nothing_is_removed_where_the_log_lost_records(messy: Any, kept_lines: int) -> None:
    lines = messy.paths.log.read_bytes().splitlines(keepends=True)
    messy.paths.log.write_bytes(b"".join(lines[:kept_lines]))
    before = committed_files(messy.paths.folder)
    with pytest.raises(CommitLogError, match="put the log back"):
        repair_dataset(messy.paths, now_s=NOW_S, min_age_s=AGE_S)
    assert committed_files(messy.paths.folder) == before


def test_a_data_set_that_was_never_made_is_an_error(root: Path) -> None:
    with pytest.raises(StorageError, match="no data set"):
        repair_dataset(DatasetPaths(root, "fish"), now_s=NOW_S, min_age_s=AGE_S)
    assert not root.exists()
