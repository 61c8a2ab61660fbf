"""The page in front of a real generator's API."""

from __future__ import annotations

import html
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from starlette.testclient import TestClient

from synthrep_generator.api import create_app as create_generator
from synthrep_generator.settings import GeneratorSettings
from synthrep_shared.keys import OPEN
from synthrep_shared.messages import ProbeRequest, RunRequest
from synthrep_trainer.api import create_app
from synthrep_trainer.context import Context
from synthrep_trainer.feature_maps import write_feature_map
from synthrep_trainer.metrics import MetricsWriter, StepMetrics
from synthrep_trainer.page import routes, sections
from synthrep_trainer.page.door import Keys
from synthrep_trainer.page.generator import Generator
from synthrep_trainer.page.routes import STATIC
from synthrep_trainer.page.sections import PARTS, Choice, Viewer
from synthrep_trainer.records import Status
from synthrep_trainer.runs import Workplace, locked
from synthrep_trainer.settings import TrainerSettings

from .conftest import ShardMaker
from .test_page_feature_map import THREE

URL = "http://generator:8000"
BY_PAGE = {"hx-request": "true"}
KEY = "a key: with +signs, ключ"


def transport_to(service: TestClient) -> httpx.MockTransport:
    """Carries requests of the page's client to an app in this process."""

    def ask(request: httpx.Request) -> httpx.Response:
        answer = service.request(
            request.method,
            str(request.url),
            headers=request.headers.raw,
            content=request.content,
        )
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    return httpx.MockTransport(ask)


