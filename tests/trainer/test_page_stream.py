"""What an open page is sent, and when that ends."""

from __future__ import annotations

from contextlib import aclosing

import anyio

from synthrep_shared.keys import OPEN
from synthrep_shared.messages import RunRequest
from synthrep_trainer.context import Context
from synthrep_trainer.page import routes, sections
from synthrep_trainer.page.door import Keys
from synthrep_trainer.page.generator import Generator
from synthrep_trainer.page.sections import PARTS, Choice, Viewer

from .pages import Page

NOTHING_CHOSEN = Choice()


def follow(page: Page, num_rounds: int, choice: Choice = NOTHING_CHOSEN) -> list[list[str]]:
    """Names of what the stream sends, a list for each look."""

    async def collect() -> list[list[str]]:
        context = Context(page.settings, page.place)
        viewer = Viewer(context, Generator(page.settings, page.transport), OPEN, Keys("", ""))
        rounds: list[list[str]] = []
        async with aclosing(routes.events(viewer, choice)) as stream:
            async for event in stream:
                if event.event == "clock":
                    if len(rounds) == num_rounds:
                        return rounds
                    rounds.append([])
                    if len(rounds) == num_rounds:
                        page.place.submit_run(
                            RunRequest(dataset="birds", max_steps=30), owner="ann"
                        )
                else:
                    rounds[-1].append(event.event)
        raise AssertionError("the stream ended")

    return anyio.run(collect)


def test_a_damaged_run_hides_no_other_and_ends_no_stream(page, monkeypatch):
    monkeypatch.setattr(routes, "_PAUSE_S", 0.0)
    old, new = (
        page.place.submit_run(RunRequest(dataset="birds", max_steps=30), owner="ann")
        for _ in range(2)
    )
    new.metrics.write_bytes(b"{\n")
    assert old.id[:15] in page.get("/")
    assert page.browser.get("/v1/runs").json()["items"][0]["id"] == old.id
    first, _ = follow(page, 2, Choice(run=new.id))
    assert "probes" in first


def test_the_stream_ends_with_the_server(page, monkeypatch):
    monkeypatch.setattr(routes, "_PAUSE_S", 0.0)
    looks = iter([False, False, True])
    context = Context(page.settings, page.place, lambda: next(looks))
    viewer = Viewer(context, Generator(page.settings, page.transport), OPEN, Keys("", ""))

    async def collect() -> list[str | None]:
        return [event.event async for event in routes.events(viewer, Choice())]

    assert anyio.run(collect).count("clock") == 2


def test_the_stream_sends_what_has_changed(page, monkeypatch):
    monkeypatch.setattr(routes, "_PAUSE_S", 0.0)
    monkeypatch.setattr(sections, "_free_bytes", lambda context: None)
    first, second, third = follow(page, 3)
    assert first == list(PARTS)
    assert second == []
    assert {"overview", "runs"} <= set(third)
    assert "images" not in third
