"""A bounded folder of features and baseline scores that probes need again and again.

`<key>.safetensors` holds `features` (n, dim) float32 and `labels` int32 of one split; `<key>.json`
whatever a caller wants kept. Features are written row by row as they come and mapped, not read, so
a set larger than memory passes through. Keys are hashes of all that the content depends on. What
was used longest ago leaves first; a file that is mapped stays readable until it is let go. Any
number of processes may share the folder: files appear whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float32, Int64
from safetensors import SafetensorError, safe_open

from synthrep_shared.storage import publish_bytes, temporary_path

_log = logging.getLogger(__name__)
_SUFFIX = ".safetensors"
_HEADER_BYTES = 512  # reserved for the sizes, which are known at the end; JSON may end in blanks
_STALE_S = 86_400.0  # a file written aside for longer belongs to a process that died

Rows = Float32[np.ndarray, "n dim"]
AnyLabels = Int64[np.ndarray, "n ..."]


def cache_key(*parts: object) -> str:
    """A name for what depends on exactly these JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class FeatureCache:
    """The folder; it is made when something is first written."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    def features(self, key: str) -> tuple[Rows, AnyLabels] | None:
        """Features, mapped from the file, and labels; None if they are not there."""
        path = self._folder / f"{key}{_SUFFIX}"
        try:
            found = _mapped(path)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            _log.warning("cached_features_dropped", extra={"path": str(path), "error": str(error)})
            path.unlink(missing_ok=True)
            return None
        _touch(path)
        return found

    @contextmanager
    def writer(self, key: str) -> Iterator[FeatureWriter]:
        """Something to add rows to; after the block, without an exception, they are kept."""
        self._folder.mkdir(parents=True, exist_ok=True)
        aside = temporary_path(self._folder, key[:16])
        try:
            with aside.open("xb") as stream:
                writer = FeatureWriter(stream)
                yield writer
                writer.finish()
            final = self._folder / f"{key}{_SUFFIX}"
            aside.replace(final)
            writer.result = _mapped(final)
        finally:
            aside.unlink(missing_ok=True)
        self._shrink()

    def note(self, key: str) -> Any:
        """What `keep_note` kept, None if it is not there."""
        path = self._folder / f"{key}.json"
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            path.unlink(missing_ok=True)
            return None
        _touch(path)
        return found

    def keep_note(self, key: str, value: Any) -> None:
        """Keep a JSON value."""
        self._folder.mkdir(parents=True, exist_ok=True)
        publish_bytes(json.dumps(value).encode(), self._folder / f"{key}.json", replace=True)
        self._shrink()

    def _shrink(self) -> None:
        """Delete what was used longest ago until the folder is within its bound."""
        files, now = [], time.time()
        for entry in os.scandir(self._folder):
            with suppress(FileNotFoundError):
                status = entry.stat()
                is_aside = entry.name.startswith(".")
                if is_aside and now - status.st_mtime > _STALE_S:
                    os.unlink(entry.path)
                elif not is_aside:
                    files.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._max_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total -= size


class FeatureWriter:
    """Rows of one file, as they come; only their labels are held in memory."""

    result: tuple[Rows, AnyLabels]

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._labels = stream, list[AnyLabels]()
        self._shape: tuple[int, int] | None = None
        stream.write(b" " * _HEADER_BYTES)

    def add(self, rows: Rows, labels: AnyLabels) -> None:
        """Append; raises ValueError where the width changes."""
        count, dim = self._shape or (0, rows.shape[1])
        if rows.shape != (len(labels), dim):
            raise ValueError(f"expected features {(len(labels), dim)}, got {rows.shape}")
        self._shape = (count + len(rows), dim)
        self._stream.write(np.ascontiguousarray(rows, "<f4").data)
        self._labels.append(labels)

    def finish(self) -> None:
        """Write labels and header, and flush to disk; raises ValueError without rows."""
        if self._shape is None:
            raise ValueError("there are no features to keep")
        labels = np.concatenate(self._labels).astype("<i4")
        self._stream.write(labels.tobytes())
        end = 4 * self._shape[0] * self._shape[1]
        tensors = {
            "features": ("F32", self._shape, (0, end)),
            "labels": ("I32", labels.shape, (end, end + labels.nbytes)),
        }
        header = json.dumps(
            {
                name: {"dtype": dtype, "shape": shape, "data_offsets": span}
                for name, (dtype, shape, span) in tensors.items()
            }
        ).encode()
        length = _HEADER_BYTES - 8
        self._stream.seek(0)
        self._stream.write(length.to_bytes(8, "little") + header.ljust(length))
        self._stream.flush()
        os.fsync(self._stream.fileno())


def _mapped(path: Path) -> tuple[Rows, AnyLabels]:
    # Through torch, whose tensors are views of the mapped file; numpy's would be copies.
    with safe_open(path, framework="pt") as file:
        features, labels = file.get_tensor("features"), file.get_tensor("labels")
    return features.numpy(), labels.numpy().astype(np.int64)


def _touch(path: Path) -> None:
    with suppress(FileNotFoundError):
        os.utime(path)
