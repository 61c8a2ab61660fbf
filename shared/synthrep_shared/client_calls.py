"""What the clients of both kinds do alike: addresses, headers, retries, reading answers."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from synthrep_shared.errors import ServiceError, ServiceUnavailableError
from synthrep_shared.messages import ProbeRequest, ProbeSetRequest, RunRequest

GENERATOR_URL = "http://127.0.0.1:8000"
TRAINER_URL = "http://127.0.0.1:8001"
_RETRY_STATUS = (429, 503)
_LONGEST_PAUSE_S = 30.0
_LONGEST_WAIT_S = 120.0  # a service that asks for more, as a quota does, is told to the caller
_UPLOAD_SILENCE_S = 600.0  # while a service looks at what it got


class Calls:
    """What both clients share: addresses, headers, how a request is made and an answer is read."""

    page_items = 100
    """Items that a list is asked for at a time."""

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
        key = os.environ.get("SYNTHREP_API_KEY") if api_key is None else api_key
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._headers = httpx.Headers(headers, encoding="utf-8")
        self._retries = retries
        self._timeout_s = timeout_s

    def _submission(
        self, dataset: str, prompts: Sequence[str], settings: dict[str, Any], key: str | None
    ) -> dict[str, Any]:
        return {
            "url": f"{self.generator_url}/v1/batches",
            "json": {"dataset": dataset, "prompts": list(prompts), **settings},
            "headers": {"idempotency-key": key or secrets.token_hex(16)},
        }

    def _run_submission(self, run: RunRequest, key: str | None) -> dict[str, Any]:
        return {
            "url": f"{self.trainer_url}/v1/runs",
            "json": run.model_dump(mode="json", exclude_unset=True),
            "headers": {"idempotency-key": key or secrets.token_hex(16)},
        }

    def _probe_submission(self, probe: ProbeRequest, key: str | None) -> dict[str, Any]:
        return {
            "url": f"{self.trainer_url}/v1/probes",
            "json": probe.model_dump(mode="json", exclude_unset=True, exclude_none=True),
            "headers": {"idempotency-key": key or secrets.token_hex(16)},
        }

    def _probe_dataset_upload(self, name: str) -> dict[str, Any]:
        return {
            "url": f"{self.trainer_url}/v1/probe-datasets",
            "params": {"name": name},
            "headers": {"content-type": "application/zip"},
            "timeout": httpx.Timeout(self._timeout_s, read=_UPLOAD_SILENCE_S),
        }

    def _probe_dataset_link(self, name: str, folder: str) -> dict[str, Any]:
        body = ProbeSetRequest(name=name, folder=folder).model_dump(mode="json")
        return {"url": f"{self.trainer_url}/v1/probe-datasets", "json": body}

    def _pause_s(self, attempt: int, response: httpx.Response | None) -> float | None:
        """Seconds before the next attempt; None when this one is final."""
        if attempt >= self._retries:
            return None
        if response is None:
            return min(0.2 * 2.0**attempt, _LONGEST_PAUSE_S)
        if response.status_code not in _RETRY_STATUS:
            return None
        asked_s = _asked_s(response.headers.get("retry-after", ""))
        if asked_s is None:
            return min(0.2 * 2.0**attempt, _LONGEST_PAUSE_S)
        return asked_s if asked_s <= _LONGEST_WAIT_S else None

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


def _asked_s(retry_after: str) -> float | None:
    """Seconds that a header `Retry-After` asks for, which is a number or a date; None without."""
    if retry_after.isdigit():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None
