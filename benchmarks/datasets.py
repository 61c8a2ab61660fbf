"""Prompts accepted without an API, and what becomes of them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from benchmarks.services import Services
from synthrep_generator.intake import BatchHeader, write_batch
from synthrep_generator.settings import ModelConfig
from synthrep_shared.commit_log import CommitRecord, LogReader
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


def plain_settings(model: ModelConfig, *, images_per_prompt: int) -> GenerationSettings:
    """What the API makes of a request that leaves everything to the model."""
    return GenerationSettings(
        images_per_prompt=images_per_prompt,
        guidance_scale=model.guidance_scale,
        num_inference_steps=model.num_inference_steps,
        scheduler=model.scheduler,
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


def runs_done(services: Services, dataset: str, count: int) -> list[dict[str, Any]]:
    """What the only worker logged of the runs of a data set, as soon as these are so many."""
    while True:
        lines = services.log("worker-0")
        runs = [x for x in lines if x["event"] == "chunk done" and x["dataset"] == dataset]
        if len(runs) >= count:
            return runs
        time.sleep(0.05)
