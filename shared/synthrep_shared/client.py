"""The client of both services, sync and async, on httpx.

    with SynthRep() as synthrep:
        batch = synthrep.submit("pets", ["a red dog", "a white cat"])
        run = synthrep.train(RunRequest(dataset="pets", max_steps=500))

Requests that are safe to repeat are retried on connection errors, 429 and 503, honouring
`Retry-After`; a submission is made safe by an `Idempotency-Key`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel

from synthrep_shared.errors import ServiceError, ServiceUnavailableError
from synthrep_shared.messages import (
    BatchAccepted,
    BatchView,
    CheckpointView,
    DatasetView,
    FailureView,
    ProbeRequest,
    ProbeView,
    RunRequest,
    RunView,
    ShardView,
)

GENERATOR_URL = "http://127.0.0.1:8000"
TRAINER_URL = "http://127.0.0.1:8001"
_RETRY_STATUS = (429, 503)
_LONGEST_PAUSE_S = 30.0
_PAGE = 100

M = TypeVar("M", bound=BaseModel)


class _Calls:
    """What both clients share: addresses, headers, and how an answer is read."""

    def __init__(
        self,
        generator_url: str | None = None,
        trainer_url: str | None = None,
        *,
        api_key: str | None = None,
        retries: int = 5,
        timeout_s: float = 30.0,
    ) -> None:
        self.generator_url = generator_url or os.environ.get(
            "SYNTHREP_GENERATOR_URL", GENERATOR_URL
        )
        self.trainer_url = trainer_url or os.environ.get("SYNTHREP_TRAINER_URL", TRAINER_URL)
        key = api_key or os.environ.get("SYNTHREP_API_KEY")
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._retries = retries
        self._timeout_s = timeout_s

    @staticmethod
    def _submission(
        dataset: str, prompts: Sequence[str], settings: dict[str, Any], key: str | None
    ) -> dict[str, Any]:
        return {
            "json": {"dataset": dataset, "prompts": list(prompts), **settings},
            "headers": {"idempotency-key": key or secrets.token_hex(16)},
        }

    def _pause_s(self, attempt: int, response: httpx.Response | None) -> float | None:
        """Seconds before the next attempt; None when this one is final."""
        if attempt >= self._retries:
            return None
        if response is None:
            return min(0.2 * 2.0**attempt, _LONGEST_PAUSE_S)
        if response.status_code not in _RETRY_STATUS:
            return None
        asked = response.headers.get("retry-after", "")
        pause_s = float(asked) if asked.isdigit() else 0.2 * 2.0**attempt
        return min(pause_s, _LONGEST_PAUSE_S)

    @staticmethod
    def _checked(response: httpx.Response) -> httpx.Response:
        if response.is_success:
            return response
        try:
            problem = response.json()
            title, detail = str(problem["title"]), str(problem.get("detail", ""))
            places = [f"{e['field']}: {e['message']}" for e in problem.get("errors", ())]
            detail = "; ".join(filter(None, [detail, *places]))
        except (ValueError, KeyError, TypeError):
            title, detail = response.reason_phrase, response.text[:200]
        kind = ServiceUnavailableError if response.status_code in _RETRY_STATUS else ServiceError
        raise kind(response.status_code, title, detail)

    @staticmethod
    def _unreachable(url: str, error: httpx.TransportError) -> ServiceUnavailableError:
        return ServiceUnavailableError(
            503, "no answer", f"{url}: {error or type(error).__name__}; is the service running?"
        )


class SynthRep(_Calls):
    """Blocking client; use as a context manager or `close` it."""

    def __init__(self, *args: Any, transport: httpx.BaseTransport | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
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
            time.sleep(pause_s)
            attempt += 1

    def _items(self, url: str, model: type[M], **params: Any) -> Iterator[M]:
        params = {k: v for k, v in params.items() if v is not None} | {"limit": _PAGE}
        while True:
            page = self.request("GET", url, params=params)
            yield from (model.model_validate(item) for item in page["items"])
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
        return BatchAccepted.model_validate(
            self.request("POST", f"{self.generator_url}/v1/batches", **call)
        )

    def batch(self, batch_id: str) -> BatchView:
        """State and progress of a batch."""
        return BatchView.model_validate(
            self.request("GET", f"{self.generator_url}/v1/batches/{batch_id}")
        )

    def batches(self) -> Iterator[BatchView]:
        """All batches."""
        return self._items(f"{self.generator_url}/v1/batches", BatchView)

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

    def shard_bytes(self, dataset: str, name: str) -> bytes:
        """A sealed shard, whole."""
        url = f"{self.generator_url}/v1/datasets/{dataset}/shards/{name}"
        return bytes(self._call("GET", url).content)

    def train(self, run: RunRequest) -> RunView:
        """Start a training run."""
        body = run.model_dump(mode="json", exclude_unset=True)
        return RunView.model_validate(
            self.request("POST", f"{self.trainer_url}/v1/runs", json=body)
        )

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
        params: dict[str, Any] = {"after": after, "limit": _PAGE}
        while True:
            page = self.request("GET", url, params=params)
            yield from page["items"]
            if page["next_cursor"] is None:
                return
            params["cursor"] = page["next_cursor"]

    def checkpoints(self, run_id: str) -> Iterator[CheckpointView]:
        """Complete checkpoints of a run."""
        return self._items(f"{self.trainer_url}/v1/runs/{run_id}/checkpoints", CheckpointView)

    def probe_datasets(self) -> list[dict[str, Any]]:
        """The labelled sets that probes may name."""
        answer = self.request("GET", f"{self.trainer_url}/v1/probe-datasets")
        items: list[dict[str, Any]] = answer["items"]
        return items

    def start_probe(self, probe: ProbeRequest) -> ProbeView:
        """Start a probe of a run's newest checkpoint, or of a checkpoint."""
        body = probe.model_dump(mode="json", exclude_none=True)
        return ProbeView.model_validate(
            self.request("POST", f"{self.trainer_url}/v1/probes", json=body)
        )

    def probe(self, probe_id: str) -> ProbeView:
        """State and result of a probe."""
        return ProbeView.model_validate(
            self.request("GET", f"{self.trainer_url}/v1/probes/{probe_id}")
        )


