"""Accepted prompts and sealed shards, made without an API."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import partial

from benchmarks.services import Services
from synthrep_generator.intake import BatchHeader, write_batch
from synthrep_generator.shard_writer import Member, ShardWriter, publish_shard
from synthrep_shared.commit_log import CommitLog, CommitRecord, GroupRef, LogReader
from synthrep_shared.messages import GenerationSettings
from synthrep_shared.storage import DatasetPaths

_LIMIT_S = 900.0


def accept_prompts(
    paths: DatasetPaths, prompts: Sequence[str], settings: GenerationSettings
) -> BatchHeader:
    """Make one batch durable; its settings have every default of the model filled in."""
    paths.make_folders()
    header = BatchHeader(
        id=secrets.token_hex(16),
        dataset=paths.dataset,
        owner="anonymous",
        priority=5,
        num_prompts=len(prompts),
        settings=settings,
        body_sha256="",
        created_at=datetime.now(UTC),
    )
    if not write_batch(paths, header, prompts):
        raise RuntimeError(f"batch {header.id} is there already")
    return header


def seal_shard(paths: DatasetPaths, log: CommitLog, gid: str, members: Iterable[Member]) -> None:
    """Write, publish and commit a shard of one group, as a worker does."""
    files = list(members)
    group = GroupRef(
        gid=gid,
        caption_id=hashlib.sha256(gid.encode()).hexdigest()[:15],
        batch=gid,
        index=0,
        images=len(files) // 2,
    )
    with ShardWriter(paths.temporary) as writer:
        writer.add_group(gid, files)
        written = writer.finish()
        log.append(
            "shard",
            name=partial(publish_shard, written, paths.shards),
            sha256=written.sha256,
            num_bytes=written.num_bytes,
            groups=(group,),
        )


def wait_for_groups(services: Services, paths: DatasetPaths, num_groups: int) -> list[CommitRecord]:
    """The records of a data set, as soon as they hold so many groups."""
    reader, records = LogReader(paths.log), list[CommitRecord]()
    deadline = time.monotonic() + _LIMIT_S
    while sum(len(record.groups) for record in records) < num_groups:
        services.check()
        records += reader.poll()
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(records)} records after {_LIMIT_S:.0f} s")
        time.sleep(0.2)
    return records
