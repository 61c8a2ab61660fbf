"""However many look at the page, the generator is asked once, and for nothing that is known."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest

from synthrep_shared.errors import ServiceError, ServiceUnavailableError
from synthrep_shared.messages import DatasetView
from synthrep_trainer.page.generator import Generator
from synthrep_trainer.settings import TrainerSettings

URL = "http://generator:8000"
VIEWERS = 8
NOW = "2026-01-01T00:00:00Z"


class Asked:
    """Stands for a generator with three records of one group each, and counts what it is asked."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.status = 200
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.path)
        assert self.gate.wait(60)
        if self.status != 200:
            problem = {"title": "no", "status": self.status, "detail": "not today"}
            return httpx.Response(self.status, json=problem)
        return httpx.Response(200, json=self._answer(request))

    def _answer(self, request: httpx.Request) -> object:
        name = request.url.path.rpartition("/")[2]
        if "/groups/" in request.url.path:
            return {
                "gid": name, "dataset": "birds", "state": "committed", "rejected": False,
                "batch": "b", "index": 0, "images": 1, "caption_id": "00", "shard": "1.tar",
                "seq": 1, "created_at": NOW, "samples": [], "failure": None,
            }  # fmt: skip
        if name == "records":
            after, limit = int(request.url.params["after"]), int(request.url.params["limit"])
            seqs = range(after + 1, after + limit + 1)
            items = [{"seq": n, "kind": "shard", "groups": [{"gid": f"{n:02x}"}]} for n in seqs]
            return {"items": items, "next_cursor": None}
        if name == "queue":
            return {"depth": 0, "running": 0, "backlog_s": 0.0}
        return {"items": [], "next_cursor": None}


@pytest.fixture
def asked():
    return Asked()


@pytest.fixture
def generator(asked):
    made = Generator(TrainerSettings(generator_url=URL), httpx.MockTransport(asked))
    yield made
    made.close()


NONSENSE = ["<html>", "[1]", "{}", '{"items": [1]}', '{"items": null}', "[" * 100_000, "\0"]


@pytest.mark.parametrize("text", NONSENSE)
def test_an_answer_that_is_no_generators_is_none(text):
    def speak(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text=text)

    made = Generator(TrainerSettings(generator_url=URL), httpx.MockTransport(speak))
    for look in (lambda: made.generation(""), lambda: made.groups("", dataset(3), None, 3)):
        with pytest.raises(ServiceError, match="no generator answers there"):
            look()


def test_a_generator_that_stops_answering_is_not_asked_for_every_group(asked):
    def answer(request: httpx.Request) -> httpx.Response:
        asked.status = 503 if "/groups/" in request.url.path else 200
        return asked(request)

    made = Generator(TrainerSettings(generator_url=URL), httpx.MockTransport(answer))
    with pytest.raises(ServiceUnavailableError):
        made.newest_groups("key", dataset(9), 3)
    assert sum("/groups/" in path for path in asked.paths) == 1


@pytest.mark.parametrize(("bound", "value"), [("_MAX_ANSWER_BYTES", 2), ("_ANSWER_S", -1.0)])
def test_an_answer_without_an_end_is_broken_off(bound, value, monkeypatch):
    class Slow(httpx.SyncByteStream):
        closed = False

        def __iter__(self):
            yield from [b" "] * 3

        def close(self):
            self.closed = True

    def speak(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=answer)

    monkeypatch.setattr(f"synthrep_trainer.page.generator.{bound}", value)
    answer = Slow()
    made = Generator(TrainerSettings(generator_url=URL), httpx.MockTransport(speak))
    with pytest.raises(ServiceUnavailableError, match="the answer has no end"):
        made.generation("")
    assert answer.closed


def test_a_key_may_have_any_letters(asked):
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers.raw[-1] == (b"authorization", "Bearer ключ".encode())
        return asked(request)

    made = Generator(TrainerSettings(generator_url=URL), httpx.MockTransport(answer))
    assert made.generation("ключ").queue is not None


def dataset(last_seq: int, rejected: int = 0) -> DatasetView:
    return DatasetView(
        name="birds", shards=last_seq, groups=last_seq, images=last_seq, bytes=1, failures=0,
        rejected=rejected, last_seq=last_seq,
    )  # fmt: skip


@pytest.fixture
def together(asked, monkeypatch):
    """What each of some viewers gets if nothing is answered before all of them have asked."""

    def ask(look):
        left = iter(range(VIEWERS - 2, -1, -1))  # of those who wait, one looks

        class Awaited(Future):
            def result(self, timeout=None):
                if next(left, 0) == 0:
                    asked.gate.set()
                return super().result(timeout)

        monkeypatch.setattr("synthrep_trainer.page.generator.Future", Awaited)
        asked.gate.clear()
        with ThreadPoolExecutor(VIEWERS) as viewers:
            futures = [viewers.submit(look) for _ in range(VIEWERS)]
            return [future.exception() or future.result() for future in futures]

    return ask


def test_viewers_who_ask_at_the_same_time_share_one_look(asked, generator, together):
    found = together(lambda: generator.generation("key"))
    assert all(answer is found[0] for answer in found)
    assert sorted(asked.paths) == ["/v1/batches", "/v1/datasets", "/v1/queue", "/v1/workers"]


def test_viewers_share_a_refusal_and_soon_one_asks_anew(asked, generator, together, monkeypatch):
    asked.status = 401
    found = together(lambda: generator.generation("key"))
    assert all(isinstance(answer, ServiceError) for answer in found)
    before = len(asked.paths)
    assert before < VIEWERS, "one look at a time"
    asked.status = 200
    monkeypatch.setattr("synthrep_trainer.page.generator._FRESH_S", 0.0)
    assert generator.generation("key").queue is not None
    assert len(asked.paths) > before


def test_another_key_gets_an_answer_of_its_own(asked, generator):
    assert generator.generation("ann") is not generator.generation("bob")


def test_a_group_that_is_known_is_not_asked_for_again_unless_one_was_rejected(asked, generator):
    def groups_asked(view):
        before = len(asked.paths)
        generator.newest_groups("key", view, 3)
        return sorted(p.rpartition("/")[2] for p in asked.paths[before:] if "/groups/" in p)

    assert groups_asked(dataset(3)) == ["01", "02", "03"]
    assert groups_asked(dataset(3)) == []
    assert groups_asked(dataset(4)) == ["04"]
    assert groups_asked(dataset(5, rejected=1)) == ["03", "04", "05"]
