"""Recorded failures: the outcome of a prompt that ends without images.

`failures/<seq>-<sha12>.json` is a JSON list of `Failure`; like a shard it exists once the commit
log names it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial

from pydantic import BaseModel, ConfigDict

from synthrep_shared.commit_log import CommitLog, GroupRef
from synthrep_shared.errors import AlreadyDecidedError
from synthrep_shared.failpoints import failpoint
from synthrep_shared.samples import caption_id
from synthrep_shared.storage import DatasetPaths, adopt_file, publish_bytes


class Failure(BaseModel):
    """A prompt that failed for good, why, and after how many attempts."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    gid: str
    batch: str
    index: int
    prompt: str
    reason: str
    attempts: int


def record_failures(paths: DatasetPaths, log: CommitLog, failures: Sequence[Failure]) -> int:
    """Commit the failures of prompts that have no outcome yet; returns how many those were."""
    pending = list(failures)
    while pending:
        data = json.dumps([f.model_dump() for f in pending], sort_keys=True).encode()
        sha256 = hashlib.sha256(data).hexdigest()
        refs = tuple(
            GroupRef(
                gid=f.gid, caption_id=caption_id(f.prompt), batch=f.batch, index=f.index, images=0
            )
            for f in pending
        )
        try:
            log.append(
                "failure",
                name=partial(_publish, paths, data, sha256),
                sha256=sha256,
                num_bytes=len(data),
                groups=refs,
            )
        except AlreadyDecidedError as error:
            pending = [failure for failure in pending if failure.gid not in error.gids]
        else:
            failpoint("failure-committed")
            break
    return len(pending)


def _publish(paths: DatasetPaths, data: bytes, sha256: str, seq: int) -> str:
    name = f"{seq:08d}-{sha256[:12]}.json"
    if not publish_bytes(data, paths.failures / name):
        adopt_file(paths.failures / name, sha256)
    failpoint("failure-published")
    return name
