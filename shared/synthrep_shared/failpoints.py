"""Named places where a process can be made to die, for the tests of what survives it.

`SYNTHREP_FAILPOINT=<name>` ends the first process that passes the place with exit status 77 and no
clean-up at all. The file `SYNTHREP_FAILPOINT_MARKER` then exists, and later passes go through.
"""

from __future__ import annotations

import os

EXIT_STATUS = 77
NAMES = frozenset(
    {
        "batch-written",
        "batch-published",
        "chunk-registered",
        "chunk-enqueued",
        "chunk-popped",
        "chunk-leased",
        "chunk-acknowledged",
        "chunk-forgotten",
        "chunk-dropped",
        "chunk-split",
        "lost-chunk-forgotten",
        "group-written",
        "shard-half-written",
        "shard-written",
        "file-linked",
        "shard-published",
        "line-half-written",
        "line-written",
        "shard-committed",
        "failure-published",
        "failure-committed",
    }
)


TRAINER_NAMES = frozenset({"checkpoint-half-written", "checkpoint-written", "checkpoint-renamed"})
"""Those of train processes, where the others are of the generator's."""


def failpoint(name: str) -> None:
    """End this process here if the environment asks for it and no process did so before."""
    if os.environ.get("SYNTHREP_FAILPOINT") != name:
        return
    try:
        marker = os.open(os.environ["SYNTHREP_FAILPOINT_MARKER"], os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return
    os.close(marker)
    os._exit(EXIT_STATUS)
