"""What is trouble with a machine, a network or a disk is no fault of a shard."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from synthrep_shared.errors import StorageError
from synthrep_shared.shard_copies import ShardCopies
from synthrep_shared.storage import spool_folder
from synthrep_trainer.shard_store import ShardStore


@dataclasses.dataclass
class Far:
    """The shards of a local data set, as if they were far away."""

    folder: Path
    dataset: str = "birds"
    root: str = "http://far"
    change: Callable[[bytes], bytes] = lambda data: data
    """What the way does to them."""

    @property
    def shards(self) -> Far:
        return self

    def __truediv__(self, name: str) -> Far:
        return dataclasses.replace(self, folder=self.folder / name)

    def read_range(self, start: int, num_bytes: int) -> bytes:
        return self.change(self.folder.read_bytes()[start : start + num_bytes])


@pytest.fixture
def far(shard_maker, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Far(shard_maker.paths.shards)


def test_a_copy_that_was_damaged_is_made_anew(shard_maker, far, tmp_path):
    record = shard_maker.commit(2)
    store = ShardStore(far, tmp_path / "run")
    store.scout(record)
    (copy,) = (spool_folder(far.root) / "copies").iterdir()
    copy.write_bytes(copy.read_bytes()[:-1])
    store.scout(record)
    assert store.num_quarantined == 0
    assert copy.stat().st_size == record.bytes


def test_what_a_proxy_says_once_in_place_of_a_shard_does_not_condemn_it(shard_maker, far, tmp_path):
    record = shard_maker.commit(2)
    answers = [b"<html>back in a minute</html>"]
    far.change = lambda data: answers.pop() if answers else data
    store = ShardStore(far, tmp_path / "run")
    store.scout(record)
    assert (store.num_quarantined, store.num_verified) == (0, 1)


def test_a_shard_that_is_bad_twice_goes_to_quarantine(shard_maker, far, tmp_path):
    record = shard_maker.commit(2)
    far.change = lambda data: data[:-1]
    store = ShardStore(far, tmp_path / "run")
    store.scout(record)
    assert store.num_quarantined == 1


def test_a_copy_that_a_jump_of_the_clock_made_old_does_not_condemn_its_shard(
    shard_maker, far, tmp_path, monkeypatch
):
    record = shard_maker.commit(2)

    def jump(data):
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 7200)
        ShardCopies(far, max_bytes=1 << 30)._make_room(spool_folder(far.root) / "copies", 1)
        return data

    far.change = jump
    store = ShardStore(far, tmp_path / "run")
    with pytest.raises(StorageError, match="removed while it was written"):
        store.scout(record)
    assert store.num_quarantined == 0


def test_a_root_that_is_not_mounted_does_not_condemn_its_shards(shard_maker, tmp_path):
    record = shard_maker.commit(2)
    store = ShardStore(shard_maker.paths, tmp_path / "run")
    shards = shard_maker.paths.shards
    shards.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        store.scout(record)
    (tmp_path / "elsewhere").rename(shards)
    store.scout(record)
    assert (store.num_quarantined, store.num_verified) == (0, 1)
