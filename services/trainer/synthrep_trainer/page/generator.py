"""What the page asks the generator, through the client that everyone uses.

Every call carries the viewer's own key, never one of the trainer's, so that nobody sees more here
than at the generator itself. Lists are read a page at a time.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import httpx

from synthrep_shared.client import SynthRep
from synthrep_shared.errors import ServiceError, ServiceUnavailableError
from synthrep_shared.messages import BatchView, DatasetView, GroupView, QueueView, WorkerView
from synthrep_trainer.errors import RunError
from synthrep_trainer.settings import TrainerSettings

T = TypeVar("T")
_TIMEOUT_S, _ANSWER_S = 5.0, 15.0  # for each wait, and for an answer as a whole
_MAX_ANSWER_BYTES = 32 << 20
_FRESH_S = 0.9
_MAX_REMEMBERED = 512
_MAX_DATASETS, _MAX_BATCHES, _MAX_WORKERS = 100, 5, 100
_RECORDS_AT_ONCE = 20
_MAX_LOOKS = 5
_NOT_UNDERSTOOD = (httpx.RequestError, ValueError, LookupError, TypeError, RecursionError)
"""What reading the answer of something else raises."""


class Place(NamedTuple):
    """A group's place in a data set: of its record in the log, and in that record."""

    seq: int
    end: int
    """What is before it stands below this index; 0: nothing of the record."""


@dataclass(frozen=True)
class Generation:
    """How the generator stands."""

    datasets: tuple[DatasetView, ...]
    batches: tuple[BatchView, ...]
    """The newest."""
    queue: QueueView | None
    """None while its Redis is gone."""
    workers: tuple[WorkerView, ...]


@dataclass(frozen=True)
class GroupPage:
    """Some groups, the newest first; `older` is where the next page begins, None at the end."""

    groups: tuple[GroupView, ...]
    older: Place | None


