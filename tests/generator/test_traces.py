"""A prompt can be followed by the ids that the API, the worker and its traces name."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.testclient import TestClient

from synthrep_generator import api, supervisor
from synthrep_generator.chunks import Chunk, Place, chunk_from_places
from synthrep_generator.pipe import Finished
from synthrep_generator.settings import GeneratorSettings
from synthrep_generator.supervisor import Stopped, Supervisor
from synthrep_shared.tracing import CALLER

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"


@dataclass
class Recorded:
    """A tracer that keeps what it is told, and whose request it was."""

    is_on = True
    spans: list[dict[str, Any]] = field(default_factory=list)

    def record(self, name: str, **facts: Any) -> None:
        self.spans.append({"name": name, "caller": CALLER.get(), **facts})


@pytest.fixture
def tracer(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    made = Recorded()
    for module in (api, supervisor):
        monkeypatch.setattr(module, "make_tracer", lambda _: made)
    return made


def test_an_accepted_batch_begins_a_trace_and_is_logged_by_its_id(
    root: Any, backlog: Any, tracer: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "synthrep_generator.admission")
    body = {"dataset": "pets", "prompts": ["a dog", "a cat"]}
    headers = {"traceparent": PARENT, "idempotency-key": "once"}
    with TestClient(api.create_app(GeneratorSettings(root=root), backlog)) as client:
        first, again = (client.post("/v1/batches", json=body, headers=headers) for _ in range(2))
        refused = client.post("/v1/batches", json=body | {"prompts": []})
    assert first.json() == again.json()
    assert refused.status_code == 422
    (span,) = tracer.spans
    assert span["name"] == "accept batch"
    assert span["is_root"]
    assert span["about"] == span["batch"] == first.json()["id"]
    assert (span["dataset"], span["prompts"], span["caller"]) == ("pets", 2, PARENT)
    (record,) = [r for r in caplog.records if r.name == "synthrep_generator.admission"]
    assert (record.message, record.batch) == ("batch accepted", span["batch"])  # type: ignore[attr-defined]
    assert "dog" not in json.dumps(record.__dict__, default=str)


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_lies_in_the_trace_of_its_first_batch_and_links_the_others(
    tracer: Recorded, monkeypatch: pytest.MonkeyPatch, is_finished: bool
) -> None:
    finished = Finished(
        chunk_id="c", committed=2, failed=1, images=4, filtered={}, stopped=False, device_s=0.1,
        grown_bytes=0,
    )  # fmt: skip
    outcome = finished if is_finished else Stopped()
    monkeypatch.setattr(Supervisor, "_run", lambda *_: outcome)
    places = [Place(batch, i) for batch in ("b1", "b2", "b1") for i in range(2)]
    chunk: Chunk = chunk_from_places("pets", places)
    Supervisor(GeneratorSettings()).run(chunk, lambda: None)
    (span,) = tracer.spans
    assert (span["name"], span["about"], span["links"]) == ("run chunk", "b1", ["b2"])
    assert (span["chunk"], span["dataset"]) == (chunk.id, "pets")
    assert span["end"] == ("finished" if is_finished else "stopped")
    assert span.get("images") == (4 if is_finished else None)


def test_a_chunk_is_named_with_the_batches_of_its_prompts() -> None:
    chunk = chunk_from_places("pets", [Place("b2", 0), Place("b1", 3), Place("b2", 1)])
    assert chunk.names == {"chunk": chunk.id, "dataset": "pets", "batches": ["b2", "b1"]}
