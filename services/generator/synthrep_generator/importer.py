"""Makes a data set of images that exist, with shards and a log like those of generated ones.

    image_folder -> checked images -> shard_writer -> commit log

The images are accepted as a batch that is paused from before it exists until its last image is
decided, so that no reconciler has them made. What the log has decided is not done again: an import
that was cut off goes on where it was, and one that is repeated changes nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple

from PIL import Image
from pydantic import BaseModel, ConfigDict

from synthrep_generator.failure_writer import Failure, record_failures
from synthrep_generator.image_folder import FoundImage
from synthrep_generator.intake import BatchHeader, set_paused, write_batch
from synthrep_generator.shard_writer import Member, ShardWriter, publish_shard
from synthrep_shared.commit_log import CommitLog, GroupRef
from synthrep_shared.keys import ANONYMOUS
from synthrep_shared.messages import GenerationSettings
from synthrep_shared.samples import SampleMetadata, caption_id, image_seed, member_name
from synthrep_shared.storage import DatasetPaths

MODEL = "import"
"""Stands for a model in the batch and the samples."""
_SHARD_IMAGES = 1000
_SHARD_BYTES = 128 << 20
_MAX_PIXELS = 4096 * 4096  # no trainer decodes more
_STORED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_READ = (*_STORED, "BMP", "TIFF", "PPM")
_JPEG_MODES = ("RGB", "L")
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class ImportReport(BaseModel):
    """What became of the images; `images` is the sum of the other three."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    batch: str
    images: int
    imported: int
    refused: int
    """Recorded as failures, each with its reason."""
    earlier: int
    """Decided by an earlier run of the import."""


class _Stored(NamedTuple):
    data: bytes
    suffix: str
    longest_px: int


def import_images(
    images: Sequence[FoundImage],
    paths: DatasetPaths,
    *,
    owner: str = ANONYMOUS,
    threads: int = 2,
    advance: Callable[[int], object] = lambda count: None,
) -> ImportReport:
    """Commit every image, or the reason why it cannot be; `advance` is told how many are decided.

    Raises OSError where the disk is to blame; call again to go on.
    """
    header = _header(images, paths.dataset, owner)
    paths.make_folders()
    set_paused(paths, header.id, True)
    write_batch(paths, header, [image.caption for image in images])
    log = CommitLog(paths.log)
    log.refresh()
    left = [i for i in range(len(images)) if not log.outcomes.is_decided(header.id, i)]
    advance(len(images) - len(left))
    imported = 0
    with ThreadPoolExecutor(threads) as pool:
        for indices in _cut(left, images):
            checked = pool.map(lambda i: _check(images[i]), indices)
            found = list(zip(indices, checked, strict=True))
            good = [(i, stored) for i, stored in found if isinstance(stored, _Stored)]
            if good:
                _commit(header, images, good, paths, log)
            record_failures(paths, log, [
                _failure(header, images[i], i, reason)
                for i, reason in found if isinstance(reason, str)
            ])  # fmt: skip
            imported += len(good)
            advance(len(indices))
    set_paused(paths, header.id, False)
    return ImportReport(
        dataset=paths.dataset, batch=header.id, images=len(images), imported=imported,
        refused=len(left) - imported, earlier=len(images) - len(left),
    )  # fmt: skip


def _header(images: Sequence[FoundImage], dataset: str, owner: str) -> BatchHeader:
    """The batch that these images are, whenever they are imported."""
    digest = hashlib.sha256(json.dumps([dataset, owner]).encode())
    for image in images:
        what = [image.name, image.part.num_bytes, image.caption]
        digest.update(json.dumps(what).encode())
    return BatchHeader(
        id=digest.hexdigest()[:32],
        dataset=dataset,
        owner=owner,
        priority=9,
        num_prompts=len(images),
        settings=GenerationSettings(images_per_prompt=1, model=MODEL),
        body_sha256=digest.hexdigest(),
        created_at=datetime.now(UTC),
    )


def _cut(indices: Iterable[int], images: Sequence[FoundImage]) -> Iterator[list[int]]:
    """The indices in the portions that become shards."""
    portion: list[int] = []
    num_bytes = 0
    for i in indices:
        portion.append(i)
        num_bytes += images[i].part.num_bytes
        if len(portion) == _SHARD_IMAGES or num_bytes >= _SHARD_BYTES:
            yield portion
            portion, num_bytes = [], 0
    if portion:
        yield portion


def _check(image: FoundImage) -> _Stored | str:
    """The image as it is stored, or why it is refused.

    Files that every trainer decodes stay as they are; others become PNG.
    """
    data = image.part.read()
    try:
        with Image.open(io.BytesIO(data), formats=_READ) as opened:
            if opened.width * opened.height > _MAX_PIXELS:
                return f"{opened.width} x {opened.height} pixels, at most {_MAX_PIXELS} are taken"
            opened.load()
            suffix = _STORED.get(opened.format or "")
            if suffix is None or (suffix == "jpg" and opened.mode not in _JPEG_MODES):
                stream = io.BytesIO()
                opened.convert("RGB").save(stream, "PNG")
                data, suffix = stream.getvalue(), "png"
            return _Stored(data, suffix, max(opened.size))
    except _UNREADABLE as error:
        return f"no readable image: {error}"[:200]


def _commit(
    header: BatchHeader,
    images: Sequence[FoundImage],
    good: Sequence[tuple[int, _Stored]],
    paths: DatasetPaths,
    log: CommitLog,
) -> None:
    refs = []
    with ShardWriter(paths.temporary) as writer:
        for i, stored in good:
            caption = images[i].caption
            gid, key = header.gid(i, caption), caption_id(caption)
            writer.add_group(gid, _members(gid, i, caption, stored))
            refs.append(GroupRef(gid=gid, caption_id=key, batch=header.id, index=i, images=1))
        written = writer.finish()
        log.append(
            "shard",
            name=partial(publish_shard, written, paths.shards),
            sha256=written.sha256,
            num_bytes=written.num_bytes,
            groups=tuple(refs),
        )


def _members(gid: str, index: int, caption: str, stored: _Stored) -> list[Member]:
    description = SampleMetadata(
        caption=caption,
        caption_id=caption_id(caption),
        gid=gid,
        image_index=0,
        seed=image_seed(gid, 0, request_seed=None, index=index),
        model=MODEL,
        model_revision="",
        scheduler="",
        num_inference_steps=0,
        guidance_scale=0.0,
        negative_prompt="",
        stored_px=stored.longest_px,
        generator_version="",
    )
    text = json.dumps(description.model_dump(), sort_keys=True).encode()
    return [
        (member_name(gid, 0, stored.suffix), stored.data),
        (member_name(gid, 0, "json"), text),
    ]


def _failure(header: BatchHeader, image: FoundImage, index: int, reason: str) -> Failure:
    return Failure(
        gid=header.gid(index, image.caption), batch=header.id, index=index,
        prompt=image.caption, reason=f"{image.name}: {reason}", attempts=1,
    )  # fmt: skip
