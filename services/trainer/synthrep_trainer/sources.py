"""Where a run's data set is: under the root, or behind the API of a generator.

A generator is asked only at addresses that the settings allow, whatever a request names, and gets
only the key that is meant for it. Redirects are not followed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx

from synthrep_shared.client import SynthRep
from synthrep_shared.commit_log import LogReader
from synthrep_shared.errors import ServiceError, ServiceUnavailableError
from synthrep_shared.messages import RunRequest
from synthrep_shared.storage import DatasetPaths
from synthrep_trainer.errors import RunError
from synthrep_trainer.log_mirror import LogMirror
from synthrep_trainer.settings import TrainerSettings

_RETRIES = 20  # about seven minutes
_TIMEOUT_S = 10.0
_SILENCE_S = 60.0  # the generator says something every 15
_SLICE_S = 0.2  # between two looks at the stop flag
_NOT_FOUND = 404


def origin_of(source_url: str) -> str:
    """Scheme, host and port of a data set's address."""
    return source_url.rpartition("/v1/datasets/")[0]


def generator_of(request: RunRequest, settings: TrainerSettings) -> str:
    """Where the generator of a run's data set is; RunError if nothing says so."""
    url = origin_of(request.source_url) if request.source_url else settings.generator_url
    if url is None:
        raise RunError("pause_generation_above needs the setting generator_url, or a source_url")
    return url


def check_source(url: str, settings: TrainerSettings) -> None:
    """Raise RunError unless the settings allow the generator at `url`, `scheme://host:port`."""
    if url != settings.generator_url and url not in settings.allowed_sources:
        raise RunError(f"{url} is not among the allowed sources of this trainer")


def open_generator(
    url: str,
    settings: TrainerSettings,
    should_stop: Callable[[], bool],
    *,
    retries: int = _RETRIES,
) -> SynthRep:
    """A patient client, which gives up with OSError when it is to stop; RunError as above."""
    check_source(url, settings)
    key = settings.source_keys.get(url)

    def sleep(pause_s: float) -> None:
        deadline = time.monotonic() + pause_s
        while (left_s := deadline - time.monotonic()) > 0:
            if should_stop():
                raise OSError("stopped while waiting for the generator")
            time.sleep(min(left_s, _SLICE_S))

    return SynthRep(
        url, api_key=key.get_secret_value() if key else "", retries=retries,
        timeout_s=_TIMEOUT_S, sleep=sleep,
    )  # fmt: skip


def event_names(url: str, settings: TrainerSettings) -> Iterator[str]:
    """What the generator tells as it happens, `shard` among it; raises httpx.HTTPError."""
    key = settings.source_keys.get(url)
    headers = {"authorization": f"Bearer {key.get_secret_value()}"} if key else {}
    timeout = httpx.Timeout(_TIMEOUT_S, read=_SILENCE_S)
    with httpx.stream("GET", f"{url}/v1/events", headers=headers, timeout=timeout) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            field, _, value = line.partition(":")
            if field == "event":
                yield value.strip()


class RemoteShard(NamedTuple):
    """A shard behind a generator's API."""

    client: SynthRep
    dataset: str
    name: str

    def read_range(self, start: int, num_bytes: int) -> bytes:
        """Bytes from `start` on; FileNotFoundError if there is none, OSError without an answer."""
        try:
            return self.client.shard_bytes(
                self.dataset, self.name, start=start, num_bytes=num_bytes
            )
        except ServiceUnavailableError as error:
            raise OSError(str(error)) from error
        except ServiceError as error:
            kind = FileNotFoundError if error.status == _NOT_FOUND else OSError
            raise kind(f"{self.name}: {error}") from error


class RemoteShards(NamedTuple):
    """The shards of a data set behind a generator's API, by name."""

    client: SynthRep
    dataset: str

    def __truediv__(self, name: str) -> RemoteShard:
        return RemoteShard(self.client, self.dataset, name)


@dataclass(frozen=True)
class RemoteDataset:
    """A data set behind a generator's API, for those who read: as `DatasetPaths`."""

    client: SynthRep
    dataset: str
    run_folder: Path

    @property
    def root(self) -> str:
        """What keeps its local copies apart from those of other generators."""
        return self.client.generator_url

    @property
    def log(self) -> Path:
        """The mirror of its commit log."""
        return self.run_folder / "source.jsonl"

    @property
    def shards(self) -> RemoteShards:
        return RemoteShards(self.client, self.dataset)


@contextmanager
def open_dataset(
    request: RunRequest,
    run_folder: Path,
    settings: TrainerSettings,
    *,
    is_writer: bool,
    should_stop: Callable[[], bool],
) -> Iterator[tuple[DatasetPaths | RemoteDataset, LogReader]]:
    """The data set of a run and a reader of its log; one process of a run is its writer.

    Raises RunError for a source that is not allowed, CommitLogError for a malformed mirror.
    """
    if request.source_url is None:
        paths = DatasetPaths(settings.root, request.dataset_name)
        yield paths, LogReader(paths.log)
        return
    url, closing = origin_of(request.source_url), threading.Event()
    with open_generator(url, settings, lambda: closing.is_set() or should_stop()) as client:
        place = RemoteDataset(client, request.dataset_name, run_folder)
        if not is_writer:
            yield place, LogReader(place.log)
            return
        events = partial(event_names, url, settings)
        mirror = LogMirror(
            client, place.dataset, place.log, poll_s=settings.source_poll_s, events=events
        )
        with mirror:
            try:
                yield place, mirror.reader()
            finally:
                closing.set()
