"""Data sets that were never generated: accepted batches and the commit log that decides them.

Records are as a fleet leaves them: 16 captions of 10 images in a shard, so that 10^7 captions are
10^8 images. The shard files themselves are empty ones.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from datetime import UTC, datetime

from benchmarks.datasets import plain_settings
from benchmarks.uploads import captions
from synthrep_generator.intake import BatchHeader, write_batch
from synthrep_generator.settings import GeneratorSettings
from synthrep_shared.commit_log import CommitRecord, GroupRef
from synthrep_shared.samples import caption_id
from synthrep_shared.storage import DatasetPaths

IMAGES = 10
JOB_CAPTIONS = 16
_BATCH_CAPTIONS = 1_000_000  # the most that one upload takes
_SHARD_BYTES = 160 * 28_000


def make_dataset(paths: DatasetPaths, num_captions: int, *, has_files: bool) -> list[str]:
    """Accept so many captions and decide every one; returns the batches' ids."""
    paths.make_folders()
    batches = {
        secrets.token_hex(16): min(_BATCH_CAPTIONS, num_captions - start)
        for start in range(0, num_captions, _BATCH_CAPTIONS)
    }
    for batch, count in batches.items():
        _accept(paths, batch, count)
    with paths.log.open("ab") as stream:
        for record in _records(batches):
            stream.write(record.model_dump_json().encode() + b"\n")
            if has_files:
                (paths.shards / record.name).open("xb").close()
    return list(batches)


def next_record(seq: int, batch: str, start: int, count: int) -> CommitRecord:
    """The record of a shard with so many captions of a batch, which may not be in it."""
    digest = secrets.token_hex(32)
    groups = tuple(
        GroupRef(
            gid=secrets.token_hex(16),
            caption_id=caption_id(str(index)),
            batch=batch,
            index=index,
            images=IMAGES,
        )
        for index in range(start, start + count)
    )
    return CommitRecord(
        seq=seq,
        kind="shard",
        name=f"{seq:08d}-{digest[:12]}.tar",
        sha256=digest,
        bytes=_SHARD_BYTES,
        groups=groups,
        created_at=datetime.now(UTC),
    )


def _records(batches: dict[str, int]) -> Iterator[CommitRecord]:
    seq = 0
    for batch, num_captions in batches.items():
        for start in range(0, num_captions, JOB_CAPTIONS):
            seq += 1
            yield next_record(seq, batch, start, min(JOB_CAPTIONS, num_captions - start))


def _accept(paths: DatasetPaths, batch: str, count: int) -> None:
    model = GeneratorSettings().models["tiny"]
    header = BatchHeader(
        id=batch,
        dataset=paths.dataset,
        owner="anonymous",
        priority=5,
        num_prompts=count,
        settings=plain_settings(model, images_per_prompt=IMAGES),
        body_sha256="",
        created_at=datetime.now(UTC),
    )
    if not write_batch(paths, header, captions(count)):
        raise RuntimeError(f"batch {batch} is there already")
