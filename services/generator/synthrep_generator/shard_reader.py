"""Reads single samples out of sealed shards, which never change.

The member tables of the shards read last are remembered, so that a page of images costs one walk
through a tar file.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from synthrep_shared.errors import StorageError
from synthrep_shared.samples import SampleMetadata, parse_member_name

_MEDIA_TYPES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
_REMEMBERED_SHARDS = 16

Members = dict[tuple[str, int, str], tuple[int, int]]


@dataclass(frozen=True)
class Image:
    """An encoded image and its media type."""

    data: bytes
    media_type: str


@lru_cache(maxsize=_REMEMBERED_SHARDS)
def _members(path: Path) -> Members:
    """(offset, size) in bytes of every sample's members, by gid, image index and suffix."""
    found: Members = {}
    with tarfile.open(path, "r:") as shard:
        for member in shard:
            if member.isreg():
                found[parse_member_name(member.name)] = (member.offset_data, member.size)
    return found


def read_image(path: Path, gid: str, image_index: int) -> Image | None:
    """One image of a group; None if the shard holds none of that index. Raises StorageError."""
    for suffix, media_type in _MEDIA_TYPES.items():
        data = _read(path, gid, image_index, suffix)
        if data is not None:
            return Image(data, media_type)
    return None


def read_metadata(path: Path, gid: str, num_images: int) -> list[SampleMetadata]:
    """What is recorded beside the images of a group, in order. Raises StorageError."""
    found = [_read(path, gid, index, "json") for index in range(num_images)]
    try:
        return [SampleMetadata.model_validate_json(data) for data in found if data is not None]
    except ValidationError as error:
        raise StorageError(f"{path.name}: malformed metadata of group {gid}") from error


def _read(path: Path, gid: str, image_index: int, suffix: str) -> bytes | None:
    try:
        place = _members(path).get((gid, image_index, suffix))
        if place is None:
            return None
        with path.open("rb") as shard:
            shard.seek(place[0])
            return shard.read(place[1])
    except (OSError, ValueError, tarfile.TarError) as error:
        raise StorageError(f"{path.name}: the shard cannot be read") from error
