"""The asynchronous client; reach it as `synthrep_shared.client.AsyncSynthRep`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

import httpx

from synthrep_shared.client_calls import Calls
from synthrep_shared.messages import BatchAccepted, BatchView, ProbeView, RunView, ShardView


class AsyncSynthRep(Calls):
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
        return BatchAccepted.model_validate(await self.request("POST", **call))

    async def batch(self, batch_id: str) -> BatchView:
        """State and progress of a batch."""
        return BatchView.model_validate(
            await self.request("GET", f"{self.generator_url}/v1/batches/{batch_id}")
        )

    async def shards(self, dataset: str, after: int = 0) -> AsyncIterator[ShardView]:
        """Sealed shards after a log position, in order."""
        url = f"{self.generator_url}/v1/datasets/{dataset}/shards"
        params: dict[str, Any] = {"after": after, "limit": self.page_items}
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
