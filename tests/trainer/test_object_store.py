"""A trainer that follows a data set in an object store draws what it draws from a disk."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from synthrep_shared.commit_log import read_log
from synthrep_shared.errors import StorageError
from synthrep_shared.object_store import ObjectPath
from synthrep_shared.storage import spool_folder
from synthrep_trainer.order import SamplingPlan
from synthrep_trainer.shard_stream import ShardStream

pytestmark = pytest.mark.s3

PLAN = SamplingPlan(
    seed=7, captions_per_batch=4, images_per_caption=2, min_fill_groups=4, max_uses_per_image=100
)
SHARDS, GROUPS = 3, 4


@pytest.fixture
def remote_maker(shard_maker: Any, store_root: ObjectPath) -> Any:
    """Commits to the data set `birds` in the object store."""
    return type(shard_maker)(store_root)


def images(stream: ShardStream, batches: int) -> list[tuple[int, str, list[bytes]]]:
    """(group, caption, files) of every draw; each shard is verified before it is read."""
    found = []
    for _ in range(batches):
        batch = stream.next_batch(lambda: False)
        assert batch is not None
        for drawn in batch.groups:
            stream.verify(drawn.shard)
            files = stream.store.read(drawn.shard, drawn.place, drawn.images)
            caption = stream.store.caption(drawn.shard, drawn.place)
            found.append((drawn.group, caption, [file.data for file in files]))
    return found


def copies(root: ObjectPath) -> list[Path]:
    return list(spool_folder(root).rglob("*.tar"))


def test_the_same_images_come_from_a_store_and_from_a_disk(
    shard_maker: Any, remote_maker: Any, tmp_path: Path
) -> None:
    streams = []
    for maker, run in ((shard_maker, "local"), (remote_maker, "remote")):
        for _ in range(SHARDS):
            maker.commit(GROUPS)
        streams.append(ShardStream(maker.paths, tmp_path / run, PLAN))
    local, remote = (images(stream, 2 * SHARDS) for stream in streams)
    assert remote == local
    assert Counter(group for group, _, _ in remote) == dict.fromkeys(range(SHARDS * GROUPS), 2)
    assert len(copies(remote_maker.paths.root)) == SHARDS


def test_a_shard_whose_copy_made_room_is_copied_again(remote_maker: Any, tmp_path: Path) -> None:
    size = min(remote_maker.commit(GROUPS).bytes for _ in range(SHARDS))
    stream = ShardStream(remote_maker.paths, tmp_path / "run", PLAN, copy_bytes=size)
    assert len(images(stream, SHARDS)) == SHARDS * GROUPS
    for copy in copies(remote_maker.paths.root):
        os.utime(copy, (0, 0))
    assert len(images(stream, SHARDS)) == SHARDS * GROUPS
    for copy in copies(remote_maker.paths.root):
        copy.unlink()
    assert len(images(stream, SHARDS)) == SHARDS * GROUPS


@pytest.mark.parametrize("is_missing", [True, False])
def test_a_bad_shard_goes_to_quarantine(
    remote_maker: Any, tmp_path: Path, is_missing: bool
) -> None:
    for _ in range(SHARDS):
        remote_maker.commit(GROUPS)
    record = list(read_log(remote_maker.paths.log))[1]
    shard = remote_maker.paths.shards / record.name
    if is_missing:
        shard.unlink()
    else:
        shard.replace_with(bytes(record.bytes))
    stream = ShardStream(remote_maker.paths, tmp_path / "run", PLAN)
    drawn = images(stream, 4)
    assert stream.store.num_quarantined == 1
    good = [group for group in range(SHARDS * GROUPS) if group // GROUPS != 1]
    assert Counter(group for group, _, _ in drawn) == dict.fromkeys(good, 2)


def test_trouble_with_the_place_for_copies_puts_no_shard_in_quarantine(
    remote_maker: Any, tmp_path: Path
) -> None:
    remote_maker.commit(GROUPS)
    place = spool_folder(remote_maker.paths.root)
    place.chmod(0o777)
    with pytest.raises(StorageError, match="others may write"):
        images(ShardStream(remote_maker.paths, tmp_path / "run", PLAN), 1)
    place.chmod(0o700)
    stream = ShardStream(remote_maker.paths, tmp_path / "run", PLAN)
    assert len(images(stream, 1)) == GROUPS
    assert stream.store.num_quarantined == 0
