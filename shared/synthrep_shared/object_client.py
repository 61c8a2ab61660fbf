"""The connection to an S3-compatible store, and its errors as a file system would put them.

The sole importer of botocore, which only a root on S3 needs. Endpoint, region and credentials come
from the usual `AWS_…` environment variables.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import IO, Any

from synthrep_shared.errors import StorageError

ATTEMPTS = 6
READ_TIMEOUT_S = 30.0
PART_BYTES = 16 << 20
_CONNECT_TIMEOUT_S = 5.0
_CONNECTIONS = 64
_ABSENT = ("404", "NoSuchKey")
_PRECONDITION_FAILED, _CONFLICT, _BAD_RANGE, _FORBIDDEN = 412, 409, 416, 403


class TakenError(FileExistsError):
    """The name is taken; `is_retried` if this very request may have taken it."""

    is_retried = False


class ConflictError(OSError):
    """Another write of the same name is going on."""


class BadRangeError(OSError):
    """The range begins behind the object's end."""


class BrokenStreamError(OSError):
    """The answer began and broke off."""


@cache
def s3_client() -> Any:
    """One client a process; it is safe for several threads. StorageError without botocore."""
    try:
        from botocore.config import Config
        from botocore.session import get_session
    except ImportError as error:
        advice = "pip install 'synthrep-shared[s3]'"
        raise StorageError(f"a root on S3 needs botocore: {advice}") from error
    config = Config(
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=_CONNECTIONS,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
    )
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it tells where it found credentials
    region = os.environ.get("AWS_REGION")  # botocore itself knows AWS_DEFAULT_REGION only
    return get_session().create_client("s3", region_name=region, config=config)


@contextmanager
def os_errors(path: object) -> Iterator[None]:
    """Turn botocore's exceptions into OSErrors about `path`."""
    s3_client()
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        raise _as_os_error(error, str(path)) from error
    except (
        exceptions.IncompleteReadError,
        exceptions.ReadTimeoutError,
        exceptions.ResponseStreamingError,
    ) as error:
        raise BrokenStreamError(errno.EIO, str(error), str(path)) from error
    except exceptions.BotoCoreError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error


def upload_parts(place: dict[str, str], stream: IO[bytes], options: dict[str, str]) -> None:
    """Write a large object; until the last request there is nothing under its name."""
    client = s3_client()
    upload = {**place, "UploadId": client.create_multipart_upload(**place)["UploadId"]}
    try:
        parts: list[dict[str, Any]] = []
        while piece := stream.read(PART_BYTES):
            number = len(parts) + 1
            answer = client.upload_part(**upload, PartNumber=number, Body=piece)
            parts.append({"PartNumber": number, "ETag": answer["ETag"]})
        client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}, **options)
    except BaseException:
        with suppress(OSError), os_errors(place["Key"]):
            client.abort_multipart_upload(**upload)
        raise


def _as_os_error(error: Any, path: str) -> OSError:
    code, message = (error.response["Error"].get(field, "") for field in ("Code", "Message"))
    facts = error.response.get("ResponseMetadata", {})
    status, text = facts.get("HTTPStatusCode"), f"{code}: {message}"
    if code in _ABSENT:
        return FileNotFoundError(errno.ENOENT, text, path)
    if status == _PRECONDITION_FAILED or code == "NoSuchUpload":
        taken = TakenError(errno.EEXIST, text, path)
        # An upload is unknown after it was completed, by an attempt whose answer was lost.
        taken.is_retried = facts.get("RetryAttempts", 0) > 0 or code == "NoSuchUpload"
        return taken
    if status == _CONFLICT:
        return ConflictError(errno.EBUSY, text, path)
    if status == _BAD_RANGE:
        return BadRangeError(errno.EINVAL, text, path)
    if status == _FORBIDDEN:
        return PermissionError(errno.EACCES, text, path)
    return OSError(errno.EIO, text, path)
