"""The client of both services, sync and async, on httpx.

    with SynthRep() as synthrep:
        batch = synthrep.submit("pets", ["a red dog", "a white cat"])
        run = synthrep.train(RunRequest(dataset="pets", max_steps=500))

Every request is safe to repeat, as submissions carry an `Idempotency-Key`; so all are retried on
connection errors, 429 and 503, honouring `Retry-After`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
from httpx_sse import EventSource
from pydantic import BaseModel

from synthrep_shared.client_async import AsyncSynthRep
from synthrep_shared.client_calls import GENERATOR_URL, TRAINER_URL, Calls
from synthrep_shared.client_events import Event, Listening
from synthrep_shared.client_uploads import zipped
from synthrep_shared.client_webdataset import Samples, open_pipeline
from synthrep_shared.errors import ServiceError
from synthrep_shared.messages import (
    BatchAccepted,
    BatchView,
    CheckpointView,
    ComparisonView,
    DatasetView,
    FailureView,
    GroupView,
    ProbeRequest,
    ProbeSetView,
    ProbeView,
    RunRequest,
    RunView,
    ShardView,
)

__all__ = ["GENERATOR_URL", "TRAINER_URL", "AsyncSynthRep", "Event", "SynthRep"]

M = TypeVar("M", bound=BaseModel)


class SynthRep(Calls):
    """Blocking client; use as a context manager or `close` it."""

    def __init__(
        self,
        *args: Any,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], object] = time.sleep,
        **kwargs: Any,
    ):
        """`sleep` waits between attempts, and may raise to give up."""
        super().__init__(*args, **kwargs)
        self._again = partial(type(self), *args, transport=transport, sleep=sleep, **kwargs)
        self._sleep = sleep
        self._http = httpx.Client(
            headers=self._headers, timeout=self._timeout_s, transport=transport
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def request(self, method: str, url: str, **kwargs: Any) -> Any:
        """One call with retries; returns the decoded JSON, raises ServiceError."""
        return self._call(method, url, **kwargs).json()

    def _call(
        self, method: str, url: str, *, body: Path | None = None, **kwargs: Any
    ) -> httpx.Response:
        attempt = 0
        while True:
            try:
                response = self._send(method, url, body, **kwargs)
                pause_s = self._pause_s(attempt, response)
                if pause_s is None:
                    return self._checked(response)
            except httpx.TransportError as error:
                pause_s = self._pause_s(attempt, None)
                if pause_s is None:
                    raise self._unreachable(url, error) from error
            self._sleep(pause_s)
            attempt += 1

    def _send(self, method: str, url: str, body: Path | None, **kwargs: Any) -> httpx.Response:
        if body is None:
            return self._http.request(method, url, **kwargs)
        with body.open("rb") as stream:
            return self._http.request(method, url, content=stream, **kwargs)

    def _one(self, model: type[M], method: str, url: str, **kwargs: Any) -> M:
        return model.model_validate(self.request(method, url, **kwargs))

    def _items(self, url: str, model: type[M], **params: Any) -> Iterator[M]:
        return map(model.model_validate, self._pages(url, **params))

    def _pages(self, url: str, **params: Any) -> Iterator[dict[str, Any]]:
        params = {k: v for k, v in params.items() if v is not None} | {"limit": self.page_items}
        while True:
            page = self.request("GET", url, params=params)
            yield from page["items"]
            if page["next_cursor"] is None:
                return
            params["cursor"] = page["next_cursor"]

    def _follow(self, url: str, last_event_id: str | None) -> Iterator[Event]:
        listening = Listening(last_event_id, self._timeout_s)
        while True:
            try:
                with self._http.stream("GET", url, **listening.options()) as response:
                    pause_s = self._pause_s(listening.attempt, response)
                    if pause_s is None:
                        if response.is_error:
                            response.read()
                        self._checked(response)
                        for told in EventSource(response).iter_sse():
                            if (event := listening.read(told)) is not None:
                                yield event
                                if event.is_last:
                                    return
                        raise httpx.RemoteProtocolError("the stream of events ended")
            except httpx.TransportError as error:
                pause_s = self._pause_s(listening.attempt, None)
                if pause_s is None:
                    raise self._unreachable(url, error) from error
            self._sleep(pause_s)
            listening.attempt += 1

    def to_webdataset(self, dataset: str, *, after: int = 0) -> Any:
        """The data set's samples with the methods of a `webdataset.WebDataset`, without a disk.

            pets = synthrep.to_webdataset("pets")
            for image, facts in pets.decode("pil").to_tuple("jpg", "json"):

        In the order of the log, without rejected groups; each pass begins with the shards that are
        there by then, after a position of the log. May go to a DataLoader. While iterating it
        raises what every call does. SynthRepError where webdataset is not installed.
        """
        return open_pipeline(Samples(self._again, dataset, after))

    def submit(
        self,
        dataset: str,
        prompts: Sequence[str],
        *,
        idempotency_key: str | None = None,
        **settings: Any,
    ) -> BatchAccepted:
        """Hand in 1-1,000 prompts; `settings` are the fields of `GenerationSettings`."""
        return self._one(
            BatchAccepted, "POST", **self._submission(dataset, prompts, settings, idempotency_key)
        )

    def batch(self, batch_id: str) -> BatchView:
        """State and progress of a batch."""
        return self._one(BatchView, "GET", f"{self.generator_url}/v1/batches/{batch_id}")

    def batches(self, dataset: str | None = None) -> Iterator[BatchView]:
        """All batches, or those of one data set."""
        return self._items(f"{self.generator_url}/v1/batches", BatchView, dataset=dataset)

    def failures(self, batch_id: str) -> Iterator[FailureView]:
        """Prompts of a batch that ended as failures."""
        return self._items(f"{self.generator_url}/v1/batches/{batch_id}/failures", FailureView)

    def control(self, batch_id: str, verb: str) -> BatchView:
        """`cancel`, `pause` or `resume` a batch."""
        return self._one(BatchView, "POST", f"{self.generator_url}/v1/batches/{batch_id}/{verb}")

    def datasets(self) -> Iterator[DatasetView]:
        """All data sets."""
        return self._items(f"{self.generator_url}/v1/datasets", DatasetView)

    def dataset(self, name: str) -> DatasetView:
        """Counts of a data set."""
        return self._one(DatasetView, "GET", f"{self.generator_url}/v1/datasets/{name}")

    def shards(self, dataset: str, after: int = 0) -> Iterator[ShardView]:
        """Sealed shards after a log position, in order."""
        return self._items(
            f"{self.generator_url}/v1/datasets/{dataset}/shards", ShardView, after=after
        )

    def records(self, dataset: str, after: int = 0) -> Iterator[dict[str, Any]]:
        """The commit log after a position, as `commit_log.CommitRecord` has it."""
        return self._pages(f"{self.generator_url}/v1/datasets/{dataset}/records", after=after)

    def shard_bytes(
        self, dataset: str, name: str, *, start: int = 0, num_bytes: int | None = None
    ) -> bytes:
        """A sealed shard, whole, or so many bytes from `start` on, fewer at its end."""
        url = f"{self.generator_url}/v1/datasets/{dataset}/shards/{name}"
        if num_bytes is None:
            return bytes((self._call("GET", url)).content)
        try:
            headers = {"range": f"bytes={start}-{start + num_bytes - 1}"}
            response = self._call("GET", url, headers=headers)
        except ServiceError as error:
            if error.status == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                return b""
            raise
        is_part = response.status_code == httpx.codes.PARTIAL_CONTENT
        return response.content if is_part else response.content[start : start + num_bytes]

    def group(self, gid: str) -> GroupView:
        """Where the images of a prompt come from."""
        return self._one(GroupView, "GET", f"{self.generator_url}/v1/groups/{gid}")

    def image_bytes(self, gid: str, image_index: int) -> bytes:
        """One image of a group, as it is stored."""
        url = f"{self.generator_url}/v1/groups/{gid}/images/{image_index}"
        return bytes((self._call("GET", url)).content)

    def reject(self, gid: str) -> GroupView:
        """Withdraw a group: trainers pass over it from then on."""
        return self._one(GroupView, "POST", f"{self.generator_url}/v1/groups/{gid}/reject")

    def events(self, *, last_event_id: str | None = None) -> Iterator[Event]:
        """Changes of batches, shards and workers as they happen, for ever, over breaks too."""
        return self._follow(f"{self.generator_url}/v1/events", last_event_id)

    def train(self, run: RunRequest, *, idempotency_key: str | None = None) -> RunView:
        """Start a training run."""
        return self._one(RunView, "POST", **self._run_submission(run, idempotency_key))

    def run(self, run_id: str) -> RunView:
        """State and progress of a run."""
        return self._one(RunView, "GET", f"{self.trainer_url}/v1/runs/{run_id}")

    def runs(self) -> Iterator[RunView]:
        """All runs."""
        return self._items(f"{self.trainer_url}/v1/runs", RunView)

    def control_run(self, run_id: str, verb: str) -> RunView:
        """`stop` or `resume` a run."""
        return self._one(RunView, "POST", f"{self.trainer_url}/v1/runs/{run_id}/{verb}")

    def metrics(self, run_id: str, after: int = -1) -> Iterator[dict[str, Any]]:
        """The run's numbers by step, after a step."""
        return self._pages(f"{self.trainer_url}/v1/runs/{run_id}/metrics", after=after)

    def run_events(self, run_id: str, *, last_event_id: str | None = None) -> Iterator[Event]:
        """A run's numbers and changes of state as they happen, until it works no more."""
        return self._follow(f"{self.trainer_url}/v1/runs/{run_id}/events", last_event_id)

    def checkpoints(self, run_id: str) -> Iterator[CheckpointView]:
        """Complete checkpoints of a run."""
        return self._items(f"{self.trainer_url}/v1/runs/{run_id}/checkpoints", CheckpointView)

    def probe_datasets(self) -> list[dict[str, Any]]:
        """The labelled sets that probes may name, with the fields of a `ProbeSetView`."""
        return list(self._pages(f"{self.trainer_url}/v1/probe-datasets"))

    def add_probe_dataset(self, name: str, source: Path) -> ProbeSetView:
        """Add a labelled set: a zip or a folder of `class/image`, or of splits that hold them.

        Raises ServiceError 409 if the name is taken, also by an attempt whose answer was lost;
        OSError and SynthRepError for a source that cannot be sent.
        """
        with zipped(source) as body:
            call = self._probe_dataset_upload(name)
            return ProbeSetView.model_validate(self._call("POST", body=body, **call).json())

    def link_probe_dataset(self, name: str, folder: str) -> ProbeSetView:
        """Add a labelled set of a folder that the trainer sees, under one of its allowed roots."""
        return self._one(ProbeSetView, "POST", **self._probe_dataset_link(name, folder))

    def comparison(self, name: str) -> ComparisonView:
        """The table of a comparison, as far as it has come."""
        return self._one(ComparisonView, "GET", f"{self.trainer_url}/v1/comparisons/{name}")

    def start_probe(self, probe: ProbeRequest, *, idempotency_key: str | None = None) -> ProbeView:
        """Start a probe of a run's newest checkpoint, or of a checkpoint."""
        return self._one(ProbeView, "POST", **self._probe_submission(probe, idempotency_key))

    def probe(self, probe_id: str) -> ProbeView:
        """State and result of a probe."""
        return self._one(ProbeView, "GET", f"{self.trainer_url}/v1/probes/{probe_id}")