class Generator:
    """The generator behind one trainer; safe for several threads."""

    def __init__(
        self, settings: TrainerSettings, transport: httpx.BaseTransport | None = None
    ) -> None:
        self._settings = settings
        self._transport = _Bounded(transport or httpx.HTTPTransport())
        self._lock = threading.Lock()
        self._remembered: OrderedDict[tuple[Any, ...], _Look] = OrderedDict()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    @property
    def is_unnamed(self) -> bool:
        """Whether the settings name none."""
        return self._settings.generator_url is None

    @property
    def url(self) -> str:
        """Its address; raises RunError where the settings name none."""
        url = self._settings.generator_url
        if url is None:
            raise RunError("no generator: name it in the setting SYNTHREP_TRAINER_GENERATOR_URL")
        return url

    @property
    def public_url(self) -> str:
        """Its address as people reach it; raises RunError as above."""
        return self._settings.generator_public_url or self.url

    def ask(self, key: str, question: Callable[[SynthRep], T]) -> T:
        """What it says to one viewer, who asks once; raises ServiceError, RunError.

        The client borrows the connections, do not close it.
        """
        client = SynthRep(
            self.url, api_key=key, retries=0, timeout_s=_TIMEOUT_S, transport=self._transport
        )
        try:
            return question(client)
        except _NOT_UNDERSTOOD as error:
            raise ServiceError(
                502, "bad answer", f"{self.url}: no generator answers there"
            ) from error

    def generation(self, key: str) -> Generation:
        """How it stands, at most a second old; raises ServiceError, RunError."""
        return self._fresh(("generation", key), _FRESH_S, lambda: self.ask(key, self._generation))

    def newest_groups(self, key: str, dataset: DatasetView, limit: int) -> GroupPage:
        """As `groups`; looked up again once the log has grown."""
        name = ("groups", key, dataset.name, dataset.last_seq, limit)
        return self._fresh(name, float("inf"), lambda: self.groups(key, dataset, None, limit))

    def groups(self, key: str, dataset: DatasetView, before: Place | None, limit: int) -> GroupPage:
        """Up to `limit` groups older than a place; raises ServiceError, RunError."""
        start = before or Place(dataset.last_seq + 1, 0)
        return self.ask(key, lambda client: self._groups(client, key, dataset, start, limit))

    def _groups(
        self, client: SynthRep, key: str, dataset: DatasetView, start: Place, limit: int
    ) -> GroupPage:
        found: list[GroupView] = []
        for _ in range(_MAX_LOOKS):
            top = start.seq if start.end else start.seq - 1
            if top < 1:
                return GroupPage(tuple(found), None)
            after = max(0, top - _RECORDS_AT_ONCE)
            answer = client.request(
                "GET",
                f"{self.url}/v1/datasets/{dataset.name}/records",
                params={"after": after, "limit": top - after},
            )
            for record in reversed(answer["items"]):
                seq, groups = record["seq"], record["groups"]
                if record["kind"] != "shard":
                    continue
                end = start.end if seq == start.seq else len(groups)
                for index in range(end - 1, -1, -1):
                    if len(found) == limit:
                        return GroupPage(tuple(found), Place(seq, index + 1))
                    try:
                        found.append(self._group(key, dataset, groups[index]["gid"]))
                    except ServiceUnavailableError:
                        raise
                    except ServiceError:  # one whose shard is gone hides no other
                        continue
            start = Place(after + 1, 0)
        return GroupPage(tuple(found), start if start.seq > 1 else None)

    def _group(self, key: str, dataset: DatasetView, gid: str) -> GroupView:
        """A group; nothing about it ever changes but that it may be rejected."""
        name = ("group", key, gid, dataset.rejected)
        return self._fresh(
            name, float("inf"), lambda: self.ask(key, lambda client: client.group(gid))
        )

    def _generation(self, client: SynthRep) -> Generation:
        def items(path: str, limit: int) -> list[Any]:
            answer = client.request("GET", f"{self.url}/v1/{path}", params={"limit": limit})
            return list(answer["items"])

        # First what a generator without its Redis answers: without any answer, one wait is enough.
        datasets, batches = items("datasets", _MAX_DATASETS), items("batches", _MAX_BATCHES)
        queue, workers = None, []
        with suppress(ServiceUnavailableError):
            queue = QueueView.model_validate(client.request("GET", f"{self.url}/v1/queue"))
            workers = items("workers", _MAX_WORKERS)
        return Generation(
            datasets=tuple(map(DatasetView.model_validate, datasets)),
            batches=tuple(map(BatchView.model_validate, batches)),
            queue=queue,
            workers=tuple(map(WorkerView.model_validate, workers)),
        )

    def _fresh(self, name: tuple[Any, ...], age_s: float, look: Callable[[], T]) -> T:
        """What `look` gave lately under this name, of which the key is part.

        Of those who ask at the same time one looks, and all get its answer, or its refusal.
        """
        with self._lock:
            known = self._remembered.get(name)
            is_mine = known is None or known.is_older_than(age_s)
            if known is None or is_mine:
                known = self._remembered[name] = _Look()
                self._remembered.move_to_end(name)
                while len(self._remembered) > _MAX_REMEMBERED:
                    self._remembered.popitem(last=False)
        if is_mine:
            known.take(look)
        found: T = known.answer.result()
        return found


class _Bounded(httpx.BaseTransport):
    """Breaks off what is too long, or takes too long as a whole."""

    def __init__(self, inner: httpx.BaseTransport) -> None:
        self._inner = inner

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        end_s = time.monotonic() + _ANSWER_S
        response = self._inner.handle_request(request)
        assert isinstance(response.stream, httpx.SyncByteStream)
        response.stream = _BoundedStream(response.stream, end_s)
        return response

    def close(self) -> None:
        self._inner.close()


class _BoundedStream(httpx.SyncByteStream):
    def __init__(self, inner: httpx.SyncByteStream, end_s: float) -> None:
        self._inner, self._end_s = inner, end_s

    def __iter__(self) -> Iterator[bytes]:
        num_bytes = 0
        for part in self._inner:
            num_bytes += len(part)
            if num_bytes > _MAX_ANSWER_BYTES or time.monotonic() > self._end_s:
                raise httpx.ReadTimeout("the answer has no end")
            yield part

    def close(self) -> None:
        self._inner.close()


class _Look:
    """One look at the generator: under way, or done with an answer or an exception."""

    def __init__(self) -> None:
        self.answer: Future[Any] = Future()
        self._ended = 0.0

    def is_older_than(self, age_s: float) -> bool:
        """Whether it has ended and is too old to be shown again; a failure soon is."""
        if not self.answer.done():
            return False
        if self.answer.exception() is not None:
            age_s = min(age_s, _FRESH_S)
        return time.monotonic() - self._ended >= age_s

    def take(self, look: Callable[[], Any]) -> None:
        """Look, and tell all who wait."""
        try:
            answer = look()
        except BaseException as error:
            self._ended = time.monotonic()
            self.answer.set_exception(error)
            return
        self._ended = time.monotonic()
        self.answer.set_result(answer)
