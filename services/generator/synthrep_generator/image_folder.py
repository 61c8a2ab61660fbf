"""Images that somebody has already, with their captions: WebDataset tars, or a tree of files.

A sample is an image and what shares its name: `.txt` or the field `caption` or `text` of `.json`
is its caption, a number in `.cls` its class (named by a line of `classes.txt`, where there is one).
Without any of these a file's caption is the name of its folder, as in an ImageFolder tree, and at
the top, as in a tar, its own name. Images are read one at a time, where they lie.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from synthrep_shared.errors import StorageError
from synthrep_shared.samples import normalise_caption

CaptionBy = Literal["text", "file"]
_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm")
_TEXTS = ("txt", "json", "cls")
_MAX_CAPTION = 1000  # characters, as for prompts
_MAX_TEXT_BYTES = 1 << 20


class Part(NamedTuple):
    """Some bytes of a file."""

    path: Path
    offset: int
    num_bytes: int

    def read(self) -> bytes:
        """Raises OSError."""
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.num_bytes)


class FoundImage(NamedTuple):
    """An image that is there: its name below the folder, where it lies, and its caption."""

    name: str
    part: Part
    caption: str


def find_images(folder: Path, *, caption_by: CaptionBy = "text") -> list[FoundImage]:
    """The images under a folder, in the order of their names; reads captions, and no image.

    With `caption_by="file"` every image is a caption of its own. Raises StorageError if there are
    none, or a tar is damaged.
    """
    if not folder.is_dir():
        raise StorageError(f"{folder} is no folder")
    tars = sorted(folder.rglob("*.tar"))
    samples = _tar_samples(folder, tars) if tars else _file_samples(folder)
    classes = _classes(folder)
    found = [
        FoundImage(name, parts[suffix], _caption(name, parts, classes, caption_by))
        for name, parts in samples
        for suffix in _IMAGES
        if suffix in parts
    ]
    if not found:
        raise StorageError(f"no images under {folder}; known: {', '.join(_IMAGES)}, or tars")
    return found


Sample = tuple[str, dict[str, Part]]  # name, parts by suffix


def _file_samples(folder: Path) -> Iterator[Sample]:
    for place, folders, files in os.walk(folder):
        folders.sort()
        samples: dict[str, dict[str, Part]] = {}
        for file in sorted(files):
            stem, _, suffix = file.rpartition(".")
            if suffix.lower() in (*_IMAGES, *_TEXTS) and not file.startswith("."):
                path = Path(place, file)
                part = Part(path, 0, path.stat().st_size)
                samples.setdefault(stem, {})[suffix.lower()] = part
        for stem, parts in samples.items():
            yield Path(place, stem).relative_to(folder).as_posix(), parts


def _tar_samples(folder: Path, tars: list[Path]) -> Iterator[Sample]:
    for path in tars:
        samples: dict[str, dict[str, Part]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    # WebDataset's rule: what follows the first dot of the last part is the suffix.
                    stem, _, suffix = PurePosixPath(member.name).name.partition(".")
                    if member.isreg() and suffix.lower() in (*_IMAGES, *_TEXTS):
                        name = str(PurePosixPath(member.name).with_name(stem))
                        part = Part(path, member.offset_data, member.size)
                        samples.setdefault(name, {})[suffix.lower()] = part
        except tarfile.TarError as error:
            raise StorageError(f"{path} is damaged: {error}") from error
        within = path.relative_to(folder).as_posix()
        yield from ((f"{within}/{name}", parts) for name, parts in samples.items())


def _classes(folder: Path) -> list[str]:
    file = folder / "classes.txt"
    return file.read_text("utf-8").splitlines() if file.is_file() else []


def _caption(name: str, parts: dict[str, Part], classes: list[str], by: CaptionBy) -> str:
    text = "" if by == "file" else _given_caption(parts, classes)
    if not text and by == "text" and not _is_in_tar(parts):
        text = PurePosixPath(name).parent.name
    return normalise_caption(text or name)[:_MAX_CAPTION].strip()


def _is_in_tar(parts: dict[str, Part]) -> bool:
    return any(part.path.suffix == ".tar" for part in parts.values())


def _given_caption(parts: dict[str, Part], classes: list[str]) -> str:
    texts = {s: _text(parts[s]) for s in _TEXTS if s in parts}
    if texts.get("txt", "").strip():
        return texts["txt"]
    if "json" in texts:
        try:
            fields = json.loads(texts["json"])
        except ValueError:
            fields = None
        for field in ("caption", "text") if isinstance(fields, dict) else ():
            if isinstance(fields.get(field), str) and fields[field].strip():
                return str(fields[field])
    label = texts.get("cls", "").strip()
    if label.isdecimal() and int(label) < len(classes):
        return classes[int(label)]
    return f"class {label}" if label else ""


def _text(part: Part) -> str:
    return (
        part._replace(num_bytes=min(part.num_bytes, _MAX_TEXT_BYTES))
        .read()
        .decode("utf-8", "replace")
    )
