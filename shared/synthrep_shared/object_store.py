"""Objects of an S3-compatible store, named like paths.

An `ObjectPath` has the methods of `pathlib.Path` that make sense here, and they fail as a file's
do: FileNotFoundError for what is absent, OSError for a store that does not answer. The store has
to create an object only if its name is free (`If-None-Match: *`); `probe_store` finds out.
"""

from __future__ import annotations

import errno
import io
import random
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from synthrep_shared.errors import StorageError
from synthrep_shared.object_client import (
    ATTEMPTS,
    PART_BYTES,
    BadRangeError,
    BrokenStreamError,
    ConflictError,
    TakenError,
    os_errors,
    s3_client,
    upload_parts,
)
from synthrep_shared.object_stream import ObjectStream

MAX_PAGE = 1000
_SINGLE_PUT_BYTES = 2 * PART_BYTES
_READ_BYTES = 1 << 20
_BACKOFF_S = 0.05


class ObjectStat(NamedTuple):
    """Size in bytes and time of writing, seconds since the epoch."""

    st_size: int
    st_mtime: float


@dataclass(frozen=True, slots=True)
class ObjectPath:
    """`s3://bucket/key`: an object, or the common start of the names of several."""

    bucket: str
    key: str = ""

    @classmethod
    def from_url(cls, url: str) -> ObjectPath:
        """Raises StorageError unless it is `s3://bucket` with or without `/prefix`."""
        scheme, _, rest = url.partition("://")
        bucket, _, key = rest.partition("/")
        parts = key.strip("/").split("/")
        if scheme != "s3" or not bucket or (key.strip("/") and not all(parts)) or ".." in parts:
            raise StorageError(f"expected s3://bucket/prefix, got {url!r}")
        return cls(bucket, "/".join(parts))

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.bucket, f"{self.key}/{name}" if self.key else name)

    def __lt__(self, other: ObjectPath) -> bool:
        return (self.bucket, self.key) < (other.bucket, other.key)

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.bucket, self.key.rpartition("/")[0])

    @property
    def prefix(self) -> str:
        """What the keys of the objects under this one begin with."""
        return f"{self.key}/" if self.key else ""

    def stat(self) -> ObjectStat:
        """Raises FileNotFoundError if there is no such object."""
        with os_errors(self):
            head = s3_client().head_object(Bucket=self.bucket, Key=self.key)
            return ObjectStat(head["ContentLength"], head["LastModified"].timestamp())

    def exists(self) -> bool:
        """Whether there is an object of this very name."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_file(self) -> bool:
        """See `exists`."""
        return self.exists()

    def is_dir(self) -> bool:
        """Whether there are objects under this one."""
        with os_errors(self):
            found = s3_client().list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)
            return bool(found.get("KeyCount"))

    def read_bytes(self) -> bytes:
        """The whole object, in memory."""
        return self._read()

    def read_range(self, start: int, num_bytes: int) -> bytes:
        """Bytes from `start` on, fewer at the object's end."""
        return self._read(Range=f"bytes={start}-{start + num_bytes - 1}") if num_bytes else b""

    def open(self, mode: str = "rb", buffering: int = 0) -> io.BufferedReader:
        """The object as a seekable stream that reads ahead; only `rb`, buffered as it likes."""
        if mode != "rb":
            raise ValueError("objects are written whole; see create() and replace()")
        return io.BufferedReader(ObjectStream(self.read_range))

    def create(self, content: bytes | Path) -> bool:
        """Write bytes or a local file under this name if it is free; False if it is not."""
        is_retried = False
        for attempt in range(ATTEMPTS):
            try:
                with os_errors(self):
                    self._put(content, IfNoneMatch="*")
                return True
            except ConflictError:  # another writer is at it: whether it succeeds is open
                time.sleep(random.uniform(0, _BACKOFF_S * 2**attempt))
            except TakenError as error:
                # An attempt whose answer was lost may have succeeded.
                if error.is_retried or is_retried:
                    return self._holds(content)
                return False
            is_retried = True
        raise OSError(errno.EBUSY, "the store reports conflicts only", str(self))

    def replace_with(self, content: bytes) -> None:
        """Write bytes under this name, whatever it held."""
        with os_errors(self):
            self._put(content)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object; as stores are, without an error if it is absent."""
        with os_errors(self):
            s3_client().delete_object(Bucket=self.bucket, Key=self.key)

    def _read(self, **options: str) -> bytes:
        for attempt in range(ATTEMPTS):
            try:
                with os_errors(self):
                    answer = s3_client().get_object(Bucket=self.bucket, Key=self.key, **options)
                    data: bytes = answer["Body"].read()
                    return data
            except BrokenStreamError:  # the answer began, which ends botocore's own attempts
                if attempt + 1 == ATTEMPTS:
                    raise
                time.sleep(random.uniform(0, _BACKOFF_S * 2**attempt))
            except BadRangeError:
                return b""
        raise AssertionError("unreachable")

    def _put(self, content: bytes | Path, **options: str) -> None:
        place = {"Bucket": self.bucket, "Key": self.key}
        if isinstance(content, bytes):
            s3_client().put_object(**place, Body=content, **options)
            return
        with content.open("rb") as stream:
            if content.stat().st_size <= _SINGLE_PUT_BYTES:
                s3_client().put_object(**place, Body=stream, **options)
            else:
                upload_parts(place, stream, options)

    def _holds(self, content: bytes | Path) -> bool:
        """Whether the object is what this process meant to write."""
        if isinstance(content, bytes):
            return self.read_bytes() == content
        with content.open("rb") as wanted, self.open() as found:
            while piece := wanted.read(_READ_BYTES):
                if found.read(len(piece)) != piece:
                    return False
            return not found.read(1)


class FoundObject(NamedTuple):
    """An object of a listing."""

    path: ObjectPath
    num_bytes: int
    modified_s: float


def list_objects(
    folder: ObjectPath, *, after: str = "", page_size: int = MAX_PAGE
) -> Iterator[FoundObject]:
    """The objects under a folder with a name above `after`, in the order of their names.

    Each `page_size` of them cost a request.
    """
    options: dict[str, Any] = {"PaginationConfig": {"PageSize": page_size}}
    if after:
        options["StartAfter"] = folder.prefix + after
    for page in _pages(folder, "list_objects_v2", **options):
        for entry in page.get("Contents", ()):
            path = ObjectPath(folder.bucket, entry["Key"])
            yield FoundObject(path, entry["Size"], entry["LastModified"].timestamp())


def list_folders(folder: ObjectPath) -> list[str]:
    """Names that folders right under this one have."""
    pages = _pages(folder, "list_objects_v2", Delimiter="/")
    prefixes = (entry["Prefix"] for page in pages for entry in page.get("CommonPrefixes", ()))
    return [prefix[len(folder.prefix) :].rstrip("/") for prefix in prefixes]


def abort_uploads(folder: ObjectPath, *, started_before_s: float) -> int:
    """Drop uploads in parts that dead writers began before a moment; returns how many."""
    aborted = 0
    for page in _pages(folder, "list_multipart_uploads"):
        for upload in page.get("Uploads", ()):
            if upload["Initiated"].timestamp() < started_before_s:
                with os_errors(folder):
                    s3_client().abort_multipart_upload(
                        Bucket=folder.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )
                aborted += 1
    return aborted


def probe_store(root: ObjectPath) -> None:
    """Raises StorageError unless objects can be written under `root`, and never over others."""
    advice = "check the bucket, AWS_ENDPOINT_URL, AWS_REGION and the AWS_… credentials"
    probe = root / ".probe" / secrets.token_hex(8)
    place = {"Bucket": probe.bucket, "Key": probe.key}
    try:
        if not probe.create(b"1"):
            raise OSError(errno.EIO, "a fresh name is taken")
        overwrites = probe.create(b"2")
        try:
            with os_errors(probe):
                upload_parts(place, io.BytesIO(b"3"), {"IfNoneMatch": "*"})
            overwrites = True
        except TakenError:
            pass
        probe.unlink()
    except OSError as error:
        raise StorageError(f"{root} cannot be used: {error}; {advice}") from error
    if overwrites:
        raise StorageError(
            f"the store of {root} ignores If-None-Match, so that two writers could decide the same "
            "prompt; use a store with conditional writes (AWS S3, MinIO, Cloudflare R2, recent "
            "Ceph), or a local folder"
        )


def _pages(folder: ObjectPath, operation: str, **options: Any) -> Iterator[dict[str, Any]]:
    with os_errors(folder):
        paginator = s3_client().get_paginator(operation)
        yield from paginator.paginate(Bucket=folder.bucket, Prefix=folder.prefix, **options)
