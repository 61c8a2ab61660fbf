"""Hands in prompts over REST all the time, and keeps the answers: what was promised to whom."""

from __future__ import annotations

import random
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

DATASETS = ("birds", "fish")
_POISON = {"refuse": 4.0, "blank": 3.0, "raise": 1.0, "crash": 1.0, "hang": 0.5}
_POISONED = 0.12  # share of the batches
_BY_UPLOAD = 0.2
_TWICE = 0.1
_PAUSE_S = 0.5
_RETRY_S = 0.1
_TIMEOUT_S = 5.0
_MAX_OUTSTANDING = 250
_TRY_LATER = (429, 500, 503, 507)


@dataclass(frozen=True)
class Receipt:
    """A batch that was answered 202."""

    dataset: str
    batch: str
    num_prompts: int


class Load(threading.Thread):
    """Submits until `finish`; repeats a request until it is answered 202."""

    def __init__(self, url: str, rng: random.Random, outstanding: Callable[[int], int]) -> None:
        super().__init__(daemon=True)
        self._url, self._rng, self._outstanding = url, rng, outstanding
        self._poison = deque(rng.sample(sorted(_POISON), len(_POISON)))  # each kind at least once
        self._wanted = threading.Event()
        self._is_finishing = threading.Event()
        self._count = 0
        self.receipts: list[Receipt] = []
        self.answers: Counter[str] = Counter()
        self.error: str | None = None

    @property
    def accepted(self) -> int:
        """Prompts that were promised."""
        return sum(receipt.num_prompts for receipt in self.receipts)

    def burst(self) -> None:
        """Submit a large batch now."""
        self._wanted.set()

    def finish(self) -> None:
        """Submit nothing more; the request at hand is repeated until it is answered."""
        self._is_finishing.set()
        self._wanted.set()

    def run(self) -> None:
        """The thread: see the class."""
        try:
            with httpx.Client(base_url=self._url, timeout=_TIMEOUT_S) as http:
                while not self._is_finishing.is_set():
                    if self._outstanding(self.accepted) < _MAX_OUTSTANDING:
                        self._submit(http, is_large=self._wanted.is_set())
                    if not self._is_finishing.is_set():
                        self._wanted.clear()
                        self._wanted.wait(_PAUSE_S * self._rng.uniform(0.5, 1.5))
        except Exception as error:
            self.error = repr(error)
            raise

    def _submit(self, http: httpx.Client, *, is_large: bool) -> None:
        prompts = self._prompts(self._rng.randint(12, 24) if is_large else self._rng.randint(1, 9))
        settings: dict[str, Any] = {
            "dataset": DATASETS[self._rng.random() < 0.2],
            "images_per_prompt": self._rng.randint(2, 4),
            "priority": self._rng.randint(0, 9),
        }
        request = self._by_upload if self._rng.random() < _BY_UPLOAD else self._by_json
        headers = {"idempotency-key": f"request-{self._count}"}
        self._count += 1
        answer = self._send(http, request(prompts, settings), headers)
        if self._rng.random() < _TWICE:
            again = self._send(http, request(prompts, settings), headers)
            if again["id"] != answer["id"]:
                raise AssertionError(f"one request became two batches: {answer}, {again}")
        if answer["prompts_accepted"] != len(prompts):
            raise AssertionError(f"{len(prompts)} prompts were sent: {answer}")
        self.receipts.append(Receipt(settings["dataset"], answer["id"], len(prompts)))

    def _prompts(self, count: int) -> list[str]:
        prompts = [f"batch {self._count} bird {i}" for i in range(count)]
        if self._poison or self._rng.random() < _POISONED:
            kinds, weights = zip(*_POISON.items(), strict=True)
            (kind,) = self._rng.choices(kinds, weights)
            if self._poison:
                kind = self._poison.popleft()
            prompts[self._rng.randrange(count)] += f" [fake:{kind}]"
        return prompts

    @staticmethod
    def _by_json(prompts: list[str], settings: dict[str, Any]) -> dict[str, Any]:
        return {"url": "/v1/batches", "json": {"prompts": prompts, **settings}}

    @staticmethod
    def _by_upload(prompts: list[str], settings: dict[str, Any]) -> dict[str, Any]:
        text = {"content": "\n".join(prompts), "params": settings}
        return {"url": "/v1/batches/upload", **text}

    def _send(
        self, http: httpx.Client, request: dict[str, Any], headers: dict[str, str]
    ) -> dict[str, Any]:
        if "content" in request:
            headers = headers | {"content-type": "text/plain"}
        while True:
            try:
                response = http.post(**request, headers=headers)
            except httpx.TransportError:
                self.answers["none"] += 1
            else:
                self.answers[str(response.status_code)] += 1
                if response.status_code == 202:
                    answer: dict[str, Any] = response.json()
                    return answer
                if response.status_code not in _TRY_LATER:
                    raise AssertionError(f"{response.status_code} {response.text[:300]}")
            threading.Event().wait(_RETRY_S)
