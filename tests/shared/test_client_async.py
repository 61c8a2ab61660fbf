"""Both clients do the same: calls, events over broken connections, uploads of labelled sets."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import zipfile
from email.utils import formatdate
from typing import Any

import httpx
import pytest

from synthrep_shared.client import AsyncSynthRep, SynthRep
from synthrep_shared.errors import ServiceError, ServiceUnavailableError, SynthRepError
from synthrep_shared.messages import ProbeSetView, RunView, WorkerView

WORKER = {"name": "w0", "device": "cpu", "state": "idle", "images_per_s": 2.5}
RUN = {
    "id": "r1", "state": "running", "request": {}, "step": 0, "max_steps": 9, "images_seen": 0,
    "loss": None, "generated_per_trained": None, "images_per_s": None,
    "created_at": "2026-01-01T00:00:00Z", "error": None,
}  # fmt: skip
SET = {"name": "mine", "classes": ["cat", "dog"], "splits": ["train", "test"], "metric": "accuracy"}
ONLY_BLOCKING = {"to_webdataset"}


class Caller:
    """Calls a client of one kind, and notes how long it waits between attempts."""

    def __init__(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._is_async, self.pauses = kind == "async", []
        monkeypatch.setattr("synthrep_shared.client_async.asyncio.sleep", self._sleep)

    async def _sleep(self, pause_s: float) -> None:
        self.pauses.append(pause_s)

    def __call__(self, handler: Any, name: str, *arguments: Any, **options: Any) -> Any:
        """What the method answers; of an iterator, everything."""
        transport = httpx.MockTransport(handler)
        settings = {"retries": 3, "transport": transport}
        if self._is_async:
            return asyncio.run(self._ask(settings, name, *arguments, **options))
        with SynthRep(**settings, sleep=self.pauses.append) as client:
            answer = getattr(client, name)(*arguments, **options)
            return list(answer) if inspect.isgenerator(answer) else answer

    async def _ask(self, settings: Any, name: str, *arguments: Any, **options: Any) -> Any:
        async with AsyncSynthRep(**settings) as client:
            answer = getattr(client, name)(*arguments, **options)
            return [item async for item in answer] if inspect.isasyncgen(answer) else await answer


@pytest.fixture(params=["blocking", "async"])
def call(request, monkeypatch):
    return Caller(request.param, monkeypatch)


def stream(*events: tuple[str, Any, str]) -> httpx.Response:
    text = ": connected\r\n\r\n"
    for name, data, event_id in events:
        text += f"event: {name}\r\ndata: {json.dumps(data)}\r\n"
        text += f"id: {event_id}\r\n\r\n" if event_id else "\r\n"
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, text=text)


def test_both_clients_have_the_same_calls():
    def calls(client: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in inspect.getmembers(client, inspect.isfunction)
            if not name.startswith("_") and name not in ONLY_BLOCKING
        }

    assert calls(SynthRep) == calls(AsyncSynthRep)


def test_events_go_on_where_they_broke_off(call):
    asked = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append((request.url.path, request.headers.get("last-event-id")))
        if len(asked) == 1:
            return stream(("metrics", {"step": 1}, "1"), ("news", "of a newer service", ""))
        if len(asked) == 2:
            raise httpx.ConnectError("gone")
        if len(asked) == 3:
            return httpx.Response(503, headers={"retry-after": "7"})
        return stream(("metrics", {"step": 2}, "2"), ("run", RUN, ""),
                      ("run", RUN | {"state": "completed"}, ""))  # fmt: skip

    events = call(handler, "run_events", "r1")
    assert asked == [("/v1/runs/r1/events", place) for place in (None, "1", "1", "1")]
    assert [(e.name, e.id) for e in events] == [
        ("metrics", "1"), ("metrics", "2"), ("run", "2"), ("run", "2"),
    ]  # fmt: skip
    assert events[0].data == {"step": 1}
    assert isinstance(events[-1].data, RunView)
    assert [event.is_last for event in events] == [False, False, False, True]
    assert call.pauses == [0.2, 0.4, 7.0]


def test_an_event_gives_new_patience_and_keeps_its_place(call):
    told = [("metrics", {"step": 1}, "1"), ("run", RUN, ""), ("run", RUN | {"state": "failed"}, "")]
    step, running, failed = map(stream, told)
    answers = [None, None, None, step, None, running, None, failed]
    places = []

    def handler(request: httpx.Request) -> httpx.Response:
        places.append(request.headers.get("last-event-id"))
        answer = answers.pop(0)
        if answer is None:
            raise httpx.ReadTimeout("nothing came")
        return answer

    assert len(call(handler, "run_events", "r1")) == 3
    assert places == [None] * 4 + ["1"] * 4
    assert call.pauses == [0.2, 0.4, 0.8, 0.2, 0.4, 0.2, 0.4]


def test_a_generator_that_tells_nothing_any_more_is_given_up(call):
    asked = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("last-event-id"))
        return stream(("worker", WORKER, "e,birds=3.1")) if len(asked) == 1 else stream()

    with pytest.raises(ServiceUnavailableError, match="the stream of events ended"):
        call(handler, "events", last_event_id="e,birds=2.1")
    assert asked == ["e,birds=2.1", *["e,birds=3.1"] * 3]


def test_what_is_told_is_typed():
    def handler(_: httpx.Request) -> httpx.Response:
        return stream(("worker", WORKER, ""))

    with SynthRep(transport=httpx.MockTransport(handler)) as client:
        events = client.events()
        assert next(events) == ("worker", WorkerView(**WORKER), "")
        events.close()


def test_a_refusal_of_events_is_a_service_error(call):
    problem = {"title": "Not Found", "status": 404, "detail": "there is no such run"}
    with pytest.raises(ServiceError, match="no such run"):
        call(lambda _: httpx.Response(404, json=problem), "run_events", "r9")
    assert call.pauses == []


def test_a_pause_is_as_long_as_the_service_asks(call, monkeypatch):
    monkeypatch.setattr("synthrep_shared.client_calls.time.time", lambda: 1_000_000.0)
    asked = iter(["45", formatdate(1_000_060, usegmt=True), formatdate(999_999, usegmt=True)])

    def handler(_: httpx.Request) -> httpx.Response:
        pause = next(asked, None)
        if pause is None:
            return httpx.Response(200, json=RUN)
        return httpx.Response(503, headers={"retry-after": pause})

    assert call(handler, "run", "r1").id == "r1"
    assert call.pauses == [45.0, 60.0, 0.0]


def test_a_quota_that_frees_tomorrow_is_told_at_once(call):
    answers = []

    def handler(_: httpx.Request) -> httpx.Response:
        answers.append(1)
        return httpx.Response(429, headers={"retry-after": "80000"})

    with pytest.raises(ServiceUnavailableError, match="429"):
        call(handler, "submit", "birds", ["a wren"])
    assert (len(answers), call.pauses) == (1, [])


@pytest.fixture
def folder(tmp_path):
    for name in ("cat/1.jpg", "cat/2.JPG", "dog/1.png", "dog/.hidden.jpg", "dog/notes.txt",
                 ".git/x/1.jpg"):  # fmt: skip
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "mine"


def test_a_folder_is_sent_as_a_zip_again_and_again(call, folder, monkeypatch, tmp_path):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    bodies = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(request.content)
        assert dict(request.url.params) == {"name": "mine"}
        assert request.headers["content-type"] == "application/zip"
        if len(bodies) == 1:
            return httpx.Response(429, headers={"retry-after": "1"})
        return httpx.Response(201, json=SET)

    assert call(handler, "add_probe_dataset", "mine", folder) == ProbeSetView(**SET)
    assert bodies[0] == bodies[1]
    with zipfile.ZipFile(io.BytesIO(bodies[0])) as archive:
        assert archive.namelist() == ["cat/1.jpg", "cat/2.JPG", "dog/1.png"]
        assert archive.read("dog/1.png") == b"dog/1.png"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_zip_is_sent_as_it_is(call, tmp_path):
    (tmp_path / "mine.zip").write_bytes(b"PK...")
    seen = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.content)
        return httpx.Response(201, json=SET)

    assert call(handler, "add_probe_dataset", "mine", tmp_path / "mine.zip").name == "mine"
    assert seen == [b"PK..."]


def test_what_cannot_be_sent_is_told_before_anything_is(call, tmp_path):
    def handler(_: httpx.Request) -> httpx.Response:
        pytest.fail("something was sent")

    with pytest.raises(FileNotFoundError):
        call(handler, "add_probe_dataset", "mine", tmp_path / "absent.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SynthRepError, match="holds no images"):
        call(handler, "add_probe_dataset", "mine", tmp_path / "empty")


def test_a_folder_of_the_server_is_only_named(call):
    sent = []

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return httpx.Response(201, json=SET)

    assert call(handler, "link_probe_dataset", "mine", "/data/mine").splits == ["train", "test"]
    assert sent == [{"name": "mine", "folder": "/data/mine"}]


def test_labelled_sets_are_listed_to_the_end(call):
    def handler(request: httpx.Request) -> httpx.Response:
        cursor = request.url.params.get("cursor")
        items = [SET | {"name": cursor or "first"}]
        return httpx.Response(200, json={"items": items, "next_cursor": None if cursor else "z"})

    assert [s["name"] for s in call(handler, "probe_datasets")] == ["first", "z"]
