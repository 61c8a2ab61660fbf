"""The janitor removes leftovers, and nothing that is or may become part of a data set."""

from __future__ import annotations

import os
import time
from pathlib import Path

from synthrep_generator.janitor import remove_leftovers
from synthrep_shared.commit_log import CommitLog
from synthrep_shared.storage import DatasetPaths

DAY_S = 86_400.0


def test_only_old_temporary_files_and_shards_that_lost_their_number_go(tmp_path: Path) -> None:
    paths = DatasetPaths(tmp_path, "birds")
    paths.make_folders()
    CommitLog(paths.log).append("shard", name=lambda _: f"00000001-{'a' * 12}.tar")
    doomed = [
        paths.temporary / ".shard.tar.1.00.part",
        paths.intake / ".b.jsonl.1.00.part",
        paths.shards / f"00000001-{'b' * 12}.tar",
    ]
    kept = [
        paths.shards / f"00000001-{'a' * 12}.tar",
        paths.shards / f"00000002-{'c' * 12}.tar",  # may be adopted by the next commit
        paths.intake / "b.jsonl",
        paths.control / "b.paused",
        paths.log,
    ]
    young = paths.temporary / ".shard.tar.2.00.part"
    now = time.time()
    for file in (*doomed, *kept, young):
        file.touch()
        os.utime(file, (now, now if file == young else now - 2 * DAY_S))
    assert remove_leftovers(paths, now_s=now) == len(doomed)
    assert not any(file.exists() for file in doomed)
    assert all(file.exists() for file in (*kept, young))
