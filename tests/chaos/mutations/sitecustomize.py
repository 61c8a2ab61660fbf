"""Breaks the generator on purpose, in processes of a campaign that names a mutation.

Python imports this at its start because the campaign puts the folder into PYTHONPATH. Each
mutation takes out one of the measures that keep a promise, and the verdict must say so.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def forget_decided() -> None:
    """The commit log appends without asking whether a prompt has an outcome already."""
    from synthrep_shared.commit_log import CommitLog

    append = CommitLog.append

    class Blind:
        def __init__(self, outcomes: Any) -> None:
            self._outcomes = outcomes

        def __getattr__(self, name: str) -> Any:
            return getattr(self._outcomes, name)

        def is_decided(self, batch: str, index: int) -> bool:
            return False

    def blind_append(log: Any, *arguments: Any, **options: Any) -> Any:
        seeing = log.outcomes
        log.outcomes = Blind(seeing)
        try:
            return append(log, *arguments, **options)
        finally:
            log.outcomes = seeing

    CommitLog.append = blind_append  # type: ignore[method-assign, assignment]


def leave_lost_chunks() -> None:
    """The reconciler does not bring back chunks that nobody waits to run and nobody runs."""
    from synthrep_generator.queues import InFlight

    InFlight.lost = lambda _: set()  # type: ignore[method-assign, assignment]


def write_in_place() -> None:
    """A shard is written under its final name, not aside."""
    from synthrep_generator import shard_writer
    from synthrep_shared.failpoints import failpoint
    from synthrep_shared.storage import sync_folder

    def publish_in_place(written: Path, final: Path) -> bool:
        data = written.read_bytes()
        half = len(data) // 2
        try:
            with final.open("xb", buffering=0) as stream:
                stream.write(data[:half])
                failpoint("file-linked")
                time.sleep(0.02)
                stream.write(data[half:])
        except FileExistsError:
            return False
        sync_folder(final.parent)
        return True

    shard_writer.publish_file = publish_in_place  # type: ignore[attr-defined]


_MUTATIONS = {
    "forget-decided": forget_decided,
    "leave-lost-chunks": leave_lost_chunks,
    "write-in-place": write_in_place,
}

if name := os.environ.get("CHAOS_MUTATION"):
    _MUTATIONS[name]()
