"""A trainer's page in front of a real generator's API, all in this process."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import httpx
from starlette.testclient import TestClient

from synthrep_generator.api import create_app as create_generator
from synthrep_generator.settings import GeneratorSettings
from synthrep_trainer.api import create_app
from synthrep_trainer.runs import Workplace
from synthrep_trainer.settings import TrainerSettings

URL = "http://generator:8000"
BY_PAGE = {"hx-request": "true"}


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
