"""Committed shards as files: verified whole before first use, then read by offset.

A shard is a plain tar of `<gid>-<k>.<suffix>` images with a `<gid>-<k>.json` beside each. What the
commit log says of it (bytes, sha256, groups, images, caption ids) is checked against the whole
file; what stays in memory is 13 bytes an image, 12 a group. Images are then read by `pread`, with
one `open` a group, so that no number of shards meets a limit on open files or mapped memory.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from synthrep_shared import samples

_BLOCK = 512
_CHECKSUM = slice(148, 156)
_REGULAR_FILE = (b"0", b"\0")
_IMAGE_SUFFIXES = ("jpg", "png", "webp")


class ShardMismatchError(ValueError):
    """The file is not what the commit log says; the message is the reason."""


class GroupKey(NamedTuple):
    """What the log says of one group of a shard."""

    gid: str
    caption_id: str
    images: int


class Image(NamedTuple):
    """One stored image: its bytes as they are in the shard and their format."""

    data: bytes
    suffix: str


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Where the images of a verified shard lie; image `k` of group `g` is row `starts[g] + k`.

    The metadata are those of one image of each group.
    """

    starts: NDArray[np.uint32]
    offsets: NDArray[np.uint64]
    sizes: NDArray[np.uint32]
    suffixes: NDArray[np.uint8]
    metadata_offsets: NDArray[np.uint64]
    metadata_sizes: NDArray[np.uint32]


def verify_shard(
    path: Path, *, sha256: str, num_bytes: int, groups: Sequence[GroupKey]
) -> ShardLayout:
    """Check the whole file against the log; blocks for about a millisecond per megabyte.

    Raises ShardMismatchError if it is absent or differs in any way, other OSErrors as they come:
    a machine that cannot read, or has lost the whole folder, says nothing about the shard.
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise
        raise ShardMismatchError("the file is missing") from None
    with stream:
        size = os.fstat(stream.fileno()).st_size
        if size != num_bytes or size == 0:
            raise ShardMismatchError(f"it has {size} bytes, the log says {num_bytes}")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            if hashlib.sha256(mapped).hexdigest() != sha256:
                raise ShardMismatchError("its sha256 is not the one in the log")
            return _layout(mapped, groups)


def read_images(path: Path, layout: ShardLayout, group: int, images: Sequence[int]) -> list[Image]:
    """The given images of a group, by their positions in it; raises OSError as the system does."""
    found = []
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for image in images:
            row = int(layout.starts[group]) + image
            data = os.pread(descriptor, int(layout.sizes[row]), int(layout.offsets[row]))
            found.append(Image(data, _IMAGE_SUFFIXES[layout.suffixes[row]]))
    finally:
        os.close(descriptor)
    return found


def read_caption(path: Path, layout: ShardLayout, group: int) -> str:
    """The caption of a group, as it was when the shard was verified; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size, offset = layout.metadata_sizes[group], layout.metadata_offsets[group]
        data = os.pread(descriptor, int(size), int(offset))
    finally:
        os.close(descriptor)
    return samples.SampleMetadata.model_validate_json(data).caption


class _Member(NamedTuple):
    gid: str
    image_index: int
    suffix: str
    offset: int
    size: int


def _layout(data: mmap.mmap, groups: Sequence[GroupKey]) -> ShardLayout:
    images: dict[str, list[_Member]] = {group.gid: [] for group in groups}
    captions = {group.gid: group.caption_id for group in groups}
    described: dict[tuple[str, int], _Member] = {}
    for member in _members(data):
        if member.gid not in images:
            raise ShardMismatchError(f"group {member.gid} is not in the log's record")
        if member.suffix != "json":
            images[member.gid].append(member)
            continue
        described[member.gid, member.image_index] = member
        _check_metadata(
            data[member.offset : member.offset + member.size], member, captions[member.gid]
        )
    for group in groups:
        found = images[group.gid]
        keys = {(m.gid, m.image_index) for m in found}
        if (
            not found
            or len(found) != group.images
            or len(keys) != group.images
            or not keys <= described.keys()
        ):
            raise ShardMismatchError(
                f"group {group.gid} has not {group.images} images, each with its JSON"
            )
    if len(described) != sum(group.images for group in groups):
        raise ShardMismatchError("it has JSON members without an image")
    rows = [m for g in groups for m in sorted(images[g.gid], key=lambda m: m.image_index)]
    metadata = {gid: member for (gid, _), member in described.items()}
    counts = [0, *(group.images for group in groups)]
    return ShardLayout(
        starts=np.cumsum(counts, dtype=np.uint32),
        offsets=np.array([m.offset for m in rows], dtype=np.uint64),
        sizes=np.array([m.size for m in rows], dtype=np.uint32),
        suffixes=np.array([_IMAGE_SUFFIXES.index(m.suffix) for m in rows], dtype=np.uint8),
        metadata_offsets=np.array([metadata[g.gid].offset for g in groups], dtype=np.uint64),
        metadata_sizes=np.array([metadata[g.gid].size for g in groups], dtype=np.uint32),
    )


def _check_metadata(data: bytes, member: _Member, caption_id: str) -> None:
    try:
        metadata = samples.SampleMetadata.model_validate_json(data)
    except ValidationError:
        raise ShardMismatchError(f"{member.gid}-{member.image_index}.json is malformed") from None
    if (metadata.gid, metadata.image_index) != (member.gid, member.image_index):
        raise ShardMismatchError(f"{member.gid}-{member.image_index}.json describes another image")
    if not caption_id == metadata.caption_id == samples.caption_id(metadata.caption):
        raise ShardMismatchError(f"{member.gid}-{member.image_index}.json has another caption")


def _members(data: mmap.mmap) -> Iterator[_Member]:
    """The members of a plain tar, in order; raises ShardMismatchError for anything fancier."""
    position = 0
    while position + _BLOCK <= len(data):
        header = data[position : position + _BLOCK]
        if not any(header):
            return
        position += _BLOCK
        try:
            # The checksum is the sum of the header's bytes with its own field read as spaces.
            declared = int(header[_CHECKSUM].rstrip(b" \0"), 8)
            if declared != sum(header) - sum(header[_CHECKSUM]) + 8 * ord(" "):
                raise ValueError("checksum")
            size = int(header[124:136].rstrip(b" \0"), 8)
            gid, index, suffix = samples.parse_member_name(header[:100].rstrip(b"\0").decode())
        except ValueError as error:
            raise ShardMismatchError(f"no valid member at byte {position - _BLOCK}") from error
        if header[156:157] not in _REGULAR_FILE or not 0 <= size <= len(data) - position:
            raise ShardMismatchError(f"member {gid}-{index}.{suffix} is no file within the shard")
        yield _Member(gid, index, suffix, position, size)
        position += -(-size // _BLOCK) * _BLOCK
    raise ShardMismatchError("it ends without an end-of-archive block")
