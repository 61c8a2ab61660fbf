"""A generator in a few lines, which commits small shards, whole or broken; and the page."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

from synthrep_shared import samples
from synthrep_shared.commit_log import CommitLog, CommitRecord, GroupRef
from synthrep_shared.storage import DatasetPaths, publish_bytes

from .pages import Page


class ShardMaker:
    """Commits shards of seeded noise around one colour a caption."""

    def __init__(
        self, root: Path, dataset: str = "birds", *, px: int = 16, images: int = 3
    ) -> None:
        self.paths = DatasetPaths(root, dataset)
        self.paths.make_folders()
        self.log = CommitLog(self.paths.log)
        self.px, self.images = px, images
        self._prompts = 0

    def commit(
        self,
        num_groups: int,
        *,
        captions: list[str] | None = None,
        images: int | None = None,
        break_tar: Callable[[bytes], bytes] = lambda data: data,
        break_file: Callable[[bytes], bytes] = lambda data: data,
        break_groups: Callable[[list[GroupRef]], list[GroupRef]] = lambda groups: groups,
    ) -> CommitRecord:
        """One shard; `break_tar` acts before the log sees it, `break_file` after, and so on."""
        refs, members = [], []
        for k in range(num_groups):
            caption = captions[k] if captions else f"bird number {self._prompts}"
            ref, files = self._group(caption, images or self.images)
            refs.append(ref)
            members += files
        data = break_tar(tar_bytes(members))
        sha256 = hashlib.sha256(data).hexdigest()

        def publish(seq: int) -> str:
            name = f"{seq:06d}-{sha256[:12]}.tar"
            publish_bytes(break_file(data), self.paths.shards / name)
            return name

        return self.log.append(
            "shard", name=publish, sha256=sha256, num_bytes=len(data),
            groups=tuple(break_groups(refs)),
        )  # fmt: skip

    def reject(self, *groups: GroupRef) -> CommitRecord:
        """Take groups back."""
        return self.log.append("reject", name=lambda _: "", groups=groups)

    def _group(self, caption: str, images: int) -> tuple[GroupRef, list[tuple[str, bytes]]]:
        index = self._prompts
        self._prompts += 1
        gid = samples.group_id(self.paths.dataset, "b1", index, caption, {})
        caption_id = samples.caption_id(caption)
        random = np.random.default_rng(int(caption_id, 16) + index)
        colour = np.random.default_rng(int(caption_id, 16)).integers(0, 200, 3)
        files = []
        for k in range(images):
            noise = random.integers(0, 50, (self.px, self.px, 3))
            jpeg = simplejpeg.encode_jpeg((colour + noise).astype(np.uint8), quality=95)
            metadata = samples.SampleMetadata(
                caption=caption, caption_id=caption_id, gid=gid, image_index=k, seed=k,
                model="tiny", model_revision="1", scheduler="ddim", num_inference_steps=2,
                guidance_scale=2.0, negative_prompt="", stored_px=self.px, generator_version="0",
            )  # fmt: skip
            files.append((samples.member_name(gid, k, "jpg"), jpeg))
            files.append((samples.member_name(gid, k, "json"), metadata.model_dump_json().encode()))
        ref = GroupRef(gid=gid, caption_id=caption_id, batch="b1", index=index, images=images)
        return ref, files


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    """A plain tar of the members, without a time or an owner."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def shard_maker(tmp_path: Path) -> ShardMaker:
    """Commits to the data set `birds` under `tmp_path / "data"`."""
    return ShardMaker(tmp_path / "data")


@pytest.fixture
def make_tar() -> Callable[[list[tuple[str, bytes]]], bytes]:
    """Makes a plain tar of (name, bytes)."""
    return tar_bytes


@pytest.fixture
def make_page(tmp_path: Path) -> Iterator[Callable[..., Page]]:
    made: list[Page] = []

    def make(**settings: Any) -> Page:
        made.append(Page(tmp_path, **settings))
        return made[-1]

    yield make
    for page in made:
        page.browser.close()
        page.generator.close()


@pytest.fixture
def page(make_page: Callable[..., Page]) -> Page:
    return make_page()
