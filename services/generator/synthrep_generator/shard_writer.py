"""Samples in, one sealed tar out: the same samples give the same bytes, anywhere, at any time.

Plain ustar with our own headers: no time, user or host, and a group is one write. The file is
written aside; `publish_shard` gives it its name, and only the commit log makes it exist.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image

from synthrep_generator.synthesis import Pixels
from synthrep_shared.failpoints import failpoint
from synthrep_shared.storage import Location, adopt_file, publish_file, temporary_path

Member = tuple[str, bytes]  # name, content
_BLOCK = 512
_NAME_BYTES = 100
_MAX_MEMBER_BYTES = 8**11 - 1
_MAX_PARTS = 1024  # of one writev
_MODE_AND_OWNER = b"0000644\0" + 2 * b"0000000\0"
_TIME = b"\x0000000000000\0"  # after the size's end
_KIND_AND_MAGIC = (b"0" + bytes(100) + b"ustar\x0000").ljust(_BLOCK - 156, b"\0")
# The checksum counts its own eight bytes as blanks.
_BLANK_SUM = sum(_MODE_AND_OWNER) + sum(_TIME) + sum(_KIND_AND_MAGIC) + 8 * ord(" ")
_PADDING = bytes(_BLOCK)
_END = bytes(2 * _BLOCK)
_PIL_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@dataclass(frozen=True)
class WrittenShard:
    """A complete tar that is flushed to disk under a temporary name."""

    path: Path
    sha256: str
    num_bytes: int


class ShardWriter:
    """Writes groups into one temporary tar; leaving the `with` block removes what is left of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = temporary_path(folder, "shard.tar")
        self._descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        self._digest = hashlib.sha256()
        self._spans: dict[str, tuple[int, int]] = {}
        self._num_bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)
        self._path.unlink(missing_ok=True)

    @property
    def gids(self) -> list[str]:
        """Groups written so far, in order."""
        return list(self._spans)

    def add_group(self, gid: str, members: Sequence[Member]) -> None:
        """Append the members of a group, in order; raises OSError when the disk is full."""
        start = self._num_bytes
        self._write([part for name, content in members for part in tar_member(name, content)])
        self._spans[gid] = (start, self._num_bytes - start)
        failpoint("group-written")

    def finish(self) -> WrittenShard:
        """End the tar and flush it to disk; nothing can be added afterwards."""
        failpoint("shard-half-written")
        self._write([_END])
        os.fsync(self._descriptor)
        failpoint("shard-written")
        return WrittenShard(self._path, self._digest.hexdigest(), self._num_bytes)

    def without(self, gids: Collection[str]) -> ShardWriter:
        """A new writer that holds the groups of this one except `gids`."""
        other = ShardWriter(self._folder)
        for gid, (start, length) in self._spans.items():
            if gid not in gids:
                other._spans[gid] = (other._num_bytes, length)
                other._write([os.pread(self._descriptor, length, start)])
        return other

    def _write(self, parts: Sequence[bytes]) -> None:
        for start in range(0, len(parts), _MAX_PARTS):
            some = parts[start : start + _MAX_PARTS]
            written = os.writev(self._descriptor, some)
            if written < sum(map(len, some)):
                left = memoryview(b"".join(some))[written:]
                while left:
                    left = left[os.write(self._descriptor, left) :]
        for part in parts:
            self._digest.update(part)
            self._num_bytes += len(part)


def tar_member(name: str, content: bytes) -> tuple[bytes, bytes, bytes]:
    """Header, content and padding of one file in a ustar archive, with mode 0644 and time 0."""
    encoded = name.encode("ascii")
    if len(encoded) >= _NAME_BYTES or len(content) > _MAX_MEMBER_BYTES:
        raise ValueError(f"does not fit a ustar header: {name[:120]!r}, {len(content)} bytes")
    size = b"%011o" % len(content)
    checksum = b"%06o\0 " % (_BLANK_SUM + sum(encoded) + sum(size))
    name_field = encoded.ljust(_NAME_BYTES, b"\0")
    header = b"".join((name_field, _MODE_AND_OWNER, size, _TIME, checksum, _KIND_AND_MAGIC))
    return header, content, _PADDING[: -len(content) % _BLOCK]


def publish_shard(written: WrittenShard, folder: Location, seq: int) -> str:
    """Name the shard for its sequence number; returns the name. Call under the log's lock.

    A shard of that name is an orphan of a writer that died before its log line, and the name says
    that it has the same content: it is adopted, or StorageError raised if it is damaged.
    """
    name = f"{seq:08d}-{written.sha256[:12]}.tar"
    if not publish_file(written.path, folder / name):
        adopt_file(folder / name, written.sha256)
    failpoint("shard-published")
    return name


def encode_image(pixels: Pixels, *, image_format: str, quality: int) -> bytes:
    """The image as a JPEG, PNG (lossless) or WebP file; the same pixels give the same bytes."""
    stream = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.save(stream, _PIL_FORMATS[image_format], quality=quality)
    return stream.getvalue()
