"""What both clients do alike with server-sent events: reading them, and going on after a break."""

from __future__ import annotations

from typing import Any, NamedTuple

import httpx
from httpx_sse import ServerSentEvent
from pydantic import BaseModel

from synthrep_shared.messages import BatchView, RunView, ShardEvent, WorkerView

SILENCE_S = 60.0  # services say something every 15
_MODELS: dict[str, type[BaseModel]] = {
    "batch": BatchView, "shard": ShardEvent, "worker": WorkerView, "run": RunView,
}  # fmt: skip
_GOES_ON = ("queued", "running")


class Event(NamedTuple):
    """Something that changed, and what it is now."""

    name: str
    """`batch`, `shard` or `worker` of the generator; `run` or `metrics` of a run."""
    data: Any
    """A BatchView, ShardEvent, WorkerView or RunView; of `metrics` the numbers of a step."""
    id: str
    """Where to go on after this one, for `last_event_id`."""

    @property
    def is_last(self) -> bool:
        """Whether nothing comes after it: a run that works no more."""
        return isinstance(self.data, RunView) and self.data.state not in _GOES_ON


class Listening:
    """How far a listener has come; one for each call of the clients."""

    def __init__(self, last_event_id: str | None, timeout_s: float) -> None:
        self.attempt = 0
        """Connections in a row that told nothing."""
        self._id = last_event_id or ""
        self._timeout = httpx.Timeout(timeout_s, read=SILENCE_S)

    def options(self) -> dict[str, Any]:
        """How to connect, so that the events begin where they broke off."""
        headers = {"accept": "text/event-stream", "cache-control": "no-store"}
        if self._id:
            headers["last-event-id"] = self._id
        return {"headers": headers, "timeout": self._timeout}

    def read(self, told: ServerSentEvent) -> Event | None:
        """The event; None for one that only a newer client knows."""
        self.attempt, self._id = 0, told.id or self._id
        model = _MODELS.get(told.event)
        if model is not None:
            return Event(told.event, model.model_validate_json(told.data), self._id)
        return Event(told.event, told.json(), self._id) if told.event == "metrics" else None
