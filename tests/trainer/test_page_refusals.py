"""What is refused before the page's routes see it is HTML for a browser at the page."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from synthrep_trainer.api import create_app
from synthrep_trainer.settings import TrainerSettings

BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
HTMX = {"accept": "*/*", "hx-request": "true"}
BEARER = {"authorization": "Bearer right"}
LARGE = b"a=" + b"x" * (1 << 20)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[TestClient]:
    values = {"root": tmp_path / "data", "runs": tmp_path / "runs", "api_keys": ["right"]}
    settings = TrainerSettings.model_validate(values)
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("key", [{}, {"authorization": "Bearer wrong"}])
def test_a_browser_without_an_accepted_key_is_asked_for_one(service, key):
    answer = service.get("/page/parts/runs", headers=BROWSER | key)
    assert answer.status_code == 401
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert 'name="key"' in answer.text
    assert ("not one of the service" in answer.text) == bool(key)


def test_a_form_that_is_too_large_is_told_so_in_its_place(service):
    answer = service.post("/page/runs", content=LARGE, headers=HTMX | BEARER)
    assert answer.status_code == 413
    assert 'role="alert"' in answer.text
    assert "at most 65536 bytes" in answer.text
    assert "<!doctype" not in answer.text


def test_a_body_that_grows_too_large_on_the_way_is_told_so_too(service):
    chunks = (b"x" * 50_000 for _ in range(3))
    answer = service.post("/page/runs", content=chunks, headers=HTMX | BEARER)
    assert (answer.status_code, answer.headers["content-type"]) == (413, "text/html; charset=utf-8")


def test_a_page_that_nobody_made_is_a_page_that_says_so(service):
    answer = service.get("/page/nothing", headers=BROWSER | BEARER)
    assert answer.status_code == 404
    assert "<p>Not Found</p>" in answer.text
    assert 'href="/"' in answer.text
    for name, value in service.get("/", headers=BROWSER).headers.items():
        if name not in ("content-length", "content-type"):
            assert answer.headers[name] == value, name


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/v1/runs", BROWSER),
        ("/v1/runs", HTMX),
        ("/page/events", {"accept": "text/event-stream"}),
        ("/page/parts/runs", {"accept": "application/json"}),
    ],
)
def test_for_everybody_else_a_refusal_is_a_problem(service, path, headers):
    answer = service.get(path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert json.loads(answer.content)["status"] == 401


def test_answers_that_are_no_problem_pass_as_they_are(service):
    text = html.unescape(service.get("/page/parts/runs", headers=BROWSER | BEARER).text)
    assert "No run yet" in text
    style = service.get("/page/static/page.css", headers=BROWSER)
    assert (style.status_code, style.headers["content-type"][:8]) == (200, "text/css")
