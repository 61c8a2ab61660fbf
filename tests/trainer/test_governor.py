"""Generation is paused while it is far ahead of training, and goes on whatever happens."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime

import httpx
import pytest

from synthrep_shared.client import SynthRep
from synthrep_shared.messages import BatchView, PromptCounts
from synthrep_trainer.governor import Governor
from synthrep_trainer.shard_stream import Pressure


class FakeGenerator:
    """Batches of two data sets, by id; `is_up = False` answers 503."""

    def __init__(self) -> None:
        self.states = {"a": "running", "b": "queued", "c": "paused", "d": "completed"}
        self.gone: set[str] = set()
        self.is_up = True
        self.answer: bytes | None = None
        """Instead of any other one."""
        self.asked: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if not self.is_up:
            return httpx.Response(503)
        if self.answer is not None:
            return httpx.Response(200, content=self.answer)
        if request.method == "GET":
            assert request.url.params["dataset"] == "birds"
            items = [json.loads(self._view(batch)) for batch in self.states]
            return httpx.Response(200, json={"items": items, "next_cursor": None})
        _, _, _, batch, verb = request.url.path.split("/")
        self.asked.append(f"{verb} {batch}")
        if batch in self.gone:
            return httpx.Response(404, json={"title": "Not Found", "status": 404})
        if self.states[batch] != "completed":
            self.states[batch] = "paused" if verb == "pause" else "running"
        return httpx.Response(200, content=self._view(batch))

    def _view(self, batch: str) -> str:
        counts = dict.fromkeys(PromptCounts.model_fields, 0)
        return BatchView(
            id=batch, dataset="birds", state=self.states[batch], prompts=PromptCounts(**counts),
            images_committed=0, images_per_s=None, eta_s=None, created_at=datetime.now(UTC),
        ).model_dump_json()  # fmt: skip


@pytest.fixture
def generator():
    return FakeGenerator()


@pytest.fixture
def stock():
    """What waits to be trained on, in a list of one."""
    return [Pressure(0, is_waiting=False)]


@pytest.fixture
def make_governor(generator, stock, tmp_path):
    client = SynthRep("http://g", retries=0, transport=httpx.MockTransport(generator))

    def make(interval_s=60.0):
        return Governor(
            client, "birds", tmp_path, lambda: stock[0], pause_above=100, interval_s=interval_s
        )

    yield make
    client.close()


def test_batches_are_paused_above_the_bound_and_resumed_at_half_of_it(
    make_governor, generator, stock
):
    governor = make_governor()
    for images, state in [
        (100, "running"), (101, "paused"), (80, "paused"), (51, "paused"), (50, "running"),
        (100, "running"), (101, "paused"),
    ]:  # fmt: skip
        stock[0] = Pressure(images, is_waiting=False)
        governor.look()
        assert generator.states["a"] == state, images
    assert governor.pauses == 2
    assert generator.states["c"] == "paused"
    assert not [asked for asked in generator.asked if asked[-1] in "cd"]


def test_a_batch_that_comes_later_is_paused_too(make_governor, generator, stock):
    governor = make_governor()
    stock[0] = Pressure(101, is_waiting=False)
    governor.look()
    generator.states["e"] = "queued"
    governor.look()
    assert generator.states["e"] == "paused"
    stock[0] = Pressure(0, is_waiting=False)
    governor.look()
    assert {generator.states[batch] for batch in "abe"} == {"running"}


def test_generation_goes_on_while_training_waits(make_governor, generator, stock):
    governor = make_governor()
    stock[0] = Pressure(500, is_waiting=False)
    governor.look()
    stock[0] = Pressure(500, is_waiting=True)
    governor.look()
    assert generator.states["a"] == "running"


def test_generation_goes_on_when_training_ends(make_governor, generator, stock):
    stock[0] = Pressure(500, is_waiting=False)
    with make_governor(interval_s=0.01):
        deadline = time.monotonic() + 20
        while generator.states["a"] != "paused":
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert generator.states["a"] == generator.states["b"] == "running"
    assert generator.states["c"] == "paused"


def test_what_a_killed_process_paused_the_next_one_resumes(make_governor, generator, stock):
    stock[0] = Pressure(500, is_waiting=False)
    make_governor().look()
    assert generator.states["a"] == "paused"
    stock[0] = Pressure(60, is_waiting=False)
    again = make_governor()
    again.look()
    assert generator.states["a"] == "paused"  # above half of the bound
    stock[0] = Pressure(0, is_waiting=False)
    again.look()
    assert generator.states["a"] == generator.states["b"] == "running"
    assert generator.states["c"] == "paused"


def test_a_batch_that_is_gone_keeps_no_other_one_paused(make_governor, generator, stock):
    stock[0] = Pressure(500, is_waiting=False)
    governor = make_governor()
    governor.look()
    generator.gone.add("a")
    stock[0] = Pressure(0, is_waiting=False)
    governor.look()
    assert generator.states["b"] == "running"


def test_a_generator_that_is_down_is_asked_again(make_governor, generator, stock):
    stock[0] = Pressure(500, is_waiting=False)
    governor = make_governor()
    governor.look()
    generator.is_up = False
    stock[0] = Pressure(0, is_waiting=False)
    with governor:
        pass  # leaves with a word in the log
    assert generator.states["a"] == "paused"
    generator.is_up = True
    make_governor().look()
    assert generator.states["a"] == "running"


@pytest.mark.parametrize("answer", [b"<html>log in</html>", b"[]", b'{"items": [{}]}'])
def test_an_answer_that_is_none_ends_neither_governor_nor_run(
    make_governor, generator, stock, answer
):
    stock[0] = Pressure(500, is_waiting=False)
    make_governor().look()
    stock[0] = Pressure(0, is_waiting=False)
    generator.answer = answer
    with make_governor(interval_s=0.01) as governor:
        time.sleep(0.05)
        generator.answer = None
        deadline = time.monotonic() + 20
        while generator.states["a"] != "running":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        stock[0] = Pressure(500, is_waiting=False)
        while generator.states["a"] != "paused":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        generator.answer = answer
    assert governor.pauses > 0
