"""A data set made by hand, and a backlog that says what a test wants it to say."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from starlette.testclient import TestClient

from synthrep_generator.api import create_app
from synthrep_generator.failure_writer import Failure, record_failures
from synthrep_generator.intake import BatchHeader, write_batch
from synthrep_generator.queues import QueueView, WorkerView
from synthrep_generator.settings import GeneratorSettings
from synthrep_shared.commit_log import CommitLog, CommitRecord, GroupRef
from synthrep_shared.messages import GenerationSettings
from synthrep_shared.samples import SampleMetadata, caption_id, image_seed, member_name
from synthrep_shared.storage import DatasetPaths, Location, publish_bytes


@dataclass
class FakeBacklog:
    """The queue as the API sees it; `is_up = False` is a Redis that is gone."""

    depth: int = 0
    prompts: dict[str, int] = field(default_factory=dict)
    live: list[WorkerView] = field(default_factory=list)
    is_up: bool = True
    nudges: int = 0
    filtered: dict[str, int] = field(default_factory=dict)

    def _check(self) -> None:
        if not self.is_up:
            raise RedisConnectionError("gone")

    def queue_view(self) -> QueueView:
        self._check()
        return QueueView(self.depth, len(self.prompts), dict(self.filtered))

    def running_prompts(self) -> dict[str, int]:
        self._check()
        return dict(self.prompts)

    def workers(self) -> list[WorkerView]:
        self._check()
        return list(self.live)

    def nudge(self) -> None:
        self._check()
        self.nudges += 1


class DatasetMaker:
    """Accepts, commits and fails prompts of one data set as the other processes do."""

    created_at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    def __init__(self, root: Location, name: str = "pets") -> None:
        self.paths = DatasetPaths(root, name)
        self.paths.make_folders()
        self.log = CommitLog(self.paths.log)

    def accept(
        self, prompts: Sequence[str], *, batch: str = "b" * 32, images: int = 2
    ) -> BatchHeader:
        header = BatchHeader(
            id=batch,
            dataset=self.paths.dataset,
            owner="anonymous",
            priority=5,
            num_prompts=len(prompts),
            settings=GenerationSettings(
                images_per_prompt=images,
                guidance_scale=2.0,
                num_inference_steps=5,
                scheduler="ddim",
            ),
            body_sha256="",
            created_at=self.created_at,
        )
        assert write_batch(self.paths, header, prompts)
        return header

    def refs(self, header: BatchHeader, prompts: dict[int, str]) -> tuple[GroupRef, ...]:
        return tuple(
            GroupRef(
                gid=header.gid(index, prompt),
                caption_id=caption_id(prompt),
                batch=header.id,
                index=index,
                images=header.settings.images_per_prompt,
            )
            for index, prompt in prompts.items()
        )

    def commit(self, header: BatchHeader, prompts: dict[int, str]) -> CommitRecord:
        """One shard with a group for each of the prompts, by index."""
        refs = self.refs(header, prompts)
        data = _tar(refs, prompts)
        sha256 = hashlib.sha256(data).hexdigest()

        def publish(seq: int) -> str:
            name = f"{seq:08d}-{sha256[:12]}.tar"
            assert publish_bytes(data, self.paths.shards / name)
            return name

        return self.log.append(
            "shard", name=publish, sha256=sha256, num_bytes=len(data), groups=refs
        )

    @staticmethod
    def image(gid: str, image_index: int) -> bytes:
        """What stands for image `image_index` of a group in the shards made here."""
        return f"jpeg of {gid} {image_index}".encode()

    def fail(self, header: BatchHeader, prompts: dict[int, str], reason: str = "nsfw") -> None:
        """One failure record for the prompts, by index."""
        failures = [
            Failure(
                gid=header.gid(index, prompt),
                batch=header.id,
                index=index,
                prompt=prompt,
                reason=reason,
                attempts=4,
            )
            for index, prompt in prompts.items()
        ]
        record_failures(self.paths, self.log, failures)


def _tar(refs: Sequence[GroupRef], prompts: dict[int, str]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as shard:
        for ref in refs:
            for k in range(ref.images):
                metadata = SampleMetadata(
                    caption=prompts[ref.index],
                    caption_id=ref.caption_id,
                    gid=ref.gid,
                    image_index=k,
                    seed=image_seed(ref.gid, k, request_seed=None, index=ref.index),
                    model="tiny",
                    model_revision="r",
                    scheduler="ddim",
                    num_inference_steps=5,
                    guidance_scale=2.0,
                    negative_prompt="",
                    stored_px=32,
                    generator_version="0",
                )
                members = {"jpg": DatasetMaker.image(ref.gid, k), "json": _json(metadata)}
                for suffix, data in members.items():
                    member = tarfile.TarInfo(member_name(ref.gid, k, suffix))
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def _json(metadata: SampleMetadata) -> bytes:
    return json.dumps(metadata.model_dump()).encode()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folder of the data sets."""
    return tmp_path / "data"


@pytest.fixture
def pets(root: Path) -> DatasetMaker:
    """The data set `pets`."""
    return DatasetMaker(root)


@pytest.fixture
def backlog() -> FakeBacklog:
    """A queue that is up and empty."""
    return FakeBacklog()


@pytest.fixture
def settings(root: Path) -> GeneratorSettings:
    """Settings of an API without keys."""
    return GeneratorSettings(root=root, reserve_bytes=0)


@pytest.fixture
def client(settings: GeneratorSettings, backlog: FakeBacklog) -> Iterator[TestClient]:
    """The API over `backlog`; an exception behind an answer 500 fails the test."""
    with TestClient(create_app(settings, backlog)) as client:
        yield client
