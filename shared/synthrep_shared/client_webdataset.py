"""A data set behind a generator's API as a pipeline of `webdataset`.

The shards are read by range, so that little of one is in memory, and a broken connection costs one
piece of it. `webdataset` is imported when a pipeline is made, and is the caller's to install.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from synthrep_shared.errors import SynthRepError
from synthrep_shared.object_stream import ObjectStream


class ShardClient(Protocol):
    """What a pipeline asks of a client."""

    def records(self, dataset: str, after: int = 0) -> Iterator[dict[str, Any]]:
        """The commit log after a position."""
        ...

    def shard_bytes(
        self, dataset: str, name: str, *, start: int = 0, num_bytes: int | None = None
    ) -> bytes:
        """Bytes of a shard."""
        ...


@dataclass(frozen=True)
class Samples:
    """Source of a pipeline; each pass reads the log anew, over connections of its own.

    So it may go to the workers of a `DataLoader`: shards are dealt out to ranks and workers.
    """

    connect: Callable[[], AbstractContextManager[ShardClient]]
    dataset: str
    after: int = 0

    def __call__(self) -> Iterator[dict[str, Any]]:
        """Samples in the order of the log, the images of a group one after the other."""
        from webdataset import shardlists, tariterators

        with self.connect() as client:
            names, rejected = _read_log(client.records(self.dataset, after=self.after))
            own = shardlists.split_by_worker(shardlists.split_by_node(iter(names)))
            files = tariterators.tar_file_expander(
                self._open(client, own),
                select_files=lambda member: member.partition("-")[0] not in rejected,
            )
            yield from tariterators.group_by_keys(files)

    def _open(self, client: ShardClient, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        for name in names:
            read = partial(_read_range, client, self.dataset, name)
            with io.BufferedReader(ObjectStream(read)) as stream:
                yield {"url": f"{self.dataset}/{name}", "stream": stream}


def open_pipeline(samples: Samples) -> Any:
    """The samples with the methods of a `webdataset.WebDataset`.

    Raises SynthRepError where webdataset is not installed.
    """
    try:
        import webdataset
    except ImportError as error:
        raise SynthRepError("to_webdataset() needs it: pip install webdataset") from error
    return webdataset.FluidWrapper(samples)


def _read_log(records: Iterable[dict[str, Any]]) -> tuple[list[str], frozenset[str]]:
    """Names of the shards in order, and the groups that are rejected by now."""
    names: list[str] = []
    rejected: set[str] = set()
    for record in records:
        if record["kind"] == "shard":
            names.append(record["name"])
        elif record["kind"] == "reject":
            rejected.update(group["gid"] for group in record["groups"])
    return names, frozenset(rejected)


def _read_range(client: ShardClient, dataset: str, name: str, start: int, count: int) -> bytes:
    return client.shard_bytes(dataset, name, start=start, num_bytes=count)
