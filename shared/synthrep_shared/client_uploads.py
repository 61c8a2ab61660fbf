"""A labelled set on its way to the trainer: a zip, made of a folder where one is given."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from synthrep_shared.errors import SynthRepError

_IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp"})


@contextmanager
def zipped(source: Path) -> Iterator[Path]:
    """The zip itself, or a temporary one of the images in a folder, `class/image` or with splits.

    Whether they make a set is the trainer's to judge. Raises OSError if the source cannot be read,
    SynthRepError for a folder without images.
    """
    if not source.is_dir():
        with source.open("rb"):
            yield source
        return
    images = sorted(path for path in source.rglob("*") if _is_image(path, source))
    if not images:
        raise SynthRepError(f"{source} holds no images; expected class/image.jpg")
    descriptor, name = tempfile.mkstemp(suffix=".zip")
    try:
        with (
            os.fdopen(descriptor, "wb") as stream,
            zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive,
        ):
            for image in images:
                archive.write(image, image.relative_to(source))
        yield Path(name)
    finally:
        os.unlink(name)


def _is_image(path: Path, source: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
    return path.suffix.lower() in _IMAGES and not is_hidden and path.is_file()
