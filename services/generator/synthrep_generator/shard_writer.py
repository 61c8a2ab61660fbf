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
from synthrep_shared.storage import adopt_file, publish_file, temporary_path

Member = tuple[str, bytes]  # name, content
_BLOCK = 512
_NAME_BYTES = 100
_MAX_MEMBER_BYTES = 8**11 - 1
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
        data = b"".join(tar_member(name, content) for name, content in members)
        self._add_bytes(gid, data)

    def finish(self) -> WrittenShard:
        """End the tar and flush it to disk; nothing can be added afterwards."""
        failpoint("shard-half-written")
        self._write(_END)
        os.fsync(self._descriptor)
        failpoint("shard-written")
        return WrittenShard(self._path, self._digest.hexdigest(), self._num_bytes)

    def without(self, gids: Collection[str]) -> ShardWriter:
        """A new writer that holds the groups of this one except `gids`."""
        other = ShardWriter(self._folder)
        for gid, (start, length) in self._spans.items():
            if gid not in gids:
                other._add_bytes(gid, os.pread(self._descriptor, length, start))
        return other

    def _add_bytes(self, gid: str, data: bytes) -> None:
        self._spans[gid] = (self._num_bytes, len(data))
        self._write(data)

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self._descriptor, left) :]
        self._digest.update(data)
        self._num_bytes += len(data)


def tar_member(name: str, content: bytes) -> bytes:
    """Header, content and padding of one file in a ustar archive, with mode 0644 and time 0."""
    encoded = name.encode("ascii")
    if len(encoded) >= _NAME_BYTES or len(content) > _MAX_MEMBER_BYTES:
        raise ValueError(f"does not fit a ustar header: {name[:120]!r}, {len(content)} bytes")
    header = bytearray(_BLOCK)
    header[: len(encoded)] = encoded
    header[100:156] = (
        b"0000644\0" + 2 * b"0000000\0" + b"%011o\0" % len(content) + (b"00000000000\0" + 8 * b" ")
    )  # mode, uid, gid, size, mtime, checksum taken as blanks
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + bytes(-len(content) % _BLOCK)


def publish_shard(written: WrittenShard, folder: Path, seq: int) -> str:
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
