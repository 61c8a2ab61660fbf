"""What the run of the training benchmark reads is a data set like any other."""

from __future__ import annotations

from benchmarks.train.runs import commit_images
from synthrep_shared.commit_log import LogReader
from synthrep_shared.storage import DatasetPaths
from synthrep_trainer.shard_files import GroupKey, verify_shard


def test_the_committed_shard_is_what_its_log_says(tmp_path):
    paths = DatasetPaths(tmp_path, "demo")
    commit_images(paths)
    (record,) = LogReader(paths.log).poll()
    layout = verify_shard(
        paths.shards / record.name,
        sha256=record.sha256,
        num_bytes=record.bytes,
        groups=[GroupKey(g.gid, g.caption_id, g.images) for g in record.groups],
    )
    assert len(layout.offsets) == 2400