def no_answer(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("connection refused", request=request)


class Page:
    """A trainer's page and the generator that it asks."""

    def __init__(
        self, folder: Path, transport: httpx.MockTransport | None = None, **settings: Any
    ) -> None:
        self.root = folder / "data"
        self.root.mkdir()
        keys = settings.get("api_keys", [])
        generator = {"root": self.root, "api_keys": keys, "redis_url": "redis://127.0.0.1:1/0"}
        self.generator = TestClient(
            create_generator(GeneratorSettings.model_validate(generator)), base_url=URL
        )
        self.place = Workplace(folder / "runs")
        trainer = {
            "root": self.root, "runs": self.place.root, "generator_url": URL,
        }  # fmt: skip
        self.settings = TrainerSettings.model_validate(trainer | settings)
        self.transport = transport or transport_to(self.generator)
        self.browser = TestClient(create_app(self.settings, generator=self.transport))

    def get(self, path: str) -> str:
        answer = self.browser.get(path)
        assert answer.status_code == 200, answer.text
        return html.unescape(answer.text)

    def post(self, path: str, **fields: Any) -> Any:
        return self.browser.post(f"/page/{path}", data=fields, headers=BY_PAGE)


@pytest.fixture
def make_page(tmp_path: Path) -> Iterator[Callable[..., Page]]:
    made: list[Page] = []

    def make(**settings: Any) -> Page:
        made.append(Page(tmp_path, **settings))
        return made[-1]

    yield make
    for page in made:
        page.browser.close()
        page.generator.close()


@pytest.fixture
def page(make_page: Callable[..., Page]) -> Page:
    return make_page()


def write_steps(page: Page, run: str, count: int) -> None:
    folder = page.place.run(run)
    assert folder is not None
    writer = MetricsWriter(folder.metrics, step=0)
    for step in range(1, count + 1):
        writer.write(
            StepMetrics(
                step=step, time="2026-01-01T00:00:00Z", loss=5 / step, lr=1e-3, gradient_norm=1,
                effective_rank=step if step % 10 == 0 else None, images_seen=step,
                images_per_s=2, wait_s=0, images_committed=7, generated_per_trained=7 / step,
                shards_quarantined=0,
            )
        )  # fmt: skip
    writer.close()


def test_an_empty_service_shows_where_to_begin(page):
    text = page.get("/")
    assert "No run yet" in text
    assert "No data set yet" in text
    assert "No probe yet" in text
    assert "Redis does not answer" in text


def test_everything_that_the_page_loads_is_its_own(page):
    text = page.get("/")
    loaded = re.findall(r"""(?:src|href)="([^"#]+)""", text)
    assert {path for path in loaded if path != "/"} == {f"/page/static/{name}" for name in STATIC}
    for name, media_type in STATIC.items():
        answer = page.browser.get(f"/page/static/{name}")
        assert answer.headers["content-type"].startswith(media_type)
        known = {"if-none-match": answer.headers["etag"]}
        again = page.browser.get(f"/page/static/{name}", headers=known)
        assert (again.status_code, again.content) == (304, b"")
    policy = page.browser.get("/").headers["content-security-policy"]
    assert "unsafe" not in policy
    assert not re.search(r"\sstyle=|<script>|<style", text)


def test_groups_come_newest_first_a_page_at_a_time(page):
    maker = ShardMaker(page.root)
    for _ in range(5):
        maker.commit(3)
    maker.reject()
    seen, path = [], "/page/parts/images"
    while path:
        text = page.get(path)
        seen.append(re.findall(r"bird number (\d+)", text))
        older = re.search(r'href="/\?([^"]*)#images">Older', text)
        path = older and f"/page/parts/images?{older[1]}"
    assert [len(numbers) for numbers in seen] == [12, 3]
    assert [int(number) for numbers in seen for number in numbers] == list(range(14, -1, -1))


def test_many_data_sets_are_picked_from_a_list(page):
    for number in range(7):
        ShardMaker(page.root, f"birds-{number}").commit(1, captions=[f"a bird of {number}"])
    text = page.get("/?dataset=birds-3")
    assert "<option selected>birds-3</option>" in text
    assert "a bird of 3" in text
    assert 'aria-label="Data sets"' not in text


def test_a_long_log_is_read_a_page_at_a_time(page, monkeypatch):
    monkeypatch.setattr("synthrep_trainer.page.generator._RECORDS_AT_ONCE", 2)
    maker = ShardMaker(page.root)
    maker.commit(1)
    for _ in range(12):
        maker.reject()
    first = page.get("/page/parts/images")
    assert "bird number" not in first
    older = re.search(r'href="/\?([^"]*)#images">Older', first)
    assert older, "the groups behind the rejections can be reached"
    assert "bird number 0" in page.get(f"/page/parts/images?{older[1]}")


def test_a_group_shows_provenance_images_and_is_rejected(page):
    record = ShardMaker(page.root).commit(1, captions=["a <b>red</b> bird"])
    gid = record.groups[0].gid
    text = page.browser.get(f"/page/groups/{gid}").text
    assert "a &lt;b&gt;red&lt;/b&gt; bird" in text
    assert record.name in text
    image = page.browser.get(f"/page/groups/{gid}/images/0")
    assert image.headers["content-type"] == "image/jpeg"
    assert f"{URL}/v1/groups/{gid}/reject" in text
    assert "Rejected" in page.post(f"groups/{gid}/reject").text
    assert page.generator.get(f"/v1/groups/{gid}").json()["rejected"]
    assert "· rejected" in page.get("/page/parts/images")


@pytest.mark.parametrize("status", [200, 302])
def test_what_is_no_image_is_not_kept_as_one(make_page, status):
    def speak(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, text="<html>", headers={"location": "http://elsewhere/"})

    answer = make_page(transport=httpx.MockTransport(speak)).browser.get("/page/groups/00/images/0")
    assert answer.status_code == 502
    assert answer.headers["cache-control"] == "no-store"


def test_captions_are_handed_in(page):
    answer = page.post("batches", dataset="birds", prompts="a bird\n\n two birds ", seed="")
    assert "2 captions accepted" in answer.text
    (batch,) = page.generator.get("/v1/batches").json()["items"]
    assert (batch["dataset"], batch["prompts"]["accepted"]) == ("birds", 2)


def test_a_refused_form_says_why_with_the_status_of_the_api(page):
    answer = page.post("batches", dataset="Birds!", prompts="a bird")
    assert answer.status_code == 422
    assert "dataset" in answer.text
    answer = page.post("batches", dataset="birds", prompts="a bird", model="absent")
    assert answer.status_code == 422
    assert 'role="alert"' in answer.text
    assert page.post("probes", run_id="none", dataset="digits").status_code == 422
    assert page.post("runs", dataset="birds", max_steps="soon").status_code == 422


def test_a_full_disk_is_a_sentence(page, monkeypatch):
    def fail(*_args: Any, **_settings: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("synthrep_trainer.runs.publish_bytes", fail)
    answer = page.post("runs", dataset="birds", max_steps="30")
    assert answer.status_code == 503
    assert "<p>the storage does not answer</p>" in answer.text


@pytest.mark.parametrize("body", [b"\xff", b"a=1&" * 101])
def test_what_is_no_form_is_refused(page, body):
    for path in ("session", "runs", "preview/runs"):
        answer = page.browser.post(f"/page/{path}", content=body, headers=BY_PAGE)
        assert answer.status_code == 422
        assert "not a form" in answer.text


def test_a_run_is_started_shown_stopped_and_resumed(page):
    assert "is queued" in page.post("runs", dataset="birds", max_steps="30").text
    (folder,) = page.place.runs()
    assert folder.record.request.max_steps == 30
    assert "No step yet" in page.get("/")
    write_steps(page, folder.id, 20)
    text = page.get("/page/parts/runs")
    assert "Loss from step 1 to 20: between 0.25 and 5, now 0.25" in text
    assert "Effective rank from step 10 to 20" in text
    assert "Learning rate" in text
    answer = page.post(f"runs/{folder.id}/stop").text
    assert "stops when" in answer
    assert f"curl -X POST http://testserver/v1/runs/{folder.id}/stop" in answer
    assert "paused" in page.get("/page/parts/runs")
    assert "goes on" in page.post(f"runs/{folder.id}/resume").text
    assert "queued" in page.get("/page/parts/runs")
    assert page.post(f"runs/{folder.id}/delete").status_code == 404


def test_a_long_run_is_thinned_and_keeps_its_effective_ranks(page):
    page.post("runs", dataset="birds", max_steps="9000")
    (folder,) = page.place.runs()
    write_steps(page, folder.id, 4321)
    text = page.get("/page/parts/runs")
    assert "Effective rank from step 30 to 4320" in text
    points = re.findall(r'points="([^"]+)"', text)
    assert max(len(line.split()) for line in points) <= 201


def test_a_form_shows_its_curl_command(page):
    text = html.unescape(page.post("preview/batches", dataset="d", prompts="it's a bird").text)
    assert f"curl -X POST {URL}/v1/batches" in text
    assert """'{"dataset": "d", "prompts": ["it'"'"'s a bird"]}'""" in text
    text = page.post("preview/runs", dataset="d", max_steps="3").text
    assert "curl -X POST http://testserver/v1/runs" in text
    assert "Not complete yet" in page.post("preview/batches", dataset="d").text


def test_another_site_cannot_act_for_the_reader(page):
    fields = {"dataset": "birds", "max_steps": "30"}
    assert page.browser.post("/page/runs", data=fields).status_code == 403
    assert page.place.runs() == []


def test_a_generator_that_is_gone_takes_only_its_parts_away(make_page):
    page = make_page(generator_url=None)
    assert "SYNTHREP_TRAINER_GENERATOR_URL" in page.get("/")
    assert "is queued" in page.post("runs", dataset="birds", max_steps="30").text
    assert page.browser.get("/page/groups/00").status_code == 422


def test_the_key_is_asked_for_and_kept_from_scripts(make_page):
    page = make_page(api_keys=[{"name": "ann", "key": KEY}])
    assert 'name="key"' in page.get("/")
    assert page.browser.get("/page/parts/runs").status_code == 401
    page.post("session", key="wrong")
    assert "not one of the service" in page.get("/")
    answer = page.post("session", key=KEY)
    assert answer.headers["hx-redirect"] == "/"
    for cookie in answer.headers.get_list("set-cookie"):
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert KEY not in cookie
    assert "No run yet" in page.get("/")
    assert "2 captions accepted" in page.post("batches", dataset="birds", prompts="a\nb").text
    assert page.browser.get("/v1/runs").status_code == 401, "the API takes no cookie"
    page.post("session")
    assert 'name="key"' in page.get("/")


def test_the_viewer_sees_and_does_what_the_key_allows(make_page):
    keys = [
        {"name": "ann", "key": "ann", "scopes": ["read", "submit"]},
        {"name": "bob", "key": "bob", "scopes": ["read", "submit"]},
        {"name": "eve", "key": "eve", "scopes": ["read"]},
    ]
    page = make_page(api_keys=keys)
    page.post("session", key="ann")
    page.post("runs", dataset="birds", max_steps="30")
    page.post("batches", dataset="birds", prompts="a bird")
    (folder,) = page.place.runs()
    assert folder.id[:15] in page.get("/")
    assert "1 of" not in page.get("/page/parts/overview")
    assert "birds" in page.get("/page/parts/overview")
    page.post("session", key="bob")
    assert folder.id[:15] not in page.get("/")
    assert "birds" not in page.get("/page/parts/overview")
    assert page.post(f"runs/{folder.id}/stop").status_code == 404
    page.post("session", key="eve")
    assert "batches-form" not in page.get("/")
    assert page.post("runs", dataset="birds", max_steps="30").status_code == 403


def test_a_map_shows_no_captions_that_the_generator_keeps_from_the_viewer(make_page):
    scopes = ["read", "submit"]
    page = make_page(
        api_keys=[{"name": name, "key": name, "scopes": scopes} for name in ("ann", "bob")]
    )
    page.post("session", key="ann")
    page.post("batches", dataset="birds", prompts="a bird")
    for name, is_shown in (("ann", True), ("bob", False)):
        run = page.place.submit_run(RunRequest(dataset="birds", max_steps=30), owner=name)
        write_feature_map(run.path, THREE)
        page.post("session", key=name)
        assert ("a jay" in page.get("/page/parts/map")) == is_shown
        assert ("a tit" in page.get("/page/groups/00/neighbours")) == is_shown
    assert "does not show birds" in page.get("/page/parts/map")


def test_a_generator_with_another_key_gets_that_one(tmp_path):
    page = Page(tmp_path, api_keys=[{"name": "ann", "key": "ann"}])
    other = [{"name": "ann", "key": "other"}]
    settings = GeneratorSettings.model_validate({"root": page.root, "api_keys": other})
    with TestClient(create_generator(settings), base_url=URL) as generator:
        trainer = TrainerSettings.model_validate(
            {"root": page.root, "runs": tmp_path / "runs", "generator_url": URL,
             "api_keys": [{"name": "ann", "key": "ann"}]}
        )  # fmt: skip
        with TestClient(create_app(trainer, generator=transport_to(generator))) as browser:
            browser.post("/page/session", data={"key": "ann"}, headers=BY_PAGE)
            assert "does not know this key" in browser.get("/page/parts/overview").text
            keys = {"key": "ann", "generator_key": "other"}
            browser.post("/page/session", data=keys, headers=BY_PAGE)
            assert "does not know" not in browser.get("/page/parts/overview").text


def test_an_open_trainer_asks_for_the_key_of_its_generator(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    keys = [{"name": "ann", "key": "ann"}]
    generator = GeneratorSettings.model_validate({"root": root, "api_keys": keys})
    trainer = TrainerSettings(root=root, runs=tmp_path / "runs", generator_url=URL)
    with (
        TestClient(create_generator(generator), base_url=URL) as service,
        TestClient(create_app(trainer, generator=transport_to(service))) as browser,
    ):
        assert 'href="/page/session"' in browser.get("/").text
        form = browser.get("/page/session").text
        assert 'name="generator_key"' in form
        assert 'name="key"' not in form
        browser.post("/page/session", data={"generator_key": "ann"}, headers=BY_PAGE)
        text = browser.get("/").text
        assert "does not know" not in text
        assert "Sign out" in text


def test_an_expired_key_leads_back_to_the_question_for_it(make_page):
    page = make_page(api_keys=[{"name": "ann", "key": KEY}])
    answer = page.post("batches", dataset="birds", prompts="a bird")
    assert (answer.status_code, answer.headers["hx-redirect"]) == (401, "/")
    assert "hx-redirect" not in page.browser.get("/v1/runs").headers


def test_another_site_cannot_sign_a_reader_in(page):
    assert page.browser.post("/page/session", data={"key": "theirs"}).status_code == 403
    assert not page.browser.cookies


def test_probes_are_those_of_the_run_that_is_shown(page):
    for _ in range(2):
        page.post("runs", dataset="birds", max_steps="30")
    older, newer = page.place.runs()
    probe = page.place.submit_probe(ProbeRequest(run_id=older.id, dataset="digits"))
    assert "No probe yet of this run" in page.get("/page/parts/probes")
    assert f"probe-{probe.id}" not in page.get("/page/parts/probes")
    assert f"probe-{probe.id}" in page.get(f"/page/parts/probes?run={older.id}")
    path = f"runs/{newer.id}/checkpoints/step-000000010"
    probe = page.place.submit_probe(ProbeRequest(checkpoint=path, dataset="digits"))
    assert f"probe-{probe.id}" in page.get("/page/parts/probes")


def test_a_run_that_waits_says_for_what(page):
    page.post("runs", dataset="birds", max_steps="30")
    (folder,) = page.place.runs()
    folder.write_status(Status(state="running"))
    with locked(folder.lease):
        assert "No step yet: the run starts." in page.get("/page/parts/runs")
        folder.waiting.write_text("captions: 16 of 64 are there")
        text = page.get("/page/parts/runs")
        assert "No step yet: the run waits for captions: 16 of 64 are there." in text
        write_steps(page, folder.id, 20)
        assert "The run waits for captions: 16 of 64" in page.get("/page/parts/runs")


def test_a_generator_that_does_not_answer_takes_only_its_parts_away(make_page):
    page = make_page(transport=httpx.MockTransport(no_answer))
    page.post("runs", dataset="birds", max_steps="30")
    text = page.get("/")
    assert "is the service running?" in text
    assert "No step yet" in text
    answer = page.post("batches", dataset="birds", prompts="a bird")
    assert answer.status_code == 503
    assert "is the service running?" in answer.text


def test_a_generator_that_does_not_answer_is_asked_once_for_all_parts(make_page, monkeypatch):
    monkeypatch.setattr("synthrep_trainer.page.generator._FRESH_S", 60.0)
    asked: list[str] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        return no_answer(request)

    make_page(transport=httpx.MockTransport(refuse)).get("/")
    assert asked == ["/v1/datasets"]


def test_a_page_that_is_not_there_says_so_on_a_page(page):
    answer = page.browser.get("/?run=absent")
    assert answer.status_code == 404
    assert "<!doctype html>" in answer.text
    assert 'href="/"' in answer.text


def test_who_waits_for_the_generator_keeps_nobody_from_the_api(make_page):
    gate, asked = threading.Event(), threading.Semaphore(0)

    def wait(request: httpx.Request) -> httpx.Response:
        asked.release()
        gate.wait()
        return no_answer(request)

    async def look() -> int:
        app = create_app(page.settings, generator=httpx.MockTransport(wait))
        browser = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://trainer")
        async with browser, anyio.create_task_group() as viewers:
            try:
                for _ in range(50):  # the API has 40 threads
                    viewers.start_soon(browser.get, "/page/groups/00")
                while not asked.acquire(blocking=False):
                    await anyio.sleep(0.001)
                with anyio.fail_after(20):
                    return (await browser.get("/v1/runs")).status_code
            finally:
                gate.set()

    page = make_page()
    assert anyio.run(look) == 200


NOTHING_CHOSEN = Choice()
HOSTILE = """<script>alert("1")</script>' onload='x"""


def test_captions_and_errors_are_text_wherever_they_show(page):
    record = ShardMaker(page.root).commit(1, captions=[HOSTILE])
    gid = record.groups[0].gid
    page.post("runs", dataset="birds", max_steps="30")
    (folder,) = page.place.runs()
    folder.write_status(Status(state="failed", error=HOSTILE))
    shown = [
        page.browser.get("/").text,
        page.browser.get(f"/page/groups/{gid}").text,
        page.post("preview/batches", dataset="birds", prompts=HOSTILE).text,
        page.post("batches", dataset=HOSTILE, prompts="a bird").text,
        page.post("probes", run_id=HOSTILE, dataset="digits").text,
        page.browser.get("/", params={"run": HOSTILE}).text,
        page.browser.get("/", params={"dataset": HOSTILE}).text,
    ]
    for text in shown:
        assert "<script>" not in text
        assert "' onload='" not in text
    assert all("alert(" in text for text in shown[:3])
    assert "failed: &lt;script&gt;" in shown[0]


def test_one_look_lists_the_runs_once(page, monkeypatch):
    page.post("runs", dataset="birds", max_steps="30")
    listed: list[Workplace] = []
    real = Workplace.runs
    monkeypatch.setattr(Workplace, "runs", lambda self: listed.append(self) or real(self))
    assert "queued" in page.get("/")
    assert len(listed) == 1


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
