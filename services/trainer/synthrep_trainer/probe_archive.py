"""Read the images of a labelled set, from a tar or from files, trusting nothing in them.

`<key>.jpg|jpeg|png|webp` with `<key>.cls` (one integer as text) -> batches of (images, labels).
Nothing is unpacked to disk, only these members are decoded, and every size is checked before the
bytes behind it are read. Memory holds one batch and whatever still waits for its other half.
"""

from __future__ import annotations

import gzip
import io
import itertools
import lzma
import math
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from synthrep_trainer.probe_data import ProbeDataError
from synthrep_trainer.probe_layouts import Entry, Label

MAX_MEMBER_BYTES = 32 * 2**20
MAX_WAITING_BYTES = 2**30  # images whose label has not come yet
MAX_IMAGE_PIXELS = 50_000_000
MAX_IMAGES = 5_000_000
CIFAR_PX = 32
_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "cls"})
# By content, whatever the name: among the `.jpg` of Oxford-IIIT Pets and SUN397 are GIF and BMP.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+/ ()-]{0,254}")
_LABEL = re.compile(rb"\s*([0-9]{1,7})\s*")
_UNREADABLE = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError)
# What Pillow raises on a damaged or hostile image; SyntaxError is its word for a broken PNG chunk.
_UNDECODABLE = (
    OSError,
    ValueError,
    SyntaxError,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


@dataclass(frozen=True)
class ImageBatch:
    """A few images of one split, in the order of the set, with their class indices.

    Where an image has several labels, they are a row: 1, 0, or -1 for a class that does not count.
    """

    images: UInt8[np.ndarray, "batch px px 3"]
    labels: Int64[np.ndarray, "batch ..."]


def read_batches(path: Path, *, image_px: int, batch_size: int = 512) -> Iterator[ImageBatch]:
    """The images of a tar, short side resized to `image_px` (bicubic) and centre-cropped.

    Transparent images are laid on white. Raises ProbeDataError on a damaged or truncated archive,
    a member that is neither image nor label, an image without label or the reverse, a key that
    comes twice, an undecodable image, or a size beyond the limits of this module.
    """
    decoded = (
        (decode(data, image_px=image_px, where=f"{path}: {key}"), label)
        for key, data, label in _pairs(path)
    )
    return _batched(decoded, batch_size)


def read_entries(
    entries: Iterable[Entry], *, image_px: int, batch_size: int = 512
) -> Iterator[ImageBatch]:
    """As `read_batches`, from files; raises ProbeDataError for one that is too large or damaged."""
    decoded = (
        (decode(_file(entry.path), image_px=image_px, where=str(entry.path)), entry.label)
        for entry in entries
    )
    return _batched(decoded, batch_size)


def read_records(
    paths: Iterable[Path], *, label_bytes: int, image_px: int, batch_size: int = 512
) -> Iterator[ImageBatch]:
    """The images of CIFAR's binary files: label bytes, the last of which counts, then 32 x 32 RGB.

    Raises ProbeDataError for a file that does not hold a whole number of them.
    """
    decoded = (
        (_resized(Image.fromarray(pixels), image_px), label)
        for path in paths
        for pixels, label in _records(path, label_bytes)
    )
    return _batched(decoded, batch_size)


def _batched(samples: Iterable[tuple[np.ndarray, Label]], batch_size: int) -> Iterator[ImageBatch]:
    waiting = iter(samples)
    while batch := list(itertools.islice(waiting, batch_size)):
        images, labels = zip(*batch, strict=True)
        yield ImageBatch(np.stack(images), np.asarray(labels, np.int64))


def _file(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_MEMBER_BYTES + 1)
    except OSError as error:
        raise ProbeDataError(f"{path}: {error}") from error
    if len(data) > MAX_MEMBER_BYTES:
        raise ProbeDataError(f"{path}: more than {MAX_MEMBER_BYTES} bytes")
    return data


def _records(path: Path, label_bytes: int) -> Iterator[tuple[np.ndarray, int]]:
    shape = (3, CIFAR_PX, CIFAR_PX)
    size = label_bytes + math.prod(shape)
    try:
        rows = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise ProbeDataError(f"{path}: {error}") from error
    if len(rows) % size:
        raise ProbeDataError(f"{path}: {len(rows)} bytes are no multiple of {size}, it is cut")
    for row in rows.reshape(-1, size):
        pixels = np.ascontiguousarray(row[label_bytes:].reshape(shape).transpose(1, 2, 0))
        yield pixels, int(row[label_bytes - 1])


def decode(data: bytes, *, image_px: int, where: str) -> UInt8[np.ndarray, "px px 3"]:
    """RGB pixels of one image at the requested size, of a GIF its first; errors name `where`."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ProbeDataError(
                    f"{where}: {image.width} x {image.height} pixels, "
                    f"at most {MAX_IMAGE_PIXELS} are allowed"
                )
            return _resized(_on_white(image), image_px)
    except _UNDECODABLE as error:
        raise ProbeDataError(f"{where}: the image cannot be decoded: {error}") from error


def _on_white(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image.convert("RGBA"))
        image = ground
    return image.convert("RGB")


def _resized(image: Image.Image, image_px: int) -> UInt8[np.ndarray, "px px 3"]:
    """The centre square, resampled: the same pixels as resizing all and cropping, for less."""
    if image.size != (image_px, image_px):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((image_px, image_px), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image)


def _pairs(path: Path) -> Iterator[tuple[str, bytes, int]]:
    """(key, image bytes, label) as soon as both halves of a key have been read."""
    seen: set[str] = set()
    images: dict[str, bytes] = {}
    labels: dict[str, int] = {}
    waiting_bytes = 0
    for key, suffix, data in _members(path):
        half = "label" if suffix == "cls" else "image"
        if key in seen or key in (labels if suffix == "cls" else images):
            raise ProbeDataError(f"{path}: {key} has more than one {half}")
        if suffix == "cls":
            labels[key] = _label(data, where=f"{path}: {key}.cls")
        else:
            images[key] = data
            waiting_bytes += len(data)
        if key in images and key in labels:
            seen.add(key)
            waiting_bytes -= len(images[key])
            yield key, images.pop(key), labels.pop(key)
        if waiting_bytes > MAX_WAITING_BYTES or len(seen) + len(labels) > MAX_IMAGES:
            raise ProbeDataError(f"{path}: too many images, or images too far from their .cls")
    for waiting, lacking in ((images, "label (.cls)"), (labels, "image")):
        if waiting:
            raise ProbeDataError(f"{path}: {next(iter(waiting))} has no {lacking}")
    if not seen:
        raise ProbeDataError(f"{path}: holds no labelled image")


def _label(data: bytes, *, where: str) -> int:
    match = _LABEL.fullmatch(data)
    if match is None:
        raise ProbeDataError(f"{where}: expected one class index as text, found {data[:20]!r}")
    return int(match[1])


def _members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """(key, suffix, bytes) of each file of the archive; raises ProbeDataError for all else."""
    try:
        with _unpacked(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # or it grows with every member
                if member.isdir():
                    continue
                name = member.name.removeprefix("./")
                key, _, suffix = name.rpartition(".")
                suffix = suffix.lower()
                if not member.isreg() or not _is_sane(key):
                    raise ProbeDataError(f"{path}: unexpected member {name[:80]!r}")
                if suffix not in _SUFFIXES:
                    raise ProbeDataError(f"{path}: {name[:80]!r} is neither an image nor a .cls")
                if member.issparse():  # few bytes on the disk, and any number of zeros when read
                    raise ProbeDataError(f"{path}: {name[:80]!r} is stored as a sparse file")
                content = archive.extractfile(member)
                assert content is not None, "a regular member has a stream"
                yield key, suffix, content.read()
            _require_whole(stream, archive.offset, path)
    except _UNREADABLE as error:
        raise ProbeDataError(f"{path}: the archive cannot be read: {error}") from error


def _require_whole(stream: _BoundedStream, end: int, path: Path) -> None:
    """Raise ProbeDataError unless the archive's zero blocks are at `end`, and nothing else.

    An archive that was cut between two members reads to a clean end otherwise. Reading on also
    makes the decompressor compare its checksum.
    """
    stream.seek(end)
    rest = stream.read(MAX_MEMBER_BYTES)
    if len(rest) < tarfile.BLOCKSIZE:
        raise ProbeDataError(f"{path}: the archive is cut short")
    if rest.count(0) != len(rest) or stream.read(1):
        raise ProbeDataError(f"{path}: something follows the end of the archive")


def _is_sane(key: str) -> bool:
    return _KEY.fullmatch(key) is not None and ".." not in key.split("/")


def _unpacked(path: Path) -> _BoundedStream:
    if path.suffix == ".gz":
        return _BoundedStream(gzip.open(path))
    if path.suffix == ".xz":
        return _BoundedStream(lzma.open(path))
    return _BoundedStream(path.open("rb"))


class _BoundedStream(io.RawIOBase):
    """A stream that refuses to read more at once than a member may have, whatever a header says."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_MEMBER_BYTES:
            raise OSError(f"a member of {size} bytes, at most {MAX_MEMBER_BYTES} are allowed")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def close(self) -> None:
        self._stream.close()
        super().close()
