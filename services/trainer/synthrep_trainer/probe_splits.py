"""One split of any labelled set as batches of images, whatever its layout."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from synthrep_trainer import probe_layouts
from synthrep_trainer.probe_archive import ImageBatch, read_batches, read_entries, read_records
from synthrep_trainer.probe_data import TAR, ProbeDataError, ProbeDataset, Split


@dataclass(frozen=True)
class _Binary:
    """CIFAR's binary version; its Python version is a pickle, which nothing here reads."""

    files: dict[Split, tuple[str, ...]]
    names: str
    label_bytes: int


_BINARIES = {
    "cifar10": _Binary(
        {
            "train": tuple(f"data_batch_{k}.bin" for k in range(1, 6)),
            "test": ("test_batch.bin",),
        },
        "batches.meta.txt",
        label_bytes=1,
    ),
    "cifar100": _Binary(
        {"train": ("train.bin",), "test": ("test.bin",)},
        "fine_label_names.txt",
        label_bytes=2,  # coarse, then fine
    ),
}


def open_split(dataset: ProbeDataset, split: Split, *, image_px: int) -> Iterator[ImageBatch]:
    """The images of a split at the requested size, in a fixed order.

    Raises ProbeDataError, now or while reading, where the set is at fault.
    """
    if dataset.layout == TAR:
        return read_batches(dataset.path(split), image_px=image_px)
    if dataset.layout in _BINARIES:
        binary = _BINARIES[dataset.layout]
        paths = [dataset.folder / name for name in binary.files[split]]
        return read_records(paths, label_bytes=binary.label_bytes, image_px=image_px)
    return read_entries(probe_layouts.entries(dataset, split), image_px=image_px)


def class_names(dataset: ProbeDataset) -> tuple[str, ...] | None:
    """Names by class index, None where the set does not tell them."""
    if dataset.layout == TAR:
        return dataset.class_names
    if dataset.layout in _BINARIES:
        path = dataset.folder / _BINARIES[dataset.layout].names
        try:
            return tuple(path.read_text(encoding="utf-8").split())
        except (OSError, UnicodeDecodeError) as error:
            raise ProbeDataError(f"{path}: {error}") from error
    return probe_layouts.class_names(dataset)


def fingerprint(dataset: ProbeDataset, split: Split) -> str:
    """Changes when a file of the split is replaced: a hash of their names, sizes and times.

    Among these is the time of the last change of the inode, which no copy sets back.
    """
    digest = hashlib.sha256(f"{dataset.name}/{dataset.layout}/{split}".encode())
    for path, label in _files(dataset, split):
        try:
            status = path.stat()
        except OSError as error:
            raise ProbeDataError(f"{path}: {error}") from error
        times = f"{status.st_mtime_ns}\0{status.st_ctime_ns}"
        digest.update(os.fsencode(f"{path}\0{label}\0{status.st_size}\0{times}\n"))
    return digest.hexdigest()


def _files(dataset: ProbeDataset, split: Split) -> Iterator[tuple[Path, object]]:
    if dataset.layout == TAR:
        yield dataset.path(split).resolve(), None
    elif dataset.layout in _BINARIES:
        for name in _BINARIES[dataset.layout].files[split]:
            yield (dataset.folder / name).resolve(), None
    else:
        for entry in probe_layouts.entries(dataset, split):
            yield entry.path, entry.label
