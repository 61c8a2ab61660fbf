"""Labelled photos from tars of `<class index>-<number>.jpg`, or `<key>.jpg` and `<key>.cls`."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

# Of CIFAR-10, by label.
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def load_photos(tar: Path, num_classes: int, size_px: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """All images (N, size, size, 3) uint8 and labels (N,) of a tar, sorted by member name.

    The label is the file name's `<class index>-` prefix, or the integer in the `.cls` member.
    Raises ValueError when an image has no class below `num_classes`.
    """
    images: dict[str, np.ndarray] = {}
    labels: dict[str, int] = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            key, _, suffix = Path(member.name).name.rpartition(".")
            stream = archive.extractfile(member)
            if stream is None:
                continue
            if suffix == "cls":
                labels[key] = int(stream.read())
            elif suffix in ("jpg", "png"):
                picture = Image.open(io.BytesIO(stream.read())).convert("RGB")
                if picture.size != (size_px, size_px):
                    picture = _centre_square(picture).resize(
                        (size_px, size_px), Image.Resampling.LANCZOS
                    )
                images[key] = np.asarray(picture)
                prefix = key.partition("-")[0]
                if prefix.isdigit():
                    labels[key] = int(prefix)
    unknown = sorted(k for k in images if not 0 <= labels.get(k, -1) < num_classes)
    if unknown:
        raise ValueError(
            f"{tar}: {len(unknown)} images have no class below {num_classes}, first {unknown[0]!r}"
        )
    keys = sorted(images)
    return np.stack([images[k] for k in keys]), np.array([labels[k] for k in keys])


def _centre_square(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))