class AsyncSynthRep(_Calls):
    """Asynchronous client for the calls that scripts make many of."""

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
        await self._http.aclose()

    async def request(self, method: str, url: str, **kwargs: Any) -> Any:
        """One call with retries; returns the decoded JSON, raises ServiceError."""
        attempt = 0
        while True:
            try:
                response = await self._http.request(method, url, **kwargs)
                pause_s = self._pause_s(attempt, response)
                if pause_s is None:
                    return self._checked(response).json()
            except httpx.TransportError as error:
                pause_s = self._pause_s(attempt, None)
                if pause_s is None:
                    raise self._unreachable(url, error) from error
            await asyncio.sleep(pause_s)
            attempt += 1

    async def submit(
        self,
        dataset: str,
        prompts: Sequence[str],
        *,
        idempotency_key: str | None = None,
        **settings: Any,
    ) -> BatchAccepted:
        """Hand in 1-1,000 prompts; `settings` are the fields of `GenerationSettings`."""
        call = self._submission(dataset, prompts, settings, idempotency_key)
        return BatchAccepted.model_validate(
            await self.request("POST", f"{self.generator_url}/v1/batches", **call)
        )

    async def batch(self, batch_id: str) -> BatchView:
        """State and progress of a batch."""
        return BatchView.model_validate(
            await self.request("GET", f"{self.generator_url}/v1/batches/{batch_id}")
        )

    async def shards(self, dataset: str, after: int = 0) -> AsyncIterator[ShardView]:
        """Sealed shards after a log position, in order."""
        url = f"{self.generator_url}/v1/datasets/{dataset}/shards"
        params: dict[str, Any] = {"after": after, "limit": _PAGE}
        while True:
            page = await self.request("GET", url, params=params)
            for item in page["items"]:
                yield ShardView.model_validate(item)
            if page["next_cursor"] is None:
                return
            params["cursor"] = page["next_cursor"]

    async def run(self, run_id: str) -> RunView:
        """State and progress of a run."""
        return RunView.model_validate(
            await self.request("GET", f"{self.trainer_url}/v1/runs/{run_id}")
        )

    async def probe(self, probe_id: str) -> ProbeView:
        """State and result of a probe."""
        return ProbeView.model_validate(
            await self.request("GET", f"{self.trainer_url}/v1/probes/{probe_id}")
        )
