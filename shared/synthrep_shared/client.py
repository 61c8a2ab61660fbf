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
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel

from synthrep_shared.client_async import AsyncSynthRep
from synthrep_shared.client_calls import GENERATOR_URL, TRAINER_URL, Calls
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
    ProbeView,
    RunRequest,
    RunView,
    ShardView,
)

__all__ = ["GENERATOR_URL", "TRAINER_URL", "AsyncSynthRep", "SynthRep"]

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

    def _call(self, method: str, url: str, **kwargs: Any) -> httpx.Response:
        attempt = 0
        while True:
            try:
                response = self._http.request(method, url, **kwargs)
                pause_s = self._pause_s(attempt, response)
                if pause_s is None:
                    return self._checked(response)
            except httpx.TransportError as error:
                pause_s = self._pause_s(attempt, None)
                if pause_s is None:
                    raise self._unreachable(url, error) from error
            self._sleep(pause_s)
            attempt += 1

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

    def submit(
        self,
        dataset: str,
        prompts: Sequence[str],
        *,
        idempotency_key: str | None = None,
        **settings: Any,
    ) -> BatchAccepted:
        """Hand in 1-1,000 prompts; `settings` are the fields of `GenerationSettings`."""
        call = self._submission(dataset, prompts, settings, idempotency_key)
        return BatchAccepted.model_validate(self.request("POST", **call))

    def batch(self, batch_id: str) -> BatchView:
        """State and progress of a batch."""
        return BatchView.model_validate(
            self.request("GET", f"{self.generator_url}/v1/batches/{batch_id}")
        )

    def batches(self, dataset: str | None = None) -> Iterator[BatchView]:
        """All batches, or those of one data set."""
        return self._items(f"{self.generator_url}/v1/batches", BatchView, dataset=dataset)

    def failures(self, batch_id: str) -> Iterator[FailureView]:
        """Prompts of a batch that ended as failures."""
        return self._items(f"{self.generator_url}/v1/batches/{batch_id}/failures", FailureView)

    def control(self, batch_id: str, verb: str) -> BatchView:
        """`cancel`, `pause` or `resume` a batch."""
        return BatchView.model_validate(
            self.request("POST", f"{self.generator_url}/v1/batches/{batch_id}/{verb}")
        )

    def datasets(self) -> Iterator[DatasetView]:
        """All data sets."""
        return self._items(f"{self.generator_url}/v1/datasets", DatasetView)

    def dataset(self, name: str) -> DatasetView:
        """Counts of a data set."""
        return DatasetView.model_validate(
            self.request("GET", f"{self.generator_url}/v1/datasets/{name}")
        )

    def shards(self, dataset: str, after: int = 0) -> Iterator[ShardView]:
        """Sealed shards after a log position, in order."""
        url = f"{self.generator_url}/v1/datasets/{dataset}/shards"
        return self._items(url, ShardView, after=after)

    def records(self, dataset: str, after: int = 0) -> Iterator[dict[str, Any]]:
        """The commit log after a position, as `commit_log.CommitRecord` has it."""
        url = f"{self.generator_url}/v1/datasets/{dataset}/records"
        return self._pages(url, after=after)

    def shard_bytes(
        self, dataset: str, name: str, *, start: int = 0, num_bytes: int | None = None
    ) -> bytes:
        """A sealed shard, whole, or so many bytes from `start` on, fewer at its end."""
        url = f"{self.generator_url}/v1/datasets/{dataset}/shards/{name}"
        if num_bytes is None:
            return bytes(self._call("GET", url).content)
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
        return GroupView.model_validate(
            self.request("GET", f"{self.generator_url}/v1/groups/{gid}")
        )

    def image_bytes(self, gid: str, image_index: int) -> bytes:
        """One image of a group, as it is stored."""
        url = f"{self.generator_url}/v1/groups/{gid}/images/{image_index}"
        return bytes(self._call("GET", url).content)

    def train(self, run: RunRequest, *, idempotency_key: str | None = None) -> RunView:
        """Start a training run."""
        call = self._run_submission(run, idempotency_key)
        return RunView.model_validate(self.request("POST", **call))

    def run(self, run_id: str) -> RunView:
        """State and progress of a run."""
        return RunView.model_validate(self.request("GET", f"{self.trainer_url}/v1/runs/{run_id}"))

    def runs(self) -> Iterator[RunView]:
        """All runs."""
        return self._items(f"{self.trainer_url}/v1/runs", RunView)

    def control_run(self, run_id: str, verb: str) -> RunView:
        """`stop` or `resume` a run."""
        return RunView.model_validate(
            self.request("POST", f"{self.trainer_url}/v1/runs/{run_id}/{verb}")
        )

    def metrics(self, run_id: str, after: int = -1) -> Iterator[dict[str, Any]]:
        """The run's numbers by step, after a step."""
        url = f"{self.trainer_url}/v1/runs/{run_id}/metrics"
        return self._pages(url, after=after)

    def checkpoints(self, run_id: str) -> Iterator[CheckpointView]:
        """Complete checkpoints of a run."""
        return self._items(f"{self.trainer_url}/v1/runs/{run_id}/checkpoints", CheckpointView)

    def probe_datasets(self) -> list[dict[str, Any]]:
        """The labelled sets that probes may name."""
        answer = self.request("GET", f"{self.trainer_url}/v1/probe-datasets")
        items: list[dict[str, Any]] = answer["items"]
        return items

    def comparison(self, name: str) -> ComparisonView:
        """The table of a comparison, as far as it has come."""
        url = f"{self.trainer_url}/v1/comparisons/{name}"
        return ComparisonView.model_validate(self.request("GET", url))

    def start_probe(self, probe: ProbeRequest, *, idempotency_key: str | None = None) -> ProbeView:
        """Start a probe of a run's newest checkpoint, or of a checkpoint."""
        call = self._probe_submission(probe, idempotency_key)
        return ProbeView.model_validate(self.request("POST", **call))

    def probe(self, probe_id: str) -> ProbeView:
        """State and result of a probe."""
        return ProbeView.model_validate(
            self.request("GET", f"{self.trainer_url}/v1/probes/{probe_id}")
        )
