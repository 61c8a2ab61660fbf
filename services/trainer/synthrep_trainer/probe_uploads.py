"""Labelled sets that users bring: a zip of class/image files, or a folder under an allowed root.

A zip becomes the tars that `probe_archive` reads; nothing of it is unpacked under a name that the
zip chose, and every size is checked before the bytes behind it are read. A folder is only named in
`link.json` and read where it lies. A set appears whole, under a name that is not taken.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import random
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from synthrep_shared.storage import publish_bytes, sync_folder, temporary_path
from synthrep_trainer.probe_data import IMAGE_FOLDER, LINK, TAR, ProbeDataError, ProbeDataset, Split

MAX_MEMBER_BYTES = 32 * 2**20
MAX_DIRECTORY_BYTES = 32 * 2**20  # of the list of members, which is held in memory
TEST_SHARE = 0.2
_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_CLASS = re.compile(r"[^\x00-\x1f\x7f/\\]{1,200}")
_SUFFIXES = {"jpg": b"\xff\xd8\xff", "jpeg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n"}
_LEFT_OUT = re.compile(r"(__MACOSX/.*|(.*/)?(\.DS_Store|Thumbs\.db|desktop\.ini))")
_SYMLINK, _KIND = 0o120000, 0o170000
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    OSError,
    ValueError,  # a name that is not the UTF-8 it claims to be
    IndexError,  # a name that is empty
)


class NameTakenError(ProbeDataError):
    """There is an uploaded set of this name."""


@dataclass(frozen=True)
class _Member:
    info: zipfile.ZipInfo
    class_name: str
    suffix: str


def accept_zip(stream: IO[bytes], name: str, *, sets: Path, max_bytes: int) -> ProbeDataset:
    """Make a set of a zip of `class/image`, or of `train|val|test/class/image`.

    Without such splits a fifth of each class, drawn with a fixed seed, is for test. `sets` is the
    folder of uploaded sets; at most `max_bytes` are unpacked. Raises ProbeDataError for a zip that
    is damaged, too large or holds anything else, NameTakenError.
    """
    _require_free(name, sets)
    try:
        with zipfile.ZipFile(_Bounded(stream)) as archive:
            parts = _parts(archive, max_bytes)
            classes = sorted({member.class_name for member in parts["train"]})
            if len(classes) < 2:
                raise ProbeDataError("train has one class only, at least two are needed")
            indices = {class_name: index for index, class_name in enumerate(classes)}
            with _set_aside(name, sets) as folder:
                for split, members in parts.items():
                    _write_tar(folder / f"{split}.tar", archive, members, indices)
                publish_bytes("".join(f"{c}\n" for c in classes).encode(), folder / "classes.txt")
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the zip
        raise ProbeDataError(f"the zip cannot be read: {error}") from error
    return ProbeDataset(name, sets / name)


def accept_folder(
    folder: Path, name: str, *, sets: Path, allowed_roots: Sequence[Path]
) -> ProbeDataset:
    """Name a folder with `{train,test}/<class>/…` or `{train,test}.tar` as a set.

    Raises ProbeDataError unless it lies under an allowed root and has both parts, NameTakenError.
    """
    try:
        resolved = folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop, a NUL
        raise ProbeDataError("the folder is no path of this machine") from error
    if not any(resolved.is_relative_to(root.resolve()) for root in allowed_roots):
        raise ProbeDataError("the folder lies under no allowed root, see PROBE_FOLDER_ROOTS")
    _require_free(name, sets)
    is_tar = any(resolved.glob("train.tar*"))
    dataset = ProbeDataset(name, resolved, TAR if is_tar else IMAGE_FOLDER)
    if not {"train", "test"} <= set(dataset.splits):
        raise ProbeDataError("the folder must hold train and test, as folders of classes or tars")
    link = {"folder": str(resolved), "layout": dataset.layout}
    with _set_aside(name, sets) as aside:
        publish_bytes(json.dumps(link).encode(), aside / LINK)
    return dataset


def _require_free(name: str, sets: Path) -> None:
    if (sets / name).exists():
        raise NameTakenError("there is an uploaded set of this name; choose another")


@contextmanager
def _set_aside(name: str, sets: Path) -> Iterator[Path]:
    """A folder that becomes the set when the block ends well, and vanishes when it does not."""
    sets.mkdir(parents=True, exist_ok=True)
    aside = temporary_path(sets, name)
    aside.mkdir()
    try:
        yield aside
        sync_folder(aside)
        try:
            aside.rename(sets / name)
        except OSError:
            _require_free(name, sets)
            raise
        sync_folder(sets)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _parts(archive: zipfile.ZipFile, max_bytes: int) -> Mapping[Split, list[_Member]]:
    """The members of each split; raises ProbeDataError for what does not belong in a set."""
    found: dict[str, list[_Member]] = {}
    total, seen = 0, set[str]()
    for info in archive.infolist():
        if info.is_dir() or _LEFT_OUT.fullmatch(info.filename):
            continue
        total += info.file_size
        if info.file_size > MAX_MEMBER_BYTES or total > max_bytes:
            raise ProbeDataError(
                f"the zip unpacks to more than {max_bytes} bytes, or a member of it to more than "
                f"{MAX_MEMBER_BYTES}"
            )
        if info.filename in seen:
            raise ProbeDataError(f"{info.filename[:80]!r} comes twice")
        seen.add(info.filename)
        part, member = _member(info)
        found.setdefault(part, []).append(member)
    if not found:
        raise ProbeDataError("the zip holds no image")
    if "" in found and len(found) > 1:
        raise ProbeDataError("some images lie in train, val or test, and some do not")
    if "" in found:
        return _drawn(found[""])
    if not {"train", "test"} <= found.keys():
        raise ProbeDataError("the zip must hold both train and test, or neither")
    known = {member.class_name for member in found["train"]}
    for split in ("val", "test"):
        for member in found.get(split, ()):
            if member.class_name not in known:
                raise ProbeDataError(f"{split} has a class {member.class_name!r}, train has not")
    return {split: found[split] for split in _SPLITS if split in found}


def _member(info: zipfile.ZipInfo) -> tuple[str, _Member]:
    """Split, or '', and what else a name tells."""
    shown = repr(info.filename[:80])
    *folders, image = info.filename.split("/")
    part = folders.pop(0) if len(folders) == 2 and folders[0] in _SPLITS else ""
    if len(folders) != 1 or folders[0] in (".", "..") or not _is_class(folders[0]):
        raise ProbeDataError(f"{shown} is neither class/image nor train|val|test/class/image")
    suffix = image.rpartition(".")[2].lower()
    if suffix not in (*_SUFFIXES, "webp"):
        raise ProbeDataError(f"{shown} is no JPEG, PNG or WebP")
    if (info.external_attr >> 16) & _KIND == _SYMLINK or info.flag_bits & 1:
        raise ProbeDataError(f"{shown} is a link, or encrypted")
    return part, _Member(info, folders[0], suffix)


def _is_class(name: str) -> bool:
    """Whether it is a name that a line of classes.txt can hold."""
    is_line = name.splitlines() == [name] and not name.isspace()
    return is_line and _CLASS.fullmatch(name) is not None


def _drawn(members: Sequence[_Member]) -> Mapping[Split, list[_Member]]:
    """Train, and for test a fifth of each class but at least one image."""
    by_class: dict[str, list[_Member]] = {}
    for member in sorted(members, key=lambda member: member.info.filename):
        by_class.setdefault(member.class_name, []).append(member)
    train: list[_Member] = []
    test: list[_Member] = []
    for name, images in by_class.items():
        if len(images) < 2:
            raise ProbeDataError(f"class {name!r} has one image only, none is left for test")
        random.Random(f"upload/{name}").shuffle(images)
        count = max(1, round(TEST_SHARE * len(images)))
        test += images[:count]
        train += images[count:]
    return {"train": train, "test": test}


def _write_tar(
    path: Path, archive: zipfile.ZipFile, members: Sequence[_Member], indices: Mapping[str, int]
) -> None:
    with path.open("xb") as stream:
        with tarfile.open(fileobj=stream, mode="w") as tar:
            for number, member in enumerate(members):
                label = str(indices[member.class_name]).encode()
                for suffix, content in ((member.suffix, _image(archive, member)), ("cls", label)):
                    entry = tarfile.TarInfo(f"{number:07d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        stream.flush()
        os.fsync(stream.fileno())


def _image(archive: zipfile.ZipFile, member: _Member) -> bytes:
    with archive.open(member.info) as source:
        data = source.read(MAX_MEMBER_BYTES + 1)
    if len(data) != member.info.file_size or not _looks_right(data):
        shown = repr(member.info.filename[:80])
        raise ProbeDataError(f"{shown} is not the image that its name and size tell")
    return data


def _looks_right(data: bytes) -> bool:
    """Whether a file starts as one of any of the formats does; it is decoded when it is used."""
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return is_webp or any(data.startswith(magic) for magic in _SUFFIXES.values())


class _Bounded(io.RawIOBase):
    """A stream that refuses to read more at once than a list of members may have."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > MAX_DIRECTORY_BYTES:
            here = self._stream.tell()
            rest = self._stream.seek(0, io.SEEK_END) - here
            self._stream.seek(here)
            if rest > MAX_DIRECTORY_BYTES:
                raise ProbeDataError("the zip lists too many members")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True
