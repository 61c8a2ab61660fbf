"""Samples in, one sealed tar out: the same samples give the same bytes, anywhere, at any time.

Plain ustar with our own headers: no time, user or host. Whole pieces are hashed and written past
the page cache, which takes less processor time even where the shard is read at once. The file is
written aside; `publish_shard` gives it its name, and only the commit log makes it exist.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import mmap
import os
import struct
import zlib
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
_PIECE_BYTES = 1 << 20  # of one write; in whole pages, as writing past the cache demands
_O_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none
_MODE_TO_TIME = b"0000644\0" + 2 * b"0000000\0" + b"%011o\0" + b"00000000000\0"  # around the size
_KIND_AND_MAGIC = (b"0" + bytes(100) + b"ustar\x0000").ljust(_BLOCK - 156, b"\0")
_HEADER = struct.Struct(f"{_NAME_BYTES}s48s8s{_BLOCK - 156}s")
# The checksum counts its own eight bytes as blanks.
_FIXED_SUM = sum(_KIND_AND_MAGIC) + 8 * ord(" ")
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
        self._piece = mmap.mmap(-1, _PIECE_BYTES)  # begins at a page; full up to its position
        self._path = temporary_path(folder, "shard.tar")
        self._descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        with contextlib.suppress(OSError):  # some file systems know no other way
            _pass_cache(self._descriptor, True)
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
        try:
            os.close(self._descriptor)  # what a server refused late may come out here
        finally:
            self._path.unlink(missing_ok=True)

    @property
    def gids(self) -> list[str]:
        """Groups written so far, in order."""
        return list(self._spans)

    def add_group(self, gid: str, members: Sequence[Member]) -> None:
        """Append the members of a group, in order; raises OSError when the disk is full.

        The last groups may reach the disk, and find it full, as late as in `finish`.
        """
        self._add(gid, [part for member in members for part in tar_member(*member)])
        failpoint("group-written")

    def finish(self) -> WrittenShard:
        """End the tar and flush it to disk; nothing can be added afterwards."""
        self._write_piece()
        failpoint("shard-half-written")
        self._append([_END])
        self._write_piece()
        os.fsync(self._descriptor)
        failpoint("shard-written")
        return WrittenShard(self._path, self._digest.hexdigest(), self._num_bytes)

    def without(self, gids: Collection[str]) -> ShardWriter:
        """A new writer that holds the groups of this one except `gids`."""
        self._write_piece()
        with contextlib.ExitStack() as unless_full:
            other = unless_full.enter_context(ShardWriter(self._folder))
            for gid, (start, length) in self._spans.items():
                if gid not in gids:
                    other._add(gid, [os.pread(self._descriptor, length, start)])
            unless_full.pop_all()
        return other

    def _add(self, gid: str, parts: list[bytes]) -> None:
        start = self._num_bytes
        self._append(parts)
        self._spans[gid] = (start, self._num_bytes - start)

    def _append(self, parts: list[bytes]) -> None:
        piece, update = self._piece, self._digest.update
        for part in parts:
            update(part)
            left = part
            while len(left) >= (room := _PIECE_BYTES - piece.tell()):
                piece.write(left[:room])
                self._write_piece()
                left = left[room:]
            piece.write(left)
        self._num_bytes += sum(map(len, parts))

    def _write_piece(self) -> None:
        """Write what is collected; from the first piece that is not full on, through the cache."""
        left = memoryview(self._piece)[: self._piece.tell()]
        if len(left) < _PIECE_BYTES:
            _pass_cache(self._descriptor, False)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not _passes_cache(self._descriptor):
                    raise
                _pass_cache(self._descriptor, False)  # not from here, or not on this file system
        self._piece.seek(0)


def _passes_cache(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & _O_DIRECT)


def _pass_cache(descriptor: int, wanted: bool) -> None:
    """Have writes go past the page cache or not; OSError where the file system cannot."""
    others = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_O_DIRECT
    fcntl.fcntl(descriptor, fcntl.F_SETFL, others | (_O_DIRECT if wanted else 0))


def tar_member(name: str, content: bytes) -> tuple[bytes, bytes, bytes]:
    """Header, content and padding of one file in a ustar archive, with mode 0644 and time 0."""
    encoded = name.encode("ascii")
    if len(encoded) >= _NAME_BYTES or len(content) > _MAX_MEMBER_BYTES:
        raise ValueError(f"does not fit a ustar header: {name[:120]!r}, {len(content)} bytes")
    mode_to_time = _MODE_TO_TIME % len(content)
    # The low half of an Adler-32 is one more than the sum of so few bytes.
    varying_sum = (zlib.adler32(mode_to_time, zlib.adler32(encoded)) & 0xFFFF) - 1
    checksum = b"%06o\0 " % (_FIXED_SUM + varying_sum)
    header = _HEADER.pack(encoded, mode_to_time, checksum, _KIND_AND_MAGIC)
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
