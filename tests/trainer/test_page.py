"""What the page shows of a real generator's API and of runs, and what its forms do."""

from __future__ import annotations

import html
import re
import threading
from typing import Any

import anyio
import httpx
import pytest

from synthrep_shared.messages import ProbeRequest
from synthrep_trainer.api import create_app
from synthrep_trainer.metrics import MetricsWriter, StepMetrics
from synthrep_trainer.page.routes import STATIC
from synthrep_trainer.records import Status
from synthrep_trainer.runs import Workplace, locked

from .conftest import ShardMaker
from .pages import BY_PAGE, URL, Page, no_answer


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


def test_a_generator_that_is_gone_takes_only_its_parts_away(make_page):
    page = make_page(generator_url=None)
    assert "SYNTHREP_TRAINER_GENERATOR_URL" in page.get("/")
    assert "is queued" in page.post("runs", dataset="birds", max_steps="30").text
    assert page.browser.get("/page/groups/00").status_code == 422


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
