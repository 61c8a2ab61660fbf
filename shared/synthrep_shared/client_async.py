"""The asynchronous client; reach it as `synthrep_shared.client.AsyncSynthRep`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

import anyio
import httpx
from httpx_sse import EventSource
from pydantic import BaseModel

from synthrep_shared.client_calls import Calls
from synthrep_shared.client_events import Event, Listening
from synthrep_shared.client_uploads import zipped
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

M = TypeVar("M", bound=BaseModel)
_CHUNK_BYTES = 1 << 20


class AsyncSynthRep(Calls):
    """Asynchronous client: the calls of `SynthRep`, to be awaited or iterated over."""

    def __init__(
        self, *args: Any, transport: httpx.AsyncBaseTransport | None = None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self._http = httpx.AsyncClient(
            headers=self._headers, timeout=self._timeout_s, transport=transport
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def request(self, method: str, url: str, **kwargs: Any) -> Any:
        """One call with retries; returns the decoded JSON, raises ServiceError."""
        return (await self._call(method, url, **kwargs)).json()

    async def _call(
        self, method: str, url: str, *, body: Path | None = None, **kwargs: Any
    ) -> httpx.Response:
        attempt = 0
        while True:
            try:
                content = None if body is None else _chunks(body)
                response = await self._http.request(method, url, content=content, **kwargs)
                pause_s = self._pause_s(attempt, response)
                if pause_s is None:
                    return self._checked(response)
            except httpx.TransportError as error:
                pause_s = self._pause_s(attempt, None)
                if pause_s is None:
                    raise self._unreachable(url, error) from error
            await asyncio.sleep(pause_s)
            attempt += 1

    async def _one(self, model: type[M], method: str, url: str, **kwargs: Any) -> M:
        return model.model_validate(await self.request(method, url, **kwargs))

    async def _items(self, url: str, model: type[M], **params: Any) -> AsyncIterator[M]:
        async for item in self._pages(url, **params):
            yield model.model_validate(item)

    async def _pages(self, url: str, **params: Any) -> AsyncIterator[dict[str, Any]]:
        params = {k: v for k, v in params.items() if v is not None} | {"limit": self.page_items}
        while True:
            page = await self.request("GET", url, params=params)
            for item in page["items"]:
                yield item
            if page["next_cursor"] is None:
                return
            params["cursor"] = page["next_cursor"]

    async def _follow(self, url: str, last_event_id: str | None) -> AsyncIterator[Event]:
        listening = Listening(last_event_id, self._timeout_s)
        while True:
            try:
                async with self._http.stream("GET", url, **listening.options()) as response:
                    pause_s = self._pause_s(listening.attempt, response)
                    if pause_s is None:
                        if response.is_error:
                            await response.aread()
                        self._checked(response)
                        async for told in EventSource(response).aiter_sse():
                            if (event := listening.read(told)) is not None:
                                yield event
                                if event.is_last:
                                    return
                        raise httpx.RemoteProtocolError("the stream of events ended")
            except httpx.TransportError as error:
                pause_s = self._pause_s(listening.attempt, None)
                if pause_s is None:
                    raise self._unreachable(url, error) from error
            await asyncio.sleep(pause_s)
            listening.attempt += 1

    async def submit(
        self,
        dataset: str,
        prompts: Sequence[str],
        *,
        idempotency_key: str | None = None,
        **settings: Any,
    ) -> BatchAccepted:
        """Hand in 1-1,000 prompts; `settings` are the fields of `GenerationSettings`."""
        return await self._one(
            BatchAccepted, "POST", **self._submission(dataset, prompts, settings, idempotency_key)
        )

    async def batch(self, batch_id: str) -> BatchView:
        """State and progress of a batch."""
        return await self._one(BatchView, "GET", f"{self.generator_url}/v1/batches/{batch_id}")

    def batches(self, dataset: str | None = None) -> AsyncIterator[BatchView]:
        """All batches, or those of one data set."""
        return self._items(f"{self.generator_url}/v1/batches", BatchView, dataset=dataset)

    def failures(self, batch_id: str) -> AsyncIterator[FailureView]:
        """Prompts of a batch that ended as failures."""
        return self._items(f"{self.generator_url}/v1/batches/{batch_id}/failures", FailureView)

    async def control(self, batch_id: str, verb: str) -> BatchView:
        """`cancel`, `pause` or `resume` a batch."""
        return await self._one(
            BatchView, "POST", f"{self.generator_url}/v1/batches/{batch_id}/{verb}"
        )

    def datasets(self) -> AsyncIterator[DatasetView]:
        """All data sets."""
        return self._items(f"{self.generator_url}/v1/datasets", DatasetView)

    async def dataset(self, name: str) -> DatasetView:
        """Counts of a data set."""
        return await self._one(DatasetView, "GET", f"{self.generator_url}/v1/datasets/{name}")

    def shards(self, dataset: str, after: int = 0) -> AsyncIterator[ShardView]:
        """Sealed shards after a log position, in order."""
        return self._items(
            f"{self.generator_url}/v1/datasets/{dataset}/shards", ShardView, after=after
        )

    def records(self, dataset: str, after: int = 0) -> AsyncIterator[dict[str, Any]]:
        """The commit log after a position, as `commit_log.CommitRecord` has it."""
        return self._pages(f"{self.generator_url}/v1/datasets/{dataset}/records", after=after)

    async def shard_bytes(
        self, dataset: str, name: str, *, start: int = 0, num_bytes: int | None = None
    ) -> bytes:
        """A sealed shard, whole, or so many bytes from `start` on, fewer at its end."""
        url = f"{self.generator_url}/v1/datasets/{dataset}/shards/{name}"
        if num_bytes is None:
            return bytes((await self._call("GET", url)).content)
        try:
            headers = {"range": f"bytes={start}-{start + num_bytes - 1}"}
            response = await self._call("GET", url, headers=headers)
        except ServiceError as error:
            if error.status == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                return b""
            raise
        is_part = response.status_code == httpx.codes.PARTIAL_CONTENT
        return response.content if is_part else response.content[start : start + num_bytes]

    async def group(self, gid: str) -> GroupView:
        """Where the images of a prompt come from."""
        return await self._one(GroupView, "GET", f"{self.generator_url}/v1/groups/{gid}")

    async def image_bytes(self, gid: str, image_index: int) -> bytes:
        """One image of a group, as it is stored."""
        url = f"{self.generator_url}/v1/groups/{gid}/images/{image_index}"
        return bytes((await self._call("GET", url)).content)

    async def reject(self, gid: str) -> GroupView:
        """Withdraw a group: trainers pass over it from then on."""
        return await self._one(GroupView, "POST", f"{self.generator_url}/v1/groups/{gid}/reject")

    def events(self, *, last_event_id: str | None = None) -> AsyncIterator[Event]:
        """Changes of batches, shards and workers as they happen, for ever, over breaks too."""
        return self._follow(f"{self.generator_url}/v1/events", last_event_id)

    async def train(self, run: RunRequest, *, idempotency_key: str | None = None) -> RunView:
        """Start a training run."""
        return await self._one(RunView, "POST", **self._run_submission(run, idempotency_key))

    async def run(self, run_id: str) -> RunView:
        """State and progress of a run."""
        return await self._one(RunView, "GET", f"{self.trainer_url}/v1/runs/{run_id}")

    def runs(self) -> AsyncIterator[RunView]:
        """All runs."""
        return self._items(f"{self.trainer_url}/v1/runs", RunView)

    async def control_run(self, run_id: str, verb: str) -> RunView:
        """`stop` or `resume` a run."""
        return await self._one(RunView, "POST", f"{self.trainer_url}/v1/runs/{run_id}/{verb}")

    def metrics(self, run_id: str, after: int = -1) -> AsyncIterator[dict[str, Any]]:
        """The run's numbers by step, after a step."""
        return self._pages(f"{self.trainer_url}/v1/runs/{run_id}/metrics", after=after)

    def run_events(self, run_id: str, *, last_event_id: str | None = None) -> AsyncIterator[Event]:
        """A run's numbers and changes of state as they happen, until it works no more."""
        return self._follow(f"{self.trainer_url}/v1/runs/{run_id}/events", last_event_id)

    def checkpoints(self, run_id: str) -> AsyncIterator[CheckpointView]:
        """Complete checkpoints of a run."""
        return self._items(f"{self.trainer_url}/v1/runs/{run_id}/checkpoints", CheckpointView)

    async def probe_datasets(self) -> list[dict[str, Any]]:
        """The labelled sets that probes may name, with the fields of a `ProbeSetView`."""
        return [item async for item in self._pages(f"{self.trainer_url}/v1/probe-datasets")]

    async def add_probe_dataset(self, name: str, source: Path) -> ProbeSetView:
        """Add a labelled set: a zip or a folder of `class/image`, or of splits that hold them.

        Raises ServiceError 409 if the name is taken, also by an attempt whose answer was lost;
        OSError and SynthRepError for a source that cannot be sent.
        """
        with ExitStack() as stack:
            body = await asyncio.to_thread(stack.enter_context, zipped(source))
            call = self._probe_dataset_upload(name)
            answer = await self._call("POST", body=body, **call)
            return ProbeSetView.model_validate(answer.json())

    async def link_probe_dataset(self, name: str, folder: str) -> ProbeSetView:
        """Add a labelled set of a folder that the trainer sees, under one of its allowed roots."""
        return await self._one(ProbeSetView, "POST", **self._probe_dataset_link(name, folder))

    async def comparison(self, name: str) -> ComparisonView:
        """The table of a comparison, as far as it has come."""
        return await self._one(ComparisonView, "GET", f"{self.trainer_url}/v1/comparisons/{name}")

    async def start_probe(
        self, probe: ProbeRequest, *, idempotency_key: str | None = None
    ) -> ProbeView:
        """Start a probe of a run's newest checkpoint, or of a checkpoint."""
        return await self._one(ProbeView, "POST", **self._probe_submission(probe, idempotency_key))

    async def probe(self, probe_id: str) -> ProbeView:
        """State and result of a probe."""
        return await self._one(ProbeView, "GET", f"{self.trainer_url}/v1/probes/{probe_id}")


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    async with await anyio.open_file(path, "rb") as stream:
        while chunk := await stream.read(_CHUNK_BYTES):
            yield chunk
